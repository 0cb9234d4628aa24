"""`mindformers data`: published datasets to conversation files."""
from __future__ import annotations

import argparse
from collections import Counter

from mindformers_ixc.data.converters import convert_dataset, drops_text
from mindformers_ixc.errors import DataError


def data(arguments: argparse.Namespace) -> int:
    """Runs `mindformers data` and prints the number of samples, and of what was left out by reason."""
    *files, target = arguments.files
    if arguments.split and arguments.kind != "ocr_vqa":
        raise DataError(f"--split belongs to ocr_vqa; the files of {arguments.kind} are one split each.")
    options = {"split": arguments.split} if arguments.split else {}
    dropped: Counter[str] = Counter()
    count = convert_dataset(arguments.kind, files, target, arguments.images, dropped, **options)
    print(f"{count} samples in {target}{drops_text(dropped)}", file=arguments.answers)
    return 0
