"""Rounds of sampling: the prompts of a batch, what is put into it, and rewards."""
from __future__ import annotations

import json
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from mindformers_ixc.data.batch import BATCH_COLUMNS, GROUP_COLUMNS
from mindformers_ixc.data.conversations import load_conversations
from mindformers_ixc.data.groups import GroupTable
from mindformers_ixc.demo import demo_path
from mindformers_ixc.errors import TrainingError
from mindformers_ixc.generation.text import TextStream
from mindformers_ixc.grpo_options import RULES, rollout_options
from mindformers_ixc.processing.processor import ImageProcessor, Processor
from mindformers_ixc.processing.tokenizer import Tokenizer
from mindformers_ixc.training.rollout import Rollout, prompt_of, put

PROCESSOR = Processor(ImageProcessor(56, training_transform="inference"), Tokenizer(str(demo_path("tokenizer.model"))))
LENGTH, TILES, GROUP = 96, 7, 3
SIDE = 56 // 28                # tokens along a side of a tile


@pytest.fixture
def table(tmp_path):
    Image.new("RGB", (90, 50), (200, 10, 10)).save(tmp_path / "red.png")
    Image.new("RGB", (50, 90), (10, 10, 200)).save(tmp_path / "blue.png")

    def talk(*texts):
        return [{"from": ("human", "bot")[i % 2], "value": text} for i, text in enumerate(texts)]

    rows = [{"id": 0, "conversations": talk("What is it?", "red"), "image": "red.png"},
            {"id": 1, "conversations": talk("Hello", "Hi", "How?", "Well."), "image": []},
            {"id": 2, "conversations": talk("<ImageHere> and <ImageHere>?", "both", "Which?", "all of them"),
             "image": ["red.png", "blue.png"]}]
    path = tmp_path / "data.json"
    path.write_text(json.dumps(rows), encoding="utf-8")
    return GroupTable(PROCESSOR, load_conversations(path), LENGTH, TILES, hd_num=2, group_size=GROUP,
                      columns=(*BATCH_COLUMNS, *GROUP_COLUMNS))


def columns_of(table) -> dict[str, np.ndarray]:
    rows = [dict(zip(table.columns, table[index])) for index in range(len(table))]
    return {name: np.stack([row[name] for row in rows]) for name in table.columns}


def text_of(ids) -> str:
    tokenizer = PROCESSOR.tokenizer
    stream = TextStream(tokenizer, (tokenizer.eos_token_id, PROCESSOR.end_of_turn_id), ())
    return ("".join(stream.push(token) for token in ids) + stream.flush()).strip()


def test_the_prompt_of_a_row_is_the_conversation_before_its_last_answer(table):
    columns = columns_of(table)
    assert columns["input_ids"].shape == (3, GROUP, LENGTH)
    for row in range(3):
        found = prompt_of(columns, row, SIDE)
        sample = table.samples[row]
        whole = PROCESSOR.encode_conversation(sample.turns, sample.images, sample.where, 2)
        length = len(found.sample.input_ids)
        np.testing.assert_array_equal(found.sample.input_ids, whole.input_ids[:length])
        np.testing.assert_array_equal(found.sample.image_mask, whole.image_mask[:length])
        assert found.sample.tiles == whole.tiles
        np.testing.assert_array_equal(found.sample.pixel_values, whole.pixel_values)
        for tiles in (whole.tiles, TILES):            # where a graph has more tiles than the sample
            np.testing.assert_array_equal(found.sample.vision_index(tiles), whole.vision_index(tiles)[:length])
        assert text_of(found.expected) == sample.turns[-1][1]
        assert sample.turns[-1][1] not in text_of(found.sample.input_ids[found.sample.image_mask == 0])


def test_answers_stand_behind_their_prompt_with_their_log_probabilities(table):
    columns = columns_of(table)
    prompt = prompt_of(columns, 1, SIDE)
    group = [([7, 8, 9], [-1.0, -2.0, -3.0]), ([5], [-0.5]), ([], [])]
    put(columns, 1, prompt, group, 2)
    start = len(prompt.sample.input_ids)
    for number, (ids, logps) in enumerate(group):
        row, end = columns["input_ids"][1, number], start + len(ids)
        np.testing.assert_array_equal(row[:start], prompt.sample.input_ids)
        assert row[start:end].tolist() == ids and (row[end:] == 2).all()
        labels = columns["labels"][1, number]
        assert labels[start - 1:end - 1].tolist() == ids and (labels != -100).sum() == len(ids)
        sampled = columns["sampled_logps"][1, number]
        assert sampled[start - 1:end - 1].tolist() == logps and np.count_nonzero(sampled) == len(ids)


