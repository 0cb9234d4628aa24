"""From the YAML's `train_dataset` to the samples of a run, over the indices of its sources."""
from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from mindformers_ixc.data.conversations import (
    CAPTION_PROMPTS,
    ReadingOptions,
    choice_seed,
    named_sources,
)
from mindformers_ixc.data.index.building import Measures, open_index
from mindformers_ixc.data.index.kinds import open_reader
from mindformers_ixc.data.index.samples import IndexedSource
from mindformers_ixc.data.records.base import fingerprint
from mindformers_ixc.data.rows import has_own_tokenizer
from mindformers_ixc.errors import DataError
from mindformers_ixc.processing.image import HD_NUM_TRAINING
from mindformers_ixc.processing.processor import Processor
from mindformers_ixc.resources import resolve_path

# Keys of `train_dataset` that what samples need depends on, besides the tokenizer.
KEYS = ("image_size", "patch_size", "image_transform", "control_tokens", "exif", "hd_num")


def measures_of(section: Mapping[str, Any], processor: Processor, decode: bool = False) -> Measures:
    """How the samples of a section are measured.

    Args:
        section: `train_dataset` of the YAML.
        processor: of the section.
        decode: whether pixels are read (see `Measurer`).
    """
    tokenizer = dict(section["tokenizer"])
    files = {key: fingerprint(resolve_path(value))._replace(time=0) for key, value in tokenizer.items()
             if isinstance(value, str) and os.path.isfile(resolve_path(value))}
    kept = {key: section.get(key) for key in KEYS if section.get(key) is not None}
    return Measures({**kept, "tokenizer": tokenizer, "files": files}, processor,
                    section.get("hd_num") or HD_NUM_TRAINING, has_own_tokenizer(section), decode)


def reading_options(loader: Mapping[str, Any], seed: int, kind: str = "sample") -> ReadingOptions:
    """How the records of a `data_loader` section become samples of a kind (`KINDS`).

    Raises:
        DataError: for prompts that are none.
    """
    prompts = loader.get("caption_prompts")
    prompts = CAPTION_PROMPTS if prompts is None else prompts
    if not prompts or not all(isinstance(prompt, str) for prompt in prompts):
        raise DataError(f"train_dataset.data_loader.caption_prompts is {prompts!r}, expected a list of questions.")
    return ReadingOptions(loader.get("image_folder"), tuple(prompts), seed, loader.get("image_root"),
                          tuple(loader.get("ignore_keys") or ()), bool(loader.get("fetch")), kind)


def open_sources(loader: Mapping[str, Any], seed: int, measures: Measures,
                 folder: str | os.PathLike | None = None, all_errors: bool = False,
                 kind: str = "sample") -> list[IndexedSource]:
    """The sources of a `data_loader` section, each with its index, which is built where there is none.

    Args:
        loader: of the YAML.
        seed: of the run.
        measures: how samples are measured.
        folder: where indices lie; by default in the user's cache.
        all_errors: see `open_index`.
        kind: of the samples, of `KINDS`.

    Raises:
        DataError: for sources that cannot be used.
        FileNotFoundError: for one that is missing.
    """
    options, sources = reading_options(loader, seed, kind), []
    for path, count in named_sources(loader.get("dataset_dir")):
        index, reader = open_index(path, options, measures, folder, all_errors), open_reader(path, options)
        reader.records.expect(*index.description.fingerprint[:2])
        sources.append(IndexedSource(index, reader, count, choice_seed(seed, path)))
    return sources
