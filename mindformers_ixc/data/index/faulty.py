"""Samples of a source that could not be read when it was measured: whether that still holds."""
from __future__ import annotations

from mindformers_ixc.data.conversations import ConversationReader
from mindformers_ixc.data.index.keys import Measures
from mindformers_ixc.data.index.measuring import Measurer
from mindformers_ixc.data.index.store import SourceIndex

# Samples of an index that were wrong and are looked at again whenever it is opened.
LOOKED_AT_AGAIN = 200


def still_wrong(index: SourceIndex, reader: ConversationReader, measures: Measures) -> bool:
    """Whether the first samples that could not be read cannot be read now: a picture may have come.

    Args:
        index: of a source that has not changed.
        reader: of the source.
        measures: as the index was measured.
    """
    numbers = [number for number, _ in index.description.errors[:LOOKED_AT_AGAIN]]
    measurer = Measurer(reader, measures.processor, measures.hd_num, measures.decode)
    return all(measurer.measure(index.places[number:number + 1], number).errors for number in numbers)
