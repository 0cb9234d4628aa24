"""Conversation files to checked samples; no pixels are decoded here.

A source is a JSON list, JSON lines, a Parquet file or a tar shard of `{"id", "conversations": [{"from", "value"}, ...],
"image"}` as the public fine-tuning scripts read them, or in another of the forms of `mindformers_ixc.data.forms`; or a
table (`mindformers_ixc.data.records`). A list file names sources and how many thousand samples to take from each.
"""
from __future__ import annotations

import os
import random
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from mindformers_ixc.data.embedded import held_in
from mindformers_ixc.data.fetching import fetched, is_web_address
from mindformers_ixc.data.folders import find_data
from mindformers_ixc.data.forms import Form, read_form
from mindformers_ixc.data.paths import check_root, find_file, missing_file, search_folders, shown
from mindformers_ixc.data.records import open_records
from mindformers_ixc.data.records.base import Place, Record
from mindformers_ixc.errors import DataError
from mindformers_ixc.files import read_text, text_lines
from mindformers_ixc.processing.stored import StoredFile
from mindformers_ixc.reading import reading
from mindformers_ixc.resources import resolve_path

# Questions that a caption answers, one chosen at random for each (arXiv 2407.03320, pre-training).
CAPTION_PROMPTS = ("Describe this image briefly.", "Describe this image in detail.")

# A message lists this many bad samples; the rest are counted.
LISTED_ERRORS = 10

# Samples that a line of a list file may ask for; more would be a mistake, and fill the memory.
MOST_SAMPLES = 10 ** 9

# A comment begins its line or follows white space: names may have the sign.
_COMMENT = re.compile(r"(^|\s)#.*")

# Most records have no files of their own.
_NO_FILES: Mapping[str, StoredFile] = {}

# Scans below this many samples finish before a progress bar would be read.
PROGRESS_FROM = 1000


@dataclass
class Conversation:
    """One sample of a source.

    Attributes:
        source: file it comes from.
        index: position in that file.
        id: the file's own id.
        turns: (role, text), user and assistant in turn, after an optional system turn.
        images: paths, or files inside the source, in the order of their places.
        sizes: (width, height) of each image, filled in by the scan.
        weights: of the answers, one each, where they are read; otherwise none.
    """

    source: str
    index: int
    id: object
    turns: list[tuple[str, str]]
    images: list[Path | StoredFile] = field(default_factory=list)
    sizes: list[tuple[int, int]] = field(default_factory=list)
    weights: list[float] = field(default_factory=list)

    @property
    def where(self) -> str:
        """Names the sample in messages."""
        return f"{self.source}, sample {self.index} (id {shown(self.id)})"


@dataclass(frozen=True)
class ReadingOptions:
    """How the records of a source become conversations.

    Attributes:
        image_folder: where relative paths of pictures and videos start; by default the source's folder, then the
            working directory.
        caption_prompts: questions for samples that are captions.
        seed: of the choice among them.
        image_root: a folder that every picture and video must lie in, links followed; by default any file may be named.
        ignore_keys: keys of samples and turns that are not read.
        fetch: whether http(s) addresses of pictures and videos are fetched; otherwise they are refused.
        kind: what a record is, `sample` or `pair` (`mindformers_ixc.data.index.kinds`).
        weighs: whether answers may say how much they count (`mindformers_ixc.data.learning`).
    """

    image_folder: str | os.PathLike | None = None
    caption_prompts: Sequence[str] = CAPTION_PROMPTS
    seed: int = 0
    image_root: str | os.PathLike | None = None
    ignore_keys: Sequence[str] = ()
    fetch: bool = False
    kind: str = "sample"
    weighs: bool = False


