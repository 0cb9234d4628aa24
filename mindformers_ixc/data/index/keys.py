"""Names of what is kept: they follow from everything that its numbers follow from, and from nothing else."""
from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

from mindformers_ixc.data.conversations import ConversationReader
from mindformers_ixc.data.index.store import VERSION
from mindformers_ixc.data.records.base import Fingerprint
from mindformers_ixc.processing.processor import Processor
from mindformers_ixc.processing.tokenizer import SPECIAL_NAMES, SentencePieceText

# Options of reading that are told by what they come to, or that only captions depend on.
_TOLD = ("image_folder", "image_root", "ignore_keys", "caption_prompts", "seed")

# Keys of a tokenizer's section that are asked of the tokenizer itself, or that no length depends on.
_SEEN = ("type", "vocab_file", *SPECIAL_NAMES, "add_bos_token", "add_eos_token")


@dataclass(frozen=True)
class Measures:
    """What the needs of samples depend on.

    Attributes:
        section: keys of the YAML's `train_dataset` that other processes make the processor of, with its tokenizer.
        processor: made of them.
        hd_num: tiles of a picture at most.
        own: whether the tokenizer is this package's, so that other processes can make it without MindFormers.
        decode: whether pixels are read (see `measuring.Measurer`).
    """

    section: Mapping[str, Any]
    processor: Processor
    hd_num: int
    own: bool
    decode: bool = False


class Keys(NamedTuple):
    """Names of the index of a source.

    Attributes:
        base: of how samples are measured, whatever the source's file holds; not of captions' questions.
        asked: of what chooses the questions of captions.
        plain: of the index of a source that has no captions.
        seeded: of one that has.
    """

    base: str
    asked: str
    plain: str
    seeded: str


def keys_of(reader: ConversationReader, measures: Measures, state: Fingerprint) -> Keys:
    """The names of an index.

    Args:
        reader: of the source.
        measures: how its samples are measured.
        state: of the source's file.
    """
    options = reader.options
    # relative names of pictures start in folders of which one may be the working directory
    found = [[os.path.abspath(folder) for folder in reader.folders], str(reader.root or ""),
             sorted(set(options.ignore_keys))]
    rest = {name: value for name, value in asdict(options).items() if name not in _TOLD and (name != "weighs" or value)}
    base = key_of(VERSION, found, rest, _measured_by(measures))
    # the source's name, as it is written, is part of what a caption's question is chosen by
    asked = key_of(options.seed, reader.name, list(options.caption_prompts))
    plain = key_of(base, state)
    return Keys(base, asked, plain, key_of(plain, asked))


def _measured_by(measures: Measures) -> list:
    """What positions and tiles follow from, besides the sample."""
    processor, images = measures.processor, measures.processor.image_processor
    return [images.image_size, images.patch_size, images.training_transform, images.exif, measures.hd_num,
            measures.decode, processor.control_tokens,
            _tokenizer(processor.tokenizer, measures.section.get("tokenizer") or {})]


def _tokenizer(tokenizer: SentencePieceText, section: Mapping[str, Any]) -> list:
    """What ids follow from: the vocabulary's content, wherever it lies, and the marks."""
    with open(tokenizer.vocab_file, "rb") as file:
        vocabulary = hashlib.sha256(file.read()).hexdigest()
    marks = {name: str(getattr(tokenizer, name)) for name in SPECIAL_NAMES}
    rest = {key: value for key, value in section.items() if key not in _SEEN}
    return [vocabulary, marks, sorted(set(tokenizer.control_pieces)), rest]


def key_of(*values: object) -> str:
    """A name that follows from values, of 24 hexadecimal signs."""
    return hashlib.sha256(json.dumps(values, sort_keys=True, default=str).encode()).hexdigest()[:24]
