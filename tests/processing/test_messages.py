"""Messages in the common form become query, pictures and history."""
from __future__ import annotations

import pytest

from mindformers_ixc.errors import PromptError
from mindformers_ixc.generation.judged_requests import read_judged
from mindformers_ixc.processing.judged import judged_turns
from mindformers_ixc.processing.messages import read_history, read_messages


def user(*parts):
    return {"role": "user", "content": list(parts) if len(parts) != 1 or not isinstance(parts[0], str) else parts[0]}


def image(name):
    return {"type": "image", "image": name}


def text(value):
    return {"type": "text", "text": value}


def test_a_conversation_with_pictures_in_several_rounds():
    request = read_messages([
        {"role": "system", "content": "Be brief."}, user(image("a.png"), text("What?")),
        {"role": "assistant", "content": "A cat."}, user(text("And "), image("b.png"), text("?"))])
    assert request == {"query": "And <ImageHere>?", "images": ["a.png", "b.png"],
                       "history": [("<ImageHere>What?", "A cat.")], "meta_instruction": "Be brief."}


@pytest.mark.parametrize(("messages", "word"), [
    ([{"role": "user"}], "'content'"), ([{"role": "robot", "content": "x"}], "'robot'"),
    ([user("a"), user("b")], "message 1"), ([user("a"), {"role": "assistant", "content": "b"}], "last message"),
    ([user("a"), {"role": "system", "content": "b"}], "comes first"), ([user({"type": "video"}, text("x"))], "video"),
    ([{"role": "user", "content": 3}], "int"), ([], "last message"), (None, "NoneType"), (["a"], "message 0"),
    ([{"role": "user", "content": None}], "NoneType"), ([user(text(None), text("x"))], r"content\[0\] must be a text"),
    ([user(text(b"x"), text("x"))], "bytes"), ([{"role": "user", "content": "\udc00"}], r"\\udc00"),
    ([user("a"), {"role": "assistant", "content": [image("b.png")]}, user("c")], "only the user's messages"),
    ([{"role": "system", "content": [image("b.png")]}, user("c")], "only the user's messages"),
    ([{**user("a"), "tool_calls": [1]}], "'tool_calls' is not read"), ([user({**text("a"), "x": 1}, text("b"))], "'x'"),
    ([{"role": ["user"], "content": "a"}], r"found role \['user'\]")])
def test_malformed_messages(messages, word):
    with pytest.raises(PromptError, match=word):
        read_messages(messages)


PAIRS = [("What?", "A cat."), ("Where?", "<ImageHere>")]


@pytest.mark.parametrize("history", [
    PAIRS, [list(pair) for pair in PAIRS], tuple(PAIRS), [{"query": q, "response": a} for q, a in PAIRS],
    [{"role": role, "content": text} for pair in PAIRS for role, text in zip(("user", "assistant"), pair)],
    [{"role": role, "content": [{"type": "text", "text": text}], "metadata": {"title": None}, "options": None}
     for pair in PAIRS for role, text in zip(("user", "assistant"), pair)],
    [PAIRS[0], {"role": "user", "content": "Where?"}, {"role": "assistant", "content": "<ImageHere>"}]])
def test_every_form_of_a_history(history):
    assert read_history(history) == PAIRS


def test_no_history():
    assert read_history(None) == read_history([]) == read_history(()) == []


ASK, TELL = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}


@pytest.mark.parametrize(("history", "words"), [
    ("ab", "must be a list .* found str"), ({"role": "user"}, "found dict"), (3, "found int"), (b"ab", "found bytes"),
    ([("a", "b"), None], r"history\[1\]: .*NoneType"), ([3], r"history\[0\]: .*int"), ([b"ab"], "bytes"),
    (["ab"], "str"),
    ([("a",)], r"history\[0\]: must be a pair .* found tuple of 1"), ([["a", "b", "c"]], "list of 3"),
    ([[]], "list of 0"),
    ([("a", None)], r"history\[0\], answer must be a text, found NoneType"), ([(None, "a")], "question must be a text"),
    ([("a", 3)], "answer must be a text, found int"), ([("a", b"b")], "found bytes"), ([("a", "\ud800")], r"\\ud800"),
    ([ASK], r"history\[0\]: the question has no answer"), ([ASK, TELL, ASK], r"history\[2\]: the question has no"),
    ([TELL, ASK], r"history\[0\]: expected a message of the user, found role 'assistant'"),
    ([ASK, ASK], r"history\[1\]: expected a message of the assistant"), ([ASK, ("a", "b")], r"history\[1\]"),
    ([{"role": "robot", "content": "x"}], "found role 'robot'"), ([{"role": None, "content": "x"}], "found role None"),
    ([{"role": "system", "content": "x"}], "give it as meta_instruction"), ([{"role": "user"}], "has no 'content'"),
    ([{"content": "x"}], r"history\[0\]: has no 'query'"), ([{"query": "x"}], "has no 'response'"),
    ([{"query": "x", "response": None}], "response must be a text"), ([{"a": "b", "c": "d"}], "has no 'query'"),
    ([{**ASK, "image": "a.png"}, TELL], "'image' is not read"), ([{**ASK, "content": None}, TELL], "NoneType"),
    ([{**ASK, "content": [{"type": "image", "image": "a.png"}]}, TELL], "given in images")])
def test_what_is_no_history_is_named(history, words):
    with pytest.raises(PromptError, match=words):
        read_history(history)


@pytest.mark.parametrize(("before", "found"), [
    ([], "nothing"), ([("system", "s")], "a message of the system"),
    ([("user", "a"), ("assistant", "b")], "a message of the assistant")])
def test_an_answer_that_is_judged_follows_a_question(before, found):
    chat = [{"role": role, "content": text} for role, text in (*before, ("assistant", "c"))]
    words = f"an answer that is judged follows a question of the user's, found {found} before it"
    with pytest.raises(PromptError, match=f"^message {len(before)}: {words}"):
        judged_turns(chat)
    with pytest.raises(PromptError, match=rf"^messages\[{len(before)}\]: {words}"):
        read_judged({"messages": chat})
    asked = [*chat[:-1], {"role": "user", "content": "q"}, chat[-1]]
    if found != "nothing":
        assert judged_turns(asked)[0][-2:] == [("user", "q"), ("assistant", "c")]
