"""Packing that cannot be: each is one sentence, before data are read where it can be."""
from __future__ import annotations

import pytest

from mindformers_ixc.cli.run_config import check_fields
from mindformers_ixc.cli.yaml_file import apply_overrides, read_yaml
from mindformers_ixc.errors import DataError

COLUMNS = ["input_ids", "labels", "pixel_values", "vision_index", "image_mask"]


def check(recipe: str, **fields) -> None:
    yaml = read_yaml(f"yaml_configs/{recipe}.yaml")
    apply_overrides(yaml, {f"train_dataset.{name}": value for name, value in fields.items()})
    check_fields(yaml, recipe)


@pytest.fixture(autouse=True)
def in_repository(request, monkeypatch):
    monkeypatch.chdir(request.config.rootpath)


def test_preference_pairs_are_not_packed():
    columns = read_yaml("yaml_configs/ixc25_dpo_tiny.yaml")["train_dataset"]["input_columns"]
    from mindformers_ixc.data.batch import PACKING_COLUMNS
    with pytest.raises(DataError, match="packing is True, but preference pairs are not packed"):
        check("ixc25_dpo_tiny", packing=True, input_columns=[*columns, *PACKING_COLUMNS])


@pytest.mark.parametrize(("fields", "message"), [
    ({"seq_length": 10}, "Rows of seq_length 10 with max_segments 16 hold no sample"),
    ({"max_segments": 1}, "max_segments is 1; it must be a whole number of at least 2"),
    ({"max_segments": 300}, "Rows of seq_length 256 with max_segments 300 hold no sample"),
    ({"max_images": 0}, "max_images is 0; it must be a whole number of at least 1"),
    ({"data_loader.mixture": {"weights": [1, 1], "samples_per_epoch": -4}}, "samples_per_epoch is -4")])
def test_budgets_without_room_are_refused(fields, message):
    with pytest.raises(DataError, match=message):
        check("ixc25_language_tiny", **fields)
