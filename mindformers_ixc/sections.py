"""Sections of settings: which keys there are, what each value must be, and the sentence for what is neither."""
from __future__ import annotations

import difflib
import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any

from mindformers_ixc.errors import ConfigError

# So many choices at most are all named; of more only those close to what was written, if there are any.
FEW = 10


@dataclass(frozen=True)
class Rule:
    """What a value must be.

    Attributes:
        test: whether a value is that.
        wanted: the words that follow "it must be".
        required: whether a section must have the value; otherwise one without it, or with `null`, is fine.
        verb: what stands in front of `wanted`.
    """

    test: Callable[[Any], bool]
    wanted: str
    required: bool = False
    verb: str = "it must be"


def is_whole(value: object, least: float = -math.inf) -> bool:
    """Whether a value is a whole number, of at least `least`."""
    # numbers.Integral promises < but not >=
    return isinstance(value, Integral) and not isinstance(value, bool) and not value < least


def is_number(value: object) -> bool:
    """Whether a value is a finite number."""
    try:
        return isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)
    except OverflowError:       # a whole number that no float holds
        return False


def is_pattern(value: object) -> bool:
    """Whether a value is a regular expression that can be compiled."""
    try:
        return isinstance(value, str) and bool(value) and re.compile(value) is not None
    except re.error:
        return False


def whole(least: int, note: str = "", required: bool = False) -> Rule:
    """A whole number of at least `least`; `note` is put behind the words."""
    return Rule(lambda value: is_whole(value, least), f"a whole number of at least {least}{note}", required)


def share() -> Rule:
    """A number from 0 to 1."""
    return Rule(lambda value: is_number(value) and 0 <= value <= 1, "a number from 0 to 1")


def above_0(note: str = "") -> Rule:
    """A number above 0; `note` is put behind the words."""
    return Rule(lambda value: is_number(value) and value > 0, f"a number above 0{note}")


def from_0() -> Rule:
    """A number of at least 0."""
    return Rule(lambda value: is_number(value) and value >= 0, "a number of at least 0")


def one_of(choices: Iterable) -> Rule:
    """One of some names."""
    choices = tuple(choices)
    return Rule(lambda value: value in choices, ", ".join(map(str, choices)), verb="the choices are")


_WORDS = {bool: "true or false", int: "a whole number", float: "a number", str: "text", list: "a list",
          dict: "a section"}


def of_type(*types: type, required: bool = False) -> Rule:
    """A value of one of some plain types; whole numbers pass as floats, tuples as lists, `True` as nothing else."""
    allowed = (*types, *(int for one in types if one is float), *(tuple for one in types if one is list))
    return Rule(lambda value: bool in types if isinstance(value, bool) else isinstance(value, allowed),
                " or ".join(_WORDS[one] for one in types), required)


ANYTHING = Rule(lambda value: True, "anything")


def like(default: object) -> Rule:
    """A value of the type that a default has; anything where that is no plain number and neither true nor false."""
    return next((of_type(one) for one in (bool, int, float) if isinstance(default, one)), ANYTHING)


def hint(name: object, choices: Iterable) -> str:
    """What can be meant by a name that is none of some choices, for the end of a sentence."""
    choices = [str(choice) for choice in choices]
    close = difflib.get_close_matches(str(name), choices, n=3) if len(choices) > FEW else []
    if close:
        return f"did you mean {' or '.join(close)}?"
    return f"the choices are {', '.join(choices if len(choices) <= FEW else sorted(choices))}."


def check_keys(section: Mapping, known: Iterable[str], where: str = "", error: type[Exception] = ConfigError,
               source: str = "", noun: str = "key") -> None:
    """Refuses a section with a key that there is not.

    Args:
        section: keys and values.
        known: all keys there are.
        where: dotted name of the section.
        error: class of the error.
        source: file the section stands in.
        noun: what a key is called.

    Raises:
        error: naming the key, its value, and the choices or what can be meant.
    """
    known = list(known)
    for key, value in section.items():
        if key not in known:
            start = f"{source}: unknown" if source else "Unknown"
            raise error(f"{start} {noun} {_dotted(where, key)} (value {value!r:.80}); {hint(key, known)}")


def check_value(name: str, value: object, rule: Rule, error: type[Exception] = ConfigError, source: str = "") -> None:
    """Refuses a value that is not what its rule wants.

    Raises:
        error: naming the value and what is wanted.
    """
    if not rule.test(value):
        raise error(f"{source and source + ': '}{name} is {value!r:.80}; {rule.verb} {rule.wanted}."
                    f"{_number_as_text(value, rule)}")


def _number_as_text(value: object, rule: Rule) -> str:
    """What is said of a number that YAML took for text, as it does with `1e-4`."""
    try:
        number = float(value) if isinstance(value, str) else math.nan
    except ValueError:
        return ""
    if not math.isfinite(number) or not rule.test(number):
        return ""
    return f" YAML reads a number as text that is quoted or has no point before its exponent; write {_pointed(number)}."


def _pointed(number: float) -> str:
    """A number as YAML 1.1 reads it: with a point, and a sign in the exponent."""
    mantissa, exponent, power = repr(number).partition("e")
    return f"{mantissa}{'' if '.' in mantissa or not exponent else '.0'}{exponent}{power}"


def check_names(name: str, values: Iterable, choices: Iterable, error: type[Exception] = ConfigError) -> None:
    """Refuses a list with an entry that is none of some choices.

    Raises:
        error: naming the entry and the choices.
    """
    choices = list(choices)
    for value in values:
        if value not in choices:
            raise error(f"{name} has {value!r:.80}; the choices are {', '.join(choices)}.")


def check_values(section: Mapping, rules: Mapping[str, Rule], where: str = "", error: type[Exception] = ConfigError,
                 source: str = "") -> None:
    """Refuses a section in which a value is wrong or missing; keys without a rule may be there.

    Raises:
        error: naming the key, its value and what is wanted.
    """
    for key, rule in rules.items():
        if section.get(key) is not None:
            check_value(_dotted(where, key), section[key], rule, error, source)
    missing = [key for key, rule in rules.items() if rule.required and section.get(key) is None]
    if missing:
        raise error(f"{source and source + ': '}{where} lacks {', '.join(missing)}.")


def check_section(section: Any, rules: Mapping[str, Rule], where: str = "", error: type[Exception] = ConfigError,
                  source: str = "") -> None:
    """Refuses a section with a key that there is not, or in which a value is wrong or missing.

    Args:
        section: what should be keys and values.
        rules: what each key must be; these are all keys there are.
        where: dotted name of the section.
        error: class of the error.
        source: file the section stands in.

    Raises:
        error: one sentence naming the key, its value and what is wanted.
    """
    check_value(where, section, Rule(lambda value: isinstance(value, Mapping), "a section"), error, source)
    check_keys(section, rules, where, error, source)
    check_values(section, rules, where, error, source)


def _dotted(where: str, key: object) -> str:
    return f"{where}.{key}" if where else str(key)
