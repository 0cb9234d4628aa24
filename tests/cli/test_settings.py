"""Settings of a chat: what `/set` understands, what it refuses, and which of them reach the decoder."""
from __future__ import annotations

import pytest

from mindformers_ixc.cli.settings import NAMES, Settings, generation_options
from mindformers_ixc.decoding_options import GenerationOptions
from mindformers_ixc.errors import GenerationError
from mindformers_ixc_cli import parse


def settings(*words: str) -> Settings:
    return Settings(parse(["chat", "--model", "m", *words]))


def test_a_session_begins_with_the_command_lines_options():
    words = ["--do_sample", "--temperature", "0.5", "--top_p", "0.9", "--seed", "3", "--max_new_tokens", "7"]
    found = settings(*words)
    assert found.options == {**generation_options(parse(["chat", "--model", "m", *words, "q"])), "top_k": 50}
    assert settings().options == generation_options(parse(["chat", "--model", "m", "q"]))


@pytest.mark.parametrize(("text", "name", "value"), [
    ("temperature 0.7", "temperature", 0.7), ("temperature=0.7", "temperature", 0.7),
    ("temperature = 1", "temperature", 1), ("top_k 5", "top_k", 5), ("seed 4", "seed", 4), ("seed none", "seed", None),
    ("do_sample on", "do_sample", True), ("do_sample FALSE", "do_sample", False), ("hd_num 6", "hd_num", 6),
    ("hd_num none", "hd_num", None), ("max_new_tokens 5", "max_new_tokens", 5), ("num_beams 3", "num_beams", 3),
    ("prompt_lookup 4", "prompt_lookup", 4),
    ("meta_instruction You are 7.", "meta_instruction", "You are 7."),
    ("meta_instruction none", "meta_instruction", "")])
def test_set_takes_names_and_values(text, name, value):
    found = settings()
    assert found.change(text).startswith(f"{name} is ")
    assert found.values[name] == value
    GenerationOptions(**found.options)


def test_a_temperature_samples_and_0_takes_the_likeliest():
    found = settings()
    assert "temperature" not in found.options
    assert "sampled" in found.change("temperature 0.7")
    assert (found.options["do_sample"], found.options["temperature"]) == (True, 0.7)
    assert "sampled" not in found.change("top_p 0.5")            # said already
    assert "likeliest" in found.change("temperature 0")
    assert not found.options["do_sample"]
    found.change("do_sample on")
    assert found.options["temperature"] == 0.7


def test_the_best_of_several_samples_is_sampled_in_any_case():
    found = settings("--best_of", "3", "--do_sample")
    for text, words in (("temperature 0", "in any case"), ("do_sample off", "in any case"),
                        ("num_beams 2", "num_beams is 2"), ("prompt_lookup 4", "prompt_lookup is 4")):
        with pytest.raises(GenerationError, match=words):
            found.change(text)
    found.change("temperature 0.5")
    assert (found.options["do_sample"], found.options["temperature"]) == (True, 0.5)


def test_what_is_looked_up_is_for_greedy_decoding():
    found = settings("--prompt_lookup", "4")
    assert found.options["prompt_lookup"] == 4
    for text in ("temperature 0.7", "num_beams 2"):
        with pytest.raises(GenerationError, match=r"prompt_lookup is 4 and .* greedy decoding"):
            found.change(text)
    found.change("prompt_lookup 0")
    found.change("temperature 0.7")


@pytest.mark.parametrize(("text", "words"), [
    ("temperature hot", "temperature is 'hot'; it must be a number of at least 0"),
    ("temperature -1", "temperature is -1; it must be a number"), ("temperature nan", "temperature is nan"),
    ("temperature none", "temperature is None"), ("temperature 0.000001", "sampling takes a temperature of at least"),
    ("top_p 2", "top_p is 2; it must be a number from 0 to 1"), ("top_k 1.5", "top_k is 1.5; it must be a whole"),
    ("do_sample maybe", "do_sample is 'maybe'; it must be True or False"), ("num_beams 0", "num_beams is 0"),
    ("max_new_tokens none", "max_new_tokens is None"), ("hd_num 0", "hd_num is 0; it must be a whole number"),
    ("temprature 1", "There is no setting temprature; .*temperature"), ("temperature", "takes a name and a value"),
    ("=", "takes a name and a value")])
def test_nonsense_is_refused_and_changes_nothing(text, words):
    found = settings()
    before = dict(found.values)
    with pytest.raises(GenerationError, match=words):
        found.change(text)
    assert found.values == before


def test_the_table_has_every_setting_and_says_which_have_no_effect():
    lines = settings().table().splitlines()
    assert [line.split()[0] for line in lines] == list(NAMES)
    assert [line.split()[0] for line in lines if "no effect" in line] == ["temperature", "top_k", "top_p"]
