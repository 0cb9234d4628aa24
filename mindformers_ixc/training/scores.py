"""Scores of answers against what was expected."""
from __future__ import annotations

import importlib
import re
from collections.abc import Sequence

from mindformers_ixc.errors import ConfigError

# Below this similarity an answer counts as wrong rather than misread (arXiv 1907.00490).
ANLS_THRESHOLD = 0.5


def score_answers(answers: Sequence[str], expected: Sequence[str], names: Sequence[str]) -> dict[str, float]:
    """Scores in percent (CIDEr as published, where 100 is a score of 1).

    Args:
        answers: what the model said.
        expected: what was expected.
        names: of the scores wanted, see `training_options.SCORES`.

    Raises:
        ConfigError: when a score's library is not installed.
    """
    functions = {"exact_match": exact_match, "anls": anls, "cider": cider}
    return {name: functions[name](answers, expected) for name in names}


def exact_match(answers: Sequence[str], expected: Sequence[str]) -> float:
    """Share of answers that equal what was expected."""
    return 100 * sum(a.strip() == e.strip() for a, e in zip(answers, expected)) / len(expected)


def anls(answers: Sequence[str], expected: Sequence[str]) -> float:
    """Average normalised Levenshtein similarity, 0 below one half, letters' case aside (as DocVQA counts)."""
    distance = _library("rapidfuzz.distance", "rapidfuzz").Levenshtein
    scores = [distance.normalized_similarity(a.strip().lower(), e.strip().lower()) for a, e in zip(answers, expected)]
    return 100 * sum(score if score >= ANLS_THRESHOLD else 0.0 for score in scores) / len(scores)


def cider(answers: Sequence[str], expected: Sequence[str]) -> float:
    """CIDEr of captions (arXiv 1411.5726), by pycocoevalcap on words in small letters without punctuation.

    The published numbers use a Java tokenizer; words are split on everything else here.
    """
    scorer = _library("pycocoevalcap.cider.cider", "pycocoevalcap").Cider()
    references = {i: [_words(text)] for i, text in enumerate(expected)}
    found = {i: [_words(text)] for i, text in enumerate(answers)}
    return 100 * float(scorer.compute_score(references, found)[0])


def _words(text: str) -> str:
    return " ".join(re.findall(r"\w+", text.lower()))


def _library(module: str, package: str):
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ConfigError(f"This score needs {package}; install it with `pip install \"mindformers_ixc[eval]\"`."
                          ) from error
