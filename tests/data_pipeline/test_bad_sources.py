"""Sources that are damaged, cut short, of another kind or encoding: a sentence says what, where and what to do."""
from __future__ import annotations

import base64
import gzip
import io
import json
import os
import tarfile
from typing import ClassVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from mindformers_ixc.data import fetching
from mindformers_ixc.data.conversations import ConversationReader, ReadingOptions, load_conversations
from mindformers_ixc.data.records import open_records
from mindformers_ixc.data.records.base import Place
from mindformers_ixc.errors import DataError, ImageError
from mindformers_ixc.processing.pictures import load_image

TURNS = [{"from": "human", "value": "what?"}, {"from": "gpt", "value": "a square"}]
SAID = json.dumps({"conversations": TURNS}).encode()


def picture(color="red", size=(40, 30)):
    buffer = io.BytesIO()
    Image.new("RGB", size, color).save(buffer, "PNG")
    return buffer.getvalue()


def member(name, content=b"", kind=tarfile.REGTYPE, link=""):
    found = tarfile.TarInfo(name)
    found.size, found.type, found.linkname = len(content), kind, link
    return found, content


def shard(path, *members, **options):
    with tarfile.open(path, "w", **options) as archive:
        for found, content in members:
            archive.addfile(found, io.BytesIO(content))
    return path


def samples(count=4):
    return [one for number in range(count) for one in (member(f"{number}.png", picture()), member(f"{number}.json",
                                                                                                  SAID))]


def offset(path, number):
    with tarfile.open(path) as archive:
        return archive.getmembers()[number].offset


@pytest.mark.parametrize(("damage", "message"), [
    (lambda content, at: content[:at] + b"\xff" * 512 + content[at + 512:], r"behind 1\.json, stands no header of a"),
    (lambda content, at: content[:at] + bytes(512) + content[at + 512:], r"end mark behind 1\.json.* goes on at byte"),
    (lambda content, at: content[:at] + bytes(1024), None),
    (lambda content, at: content + content, r"several shards were joined byte by byte"),
    (lambda content, at: content[:at + 100], "no end mark"),
    (lambda content, at: content[:at], "no end mark"),
    (lambda content, at: b"", "empty file"),
    (lambda content, at: bytes(10240), "must hold files of samples .* found no samples"),
], ids=["header", "zeroed", "whole", "joined", "in a header", "between files", "empty", "no files"])
def test_a_damaged_shard_loses_nothing_in_silence(tmp_path, damage, message):
    path = shard(tmp_path / "data.tar", *samples())
    path.write_bytes(damage(path.read_bytes(), offset(path, 4)))
    if message is None:
        assert len(load_conversations(path)) == 2
    else:
        with pytest.raises(DataError, match=message):
            load_conversations(path)


@pytest.mark.parametrize(("members", "message"), [
    ([member("0.json", SAID), member("0.png", kind=tarfile.SYMTYPE, link="a.png")], r"0\.png is a link to a\.png"),
    ([member("0.json", SAID), member("0.png", kind=tarfile.LNKTYPE, link="a.png")], r"pack the shard again with"),
    ([member("0.json", SAID), member("0.png", kind=tarfile.FIFOTYPE)], r"0\.png is neither a file nor a folder"),
    ([member("0.png", picture()), member("0.png", picture("blue")), member("0.json", SAID)], "two files of this name"),
    ([member("0.png", picture()), member("1.json", SAID)], r"sample 0 \(id '0'\): has files \(0\.png\), and nothing"),
    ([member("0.png", picture()), member("0.txt", b" \n")], r"0\.txt: is empty"),
    ([member("0.png", picture()), member("0.json", SAID), member("0.a.json", b'{"conversations": 1}')],
     "another file of the sample has its field conversations too"),
    ([member("0.png", picture()), member("0.json", SAID[:-3])], r"data\.tar, 0\.json is not valid JSON"),
], ids=["symbolic link", "hard link", "pipe", "name twice", "no text", "empty", "field twice", "json"])
def test_members_that_would_be_lost_are_refused(tmp_path, members, message):
    with pytest.raises(DataError, match=message):
        load_conversations(shard(tmp_path / "data.tar", *members))


def test_a_caption_may_stand_in_two_files(tmp_path):
    members = [member("0.jpg", picture()), member("0.txt", b"a red square"),
               member("0.json", b'{"caption": "a red square ", "width": 40}')]
    sample, = load_conversations(shard(tmp_path / "data.tar", *members))
    assert sample.turns[1] == ("assistant", "a red square ")


