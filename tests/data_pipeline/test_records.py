"""Records of every kind of source: found without reading it whole, each read by its place."""
from __future__ import annotations

import base64
import gzip
import io
import json
import os
import pickle
import random
import socket
import tarfile
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from indexed import load_sources
from PIL import Image

from mindformers_ixc.data.conversations import ConversationReader, ReadingOptions, load_conversations
from mindformers_ixc.data.records import json_files, latest, open_records
from mindformers_ixc.data.records import parquet as tables
from mindformers_ixc.data.records.base import Place
from mindformers_ixc.data.records.latest import OPEN_FILES, Latest
from mindformers_ixc.errors import DataError
from mindformers_ixc.processing.pictures import image_size, load_image

VALUES = st.recursive(st.none() | st.booleans() | st.floats(allow_nan=False) | st.integers() | st.text(),
                      lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
                      max_leaves=6)
TURNS = [{"from": "human", "value": "what?"}, {"from": "gpt", "value": "a square"}]


def read_all(path):
    records, seen = open_records(path), []
    places = [Place(*place) for block in records.scan(seen.append) for place in block.tolist()]
    return [records.read(index, place) for index, place in enumerate(places)], sum(seen)


def picture(colour="red", size=(40, 30)):
    held = io.BytesIO()
    Image.new("RGB", size, colour).save(held, "PNG")
    return held.getvalue()


@settings(deadline=None)
@given(rows=st.lists(st.dictionaries(st.text(), VALUES, max_size=3), min_size=1, max_size=12),
       window=st.integers(1, 80), ascii_only=st.booleans(), indent=st.sampled_from([None, 1]), lines=st.booleans())
