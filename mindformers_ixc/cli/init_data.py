"""The data of `mindformers init`: found in a folder, read as a run reads it, and measured."""
from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from mindformers_ixc.data.conversations import Conversation, load_sources, read_image_sizes
from mindformers_ixc.data.records.tables import COLUMNS, TABLE_ENDINGS, is_table
from mindformers_ixc.errors import DataError
from mindformers_ixc.processing.processor import Processor

# Files of conversations, and pictures, by the endings of their names.
CONVERSATION_ENDINGS = (".json", ".jsonl")
PICTURE_ENDINGS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff")


@dataclass(frozen=True)
class Measured:
    """What is known of some data.

    Attributes:
        samples: all of them, with the sizes of their pictures.
        positions: of each sample.
        tiles: of each sample, global views included.
    """

    samples: list[Conversation]
    positions: list[int]
    tiles: list[int]

    @property
    def fewest_of_a_kind(self) -> int:
        """Samples with pictures or without, whichever are fewer; a batch is of one kind."""
        kinds = [bool(sample.images) for sample in self.samples]
        return min(kinds.count(kind) for kind in set(kinds))


def find_data(given: str) -> str:
    """The file of some data: itself, or the one table or conversation file of a folder.

    Raises:
        DataError: for a folder that has none or several, with what to do.
        FileNotFoundError: when there is nothing.
    """
    path = Path(given).expanduser()
    if not path.exists():
        raise FileNotFoundError(f"{given} does not exist; name a folder with pictures and a table, or a .csv, .json, "
                                ".jsonl or .txt file.")
    if path.is_file():
        if not (is_table(path) or path.suffix.lower() in (*CONVERSATION_ENDINGS, ".txt")):
            raise DataError(f"{given} is no data by the ending of its name; it must be a .csv, .json, .jsonl or .txt "
                            "file, or a folder with pictures and a table.")
        return str(path)
    names = sorted(name for name in path.iterdir() if name.is_file())
    for endings in (TABLE_ENDINGS, CONVERSATION_ENDINGS):
        found = [name for name in names if name.suffix.lower() in endings]
        if len(found) > 1:
            raise DataError(f"{given} has {len(found)} files that may be the data ("
                            f"{', '.join(name.name for name in found[:3])}); name the one to take.")
        if found:
            return str(found[0])
    pictures = [name.name for name in names if name.suffix.lower() in PICTURE_ENDINGS]
    for name in names:
        is_table(name)        # a spreadsheet's own file is refused with what to do
    raise DataError(f"{given} has {len(pictures)} pictures and no table of questions. Write {path / 'questions.csv'}: "
                    f"the first line is `{','.join(COLUMNS)}`, every other one a question, such as "
                    f"`{pictures[0] if pictures else 'cat.jpg'},What is shown in the picture?,a cat`.")


def measure(file: str, model: str) -> Measured:
    """Reads data as a run does, and counts what each sample needs with a model's tokenizer and tiles.

    Raises:
        DataError: for unusable samples and pictures.
        ImageError: for a picture that cannot be cut into tiles.
    """
    samples = load_sources(file)
    read_image_sizes(samples)
    processor = Processor.from_directory(model)
    hd_num = processor.image_processor.hd_num
    needs = [processor.conversation_length(sample.turns, sample.sizes, hd_num, sample.where, sample.images)
             for sample in samples]
    return Measured(samples, [positions for positions, _ in needs], [tiles for _, tiles in needs])


def describe(file: str, given: str, measured: Measured) -> Iterator[str]:
    """Lines that say what the data is."""
    used = {os.path.realpath(str(path)) for sample in measured.samples for path in sample.images}
    questions = sum(role == "user" for sample in measured.samples for role, _ in sample.turns)
    yield (f"{file}: {questions} question{'s' * (questions != 1)} about {len(used)} picture{'s' * (len(used) != 1)}; "
           f"the longest sample is {max(measured.positions)} positions and {max(measured.tiles)} tiles.")
    folder = Path(given).expanduser()
    if not folder.is_dir():
        return
    unused = sorted(name.name for name in folder.iterdir()
                    if name.suffix.lower() in PICTURE_ENDINGS and os.path.realpath(name) not in used)
    if unused:
        verb = "picture is" if len(unused) == 1 else "pictures are"
        yield f"{len(unused)} {verb} in no question ({', '.join(unused[:3])}{', ...' * (len(unused) > 3)})."
