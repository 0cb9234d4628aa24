"""A stand-in for a model that gives answers that are told to it, for what looks at them in a browser."""
from __future__ import annotations

from collections.abc import Callable

import numpy as np
from standin_decoder import VOCABULARY, StandInDecoder

from mindformers_ixc.processing.processor import Processor


class ScriptedDecoder(StandInDecoder):
    """Writes the answer that a function gives.

    Args:
        processor: of the model it stands for.
        answer: gets the mode and the prompt's text (all rounds) and gives the answer.
        step_seconds: that a token takes.
    """

    def __init__(self, processor: Processor, answer: Callable[[str, str], str], step_seconds: float = 0.0):
        super().__init__(most=4, piece=512, step_seconds=step_seconds)
        self.processor, self.answer = processor, answer

    def open(self, prompt, mode, new_tokens, answers=1):
        row = super().open(prompt, mode, new_tokens)
        row.script = self._script(mode, row.ids)
        return row

    def fork(self, row):
        other = super().fork(row)
        other.script = row.script
        return other

    def _scores(self, row):
        done = len(row.ids) - row.prompt
        scores = np.zeros(VOCABULARY, np.float32)
        scores[row.script[min(done, len(row.script) - 1)]] = 100.0
        return scores

    def whole(self, prompt, job, between):
        between()
        return self._script(job.mode, prompt.input_ids.tolist())[:job.new_tokens]

    def _script(self, mode, ids):
        tokenizer = self.processor.tokenizer
        asked = tokenizer.decode([one for one in ids if one >= 0])
        return [*tokenizer.encode_text(self.answer(mode, asked)), tokenizer.eos_token_id]
