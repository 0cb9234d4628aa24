"""The YAML section `train_dataset`: its keys, and the type each must have."""
from __future__ import annotations

from mindformers_ixc.data.batch import BATCH_COLUMNS, EXTRA_COLUMNS, PACKING_COLUMNS
from mindformers_ixc.errors import DataError

# Keys of the `train_dataset` section and the type each must have; MindFormers' own ones come last.
DATASET_KEYS = {
    "data_loader": dict, "tokenizer": dict, "seq_length": int, "max_tiles": int, "hd_num": int,
    "image_transform": str, "image_size": int,
    "patch_size": int, "max_bad_share": float, "input_columns": list, "batch_size": int, "drop_remainder": bool,
    "num_parallel_workers": int, "python_multiprocessing": bool, "repeat": int, "seed": int, "prefetch_size": int,
    "numa_enable": bool, "packing": bool, "construct_args_key": list,
}
LOADER_KEYS = {"type": str, "dataset_dir": (str, list), "image_folder": str, "shuffle": bool, "caption_prompts": list,
               "mixture": dict}


def check_dataset_section(section: dict) -> None:
    """Checks keys and types of a `train_dataset` section as the user wrote it.

    Raises:
        DataError: naming the key, its value and the choices.
    """
    _check_section(section, DATASET_KEYS, "train_dataset")
    _check_section(section["data_loader"], LOADER_KEYS, "train_dataset.data_loader")
    columns = section.get("input_columns") or list(BATCH_COLUMNS)
    unknown = [name for name in columns if name not in (*BATCH_COLUMNS, *EXTRA_COLUMNS, "reference_logps")]
    missing = [name for name in BATCH_COLUMNS if name not in columns]
    if unknown or missing:
        raise DataError(f"train_dataset.input_columns {'has the unknown column' if unknown else 'lacks'} "
                        f"{(unknown or missing)[0]}; it needs {', '.join(BATCH_COLUMNS)} and may have "
                        f"{', '.join(EXTRA_COLUMNS)}.")
    if bool(section.get("packing")) != all(name in columns for name in PACKING_COLUMNS):
        raise DataError(f"train_dataset.packing is {section.get('packing')!r}; with packing, and only then, "
                        f"input_columns has {' and '.join(PACKING_COLUMNS)}.")


def _check_section(section: dict, keys: dict[str, type], where: str) -> None:
    """Checks keys and types of a section.

    Raises:
        DataError: naming the key, its value and the choices.
    """
    for key, value in section.items():
        if key not in keys:
            raise DataError(f"Unknown key {where}.{key} (value {value!r}); the choices are {', '.join(sorted(keys))}.")
        wanted = keys[key]
        wanted = (int, float) if wanted is float else wanted
        if value is not None and (not isinstance(value, wanted) or (wanted is int and isinstance(value, bool))):
            name = getattr(wanted, "__name__", "text or a list" if wanted == (str, list) else "number")
            raise DataError(f"{where}.{key} is {value!r}, expected {name}.")
    required = [key for key in ("data_loader", "tokenizer", "seq_length", "max_tiles", "batch_size") if key in keys]
    missing = [key for key in required if section.get(key) is None]
    if missing:
        raise DataError(f"{where} lacks {', '.join(missing)}.")
