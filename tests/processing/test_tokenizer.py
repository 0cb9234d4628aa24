"""The tokenizer with the demo model; the public model file is checked by scripts/parity.py --tokenizer."""
from __future__ import annotations

import codecs
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mindformers_ixc.demo import demo_path
from mindformers_ixc.errors import ConfigError, PromptError
from mindformers_ixc.processing.tokenizer import Tokenizer
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


# U+0000 encodes differently between sentencepiece versions; half surrogates are no text; U+2581 decodes to a space
TEXT = st.text(st.characters(exclude_categories=("Cs",), exclude_characters="\0\u2581"), max_size=30)
SPELLINGS = ("<s>", "</s>", "<unk>", "[UNUSED_TOKEN_145]", "[UNUSED_TOKEN_146]", "[UNUSED_TOKEN_0]", "[UNUSED_TOKEN_7]",
             "[UNUSED_TOKEN_147]", "[UNUSED_TOKEN_", "145]", "]", "[", "<", "s>", "</", "<0x0A>", "<ImageHere>", " ")
HOSTILE = st.lists(TEXT | st.sampled_from(SPELLINGS), max_size=8).map("".join)
PLAIN = Tokenizer(str(demo_path("tokenizer.model")))
CONTROL_IDS = {0, 1, 2, *(PLAIN.convert_tokens_to_ids(f"[UNUSED_TOKEN_{k}]") for k in range(147))}


@settings(deadline=None, max_examples=400)
@given(HOSTILE)
def test_any_text_comes_back_without_a_control_id(text):
    ids = PLAIN.encode_text(text)
    assert CONTROL_IDS.isdisjoint(ids)
    assert PLAIN.decode(ids) == text


@pytest.mark.parametrize("text", ["[UNUSED_TOKEN_[UNUSED_TOKEN_145]145]", "<<s>s>", "</s</s>>", "<s></s><unk>",
                                  "[UNUSED_TOKEN_1][UNUSED_TOKEN_146]", "[[UNUSED_TOKEN_146]user\n", "<0x0A>"])
def test_both_tokenizers_cut_spellings_inside_one_another(tokenizer, text):
    ids = tokenizer.encode_text(text)
    assert ids == PLAIN.encode_text(text)
    assert CONTROL_IDS.isdisjoint(ids)
    assert tokenizer.decode(ids) == PLAIN.decode(ids) == text


@settings(deadline=None, max_examples=200)
@given(TEXT)
def test_only_spellings_are_cut(text):
    if not any(piece in text for piece in PLAIN.control_pieces):
        assert PLAIN.encode_text(text) == PLAIN.sp_model.encode(text)


def test_what_is_no_piece_is_not_cut(tokenizer):
    for text in ("[UNUSED_TOKEN_147]", "[UNUSED_TOKEN_145", "<s", "<S>", "[unused_token_145]"):
        assert tokenizer.encode_text(text) == tokenizer.sp_model.encode(text)


def test_control_tokens_of_the_public_code_are_had_by_asking(tokenizer):
    assert tokenizer.encode_text("a</s>", control_tokens=True)[-1] == 2
    assert tokenizer.encode_text("[UNUSED_TOKEN_145]", control_tokens=True) == [1022]
    assert PLAIN.encode_text("<s>a", control_tokens=True) == tokenizer.encode_text("<s>a", control_tokens=True)


def test_special_tokens_that_were_added_are_text_too():
    tokenizer = InternLM2Tokenizer(str(demo_path("tokenizer.model")))
    tokenizer.add_special_tokens({"additional_special_tokens": ["<box>"]})
    assert tokenizer.encode_text("a<box>b", control_tokens=True)[1] == 1024
    ids = tokenizer.encode_text("a<box>b")
    assert max(ids) < 1024
    assert tokenizer.decode(ids) == "a<box>b"


@pytest.mark.parametrize(("text", "words"), [(b"a", "found bytes"), (None, "found NoneType"), (3, "found int"),
                                             (["a"], "found list"), ("a\ud83d", r"\\ud83d at character 1")])
@pytest.mark.parametrize("control", [False, True])
def test_what_is_no_text_is_named(tokenizer, text, words, control):
    for one in (tokenizer, PLAIN):
        with pytest.raises(PromptError, match=words):
            one.encode_text(text, control_tokens=control)


def test_a_model_that_finds_control_pieces_elsewhere_is_refused(monkeypatch):
    tokenizer = Tokenizer(str(demo_path("tokenizer.model")))
    monkeypatch.setattr(tokenizer, "_tokenize", lambda text: ["[UNUSED_TOKEN_145]"])    # as a normaliser might do
    with pytest.raises(PromptError, match=r"the control piece \[UNUSED_TOKEN_145\] of a text that does not spell it"):
        tokenizer.encode_text("\uff3bUNUSED_TOKEN_145\uff3d")


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


def model_folder(tmp_path, settings=None, vocabulary=True):
    if vocabulary:
        (tmp_path / "tokenizer.model").write_bytes(demo_path("tokenizer.model").read_bytes())
    if settings is not None:
        (tmp_path / "tokenizer_config.json").write_bytes(settings)
    return tmp_path


def test_a_byte_order_mark_before_the_settings_is_read(tmp_path):
    folder = model_folder(tmp_path, codecs.BOM_UTF8 + b'{"pad_token": {"content": "<unk>"}, "bos_token": null}')
    assert Tokenizer.from_directory(folder).pad_token_id == 0
    with pytest.raises(ConfigError, match=r"tokenizer_config\.json begins with a byte order mark, which MindFormers"):
        InternLM2Tokenizer.from_pretrained(str(folder))      # whose own reader stops without the file's name


@pytest.mark.parametrize(("settings", "words"), [
    (b'{"pad', "is not valid JSON"), (b"[" * 100_000, "nested too deeply"), (b"[]", "JSON object, found list"),
    (b'{"pad_token": 3}', "pad_token must be a text"), (b'{"pad_token": {"x": 1}}', "pad_token must be a text"),
    (b'{"pad_token": ""}', "pad_token must be a text"), (b'{"pad_token": "[PAD]"}', r"has no piece '\[PAD\]'"),
    (b'{"add_bos_token": "yes"}', "add_bos_token must be true or false"), (b"\xff\xfe{\0", "UTF-16"),
    (b'{"pad_token": "\xb2"}', "byte 0xB2 at place 15")])
def test_damaged_settings_are_named(tmp_path, settings, words):
    with pytest.raises(ConfigError, match=words):
        Tokenizer.from_directory(model_folder(tmp_path, settings))


def test_a_folder_with_tokenizer_json_only_says_what_is_missing(tmp_path):
    (tmp_path / "tokenizer.json").write_text("{}")
    for read in (Tokenizer.from_directory, lambda path: InternLM2Tokenizer.from_pretrained(str(path))):
        with pytest.raises(FileNotFoundError, match=r"has a tokenizer\.json, which is not read: put the public model's "
                                                    r"tokenizer\.model beside it"):
            read(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"give the path of a tokenizer\.model"):
        InternLM2Tokenizer(None)


def test_a_release_of_sentencepiece_that_refuses_the_public_model_is_named(monkeypatch):
    def refuse(*_):
        raise RuntimeError("INTERNAL: piece must not include null character.")

    monkeypatch.setattr("sentencepiece.SentencePieceProcessor.Load", refuse)
    with pytest.raises(ConfigError, match=r"^sentencepiece \S+ does not read .*install another release"):
        Tokenizer(str(demo_path("tokenizer.model")))
