"""The SentencePiece tokenizer of InternLM2.

`SentencePieceText` is what MindFormers' tokenizer of this model (`registration.InternLM2Tokenizer`) and the `Tokenizer`
here, which needs no MindFormers, have in common. Only `<unk>`, `<s>` and `</s>` are special; `[UNUSED_TOKEN_k]`, which
mark turns, are ordinary user-defined pieces. Ids are always looked up by piece, so any SentencePiece model with these
pieces works.
"""
from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

import sentencepiece

from mindformers_ixc.resources import resolve_path

VOCAB_FILES_NAMES = {"vocab_file": "tokenizer.model"}

# The class the public tokenizer_config.json names.
PUBLIC_CLASS_NAME = "InternLMXComposer2Tokenizer"


class SentencePieceText:
    """Text to ids and back by a SentencePiece model whose special tokens are pieces of it.

    A class with this one as its base has `convert_tokens_to_ids`, `tokenize`, `decode` and the special tokens.

    Attributes:
        vocab_file: path of the SentencePiece model.
        sp_model: the model.
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
            ValueError: when it is no SentencePiece model.
        """
        path = resolve_path(vocab_file)
        if not path.is_file():
            raise FileNotFoundError(f"The tokenizer file {vocab_file} does not exist.")
        self.vocab_file = str(path)
        self.sp_model = sentencepiece.SentencePieceProcessor(**(sp_model_kwargs or {}))
        try:
            self.sp_model.Load(self.vocab_file)
        except (RuntimeError, OSError) as error:
            raise ValueError(f"{path} is no SentencePiece model, or it is damaged.") from error

    @property
    def vocab_size(self) -> int:
        """Pieces of the SentencePiece model, special ones included."""
        return self.sp_model.get_piece_size()

    def _tokenize(self, text: str, **kwargs: object) -> list[str]:
        return self.sp_model.encode(text, out_type=str)

    def _convert_token_to_id(self, token: str) -> int:
        return self.sp_model.piece_to_id(token)

    def _convert_id_to_token(self, index: int) -> str:
        return self.sp_model.IdToPiece(index)

    def encode_text(self, text: str, add_bos: bool = False) -> list[int]:
        """Ids of a text, with `<s>` in front if asked; special tokens written out in the text count as such."""
        ids = self.convert_tokens_to_ids(self.tokenize(text)) if text else []
        return [self.bos_token_id, *ids] if add_bos else ids

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
        fields.update({name: str(getattr(self, name)) for name in ("unk_token", "bos_token", "eos_token", "pad_token")})
        path = Path(save_directory) / "tokenizer_config.json"
        path.write_text(json.dumps(fields, indent=2) + "\n", encoding="utf-8")
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
        ValueError: when it is no SentencePiece model.
    """

    def __init__(self, vocab_file: str, unk_token: str = "<unk>", bos_token: str = "<s>", eos_token: str = "</s>",
                 pad_token: str = "</s>", add_bos_token: bool = True, add_eos_token: bool = False):
        self.load(vocab_file)
        self.unk_token, self.bos_token, self.eos_token, self.pad_token = unk_token, bos_token, eos_token, pad_token
        self.add_bos_token, self.add_eos_token = add_bos_token, add_eos_token
        self._special = dict.fromkeys((unk_token, bos_token, eos_token, pad_token))
        # the longest first, so that none is taken for the beginning of another
        pieces = sorted(self._special, key=len, reverse=True)
        self._split = re.compile("(" + "|".join(map(re.escape, pieces)) + ")")
        self.special_ids = {self._convert_token_to_id(token) for token in self._special}

    @classmethod
    def from_directory(cls, directory: str | os.PathLike) -> Tokenizer:
        """The tokenizer of a model directory: `tokenizer.model`, and `tokenizer_config.json` where there is one.

        Raises:
            FileNotFoundError: when the directory has no `tokenizer.model`.
            ValueError: when one of the two is damaged.
        """
        settings = Path(directory) / "tokenizer_config.json"
        options: dict[str, Any] = {}
        if settings.is_file():
            fields = json.loads(settings.read_text(encoding="utf-8"))
            names = ("unk_token", "bos_token", "eos_token", "pad_token")
            options = {name: _content(fields[name]) for name in names if fields.get(name)}
            options.update({name: fields[name] for name in ("add_bos_token", "add_eos_token") if name in fields})
        return cls(str(Path(directory) / VOCAB_FILES_NAMES["vocab_file"]), **options)

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
        for part in self._split.split(text):
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


def _content(token: str | dict[str, Any]) -> str:
    """Text of a special token, which Hugging Face's files may describe by a mapping."""
    return token["content"] if isinstance(token, dict) else token
