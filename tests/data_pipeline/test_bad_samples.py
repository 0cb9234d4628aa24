"""Samples that are wrong, or change while a run reads them: counted and left out up to a share, never read wrong."""
from __future__ import annotations

import io
import json
import logging
import os
import shutil
import tarfile

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from mindformers_ixc.data import mixture
from mindformers_ixc.data.conversations import ReadingOptions
from mindformers_ixc.data.fitting import Shapes
from mindformers_ixc.data.index import building
from mindformers_ixc.data.index.building import open_index
from mindformers_ixc.data.index.plans import saved
from mindformers_ixc.data.index.samples import make_samples
from mindformers_ixc.data.index.sources import measures_of, open_sources
from mindformers_ixc.data.records.latest import OPEN_FILES
from mindformers_ixc.data.rows import ConversationTable, SectionOptions, make_processor, own_tokenizer
from mindformers_ixc.errors import DataError, SampleError

SECTION = {"tokenizer": {"type": "InternLM2Tokenizer", "vocab_file": "pkg:mindformers_ixc/demo/tokenizer.model"},
           "hd_num": 4, "image_size": 56}
COUNT = 60


@pytest.fixture(scope="module")
def how():
    return measures_of(SECTION, make_processor(SectionOptions(SECTION), own_tokenizer(SECTION)))


def picture(color="red", size=(80, 60)):
    buffer = io.BytesIO()
    Image.new("RGB", size, color).save(buffer, "PNG")
    return buffer.getvalue()


def talk(number, more=""):
    return [{"from": "human", "value": f"what is {number:03d}{more}?"},
            {"from": "gpt", "value": f"number {number:03d}"}]


def lines(folder, rows):
    path = folder / "data.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def plain(count=COUNT):
    return [{"id": number, "conversations": talk(number)} for number in range(count)]


def opened(path, how, share=0.05, folder=None):
    folder = folder or path.parent / "index"
    sources = open_sources({"dataset_dir": str(path)}, 0, how, folder, share)
    return make_samples(sources, Shapes(10_000, 99, 4), share, folder)


def table_of(samples, how, share):
    return ConversationTable(how.processor, samples, 400, 9, 4, share, samples.needs, max_images=4)


WRONG = {"missing": {"conversations": talk(3), "image": "nowhere.png"}, "damaged": {"conversations": talk(3),
                                                                                   "image": "bad.png"},
         "key": {"conversations": talk(3), "odd": 5}, "empty": {"conversations": []}, "number": 7,
         "place": {"conversations": talk(3, "<image>")}}


@pytest.mark.parametrize("kind", WRONG)
def test_few_wrong_samples_are_left_out_and_told(tmp_path, how, kind, caplog):
    (tmp_path / "bad.png").write_bytes(b"no picture")
    rows = plain()
    rows[7] = rows[31] = WRONG[kind]
    path = lines(tmp_path, rows)
    with caplog.at_level(logging.WARNING):
        samples = opened(path, how)
    assert [sample.index for sample in samples] == [number for number in range(COUNT) if number not in (7, 31)]
    assert [("sample 7" in text or "line 8" in text, "sample 31" in text or "line 32" in text)
            for text in caplog.messages] == [(True, False), (False, True)]
    with pytest.raises(DataError, match=r"2 of 60 samples cannot be used, more than the share max_bad_share 0\.01"):
        opened(path, how, 0.01)


def test_a_line_that_is_cut_or_of_another_encoding_is_one_sample(tmp_path, how):
    path = lines(tmp_path, plain())
    content = path.read_bytes().split(b"\n")
    content[4], content[9] = content[4][:20], json.dumps({"conversations": talk(9, "\xe9")},
                                                         ensure_ascii=False).encode("latin-1")
    path.write_bytes(b"\r\n".join(content))
    samples = opened(path, how)
    assert len(samples) == COUNT - 2
    sentences = samples.sources[0].index.description.left_out
    assert "line 5 is not valid JSON" in sentences[4] and "in line 10" in sentences[9]


