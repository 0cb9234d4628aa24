"""Best of N: several sampled answers to one question, and the best of them by a reward model or by probability.

The N samples are one batch over one prompt: its beginning is computed once where earlier requests are kept
(`generation.reuse`), its pictures once in any case. Without a reward model the best answer is the one whose tokens have
the highest mean log-probability.
"""
from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from mindformers_ixc.decoding_options import check_best_of
from mindformers_ixc.generation.assistant import Assistant
from mindformers_ixc.generation.options import GenerationOptions, known_options
from mindformers_ixc.generation.requests import Request, result_or_error
from mindformers_ixc.generation.scoring import Scorer
from mindformers_ixc.processing.judged import turns_of

# Answers whose merit the line on the terminal has.
SHOWN = 8


@dataclass
class Candidate:
    """One of several answers.

    Attributes:
        text: of the answer.
        logp: mean log-probability of its tokens, its end included, at temperature 1.
        score: by the reward model; `None` without one.
        tokens: of it, its end included.
        finished: whether the model ended it, by a stop id or a stop string; if not, it was cut at `max_new_tokens` or
            where the model ends.
    """

    text: str
    logp: float
    score: float | None = None
    tokens: int = 0
    finished: bool = True

    @property
    def merit(self) -> float:
        """What decides."""
        return self.logp if self.score is None else self.score

    def to_dict(self) -> dict[str, Any]:
        """As a file of predictions has it."""
        score = {} if self.score is None else {"score": self.score}
        return {"answer": self.text, "logp": self.logp, **score, "tokens": self.tokens, "finished": self.finished}


class BestOf:
    """Answers questions by the best of several samples.

    Args:
        assistant: who answers.
        count: samples of a question.
        scorer: who says which is best; `None` leaves it to the log-probability.

    Raises:
        GenerationError: for less than two samples.
    """

    def __init__(self, assistant: Assistant, count: int, scorer: Scorer | None = None):
        check_best_of(count, {})
        self.assistant, self.count, self.scorer = assistant, count, scorer

    def answer(self, question: Mapping[str, Any], mode: str = "base", **options: Any) -> list[Candidate]:
        """All samples of an answer, the best first; of equal ones the one that was drawn first.

        Args:
            question: as in `Assistant.answer`.
            mode: task LoRAs in use.
            **options: fields of `GenerationOptions`; sampled is always.

        Raises:
            GenerationError: for options that do not go with several samples, and what `Assistant.answer` and
                `Scorer.score_samples` refuse.
        """
        found = draw_candidates(self.assistant, question, self.count, mode, options)
        if self.scorer is not None:
            samples = [self.scorer.encode(turns_of(question, one.text), _images(question)) for one in found]
            for one, score in zip(found, self.scorer.score_samples(samples)):
                one.score = score
        return sorted(found, key=lambda one: -one.merit)

    def results(self, questions: Sequence[Mapping[str, Any]], mode: str, options: dict) -> list[dict]:
        """Best answers of questions, one by one, whatever may be wrong with some of them.

        Returns:
            For each question `answer`, `logp`, `tokens`, `finished` and, with a reward model, `score` of the best, and
            the same of all as `samples`, the best first; or `{"error": sentence}`.

        Raises:
            MemoryError: when there is none left; no single question is to blame.
        """
        def best(question: Mapping[str, Any]) -> dict:
            samples = [one.to_dict() for one in self.answer(question, mode, **options)]
            return {**samples[0], "samples": samples}

        return [result_or_error(partial(best, question)) for question in questions]


def sample_request(assistant: Assistant, request: Request, count: int, mode: str, options: Mapping[str, Any]) -> dict:
    """Sampled answers to a request of `sampled_answers.read_prompts`, whatever may be wrong with it.

    Args:
        assistant: who answers.
        request: its question has an `id`.
        count: of answers.
        mode: task LoRAs in use.
        options: fields of `GenerationOptions`; the random numbers follow from `seed` and the prompt's id, or the same
            draws would go astray in every prompt.

    Returns:
        `id` and `samples` in the order in which they were drawn, each with `answer`, `logp` (the mean over its tokens),
        `tokens` and `finished`; or `{"error": sentence}`.
    """
    if request.question is None:
        return {"error": request.error}
    question = dict(request.question)
    identity = question.pop("id")
    mixed = hashlib.blake2b(f"{options['seed']} {identity}".encode(), digest_size=8).digest()
    own = {**options, "seed": int.from_bytes(mixed, "little")}

    def drawn() -> dict:
        found = draw_candidates(assistant, question, count, mode, own)
        return {"samples": [one.to_dict() for one in found]}

    return {"id": identity, **result_or_error(drawn)}


def draw_candidates(assistant: Assistant, question: Mapping[str, Any], count: int, mode: str,
                    options: Mapping[str, Any]) -> list[Candidate]:
    """Sampled answers to a question, in the order in which they were drawn, without scores.

    Args:
        assistant: who answers.
        question: as in `Assistant.answer`.
        count: of answers.
        mode: task LoRAs in use.
        options: fields of `GenerationOptions`; sampled is always.

    Raises:
        GenerationError: for options that do not go with several samples, and what `Assistant.encode` refuses.
    """
    check_best_of(count, options)
    chosen = GenerationOptions(**{"stop_token_ids": assistant.stop_token_ids, **known_options(dict(options)),
                                  "do_sample": True})
    drawn = assistant.draw(assistant.encode(dict(question)), chosen, count, mode)
    return [Candidate(assistant.decode(ids, chosen.stop_strings), float(np.mean(logps)), tokens=len(ids),
                      finished=assistant.has_ended(ids, chosen)) for ids, logps in drawn]


def load_scorer(reward: str | os.PathLike | None, fields: Mapping[str, Any]) -> Scorer | None:
    """The scorer of a reward model's directory; none without one.

    Args:
        reward: the directory.
        fields: of `Scorer.from_directory`.
    """
    return None if reward is None else Scorer.from_directory(reward, **fields)


def best_line(candidates: Sequence[Candidate]) -> str:
    """What is said of samples, the best first: by what it was chosen, and how far the others are."""
    name = "mean log-probability" if candidates[0].score is None else "score"
    shown, rest = candidates[1:SHOWN], candidates[SHOWN:]
    others = ", ".join(f"{one.merit:.3f}" for one in shown)
    more = f" and {len(rest)} more, down to {rest[-1].merit:.3f}" if rest else ""
    return f"The best of {len(candidates)}: {name} {candidates[0].merit:.3f}; the others {others}{more}."


def _images(question: Mapping[str, Any]) -> list:
    images = question.get("images")
    return list(images) if isinstance(images, (list, tuple)) else [] if images is None else [images]