def test_records_of_json_are_what_json_says_through_windows_of_any_size(tmp_path_factory, rows, window, ascii_only,
                                                                        indent, lines):
    folder = tmp_path_factory.mktemp("json")
    text = "\n".join(json.dumps(row, ensure_ascii=ascii_only) for row in rows) if lines else \
        json.dumps(rows, ensure_ascii=ascii_only, indent=indent)
    path = folder / ("data.jsonl" if lines else "data.json")
    path.write_bytes(text.encode())
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(json_files, "WINDOW", window)
        found, seen = read_all(path)
        assert [record.row for record in found] == rows
        assert seen == path.stat().st_size
        if not lines:
            path.write_bytes(text.encode()[:len(text.encode()) * 2 // 3])
            with pytest.raises(DataError, match=r"not valid JSON|must hold a JSON list"):
                read_all(path)


@pytest.mark.parametrize(("text", "message"), [
    ('[{"a": 1},\n{"a": 2}\n', "ends in line 2, after its sample 1, without the list's closing bracket"),
    ('[{"a": 1},\n{"a": 2\n', "ends in line 2, within its sample 1, which begins in line 2"),
    ('[{"a": "b', "ends in line 1, within its sample 0"),
    ('[{"a": 1}\n{"a": 2}]', r"line 2: is not valid JSON \(a comma or the closing bracket is missing\), in sample 0"),
    ('[{"a": 1},]', r"line 1: is not valid JSON \(a value is missing\), in sample 1"),
    ('[{"a" 5}]', r"line 1: is not valid JSON \(Expecting ':' delimiter\)"),
    ("[1]\n\n5", "line 3: something follows the closing bracket"),
    ("[" * 100_000, "nested too deeply"),
    ("", "is empty"), ("5", r"must hold a JSON list.*found int"),
])
def test_a_damaged_list_is_refused_with_its_line(tmp_path, text, message):
    (tmp_path / "data.json").write_text(text)
    with pytest.raises(DataError, match=message):
        read_all(tmp_path / "data.json")


def test_a_fault_far_from_the_end_is_found_where_it_is(tmp_path, monkeypatch):
    monkeypatch.setattr(json_files, "WINDOW", 64)
    rows = [json.dumps({"number": number}) for number in range(1000)]
    rows[500] = rows[500].replace(":", "")
    (tmp_path / "data.json").write_text("[" + ",\n".join(rows) + "]")
    with pytest.raises(DataError, match=r"line 501: is not valid JSON .*in sample 500"):
        read_all(tmp_path / "data.json")


def test_a_bad_line_is_named_by_its_number(tmp_path):
    (tmp_path / "data.jsonl").write_text('{"a": 1}\n\n{"a": }\n')
    with pytest.raises(DataError, match=r"data\.jsonl, line 3 is not valid JSON"):
        read_all(tmp_path / "data.jsonl")


@pytest.mark.parametrize("ending", ["gz", "zst"])
def test_compressed_lines_are_read_as_the_plain_ones(tmp_path, ending):
    content = "\n".join(json.dumps({"number": number}) for number in range(5000)).encode()
    path = tmp_path / f"data.jsonl.{ending}"
    if ending == "gz":
        path.write_bytes(gzip.compress(content))
    else:
        with pa.output_stream(str(path), compression="zstd") as out:
            out.write(content)
    found, _ = read_all(path)
    assert [record.row["number"] for record in found] == list(range(5000))
    whole = path.read_bytes()
    for kept in (len(whole) // 2, 6, len(whole) - 1):
        path.write_bytes(whole[:kept])
        with pytest.raises(DataError, match="cannot be unpacked; it is damaged or cut short"):
            read_all(path)


def test_pictures_of_a_compressed_file_lie_beside_it(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "a.png").write_bytes(picture())
    row = {"image": "a.png", "conversations": TURNS}
    (tmp_path / "data.json.gz").write_bytes(gzip.compress(json.dumps([row]).encode()))
    assert load_conversations(tmp_path / "data.json.gz")[0].images == [tmp_path / "a.png"]


def parquet(path, rows, **options):
    pq.write_table(pa.Table.from_pylist(rows), path, **options)
    return path


def test_a_parquet_table_has_its_pictures_inside(tmp_path):
    rows = [{"id": str(number), "image": {"bytes": picture(size=(40 + number, 30)), "path": f"x/{number}.png"},
             "conversations": TURNS} for number in range(25)]
    samples = load_conversations(parquet(tmp_path / "data.parquet", rows, row_group_size=10))
    assert [image_size(sample.images[0]) for sample in samples] == [(40 + number, 30) for number in range(25)]
    assert samples[3].turns == [("user", "what?"), ("assistant", "a square")]
    assert load_image(samples[3].images[0]).getpixel((0, 0)) == (255, 0, 0)


@pytest.mark.parametrize("image", [picture(), [{"bytes": picture(), "path": None}], {"bytes": None, "path": "a.png"},
                                   "a.png"], ids=["bytes", "list", "path", "text"])
def test_pictures_of_a_table_may_be_bytes_lists_and_paths(tmp_path, image):
    (tmp_path / "a.png").write_bytes(picture())
    key = "images" if isinstance(image, list) else "image"
    rows = [{key: image, "messages": json.dumps([{"role": "user", "content": "what?"},
                                                 {"role": "assistant", "content": "a square"}])}]
    [sample] = load_conversations(parquet(tmp_path / "data.parquet", rows))
    assert image_size(sample.images[0]) == (40, 30)


def shard(path, files):
    with tarfile.open(path, "w") as archive:
        for name, content in files:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return path


def test_a_tar_shard_has_a_sample_for_each_name(tmp_path):
    files = [("000/a.png", picture()), ("000/a.txt", b"a red square\n"),
             ("000/" + "long" * 40 + ".png", picture("blue")),
             ("000/" + "long" * 40 + ".json", json.dumps({"conversations": TURNS}).encode()),
             ("000/b.left.png", picture()), ("000/b.right.png", picture("blue")),
             ("000/b.json", json.dumps({"query": "<image><image>", "response": "two",
                                        "images": ["b.right.png", "b.left.png"]}).encode())]
    caption, long, two = load_conversations(shard(tmp_path / "data.tar", files), caption_prompts=["describe"])
    assert caption.turns == [("user", "describe"), ("assistant", "a red square")]
    assert load_image(long.images[0]).getpixel((0, 0)) == (0, 0, 255)
    assert [load_image(image).getpixel((0, 0)) for image in two.images] == [(0, 0, 255), (255, 0, 0)]


def test_a_file_of_a_shard_that_is_not_read_is_refused(tmp_path):
    path = shard(tmp_path / "data.tar", [("a.png", picture()), ("a.txt", b"x"), ("a.npy", b"1234")])
    with pytest.raises(DataError, match="field npy: is not read"):
        load_conversations(path)
    assert len(load_conversations(path, ignore_keys=["npy"])) == 1


@pytest.mark.parametrize("kind", ["tar", "parquet"])
def test_a_file_that_is_cut_short_is_refused(tmp_path, kind):
    whole = parquet(tmp_path / "whole.parquet", [{"caption": "x", "image": picture()}] * 20) if kind == "parquet" else \
        shard(tmp_path / "whole.tar", [(f"{number}.png", picture()) for number in range(20)])
    content = whole.read_bytes()
    for kept in (100, len(content) // 2, len(content) // 2 + 300):
        path = tmp_path / f"cut.{kind}"
        path.write_bytes(content[:kept])
        with pytest.raises(DataError, match="cut short"):
            read_all(path)


def test_a_compressed_shard_is_refused_with_what_to_do(tmp_path):
    path = tmp_path / "data.tar"
    path.write_bytes(gzip.compress(b"x" * 1000))
    with pytest.raises(DataError, match=r"compressed with gzip.*unpack it to a plain \.tar"):
        open_records(path)


@pytest.mark.parametrize("text", [f"data:image/png;base64,{base64.b64encode(picture()).decode()}",
                                  base64.b64encode(picture(size=(300, 30)) + bytes(6000)).decode()],
                         ids=["address", "bare"])
def test_pictures_may_be_written_into_the_text(tmp_path, text):
    (tmp_path / "data.json").write_text(json.dumps([{"conversations": TURNS, "image": text}]))
    [sample] = load_conversations(tmp_path / "data.json")
    assert image_size(sample.images[0])[1] == 30


def test_damaged_base64_is_named(tmp_path):
    (tmp_path / "data.json").write_text(json.dumps([{"conversations": TURNS, "image": "data:image/png;base64,a"}]))
    with pytest.raises(DataError, match=r"sample 0 .*, field image: the file written into it as base64 is damaged"):
        load_conversations(tmp_path / "data.json")


def test_a_file_that_changes_while_it_is_read_is_refused(tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_text('{"a": 1}\n{"a": 2}\n')
    records = open_records(path)
    places = [Place(*place) for block in records.scan() for place in block.tolist()]
    assert records.read(0, places[0]).row == {"a": 1}
    copy = pickle.loads(pickle.dumps(records))
    path.write_text('{"a": 1}\n{"a": 2}\n{"a": 3}\n')
    for one in (records, copy):
        with pytest.raises(DataError, match="was changed while it was being read"):
            one.read(1, places[1])


def test_places_are_in_the_order_of_the_file(tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_text("\n\n".join(json.dumps({"a": number}) for number in range(9)))
    places = np.concatenate(list(open_records(path).scan()))
    assert (np.diff(places[:, 0]) > 0).all()
    assert places[:, 2].tolist() == list(range(1, 18, 2))


def mindrecord(folder, shards=1):
    """MindSpore's own writer; its files stay where it put them."""
    from mindspore.mindrecord import FileWriter

    writer = FileWriter(str(folder / "data.mindrecord"), shards, overwrite=True)
    writer.add_schema({"id": {"type": "int32"}, "image": {"type": "bytes"}, "conversations": {"type": "string"},
                       "vector": {"type": "float32", "shape": [-1]}}, "samples")
    writer.write_raw_data([{"id": number, "image": picture(size=(40 + number, 30)), "conversations": json.dumps(TURNS),
                            "vector": np.arange(3, dtype=np.float32)} for number in range(9)])
    writer.commit()
    return folder / ("data.mindrecord" if shards == 1 else "data.mindrecord1")


@pytest.mark.parametrize("shards", [1, 2])
def test_mindrecord_files_of_mindspore_are_read_whole(tmp_path, shards):
    path = mindrecord(tmp_path, shards)
    with pytest.raises(DataError, match="field vector: is not read"):
        load_conversations(path)
    samples = load_conversations(path, ignore_keys=["vector"])
    assert sorted(sample.id for sample in samples) == list(range(9))
    assert all(image_size(sample.images[0]) == (40 + sample.id, 30) for sample in samples)
    assert samples[0].turns == [("user", "what?"), ("assistant", "a square")]


def test_a_mindrecord_file_without_its_index_is_refused(tmp_path):
    path = mindrecord(tmp_path)
    index = path.with_name(f"{path.name}.db")
    content = index.read_bytes()
    index.write_bytes(b"no index")
    with pytest.raises(DataError, match=r"the index of .* cannot be read"):
        read_all(path)
    index.unlink()
    with pytest.raises(FileNotFoundError, match=r"data\.mindrecord\.db does not exist"):
        open_records(path)
    index.write_bytes(content)
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(DataError, match="no MindRecord file, or damaged"):
        open_records(path)


@pytest.fixture
def server(tmp_path, monkeypatch):
    """Address of a server of the folder `web`."""
    import functools
    import http.server
    import threading

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("no_proxy", "*")
    (tmp_path / "web").mkdir()
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(tmp_path / "web"))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{running.server_address[1]}"
        running.shutdown()


def test_addresses_are_refused_unless_they_are_to_be_fetched(tmp_path, server):
    (tmp_path / "web" / "a.png").write_bytes(picture())
    path = tmp_path / "data.json"
    path.write_text(json.dumps([{"conversations": TURNS, "image": f"{server}/a.png"}]))
    with pytest.raises(DataError, match=r"is an address; download it .*data_loader\.fetch"):
        load_conversations(path)
    reader = ConversationReader(path, ReadingOptions(fetch=True))
    index, place = next(iter(reader.records))
    assert image_size(reader.read(index, place).images[0]) == (40, 30)
    (tmp_path / "web" / "a.png").unlink()                    # it is in the cache
    assert image_size(reader.read(index, place).images[0]) == (40, 30)
    path.write_text(json.dumps([{"conversations": TURNS, "image": f"{server}/b.png"}]))
    reader = ConversationReader(path, ReadingOptions(fetch=True))
    with pytest.raises(DataError, match=r"sample 0 .*, field image: .*b\.png cannot be fetched \(File not found\)"):
        reader.read(*next(iter(reader.records)))


def large_groups(folder, monkeypatch):
    """A table of one row group, which is streamed in batches of 7 rows, and the streams that are begun."""
    rows = [{"id": str(number), "image": {"bytes": bytes([number]) * 1000, "path": f"{number}.png"}, "caption": "x"}
            for number in range(100)]
    records = open_records(parquet(folder / "data.parquet", rows))
    monkeypatch.setattr(tables, "GROUP_BYTES", 50_000)
    monkeypatch.setattr(tables, "BATCH_BYTES", records.sizes[0] * 7 // 100 + 1)
    begun, begin = [], tables.ParquetRecords.stream
    monkeypatch.setattr(tables.ParquetRecords, "stream", lambda self, group: begun.append(group) or begin(self, group))
    return records, begun


def number_of(record):
    [file] = record.files.values()
    assert len(file.read()) == 1000
    return file.read()[0]


def test_rows_of_a_large_group_are_read_on_in_one_stream(tmp_path, monkeypatch):
    records, begun = large_groups(tmp_path, monkeypatch)
    assert [number_of(records.read(row, Place(row, 0))) for row in range(0, 100, 3)] == list(range(0, 100, 3))
    assert begun == [0]
    assert not len([key for key in latest.GROUPS._held if key[0] == records.path])


def test_rows_of_a_large_group_come_in_any_order_and_to_several_threads(tmp_path, monkeypatch):
    records, _ = large_groups(tmp_path, monkeypatch)
    order = random.Random(0).sample(range(100), 100)
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(lambda row: number_of(records.read(row, Place(row, 0))), order)) == order
        monkeypatch.setattr(tables, "GROUP_BYTES", 1 << 30)
        assert list(pool.map(lambda row: number_of(records.read(row, Place(row, 0))), order)) == order


def test_what_is_held_stays_below_its_limit_and_the_latest_is_kept():
    kept, made = Latest(10), []

    def get(key):
        return kept.get(key, lambda: made.append(key) or key * 2, lambda value: 4)

    assert [get(key) for key in ("a", "b", "a", "c", "a", "b")] == ["aa", "bb", "aa", "cc", "aa", "bb"]
    assert made == ["a", "b", "c", "b"] and (len(kept), kept.weight) == (2, 8)
    assert kept.get("large", lambda: "x", lambda value: 100) == "x" and len(kept) == 1


def test_as_many_shards_as_you_like_are_read_through_few_open_files(tmp_path):
    shards = []
    for number in range(100):
        path = tmp_path / f"{number}.jsonl"
        path.write_text(f'{{"number": {number}}}\n')
        shards.append(open_records(path))
    before = len(os.listdir("/proc/self/fd"))
    places = [next(iter(records))[1] for records in shards]
    for _ in range(2):
        assert [records.read(0, place).row["number"] for records, place in zip(shards, places)] == list(range(100))
    assert len(OPEN_FILES) <= 64 and len(os.listdir("/proc/self/fd")) <= before + 64


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_another_file_of_the_same_name_is_read_anew(tmp_path, kind):
    path = tmp_path / f"data.{kind}"
    for number in (1, 2):
        if kind == "jsonl":
            (tmp_path / "new").write_text(f'{{"caption": "{number}"}}\n')
        else:
            parquet(tmp_path / "new", [{"caption": str(number)}])
        os.replace(tmp_path / "new", path)
        os.utime(path, ns=(number, number))
        records = open_records(path)
        place = next(iter(records))[1]
        assert records.read(0, place).row["caption"] == str(number)
    os.utime(path, ns=(3, 3))
    with pytest.raises(DataError, match="was changed while it was being read"):
        records.read(0, place)


@pytest.mark.parametrize("kind", ["FIFO", "socket", "device"])
@pytest.mark.parametrize("ending", ["jsonl", "csv", "parquet", "tar", "jsonl.gz", "txt"])
def test_what_is_no_regular_file_is_refused_at_once(tmp_path, monkeypatch, kind, ending):
    monkeypatch.chdir(tmp_path)             # a socket's name must be short
    odd, holder = f"odd.{ending}", socket.socket(socket.AF_UNIX)
    with holder:
        if kind == "FIFO":
            os.mkfifo(odd)
        elif kind == "socket":
            holder.bind(odd)
        else:
            os.symlink("/dev/zero", odd)
        with pytest.raises(DataError, match=f"a {kind} and no regular file; write what it holds to one"):
            load_sources(odd)
        (tmp_path / "data.json").write_text(json.dumps([{"conversations": TURNS, "image": odd}]))
        with pytest.raises(DataError, match=rf"sample 0 .*, field image: the picture .*odd.* is a {kind} and no reg"):
            load_sources("data.json")
