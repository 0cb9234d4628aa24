"""The best of several samples: drawn from one prompt, told apart by a reward model or by their probability."""
from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
from PIL import Image
from reference import ReferenceModel
from reward_model import PIECES, make_reward_model
from safetensors.numpy import load_file, save_file

from mindformers_ixc.decoding_options import check_best_of, check_reward
from mindformers_ixc.errors import GenerationError
from mindformers_ixc.generation.assistant import Assistant
from mindformers_ixc.generation.best_of import BestOf, Candidate, best_line
from mindformers_ixc.generation.predict import best_batch
from mindformers_ixc.generation.requests import Request
from mindformers_ixc.generation.scoring import Scorer
from mindformers_ixc.processing.judged import turns_of

QUESTION = {"query": "What is shown in the picture?", "images": [Image.new("RGB", (90, 50), (200, 10, 10))]}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A reward model and a model that writes, with the same body."""
    reward = make_reward_model(tmp_path_factory.mktemp("best") / "reward")
    writer = reward.parent / "writer"
    shutil.copytree(reward, writer)
    fields = json.loads((writer / "config.json").read_text())
    del fields["reward_pooling"]
    (writer / "config.json").write_text(json.dumps(fields), encoding="utf-8")
    arrays = load_file(writer / "model.safetensors")
    width = arrays.pop("v_head.weight").shape[1]
    arrays["output.weight"] = np.random.default_rng(8).standard_normal((PIECES, width)).astype(np.float32) / 4
    save_file(arrays, writer / "model.safetensors")
    return writer, reward


@pytest.fixture(scope="module")
def assistant(folders):
    return Assistant.from_directory(folders[0])


@pytest.fixture(scope="module")
def scorer(folders):
    return Scorer.from_directory(folders[1])


def test_the_best_by_the_reward_model_comes_first(assistant, scorer):
    found = BestOf(assistant, 5, scorer).answer(QUESTION, seed=3, max_new_tokens=6)
    assert len({one.text for one in found}) > 1
    scores = [one.score for one in found]
    assert scores == sorted(scores, reverse=True)
    alone = [scorer.score_samples([scorer.encode(turns_of(QUESTION, one.text), QUESTION["images"])])[0]
             for one in found]
    np.testing.assert_allclose(scores, alone, atol=1e-5)


def test_without_one_the_mean_log_probability_decides(folders, assistant, monkeypatch):
    drawn = {}
    decode = Assistant.decode
    monkeypatch.setattr(Assistant, "decode", lambda self, ids, stops=(): drawn.setdefault(
        decode(self, ids, stops), list(ids)) and decode(self, ids, stops))
    found = BestOf(assistant, 4).answer(QUESTION, seed=1, max_new_tokens=5)
    assert [one.logp for one in found] == sorted((one.logp for one in found), reverse=True)
    reference, sample = ReferenceModel(folders[0]), assistant.encode(QUESTION)
    start = len(sample.input_ids)
    rows = assistant.engine.encode_images(sample).asnumpy()
    for one in found:
        ids = np.concatenate([sample.input_ids, drawn[one.text]])
        x = reference.weights["model.tok_embeddings.weight"][ids]
        image = np.zeros(len(ids), bool)
        image[:start] = sample.image_mask == 1
        x[image] = rows
        logits = reference.logits(x[None], image[None])[0, start - 1:-1]
        logps = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        assert one.logp == pytest.approx(logps[np.arange(len(logits)), drawn[one.text]].mean(), abs=1e-4)


def test_the_seed_decides_and_samples_of_one_prompt_differ(assistant):
    best = BestOf(assistant, 4)
    once, again, other = (best.answer(QUESTION, seed=seed, max_new_tokens=6) for seed in (1, 1, 2))
    assert [one.text for one in once] == [one.text for one in again]
    assert {one.text for one in once} != {one.text for one in other}
    assert len({one.text for one in once}) > 1


def test_what_is_kept_of_the_prompt_changes_nothing(folders, assistant):
    alone = BestOf(Assistant.from_directory(folders[0], reuse_bytes=0), 3)
    found, again = (one.answer(QUESTION, seed=4, max_new_tokens=6) for one in (alone, BestOf(assistant, 3)))
    assert [one.text for one in found] == [one.text for one in again]
    np.testing.assert_allclose([one.logp for one in found], [one.logp for one in again], atol=1e-4)


def test_a_file_of_predictions_has_all_samples(assistant, scorer):
    requests = [Request({"query": "a"}, {"query": "a", "images": []}), Request("x", error="line 2: no"),
                Request({"query": "b"}, {"query": "b <ImageHere>", "images": []})]
    good, bad, refused = best_batch(BestOf(assistant, 3, scorer), requests, "base", {"max_new_tokens": 3, "seed": 0})
    assert good["answer"] == good["samples"][0]["answer"] and len(good["samples"]) == 3
    # so that no answer that was cut becomes the better one of a pair
    assert all(one["finished"] or one["tokens"] == 3 for one in good["samples"])
    assert not all(one["finished"] for one in good["samples"])
    assert good["score"] == max(one["score"] for one in good["samples"])
    assert bad == {"error": "line 2: no"} and "<ImageHere>" in refused["error"]


@pytest.mark.parametrize(("count", "options", "message"), [
    (1, {}, "best_of is 1; it must be a whole number of at least 2"),
    (8, {"num_beams": 3}, "best_of is 8 and num_beams is 3"),
    (8, {"prompt_lookup": 4}, "best_of is 8 and prompt_lookup is 4"),
    (8, {"temperature": 0}, "best_of is 8 and temperature is 0"),
])
def test_what_leaves_nothing_to_choose_is_refused(count, options, message):
    with pytest.raises(GenerationError, match=message):
        check_best_of(count, options)
    with pytest.raises(GenerationError, match="best_of is not said"):
        check_reward(None, "reward", {})


def test_more_samples_than_the_machine_can_hold_are_refused_at_once(assistant):
    with pytest.raises(GenerationError, match=r"1000000000 rows \(prompts x beams or samples\)"):
        BestOf(assistant, 10**9).answer(QUESTION, max_new_tokens=3)


def test_the_line_says_what_decided():
    found = [Candidate("a", -0.5, 2.0), Candidate("b", -0.25, 1.0)]
    assert best_line(found) == "The best of 2: score 2.000; the others 1.000."
    many = [Candidate("a", -number / 4) for number in range(1000)]
    assert best_line(many) == ("The best of 1000: mean log-probability 0.000; the others -0.250, -0.500, -0.750, "
                               "-1.000, -1.250, -1.500, -1.750 and 992 more, down to -249.750.")
    assert best_line([Candidate("b", -0.25)] * 2) == "The best of 2: mean log-probability -0.250; the others -0.250."
