"""Scores of answers against what was expected, for `mindformers eval` and for evaluation while a run trains."""
from __future__ import annotations

import importlib
import math
import re
from collections.abc import Callable, Sequence

from mindformers_ixc.errors import ConfigError

# Below this similarity an answer counts as wrong rather than misread (arXiv 1907.00490).
ANLS_THRESHOLD = 0.5

# How far a number may be from the expected one, as a share of that one (arXiv 2203.10244).
RELAXED_TOLERANCE = 0.05

# CIDEr of a caption that equals its only reference, where every n-gram is that reference's own.
CIDER_BEST = 10.0


def score_answers(answers: Sequence[str | None], expected: Sequence[str], names: Sequence[str],
                  ignore_case: bool = False) -> dict[str, float]:
    """Means over all answers, in percent (CIDEr as published, where 100 is a score of 1).

    Args:
        answers: what the model said; `None` where it could not answer, which is wrong whatever was expected.
        expected: what was expected.
        names: of the scores wanted, see `SCORES`.
        ignore_case: let exact match take letters of either case for the same; the others always do.

    Raises:
        ConfigError: when a score's library is not installed.
    """
    return {name: 100 * sum(values) / len(values)
            for name, values in each_score(answers, expected, names, ignore_case).items()}


def each_score(answers: Sequence[str | None], expected: Sequence[str], names: Sequence[str],
               ignore_case: bool = False) -> dict[str, list[float]]:
    """The scores of every answer, from 0 to 1 (CIDEr to 10); arguments as of `score_answers`."""
    found = [answer or "" for answer in answers]
    result = {}
    for name in names:
        values = exact_match(found, expected, ignore_case) if name == "exact_match" else SCORES[name](found, expected)
        result[name] = [0.0 if answer is None else value for answer, value in zip(answers, values)]
    return result


def check_libraries(names: Sequence[str]) -> None:
    """Raises `ConfigError` when the library of one of some scores is not installed."""
    for name in names:
        if name in _LIBRARIES:
            _library(name)


def exact_match(answers: Sequence[str], expected: Sequence[str], ignore_case: bool = False) -> list[float]:
    """1 where answer and expectation are the same text, white space around them aside, else 0.

    With `ignore_case` both are case-folded first, which is Unicode's rule for comparing without case: ß equals SS.
    """
    fold = str.casefold if ignore_case else str
    return [float(fold(answer.strip()) == fold(wanted.strip())) for answer, wanted in zip(answers, expected)]


def anls(answers: Sequence[str], expected: Sequence[str]) -> list[float]:
    """Normalised Levenshtein similarity, whose average (ANLS) scores DocVQA (arXiv 1907.00490, eq. 1).

    s = 1 - d(a, e) / max(|a|, |e|), with d the number of letters to insert, delete or replace; 0 where s < 0.5. The
    case of letters is ignored, as DocVQA does.
    """
    distance = _library("anls").Levenshtein
    scores = [distance.normalized_similarity(a.strip().lower(), e.strip().lower()) for a, e in zip(answers, expected)]
    return [score if score >= ANLS_THRESHOLD else 0.0 for score in scores]


def relaxed_accuracy(answers: Sequence[str], expected: Sequence[str]) -> list[float]:
    """1 where an answer is right by ChartQA's relaxed rule (arXiv 2203.10244, section 5.1, after PlotQA), else 0.

    Numbers a and e: |a - e| <= 0.05 |e|. Anything else, and an expected 0: the same text, the case of letters ignored.
    A number is what Python's `float` takes, and such a one with a percent sign, which counts as a hundredth.
    """
    return [float(_relaxed(answer.strip(), wanted.strip())) for answer, wanted in zip(answers, expected)]


def _relaxed(answer: str, wanted: str) -> bool:
    found, number = _number(answer), _number(wanted)
    if found is None or not number:
        return answer.lower() == wanted.lower()
    # the last bits of the product must not decide over an answer that is off by exactly the tolerance
    return abs(found - number) <= RELAXED_TOLERANCE * abs(number) * (1 + 1e-9)


def _number(text: str) -> float | None:
    percent = text.endswith("%")
    try:
        value = float(text[:-1] if percent else text)
    except ValueError:
        return None
    if not math.isfinite(value):
        return None
    return value / 100 if percent else value


def cider(answers: Sequence[str], expected: Sequence[str]) -> list[float]:
    """CIDEr-D of captions (arXiv 1411.5726, eq. 5 with the changes of section 8), by pycocoevalcap.

    10 / 4 times the sum over n = 1 to 4 of the cosine between the vectors of n-grams, each n-gram weighted by its count
    and the log of (captions / captions that have it), counts clipped to the reference's, times exp(-d^2 / 72) for a
    difference of d words. What is rare is known from the expected captions only, so one caption by itself scores 0.

    Words are in small letters, punctuation is left out. The published numbers use a Java tokenizer; words are split on
    everything else here.
    """
    scorer = _library("cider").Cider()
    references = {i: [_words(text)] for i, text in enumerate(expected)}
    found = {i: [_words(text)] for i, text in enumerate(answers)}
    if not any(text for (text,) in references.values()):
        return [0.0] * len(references)          # the library takes no corpus without a word
    return [float(score) for score in scorer.compute_score(references, found)[1]]


def _words(text: str) -> str:
    return " ".join(re.findall(r"\w+", text.lower()))


SCORES: dict[str, Callable[[Sequence[str], Sequence[str]], list[float]]] = {
    "exact_match": exact_match, "anls": anls, "relaxed_accuracy": relaxed_accuracy, "cider": cider}

# Scores that are told in percent; CIDEr is not a share of anything.
PERCENT = ("exact_match", "anls", "relaxed_accuracy")

# Module and package of the scores that need one.
_LIBRARIES = {"anls": ("rapidfuzz.distance", "rapidfuzz"), "cider": ("pycocoevalcap.cider.cider", "pycocoevalcap")}


def _library(score: str):
    module, package = _LIBRARIES[score]
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ConfigError(f"The score {score} needs {package}; install it with `pip install \"mindformers_ixc[eval]\"`."
                          ) from error


def as_text(name: str, value: float) -> str:
    """A measurement, score or loss, as it is shown."""
    return f"{value:.1f}%" if name in PERCENT else f"{value:.4g}"
