"""Requests with faults: each gets its own error, by name and in its place, and the others are answered."""
from __future__ import annotations

import argparse
import json
import os

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from mindformers_ixc.cli.inputs import check_inputs
from mindformers_ixc.errors import DataError, GenerationError, PromptError
from mindformers_ixc.files import check_target
from mindformers_ixc.generation.options import GenerationOptions
from mindformers_ixc.generation.predict import answer_questions, predict
from mindformers_ixc.generation.requests import error_sentence, read_request, read_requests
from mindformers_ixc.generation.webpage import free_target


class Answering:
    """Stands for an assistant: the question in capitals; some pictures and some questions make it fail."""

    def __init__(self):
        self.batches: list[list[str]] = []

    def encode(self, question):
        question = read_request(question)
        if "strange.avif" in question["images"]:
            raise AttributeError("'NoneType' object has no attribute 'seek'")
        return question["query"]

    def answer_samples(self, samples, mode, **options):
        self.batches.append(list(samples))
        if "bad" in samples:
            raise RuntimeError("the scores are not numbers")
        if "memory" in samples:
            raise MemoryError
        return [sample.upper() for sample in samples]


def answered(folder, content: bytes, size: int = 2) -> list[dict]:
    (folder / "q.jsonl").write_bytes(content)
    return predict(Answering, read_requests(folder / "q.jsonl"), folder / "out", {"model": "m"}, size, "base", {})


def test_one_bad_request_of_a_batch_does_not_fail_the_others(tmp_path):
    lines = [{"query": "a"}, {"query": "b", "images": "strange.avif"}, {"query": "bad"}, {"query": "c"}]
    rows = answered(tmp_path, "\n".join(map(json.dumps, lines)).encode(), 4)
    assert [row.get("answer") for row in rows] == ["A", None, None, "C"]
    assert rows[1]["error"] == "The request failed with AttributeError: 'NoneType' object has no attribute 'seek'"
    assert "RuntimeError: the scores are not numbers" in rows[2]["error"]


def test_every_batch_has_as_many_rows_whatever_fails():
    assistant = Answering()
    answer_questions(assistant, [{"query": "a"}, {"query": "bad"}, {"query": "c"}], 4, "base", {})
    assert {len(batch) for batch in assistant.batches} == {4}


def test_memory_and_interrupts_are_no_requests_fault():
    with pytest.raises(MemoryError):
        answer_questions(Answering(), [{"query": "memory"}], 1, "base", {})


def test_lines_end_at_line_feeds_only_and_are_found_again(tmp_path):
    content = '\ufeff{"query": "a"}\r\n{"query": "x\u2028y\u0085z"}\n\n{"query": "c"}'.encode()
    rows = answered(tmp_path, content)
    assert [row["answer"] for row in rows] == ["A", "X\u2028Y\u0085Z", "C"]
    written = tmp_path / "out" / "predictions.jsonl"
    assert written.read_text(encoding="utf-8").count("\n") == 3
    assert answered(tmp_path, content) == rows               # read again from the file
    # a run that was killed in the middle of a letter
    letter = written.read_bytes().index("\u2028".encode()) + 1
    (tmp_path / "out" / "predictions.part.jsonl").write_bytes(written.read_bytes()[:letter])
    written.unlink()
    assert answered(tmp_path, content) == rows


def test_half_pairs_nan_and_depth_are_errors_in_their_places(tmp_path):
    deep = '{"query": ' + "[" * 300 + "]" * 300 + "}"
    content = "\n".join(['{"query": "\\ud83d"}', '{"query": NaN}', deep, "[" * 10**5, '{"query": "d"}',
                         '{"query": ' + "9" * 5000 + "}"])
    rows = answered(tmp_path, content.encode(), 3)
    assert [row.get("answer") for row in rows] == [None] * 4 + ["D", None]
    for row, words in zip(rows, (r"line 1 has \ud83d, half of a surrogate pair", "query must be a text, found the fl",
                                 "nested more than 50 deep", "nested too deeply", "", "not valid JSON")):
        assert words in row.get("error", "")
        assert len(row.get("error", "")) < 400
    assert answered(tmp_path, content.encode(), 3) == rows or "NaN" in json.dumps(rows)   # nan equals nothing


