"""Preference pairs over their index: from every kind of source what reading them gives, counted and left out alike."""
from __future__ import annotations

import gzip
import io
import json
import tarfile
import threading

import numpy as np
import pytest
from indexed import read_image_sizes
from PIL import Image

from mindformers_ixc.data.batch import BATCH_COLUMNS, REFERENCE_COLUMN
from mindformers_ixc.data.conversations import ReadingOptions
from mindformers_ixc.data.fitting import Shapes
from mindformers_ixc.data.index import building
from mindformers_ixc.data.index.samples import make_samples
from mindformers_ixc.data.index.sources import measures_of, open_sources
from mindformers_ixc.data.preferences import PairReader, PreferenceTable, load_preferences
from mindformers_ixc.data.rows import SectionOptions, make_processor, own_tokenizer
from mindformers_ixc.errors import DataError, ImageError, SampleError
from mindformers_ixc.reading import current as watched

SECTION = {"tokenizer": {"type": "InternLM2Tokenizer", "vocab_file": "pkg:mindformers_ixc/demo/tokenizer.model"},
           "hd_num": 4, "image_size": 56}
PROCESSOR = make_processor(SectionOptions(SECTION), own_tokenizer(SECTION))
LARGE = Shapes(400, 9, 4)
COLUMNS = (*BATCH_COLUMNS, REFERENCE_COLUMN)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def sources_of(data, folder):
    return open_sources({"dataset_dir": data}, 5, measures_of(SECTION, PROCESSOR), folder / "index", kind="pair")


def pairs_of(data, folder, shapes=LARGE, share=0.01):
    return make_samples(sources_of(data, folder), shapes, share, folder / "index")


def rows_of(folder, count=9):
    """Pairs of which two in three have a picture, with log-probabilities of their own."""
    rows = []
    for number in range(count):
        row = {"id": number, "prompt": "what is it? " * (1 + number % 4), "chosen": "a cat " * (1 + number % 3),
               "rejected": "no " * (1 + number), "reference_logps": [-number / 3, -10.0 * number]}
        if number % 3:
            Image.new("RGB", (50 + 70 * number, 60)).save(folder / f"{number}.png")
            row["image"] = f"{number}.png"
        rows.append(row)
    return rows


def tar(path, rows):
    with tarfile.open(path, "w") as archive:
        for row in rows:
            files = [(f"{row['id']}.json", json.dumps({key: row[key] for key in row if key != "image"}).encode())]
            if "image" in row:
                files.append((f"{row['id']}.png", (path.parent / row["image"]).read_bytes()))
            for name, content in files:
                member = tarfile.TarInfo(name)
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))


def parquet(path, rows):
    import pyarrow as pa
    import pyarrow.parquet as pq

    held = [{**row, "image": {"bytes": (path.parent / row["image"]).read_bytes(), "path": row["image"]}}
            if "image" in row else row for row in rows]
    pq.write_table(pa.Table.from_pylist(held, pa.schema([
        ("id", pa.int64()), ("prompt", pa.string()), ("chosen", pa.string()), ("rejected", pa.string()),
        ("reference_logps", pa.list_(pa.float64())),
        ("image", pa.struct([("bytes", pa.binary()), ("path", pa.string())]))])), path, row_group_size=4)


def zstd(path, rows):
    import pyarrow

    with pyarrow.output_stream(str(path), compression="zstd") as file:
        file.write(json.dumps(rows).encode())


def lines(rows):
    return "\n".join(map(json.dumps, rows)).encode()


KINDS = {"pairs.json": lambda path, rows: path.write_text(json.dumps(rows)),
         "pairs.jsonl": lambda path, rows: path.write_bytes(lines(rows)),
         "pairs.jsonl.gz": lambda path, rows: path.write_bytes(gzip.compress(lines(rows))),
         "pairs.json.zst": zstd, "pairs.parquet": parquet, "pairs.tar": tar}


def check(found, rows):
    """Compares pairs with the rows that they were written as."""
    assert [pair.id for pair in found] == [row["id"] for row in rows]
    for pair, row in zip(found, rows):
        assert [side.turns[-1] for side in pair.sides] == [("assistant", row["chosen"]), ("assistant", row["rejected"])]
        assert pair.turns[0][1] == row["prompt"]
        assert list(pair.logps) == row["reference_logps"]
        assert pair.sizes == ([(50 + 70 * row["id"], 60)] if "image" in row else [])


