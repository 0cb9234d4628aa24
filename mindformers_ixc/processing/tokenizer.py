"""The SentencePiece tokenizer of InternLM2.

`SentencePieceText` is what MindFormers' tokenizer of this model (`registration.InternLM2Tokenizer`) and the `Tokenizer`
here, which needs no MindFormers, have in common. Only `<unk>`, `<s>` and `</s>` are special; `[UNUSED_TOKEN_k]`, which
mark turns, are ordinary user-defined pieces, which SentencePiece finds in any text. Both kinds are control pieces here:
a plain text that spells one is cut inside of it, so that its ids hold none and still decode to the same text. Ids are
always looked up by piece, so any SentencePiece model with these pieces works.
"""
from __future__ import annotations

import codecs
import json
import os
import re
import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

import sentencepiece

from mindformers_ixc.errors import ConfigError, PromptError
from mindformers_ixc.files import read_json, write_whole
from mindformers_ixc.processing.prompt import check_text
from mindformers_ixc.resources import resolve_model, resolve_path

VOCAB_FILES_NAMES = {"vocab_file": "tokenizer.model"}

# The class the public tokenizer_config.json names.
PUBLIC_CLASS_NAME = "InternLMXComposer2Tokenizer"

SETTINGS_FILE = "tokenizer_config.json"
SPECIAL_NAMES = ("unk_token", "bos_token", "eos_token", "pad_token")

# Pieces that the model file has for marks of turns and the like, beside the special tokens.
_UNUSED = re.compile(r"\[UNUSED_TOKEN_\d+\]")


