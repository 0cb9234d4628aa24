"""The data of `mindformers init`: found in a folder, read as a run reads it, and measured."""
from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from mindformers_ixc.data.conversations import Conversation, load_sources, read_image_sizes
from mindformers_ixc.data.folders import PICTURE_ENDINGS
from mindformers_ixc.processing.processor import Processor


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
