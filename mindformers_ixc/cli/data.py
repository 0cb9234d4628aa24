"""`mindformers data`: published datasets to conversation files, and what rows suit some data."""
from __future__ import annotations

import argparse
from collections import Counter

from mindformers_ixc.cli.data_plan import data_plan
from mindformers_ixc.data.converters import convert_dataset, drops_text
from mindformers_ixc.errors import DataError


def data(arguments: argparse.Namespace) -> int:
    """Runs `mindformers data`: a converter prints the number of samples, and of what was left out by reason.

    Raises:
        DataError: for options of another kind, and for unusable files.
    """
    if arguments.kind == "plan":
        return data_plan(arguments)
    if arguments.config or arguments.global_batch or arguments.json:
        raise DataError("--config, --global_batch and --json belong to `mindformers data plan`.")
    if len(arguments.files) < 2:
        raise DataError(f"mindformers data {arguments.kind} needs the published files, then the file to be written.")
    *files, target = arguments.files
    if arguments.split and arguments.kind != "ocr_vqa":
        raise DataError(f"--split belongs to ocr_vqa; the files of {arguments.kind} are one split each.")
    options = {"split": arguments.split} if arguments.split else {}
    dropped: Counter[str] = Counter()
    count = convert_dataset(arguments.kind, files, target, arguments.images, dropped, **options)
    print(f"{count} samples in {target}{drops_text(dropped)}", file=arguments.answers)
    return 0
