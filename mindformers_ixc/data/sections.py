"""The YAML section `train_dataset`: its keys, and what each must be."""
from __future__ import annotations

from typing import Any

from mindformers_ixc.config import default_max_images
from mindformers_ixc.data.batch import (
    BATCH_COLUMNS,
    EXTRA_COLUMNS,
    GROUP_COLUMNS,
    PACKING_COLUMNS,
    PAIR_COLUMNS,
    WEIGHTS_COLUMN,
)
from mindformers_ixc.data.forms import WEIGHT_KEY
from mindformers_ixc.data.learning import ALL, LOSS_ON, WEIGHTS
from mindformers_ixc.data.mixture import MIXTURE_RULES
from mindformers_ixc.data.packer import Budget
from mindformers_ixc.errors import ConfigError, DataError
from mindformers_ixc.fields import FIELDS
from mindformers_ixc.processing.pictures import EXIF, TRANSPARENCY
from mindformers_ixc.processing.processor import TRANSFORMS
from mindformers_ixc.sections import Rule, above_0, check_section, of_type, one_of, share, whole


def is_list_of_texts(value: object) -> bool:
    """Whether a value is a list of nothing but texts."""
    return isinstance(value, (list, tuple)) and all(isinstance(item, str) for item in value)


# Keys of the `train_dataset` section; MindFormers' own ones come last.
DATASET_RULES = {
    "data_loader": of_type(dict, required=True), "tokenizer": of_type(dict, required=True),
    "seq_length": whole(1, required=True), "max_tiles": whole(1, required=True), "hd_num": whole(1),
    "image_transform": one_of(TRANSFORMS), "transparency": one_of(TRANSPARENCY), "exif": one_of(EXIF),
    "image_size": of_type(int), "patch_size": of_type(int),
    "max_images": whole(1), "max_segments": whole(2),
    "max_bad_share": share(), "packing": of_type(bool), "seed": of_type(int),
    "control_tokens": of_type(bool), "input_columns": of_type(list), "group_size": whole(2),
    "batch_size": of_type(int, required=True), "drop_remainder": of_type(bool), "num_parallel_workers": of_type(int),
    "python_multiprocessing": of_type(bool), "repeat": of_type(int), "prefetch_size": of_type(int),
    "numa_enable": of_type(bool), "construct_args_key": of_type(list),
}
LOADER_RULES = {"type": of_type(str), "dataset_dir": of_type(str, list), "image_folder": of_type(str),
                "image_root": of_type(str), "ignore_keys": Rule(is_list_of_texts, "a list of texts"),
                "shuffle": of_type(bool), "caption_prompts": of_type(list), "mixture": of_type(dict),
                "loss_on": one_of(LOSS_ON), "index_dir": of_type(str), "fetch": of_type(bool),
                "read_timeout": above_0(" of seconds")}


def row_budget(section: Any) -> Budget:
    """What a row holds at most, by a `train_dataset` section.

    Args:
        section: checked, as a mapping.
    """
    max_tiles = section["max_tiles"]
    return Budget(section["seq_length"], max_tiles, section.get("max_images") or default_max_images(max_tiles),
                  section.get("max_segments") or FIELDS["max_segments"].default)


def check_dataset_section(section: Any, preferences: bool = False) -> None:
    """Checks keys and values of a `train_dataset` section as the user wrote it.

    Args:
        section: of the YAML.
        preferences: whether it is of preference pairs.

    Raises:
        DataError: naming the key, its value and the choices.
    """
    check_section(section, DATASET_RULES, "train_dataset", DataError)
    loader = section["data_loader"]
    check_section(loader, LOADER_RULES, "train_dataset.data_loader", DataError)
    check_section(loader.get("mixture") or {}, MIXTURE_RULES, "train_dataset.data_loader.mixture", DataError)
    columns = section.get("input_columns") or list(BATCH_COLUMNS)
    unknown = [name for name in columns if name not in (*BATCH_COLUMNS, *EXTRA_COLUMNS, *PAIR_COLUMNS, *GROUP_COLUMNS)]
    missing = [name for name in BATCH_COLUMNS if name not in columns]
    if unknown or missing:
        raise DataError(f"train_dataset.input_columns {'has the unknown column' if unknown else 'lacks'} "
                        f"{(unknown or missing)[0]}; it needs {', '.join(BATCH_COLUMNS)} and may have "
                        f"{', '.join(EXTRA_COLUMNS)}.")
    if bool(section.get("packing")) != all(name in columns for name in PACKING_COLUMNS):
        raise DataError(f"train_dataset.packing is {section.get('packing')!r}; with packing, and only then, "
                        f"input_columns has {' and '.join(PACKING_COLUMNS)}.")
    _check_loss_on(section, columns, preferences)
    if section.get("packing"):
        if preferences:
            raise DataError("train_dataset.packing is True, but preference pairs are not packed: the two answers of a "
                            "pair are a row each; take packing out, here and in model.model_config.")
        row_budget(section).check()


def _check_loss_on(section: Any, columns: list[str], preferences: bool) -> None:
    """Refuses a choice among answers where there is none, and weights without their column or the other way round."""
    key, loss_on = "train_dataset.data_loader.loss_on", section["data_loader"].get("loss_on") or ALL
    if preferences and loss_on != ALL:
        raise DataError(f"{key} is {loss_on!r}, but of preference pairs whole answers are compared; take it out.")
    if section.get("control_tokens") and loss_on != ALL:
        raise DataError(f"{key} is {loss_on!r}, but with train_dataset.control_tokens answers are found by marks that "
                        "their texts may have too; set one of them otherwise.")
    if (loss_on == WEIGHTS) != (WEIGHTS_COLUMN in columns):
        raise DataError(f"{key} is {loss_on!r}; with {WEIGHTS} (a number {WEIGHT_KEY} with each answer), and only "
                        f"then, train_dataset.input_columns has {WEIGHTS_COLUMN}.")


def check_shapes(model: Any, data: Any) -> None:
    """Refuses rows of other shapes than the model's graph takes.

    Args:
        model: the YAML's `model.model_config`, as a mapping.
        data: its `train_dataset`, checked.

    Raises:
        ConfigError: naming both keys and both values.
    """
    budget, vision = row_budget(data), model.get("vision_config") or {}
    images = model.get("max_images") or default_max_images(model.get("max_tiles") or budget.max_tiles)
    pairs = [*((key, model.get(key), data.get(key)) for key in ("seq_length", "max_tiles")),
             ("packing", bool(model.get("packing")), bool(data.get("packing"))),
             ("max_images", images, budget.max_images),
             ("max_segments", model.get("max_segments") or FIELDS["max_segments"].default, budget.max_segments),
             *((key, vision.get(key), data.get(key)) for key in ("image_size", "patch_size"))]
    for key, ours, theirs in pairs:
        if ours is not None and theirs is not None and ours != theirs:
            raise ConfigError(f"model.model_config has {key} {ours} but train_dataset has {key} {theirs}; the graph "
                              "has one static shape, so give both the same value (a YAML anchor does it).")
