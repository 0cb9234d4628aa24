"""The options of `evaluation`."""
from __future__ import annotations

import pytest

from mindformers_ixc.errors import ConfigError
from mindformers_ixc.training_options import EVALUATION, evaluation_options


def test_options_keep_what_is_given_and_fill_in_the_rest():
    options = evaluation_options({"dataset_dir": "held_out.json", "metrics": ["loss", "anls"], "keep_best": "anls"})
    assert options == {**EVALUATION, "dataset_dir": "held_out.json", "metrics": ["loss", "anls"], "keep_best": "anls"}
    assert EVALUATION["metrics"] == ["loss"]


@pytest.mark.parametrize(("section", "words"), [
    ({"evry": 10}, r"Unknown key evaluation\.evry \(value 10\); the choices are dataset_dir, .*every"),
    ({"metrics": ["loss", "bleu"]}, r"evaluation\.metrics has 'bleu'; the choices are loss, shuffled_loss, exact_"),
    ({"keep_best": "anls"}, r"evaluation\.keep_best is 'anls', which evaluation\.metrics does not name"),
    ({"every": -1}, r"evaluation\.every is -1; it must be a whole number of at least 0"),
    ({"batch_size": "4"}, r"evaluation\.batch_size is '4'; it must be a whole number of at least 1"),
    ({"mode": "paint"}, r"evaluation\.mode is 'paint'; the choices are base"),
    ({"metrics": "loss"}, r"evaluation\.metrics is 'loss'; it must be a list"),
    ({"metrics": ["anls"], "keep_best": "loss"}, r"evaluation\.keep_best is 'loss'"),
    ({"dataset_dir": ""}, r"evaluation\.dataset_dir is empty"), ({"dataset_dir": None}, "dataset_dir is empty")])
def test_options_that_cannot_be_meant_are_refused(section, words):
    with pytest.raises(ConfigError, match=words):
        evaluation_options({"dataset_dir": "held_out.json", **section})
