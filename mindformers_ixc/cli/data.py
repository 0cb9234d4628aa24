"""`mindformers data`: published datasets to conversation files, what rows suit some data, and what it looks like."""
from __future__ import annotations

import argparse
from collections import Counter

from mindformers_ixc.cli.data_cache import data_cache
from mindformers_ixc.cli.data_index import data_check, data_index
from mindformers_ixc.cli.data_plan import data_plan
from mindformers_ixc.cli.data_preview import data_preview
from mindformers_ixc.data.converters import convert_dataset, drops_text
from mindformers_ixc.errors import DataError

# What reads data as a run does.
READING = {"preview": data_preview, "index": data_index, "check": data_check}


def data(arguments: argparse.Namespace) -> int:
    """Runs `mindformers data`: a converter prints the number of samples, and of what was left out by reason.

    Raises:
        DataError: for options of another kind, and for unusable files.
    """
    kept = arguments.list or arguments.clean or arguments.all
    if kept and arguments.kind != "index":
        raise DataError("--list, --clean and --all belong to `mindformers data index`.")
    if arguments.kind != "preview" and (arguments.sample or arguments.samples is not None):
        raise DataError("--sample and --samples belong to `mindformers data preview`.")
    if arguments.output and arguments.kind not in READING:
        raise DataError("--output belongs to `mindformers data preview`, `index` and `check`.")
    if (arguments.decode or arguments.png or arguments.bad) and arguments.kind != "check":
        raise DataError("--decode, --png and --bad belong to `mindformers data check`.")
    if arguments.kind == "plan":
        return data_plan(arguments)
    if arguments.global_batch or arguments.json:
        raise DataError("--global_batch and --json belong to `mindformers data plan`.")
    if arguments.kind in READING:
        if arguments.images or arguments.split or arguments.format:
            raise DataError("--images, --split and --format belong to the published datasets, not to `mindformers data "
                            f"{arguments.kind}`.")
        return data_cache(arguments) if kept else READING[arguments.kind](arguments)
    if arguments.config:
        raise DataError(f"--config belongs to `mindformers data` {', '.join(READING)} and plan.")
    if len(arguments.files) < 2:
        raise DataError(f"mindformers data {arguments.kind} needs the published files, then the file to be written.")
    *files, target = arguments.files
    if arguments.split and arguments.kind != "ocr_vqa":
        raise DataError(f"--split belongs to ocr_vqa; the files of {arguments.kind} are one split each.")
    options = {"split": arguments.split} if arguments.split else {}
    dropped: Counter[str] = Counter()
    lines = (arguments.format or ("jsonl" if target.endswith(".jsonl") else "json")) == "jsonl"
    count = convert_dataset(arguments.kind, files, target, arguments.images, dropped, lines, **options)
    print(f"{count} samples in {target}{drops_text(dropped)}", file=arguments.answers)
    return 0
