"""Messages in the common form become query, pictures and history."""
from __future__ import annotations

import pytest

from mindformers_ixc.errors import PromptError
from mindformers_ixc.processing.messages import read_messages


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
    ([{"role": "user", "content": 3}], "int"), ([], "last message")])
def test_malformed_messages(messages, word):
    with pytest.raises(PromptError, match=word):
        read_messages(messages)
