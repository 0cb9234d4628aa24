"""Compares this package with reference outputs of the public code and prints a table.

    python scripts/parity.py DIR [--tokenizer FILE] [--mode graph|pynative]

DIR is laid out like the reference outputs under tests/data/goldens: model folders (config.json, model.safetensors,
*.npz) and the host-side references beside them. What DIR does not hold is not checked; the checks of the tokenizer and
of prompts also need the public tokenizer file.
"""
from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

os.environ.setdefault("GLOG_v", "3")


def collect(folder: Path, tokenizer_file: Path | None):
    """Yields (name, function without arguments) of every check the folder has references for."""
    import parity_device
    import parity_host
    import parity_video

    def with_tokenizer(check):
        return lambda: check(folder, tokenizer_file)

    for file, check in (("tokenizer.json", parity_host.check_tokenizer), ("prompts.json", parity_host.check_prompts)):
        if tokenizer_file is not None and (folder / file).is_file():
            yield file, with_tokenizer(check)
    for file, check in (("labels.json", parity_host.check_labels),
                        ("image_transforms.json", parity_host.check_images), ("video.json", parity_video.check_video)):
        if (folder / file).is_file():
            yield file, (lambda check=check: check(folder))
    models = [folder] if (folder / "config.json").is_file() else sorted(p.parent for p in folder.glob("*/config.json"))
    for model in models:
        if (model / "vision.npz").is_file():
            yield f"{model.name}: global view", (lambda model=model: parity_host.check_global_view(model))
        for file, checks in parity_device.CHECKS.items():
            for check in checks if (model / file).is_file() else ():
                yield f"{model.name}: {check.__name__}", (lambda check=check, model=model: check(model))


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