class SentencePieceText:
    """Text to ids and back by a SentencePiece model whose special tokens are pieces of it.

    A class with this one as its base has `convert_tokens_to_ids`, `tokenize`, `decode` and the special tokens.

    Attributes:
        vocab_file: path of the SentencePiece model.
        sp_model: the model.
        longest_piece: characters of its longest piece; a text has no fewer tokens than its length over this.
        add_bos_token: whether `<s>` is put in front when special tokens are asked for.
        add_eos_token: whether `</s>` is put at the end then.
    """

    vocab_file: str
    sp_model: sentencepiece.SentencePieceProcessor
    add_bos_token: bool
    add_eos_token: bool
    unk_token: str
    bos_token: str
    eos_token: str
    pad_token: str

    if TYPE_CHECKING:    # what the class has that this one is a base of
        def __len__(self) -> int: ...

        @property
        def bos_token_id(self) -> int: ...

        @property
        def eos_token_id(self) -> int: ...

        @property
        def pad_token_id(self) -> int: ...

        def tokenize(self, text: str) -> list[str]: ...

        @overload
        def convert_tokens_to_ids(self, tokens: str) -> int: ...

        @overload
        def convert_tokens_to_ids(self, tokens: list[str]) -> list[int]: ...

        def convert_tokens_to_ids(self, tokens: str | list[str]) -> int | list[int]: ...

        def decode(self, ids: Sequence[int], skip_special_tokens: bool = False) -> str: ...

    def load(self, vocab_file: str, sp_model_kwargs: dict | None = None) -> None:
        """Reads the SentencePiece model.

        Args:
            vocab_file: a path or `pkg:package/file`.
            sp_model_kwargs: options of `sentencepiece.SentencePieceProcessor`.

        Raises:
            FileNotFoundError: when the file is missing.
            ConfigError: when it is no SentencePiece model.
        """
        path = find_vocab_file(vocab_file)
        self.vocab_file = str(path)
        self.sp_model = sentencepiece.SentencePieceProcessor(**(sp_model_kwargs or {}))
        try:
            self.sp_model.Load(self.vocab_file)
        except (RuntimeError, OSError) as error:
            if "null character" in str(error):      # 0.2.2 refuses the public model, others read it
                raise ConfigError(f"sentencepiece {sentencepiece.__version__} does not read {path}, which has a piece "
                                  "with a null character as the public model's; install another release by pip "
                                  "install \"sentencepiece!=0.2.2\".") from error
            raise ConfigError(f"{path} is no SentencePiece model, or it is damaged.") from error
        self._control: tuple[tuple[str, ...], re.Pattern, frozenset[int]] | None = None
        pieces = self.sp_model.IdToPiece(list(range(self.vocab_size)))
        self._unused = tuple(filter(_UNUSED.fullmatch, pieces))
        self.longest_piece: int = max(map(len, pieces))

    @property
    def vocab_size(self) -> int:
        """Pieces of the SentencePiece model, special ones included."""
        return self.sp_model.get_piece_size()

    @property
    def control_pieces(self) -> tuple[str, ...]:
        """Every piece that no plain text may become: the special tokens and the model's `[UNUSED_TOKEN_k]`."""
        added = getattr(self, "added_tokens_decoder", {}).values()
        special = (str(token) for token in added if token.special)
        return (*dict.fromkeys((*(getattr(self, name) for name in SPECIAL_NAMES), *special)), *self._unused)

    def _tokenize(self, text: str, **kwargs: object) -> list[str]:
        return self.sp_model.encode(check_text(text, "A text for the tokenizer"), out_type=str)

    def _convert_token_to_id(self, token: str) -> int:
        return self.sp_model.piece_to_id(token)

    def _convert_id_to_token(self, index: int) -> str:
        return self.sp_model.IdToPiece(index)

    def encode_text(self, text: str, add_bos: bool = False, control_tokens: bool = False) -> list[int]:
        """Ids of a text.

        Args:
            text: as a user, a file or a model wrote it.
            add_bos: put `<s>` in front.
            control_tokens: what is spelled like a control piece becomes one, as in the public code. Otherwise it is
                text like any other: the ids hold no control piece and decode to the text.

        Raises:
            PromptError: when it is no text, has half of a surrogate pair, or cannot be kept free of control pieces.
        """
        check_text(text, "A text for the tokenizer")
        ids = self._ids(text) if control_tokens else self._plain_ids(text)
        return [self.bos_token_id, *ids] if add_bos else ids

    def _ids(self, text: str) -> list[int]:
        return self.convert_tokens_to_ids(self.tokenize(text)) if text else []

    def _plain_ids(self, text: str) -> list[int]:
        pieces = self.control_pieces
        if self._control is None or self._control[0] != pieces:
            found = {self.convert_tokens_to_ids(piece) for piece in pieces if len(piece) > 1}
            self._control = pieces, _spelled(pieces), frozenset(found - {self.convert_tokens_to_ids(self.unk_token)})
        _, spelled, control = self._control
        cuts = [0, *(match.start() + 1 for match in spelled.finditer(text)), len(text)]
        ids = [index for start, end in zip(cuts, cuts[1:]) for index in self._ids(text[start:end])]
        if not control.isdisjoint(ids):     # a model with a normaliser finds pieces in what is not spelled like them
            piece = self._convert_id_to_token(min(control.intersection(ids)))
            raise PromptError(f"The tokenizer makes the control piece {piece} of a text that does not spell it, so "
                              f"{self.vocab_file} is not the model's own; put that in its place.")
        return ids

    def convert_tokens_to_string(self, tokens: list[str]) -> str:
        """Joins pieces; special tokens are not decoded by SentencePiece and have a space before them."""
        specials = {self.unk_token, self.bos_token, self.eos_token, self.pad_token}
        pieces: list[str] = []
        text, after_special = "", False
        for token in tokens:
            if token in specials:
                if not after_special:
                    text += " "
                text += self.sp_model.decode(pieces) + token
                pieces, after_special = [], True
            else:
                pieces.append(token)
                after_special = False
        return text + self.sp_model.decode(pieces)

    def save_pretrained(self, save_directory: str, save_name: str = "", file_format: str = "json",
                        save_json: bool = True, **kwargs: object) -> None:
        """Writes `tokenizer.model` and `tokenizer_config.json`, in the form of the public model directory.

        Args:
            save_directory: made if missing.
            save_name: as in MindFormers; unused, the public names are fixed.
            file_format: as in MindFormers; only JSON is written.
            save_json: as in MindFormers; only JSON is written.
            **kwargs: ignored.
        """
        os.makedirs(save_directory, exist_ok=True)
        fields = {"tokenizer_class": PUBLIC_CLASS_NAME, "add_bos_token": self.add_bos_token,
                  "add_eos_token": self.add_eos_token, "clean_up_tokenization_spaces": False}
        fields.update({name: str(getattr(self, name)) for name in SPECIAL_NAMES})
        write_whole(Path(save_directory) / SETTINGS_FILE, json.dumps(fields, indent=2) + "\n")
        self.save_vocabulary(save_directory)

    def save_vocabulary(self, save_directory: str, filename_prefix: str | None = None) -> tuple[str]:
        """Copies the SentencePiece model into a directory.

        Raises:
            NotADirectoryError: when there is no such directory.
        """
        if not os.path.isdir(save_directory):
            raise NotADirectoryError(f"{save_directory} is not a directory.")
        name = VOCAB_FILES_NAMES["vocab_file"]
        target = Path(save_directory) / (f"{filename_prefix}-{name}" if filename_prefix else name)
        if target.resolve() != Path(self.vocab_file).resolve():
            shutil.copyfile(self.vocab_file, target)
        return (str(target),)