def test_a_place_in_an_answer_is_counted_by_the_public_rule(tmp_path):
    section = {**SECTION, "control_tokens": True}
    how = measures_of(section, make_processor(SectionOptions(section), own_tokenizer(section)))
    rows = plain()
    rows[5]["conversations"][1]["value"] = "<ImageHere>"
    sentences = opened(lines(tmp_path, rows), how).sources[0].index.description.left_out
    assert list(sentences) == [5] and "sample 5" in sentences[5]


def test_wrong_samples_are_not_measured_again_unless_they_have_come_right(tmp_path, how, monkeypatch):
    rows = plain()
    rows[7]["image"] = "late.png"
    path, built = lines(tmp_path, rows), []
    build = building._Builder.build
    monkeypatch.setattr(building._Builder, "build", lambda self, *more: (built.append(1), build(self, *more)))
    assert [len(opened(path, how)) for _ in range(3)] == [COUNT - 1] * 3
    assert len(built) == 1
    (tmp_path / "late.png").write_bytes(picture())
    assert [len(opened(path, how)) for _ in range(2)] == [COUNT] * 2
    assert len(built) == 2


def test_an_index_of_a_check_does_not_let_a_run_through(tmp_path, how):
    rows = plain()
    rows[3:9] = [{"conversations": []}] * 6
    path = lines(tmp_path, rows)
    assert len(open_index(path, ReadingOptions(), how, tmp_path / "index", 1.0).description.errors) == 6
    with pytest.raises(DataError, match="6 of 60 samples cannot be used"):
        opened(path, how)
    with pytest.raises(DataError, match="field conversations"):
        opened(path, how, 0.0)


@pytest.mark.parametrize("few", [8192, 0], ids=["alone", "workers"])
def test_a_file_that_changes_while_it_is_indexed_is_refused(tmp_path, how, monkeypatch, few):
    path = lines(tmp_path, plain())
    monkeypatch.setattr(building, "PART", 10)
    monkeypatch.setattr(building, "FEW", few)
    scan = building._Builder._scan

    def slow(builder):
        places = scan(builder)
        path.write_text(path.read_text().replace("what is", "what IS"))
        return places

    monkeypatch.setattr(building._Builder, "_scan", slow)
    with pytest.raises(DataError, match=r"data\.jsonl was changed while it was being read.*\n60 of 60 samples"):
        opened(path, how)
    monkeypatch.setattr(building._Builder, "_scan", scan)
    assert len(opened(path, how)) == COUNT


def appended(path):
    with open(path, "a") as file:
        file.write(json.dumps({"id": "new", "conversations": talk(999)}) + "\n")


def shifted(path):
    path.write_text("\n" + path.read_text())


def reworded(path):
    path.write_text(path.read_text().replace("what is 00", "what are 00"))


def swapped(path):
    rows = path.read_text().splitlines()
    path.write_text("\n".join([rows[1], rows[0], *rows[2:]]) + "\n")


def removed(path):
    path.unlink()
    OPEN_FILES._held.clear()        # as of a process that has not read from it yet; one that has goes on


@pytest.mark.parametrize(("change", "lost"), [
    (appended, set()), (lambda path: os.utime(path, (1, 1)), set()), (swapped, {0, 1}),
    (lambda path: os.truncate(path, path.stat().st_size // 2), set(range(30, 60))),
    (lambda path: path.write_text(""), set(range(60))), (removed, set(range(60))),
    (shifted, set(range(60))), (reworded, None),
], ids=["appended", "touched", "swapped", "shortened", "emptied", "removed", "shifted", "reworded"])
def test_a_changed_file_gives_what_was_indexed_or_nothing(tmp_path, how, change, lost):
    path = lines(tmp_path, plain())
    turns = [sample.turns for sample in opened(path, how)]
    samples = opened(path, how)
    change(path)
    gone = set()
    for number in range(len(samples)):
        try:
            assert samples[number].turns == turns[number]
        except SampleError:
            gone.add(number)
    assert gone == lost if lost is not None else gone >= set(range(10))


def test_a_reader_that_has_the_file_open_goes_on_when_it_is_replaced(tmp_path, how):
    path = lines(tmp_path, plain())
    samples = opened(path, how)
    turns = samples[0].turns
    os.replace(shutil.copy(path, tmp_path / "copy"), path)
    assert samples[0].turns == turns
    path.unlink()
    assert samples[5].turns


def shard_of(folder, colors="red"):
    path = folder / "data.tar"
    with tarfile.open(path, "w") as archive:
        for number in range(COUNT):
            said = json.dumps({"conversations": talk(number)}).encode()
            for ending, content in (("png", picture(colors)), ("json", said)):
                member = tarfile.TarInfo(f"{number:03d}.{ending}")
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))
    return path


