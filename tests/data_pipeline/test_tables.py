"""Tables of questions: what is read, and what is refused by line."""
from __future__ import annotations

import pytest
from indexed import load_sources
from PIL import Image

from mindformers_ixc.data.records import open_records
from mindformers_ixc.data.records.base import Place
from mindformers_ixc.errors import DataError


def read_table(path):
    """Rows of all lines of a table."""
    records = open_records(path)
    places = [Place(*place) for places in records.scan() for place in places.tolist()]
    return [records.read(index, place).row for index, place in enumerate(places)]


def write(folder, text, name="questions.csv"):
    path = folder / name
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return path


@pytest.mark.parametrize("text", [
    "image,question,answer\na.png,\"Red, or blue?\",red\n\nb.png,Why?,\"It says \"\"no\"\".\nTwice.\"\n",
    "\ufeffAnswer;Image;Question;;\r\nred;a.png;Red, or blue?;;\r\n\"It says \"\"no\"\".\nTwice.\";b.png;Why?;;\r\n",
    "question\timage\tanswer\nRed, or blue?\ta.png\tred\nWhy?\tb.png\t\"It says \"\"no\"\".\nTwice.\"",
    "sep=;\r\nimage;question;answer\r\na.png;Red, or blue?;red\r\nb.png;Why?;\"It says \"\"no\"\".\nTwice.\"\r\n",
], ids=["commas", "semicolons as Excel writes them", "tabs", "with the line that names the separator"])
def test_the_same_questions_in_every_spelling(tmp_path, text):
    rows = read_table(write(tmp_path, text))
    assert [(row["image"], *(turn["value"] for turn in row["conversations"])) for row in rows] == [
        ("a.png", "Red, or blue?", "red"), ("b.png", "Why?", 'It says "no".\nTwice.')]


def test_a_run_reads_a_table_as_it_reads_conversation_files(tmp_path):
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png")
    path = write(tmp_path, "image,question,answer\na.png,What?,this\n")
    [sample] = load_sources(str(path))
    assert (sample.turns, sample.images) == ([("user", "What?"), ("assistant", "this")], [tmp_path / "a.png"])
    assert sample.where == f"{path}, sample 0 (id 'line 2')"


def test_all_bad_lines_are_named_by_their_number_in_the_file(tmp_path):
    path = write(tmp_path, 'image,question,answer\na.png,"two\nlines",x\nb.png,Why?\n\nc.png, ,\nd.png,A, or B?,A\n')
    records, errors = open_records(path), []
    for index, place in records:
        try:
            records.read(index, place)
        except DataError as error:
            errors.append(str(error))
    assert errors == [
        f"{path}, line 4: has 2 cells of 3; the first line names image, question, answer.",
        f"{path}, line 6: question, answer are empty.",
        f"{path}, line 7: has 4 cells, the first line 3; put a text that has a comma in double quotes."]


def test_lines_are_counted_with_the_one_that_names_the_separator(tmp_path):
    path = write(tmp_path, "\ufeff\"sep=,\"\nimage,question,answer\na.png,What?,this\nb.png,,that\n")
    with pytest.raises(DataError, match=r"questions\.csv, line 4: question is empty"):
        read_table(path)


@pytest.mark.parametrize(("text", "message"), [
    ("", "its first line is ''"),
    ("image\na.png\n", "its first line is 'image'"),
    ("image,question\na.png,What?\n", "'answer' is there 0 times"),
    ("image,question,answer,stars\na.png,What?,this,3\n", "'stars' is none of them"),
    ("image,question,answer,answer\na.png,What?,this,3\n", "'answer' is there 2 times"),
    ("image,question,answer\n", "no line below its first"),
    ('image,question,answer\na.png,What?,"this\n', "line 2: a text in double quotes is wrong"),
    ("image,question,answer\na.png,Wohin f\u00e4hrt er?,Bern\n".encode("latin-1"), "not UTF-8 text"),
])
def test_what_is_refused(tmp_path, text, message):
    with pytest.raises(DataError) as caught:
        read_table(write(tmp_path, text))
    assert message in str(caught.value)
    assert "questions.csv" in str(caught.value)


def test_a_spreadsheet_is_refused_with_what_to_do(tmp_path):
    with pytest.raises(DataError, match=r"save it as CSV \(UTF-8\)"):
        load_sources(str(write(tmp_path, b"PK\x03\x04", "questions.xlsx")))


def test_a_missing_picture_is_named_with_its_line(tmp_path):
    with pytest.raises(DataError, match=r"line 2.*gone.png does not exist"):
        load_sources(str(write(tmp_path, "image,question,answer\ngone.png,What?,this\n")))


def test_a_folder_is_its_table(tmp_path):
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png")
    write(tmp_path, "image,question,answer\na.png,What?,this\n")
    [sample] = load_sources(str(tmp_path))
    assert sample.images == [tmp_path / "a.png"]
    write(tmp_path, "image,question,answer\na.png,Why?,that\n", "more.csv")
    with pytest.raises(DataError, match=r"has 2 files that may be the data \(more\.csv, questions\.csv\)"):
        load_sources(str(tmp_path))