class Tokenizer(SentencePieceText):
    """The tokenizer of a model, without MindFormers; ids and texts are those of `registration.InternLM2Tokenizer`.

    Args:
        vocab_file: SentencePiece model, a path or `pkg:package/file`.
        unk_token: piece of unknown characters.
        bos_token: piece that begins a text.
        eos_token: piece that ends a text.
        pad_token: piece that pads; the public model pads with `</s>`.
        add_bos_token: kept for `save_pretrained`, as the next.
        add_eos_token: see `SentencePieceText`.

    Raises:
        FileNotFoundError: when `vocab_file` is missing.
        ConfigError: when it is no SentencePiece model, or lacks one of the special tokens.
    """

    def __init__(self, vocab_file: str, unk_token: str = "<unk>", bos_token: str = "<s>", eos_token: str = "</s>",
                 pad_token: str = "</s>", add_bos_token: bool = True, add_eos_token: bool = False):
        self.load(vocab_file)
        self.unk_token, self.bos_token, self.eos_token, self.pad_token = unk_token, bos_token, eos_token, pad_token
        self.add_bos_token, self.add_eos_token = add_bos_token, add_eos_token
        self._special = dict.fromkeys((unk_token, bos_token, eos_token, pad_token))
        # the longest first, so that none is taken for the beginning of another
        pieces = sorted(self._special, key=len, reverse=True)
        unknown = [token for token in pieces if token != unk_token
                   and self._convert_token_to_id(token) == self.sp_model.unk_id()]
        if unknown:
            raise ConfigError(f"{self.vocab_file} has no piece {unknown[0]!r}, which the tokenizer's settings name.")
        self._split = re.compile("(" + "|".join(map(re.escape, pieces)) + ")")
        self.special_ids = {self._convert_token_to_id(token) for token in self._special}

    @classmethod
    def from_directory(cls, directory: str | os.PathLike) -> Tokenizer:
        """The tokenizer of a model directory: `tokenizer.model`, and `tokenizer_config.json` where there is one.

        Raises:
            FileNotFoundError: when the directory has no `tokenizer.model`.
            ConfigError: when one of the two is damaged.
        """
        directory = resolve_model(directory)
        path = directory / SETTINGS_FILE
        fields = _read_settings(path)
        options: dict[str, Any] = {name: _content(fields[name], name, path) for name in SPECIAL_NAMES
                                   if fields.get(name) is not None}
        for name in ("add_bos_token", "add_eos_token"):
            if fields.get(name) is not None:
                if not isinstance(fields[name], bool):
                    raise ConfigError(f"{path}: {name} must be true or false, found {fields[name]!r:.40}.")
                options[name] = fields[name]
        return cls(str(directory / VOCAB_FILES_NAMES["vocab_file"]), **options)

    @property
    def bos_token_id(self) -> int:
        """Id of `bos_token`, which begins a text."""
        return self._convert_token_to_id(self.bos_token)

    @property
    def eos_token_id(self) -> int:
        """Id of `eos_token`, which ends a training text."""
        return self._convert_token_to_id(self.eos_token)

    @property
    def pad_token_id(self) -> int:
        """Id of `pad_token`, which image positions hold too."""
        return self._convert_token_to_id(self.pad_token)

    def __len__(self) -> int:
        """`vocab_size`: no token is added beside the pieces."""
        return self.vocab_size

    def tokenize(self, text: str) -> list[str]:
        """Pieces of a text; special tokens written out in it are pieces of their own."""
        pieces: list[str] = []
        for part in self._split.split(check_text(text, "A text for the tokenizer")):
            if part in self._special:
                pieces.append(part)
            elif part:
                pieces += self._tokenize(part)
        return pieces

    @overload
    def convert_tokens_to_ids(self, tokens: str) -> int: ...

    @overload
    def convert_tokens_to_ids(self, tokens: list[str]) -> list[int]: ...

    def convert_tokens_to_ids(self, tokens: str | list[str]) -> int | list[int]:
        """The id of a piece, or those of a list of pieces."""
        if isinstance(tokens, str):
            return self._convert_token_to_id(tokens)
        return [self._convert_token_to_id(token) for token in tokens]

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = False) -> str:
        """Text of token ids, special tokens written out unless they are to be skipped."""
        kept = [int(index) for index in ids]
        if skip_special_tokens:
            kept = [index for index in kept if index not in self.special_ids]
        return self.convert_tokens_to_string([self._convert_id_to_token(index) for index in kept]) if kept else ""