def test_text_of_another_encoding_is_refused_with_its_place(tmp_path):
    for content, words in (('{"query": "图中是什么?"}\n'.encode("gbk"), "byte 0xD6 at place 13"),
                           ('{"query": "a"}'.encode("utf-16"), "UTF-16")):
        (tmp_path / "q.jsonl").write_bytes(content)
        with pytest.raises(DataError, match=words):
            read_requests(tmp_path / "q.jsonl")


@pytest.mark.parametrize(("request_", "words"), [
    ({"query": None}, "query must be a text, found null"),
    ({"query": 5}, "query must be a text, found the int 5"),
    ({"query": b"a"}, "query must be a text, found a value of type bytes"),
    ({"query": "x\udc80"}, r"query has \\udc80, half of a surrogate pair"),
    ({}, "needs the key 'query'.*found nothing"),
    ({"query": "a", "images": [None]}, r"images\[0\] must be a path.*found null"),
    ({"query": "a", "images": {"path": 1}}, r"images\[0\] must be a path.*found an object of 1"),
    ({"query": "a", "history": "x"}, "history must be a list of pairs .*found str"),
    ({"query": "a", "history": [["x"]]}, r"history\[0\]: must be a pair .*found list of 1"),
    ({"query": "a", "history": [["x", None]]}, r"history\[0\], answer must be a text, found NoneType"),
    ({"query": "a", "history": [[b"x", "y"]]}, r"history\[0\], question must be a text, found bytes"),
    ({"query": "a", "hd_num": 1.5}, "hd_num must be a whole number of at least 1, found the float 1.5"),
    ({"query": "a", "hd_num": 0}, "hd_num must be"),
    ({"query": "a", "meta_instruction": ["x"]}, "meta_instruction must be a text, found a list of 1"),
    ({"query": "a", "colour": "x" * 10**6}, r"unknown key colour \(value \"x+\.\.\.\)"),
    ({"messages": None}, "messages must be a list with at least one message, found null"),
    ({"messages": []}, "messages must be a list with at least one"),
    ({"messages": [None]}, r"messages\[0\] must be an object with 'role' and 'content', found null"),
    ({"messages": [{"role": "user"}]}, r"messages\[0\] has no 'content'"),
    ({"messages": [{"role": "user", "content": None}]},
     r"messages\[0\]\.content must be a text or a list of parts, found null"),
    ({"messages": [{"role": None, "content": "a"}]}, r"messages\[0\]\.role must be a text, found null"),
    ({"messages": [{"role": "user", "content": [3]}]}, r"messages\[0\]\.content\[0\] must be an object with 'type'"),
    ({"messages": [{"role": "user", "content": [{"type": "text", "text": None}]}]},
     r"messages\[0\]\.content\[0\]\.text must be a text, found null"),
    ({"messages": [{"role": "user", "content": [{"type": "image", "image": None}]}]},
     r"messages\[0\]\.content\[0\]\.image must be a path.*found null"),
    ({"messages": [{"role": "user", "content": "a"}], "query": "b"}, "unknown key query"),
    (7, "a request must be a question, a dict or a list of messages, found the int 7"),
    (None, "a request must be .*found null"), ([], "messages must be a list with at least one")])
def test_what_has_the_wrong_type_is_named(request_, words):
    with pytest.raises(PromptError, match=words) as caught:
        read_request(request_)
    assert len(str(caught.value)) < 300


def test_what_is_right_stays_as_it_is():
    picture = Image.new("RGB", (2, 2))
    assert read_request("a") == {"query": "a", "images": []}
    full = {"query": "a", "images": (picture, "b.jpg"), "history": [("x", "y"), ("x", "y")], "meta_instruction": "m",
            "hd_num": np.int64(3)}
    assert read_request(full) == {**full, "images": [picture, "b.jpg"]}
    nothing = {"query": "a", "images": None, "history": None, "meta_instruction": None, "hd_num": None}
    assert read_request(nothing) == {"query": "a", "images": []}
    message = {"role": "user", "content": [{"type": "image", "image": picture}, {"type": "text", "text": "a"}]}
    assert read_request([message]) == read_request({"messages": [message]})
    assert read_request({"messages": [message], "hd_num": 4})["hd_num"] == 4


_ANYTHING = st.recursive(st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.binary(),
                         lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner,
                                                                                     max_size=3), max_leaves=8)
_KEYS = st.sampled_from(["query", "images", "history", "meta_instruction", "hd_num", "messages", "role", "content",
                         "type", "text", "image"])


