"""Preference pairs: what of a file is refused, and what a row of the dataset holds."""
from __future__ import annotations

import json

import numpy as np
import pytest
from mindformers.dataset.build_dataset import build_dataset
from mindformers.tools.register import MindFormerConfig
from PIL import Image

from mindformers_ixc.data.batch import BATCH_COLUMNS
from mindformers_ixc.data.conversations import load_conversations
from mindformers_ixc.data.preferences import REFERENCE_COLUMN, PreferenceTable, load_preferences
from mindformers_ixc.demo import demo_path
from mindformers_ixc.errors import DataError
from mindformers_ixc.processing.prompt import END_OF_TURN, START_OF_TURN, training_text, turn
from mindformers_ixc.registration import InternLM2Tokenizer, IXC25ImageProcessor, IXC25Processor

TOKENIZER = InternLM2Tokenizer(str(demo_path("tokenizer.model")))
PROCESSOR = IXC25Processor(IXC25ImageProcessor(56), TOKENIZER)
PAIR = {"id": "a", "prompt": "what?", "chosen": "a red square", "rejected": "a dog"}
COLUMNS = (*BATCH_COLUMNS, REFERENCE_COLUMN)


def write(folder, rows):
    path = folder / "pairs.json"
    path.write_text(rows if isinstance(rows, str) else json.dumps(rows))
    return path


@pytest.fixture
def source(tmp_path):
    """Three pairs with pictures of their own colour and size, two without; log-probabilities are their numbers."""
    rows = []
    for i in range(3):
        Image.new("RGB", (60 + 40 * i, 40), (80 * i + 40, 0, 0)).save(tmp_path / f"{i}.png")
        rows.append({**PAIR, "id": i, "image": f"{i}.png", "chosen": f"shade {i}", "rejected": "none at all"})
    rows += [{**PAIR, "id": i, "prompt": "say", "chosen": f"text {i}", "rejected": "no"} for i in (3, 4)]
    for i, item in enumerate(rows):
        item[REFERENCE_COLUMN] = [-i - 0.5, -10.0 * i]
    return write(tmp_path, rows)


def table_of(path) -> PreferenceTable:
    return PreferenceTable(PROCESSOR, load_preferences(path), seq_length=96, max_tiles=3, hd_num=2, columns=COLUMNS)


def dataset(path, **fields):
    section = {
        "data_loader": {"type": "IXC25DataLoader", "dataset_dir": str(path), "shuffle": True},
        "tokenizer": {"type": "InternLM2Tokenizer", "vocab_file": str(demo_path("tokenizer.model"))}, "seq_length": 96,
        "max_tiles": 3, "hd_num": 2, "image_size": 56, "patch_size": 14, "batch_size": 1, "num_parallel_workers": 1,
        "python_multiprocessing": False, "prefetch_size": 1, "numa_enable": False, "repeat": 1, "seed": 5,
        "drop_remainder": True, "input_columns": list(COLUMNS), **fields}
    return build_dataset(MindFormerConfig(type="IXC25PreferenceDataset", dataset_config=MindFormerConfig(**section)))


def test_a_pair_is_two_conversations_that_differ_in_the_answer(source):
    pairs = load_preferences(source)
    assert len(pairs) == 5
    for i, pair in enumerate(pairs):
        chosen, rejected = pair.sides
        question = ("user", "what?" if i < 3 else "say")
        assert chosen.turns == [question, ("assistant", f"shade {i}" if i < 3 else f"text {i}")]
        assert rejected.turns == [question, ("assistant", "none at all" if i < 3 else "no")]
        assert chosen.images == rejected.images == ([source.parent / f"{i}.png"] if i < 3 else [])
        assert (chosen.id, rejected.id, pair.logps) == (i, i, (-i - 0.5, -10.0 * i))
        assert chosen.source == str(source)


def test_what_a_pair_needs_is_measured_while_it_is_read(source, monkeypatch):
    table = dataset(source).conversations
    monkeypatch.setattr(table.processor, "conversation_length", None)      # nothing is measured a second time
    for index, (*lengths, tiles) in enumerate(table.needs.tolist()):
        sides = [table.processor.encode_conversation(side.turns, side.images, "", table.hd_num)
                 for side in table.samples[index].sides]
        assert lengths == [len(side.input_ids) for side in sides] and {tiles} == {side.tiles for side in sides}
    assert lengths[0] != lengths[1] and len(table.needs) == 5


def test_pairs_without_log_probabilities_have_none(tmp_path):
    assert [pair.logps for pair in load_preferences(write(tmp_path, [PAIR]))] == [None]


def test_pictures_are_looked_for_in_the_folder_given(source, tmp_path):
    (tmp_path / "apart").mkdir()
    moved = source.rename(tmp_path / "apart" / "pairs.json")
    with pytest.raises(DataError, match=r"sample 0 \(id 0\), field image: the picture 0\.png does not exist"):
        load_preferences(moved)
    assert load_preferences(moved, tmp_path)[0].images == [tmp_path / "0.png"]