def parquet_of(folder, colors="red"):
    path = folder / "data.parquet"
    pq.write_table(pa.Table.from_pylist([{"image": picture(colors), "conversations": talk(number)}
                                         for number in range(COUNT)]), path, row_group_size=7)
    return path


def test_sources_of_all_kinds_are_mixed_by_weights_also_twice(tmp_path, how):
    lines(tmp_path, plain())
    shard_of(tmp_path)
    parquet_of(tmp_path)
    (tmp_path / "a.png").write_bytes(picture())
    (tmp_path / "data.csv").write_text("image,question,answer\n" + "a.png,what is it?,a square\n" * 20)
    (tmp_path / "list.txt").write_text("data.jsonl 0.03\ndata.tar 0.02\ndata.parquet 0.06\ndata.csv 0.1\n"
                                       "data.jsonl 0.01\n")
    samples = opened(tmp_path / "list.txt", how)
    assert [name.rpartition(".")[2] for name in samples.names] == ["jsonl", "tar", "parquet", "csv"]
    assert np.bincount(samples.name_numbers).tolist() == [40, 20, 60, 100]
    assert {len(sample.turns) for sample in samples} == {2}
    weights = dict(zip(samples.names, (1, 1, 2, 4)))
    plan = mixture.make_planner(samples.name_numbers, samples.images > 0, samples.names,
                                {"weights": weights, "samples_per_epoch": 800}, 0, True, True)(8)
    drawn = np.bincount([samples.name_numbers[index] for place in range(800) for index in plan.row(place)])
    for count, share in zip(drawn, (1 / 8, 1 / 8, 2 / 8, 4 / 8)):
        assert abs(count - 800 * share) < 3 * np.sqrt(800 * share * (1 - share)) + 8      # batches are of one kind
    with pytest.raises(DataError, match="weights has 5 weights for 4 sources"):
        mixture.make_planner(samples.name_numbers, samples.images > 0, samples.names, {"weights": [1] * 5}, 0, True,
                             True)


@pytest.mark.parametrize("make", [shard_of, parquet_of])
def test_a_source_may_be_named_otherwise_than_when_it_was_indexed(tmp_path, how, make, monkeypatch):
    path = make(tmp_path)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "link").symlink_to(tmp_path)
    for name in (path, path.name, f"link/{path.name}", f"./../{tmp_path.name}/{path.name}"):
        samples = opened(name, how, folder=tmp_path / "index")
        assert [sample.index for sample in samples] == list(range(COUNT))
    one, other = (opened(name, how, folder=tmp_path / "index").sources[0].index.digests for name in (path, path.name))
    np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("make", [shard_of, parquet_of])
def test_a_changed_shard_or_table_is_not_read_on(tmp_path, how, make):
    path = make(tmp_path)
    samples = opened(path, how)
    assert samples[0].images
    os.utime(path, (1, 1))
    for number in (0, 1, 59):
        with pytest.raises(SampleError, match="was changed while it was being read"):
            samples[number]
    make(tmp_path, "blue")                         # of the same size, and written over while it is open
    with pytest.raises(SampleError, match="was changed while it was being read"):
        samples[30]
    path.unlink()
    with pytest.raises(SampleError, match=r"was changed while|No such file"):
        samples[8]


def test_pictures_in_a_changed_file_of_lines_are_not_read_on(tmp_path, how):
    import base64

    rows = plain()
    rows[3]["image"] = "data:image/png;base64," + base64.b64encode(picture()).decode()
    path = lines(tmp_path, rows)
    samples = opened(path, how)
    appended(path)
    assert samples[2].turns
    with pytest.raises(SampleError, match=r"sample 3 .*is not what it was"):
        samples[3]


