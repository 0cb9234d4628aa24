"""From the YAML's `train_dataset` to the samples of a run, over the indices of its sources."""
from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from typing import Any

from mindformers_ixc.data.conversations import (
    CAPTION_PROMPTS,
    ReadingOptions,
    choice_seed,
    named_sources,
)
from mindformers_ixc.data.index.building import open_index
from mindformers_ixc.data.index.keys import Measures
from mindformers_ixc.data.index.kinds import open_reader
from mindformers_ixc.data.index.samples import IndexedSource
from mindformers_ixc.data.learning import WEIGHTS
from mindformers_ixc.data.records.base import Records
from mindformers_ixc.data.records.latest import GROUP_BYTES
from mindformers_ixc.data.records.parquet import ParquetRecords
from mindformers_ixc.data.rows import has_own_tokenizer
from mindformers_ixc.errors import DataError
from mindformers_ixc.processing.image import HD_NUM_TRAINING
from mindformers_ixc.processing.processor import Processor

logger = logging.getLogger(__name__)

# Keys of `train_dataset` that a processor for measuring is made of, besides the tokenizer.
KEYS = ("image_size", "patch_size", "image_transform", "control_tokens", "exif", "hd_num")


def measures_of(section: Mapping[str, Any], processor: Processor, decode: bool = False) -> Measures:
    """How the samples of a section are measured.

    Args:
        section: `train_dataset` of the YAML.
        processor: of the section.
        decode: whether pixels are read (see `Measurer`).
    """
    kept = {key: section.get(key) for key in KEYS if section.get(key) is not None}
    return Measures({**kept, "tokenizer": dict(section["tokenizer"])}, processor,
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
                          tuple(loader.get("ignore_keys") or ()), bool(loader.get("fetch")), kind,
                          loader.get("loss_on") == WEIGHTS)


def open_sources(loader: Mapping[str, Any], seed: int, measures: Measures,
                 folder: str | os.PathLike | None = None, bad_share: float = 0.0,
                 failed: list[tuple[str, str]] | None = None, kind: str = "sample") -> list[IndexedSource]:
    """The sources of a `data_loader` section, each with its index, which is built where there is none.

    Args:
        loader: of the YAML.
        seed: of the run.
        measures: how samples are measured.
        folder: where indices lie; by default in the user's cache.
        bad_share: share of a source's samples that may be wrong; they are left out (see `open_index`).
        failed: gets the sources that cannot be used, each with a sentence; without it the first one is an error.
        kind: of the samples, of `KINDS`.

    Raises:
        DataError: for sources that cannot be used.
        FileNotFoundError: for one that is missing.
    """
    options, sources = reading_options(loader, seed, kind), []
    for path, count in named_sources(loader.get("dataset_dir")):
        try:
            index = open_index(path, options, measures, folder, bad_share)
            reader = open_reader(path, options)
        except (DataError, FileNotFoundError) as error:
            if failed is None:
                raise
            failed.append((str(path), str(error)))
            continue
        reader.records.expect(*index.description.fingerprint[:2])
        sources.append(IndexedSource(index, reader, count, choice_seed(seed, path)))
    _tell_large_groups([source.reader.records for source in sources])
    return sources


def _tell_large_groups(sources: Sequence[Records]) -> None:
    """Says which Parquet files take long in any other order than their own."""
    large = {source.name: max(source.sizes) for source in sources
             if isinstance(source, ParquetRecords) and max(source.sizes, default=0) > GROUP_BYTES}
    if large:
        name = max(large, key=lambda name: large[name])
        more = f" (and {len(large) - 1} more)" if len(large) > 1 else ""
        logger.warning(f"{name}{more} has row groups of up to {large[name] / 1e6:,.0f} MB. A row is found by reading "
                       "its group from the start, so shuffled samples are slow; write the file anew with row groups of "
                       f"at most {GROUP_BYTES >> 20} MiB (docs/data.md, Row groups), or set data_loader.shuffle to "
                       "False.")
