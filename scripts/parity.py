"""Compares this package with reference outputs of the public code and prints a table.

    python scripts/parity.py DIR [--tokenizer FILE] [--mode graph|pynative]

DIR is laid out like the reference outputs under tests/data/goldens or those under tests/data/goldens_more, which is
told by its files: model folders (config.json, model.safetensors, *.npz) and the host-side references beside them. What
DIR does not hold is not checked; the checks of the tokenizer and of prompts also need the public tokenizer file.
"""
from __future__ import annotations

import argparse
import os
import sys
from functools import partial
from pathlib import Path

os.environ.setdefault("GLOG_v", "3")


def collect(folder: Path, tokenizer_file: Path | None):
    """Yields (name, function without arguments) of every check the folder has references for."""
    import parity_device
    import parity_host
    import parity_video
    import parity_wide
    import parity_wide_host

    host = [("tokenizer.json", parity_host.check_tokenizer, True), ("prompts.json", parity_host.check_prompts, True),
            ("labels.json", parity_host.check_labels, False),
            ("image_transforms.json", parity_host.check_images, False), ("video.json", parity_video.check_video, False)]
    if (folder / "image_sizes.json").is_file():        # only the wide layout has it
        host = parity_wide_host.CHECKS
    for file, check, needs_tokenizer in host:
        if (folder / file).is_file() and not (needs_tokenizer and tokenizer_file is None):
            yield file, partial(check, folder, *[tokenizer_file] * needs_tokenizer)
    models = [folder] if (folder / "config.json").is_file() else sorted(p.parent for p in folder.glob("*/config.json"))
    for model in models:
        wide = parity_wide.is_wide(model)
        checks = {("vision.npz",): [(parity_wide_host if wide else parity_host).check_global_view,
                                    parity_device.check_vision]}
        for files, more in (parity_wide if wide else parity_device).CHECKS.items():
            checks[files] = checks.get(files, []) + more
        for files, found in checks.items():
            for check in found if all((model / file).is_file() for file in files) else ():
                yield f"{model.name}: {check.__name__}", partial(check, model)


def main(argv: list[str] | None = None) -> int:
    """Runs the checks; gives 0 when all pass, else 1."""
    parser = argparse.ArgumentParser(description="Compares the package with reference outputs of the public code.")
    parser.add_argument("folder", type=Path, metavar="DIR")
    parser.add_argument("--tokenizer", type=Path, metavar="FILE", help="the public tokenizer.model")
    parser.add_argument("--mode", choices=["graph", "pynative"], default="graph", help="execution mode of MindSpore")
    arguments = parser.parse_args(argv)
    if not arguments.folder.is_dir():
        parser.error(f"{arguments.folder} is not a folder.")
    import mindspore as ms
    from parity_rows import Row

    ms.set_context(mode=ms.GRAPH_MODE if arguments.mode == "graph" else ms.PYNATIVE_MODE)
    ms.set_device("CPU")
    print(f"{'check':72} {'cases':>5} {'error':>10} {'bar':>8}  result")
    passed = failed = 0
    for name, check in collect(arguments.folder, arguments.tokenizer):
        try:
            rows = check()
        except Exception as error:   # one broken check must not hide the others
            print(f"{name}: {type(error).__name__}: {' '.join(str(error).split())[:300]}", file=sys.stderr)
            rows = [Row(name, 0, float("nan"), 0.0, False)]
        for result in rows:
            print(f"{result.check:72} {result.cases:5} {result.error:10.2e} {result.bar:8.0e}  "
                  f"{'pass' if result.passed else 'FAIL'}", flush=True)
            passed, failed = passed + result.passed, failed + (not result.passed)
    print(f"{passed} passed, {failed} failed")
    return 0 if failed == 0 and passed else 1


if __name__ == "__main__":
    sys.exit(main())