@pytest.mark.parametrize(("changes", "words"), [
    ({"rejected": " a red square\n"}, "chosen equals rejected, so there is nothing to prefer"),
    ({"chosen": None, "rejected": None}, "field chosen: is missing, and so is rejected; a pair has two answers"),
    ({"chosen": ""}, "field chosen: must be a text that is not empty, found ''"),
    ({"rejected": " \n"}, "field rejected: must be a text that is not empty"),
    ({"chosen": ["a"]}, r"field chosen: must be a text that is not empty, found \['a'\]"),
    ({"prompt": None}, "field prompt: must be a text that is not empty, found None"),
    ({"reference_logps": [-1.0]}, r"field reference_logps: must be two numbers .* found \[-1\.0\]"),
    ({"reference_logps": -1.0}, r"field reference_logps: must be two numbers"),
    ({"reference_logps": [-1.0, "x"]}, r"field reference_logps: must be two numbers"),
    ({"reference_logps": [-1.0, float("nan")]}, r"field reference_logps: must be two numbers"),
    ({"reference_logps": {"chosen": 1}}, r"field reference_logps: must be two numbers"),
    ({"image": "gone.png"}, r"field image: the picture gone\.png does not exist"),
    ({"image": 3}, "field image: must be a path or a list of paths, found 3"),
    ({"image": [], "prompt": "<ImageHere> what?"}, "1 <ImageHere> for 0 pictures")])
def test_a_bad_pair_is_named_with_its_field(tmp_path, changes, words):
    path = write(tmp_path, [PAIR, {**PAIR, "id": "b", **changes}])
    with pytest.raises(DataError, match=rf"pairs\.json, sample 1 \(id 'b'\).*{words}"):
        load_preferences(path)


def test_conversations_with_equal_answers_are_named_by_their_keys(tmp_path):
    turns = [{"from": "user", "value": "?"}, {"from": "assistant", "value": "a"}]
    again = [turns[0], {**turns[1], "value": "a\n"}]
    with pytest.raises(DataError, match=r"\(id 0\): conversations_a equals conversations_b, so there is nothing"):
        load_preferences(write(tmp_path, [{"id": 0, "conversations_a": turns, "conversations_b": again}]))


def test_every_bad_pair_is_named(tmp_path):
    rows = [{**PAIR, "chosen": ""}, PAIR, {key: PAIR[key] for key in ("chosen", "rejected")}, "text"]
    with pytest.raises(DataError) as error:
        load_preferences(write(tmp_path, rows))
    lines = str(error.value).splitlines()
    assert [word in line for word, line in zip(("sample 0", "sample 2", "sample 3"), lines)] == [True] * 3
    assert "field prompt" in lines[1]
    assert lines[2].endswith("a pair must be a mapping, found str.")


@pytest.mark.parametrize(("text", "words"), [("{", "is not valid JSON"), ("[]", "JSON list with at least one pair"),
                                             ('{"a": 1}', "JSON list with at least one pair")])
def test_files_without_pairs(tmp_path, text, words):
    with pytest.raises(DataError, match=words):
        load_preferences(write(tmp_path, text))
    with pytest.raises(FileNotFoundError, match=r"none\.json does not exist"):
        load_preferences(tmp_path / "none.json")


def test_a_row_has_both_answers_and_one_set_of_pictures(source):
    table = table_of(source)
    for i, pair in enumerate(load_preferences(source)):
        row = dict(zip(COLUMNS, table[i]))
        assert {name: value.shape for name, value in row.items()} == {
            "input_ids": (2, 96), "labels": (2, 96), "vision_index": (2, 96), "image_mask": (2, 96),
            "pixel_values": (3, 3, 56, 56), "global_views": (1, 3, 56, 56), "view_index": (3,),
            "reference_logps": (2,)}
        np.testing.assert_array_equal(row[REFERENCE_COLUMN], np.array(pair.logps, np.float32))
        for side, sample in enumerate(pair.sides):
            single = PROCESSOR.encode_conversation(sample.turns, sample.images, hd_num=2).pad(
                96, 3, 1, TOKENIZER.pad_token_id)
            for name in ("input_ids", "labels", "vision_index", "image_mask"):
                np.testing.assert_array_equal(row[name][side], single[name])
            for name in ("pixel_values", "global_views", "view_index"):
                np.testing.assert_array_equal(row[name], single[name])
        assert row["pixel_values"].any() == row["image_mask"].any() == (i < 3)
        np.testing.assert_array_equal(row["image_mask"][0], row["image_mask"][1])


