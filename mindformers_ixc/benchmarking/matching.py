"""How an answer is understood: which option it names, whether it says yes or no, and when two texts are the same.

All of it follows VLMEvalKit 0.0.20, oddities included, since a published score rests on them.
"""
from __future__ import annotations

import ast
import re
from collections.abc import Mapping
from itertools import combinations

# What stands for an answer that there is none of.
FAILED = "Failed to obtain answer via API."

# What an answer is that names no option.
NONE = "Z"

# Parts of answers that refuse to answer.
_REFUSALS = ("Sorry, I can't help with images of people yet.", "I can't process this file.",
             "I'm sorry, but without the image provided", "Cannot determine the answer")

_AROUND_LETTERS = str.maketrans(dict.fromkeys(".()[],:;!*#{}", " "))

# Words from the end within which the letter of an option must stand.
_LAST_WORDS = 5

# Marks that VQA's rule takes away, or puts a blank for, and periods, of which it looks at so many.
_MARKS = (";", "/", "[", "]", '"', "{", "}", "(", ")", "=", "+", "\\", "_", "-", ">", "<", "@", "`", ",", "?", "!")
_COMMA, _PERIOD, _PERIODS = re.compile(r"\d,\d"), re.compile(r"(?<!\d)\.(?!\d)"), 32

_NUMBERS = {"none": "0", **{name: str(number) for number, name in enumerate(
    ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"))}}

_ARTICLES = ("a", "an", "the")

# Contractions that VQA's rule knows; each is also known with one of its apostrophes left out, and that is mended.
_CONTRACTED = """\
'ow's'at 'twas ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't
he'd he'd've he's how'd how'll how's isn't it'd it'd've it'll ma'am might've mightn't mightn't've must've mustn't
needn't not've o'clock oughtn't shan't she'd've should've shouldn't shouldn't've somebody'd've somebody'll somebody's
someone'd someone'd've someone'll someone's something'd something'd've something'll that's there'd there'd've there're
there's they'd they'd've they'll they're they've wasn't we'd've we've weren't what'll what're what's what've when's
where'd where's where've who'd who'd've who'll who's who've why'll why're why's won't would've wouldn't wouldn't've
y'all y'all'd've y'all'll you'd you'd've you'll you're you've
"""


def _mended() -> dict[str, str]:
    found = {"somebody'd": "somebodyd"}
    for word in _CONTRACTED.split():
        parts = word.split("'")
        for left in combinations(range(1, len(parts)), len(parts) - 2):
            found["".join(f"'{part}" if place in left else part for place, part in enumerate(parts))] = word
    return found


_MENDED = _mended()


def chosen(answer: str, choices: Mapping[str, object]) -> str:
    """The letter of the option that an answer names; `NONE` for a refusal, "" where that cannot be told.

    The letter as a word by itself counts first, of one option only and near the end; then an option's text within the
    answer, of one option only.

    Args:
        answer: of the model.
        choices: options by their letters.
    """
    return _by_letter(answer, choices) or _by_text(answer, choices)


def _by_letter(answer: str, choices: Mapping[str, object]) -> str:
    if "Failed to obtain answer via API" in answer:
        return ""
    if any(refusal in answer for refusal in _REFUSALS):
        return NONE
    words = answer.translate(_AROUND_LETTERS).split()
    named = [letter for letter in choices if letter in words]
    if len(named) == 1:
        return named[0] if words.index(named[0]) > len(words) - _LAST_WORDS else ""
    return NONE if not named and NONE in words else ""


def _by_text(answer: str, choices: Mapping[str, object]) -> str:
    answer, texts = answer.lower(), {letter: str(text) for letter, text in choices.items()}
    if len(answer) > 2 * sum(len(text) for text in texts.values()):
        return ""
    named = [letter for letter, text in texts.items() if text.lower() in answer]
    return named[0] if len(named) == 1 else ""


def yes_or_no(answer: str) -> str:
    """`Yes` or `No`, as an answer has one of the words and not the other, or `Unknown`."""
    words = without_marks(answer.lower()).split()
    if ("yes" in words) == ("no" in words):
        return "Unknown"
    return "Yes" if "yes" in words else "No"


def without_marks(text: str) -> str:
    """A text without punctuation, by VQA's rule.

    A mark next to a blank is left out, and one inside a word is a blank; a comma between two digits lets all marks of
    the text be left out.
    """
    found, commas = text, _COMMA.search(text) is not None
    for mark in _MARKS:
        beside = f"{mark} " in text or f" {mark}" in text
        found = found.replace(mark, "" if beside or commas else " ")
    return _PERIOD.sub("", found, count=_PERIODS)


def vqa_text(text: str) -> str:
    """A text as VQA's accuracy compares it: small letters, no punctuation or articles, numbers in digits."""
    words = without_marks(text.replace("\n", " ").replace("\t", " ").strip()).lower().split()
    words = [_NUMBERS.get(word, word) for word in words]
    return " ".join(_MENDED.get(word, word) for word in words if word not in _ARTICLES)


def vqa_accuracy(answer: str, expected: list[str]) -> float:
    """The share of three people who gave this answer, each person in turn left out, as VQA's and TextVQA's."""
    answer, given = vqa_text(answer), [vqa_text(one) for one in expected]
    same = given.count(answer)
    shares = [min(1.0, (same - (one == answer)) / 3) for one in given]
    return sum(shares) / len(shares)


def relaxed_correct(answer: str, expected: list[str]) -> float:
    """1 if a number is within 5 % of one that is expected, or a text is one of them, case ignored; else 0."""
    return float(any(_relaxed(answer.strip(), one) for one in expected))


def _relaxed(answer: str, wanted: str) -> bool:
    found, number = _number(answer), _number(wanted)
    if found is None or not number:
        return answer.lower() == wanted.lower()
    return abs(found - number) / abs(number) <= 0.05


def _number(text: str) -> float | None:
    try:
        return float(text.rstrip("%")) / 100.0 if text.endswith("%") else float(text)
    except ValueError:
        return None


def same_text(answer: str, expected: list[str]) -> float:
    """1 if an answer is one of the texts that are expected, case and outer white space ignored; else 0."""
    return float(answer.strip().lower() in [one.strip().lower() for one in expected])


def listed(answer: object) -> list[str]:
    """What is expected: a cell, or the texts of one that holds a list."""
    text = str(answer)
    if text.strip()[:1] == "[":
        try:
            found = ast.literal_eval(text.strip())
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            return [text]
        if isinstance(found, list):
            return [str(one) for one in found]
    return [text]