def test_sparse_members_are_refused(tmp_path):
    path = tmp_path / "data.tar"
    header = bytearray(member("0.png", bytes(512))[0].tobuf(tarfile.GNU_FORMAT))
    header[156:157], header[386:410], header[483:495] = tarfile.GNUTYPE_SPARSE, b"00000000000\x0000000001000\0", \
        b"00000010000\0"
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    path.write_bytes(bytes(header) + bytes(512) + bytes(10240))
    with pytest.raises(DataError, match=r"0\.png is stored as a sparse file"):
        load_conversations(path)


def test_what_packers_add_is_passed_over(tmp_path):
    members = [member("a", kind=tarfile.DIRTYPE), member("a/._0.png", b"\0\5\x16\7"), member("a/0.png", picture()),
               member("a/._0.json", b"\0\5\x16\7"), member("a/0.json", SAID)]
    assert len(load_conversations(shard(tmp_path / "data.tar", *members))) == 1


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT])
def test_names_of_any_encoding_are_read(tmp_path, form):
    path = shard(tmp_path / "data.tar", member("caf\xe9.png", picture()), member("caf\xe9.json", SAID), format=form,
                 encoding="latin-1")
    sample, = load_conversations(path)
    assert str(sample.id).encode() and load_image(sample.images[0]).size == (40, 30)


