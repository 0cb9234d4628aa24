"""The options of `evaluation`."""
from __future__ import annotations

import pytest

from mindformers_ixc.errors import ConfigError
from mindformers_ixc.training_options import EVALUATION, evaluation_options


def test_options_keep_what_is_given_and_fill_in_the_rest():
    options = evaluation_options({"dataset_dir": "held_out.json", "metrics": ["loss", "anls"], "keep_best": "anls"})
    assert options == {**EVALUATION, "dataset_dir": "held_out.json", "metrics": ["loss", "anls"], "keep_best": "anls"}
    assert EVALUATION["metrics"] == ["loss"]


def test_early_stopping_has_defaults_of_its_own():
    options = evaluation_options({"dataset_dir": "x.json", "every": 5, "early_stopping": {"metric": "loss"}})
    assert options["early_stopping"] == {"metric": "loss", "patience": 3, "min_delta": 0.0}


@pytest.mark.parametrize(("section", "words"), [
    ({"evry": 10}, r"Unknown key evaluation\.evry \(value 10\); the choices are dataset_dir, .*every"),
    ({"metrics": ["loss", "bleu"]}, r"evaluation\.metrics has 'bleu'; the choices are loss, shuffled_loss, exact_"),
    ({"keep_best": "anls"}, r"evaluation\.keep_best is 'anls', which evaluation\.metrics does not name"),
    ({"every": -1}, r"evaluation\.every is -1; it must be a whole number of at least 0"),
    ({"batch_size": "4"}, r"evaluation\.batch_size is '4'; it must be a whole number of at least 1"),
    ({"mode": "paint"}, r"evaluation\.mode is 'paint'; the choices are base"),
    ({"metrics": "loss"}, r"evaluation\.metrics is 'loss'; it must be a list"),
    ({"metrics": ["anls"], "keep_best": "loss"}, r"evaluation\.keep_best is 'loss'"),
    ({"every": 5, "early_stopping": {"metric": "anls"}}, r"early_stopping\.metric is 'anls', which evaluation\.metri"),
    ({"every": 5, "early_stopping": {"patience": 2}}, r"evaluation\.early_stopping lacks metric"),
    ({"every": 5, "early_stopping": {"metric": "loss", "patience": 0}}, r"patience is 0; it must be a whole n"),
    ({"every": 5, "early_stopping": {"metric": "loss", "min_delta": -1}}, r"min_delta is -1; it must be a num"),
    ({"every": 5, "early_stopping": {"metric": "loss", "wait": 1}}, r"Unknown key evaluation\.early_stopping\.wait"),
    ({"early_stopping": {"metric": "loss"}}, r"early_stopping needs evaluation\.every, .*it is 0"),
    ({"dataset_dir": ""}, r"evaluation\.dataset_dir is empty"), ({"dataset_dir": None}, "dataset_dir is empty")])
def test_options_that_cannot_be_meant_are_refused(section, words):
    with pytest.raises(ConfigError, match=words):
        evaluation_options({"dataset_dir": "held_out.json", **section})


@pytest.mark.parametrize("metric", ["shuffled_loss", "shuffled_reward_accuracy", "reward_chosen", "reward_rejected"])
def test_nothing_goes_by_a_metric_without_a_better_side(metric):
    section = {"dataset_dir": "x.json", "every": 5, "metrics": [metric]}
    for guide in ({"keep_best": metric}, {"early_stopping": {"metric": metric}}):
        with pytest.raises(ConfigError, match=f"is '{metric}', of which neither more nor less is better"):
            evaluation_options({**section, **guide}, scored=True)
