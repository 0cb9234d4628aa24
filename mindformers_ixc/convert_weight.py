"""MindFormers' calling convention for converters: its `convert_weight.py` options, and the two functions behind them.

    python -m mindformers_ixc.convert_weight --model ixc25 --input_path PUBLIC --output_path ixc25.ckpt --dtype bf16
    python -m mindformers_ixc.convert_weight --model ixc25 --input_path ixc25.ckpt --output_path PUBLIC --reversed

`mindformers convert` does the same and more.
"""
from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from mindformers_ixc.checkpoint.convert import convert
from mindformers_ixc.checkpoint.digests import set_verification
from mindformers_ixc.models.configuration import ModelConfig

MODELS = ("ixc25", ModelConfig.model_type)


def convert_pt_to_ms(input_path: str, output_path: str, dtype: object = None, **kwargs: Any) -> bool:
    """Converts a public checkpoint to MindSpore.

    Args:
        input_path: public directory or file.
        output_path: `.ckpt` or `.safetensors` file, or directory.
        dtype: `fp32`, `bf16`, `fp16`, a MindSpore type, or `None` to keep each tensor's.
        **kwargs: further arguments of `checkpoint.convert.convert`.

    Returns:
        True; what goes wrong is raised.
    """
    convert(input_path, output_path, to="ms", dtype=_dtype_name(dtype), **kwargs)
    return True


def convert_ms_to_pt(input_path: str, output_path: str, dtype: object = None, **kwargs: Any) -> bool:
    """Converts a MindSpore checkpoint to the public layout; arguments as in `convert_pt_to_ms`."""
    convert(input_path, output_path, to="hf", dtype=_dtype_name(dtype), **kwargs)
    return True


def _dtype_name(dtype: object) -> str | None:
    """Name of a type given as text or as MindSpore's."""
    return None if dtype is None else str(dtype).lower()


def main(argv: list[str] | None = None) -> int:
    """Command line; returns the exit code."""
    parser = argparse.ArgumentParser(prog="convert_weight", description=__doc__.split("\n", 1)[0])
    parser.add_argument("--model", choices=MODELS, default=MODELS[0], help="the model; there is one")
    parser.add_argument("--input_path", required=True, help="checkpoint to convert")
    parser.add_argument("--output_path", required=True, help="file or directory to be made")
    parser.add_argument("--dtype", choices=["fp16", "fp32", "bf16"], help="format of the weights")
    parser.add_argument("--config_path", help="config.json, if there is none beside the input")
    parser.add_argument("--no_verify", action="store_true", help="do not compare the input with its digests")
    parser.add_argument("--reversed", action="store_true", help="MindSpore to public")
    arguments = parser.parse_args(argv)
    set_verification(not arguments.no_verify)
    function = convert_ms_to_pt if arguments.reversed else convert_pt_to_ms
    try:
        function(arguments.input_path, arguments.output_path, arguments.dtype, config=arguments.config_path)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"{Path(arguments.output_path)} is complete.", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
