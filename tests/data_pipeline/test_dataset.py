"""The dataset MindFormers builds from YAML: shapes, workers, cutting, damaged pictures."""
from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from indexed import fit_samples
from mindformers.dataset.build_dataset import build_dataset
from mindformers.tools.register import MindFormerConfig
from PIL import Image

import mindformers_ixc  # noqa: F401
from mindformers_ixc.data.batch import BATCH_COLUMNS, PACKING_COLUMNS
from mindformers_ixc.data.conversations import Conversation
from mindformers_ixc.data.packer import Rows
from mindformers_ixc.data.preview import look
from mindformers_ixc.data.preview_data import Reader, read_data
from mindformers_ixc.data.rows import ConversationTable
from mindformers_ixc.data.sampling import RunPlan
from mindformers_ixc.demo import demo_path
from mindformers_ixc.errors import DataError
from mindformers_ixc.registration import InternLM2Tokenizer, IXC25ImageProcessor, IXC25Processor

TOKENIZER = str(demo_path("tokenizer.model"))
PROCESSOR = IXC25Processor(IXC25ImageProcessor(56), InternLM2Tokenizer(TOKENIZER))


def section(path, **fields) -> MindFormerConfig:
    return MindFormerConfig(**{
        "data_loader": {"type": "IXC25DataLoader", "dataset_dir": str(path), "shuffle": True},
        "tokenizer": {"type": "InternLM2Tokenizer", "vocab_file": TOKENIZER}, "seq_length": 96, "max_tiles": 3,
        "hd_num": 2, "image_size": 56, "patch_size": 14, "batch_size": 2, "num_parallel_workers": 1,
        "python_multiprocessing": True, "prefetch_size": 1, "numa_enable": False, "repeat": 1, "seed": 5,
        "drop_remainder": True, "input_columns": list(BATCH_COLUMNS),
        **fields})


def dataset(path, **fields):
    return build_dataset(MindFormerConfig(type="IXC25SFTDataset", dataset_config=section(path, **fields)))


def epochs(data, count: int) -> list[list[tuple[np.ndarray, ...]]]:
    iterator = data.create_tuple_iterator(num_epochs=count, output_numpy=True)
    return [[tuple(column.copy() for column in batch) for batch in iterator] for _ in range(count)]


@pytest.fixture
def source(tmp_path):
    """Five pictures of their own colour, three text-only samples."""
    rows = []
    for i in range(5):
        Image.new("RGB", (60, 40), (50 * i, 0, 0)).save(tmp_path / f"{i}.png")
        rows.append({"id": i, "image": f"{i}.png", "conversations": [{"from": "human", "value": "what?"},
                                                                     {"from": "bot", "value": f"{i}"}]})
    rows += [{"id": 10 + i, "conversations": [{"from": "human", "value": "say"}, {"from": "bot", "value": f"x{i}"}]}
             for i in range(3)]
    (tmp_path / "data.json").write_text(json.dumps(rows))
    return tmp_path / "data.json"


def test_batches_have_the_documented_columns(source):
    data = dataset(source)
    assert data.get_dataset_size() == 3
    for ids, labels, pixels, views, slots, index, mask in epochs(data, 1)[0]:
        assert [a.dtype.name for a in (ids, labels, pixels, views, slots, index, mask)] == [
            "int32", "int32", "uint8", "float32", "int32", "int32", "int32"]
        assert ids.shape == labels.shape == index.shape == mask.shape == (2, 96)
        assert (pixels.shape, views.shape, slots.shape) == ((2, 3, 3, 56, 56), (2, 1, 3, 56, 56), (2, 3))
        assert len({bool(row.any()) for row in mask}) == 1, "kinds must not mix in a batch"


def test_any_number_of_workers_gives_the_same_epochs(source):
    one, two = (epochs(dataset(source, num_parallel_workers=workers), 2) for workers in (1, 2))
    for first, second in zip(one, two):
        for a, b in zip(first, second):
            for x, y in zip(a, b):
                np.testing.assert_array_equal(x, y)
    assert any(not np.array_equal(a[0], b[0]) for a, b in zip(*one)), "epochs must differ"


def conversation(pairs, images=0, text="what is it?"):
    turns = []
    for i in range(pairs):
        turns += [("user", ("<ImageHere>" if i < images else "") + text), ("assistant", "a cat")]
    return Conversation("x.json", 0, "a", turns, [Path(f"{i}.png") for i in range(images)],
                        [(56, 56)] * images)


