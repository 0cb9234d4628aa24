"""Held-out pairs of a reward run: scores as the trained model gives them, and the metrics made of them."""
from __future__ import annotations

import json
from types import SimpleNamespace

import numpy as np
import pytest
from mindformers.tools.register import MindFormerConfig
from mindspore import Tensor
from PIL import Image
from reward_model import make_reward_model

from mindformers_ixc.data.batch import BATCH_COLUMNS, SCORE_COLUMN
from mindformers_ixc.errors import ConfigError, TrainingError
from mindformers_ixc.generation.loading import load_model
from mindformers_ixc.generation.scoring import Scorer
from mindformers_ixc.models.reward import IXC25RewardModel, RewardLoss
from mindformers_ixc.training import evaluation
from mindformers_ixc.training.evaluation import Evaluation
from mindformers_ixc.training.held_out import HeldOutPairs, PairScores, pair_losses
from mindformers_ixc.training_options import PAIR_METRICS, evaluation_options

COLOURS = ((200, 10, 10), (9, 90, 200), (10, 180, 20), (240, 240, 30))


def talk(answer: str) -> list[dict]:
    return [{"from": "human", "value": "Which colour?"}, {"from": "bot", "value": answer}]


@pytest.fixture
def data(tmp_path):
    """A section of a run over five pairs, four of them with a picture."""
    rows = []
    for i, colour in enumerate(COLOURS):
        Image.new("RGB", (90, 50 + i), colour).save(tmp_path / f"{i}.png")
        rows.append({"id": i, "conversations_a": talk("x" * (i + 1)), "conversations_b": talk("no"),
                     "image": f"{i}.png"})
    rows.append({"id": 4, "conversations_a": talk("any"), "conversations_b": talk("none of them"), "image": []})
    (tmp_path / "pairs.json").write_text(json.dumps(rows))
    tokenizer = make_reward_model(tmp_path / "m") / "tokenizer.model"
    return MindFormerConfig(
        tokenizer={"type": "InternLM2Tokenizer", "vocab_file": str(tokenizer)},
        seq_length=96, max_tiles=4, hd_num=2, image_size=56, patch_size=14, image_transform="inference",
        input_columns=[*BATCH_COLUMNS, SCORE_COLUMN])


def held_out(data, tmp_path, **options) -> HeldOutPairs:
    section = {"dataset_dir": str(tmp_path / "pairs.json"), **options}
    return HeldOutPairs(data, evaluation_options(section, scored=True))


def test_scores_of_pairs_are_those_of_their_conversations(data, tmp_path):
    pairs, scorer = held_out(data, tmp_path, batch_size=2), Scorer.from_directory(tmp_path / "m")
    model = load_model(tmp_path / "m", IXC25RewardModel, seq_length=96, max_tiles=4)
    found = pairs.scores(PairScores(model))
    wanted = [scorer.score_samples([scorer.encode(side.turns, side.images, 2) for side in pair.sides])
              for pair in pairs.samples]
    assert found.shape == (5, 2) and np.ptp(found) > 0.1
    np.testing.assert_allclose(found, wanted, atol=1e-4)


def by_red(*columns) -> Tensor:
    """Scores that say how red a pair's picture is, and how long its chosen side."""
    pixels, positions = columns[1].asnumpy(), columns[-1].asnumpy()
    return Tensor(np.stack([pixels[:, :, 0, 0, 0].max(1) / 100.0, 0.01 * (positions > 0).sum(2)[:, 0]], 1)
                  .astype(np.float32))


def test_metrics_are_means_over_pairs_whatever_the_batches(data, tmp_path):
    found = [held_out(data, tmp_path, batch_size=size).values(by_red, PAIR_METRICS, {"loss": "ranking"})
             for size in (1, 2, 5, 8)]
    assert all(one == found[0] for one in found)
    scores = held_out(data, tmp_path).scores(by_red)
    assert list(found[0]) == list(PAIR_METRICS)
    assert found[0]["reward_margin"] == pytest.approx((scores[:, 0] - scores[:, 1]).mean())
    assert found[0]["reward_accuracy"] == np.mean(scores[:, 0] > scores[:, 1]) == 0.4       # red and yellow
    assert found[0]["reward_margin"] == pytest.approx(found[0]["reward_chosen"] - found[0]["reward_rejected"])
    assert found[0]["loss"] == pytest.approx(np.logaddexp(0, scores[:, 1] - scores[:, 0]).mean())
    assert found[0]["shuffled_loss"] != found[0]["loss"]


def test_shuffled_pairs_have_anothers_picture_and_the_same_one_every_time(data, tmp_path):
    pairs = held_out(data, tmp_path)
    own, others, again = (pairs.scores(by_red, shuffled)[:, 0] for shuffled in (False, True, True))
    np.testing.assert_array_equal(others, again)
    assert (own[:4] != others[:4]).all() and own[4] == others[4] == 0        # the last one has no picture
    assert set(others[:4]) <= set(own[:4])


def test_a_score_that_is_no_number_ends_the_run(data, tmp_path):
    def broken(*columns):
        return Tensor(np.array([[0.5, np.nan]] * len(columns[0].asnumpy()), np.float32))

    with pytest.raises(TrainingError, match=r"sample 0 .*: the scores of its answers are 0\.5 and nan, and one of"):
        held_out(data, tmp_path).scores(broken)


@pytest.mark.parametrize("options", [{"loss": "ranking"}, {"loss": "focal"}, {"loss": "focal", "log_barrier": 0.5}])
def test_losses_are_those_of_training(options):
    scores = np.random.default_rng(0).normal(0, 3, (16, 2)).astype(np.float32)
    scores[0] = 40, -40
    assert pair_losses(scores.astype(np.float64), **options).mean() == pytest.approx(
        float(RewardLoss(**options)(Tensor(scores))[0].asnumpy()), rel=1e-5)


def test_a_run_measures_its_pairs_and_keeps_the_model_of_the_best(data, tmp_path, monkeypatch):
    monkeypatch.setattr(evaluation, "get_output_root_path", lambda: str(tmp_path / "out"))
    monkeypatch.setattr(evaluation, "PairScores", lambda model: by_red)
    (tmp_path / "out").mkdir()
    saved: list[str] = []
    model = SimpleNamespace(set_train=lambda on: None, config=SimpleNamespace(reward=None))
    trainer = SimpleNamespace(trained_model=model, save_directory=saved.append)
    callback = Evaluation(trainer, {"dataset_dir": str(tmp_path / "pairs.json"), "keep_best": "reward_accuracy",
                                    "metrics": ["reward_accuracy", "shuffled_reward_accuracy"]}, data)
    callback._measure(3)
    row, = map(json.loads, (tmp_path / "out" / "evaluations.jsonl").read_text().splitlines())
    assert row["step"] == 3 and row["reward_accuracy"] == 0.4 and saved == ["best"]


@pytest.mark.parametrize(("section", "words"), [
    ({"metrics": ["exact_match"]}, "exact_match.*reward_accuracy"),
    ({"mode": "write"}, "evaluation.mode is of answers, and a reward model writes none"),
    ({"max_new_tokens": 8}, "evaluation.max_new_tokens is of answers")])
def test_what_needs_answers_is_refused(section, words):
    with pytest.raises(ConfigError, match=words):
        evaluation_options({"dataset_dir": "pairs.json", **section}, scored=True)
    with pytest.raises(ConfigError, match="reward_accuracy"):
        evaluation_options({"dataset_dir": "pairs.json", "metrics": ["reward_accuracy"]})
