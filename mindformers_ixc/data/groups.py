"""Rows of prompts that groups of answers are to be sampled for."""
from __future__ import annotations

from typing import Any

import numpy as np

from mindformers_ixc.data.batch import ANSWER_COLUMNS, LOGPS_COLUMN, MATCH_COLUMN, REWARDS_COLUMN
from mindformers_ixc.data.conversations import Conversation
from mindformers_ixc.data.rows import ConversationTable


class GroupTable(ConversationTable):
    """Conversations as a step over groups takes them, as often as a group has answers.

    The last answer of each is only what is expected: the step puts sampled answers, their log-probabilities and rewards
    in its place (`mindformers_ixc.training.rollout`). Until then all rewards are equal, from which nothing is learnt.

    Args:
        *arguments: of `ConversationTable`.
        group_size: answers of a group.
        **options: of `ConversationTable`.
    """

    def __init__(self, *arguments: Any, group_size: int, **options: Any):
        super().__init__(*arguments, **options)
        self.group_size = group_size

    def _join(self, members: list[tuple[int, Any]], place: int) -> dict[str, Any]:
        columns = super()._join(members, place)
        copies = {name: np.repeat(np.asarray(columns[name])[None], self.group_size, 0) for name in ANSWER_COLUMNS}
        nothing = np.zeros(self.group_size, np.float32)
        return {**columns, **copies, REWARDS_COLUMN: nothing, MATCH_COLUMN: nothing,
                LOGPS_COLUMN: np.zeros((self.group_size, self.seq_length), np.float32)}

    def shown(self, index: int) -> Conversation:
        """The sample whose row stands at a sample's place: itself, or another where a picture of it is damaged."""
        return self.samples[self._instead_of(index)[0] if self._bad[index] else index]
