"""Conversation files to checked samples; no pixels are decoded here.

A source is a JSON list of `{"id", "conversations": [{"from", "value"}, ...], "image"}`, in the form of the public
fine-tuning scripts or of LLaVA. A list file names sources and how many thousand samples to take from each.
"""
from __future__ import annotations

import os
import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tqdm import tqdm

from mindformers_ixc.errors import DataError, ImageError, VideoError
from mindformers_ixc.files import read_json_list
from mindformers_ixc.processing.pictures import image_size
from mindformers_ixc.processing.prompt import IMAGE_PLACEHOLDER
from mindformers_ixc.processing.video import board_size, is_video
from mindformers_ixc.resources import resolve_path

ROLES = {"human": "user", "user": "user", "bot": "assistant", "gpt": "assistant", "assistant": "assistant",
         "system": "system"}

# LLaVA's marker; its data puts it on a line of its own before or after the question.
LLAVA_PLACEHOLDER = "<image>"

# Questions that a caption answers, one chosen at random for each (arXiv 2407.03320, pre-training).
CAPTION_PROMPTS = ("Describe this image briefly.", "Describe this image in detail.")

# A message lists this many bad samples; the rest are counted.
LISTED_ERRORS = 10

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
        images: paths in the order of their places.
        sizes: (width, height) of each image, filled in by the scan.
    """

    source: str
    index: int
    id: object
    turns: list[tuple[str, str]]
    images: list[Path] = field(default_factory=list)
    sizes: list[tuple[int, int]] = field(default_factory=list)

    @property
    def where(self) -> str:
        """Names the sample in messages."""
        return f"{self.source}, sample {self.index} (id {self.id!r})"


def load_conversations(path: str | os.PathLike, image_folder: str | os.PathLike | None = None,
                       caption_prompts: Sequence[str] = CAPTION_PROMPTS, seed: int = 0) -> list[Conversation]:
    """Reads one JSON source and checks its structure.

    Args:
        path: JSON file; `pkg:` paths work.
        image_folder: where relative image paths start; by default the JSON's folder, then the working directory.
        caption_prompts: questions for samples that are captions.
        seed: of the choice among them.

    Raises:
        DataError: listing what is wrong with which samples.
        FileNotFoundError: when the file is missing.
    """
    rows, file = read_json_list(path, "sample"), resolve_path(path)
    rows = [_ask(row, caption_prompts, f"{seed} {path} {index}") for index, row in enumerate(rows)]
    return parse_rows(rows, str(path), file, image_folder)


def parse_rows(rows: Sequence, source: str, file: Path, image_folder: str | os.PathLike | None) -> list[Conversation]:
    """Checks the structure of samples.

    Args:
        rows: of the JSON.
        source: its name in messages.
        file: where it lies.
        image_folder: where relative image paths start.

    Raises:
        DataError: listing what is wrong with which samples.
    """
    folders = [Path(image_folder)] if image_folder else []
    folders += [file.parent, Path()]
    samples, errors = [], []
    for index, row in enumerate(rows):
        try:
            samples.append(_read_sample(row, source, index, folders))
        except DataError as error:
            errors.append(str(error))
    raise_errors(errors)
    return samples


def raise_errors(errors: Sequence[str]) -> None:
    """Raises one `DataError` for all errors found, if any."""
    if errors:
        more = f"\n... and {len(errors) - LISTED_ERRORS} more" if len(errors) > LISTED_ERRORS else ""
        raise DataError("\n".join(errors[:LISTED_ERRORS]) + more)


def _ask(row: object, prompts: Sequence[str], seed: str) -> object:
    """A caption as the answer to one of the prompts; other samples as they are."""
    if not isinstance(row, dict) or "caption" not in row or "conversations" in row:
        return row
    prompt = random.Random(seed).choice(list(prompts))
    return {**row, "conversations": [{"from": "human", "value": prompt}, {"from": "bot", "value": row["caption"]}]}


def _read_sample(row: object, source: str, index: int, folders: list[Path]) -> Conversation:
    where = f"{source}, sample {index}"
    if not isinstance(row, dict):
        raise DataError(f"{where}: a sample must be a mapping, found {type(row).__name__}.")
    where += f" (id {row.get('id')!r})"
    turns = _read_turns(row.get("conversations"), where)
    images = row.get("image") or row.get("video") or []
    images = [images] if isinstance(images, str) else images
    if not isinstance(images, list) or not all(isinstance(image, str) for image in images):
        raise DataError(f"{where}, field image: must be a path or a list of paths, found {images!r}.")
    turns = _unify_placeholders(turns, len(images))
    places = sum(text.count(IMAGE_PLACEHOLDER) for _, text in turns)
    if places != len(images) and not (places == 0 and len(images) == 1):
        raise DataError(f"{where}, field conversations: {places} {IMAGE_PLACEHOLDER} for {len(images)} pictures; give "
                        "every picture its place (only a single picture may go without).")
    try:
        paths = [find_file(image, folders) for image in images]
    except FileNotFoundError as error:
        raise DataError(f"{where}, field image: the picture {error}.") from error
    return Conversation(source, index, row.get("id"), turns, paths)


def _read_turns(rows: object, where: str) -> list[tuple[str, str]]:
    if not isinstance(rows, list) or not rows:
        raise DataError(f"{where}, field conversations: must be a list of turns, found {rows!r:.60}.")
    turns = []
    for i, row in enumerate(rows):
        if not isinstance(row, dict) or not isinstance(row.get("value"), str) or "from" not in row:
            raise DataError(f"{where}, field conversations[{i}]: needs 'from' and a text 'value', found {row!r:.80}.")
        role = ROLES.get(str(row["from"]).lower())
        if role is None:
            raise DataError(f"{where}, field conversations[{i}].from: {row['from']!r} is no role; the choices are "
                            f"{', '.join(ROLES)}.")
        if role == "assistant" and not row["value"].strip():
            raise DataError(f"{where}, field conversations[{i}].value: the answer is empty, so there is nothing to "
                            "learn from it; take question and answer out.")
        turns.append((role, row["value"]))
    start = 1 if turns[0][0] == "system" else 0
    for i, (role, _) in enumerate(turns[start:]):
        expected = ("user", "assistant")[i % 2]
        if role != expected:
            raise DataError(f"{where}, field conversations[{start + i}].from: expected a turn of the {expected}, found "
                            f"one of the {role}; questions and answers must alternate.")
    if (len(turns) - start) % 2 or len(turns) == start:
        raise DataError(f"{where}, field conversations: ends without an answer.")
    return turns


def _unify_placeholders(turns: list[tuple[str, str]], images: int) -> list[tuple[str, str]]:
    """LLaVA's `<image>` as `<ImageHere>`; its single leading image takes the public form, in front of everything."""
    if images == 0 or any(IMAGE_PLACEHOLDER in text for _, text in turns):
        return turns
    if images == 1 and sum(text.count(LLAVA_PLACEHOLDER) for _, text in turns) == 1:
        return [(role, text.replace(LLAVA_PLACEHOLDER, "").strip()) if LLAVA_PLACEHOLDER in text else (role, text)
                for role, text in turns]
    return [(role, text.replace(LLAVA_PLACEHOLDER, IMAGE_PLACEHOLDER)) for role, text in turns]