class ConversationReader:
    """Reads single conversations of a source.

    Args:
        path: the source; `pkg:` paths work.
        options: how.

    Attributes:
        folders: where relative names of pictures and videos start.
        root: of `check_root`.
        asked: captions that were read so far, whose questions are chosen by the seed.

    Raises:
        DataError: when the source is not what its name says.
        FileNotFoundError: when it is missing.
    """

    def __init__(self, path: str | os.PathLike, options: ReadingOptions):
        self.name, self.records, self.options = str(path), open_records(path, options.kind), options
        self.folders = search_folders(self.records.home, options.image_folder)
        self.root = check_root(options.image_root)
        self.asked = 0

    def read(self, index: int, place: Place) -> Conversation:
        """A conversation whose files are found.

        Args:
            index: its number in the source.
            place: where it lies.

        Raises:
            DataError: naming sample and key of what is wrong with it.
        """
        record, options = self.record(index, place), self.options
        form = read_form(record.row, self.records.where(index), options.ignore_keys, partial(self._ask, index),
                         options.weighs)
        return make_conversation(form, self.name, index, record.row.get("id"), self.folders, self.root,
                                 record.files, options.fetch)

    def record(self, index: int, place: Place) -> Record:
        """What the source holds of a sample; arguments and errors as of `read`."""
        with reading(self.name):
            return self.records.read(index, place)

    def _ask(self, index: int) -> str:
        """The question that a caption answers."""
        self.asked += 1
        return _prompt(self.options.caption_prompts, f"{self.options.seed} {self.name} {index}")

    def load(self, bad_share: float = 0.0) -> list[Any]:
        """Everything in the source that can be read; for files that are small.

        Args:
            bad_share: share of the samples that may be wrong; they are left out.

        Raises:
            DataError: listing what is wrong with which samples, if there are more.
        """
        samples, errors = list[Any](), list[str]()
        for index, place in self.records:
            try:
                samples.append(self.read(index, place))
            except DataError as error:
                errors.append(str(error))
        refuse_errors(errors, len(samples) + len(errors), bad_share)
        return samples


def load_conversations(path: str | os.PathLike, image_folder: str | os.PathLike | None = None,
                       caption_prompts: Sequence[str] = CAPTION_PROMPTS, seed: int = 0,
                       image_root: str | os.PathLike | None = None,
                       ignore_keys: Sequence[str] = (), weighs: bool = False) -> list[Conversation]:
    """Reads one source, all of it, and checks its structure; for files that are small.

    Args:
        path: the file; `pkg:` paths work.
        image_folder: see `ReadingOptions`, as the others.
        caption_prompts: of `ReadingOptions`.
        seed: of `ReadingOptions`.
        image_root: of `ReadingOptions`.
        ignore_keys: of `ReadingOptions`.
        weighs: of `ReadingOptions`.

    Raises:
        DataError: listing what is wrong with which samples.
        FileNotFoundError: when the file is missing.
    """
    options = ReadingOptions(image_folder, caption_prompts, seed, image_root, ignore_keys, weighs=weighs)
    return ConversationReader(path, options).load()


def _prompt(prompts: Sequence[str], seed: str) -> str:
    return random.Random(seed).choice(list(prompts))


def make_conversation(form: Form, source: str, index: int, identity: object, folders: Sequence[Path],
                      root: Path | None = None, files: Mapping[str, StoredFile] = _NO_FILES,
                      fetch: bool = False) -> Conversation:
    """A sample whose files are found.

    Args:
        form: what its file says.
        source: name of that file in messages.
        index: position in it.
        identity: the file's own id.
        folders: of `search_folders`.
        root: of `check_root`.
        files: that come with the record, by the names it has for them.
        fetch: whether http(s) addresses are fetched.

    Raises:
        DataError: naming sample and key of a picture or video that is missing.
    """
    sample = Conversation(source, index, identity, form.turns, weights=form.weights)
    for file in form.files:
        field = f"{sample.where}, field {file.field}"
        try:
            if file.name in files:
                sample.images.append(files[file.name])
            elif fetch and is_web_address(file.name):
                sample.images.append(fetched(file.name, field))
            else:
                sample.images.append(held_in(file.name, field) or find_file(file.name, folders, root))
        except FileNotFoundError as error:
            noun = "video" if file.video else "picture"
            raise DataError(f"{field}: the {noun} {error}.") from error
    return sample


