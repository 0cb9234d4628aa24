"""Which answers carry loss: labels and weights token by token, in rows, and what is refused."""
from __future__ import annotations

import json

import numpy as np
import pytest
from mindformers.dataset.build_dataset import build_dataset
from mindformers.tools.register import MindFormerConfig

from mindformers_ixc.data.batch import BATCH_COLUMNS, PACKING_COLUMNS
from mindformers_ixc.data.conversations import Conversation, ConversationReader, ReadingOptions
from mindformers_ixc.data.fitting import first_pairs
from mindformers_ixc.data.learning import answer_runs, with_loss_on
from mindformers_ixc.data.packing import join_samples
from mindformers_ixc.data.rows import ConversationTable
from mindformers_ixc.data.sections import check_dataset_section
from mindformers_ixc.demo import demo_path
from mindformers_ixc.errors import DataError
from mindformers_ixc.processing.prompt import END_OF_TURN
from mindformers_ixc.registration import InternLM2Tokenizer, IXC25ImageProcessor, IXC25Processor

TOKENIZER = InternLM2Tokenizer(str(demo_path("tokenizer.model")))
PROCESSOR = IXC25Processor(IXC25ImageProcessor(56), TOKENIZER)
TURNS = [("system", "be brief"), ("user", "one?"), ("assistant", "red"), ("user", "two?"), ("assistant", "a dog"),
         ("user", "three?"), ("assistant", "a red square")]


def read(tmp_path, messages, **options):
    path = tmp_path / "talk.json"
    path.write_text(json.dumps([{"id": "a", "messages": messages}]))
    return ConversationReader(path, ReadingOptions(weighs=True, **options)).load()[0]


def messages(*weights, key="weight"):
    rounds = [[{"role": "user", "content": f"{number}?"},
               {"role": "assistant", "content": f"red {number}", **({} if weight is None else {key: weight})}]
              for number, weight in enumerate(weights)]
    return [turn for pair in rounds for turn in pair]


def texts(labels) -> list[str]:
    return [TOKENIZER.decode(labels[run].tolist()).strip(" ") for run in answer_runs(labels)]


@pytest.mark.parametrize(("loss_on", "weights", "expected"), [
    ("all", [], [0, 1, 2]), ("last", [], [2]), ("weights", [], [0, 1, 2]), ("weights", [1, 0, 0.5], [0, 2])])
def test_labels_of_the_answers_that_are_learnt_stay_and_no_others(loss_on, weights, expected):
    plain = PROCESSOR.encode_conversation(TURNS)
    runs = answer_runs(plain.labels)
    ends = ["", "", "\n</s>"]
    assert texts(plain.labels) == [f"{TURNS[2 + 2 * i][1]}{END_OF_TURN}{ends[i]}" for i in range(3)]
    found = with_loss_on(plain, loss_on, weights)
    assert texts(found.labels) == [texts(plain.labels)[i] for i in expected]
    np.testing.assert_array_equal(found.input_ids, plain.input_ids)
    if loss_on != "weights":
        assert found.weights is None
        return
    by_position = np.zeros(len(plain.labels), np.float32)
    for run, weight in zip(runs, weights or [1, 1, 1]):
        by_position[run] = weight
    np.testing.assert_array_equal(found.weights, by_position)
    row = found.pad(96, 1, 1, 2)
    np.testing.assert_array_equal(row["loss_weights"][:len(by_position) - 1], by_position[1:])
    assert ((row["loss_weights"] > 0) == (row["labels"] != -100)).all()


def test_a_packed_row_has_the_weights_of_its_samples_side_by_side():
    one = with_loss_on(PROCESSOR.encode_conversation(TURNS[1:3]), "weights", [0.5])
    two = with_loss_on(PROCESSOR.encode_conversation(TURNS[3:5]), "weights", [3.0])
    row = join_samples([one, two], 96, 1, 2, 1, 4)
    first = len(one.input_ids)
    np.testing.assert_array_equal(row["loss_weights"][:first], one.pad(first, 1, 1, 2)["loss_weights"])
    np.testing.assert_array_equal(row["loss_weights"][first:first + len(two.input_ids)],
                                  two.pad(len(two.input_ids), 1, 1, 2)["loss_weights"])
    assert ((row["loss_weights"] > 0) == (row["labels"] != -100)).all()
    assert set(row["loss_weights"].tolist()) == {0.0, 0.5, 3.0}


def test_weights_are_read_with_the_answers_and_cut_with_them(tmp_path):
    sample = read(tmp_path, messages(None, 0, 2.5))
    assert sample.weights == [1.0, 0.0, 2.5]
    assert first_pairs(sample, 2).weights == [1.0, 0.0]
    assert read(tmp_path, messages(None, 0, 2.5), ignore_keys=("weight",)).weights == [1.0, 1.0, 1.0]


