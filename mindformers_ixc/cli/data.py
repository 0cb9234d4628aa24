"""`mindformers data` and `mindformers reference`: files to train on from other files."""
from __future__ import annotations

import argparse

from mindformers_ixc.data.converters import convert_dataset
from mindformers_ixc.errors import DataError


def data(arguments: argparse.Namespace) -> int:
    """Runs `mindformers data` and prints the number of samples."""
    *files, target = arguments.files
    if arguments.split and arguments.kind != "ocr_vqa":
        raise DataError(f"--split belongs to ocr_vqa; the files of {arguments.kind} are one split each.")
    options = {"split": arguments.split} if arguments.split else {}
    count = convert_dataset(arguments.kind, files, target, arguments.images, **options)
    print(f"{count} samples in {target}", file=arguments.answers)
    return 0


def reference(arguments: argparse.Namespace) -> int:
    """Runs `mindformers reference` and prints the number of pairs."""
    from mindformers_ixc.cli.inference import prepare_device
    from mindformers_ixc.training.reference import add_reference_logps

    prepare_device(arguments)
    count = add_reference_logps(arguments.pairs, arguments.target, arguments.model, arguments.mode, arguments.hd_num,
                                arguments.image_transform, arguments.image_folder, arguments.batch_size)
    print(f"{count} pairs in {arguments.target}", file=arguments.answers)
    return 0
