"""Samples of a source that cannot be read: how many may be left out, and whether they are still wrong."""
from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from mindformers_ixc.data.conversations import ConversationReader, raise_errors
from mindformers_ixc.data.index.measuring import Measurer
from mindformers_ixc.data.index.store import SourceIndex

if TYPE_CHECKING:
    from mindformers_ixc.data.index.building import Measures

# Samples of an index that were wrong and are looked at again whenever it is opened.
LOOKED_AT_AGAIN = 200


def refuse_errors(errors: Sequence[Sequence], samples: int, bad_share: float) -> None:
    """Refuses a source of which too many samples cannot be read.

    Args:
        errors: (number, sentence) of each of those.
        samples: of the source.
        bad_share: share of them that may be left out.

    Raises:
        DataError: saying of the first ones what is wrong with them.
    """
    if len(errors) > bad_share * samples:
        end = (f"{len(errors)} of {samples} samples cannot be used, more than the share max_bad_share {bad_share:g} "
               "allows.") if len(errors) > 1 and bad_share else ""
        raise_errors([sentence for _, sentence in errors], end)


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
