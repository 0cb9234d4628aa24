"""The `train_dataset` section that a `mindformers data` command reads samples by."""
from __future__ import annotations

import argparse

from mindformers_ixc.cli.run_config import top_keys
from mindformers_ixc.cli.yaml_file import apply_overrides, parse_overrides, read_yaml
from mindformers_ixc.data.sections import check_dataset_section
from mindformers_ixc.errors import ConfigError
from mindformers_ixc.reading import watch_reads
from mindformers_ixc.sections import check_keys

# The recipe that data is read by where none is named.
RECIPE = "ixc25_own_tiny"


def read_section(arguments: argparse.Namespace) -> tuple[dict, dict, bool]:
    """The section of `--config`, or of the recipe, with its overrides.

    Args:
        arguments: `config`, `rest`.

    Returns:
        All fields of the YAML, its checked section, and whether it is of preference pairs.

    Raises:
        ConfigError: when there is no such section, or a key is wrong.
    """
    fields = read_yaml(arguments.config or RECIPE)
    apply_overrides(fields, parse_overrides(arguments.rest))
    check_keys(fields, top_keys(), source=arguments.config or RECIPE)
    section = fields.get("train_dataset")
    if not isinstance(section, dict) or not section:
        raise ConfigError(f"{arguments.config} has no section train_dataset, so it does not say how samples are read; "
                          "name the YAML file of a training run.")
    pairs = (fields.get("train_dataset_task") or {}).get("type") == "IXC25PreferenceDataset"
    check_dataset_section(section, pairs)
    watch_reads(section["data_loader"].get("read_timeout"))
    return fields, section, pairs