def test_long_conversations_are_cut_between_pairs():
    sample = conversation(6, images=3)
    whole = PROCESSOR.conversation_length(sample.turns, sample.sizes, 1)
    for length in range(30, whole[0] + 1, 5):
        try:
            part = fit_samples(PROCESSOR, [sample], length, 9, 1)[0]
        except DataError:
            continue
        assert len(part.turns) % 2 == 0
        assert part.turns == sample.turns[:len(part.turns)]
        assert len(part.images) == min(3, len(part.turns) // 2)
        assert PROCESSOR.conversation_length(part.turns, part.sizes, 1)[0] <= length
        if len(part.turns) < 12:
            more = sample.turns[:len(part.turns) + 2]
            sizes = sample.sizes[:min(3, len(more) // 2)]
            assert PROCESSOR.conversation_length(more, sizes, 1)[0] > length


def test_tiles_cut_too():
    assert len(fit_samples(PROCESSOR, [conversation(4, images=4)], 500, 4, 1)[0].images) == 2


def test_when_nothing_fits_the_length_that_would_is_said():
    sample = conversation(1, images=1)
    needed = PROCESSOR.conversation_length(sample.turns, sample.sizes, 1)
    with pytest.raises(DataError, match=f"need {needed[0]} positions and {needed[1]} tiles"):
        fit_samples(PROCESSOR, [sample], 10, 9, 1)
    kept = fit_samples(PROCESSOR, [sample, conversation(1)], needed[0] - 1, 9, 1)
    assert len(kept) == 1


def damaged_table(tmp_path, bad: int, share: float) -> ConversationTable:
    samples = []
    for i in range(6):
        path = tmp_path / f"{i}.png"
        Image.fromarray(np.random.default_rng(i).integers(0, 255, (56, 56, 3), np.uint8)).save(path)
        if i < bad:
            path.write_bytes(path.read_bytes()[:-3000])
        samples.append(Conversation("x.json", i, i, [("user", "q"), ("assistant", "a")], [path], [(56, 56)]))
    samples.append(Conversation("x.json", 6, 6, [("user", "q"), ("assistant", "text")]))
    return ConversationTable(PROCESSOR, samples, 64, 2, 1, share)


def test_a_damaged_picture_is_replaced_by_its_kind_and_counted(tmp_path):
    table = damaged_table(tmp_path, 1, 0.5)
    for first, second in zip(table[0], table[1]):
        np.testing.assert_array_equal(first, second)
    assert table.bad_samples == 1


def test_too_many_damaged_pictures_stop_the_run(tmp_path):
    table = damaged_table(tmp_path, 4, 0.3)
    with pytest.raises(DataError, match="3 of 7 samples have damaged pictures"):
        table[0]


def test_every_text_is_tokenised_once_for_measuring(source, monkeypatch):
    rows = json.loads(source.read_text())
    for row in rows:
        row["conversations"][0]["value"] += f" number {row['id']}"       # every text is another
    source.write_text(json.dumps(rows))
    texts, encode = [], InternLM2Tokenizer.encode_text
    monkeypatch.setattr(InternLM2Tokenizer, "encode_text",
                        lambda self, text, **options: texts.append(text) or encode(self, text, **options))
    columns = [*BATCH_COLUMNS, *PACKING_COLUMNS]
    data = dataset(source, packing=True, input_columns=columns, python_multiprocessing=False)
    prefix = len(texts) - len([text for text in texts if "number" in text])
    measured = [text for text in texts if "number" in text]
    assert len(measured) == len(set(measured)) == len(rows)
    assert prefix <= 2 * len(rows) + 5          # what stands in front of a picture, and the processor's own marks
    table, texts[:] = data.conversations, []
    assert table.plan.epoch_rows < len(table)
    for place in range(table.plan.epoch_rows):
        table[place]
    assert sorted(text for text in texts if "number" in text) == sorted(measured)      # and once for encoding


def packed_table(tmp_path, rows, bad=()) -> ConversationTable:
    """Four pictures from two sources and two texts; rows of their numbers."""
    samples = []
    for i in range(4):
        path = tmp_path / f"{i}.png"
        Image.fromarray(np.random.default_rng(i).integers(0, 255, (56, 56, 3), np.uint8)).save(path)
        if i in bad:
            path.write_bytes(path.read_bytes()[:-3000])
        samples.append(Conversation(f"{i % 2}.json", i, i, [("user", "q"), ("assistant", f"answer {i}")], [path],
                                    [(56, 56)]))
    samples += [Conversation("text.json", i, i, [("user", "q"), ("assistant", f"text {i}")]) for i in (4, 5)]
    order = np.array([i for row in rows for i in row], np.int32)
    packed = Rows(order, np.cumsum([0, *map(len, rows)]).astype(np.int32))
    plan = RunPlan(lambda epoch: packed, len(rows), 1)
    columns = ["input_ids", "labels", "pixel_values", "vision_index", "image_mask", "source"]
    return ConversationTable(PROCESSOR, samples, 128, 8, 1, 0.5, None, columns, max_segments=6, plan=plan)


def columns_of(table, place: int) -> dict:
    return dict(zip(table.columns, table[place]))


def test_a_row_tells_the_source_of_each_position(tmp_path):
    table = packed_table(tmp_path, [[1, 4, 0], [5]])
    row, lengths = columns_of(table, 0), [int(table.needs[i, 0]) for i in (1, 4, 0)]
    assert row["source"].dtype == np.int32
    assert row["source"].shape == (128,)
    names = [table.source_names[number] for number in row["source"]]
    ends = np.cumsum(lengths)
    assert set(names[:ends[0]]) == {"1.json"}
    assert set(names[ends[0]:ends[1]]) == {"text.json"}
    assert set(names[ends[1]:ends[2]]) == {"0.json"}
    assert (row["labels"][ends[2]:] == -100).all()
    assert set(columns_of(table, 3)["source"][:int(table.needs[5, 0])]) == {table.source_names.index("text.json")}


def test_of_a_packed_row_only_the_damaged_sample_is_left_out(tmp_path):
    damaged, whole = (packed_table(tmp_path / name, [[1, 4, 0], [2], [4]], bad)
                      for name, bad in (("a", (1, 2)), ("b", ())) if (tmp_path / name).mkdir() is None)
    without = packed_table(tmp_path / "b", [[4, 0], [3]])
    for place, expected in ((0, without[0]), (1, without[1]), (2, whole[2])):
        for one, other in zip(damaged[place], expected):
            np.testing.assert_array_equal(one, other)
    assert damaged.bad_samples == 2


def test_a_row_of_nothing_but_damaged_samples_takes_the_next_of_their_kind(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    damaged = packed_table(tmp_path / "a", [[0, 1], [4]], (0, 1))
    expected = packed_table(tmp_path / "b", [[2]])[0]
    for one, other in zip(damaged[0], expected):
        np.testing.assert_array_equal(one, other)


def test_packed_rows_leave_room_for_the_segments_of_their_padding():
    sample = conversation(1, text="a long question " * 4)
    needed = PROCESSOR.conversation_length(sample.turns)[0]
    short = conversation(1)
    assert len(fit_samples(PROCESSOR, [sample, short], needed + 7, 3, 1, max_segments=8)) == 2
    assert len(fit_samples(PROCESSOR, [sample, short], needed + 6, 3, 1, max_segments=8)) == 1
    with pytest.raises(DataError, match=rf"samples fits seq_length {needed + 6}, max_tiles 3 and max_images 1 "
                                        rf"\(max_segments 8 leaves {needed - 1} positions to a sample\): .* need "
                                        f"{needed} positions"):
        fit_samples(PROCESSOR, [sample], needed + 6, 3, 1, max_images=1, max_segments=8)


def test_pictures_have_a_budget_of_their_own():
    assert len(fit_samples(PROCESSOR, [conversation(4, images=4)], 500, 9, 1, max_images=2)[0].images) == 2
    with pytest.raises(DataError, match=r"max_images 1: .* and 2 pictures"):
        fit_samples(PROCESSOR, [Conversation("x.json", 0, 0, [("user", "<ImageHere><ImageHere>q"), ("assistant", "a")],
                                             [Path("0.png"), Path("1.png")], [(56, 56)] * 2)], 500, 9, 1, max_images=1)


def test_any_number_of_workers_gives_the_same_packed_epochs(source):
    columns = ["input_ids", "labels", "pixel_values", "vision_index", "image_mask", *PACKING_COLUMNS, "source"]
    sets = [dataset(source, packing=True, max_segments=4, seq_length=200, max_tiles=8, batch_size=1,
                    input_columns=columns, num_parallel_workers=workers) for workers in (1, 2)]
    one, two = (epochs(data, 2) for data in sets)
    plan = sets[0].plan_sampler
    assert len(one[0]) == sets[0].get_dataset_size() < 8
    assert sorted(plan.batch(0) + [i for step in range(1, len(one[0])) for i in plan.batch(step)]) == list(range(8))
    assert plan.mean_samples == 8 / len(one[0])
    assert plan.row_shape == (200, 8)
    for first, second in zip(one, two):
        for a, b in zip(first, second):
            for x, y in zip(a, b):
                np.testing.assert_array_equal(x, y)
    assert sum(len(set(row)) > 1 for row in plan.rows(0)) == 1, "samples share rows"


def test_a_preview_shows_the_samples_of_a_batch(source):
    fields = section(source)
    reader = Reader.of(fields)
    entries = read_data(reader, str(source)).measured
    data = dataset(source)
    batches, = epochs(data, 1)
    for step, batch in enumerate(batches):
        columns = dict(zip(BATCH_COLUMNS, batch))
        for row, index in enumerate(data.plan_sampler.batch(step)):
            found = look(reader, entries[index])
            seen, targets = found.seen[0], np.flatnonzero(columns["labels"][row] != -100)
            assert (seen.positions, seen.supervised) == (targets[-1] + 2, len(targets))
            assert seen.encoded.input_ids.tolist() == columns["input_ids"][row][:seen.positions].tolist()
            assert sum(board.positions for board in found.boards) == columns["image_mask"][row].sum()
            for board in found.boards:
                assert np.array_equal(board.pixels[:56, :56].transpose(2, 0, 1),
                                      columns["pixel_values"][row, board.first + 1])
