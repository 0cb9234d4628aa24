"""Sections of settings: every wrong key, value and gap is a sentence that names it and says what is wanted."""
from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mindformers_ixc.errors import ConfigError, DataError
from mindformers_ixc.fields import FIELDS, VISION_FIELDS
from mindformers_ixc.sections import (
    FEW,
    Rule,
    above_0,
    check_keys,
    check_names,
    check_section,
    like,
    of_type,
    one_of,
    whole,
)

RULES = {"size": whole(1, required=True), "share": above_0(), "kind": one_of(("sum", "mean")), "name": of_type(str),
         "files": of_type(str, list), "shuffle": of_type(bool), "inner": of_type(dict), "rate": of_type(float)}
GOOD = {"size": 2, "share": 0.5, "kind": "sum", "name": "a", "files": ["a"], "shuffle": False, "inner": {}, "rate": 3}


def test_a_good_section_passes_and_so_does_one_with_nulls():
    check_section(GOOD, RULES, "part")
    check_section({**dict.fromkeys(RULES), "size": 1}, RULES, "part")
    check_section({"size": 1}, RULES, "part")


@pytest.mark.parametrize(("changes", "sentence"), [
    ({"siz": 3},
     "Unknown key part.siz (value 3); the choices are size, share, kind, name, files, shuffle, inner, rate."),
    ({"size": 0}, "part.size is 0; it must be a whole number of at least 1."),
    ({"size": True}, "part.size is True; it must be a whole number of at least 1."),
    ({"size": 1.0}, "part.size is 1.0; it must be a whole number of at least 1."),
    ({"share": 0}, "part.share is 0; it must be a number above 0."),
    ({"share": float("nan")}, "part.share is nan; it must be a number above 0."),
    ({"kind": "median"}, "part.kind is 'median'; the choices are sum, mean."),
    ({"kind": ["sum"]}, "part.kind is ['sum']; the choices are sum, mean."),
    ({"name": 1}, "part.name is 1; it must be text."),
    ({"files": 1}, "part.files is 1; it must be text or a list."),
    ({"shuffle": 1}, "part.shuffle is 1; it must be true or false."),
    ({"inner": []}, "part.inner is []; it must be a section."),
    ({"rate": False}, "part.rate is False; it must be a number."),
    ({"size": None}, "part lacks size.")])
def test_what_is_wrong_is_named(changes, sentence):
    with pytest.raises(DataError) as error:
        check_section({**GOOD, **changes}, RULES, "part", DataError)
    assert str(error.value) == sentence
    with pytest.raises(ConfigError) as error:
        check_section({**GOOD, **changes}, RULES, "part", source="my.yaml")
    assert str(error.value) == "my.yaml: " + sentence.replace("Unknown", "unknown")


@pytest.mark.parametrize("section", [None, [], "size", 3])
def test_what_is_no_section_is_refused(section):
    with pytest.raises(ConfigError) as error:
        check_section(section, RULES, "part", source="my.yaml")
    assert str(error.value) == f"my.yaml: part is {section!r}; it must be a section."


def test_of_many_keys_the_close_ones_are_shown_else_all():
    known = [f"key_{i}" for i in range(FEW)] + ["seed"]
    with pytest.raises(ConfigError, match=r"^Unknown key sead \(value 1\); did you mean seed\?$"):
        check_keys({"sead": 1}, known)
    with pytest.raises(ConfigError, match=r"^x: unknown option zzz \(value 1\); the choices are key_0, .*, seed\.$"):
        check_keys({"seed": 1, "zzz": 1}, known, source="x", noun="option")


def test_entries_of_a_list_are_named():
    check_names("metrics", ["loss"], ["loss", "anls"])
    with pytest.raises(ConfigError, match=r"^metrics has 'bleu'; the choices are loss, anls\.$"):
        check_names("metrics", ["loss", "bleu"], ["loss", "anls"])


@given(st.dictionaries(st.text(max_size=8), st.none() | st.booleans() | st.integers() | st.floats() | st.text() |
                       st.lists(st.integers(), max_size=2) | st.dictionaries(st.text(), st.integers(), max_size=2)))
def test_any_section_passes_or_is_refused_by_name(section):
    try:
        check_section(section, RULES, "part")
    except ConfigError as error:
        named = [key for key in section if f"part.{key} " in str(error)]
        assert named or str(error) == "part lacks size."
    else:
        assert set(section) <= set(RULES)
        assert all(section[key] is None or RULES[key].test(section[key]) for key in section)


@given(st.sampled_from([True, 3, 0.5]), st.none() | st.booleans() | st.integers() | st.floats() | st.text())
def test_a_default_makes_the_rule_of_its_type(default, value):
    allowed = {bool: (bool,), int: (int,), float: (int, float)}[type(default)]
    assert like(default).test(value) == (isinstance(value, allowed) and isinstance(value, bool) == (default is True))


def test_every_default_of_the_tables_keeps_its_own_rule():
    for field in (*FIELDS.values(), *VISION_FIELDS.values()):
        rule = like(field.default)
        assert isinstance(rule, Rule) and rule.test(field.default)