@pytest.mark.parametrize("name", KINDS)
def test_pairs_of_every_kind_of_source(tmp_path, name):
    path, rows = tmp_path / name, rows_of(tmp_path)
    KINDS[name](path, rows)
    sources = sources_of(str(path), tmp_path)
    assert sources[0].index.description.lacking == 0
    pairs = make_samples(sources, LARGE, 0.01, tmp_path / "index")
    check(list(pairs), rows)
    for pair, needs in zip(pairs, pairs.needs.tolist()):
        sides = [PROCESSOR.conversation_length(side.turns, side.sizes, 4) for side in pair.sides]
        assert needs == [sides[0][0], sides[1][0], sides[0][1]]
    assert pairs.images.tolist() == [len(pair.images) for pair in pairs]


def test_pairs_of_a_mindrecord_file(tmp_path):
    from mindspore.mindrecord import FileWriter

    rows = [row for row in rows_of(tmp_path) if "image" in row]
    writer = FileWriter(str(tmp_path / "pairs.mindrecord"), 1)
    texts = {key: {"type": "string"} for key in ("prompt", "chosen", "rejected")}
    writer.add_schema({"id": {"type": "int32"}, "image": {"type": "bytes"}, **texts,
                       "reference_logps": {"type": "float64", "shape": [-1]}}, "pairs")
    writer.write_raw_data([{**row, "image": (tmp_path / row["image"]).read_bytes(),
                            "reference_logps": np.array(row["reference_logps"])} for row in rows])
    writer.commit()
    check(sorted(pairs_of(str(tmp_path / "pairs.mindrecord"), tmp_path), key=lambda pair: pair.id), rows)


def test_rows_are_those_of_pairs_in_memory(tmp_path):
    path, rows = tmp_path / "pairs.json", rows_of(tmp_path)
    path.write_text(json.dumps(rows))
    memory = load_preferences(path)
    read_image_sizes(memory)
    indexed = pairs_of(str(path), tmp_path)
    tables = [PreferenceTable(PROCESSOR, samples, 400, 9, 4, columns=COLUMNS, needs=needs)
              for samples, needs in ((memory, None), (indexed, indexed.needs))]
    np.testing.assert_array_equal(*(table.needs for table in tables))
    for number in range(len(rows)):
        for one, other in zip(*(table[number] for table in tables)):
            assert one.dtype == other.dtype
            np.testing.assert_array_equal(one, other)


def test_processes_measure_pairs_as_one_does(tmp_path, monkeypatch):
    path, rows = tmp_path / "pairs.json", rows_of(tmp_path, 12)
    del rows[4]["reference_logps"]
    path.write_text(json.dumps(rows))
    alone = sources_of(str(path), tmp_path / "alone")[0].index
    monkeypatch.setattr(building, "FEW", 0)
    monkeypatch.setattr(building, "PART", 5)
    together = sources_of(str(path), tmp_path / "together")[0].index
    for name in ("places", "digests", "sizes", "pair_starts", "needs"):
        np.testing.assert_array_equal(getattr(alone, name), getattr(together, name))
    assert alone.description.lacking == together.description.lacking == 1


def test_a_list_file_takes_pairs_as_it_takes_samples(tmp_path):
    path, rows = tmp_path / "pairs.json", rows_of(tmp_path)
    path.write_text(json.dumps(rows))
    (tmp_path / "list.txt").write_text("pairs.json 0.021\n")
    drawn = [pair.id for pair in pairs_of(str(tmp_path / "list.txt"), tmp_path)]
    assert sorted(drawn.count(row["id"]) for row in rows) == [2] * 6 + [3] * 3
    assert drawn == [pair.id for pair in pairs_of(str(tmp_path / "list.txt"), tmp_path)]


def test_pairs_that_do_not_fit_on_either_side_are_left_out(tmp_path, caplog):
    path, rows = tmp_path / "pairs.json", rows_of(tmp_path)
    rows[0]["chosen"] = rows[3]["rejected"] = "much too long " * 40
    path.write_text(json.dumps(rows))
    pairs = pairs_of(str(path), tmp_path, Shapes(150, 9, 4))
    assert [pair.id for pair in pairs] == [1, 2, 4, 5, 6, 7, 8]
    longest = max(PROCESSOR.conversation_length(side.turns, [], 4)[0]
                  for pair in load_preferences(path)[:4:3] for side in pair.sides)
    assert f"2 of 9 pairs do not fit seq_length 150 and max_tiles 9 (the longest has {longest} positions" in caplog.text


