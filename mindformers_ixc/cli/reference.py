"""`mindformers reference`: log-probabilities of a reference model, for preference pairs."""
from __future__ import annotations

import argparse

from mindformers_ixc.cli.inference import image_options, prepare_device
from mindformers_ixc.training.reference import add_reference_logps


def reference(arguments: argparse.Namespace) -> int:
    """Runs `mindformers reference` and prints the number of pairs."""
    prepare_device(arguments)
    count = add_reference_logps(arguments.pairs, arguments.target, arguments.model, arguments.mode, arguments.hd_num,
                                arguments.image_transform, arguments.image_folder, arguments.batch_size,
                                arguments.image_root, arguments.ignore_keys, arguments.control_tokens,
                                image_options(arguments))
    print(f"{count} pairs in {arguments.target}", file=arguments.answers)
    return 0