def test_only_the_answer_and_what_ends_it_carry_loss(source):
    table = table_of(source)
    for i, pair in enumerate(load_preferences(source)):
        row = dict(zip(COLUMNS, table[i]))
        for side, sample in enumerate(pair.sides):
            ids, labels = row["input_ids"][side], row["labels"][side]
            question = TOKENIZER.encode_text(f"{turn(*sample.turns[0])}{START_OF_TURN}assistant\n",
                                             control_tokens=True)
            answer = TOKENIZER.encode_text(training_text(sample.turns), control_tokens=True)[len(question):]
            places = np.flatnonzero(labels != -100)
            assert labels[places].tolist() == answer
            assert TOKENIZER.decode(answer).strip() == f"{sample.turns[1][1]}{END_OF_TURN}\n</s>"
            np.testing.assert_array_equal(places, places[0] + np.arange(len(answer)))
            np.testing.assert_array_equal(ids[places + 1], answer)


def batches(data) -> list[tuple[np.ndarray, ...]]:
    return [tuple(column.copy() for column in batch)
            for batch in data.create_tuple_iterator(num_epochs=1, output_numpy=True)]


def test_mindformers_builds_batches_of_pairs(source):
    data = dataset(source, batch_size=2, drop_remainder=False)
    table, seen = table_of(source), set()
    for batch in batches(data):
        assert [column.dtype.name for column in batch] == [
            "int32", "int32", "uint8", "float32", "int32", "int32", "int32", "float32"]
        assert [len(column) for column in batch] == [2] * len(COLUMNS)
        for i, logps in enumerate(batch[-1]):
            number = round(-float(logps[0]) - 0.5)
            seen.add(number)
            for column, expected in zip(batch, table[number]):
                np.testing.assert_array_equal(column[i], expected)
    assert seen == set(range(5))


def test_pairs_of_which_an_answer_does_not_fit_are_left_out(source):
    rows = json.loads(source.read_text())
    rows[1]["rejected"] = rows[4]["chosen"] = "much too long an answer " * 20
    path = source.with_name("long.json")
    path.write_text(json.dumps(rows))
    found = sorted(round(-float(batch[-1][0, 0]) - 0.5) for batch in batches(dataset(path)))
    assert found == [0, 2, 3]
    # with room for no tiles only text is left
    found = sorted(round(-float(batch[-1][0, 0]) - 0.5) for batch in batches(dataset(path, max_tiles=1)))
    assert found == [3]


def test_when_no_pair_fits_the_length_that_would_is_said(source):
    longest = max(PROCESSOR.conversation_length(side.turns, [(60 + 40 * i, 40)] * (i < 3), 2)[0]
                  for i, pair in enumerate(load_preferences(source)) for side in pair.sides)
    with pytest.raises(DataError, match=f"5 of 5 pairs do not fit seq_length 8 .*the longest has {longest} positions"):
        dataset(source, seq_length=8)


def test_log_probabilities_are_needed_of_every_pair_when_they_are_a_column(tmp_path):
    path = write(tmp_path, [{**PAIR, REFERENCE_COLUMN: [-1.0, -2.0]}, PAIR])
    with pytest.raises(DataError, match="reference_logps, but not every pair has that field"):
        dataset(path)
    found = batches(dataset(path, input_columns=list(BATCH_COLUMNS)))
    assert [len(batch) for batch in found] == [len(BATCH_COLUMNS)] * 2


def test_of_two_conversations_the_last_answers_alone_are_compared(tmp_path):
    Image.new("RGB", (60, 40)).save(tmp_path / "a.png")
    before = [{"from": "user", "value": "what?"}, {"from": "assistant", "value": "a dog in a house"},
              {"from": "user", "value": "and?"}]
    row = {key: [*before, {"from": "assistant", "value": text}]
           for key, text in (("conversations_a", "a red square"), ("conversations_b", "no"))}
    table = PreferenceTable(PROCESSOR, load_preferences(write(tmp_path, [{**row, "image": "a.png"}])), 96, 3, hd_num=2)
    short = PreferenceTable(PROCESSOR, load_preferences(write(tmp_path, [PAIR])), 96, 3, hd_num=2)
    for side, text in enumerate(("a red square", "no")):
        labels, single = table._encode(0)["labels"][side], short._encode(0)["labels"]
        assert TOKENIZER.decode(labels[labels != -100].tolist()).startswith(f" {text}{END_OF_TURN}")
        if not side:       # as of a pair without a round before it
            assert labels[labels != -100].tolist() == single[0][single[0] != -100].tolist()


@pytest.mark.parametrize(("row", "key"), [
    (PAIR, "chosen"), ({"conversations_a": [{"from": "user", "value": "?"}]}, "conversations_a")])
def test_a_pair_among_conversations_is_called_one(tmp_path, row, key):
    with pytest.raises(DataError, match=f"field {key}: is that of a preference pair, and conversations are read here"):
        load_conversations(write(tmp_path, [row]))