def _content(token: object, name: str, path: Path) -> str:
    """Text of a special token, which Hugging Face's files may describe by a mapping."""
    text = token.get("content") if isinstance(token, dict) else token
    if not isinstance(text, str) or not text:
        raise ConfigError(f"{path}: {name} must be a text, or an object with a text 'content', found {token!r:.60}.")
    return text


def check_directory(directory: str | os.PathLike) -> None:
    """Says what is wrong with the tokenizer of a model directory before MindFormers reads it, which names no file.

    Raises:
        FileNotFoundError: when it has no `tokenizer.model`.
        ConfigError: when one of its settings files is damaged, or begins with a byte order mark, which MindFormers does
            not read.
    """
    vocabulary = Path(directory) / VOCAB_FILES_NAMES["vocab_file"]
    if not vocabulary.is_file():
        raise FileNotFoundError(_missing(vocabulary, str(vocabulary)))
    for name in (SETTINGS_FILE, "added_tokens.json", "special_tokens_map.json"):
        path = Path(directory) / name
        _read_settings(path)
        if path.is_file() and path.read_bytes().startswith(codecs.BOM_UTF8):
            raise ConfigError(f"{path} begins with a byte order mark, which MindFormers does not read; save it without "
                              "one.")


def _read_settings(path: Path) -> dict[str, Any]:
    """Content of a settings file; empty where there is none."""
    fields = read_json(path, ConfigError) if path.is_file() else {}
    if not isinstance(fields, dict):
        raise ConfigError(f"{path} must hold a JSON object, found {type(fields).__name__}.")
    return fields


def find_vocab_file(name: str | None) -> Path:
    """The path of a SentencePiece model that is named by a path or `pkg:package/file`.

    Raises:
        FileNotFoundError: when it is not there, or none is named.
    """
    if not name:
        raise FileNotFoundError("The tokenizer has no vocab_file; give the path of a tokenizer.model, in a YAML as "
                                "train_dataset.tokenizer.vocab_file. The public model's folder has one.")
    path = resolve_path(name)
    if not path.is_file():
        raise FileNotFoundError(_missing(path, name))
    return path


def _missing(path: Path, name: str) -> str:
    """The sentence for a SentencePiece model that is not there."""
    sentence = f"The tokenizer file {name} does not exist"
    if (path.parent / "tokenizer.json").is_file():
        return (f"{sentence}. {path.parent} has a tokenizer.json, which is not read: put the public model's "
                f"{VOCAB_FILES_NAMES['vocab_file']} beside it.")
    return f"{sentence}."


def _spelled(pieces: Iterable[str]) -> re.Pattern:
    """Finds every place where the spelling of a piece begins, inside another spelling too.

    A spelling of one character cannot be cut; it is text wherever it stands.
    """
    # the one behind the first letter is what makes a search through long texts fast
    letters = dict[str, list[str]]()
    for piece in pieces:
        if len(piece) > 1:
            letters.setdefault(piece[0], []).append(re.escape(piece[1:]))
    return re.compile("|".join(f"{re.escape(letter)}(?={'|'.join(rests)})" for letter, rests in letters.items())
                      or "(?!)")
