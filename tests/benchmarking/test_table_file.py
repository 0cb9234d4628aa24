"""VLMEvalKit's tables: what is read, and what is refused with its row."""
from __future__ import annotations

import base64
import csv
import io

import pytest
from benchmark_tables import TABLES, picture, write_table
from PIL import Image

from mindformers_ixc.benchmarking.catalogue import BENCHMARKS
from mindformers_ixc.benchmarking.table_file import BenchmarkTable, typed
from mindformers_ixc.errors import DataError
from mindformers_ixc.processing.pictures import load_image


def table(folder, rows, name="MMStar", columns=("index", "question", "image", "A", "B", "answer"), **options):
    path = folder / "t.tsv"
    with open(path, "w", encoding="utf-8", newline="") as file:
        csv.writer(file, delimiter="\t").writerows([columns, *rows])
    return BenchmarkTable(path, BENCHMARKS[name], **options)


@pytest.mark.parametrize("name", TABLES)
def test_every_kind_is_read_with_its_pictures(tmp_path, name):
    source = BenchmarkTable(write_table(tmp_path, name), BENCHMARKS[name])
    assert len(source.rows) == len([row for row in TABLES[name]() if row["image"]])
    for row in source.rows:
        pictures = source.pictures(row)
        assert len(pictures) == row.count > 0
        assert all(min(load_image(one).size) > 50 for one in pictures)


def test_cells_lines_and_references(tmp_path):
    source = BenchmarkTable(write_table(tmp_path, "MMStar"), BENCHMARKS["MMStar"])
    assert [row.index for row in source.rows] == ["0", "1", "2", "4"] and source.left_out == 1
    first, second, third, last = source.rows
    assert second.cells["question"] == "Which colour\nstands out (B) most?"
    assert second.cells["hint"] == "Look at the fur."
    assert first.cells["hint"] is None and first.cells["C"] is None          # N/A is a missing cell, as for pandas
    assert last.cells["C"] == 'in a "cafe"'
    assert source.pictures(second)[0].read() == source.pictures(first)[0].read() == base64.b64decode(picture("cat.jpg"))
    assert [one.read() for one in source.pictures(third)] == [
        base64.b64decode(picture(name)) for name in ("coffee.jpg", "rocket.jpg")]
    assert str(source.pictures(third)[1]) == "MMStar.tsv, row 2: picture 2"


@pytest.mark.parametrize(("cells", "values"), [
    (["1", "2"], [1, 2]), (["1", ""], [1.0, None]), (["007", "+8"], [7, 8]), (["0.5", "2"], [0.5, 2.0]),
    (["1", "x"], ["1", "x"]), (["True", "false"], [True, False]), (["True", ""], ["True", None]),
    (["None", "a"], [None, "a"]), (["1_0", "2"], ["1_0", "2"]), (["", ""], [None, None])])
def test_columns_are_typed_as_pandas_types_them(cells, values):
    found = typed(cells)
    assert found == values and list(map(type, found)) == list(map(type, values))


def test_a_table_may_name_files(tmp_path):
    Image.new("RGB", (60, 40)).save(tmp_path / "a.png")
    columns = ("index", "question", "image_path", "A", "B")
    source = table(tmp_path, [[1, "?", "a.png", "x", "y"], [2, "?", "['a.png', 'a.png']", "x", "y"]], columns=columns)
    assert [row.count for row in source.rows] == [1, 2]
    assert source.pictures(source.rows[1]) == [tmp_path / "a.png"] * 2
    with pytest.raises(DataError, match=r"row 1: b\.png does not exist"):
        table(tmp_path, [[1, "?", "b.png", "x", "y"]], columns=columns)
    with pytest.raises(DataError, match=r"row 1: .* inside image_root"):
        table(tmp_path, [[1, "?", "/etc/hostname", "x", "y"]], columns=columns, image_root=str(tmp_path))


NO_PICTURE = base64.b64encode(b"no picture at all" * 9).decode()


@pytest.mark.parametrize(("rows", "words"), [
    ([], "has no row below its first"),
    ([[1, "?", "x" * 65 + "!", "a", "b", "A"]], "row 1: the picture is no base64"),
    ([[1, "?", NO_PICTURE, "a", "b", "A"]], "row 1: the picture"),
    ([[7, "?", NO_PICTURE, "a", "b", "A"]] * 1 + [[n, "?", "5", "a", "b", "A"] for n in range(4)],
     r"row 7: .*; row 0: 'image' is '5', which is neither .*; and 2 more\."),
    ([[1, "?", "", "a", "b", "A"]], "no row has a picture"),
    ([[1, "?", "1", "a", "b", "A"]], "row 1: 'image' is '1', which is neither a picture in base64 nor the index"),
    ([[1, "?", picture("cat.jpg"), "a", "b"]], "row 1: has 5 cells of 6"),
    ([[1, "", picture("cat.jpg"), "a", "b", "A"]], "row 1: 'question' is empty"),
    ([[1, "?", picture("cat.jpg"), "a", "b", "A"]] * 2, "two rows have the index 1")])
def test_rows_that_cannot_be_asked_are_named(tmp_path, rows, words):
    with pytest.raises(DataError, match=words) as caught:
        table(tmp_path, rows)
    assert len(str(caught.value)) < 700


@pytest.mark.parametrize(("columns", "words"), [
    (("index", "question", "image", "A"), "has no column 'B'; MMStar needs index, question, image, A, B, separated by"),
    (("question", "A", "B"), "has no column 'index' and no column 'image'"),
    (("index,question,image",), "no column 'index' and no column 'question'"),
    (("index", "question", "image", "A", "B", "A"), "two columns of the name 'A'")])
def test_missing_columns_are_named(tmp_path, columns, words):
    with pytest.raises(DataError, match=words):
        table(tmp_path, [["x"] * len(columns)], columns=columns)


def test_other_files_are_refused(tmp_path):
    path = tmp_path / "t.tsv"
    for content, words in ((b"", "is empty"), (b"index\tquestion\n\xe9\n", "no column"),
                           (b"index\tquestion\timage\tA\tB\n1\t\xe9\t\t\t\n", "is not UTF-8 text"),
                           ("index\tquestion".encode("utf-16"), "UTF-16 text")):
        path.write_bytes(content)
        with pytest.raises(DataError, match=words):
            BenchmarkTable(path, BENCHMARKS["MMStar"])


def test_a_table_that_changes_meanwhile_is_noticed(tmp_path):
    source = table(tmp_path, [[1, "?", picture("cat.jpg"), "a", "b", "A"]])
    source.path.write_text("index\n")
    with pytest.raises(DataError, match="has changed since it was opened"):
        source.pictures(source.rows[0])[0].read()


def test_cells_may_be_longer_than_pythons_reader_takes_and_its_limit_stays(tmp_path):
    csv.field_size_limit(limit := 131072)       # Python's, whatever others have made of it
    file = io.BytesIO()
    Image.effect_noise((700, 700), 90).convert("RGB").save(file, "PNG")
    text = base64.b64encode(file.getvalue()).decode()
    assert len(text) > limit
    source = table(tmp_path, [[1, "?", text, "a", "b", "A"]])
    assert source.pictures(source.rows[0])[0].read() == file.getvalue()
    assert csv.field_size_limit() == limit
