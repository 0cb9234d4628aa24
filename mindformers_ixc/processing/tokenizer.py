"""The SentencePiece tokenizer of InternLM2, as a MindFormers tokenizer.

Only `<unk>`, `<s>` and `</s>` are special; `[UNUSED_TOKEN_k]`, which mark turns, are ordinary user-defined pieces. Ids
are always looked up by piece, so any SentencePiece model with these pieces works.
"""
from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import sentencepiece
from mindformers.models.tokenization_utils import PreTrainedTokenizer
from mindformers.tools.register import MindFormerModuleType, MindFormerRegister

from mindformers_ixc.resources import resolve_path

VOCAB_FILES_NAMES = {"vocab_file": "tokenizer.model"}

# The class the public tokenizer_config.json names.
PUBLIC_CLASS_NAME = "InternLMXComposer2Tokenizer"


@MindFormerRegister.register(MindFormerModuleType.TOKENIZER)
class InternLM2Tokenizer(PreTrainedTokenizer):
    """SentencePiece tokenizer of InternLM2 and IXC2.5.

    Args:
        vocab_file: SentencePiece model, a path or `pkg:package/file`.
        unk_token: piece of unknown characters.
        bos_token: piece that begins a text.
        eos_token: piece that ends a text.
        pad_token: piece that pads; the public model pads with `</s>`.
        add_bos_token: whether `<s>` is put in front when special tokens are asked for.
        add_eos_token: whether `</s>` is put at the end then.
        sp_model_kwargs: options of `sentencepiece.SentencePieceProcessor`.
        **kwargs: of MindFormers' tokenizer base.

    Raises:
        FileNotFoundError: when `vocab_file` is missing.
        ValueError: when it is no SentencePiece model.
    """

    vocab_files_names = VOCAB_FILES_NAMES
    model_input_names = ["input_ids", "attention_mask"]
    _support_list = []

    def __init__(self, vocab_file: str, unk_token: str = "<unk>", bos_token: str = "<s>", eos_token: str = "</s>",
                 pad_token: str = "</s>", add_bos_token: bool = True, add_eos_token: bool = False,
                 sp_model_kwargs: dict | None = None, **kwargs):
        path = resolve_path(vocab_file)
        if not path.is_file():
            raise FileNotFoundError(f"The tokenizer file {vocab_file} does not exist.")
        self.vocab_file = str(path)
        self.sp_model = sentencepiece.SentencePieceProcessor(**(sp_model_kwargs or {}))
        try:
            self.sp_model.Load(self.vocab_file)
        except (RuntimeError, OSError) as error:
            raise ValueError(f"{path} is no SentencePiece model, or it is damaged.") from error
        self.add_bos_token, self.add_eos_token = add_bos_token, add_eos_token
        kwargs.setdefault("clean_up_tokenization_spaces", False)
        super().__init__(unk_token=unk_token, bos_token=bos_token, eos_token=eos_token, pad_token=pad_token,
                         add_bos_token=add_bos_token, add_eos_token=add_eos_token, **kwargs)

    @property
    def vocab_size(self) -> int:
        """Number of pieces."""
        return self.sp_model.get_piece_size()

    def __len__(self) -> int:
        """Number of ids; the special tokens are pieces of the model, not added to it."""
        return max([self.vocab_size, *(index + 1 for index in self.added_tokens_decoder)])

    def get_vocab(self) -> dict[str, int]:
        """All pieces with their ids."""
        vocab = {self.sp_model.IdToPiece(i): i for i in range(self.vocab_size)}
        vocab.update(self.added_tokens_encoder)
        return vocab

    def _tokenize(self, text: str, **kwargs) -> list[str]:
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
        pieces, text, after_special = [], "", False
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

    def build_inputs_with_special_tokens(self, token_ids_0, token_ids_1=None):
        """Adds `<s>` and `</s>` as configured; a second text follows the first directly."""
        ids = ([self.bos_token_id] if self.add_bos_token else []) + list(token_ids_0) + list(token_ids_1 or [])
        return ids + ([self.eos_token_id] if self.add_eos_token else [])

    def get_special_tokens_mask(self, token_ids_0, token_ids_1=None, already_has_special_tokens=False):
        """1 for `<s>` and `</s>` added by `build_inputs_with_special_tokens`, else 0."""
        if already_has_special_tokens:
            return super().get_special_tokens_mask(token_ids_0, token_ids_1, already_has_special_tokens=True)
        middle = [0] * (len(token_ids_0) + len(token_ids_1 or []))
        return [1] * self.add_bos_token + middle + [1] * self.add_eos_token

    def create_token_type_ids_from_sequences(self, token_ids_0, token_ids_1=None):
        """Zeros: the model has no token types."""
        return [0] * len(self.build_inputs_with_special_tokens(token_ids_0, token_ids_1))

    def save_pretrained(self, save_directory: str, save_name: str = "", file_format: str = "json",
                        save_json: bool = True, **kwargs) -> None:
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


@MindFormerRegister.register(MindFormerModuleType.TOKENIZER)
class InternLMXComposer2Tokenizer(InternLM2Tokenizer):
    """The same tokenizer under the name of the public `tokenizer_config.json`."""
