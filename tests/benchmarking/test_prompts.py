"""Prompts, limits and final answers of every kind of benchmark, as the published adapter has them."""
from __future__ import annotations

import pytest
from PIL import Image

from mindformers_ixc.benchmarking.catalogue import BENCHMARKS, tiles_of
from mindformers_ixc.benchmarking.prompts import final_answer, make_prompt
from mindformers_ixc.errors import PromptError
from mindformers_ixc.processing.image import plan_partition
from mindformers_ixc.processing.processor import Processor
from mindformers_ixc.processing.prompt import PICTURE, Piece
from mindformers_ixc.resources import resolve_model

PHRASE = "Answer the question using a single word or phrase."
START, END = Piece("[UNUSED_TOKEN_146]", "mark"), Piece("[UNUSED_TOKEN_145]", "mark")


def asked(name: str, pictures: int = 1, **row) -> str:
    return make_prompt(BENCHMARKS[name], {"question": "What?", **row}, pictures).text


@pytest.mark.parametrize(("name", "row", "text"), [
    ("MMStar", {"A": "x", "B": 2, "C": None}, "<ImageHere>Question: What?\nContext: N/A\nOptions: A. x B. 2"),
    ("MMBench_TEST_CN", {"A": "x", "B": "(C) y", "hint": "See (A)."},
     "<ImageHere>Question: What?\nContext: See A..\nOptions: A. x B. C. y"),
    ("MMMU_DEV_VAL", {"A": None}, f"<ImageHere>{PHRASE}What?"),
    ("DocVQA_VAL", {}, f"<ImageHere>{PHRASE}What?"), ("OCRBench", {}, f"<ImageHere>{PHRASE}What?"),
    ("MathVista_MINI", {"question": "(K) or (J)?"}, "<ImageHere>(K) or J.?"),
    ("MMVet", {}, "<ImageHere>What? Answer this question in detail.")])
def test_what_is_asked(name, row, text):
    assert asked(name, **row) == text


def test_several_pictures_are_numbered():
    assert asked("DocVQA_VAL", 3) == ("Image1: <ImageHere>; Image2: <ImageHere>; Image3: <ImageHere>;"
                                      f"{PHRASE}What?")


def test_a_prompt_is_one_turn_open_for_the_answer():
    prompt = make_prompt(BENCHMARKS["MathVista_MINI"], {"question": "What?"}, 1)
    assert prompt.pieces() == [START, Piece("user\n"), PICTURE, Piece("What?"), END, Piece("\n"), START,
                               Piece("assistant\n")]
    assert not prompt.has_marks


def test_doubled_turns_are_marks_and_text_of_a_question_never_is():
    question = "Is it [UNUSED_TOKEN_145]?"
    prompt = make_prompt(BENCHMARKS["POPE"], {"question": question}, 1)
    assert prompt.has_marks and BENCHMARKS["POPE"].has_marks
    assert prompt.pieces() == [
        START, Piece(f"user\n{PHRASE}"), START, Piece("user\n"), PICTURE, Piece(question), END, Piece("\n"), START,
        Piece(f"assistant\n{' ' * 15}"), END, Piece("\n"), START, Piece("assistant\n")]


@pytest.mark.parametrize(("question", "pieces"), [
    ("Is it? Please answer yes or no.", [Piece("Is it? Answer this question briefly")]),
    ("Is it?", [Piece("Is it?"), END, Piece("\n"), START, Piece("assistant Answer this question briefly")])])
def test_mmes_turn_stands_in_another_one(question, pieces):
    prompt = make_prompt(BENCHMARKS["MME"], {"question": question}, 1)
    assert list(prompt.content) == [START, Piece("user\n"), PICTURE, *pieces]


@pytest.mark.parametrize(("pictures", "tiles"), [(0, 36), (1, 36), (2, 9), (3, 4), (4, 4), (40, 4)])
def test_tiles_are_shared_twice(pictures, tiles):
    assert tiles_of(pictures) == tiles


def test_limits_are_those_of_the_adapter():
    limits = {name: one.max_new_tokens for name, one in BENCHMARKS.items()}
    assert (limits["MMStar"], limits["MMMU_DEV_VAL"], limits["ChartQA_TEST"], limits["MathVista_MINI"], limits["POPE"],
            limits["MMVet"], limits["MME"]) == (5, 5, 100, 100, 10, 500, 2048)
    assert {name for name, one in BENCHMARKS.items() if one.has_marks} == {"MME", "POPE", "HallusionBench"}


@pytest.mark.parametrize(("name", "said", "answer"), [
    ("MMStar", "The answer is B", "B"), ("MMStar", "b or C", "C"), ("MMStar", "none", "Z"), ("MMStar", "", "Z"),
    ("MMStar", "The answer is D", "D"), ("MMMU_DEV_VAL", " The answer is b.", "b."),
    ("DocVQA_VAL", " 12 [UNUSED_TOKEN_145]\nmore", "12"), ("DocVQA_VAL", "12<|im_end|>", "12")])
def test_what_of_an_answer_counts(name, said, answer):
    assert final_answer(BENCHMARKS[name], said) == answer


@pytest.mark.parametrize("name", ["MMStar", "POPE", "MME", "DocVQA_VAL"])
def test_a_prompt_is_encoded_as_its_whole_text_with_control_tokens(name):
    """As the published adapter encodes it: text between pictures at once, what is spelled like a mark being one."""
    processor, picture = Processor.from_directory(resolve_model("starter")), Image.new("RGB", (90, 40))
    pictures = 2 if name == "MMStar" else 1
    row = {"question": "Is there  a cat?\n(A) Yes", "A": "one", "B": "two"}
    pieces = make_prompt(BENCHMARKS[name], row, pictures).pieces()
    sample = processor.encode_pieces(pieces, [picture] * pictures, tiles_of(pictures), training=True)
    texts = "".join("<cut>" if piece is PICTURE else piece.text for piece in pieces).split("<cut>")
    ids = [processor.tokenizer.encode_text(text, control_tokens=True) for text in texts]
    assert [token for part in ids for token in part] == sample.input_ids[1:][sample.image_mask[1:] == 0].tolist()
    assert sample.input_ids[0] == processor.tokenizer.bos_token_id
    assert sample.grids == [plan_partition(90, 40, tiles_of(pictures), processor.image_processor.image_size, True).grid
                            ] * pictures
    assert sample.image_mask.sum() == pictures * processor.image_processor.token_count(sample.grids[0])


def test_places_and_pictures_are_as_many():
    processor, picture = Processor.from_directory(resolve_model("starter")), Image.new("RGB", (90, 40))
    with pytest.raises(PromptError, match="2 <ImageHere> for 1 pictures"):
        processor.encode_pieces([PICTURE, Piece("?"), PICTURE], [picture])
    inside = processor.encode_pieces([PICTURE, Piece("?")], [picture])
    in_front = processor.encode_pieces([Piece("?")], [picture])
    assert inside.input_ids.tolist() == in_front.input_ids.tolist()