def find_file(name: str, folders: Sequence[Path]) -> Path:
    """Finds a file named by data, below one of several folders.

    The public example files name everything from the folder above their own (`data/images/x.jpg` inside `data/`), so a
    name is also tried without its first folder.

    Raises:
        FileNotFoundError: naming every place that was tried.
    """
    parts = Path(name).parts
    names = [name] if Path(name).is_absolute() or len(parts) < 2 else [name, str(Path(*parts[1:]))]
    tried = list(dict.fromkeys(folder / candidate for candidate in names for folder in folders))
    for path in tried:
        if path.is_file():
            return path
    raise FileNotFoundError(f"{name} does not exist (tried {', '.join(str(path) for path in tried)})")


def load_sources(dataset_dir: str | os.PathLike | list[str] | tuple[str, ...] | None, image_folder: str | None = None,
                 seed: int = 0, caption_prompts: Sequence[str] = CAPTION_PROMPTS) -> list[Conversation]:
    """Reads everything `dataset_dir` names.

    Args:
        dataset_dir: a `.json` source, a `.txt` list file (`<json> <thousands>` a line), or a list of these.
        image_folder: where relative image paths start.
        seed: of the choice among a source's samples when it is down-sampled, and among prompts.
        caption_prompts: questions for samples that are captions.

    Raises:
        DataError: for bad sources; see `load_conversations`.
    """
    if isinstance(dataset_dir, (list, tuple)):
        return [sample for path in dataset_dir for sample in load_sources(path, image_folder, seed, caption_prompts)]
    if not dataset_dir:
        raise DataError("train_dataset.data_loader.dataset_dir is empty; name a .json or .txt file.")
    if not str(dataset_dir).endswith(".txt"):
        return load_conversations(dataset_dir, image_folder, caption_prompts, seed)
    samples = []
    for path, count in read_list_file(dataset_dir):
        source = load_conversations(path, image_folder, caption_prompts, seed)
        samples += resample(source, count, random.Random(f"{seed} {path}"))
    return samples


def read_list_file(path: str | os.PathLike) -> list[tuple[Path, int]]:
    """Sources of a list file with the number of samples to take from each.

    Raises:
        DataError: for a line that is not `<json> <thousands>`, a missing source or a file without sources.
    """
    file = resolve_path(path)
    if not file.is_file():
        raise FileNotFoundError(f"The list file {path} does not exist.")
    sources = []
    for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1):
        line = line.split("#")[0].strip()
        if not line:
            continue
        name, _, thousands = line.rpartition(" ")
        try:
            count = round(float(thousands) * 1000)
        except ValueError:
            count = 0
        if not name or count < 1:
            raise DataError(f"{path}, line {number}: expected `<json path> <number of samples in thousands, above 0>`, "
                            f"found {line!r}.")
        try:
            sources.append((find_file(name.strip(), [file.parent, Path()]), count))
        except FileNotFoundError as error:
            raise DataError(f"{path}, line {number}: the source {error}.") from error
    if not sources:
        raise DataError(f"{path} names no sources.")
    return sources


def resample(samples: Sequence, count: int, rng: random.Random) -> list:
    """`count` samples: every sample as often as any other, and the rest drawn without repetition."""
    whole, rest = divmod(count, len(samples))
    return list(samples) * whole + rng.sample(list(samples), rest)


def read_image_sizes(samples: Sequence[Conversation], exif: str = "ignore") -> None:
    """Fills in the images' sizes from their headers.

    Args:
        samples: whose `sizes` are still empty, or known.
        exif: as in `processing.pictures.load_image`.

    Raises:
        DataError: listing the images that cannot be opened, or whose headers show that they cannot be used.
    """
    known: dict[Path, tuple[int, int]] = {}
    errors = []
    progress = tqdm(samples, desc="reading picture sizes", unit="sample", disable=len(samples) < PROGRESS_FROM)
    for sample in progress:
        if sample.sizes:
            continue
        try:
            for path in sample.images:
                if path not in known:
                    known[path] = board_size(path) if is_video(path) else image_size(path, exif)
            sample.sizes = [known[path] for path in sample.images]
        except (ImageError, VideoError, OSError) as error:
            errors.append(f"{sample.where}, field image: {error}")
    raise_errors(errors)