@settings(max_examples=100, deadline=None)
@given(_ANYTHING | st.dictionaries(_KEYS, _ANYTHING) | st.lists(st.dictionaries(_KEYS, _ANYTHING), max_size=3)
       | st.builds(lambda part: [{"role": "user", "content": [part]}], st.dictionaries(_KEYS, _ANYTHING)))
def test_whatever_is_asked_gives_a_question_or_the_packages_error(value):
    try:
        question = read_request(value)
    except PromptError as error:
        assert str(error)
    else:
        assert isinstance(question["query"], str)
        assert isinstance(question["images"], list)


def test_an_errors_text_can_always_be_written():
    assert error_sentence(OSError("a\udc80")) == "a\\udc80"
    assert error_sentence(KeyError("x")) == "The request failed with KeyError: 'x'"
    assert error_sentence(PromptError("The query is empty.")) == "The query is empty."


def test_temperature_0_is_greedy_and_sampling_with_it_is_refused():
    assert GenerationOptions(temperature=0, do_sample=False).do_sample is False
    assert GenerationOptions(temperature=0.0).do_sample is False
    for temperature in (0, 0.0, 1e-300, np.float32(0)):
        with pytest.raises(GenerationError, match=r"temperature is .* and do_sample is True"):
            GenerationOptions(temperature=temperature, do_sample=True)


def test_numpys_scalars_are_numbers():
    options = GenerationOptions(temperature=np.float32(0.5), max_new_tokens=np.int64(3), do_sample=np.bool_(True),
                                early_stopping=np.bool_(True), seed=np.uint8(1), stop_token_ids=np.array([2, 3]),
                                top_p=np.float64(0.5))
    assert (options.max_new_tokens, options.early_stopping, options.stop_token_ids) == (3, True, (2, 3))
    assert [type(getattr(options, name)) for name in ("temperature", "seed", "do_sample")] == [float, int, bool]


@pytest.mark.parametrize(("name", "value"), [
    ("temperature", float("nan")), ("temperature", float("inf")), ("temperature", "0.5"), ("temperature", None),
    ("temperature", 10**400), ("top_p", float("nan")), ("repetition_penalty", 1e-30), ("repetition_penalty", 1e30),
    ("repetition_penalty", np.float32("nan")), ("length_penalty", 1e300), ("max_new_tokens", 1.5),
    ("max_new_tokens", None), ("max_new_tokens", True), ("num_beams", "3"), ("num_beams", [3]), ("top_k", -1),
    ("seed", -1), ("seed", 1.5), ("do_sample", "yes"), ("do_sample", None), ("early_stopping", "always"),
    ("early_stopping", np.array([True, False])), ("stop_token_ids", [None]), ("stop_token_ids", None),
    ("stop_strings", [""]), ("stop_strings", 5), ("stop_strings", {"a": 1})])
def test_options_of_the_wrong_kind_are_named(name, value):
    with pytest.raises(GenerationError, match=name):
        GenerationOptions(**{name: value})


def bad_targets(folder):
    """Places where no file can be written, for root too."""
    (folder / "file").write_text("x")
    (folder / "folder").mkdir()
    return [folder / "file" / "x.json", folder / "folder", folder / "gone" / "x.json", folder / ("n" * 300)]


def test_targets_that_cannot_be_written_are_refused_at_once(tmp_path):
    for target in bad_targets(tmp_path):
        with pytest.raises(OSError, match=r"--predictions .*(cannot be written|is a folder).*\w\.$"):
            check_inputs(argparse.Namespace(command="eval", predictions=str(target), model=None, data=None))
        with pytest.raises(OSError, match=r"save_to .*(cannot be written|is a folder)"):
            free_target(target, overwrite=True)
        with pytest.raises(OSError, match="TARGET"):
            check_inputs(argparse.Namespace(command="reference", target=str(target)))
    check_target(tmp_path / "new.json", "target")
    check_target(tmp_path / "file", "target")                # an older one may be replaced
    assert sorted(os.listdir(tmp_path)) == ["file", "folder"]
    assert (tmp_path / "file").read_text() == "x"


def test_an_output_folder_that_cannot_be_made_is_refused_before_the_model_is_loaded(tmp_path):
    (tmp_path / "q.jsonl").write_text('{"query": "a"}')
    (tmp_path / "file").write_text("x")
    with pytest.raises(OSError, match=r"output_dir .* cannot be written"):
        predict(lambda: pytest.fail("loaded"), read_requests(tmp_path / "q.jsonl"), tmp_path / "file" / "out", {}, 1,
                "base", {})