@pytest.mark.parametrize(("rows", "words"), [
    (messages(1, -0.5), r"talk\.json, sample 0 \(id 'a'\), field messages\[3\]\.weight: must be 0 or a number"),
    (messages("high"), r"messages\[1\]\.weight: must be 0 or a number .* found 'high'"),
    (messages(True), r"messages\[1\]\.weight: must be 0 or a number"),
    (messages(float("nan")), r"messages\[1\]\.weight: must be 0 or a number"),
    (messages(1e-50), r"messages\[1\]\.weight: must be 0 or a number from 1e-06 to 1,000,000, found 1e-50"),
    (messages(0, 0.0), r"field messages: every answer has the weight 0, so there is nothing to learn"),
    (messages(1, key="wieght"), r"messages\[1\]\.wieght: is not read, .*the choices are role, content, weight"),
    ([{"role": "user", "content": "?", "weight": 1}, {"role": "assistant", "content": "!"}],
     r"messages\[0\]\.weight: is not read")])
def test_weights_that_cannot_be_meant_are_refused(tmp_path, rows, words):
    with pytest.raises(DataError, match=words):
        read(tmp_path, rows)


def test_where_no_weights_are_read_it_is_said_how_they_are(tmp_path):
    path = tmp_path / "talk.json"
    path.write_text(json.dumps([{"messages": messages(0.5)}]))
    with pytest.raises(DataError, match=r"messages\[1\]\.weight: answers count by it with .*loss_on: weights"):
        ConversationReader(path, ReadingOptions()).load()


def test_a_part_without_weight_is_refused_where_the_rest_does_not_fit():
    sample = Conversation("a.json", 0, "x", TURNS[1:3], weights=[0.0])
    columns = (*BATCH_COLUMNS, "loss_weights")
    table = ConversationTable(PROCESSOR, [sample], 96, 1, 1, columns=columns, loss_on="weights")
    with pytest.raises(DataError, match=r"a\.json, sample 0 \(id 'x'\): every answer of it that fits has the weight 0"):
        table[0]


def section(path, **fields):
    loader = {"type": "IXC25DataLoader", "dataset_dir": str(path), "shuffle": False, **fields.pop("data_loader", {})}
    tokenizer = {"type": "InternLM2Tokenizer", "vocab_file": str(demo_path("tokenizer.model"))}
    return {
        "data_loader": loader, "tokenizer": tokenizer, "seq_length": 96, "max_tiles": 1, "hd_num": 1, "image_size": 56,
        "patch_size": 14, "batch_size": 1, "num_parallel_workers": 1, "python_multiprocessing": False,
        "prefetch_size": 1, "numa_enable": False, "repeat": 1, "seed": 5, "drop_remainder": True, **fields}


@pytest.mark.parametrize("packing", [False, True])
def test_a_run_reads_weights_and_lengths(tmp_path, packing):
    path = tmp_path / "talk.json"
    path.write_text(json.dumps([{"messages": messages(0.5, 2)}, {"messages": messages(None)}]))
    columns = [*BATCH_COLUMNS, *(PACKING_COLUMNS if packing else ()), "noise_seed", "lengths", "loss_weights"]
    fields = section(path, packing=packing, input_columns=columns, data_loader={"loss_on": "weights"},
                     **({"max_segments": 3} if packing else {}))
    check_dataset_section(fields)
    dataset = build_dataset(MindFormerConfig(type="IXC25SFTDataset", dataset_config=MindFormerConfig(**fields)))
    rows = [dict(zip(columns, row)) for row in dataset.create_tuple_iterator(output_numpy=True, num_epochs=1)]
    samples = [with_loss_on(PROCESSOR.encode_conversation(
        [(turn["role"], turn["content"]) for turn in messages(*weights)]), "weights", [w or 1.0 for w in weights])
        for weights in ((0.5, 2), (None,))]
    wanted = [join_samples(samples, 96, 1, 2, 1, 3)] if packing else [one.pad(96, 1, 1, 2) for one in samples]
    assert len(rows) == len(wanted)
    for row, expected in zip(rows, wanted):
        for name in ("labels", "loss_weights"):
            np.testing.assert_array_equal(row[name][0], expected[name])
    sizes = [len(one.input_ids) for one in samples]
    ordered = [np.repeat(sizes, sizes)] if packing else [np.repeat(size, size) for size in sizes]
    for row, lengths in zip(rows, ordered):
        np.testing.assert_array_equal(row["lengths"][0], np.pad(lengths, (0, 96 - len(lengths))))


@pytest.mark.parametrize(("fields", "preferences", "words"), [
    ({"data_loader": {"loss_on": "first"}}, False, r"loss_on is 'first'; the choices are all, last, weights"),
    ({"data_loader": {"loss_on": "weights"}}, False, r"loss_on is 'weights'; with weights .*input_columns has loss_we"),
    ({"input_columns": [*BATCH_COLUMNS, "loss_weights"]}, False, r"loss_on is 'all'; with weights .* and only then"),
    ({"control_tokens": True, "data_loader": {"loss_on": "last"}}, False, r"with train_dataset\.control_tokens answ"),
    ({"data_loader": {"loss_on": "last"}}, True, r"loss_on is 'last', but of preference pairs whole answers are comp")])
def test_sections_that_contradict_themselves_are_refused(fields, preferences, words):
    with pytest.raises(DataError, match=words):
        check_dataset_section(section("x.json", **fields), preferences)