def raise_errors(errors: Sequence[str], end: str = "") -> None:
    """Raises one `DataError` for all errors found, if any; what is said of several samples is said once.

    Args:
        errors: the sentences.
        end: a sentence that comes last.
    """
    if errors:
        errors = list(dict.fromkeys(errors))
        more = f"\n... and {len(errors) - LISTED_ERRORS} more" if len(errors) > LISTED_ERRORS else ""
        raise DataError("\n".join(errors[:LISTED_ERRORS]) + more + (f"\n{end}" if end else ""))


def refuse_errors(errors: Sequence[str], samples: int, bad_share: float) -> None:
    """Refuses a source of which too many samples cannot be read.

    Args:
        errors: the sentences about those.
        samples: of the source.
        bad_share: share of them that may be left out.

    Raises:
        DataError: saying of the first ones what is wrong with them.
    """
    if len(errors) > bad_share * samples:
        end = (f"{len(errors)} of {samples} samples cannot be used, more than the share max_bad_share {bad_share:g} "
               "allows.") if len(errors) > 1 and bad_share else ""
        raise_errors(errors, end)


def named_sources(dataset_dir: str | os.PathLike | Sequence[str] | None) -> Iterator[
        tuple[str | os.PathLike, int | None]]:
    """The sources that `dataset_dir` names, each with the samples that a list file takes of it (`None`: all, once).

    Raises:
        DataError: when it names none, and for a bad list file.
        FileNotFoundError: for a missing list file.
    """
    if isinstance(dataset_dir, (list, tuple)) and dataset_dir:
        for path in dataset_dir:
            yield from named_sources(path)
        return
    if not isinstance(dataset_dir, (str, os.PathLike)) or not str(dataset_dir):
        found = f"has the entry {shown(dataset_dir)}" if dataset_dir else "is empty"
        raise DataError(f"train_dataset.data_loader.dataset_dir {found}; name a .json, .jsonl, .csv, .parquet, .tar or "
                        ".txt file, or a folder with a table.")
    with reading(dataset_dir):
        if resolve_path(dataset_dir).is_dir():
            dataset_dir = find_data(str(resolve_path(dataset_dir)))
    if str(dataset_dir).endswith(".txt"):
        yield from read_list_file(dataset_dir)
    else:
        yield dataset_dir, None


def choice_seed(seed: int, path: str | os.PathLike) -> str:
    """Seed of the choice among the samples of a source of a list file."""
    return f"{seed} {path}"


def read_list_file(path: str | os.PathLike) -> list[tuple[Path, int]]:
    """Sources of a list file with the number of samples to take from each.

    Raises:
        DataError: for a line that is not `<source> <thousands>`, a missing source, a file without sources, and for what
            is no regular file.
        FileNotFoundError: when it is missing.
    """
    file = resolve_path(path)
    with reading(path):
        if not file.is_file():
            raise missing_file(f"The list file {path}", file)
        text = read_text(path)
    sources = []
    for number, line in text_lines(text):
        line = _COMMENT.sub("", line).strip()
        if not line:
            continue
        name, *rest = line.rsplit(None, 1)
        try:
            count = round(float(*rest or "0") * 1000)
        except (ValueError, OverflowError):
            count = 0
        if not 1 <= count <= MOST_SAMPLES:
            raise DataError(f"{path}, line {number}: expected `<json path> <number of samples in thousands, above 0>` "
                            f"(at most {MOST_SAMPLES // 1000}), found {shown(line)}.")
        try:
            sources.append((find_file(name, [file.parent, Path()]), count))
        except FileNotFoundError as error:
            raise DataError(f"{path}, line {number}: the source {error}.") from error
    if not sources:
        raise DataError(f"{path} names no sources.")
    return sources