def rollout_of(table, **options) -> Rollout:
    sampler = SimpleNamespace(rank=1, ranks=2, batch=lambda step: [0, 1, 2, 0])
    dataset = SimpleNamespace(conversations=table, plan_sampler=sampler)
    return Rollout(None, dataset, rollout_options(options), 42, 1, None)


@pytest.mark.parametrize(("rewards", "total", "said"), [
    ([[[0, 0], [1, 1]]] * 12, 30, [10]), ([[[0, 0]]] * 3, 3, [3]), ([[[0, 0], [1, 0]]] * 12, 30, []),
    ([[[1, 0]], *[[[0, 0]]] * 11], 12, [])])
def test_rounds_that_teach_nothing_from_the_beginning_are_said_once(table, caplog, rewards, total, said):
    rollout, found = rollout_of(table), []
    for number, values in enumerate(rewards, 1):
        rollout._watch(np.array(values, np.float32), number == total)
        found += [number] if "nothing was learnt. The rules are exact_match" in caplog.text else []
        caplog.clear()
    assert found == said


def test_a_rank_has_its_own_places(table):
    assert rollout_of(table).places(3, 2) == [14, 15]


def test_rewards_are_the_weighted_sum_of_rules(table):
    rollout = rollout_of(table, rewards={"exact_match": 1.0, "html": 0.5})
    found = rollout.rewards(0, [["a", "<p>a</p>", "b"], ["b", "b", "b"]], ["a", "b"])
    np.testing.assert_array_equal(found, [[1, 0.5, 0], [1, 1, 1]])


def test_a_reward_that_is_not_finite_is_named(table, monkeypatch):
    monkeypatch.setitem(RULES, "odd", lambda answers, wanted: [1.0] * (len(answers) - 1) + [float("nan")])
    with pytest.raises(TrainingError, match=r"Step 5: the reward odd of the answer 'z' to .*sample 0 .* is nan"):
        rollout_of(table, rewards={"odd": 1.0}).rewards(4, [["a", "b"], ["c", "z"]], ["a", "b"])


@pytest.mark.parametrize(("rule", "words"), [
    (lambda answers, wanted: [1.0], r"gives an array of the shape \(1,\) for 4 answers"),
    (lambda answers, wanted: 1.0, r"gives an array of the shape \(\) for 4 answers"),
    (lambda answers, wanted: {}[answers[0]], "failed with KeyError: 'a'. Mend the rule"),
    (lambda answers, wanted: [[1.0], "x", 2, 3], "failed with ValueError")])
def test_a_rule_that_fails_or_has_not_a_number_for_each_is_named(table, monkeypatch, rule, words):
    monkeypatch.setitem(RULES, "odd", rule)
    with pytest.raises(TrainingError, match=f"Step 5: the rule odd of rollout.rewards {words}"):
        rollout_of(table, rewards={"odd": 1.0}).rewards(4, [["a", "b"], ["c", "z"]], ["a", "b"])


def test_rewards_beyond_float32_are_named(table, monkeypatch):
    monkeypatch.setitem(RULES, "odd", lambda answers, wanted: [1.0, 0.0, 0.0, -2.0])
    rollout = rollout_of(table, rewards={"odd": 2e38})
    with pytest.raises(TrainingError, match=r"by the weights of rollout\.rewards are up to 4e\+38, beyond float32"):
        rollout.rewards(4, [["a", "b"], ["c", "z"]], ["a", "b"])


def test_a_reward_model_scores_the_conversation_with_the_answer(table):
    asked = []

    class Scorer:
        def encode(self, turns, images, where):
            asked.append((turns, len(images)))
            return turns

        def score_samples(self, samples):
            return [float(len(turns[-1][1])) for turns in samples]

    rollout = rollout_of(table, rewards={"reward_model": 2.0}, reward_model="model")
    rollout.scorer = Scorer()
    found = rollout.rewards(0, [["xx", "x"], ["", "xyz"]], ["?", "?"])
    np.testing.assert_array_equal(found, [[4, 2], [0, 6]])
    assert asked[1] == ([("user", "<ImageHere> and <ImageHere>?"), ("assistant", "both"), ("user", "Which?"),
                         ("assistant", "x")], 2)