def test_a_picture_that_no_tiles_can_be_made_of_is_counted(tmp_path, caplog):
    path, rows = tmp_path / "pairs.json", rows_of(tmp_path)
    Image.new("RGB", (5000, 3)).save(tmp_path / "strip.png")
    rows[2]["image"] = "strip.png"
    path.write_text(json.dumps(rows))
    assert [pair.id for pair in pairs_of(str(path), tmp_path)] == [0, 1, 3, 4, 5, 6, 7, 8]
    assert "Left out: " in caplog.text and "strip.png" in caplog.text
    rows[5]["image"] = rows[7]["image"] = "strip.png"
    path.write_text(json.dumps(rows))
    with pytest.raises(DataError, match=r"3 of 9 samples cannot be used, .* max_bad_share 0\.2 .*sample 7 \(id 7\)"):
        pairs_of(str(path), tmp_path, share=0.2)


def test_all_bad_pairs_are_named(tmp_path):
    path, rows = tmp_path / "pairs.json", rows_of(tmp_path)
    rows[0]["rejected"], rows[4]["image"] = rows[0]["chosen"], "gone.png"
    path.write_text(json.dumps(rows))
    with pytest.raises(DataError) as error:
        pairs_of(str(path), tmp_path)
    first, second = str(error.value).splitlines()
    assert "sample 0 (id 0): chosen equals rejected" in first
    assert "sample 4 (id 4), field image: the picture gone.png does not exist" in second


def test_a_picture_that_changes_after_the_index_is_noticed(tmp_path):
    path, rows = tmp_path / "pairs.json", rows_of(tmp_path, 3)
    path.write_text(json.dumps(rows))
    pairs = pairs_of(str(path), tmp_path)
    table = PreferenceTable(PROCESSOR, pairs, 400, 9, 4, needs=pairs.needs)
    assert len(table[1]) == len(BATCH_COLUMNS)
    Image.new("RGB", (60, 400)).save(tmp_path / "1.png")
    with pytest.raises(ImageError, match=r"sample 1 \(id 1\): its pictures have other sizes than when"):
        table._encode(1)


def test_log_probabilities_that_change_while_a_run_reads_them_are_noticed(tmp_path):
    path, rows = tmp_path / "pairs.jsonl", rows_of(tmp_path)
    path.write_bytes(lines(rows))
    pairs = pairs_of(str(path), tmp_path)
    logps = [json.dumps(row["reference_logps"]) for row in rows]
    gone = f', "reference_logps": {logps[4]}'
    path.write_text(path.read_text().replace(logps[2], logps[2].replace("6", "5")).replace(gone, " " * len(gone)))
    assert pairs[1].logps == (-1 / 3, -10.0)
    for number in (2, 4):
        with pytest.raises(SampleError, match=rf"sample {number} \(id {number}\): is not what it was when"):
            pairs[number]


@pytest.mark.parametrize("without", [3, 12])
def test_pairs_without_log_probabilities_are_counted_when_their_source_grows(tmp_path, monkeypatch, without):
    monkeypatch.setattr(building, "PART", 4)
    path, rows = tmp_path / "pairs.jsonl", rows_of(tmp_path, 14)
    del rows[without]["reference_logps"]
    path.write_bytes(lines(rows[:9]))
    assert sources_of(str(path), tmp_path)[0].index.description.lacking == (without < 9)
    path.write_bytes(lines(rows))
    assert sources_of(str(path), tmp_path)[0].index.description.lacking == 1


def test_reading_a_pair_is_watched_as_reading_a_conversation_is(tmp_path, monkeypatch):
    path = tmp_path / "pairs.jsonl"
    path.write_bytes(lines(rows_of(tmp_path)))
    waited_for, pairs = [], PairReader(path, ReadingOptions(kind="pair"))
    places = list(pairs.records)
    read = type(pairs.records).read
    monkeypatch.setattr(watched, "limit", 60.0)
    monkeypatch.setattr(type(pairs.records), "read", lambda self, index, place: (
        waited_for.append(watched.running[threading.get_ident()].name), read(self, index, place))[1])
    pairs.read(*places[0])
    assert waited_for == [str(path)]
