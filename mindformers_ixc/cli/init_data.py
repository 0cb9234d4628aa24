"""The data of `mindformers init`: found in a folder, read as a run reads it, and measured."""
from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from mindformers_ixc.data.conversations import raise_errors
from mindformers_ixc.data.folders import PICTURE_ENDINGS
from mindformers_ixc.data.packer import Budget
from mindformers_ixc.data.preview_data import Data, Entry, Reader, look_through
from mindformers_ixc.processing.processor import Processor


@dataclass(frozen=True)
class Measured:
    """What is known of some data.

    Attributes:
        data: what was read; of much data some samples (`preview_data.MEASURED`).
        samples: of an epoch.
        fewest_of_a_kind: samples with pictures or without, whichever are fewer; a batch is of one kind.
    """

    data: Data
    samples: int
    fewest_of_a_kind: int

    @property
    def longest(self) -> Entry:
        """The sample that takes the most positions."""
        return max(self.data.measured, key=lambda entry: entry.positions)

    @property
    def tiles(self) -> int:
        """Of the sample that takes the most, global views included."""
        return max(entry.tiles for entry in self.data.measured)


def measure(file: str, model: str) -> Measured:
    """Reads data as a run does, and counts what samples need with a model's tokenizer and tiles.

    Raises:
        DataError: for unusable samples and pictures.
    """
    processor, most = Processor.from_directory(model), sys.maxsize
    reader = Reader(processor, processor.image_processor.hd_num, Budget(most, most, most, 2), most, most, 0, {})
    data = look_through(reader, file)
    raise_errors([sentence for _, sentence in sorted([*data.problems, *data.uncut])])
    return Measured(data, sum(source.count if source.taken is None else source.taken for source in data.sources),
                    _fewest_of_a_kind(data))


def _fewest_of_a_kind(data: Data) -> int:
    """Samples of an epoch that are of the rarer kind, if there are two, by the share of those that were read."""
    counts = dict[bool, float]()
    for source in data.sources:
        found = [bool(entry.sides[0].images) for entry in data.measured
                 if 0 <= entry.number - source.first < source.count]
        for kind in set(found):
            epoch = source.count if source.taken is None else source.taken
            counts[kind] = counts.get(kind, 0) + epoch * found.count(kind) / len(found)
    return max(1, int(min(counts.values())))


def describe(file: str, given: str, measured: Measured) -> Iterator[str]:
    """Lines that say what the data is."""
    data, questions, pictures = measured.data, measured.data.questions, measured.data.pictures
    longest = f"the longest sample is {measured.longest.positions} positions and {measured.tiles} tiles."
    if data.looked_at < data.count:
        yield (f"{file}: {data.count:,} samples; {data.looked_at:,} of them, drawn by chance, were read: {longest} "
               "Longer ones are cut or left out by a run; `mindformers data check` looks at all of them.")
        return
    yield (f"{file}: {questions} question{'s' * (questions != 1)} about {pictures} picture{'s' * (pictures != 1)}; "
           f"{longest}")
    folder = Path(given).expanduser()
    if not folder.is_dir():
        return
    used = {os.path.realpath(str(path)) for entry in data.measured for path in entry.sides[0].images}
    unused = sorted(name.name for name in folder.iterdir()
                    if name.suffix.lower() in PICTURE_ENDINGS and os.path.realpath(name) not in used)
    if unused:
        verb = "picture is" if len(unused) == 1 else "pictures are"
        yield f"{len(unused)} {verb} in no question ({', '.join(unused[:3])}{', ...' * (len(unused) > 3)})."
