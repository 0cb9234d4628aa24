"""One answer in the making: scores in, a token chosen, its text and what became of it passed on."""
from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from mindformers_ixc.decoding_options import GenerationOptions
from mindformers_ixc.generation.sampling import (
    apply_repetition_penalty,
    checked_scores,
    highest,
    log_softmax,
    sample_rows,
    warp,
)
from mindformers_ixc.generation.text import TextStream, TextTokenizer


@dataclass(frozen=True)
class Likelihood:
    """A token as `logprobs` shows it.

    Attributes:
        token: its id.
        value: its log-probability by the model's own scores, before penalty, temperature and top_p.
        others: ids and log-probabilities of the likeliest tokens.
    """

    token: int
    value: float
    others: tuple[tuple[int, float], ...] = ()


@dataclass
class Piece:
    """What is new of an answer.

    Attributes:
        number: of the answer among those of its request.
        text: new text.
        likelihoods: of the tokens behind it, if they were asked for.
        finished: why the answer has ended (`stop`, `length`); empty while it goes on.
        tokens: of the answer so far, what ended it included.
    """

    number: int
    text: str
    likelihoods: list[Likelihood] = field(default_factory=list)
    finished: str = ""
    tokens: int = 0


class AnswerWriter:
    """Chooses tokens by the decoding options and turns them into text (the `Writer` of `scheduling`).

    An answer draws from a generator of its own, so its tokens depend on nothing but its prompt, options and seed.

    Args:
        number: of the answer among those of its request.
        options: decoding options, stop ids and strings included.
        tokenizer: decodes ids.
        show: gets pieces; called by whoever computes.
        likeliest: how many likely tokens are shown with each; `None` for no log-probabilities.
    """

    def __init__(self, number: int, options: GenerationOptions, tokenizer: TextTokenizer,
                 show: Callable[[Piece], None], likeliest: int | None = None):
        self.number, self.options, self.show, self.likeliest = number, options, show, likeliest
        self.generator = np.random.default_rng(None if options.seed is None else options.seed + number)
        self.text = TextStream(tokenizer, options.stop_token_ids, options.stop_strings)
        self.ids: list[int] = []
        self.finished = ""
        self._likelihoods: list[Likelihood] = []

    def take(self, scores: np.ndarray) -> int:
        """Chooses the next token by its scores `(V,)` and passes on the text that is certain now.

        Raises:
            GenerationError: if the scores are not numbers.
        """
        row = checked_scores(scores[None], 1, len(self.ids))
        penalised = apply_repetition_penalty(row, [self.ids], self.options.repetition_penalty)
        if self.options.do_sample:
            token = int(sample_rows(warp(penalised, self.options), [self.generator])[0])
        else:
            token = int(penalised[0].argmax(-1))
        self.ids.append(token)
        if self.likeliest is not None and token not in self.options.stop_token_ids:
            self._likelihoods.append(self._likelihood(row[0], token))
        text = self._push(token)
        if not self.finished and len(self.ids) >= self.options.max_new_tokens:
            text, self.finished = text + self.text.flush(), "length"
        self._pass_on(text)
        return token

    def take_all(self, ids: Sequence[int]) -> None:
        """Passes on an answer that a search has made."""
        text = ""
        for token in ids:
            self.ids.append(token)
            text += self._push(token)
        if not self.finished:
            text, self.finished = text + self.text.flush(), "length"
        self._pass_on(text)

    def _push(self, token: int) -> str:
        text = self.text.push(token)
        if token in self.options.stop_token_ids or self.text.finished:
            self.finished = "stop"
        return text

    def _pass_on(self, text: str) -> None:
        if text or self.finished:
            self.show(Piece(self.number, text, self._likelihoods, self.finished, len(self.ids)))
            self._likelihoods = []

    def _likelihood(self, scores: np.ndarray, token: int) -> Likelihood:
        values = log_softmax(scores.astype(np.float64))
        others = highest(values, self.likeliest) if self.likeliest else ()
        return Likelihood(token, float(values[token]), tuple((int(one), float(values[one])) for one in others))