def test_a_run_counts_changed_samples_and_stops_above_the_share(tmp_path, how, caplog):
    path = lines(tmp_path, plain())
    samples = opened(path, how)
    table = table_of(samples, how, 0.05)
    planner = mixture.make_planner(samples.name_numbers, samples.images > 0, samples.names, None, 0, False, True)
    table.plan = planner(4)
    rows = [table[place][0] for place in range(8)]
    path.write_text(path.read_text().replace("what is 01", "what was 1", 2))
    with caplog.at_level(logging.WARNING):
        again = [table[place][0] for place in range(8, 16)]
    assert len(rows) == len(again) == 8
    assert table.bad_samples == 2
    assert sum("is not what it was when the data were indexed" in text for text in caplog.messages) == 2
    assert sum("was changed since it was indexed" in text for text in caplog.messages) == 1
    reworded(path)
    shifted(path)
    with pytest.raises(DataError, match=r"4 of 60 samples have damaged pictures or were changed, more than the share"):
        for place in range(16, 60):
            table[place]


def test_a_picture_that_is_replaced_or_goes_away_is_counted(tmp_path, how):
    rows = plain()
    for number in (3, 4):
        rows[number]["image"] = f"{number}.png"
        (tmp_path / f"{number}.png").write_bytes(picture())
    samples = opened(lines(tmp_path, rows), how)
    table = table_of(samples, how, 0.05)
    (tmp_path / "3.png").write_bytes(picture(size=(40, 300)))
    (tmp_path / "4.png").unlink()
    assert table._try(3) is None and table._try(4) is None
    assert table.bad_samples == 2


def parts(folder):
    return sorted(path.relative_to(folder) for path in folder.rglob("*") if path.suffix in (".npy", ".json"))


@pytest.mark.parametrize("damage", ["removed", "cut", "altered"])
def test_whatever_is_damaged_in_a_folder_of_indices_is_made_anew(tmp_path, how, damage):
    rows = plain()
    for number in range(0, COUNT, 3):
        rows[number]["image"] = "a.png"
    (tmp_path / "a.png").write_bytes(picture())
    path = lines(tmp_path, rows)
    expected = [(sample.turns, sample.sizes) for sample in opened(path, how)]
    rng = np.random.default_rng(0)
    files = parts(tmp_path / "index")
    assert len(files) == 16
    for part in files:
        folder = tmp_path / "damaged"
        shutil.copytree(tmp_path / "index", folder)
        content = bytearray((folder / part).read_bytes())
        place = int(rng.integers(len(content) // 2, len(content)))
        if damage == "cut":
            (folder / part).write_bytes(content[:len(content) // 2])
        elif damage == "altered":
            content[place] ^= 16
            (folder / part).write_bytes(content)
        else:
            (folder / part).unlink()
        found = opened(path, how, folder=folder)
        assert [(sample.turns, sample.sizes) for sample in found] == expected, part
        shutil.rmtree(folder)


@pytest.mark.parametrize("damage", [lambda content: b"", lambda content: content[:-9],
                                    lambda content: content[:-8] + bytes(8)])
def test_damaged_rows_of_epochs_are_planned_anew(tmp_path, damage):
    def planner(batch):
        return mixture.make_planner(np.zeros(30, np.int32), np.arange(30) % 3 > 0, ["a"], None, 3, True, True)(batch)

    plan = saved(planner, tmp_path, "x")(4)
    expected = [plan.batch(step) for step in range(7)]
    files = [path for path in tmp_path.rglob("*") if path.is_file() and path.stat().st_size]
    assert len(files) > 3
    for path in files:
        content = path.read_bytes()
        path.write_bytes(damage(content))
        again = saved(planner, tmp_path, "x")(4)
        assert [again.batch(step) for step in range(7)] == expected, path.name


def test_an_index_of_other_data_is_not_taken(tmp_path, how):
    path = lines(tmp_path, plain())
    one = open_index(path, ReadingOptions(), how, tmp_path / "index")
    other = tmp_path / "other"
    other.mkdir()
    theirs = open_index(lines(other, plain(20)), ReadingOptions(), how, tmp_path / "index")
    shutil.rmtree(one.folder)
    shutil.copytree(theirs.folder, one.folder)
    assert len(open_index(path, ReadingOptions(), how, tmp_path / "index")) == COUNT