@pytest.mark.parametrize(("name", "content", "message"), [
    ("a.tar.gz", gzip.compress(b"x", mtime=0), r"compressed with gzip, so that no sample.*unpack it to a plain \.tar"),
    ("a.tgz", gzip.compress(b"x", mtime=0), r"unpack it to a plain \.tar"),
    ("a.tar.bz2", b"BZh91AY", r"compressed with bzip2.*plain \.tar"),
    ("a.csv.gz", gzip.compress(b"image,question,answer\n", mtime=0), r"compressed \.csv file, and only JSON"),
    ("a.json", gzip.compress(b"[]", mtime=0), r"compressed with gzip; give it a name that ends in \.gz"),
    ("a.jsonl", b"version https://git-lfs.github.com/spec/v1\n", "pointer of Git LFS.*git lfs pull"),
    ("a.parquet", b"version https://git-lfs.github.com/spec/v1\n", "pointer of Git LFS"),
    ("a.tar", b"\n<!DOCTYPE HTML><html>", "web page and no data"),
    ("a.csv", b"<html><body>404", "web page and no data"),
    ("a.json", b"PK\x03\x04zip", "zip archive; unpack it"),
    ("a.data", b"ARROW1\0\0", "Arrow file; write it as Parquet"),
    ("a.json", b"PAR1" + bytes(40), r"Parquet table; give it a name that ends in \.parquet"),
    ("a.json", bytes(4096), "nothing but zero bytes"),
    ("a.json", '[{"id": 1}]'.encode("utf-16-le"), "UTF-16 or UTF-32 text"),
    ("a.jsonl", '{"id": 1}'.encode("utf-16"), "UTF-16 text"),
])
def test_files_of_another_kind_are_told_by_their_first_bytes(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        load_conversations(tmp_path / name)


@pytest.mark.parametrize(("ending", "damage"), [
    ("gz", lambda content: content[:400] + bytes(9) + content[409:]),
    ("gz", lambda content: content[:60] + b"\xff" * 200 + content[260:]),      # zstd files may have no checksum
    *((ending, damage) for ending in ("gz", "zst") for damage in (
        lambda content: content + b"more", lambda content: content[:-3], lambda content: b"x" + content))])
def test_damaged_compressed_files_leave_nothing_behind(tmp_path, monkeypatch, ending, damage):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    rng = np.random.default_rng(0)
    content = "\n".join(json.dumps({"query": rng.bytes(20).hex(), "response": "r"}) for _ in range(200)).encode()
    path = tmp_path / f"data.jsonl.{ending}"
    if ending == "zst":
        with pa.output_stream(str(path), compression="zstd") as out:
            out.write(content)
    path.write_bytes(damage(gzip.compress(content) if ending == "gz" else path.read_bytes()))
    with pytest.raises(DataError, match=r"cannot be unpacked; it is damaged or cut short"):
        load_conversations(path)
    assert not [one for one in (tmp_path / "cache").rglob("*") if one.is_file()]


@pytest.mark.parametrize(("text", "message"), [
    ("image,question,answer\r0.png,q,a\r", "carriage return without a line feed"),
    ('image,question,answer\n0.png,"q,a\n0.png,q,a\n', "line 2: .* not closed takes in all lines that follow"),
])
def test_tables_are_told_what_is_wrong(tmp_path, text, message):
    (tmp_path / "data.csv").write_bytes(text.encode())
    with pytest.raises(DataError, match=message):
        load_conversations(tmp_path / "data.csv")


def table(path, rows, **options):
    pq.write_table(rows if isinstance(rows, pa.Table) else pa.Table.from_pylist(rows), path, **options)
    return path


def read_all(path):
    """The samples that can be read, and (number, sentence) of the others."""
    reader, found, problems = ConversationReader(path, ReadingOptions()), [], []
    for index, place in reader.records:
        try:
            found.append(reader.read(index, place))
        except DataError as error:
            problems.append((index, str(error)))
    return found, problems


def test_a_damaged_row_group_is_tried_once_and_named_once(tmp_path, monkeypatch):
    rows = [{"query": f"what is {number}?", "response": "x" * 500} for number in range(40)]
    path = table(tmp_path / "data.parquet", rows, row_group_size=10, compression="none", use_dictionary=False)
    content = bytearray(path.read_bytes())
    place = content.index(b"what is 15?")
    content[place - 200:place] = bytes(200)
    path.write_bytes(content)
    tried = []
    read = pq.ParquetFile.read_row_group
    monkeypatch.setattr(pq.ParquetFile, "read_row_group", lambda self, number, **options: (
        tried.append(number), read(self, number, **options))[1])
    found, problems = read_all(path)
    assert len(found) == 30 and [number for number, _ in problems] == list(range(10, 20))
    assert tried == [0, 1, 2, 3]
    with pytest.raises(DataError) as error:
        load_conversations(path)
    assert str(error.value).count("row group 1 (counted from 0), samples 10 to 19, is damaged") == 1


def test_checksums_of_a_table_are_compared(tmp_path):
    rows = [{"query": f"what is {number}?", "response": "something"} for number in range(10)]
    path = table(tmp_path / "data.parquet", rows, compression="none", use_dictionary=False, write_page_checksum=True)
    content = path.read_bytes()
    path.write_bytes(content.replace(b"what is 5?", b"what if 5?", 1))
    with pytest.raises(DataError, match=r"row group 0 .* is damaged .*CRC"):
        load_conversations(path)


@pytest.mark.parametrize(("rows", "message"), [
    (pa.table({"query": pa.Array.from_buffers(pa.string(), 1, pa.array([b"caf\xe9"]).buffers()), "response": ["r"]}),
     r"sample 0: row 0 of row group 0 .* texts must be UTF-8"),
    (pa.Table.from_arrays([pa.array(["q"]), pa.array(["r"]), pa.array(["s"])], ["query", "response", "response"]),
     "2 columns named 'response'"),
    (pa.table({"query": pa.array([], pa.string())}), "must hold a table with at least one sample"),
    (pa.table({"image": [picture()]}), "field conversations: must be a list of turns"),
])
def test_tables_that_cannot_be_read_are_refused(tmp_path, rows, message):
    with pytest.raises(DataError, match=message):
        load_conversations(table(tmp_path / "data.parquet", rows))


def test_a_column_may_say_that_there_is_no_picture(tmp_path):
    none, some = {"bytes": None, "path": None}, {"bytes": picture(), "path": "a.png"}
    rows = [{"image": image, "conversations": TURNS} for image in (none, some, None)]
    found = load_conversations(table(tmp_path / "data.parquet", rows))
    assert [len(sample.images) for sample in found] == [0, 1, 0]


@pytest.mark.parametrize(("kind", "place"), [
    ("parquet", (0, 9, 0)), ("parquet", (99, 0, 0)), ("parquet", (-1, 0, 0)), ("tar", (512, 700, 0)),
    ("tar", (10 ** 12, 512, 0)), ("jsonl", (0, 10 ** 15, 1)), ("jsonl", (-5, 9, 1)), ("csv", (3, 4, 2)),
])
def test_a_place_where_no_record_is_gives_a_sentence(tmp_path, kind, place):
    path = tmp_path / f"data.{kind}"
    if kind == "parquet":
        table(path, [{"query": "q", "response": "r"}])
    elif kind == "tar":
        shard(path, *samples())
    else:
        path.write_text({"jsonl": json.dumps({"query": "q", "response": "r"}) + "\n",
                         "csv": "image,question,answer\na.png,q,a\n"}[kind])
    with pytest.raises(DataError):
        open_records(path).read(0, Place(*place))


def mindrecord(folder, shards=1):
    from mindspore.mindrecord import FileWriter

    writer = FileWriter(str(folder / "data.mindrecord"), shards, overwrite=True)
    writer.add_schema({"id": {"type": "int32"}, "image": {"type": "bytes"}, "conversations": {"type": "string"}}, "x")
    writer.write_raw_data([{"id": number, "image": picture(), "conversations": json.dumps(TURNS)}
                           for number in range(9)])
    writer.commit()
    return folder / ("data.mindrecord" if shards == 1 else "data.mindrecord1")


@pytest.mark.parametrize("shards", [1, 2])
def test_damaged_pages_of_mindrecord_are_told_sample_by_sample(tmp_path, shards):
    path = mindrecord(tmp_path, shards)
    content = bytearray(path.read_bytes())
    rng = np.random.default_rng(0)
    records = open_records(path)
    places = [Place(*place) for block in records.scan() for place in block.tolist()]
    mine = [place for place in places if records.shards[place.line >> 48].path == path]
    for place in (mine[0], mine[-1]):
        content[place.start:place.start + place.length] = rng.bytes(place.length)
    path.write_bytes(content)
    found, problems = read_all(path)
    assert len(found) == 7
    assert all("is damaged in" in sentence for _, sentence in problems)
    start = mine[1].line & (1 << 48) - 1
    content[start:start + 8] = (1 << 60).to_bytes(8, "little")
    path.write_bytes(content)
    sample = next(one for one in read_all(path)[0] if one.index == places.index(mine[1]))
    with pytest.raises(ImageError, match=r"its record at byte .* is damaged, cut short"):
        load_image(sample.images[0])


def test_a_shard_of_mindrecord_that_changed_is_not_read_on(tmp_path):
    path = mindrecord(tmp_path, 2)
    records = open_records(path)
    state = records.fingerprint()
    records.expect(*state[:2])
    places = [Place(*place) for block in records.scan() for place in block.tolist()]
    assert all(records.read(number, place).row["id"] in range(9) for number, place in enumerate(places))
    other = path.with_name("data.mindrecord0")
    os.utime(other, (1, 1))
    with pytest.raises(DataError, match=r"data\.mindrecord0 was changed while"):
        for number, place in enumerate(places):
            records.read(number, place)
    os.truncate(other, 100_000)
    with pytest.raises(DataError, match="was changed while"):
        open_records(path).expect(*state[:2])


@pytest.mark.parametrize("header", [{}, {"shard_addresses": ["a"], "page_size": 9, "schema": [{"blob_fields": []}]},
                                    {"shard_addresses": 5, "page_size": 9, "header_size": 9,
                                     "schema": [{"blob_fields": []}]}, {"shard_addresses": [], "page_size": "x",
                                                                        "header_size": 1, "schema": []}])
def test_headers_of_mindrecord_that_say_nothing_are_refused(tmp_path, header):
    text = json.dumps(header).encode().ljust(0x480)         # a length that looks like the beginning of a pickle
    (tmp_path / "a.mindrecord").write_bytes(len(text).to_bytes(8, "little") + text)
    with pytest.raises(DataError, match="no MindRecord file, or damaged"):
        open_records(tmp_path / "a.mindrecord")


@pytest.mark.parametrize("start", ["data:image/png;base64,", "data:image/png;charset=utf-8;base64,", "data:;base64,",
                                   "data:application/octet-stream;base64,", "DATA:IMAGE/PNG;BASE64,", ""])
@pytest.mark.parametrize("encode", [base64.b64encode, base64.encodebytes, base64.urlsafe_b64encode,
                                    lambda content: base64.b64encode(content).rstrip(b"=")],
                         ids=["plain", "lines", "web", "no padding"])
def test_base64_is_read_as_people_write_it(tmp_path, start, encode):
    content = picture(size=(40, 31)) + b"\xff\xfe\xfb"
    (tmp_path / "data.json").write_text(json.dumps([{"query": "q", "response": "r",
                                                     "image": start + encode(content).decode()}]))
    sample, = load_conversations(tmp_path / "data.json")
    assert load_image(sample.images[0]).size == (40, 31)


@pytest.mark.parametrize(("image", "message"), [
    ("data:image/png;base64,a", "as base64 is damaged"), ("data:image/png;base64,%%%%", "as base64 is damaged"),
    ("data:image/svg+xml,%3Csvg%3E", "is the content of a file and not its path"),
    ("s3://bucket/a.png", r"is an address; download it and name the file\."),
    ("https://a.b/c.png", r"download it and name the file \(or let data_loader\.fetch"),
    ("iVBORw0KGgo.png", r"does not exist \(tried"), ("/9j/short", r"does not exist \(tried"),
])
def test_what_is_no_picture_is_told(tmp_path, image, message):
    (tmp_path / "data.json").write_text(json.dumps([{"query": "q", "response": "r", "image": image}]))
    with pytest.raises(DataError, match=message):
        load_conversations(tmp_path / "data.json")


def test_a_page_that_a_server_sends_is_not_kept_as_a_picture(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    answers = [b"<!DOCTYPE html><html>sorry</html>", b"", picture()]
    monkeypatch.setattr(fetching.urllib.request, "urlopen", lambda *_, **__: Answer(answers.pop(0)))
    for _ in range(2):
        with pytest.raises(DataError, match=r"sample 1: http://a/b\.png gave .* and no picture"):
            fetching.fetched("http://a/b.png", "sample 1")
    assert load_image(fetching.fetched("http://a/b.png", "sample 1")).size == (40, 30)


class Answer(io.BytesIO):
    """What a server answers."""

    headers: ClassVar[dict] = {}
