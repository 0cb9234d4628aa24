"""The tokenizer with the demo model; the public model file is checked by scripts/parity.py --tokenizer."""
from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mindformers_ixc.demo import demo_path
from mindformers_ixc.registration import InternLM2Tokenizer, InternLMXComposer2Tokenizer


@pytest.fixture(scope="module")
def tokenizer():
    return InternLM2Tokenizer("pkg:mindformers_ixc/demo/tokenizer.model")


def test_sizes_and_special_ids(tokenizer):
    assert (len(tokenizer), tokenizer.vocab_size) == (1024, 1024)
    assert (tokenizer.unk_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id) == (0, 1, 2)
    assert tokenizer.pad_token_id == 2


def test_begin_of_text_is_added_on_request(tokenizer):
    ids = tokenizer.encode_text("a cat")
    assert tokenizer("a cat")["input_ids"] == [1, *ids]
    assert tokenizer("a cat", add_special_tokens=False)["input_ids"] == ids
    assert tokenizer.encode_text("a cat", add_bos=True) == [1, *ids]


# U+0000 encodes differently between sentencepiece versions; lone surrogates are no text; special tokens written out,
# which begin with <, are decoded with a space before them
TEXT = st.text(st.characters(exclude_categories=("Cs",), exclude_characters="\0\u2581<"), max_size=30)


@settings(deadline=None, max_examples=200)
@given(TEXT)
def test_any_text_comes_back(text):
    tokenizer = InternLM2Tokenizer(str(demo_path("tokenizer.model")))
    assert tokenizer.decode(tokenizer.encode_text(text)) == text


def test_special_tokens_in_a_text_count_as_such(tokenizer):
    assert tokenizer.encode_text("a</s>")[-1] == 2


def test_decoding_with_and_without_specials(tokenizer):
    ids = tokenizer("[UNUSED_TOKEN_146]user\nhi[UNUSED_TOKEN_145]")["input_ids"]
    assert tokenizer.decode(ids, skip_special_tokens=True) == "[UNUSED_TOKEN_146]user\nhi[UNUSED_TOKEN_145]"
    assert tokenizer.decode(ids) == " <s>[UNUSED_TOKEN_146]user\nhi[UNUSED_TOKEN_145]"


def test_saved_files_have_the_public_form(tokenizer, tmp_path):
    tokenizer.save_pretrained(str(tmp_path / "model"))
    fields = json.loads((tmp_path / "model" / "tokenizer_config.json").read_text())
    assert fields["tokenizer_class"] == "InternLMXComposer2Tokenizer"
    again = InternLMXComposer2Tokenizer.from_pretrained(str(tmp_path / "model"))
    assert again.encode_text("Ready for Space\n") == tokenizer.encode_text("Ready for Space\n")


def test_bad_files_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="gone"):
        InternLM2Tokenizer(str(tmp_path / "gone.model"))
    (tmp_path / "bad.model").write_text("x")
    with pytest.raises(ValueError, match="is no SentencePiece model"):
        InternLM2Tokenizer(str(tmp_path / "bad.model"))
    with pytest.raises(FileNotFoundError, match="'no_such_package' is not installed"):
        InternLM2Tokenizer("pkg:no_such_package/x")
