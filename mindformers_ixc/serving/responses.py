"""Answers in OpenAI's form: whole, or as chunks of a stream."""
from __future__ import annotations

import json
import secrets
import time
from collections.abc import Sequence
from typing import Any

from mindformers_ixc.processing.processor import ImageProcessor
from mindformers_ixc.processing.tokenizer import SentencePieceText
from mindformers_ixc.serving.answering import Likelihood, Piece
from mindformers_ixc.serving.settings import ServerSettings

# What is said of pictures: arguments of `ImageProcessor`.
IMAGE_KEYS = ("image_size", "patch_size", "hd_num", "hd_num_several", "transparency", "exif")

# What a piece of SentencePiece begins with that follows a space, and one that stands for a byte.
SPACE, BYTE = "\u2581", "<0x"


def new_id() -> str:
    """Of an answer."""
    return f"chatcmpl-{secrets.token_hex(12)}"


class Form:
    """The answers to one request.

    Args:
        model: as the client calls it.
        tokenizer: shows tokens.
    """

    def __init__(self, model: str, tokenizer: SentencePieceText):
        self.id, self.model, self.created, self.tokenizer = new_id(), model, int(time.time()), tokenizer

    def whole(self, texts: Sequence[str], finished: Sequence[str], likelihoods: Sequence[list[Likelihood] | None],
              usage: dict) -> dict:
        """All answers at once."""
        choices = [{"index": number, "message": {"role": "assistant", "content": text, "refusal": None},
                    "logprobs": self.logprobs(shown), "finish_reason": why}
                   for number, (text, why, shown) in enumerate(zip(texts, finished, likelihoods))]
        return {**self._head("chat.completion"), "choices": choices, "usage": usage}

    def begin(self, number: int, with_usage: bool) -> dict:
        """The first chunk of an answer."""
        return self._chunk(number, {"role": "assistant", "content": "", "refusal": None}, None, None, with_usage)

    def chunk(self, piece: Piece, with_logprobs: bool, with_usage: bool) -> list[dict]:
        """The chunks of a piece: its text, and how the answer has ended."""
        found = []
        shown = self.logprobs(piece.likelihoods) if with_logprobs and piece.likelihoods else None
        if piece.text or shown:
            found.append(self._chunk(piece.number, {"content": piece.text}, shown, None, with_usage))
        if piece.finished:
            found.append(self._chunk(piece.number, {}, None, piece.finished, with_usage))
        return found

    def last(self, usage: dict) -> dict:
        """The chunk with the usage."""
        return {**self._head("chat.completion.chunk"), "choices": [], "usage": usage}

    def logprobs(self, likelihoods: Sequence[Likelihood] | None) -> dict | None:
        """Log-probabilities of some tokens."""
        if likelihoods is None:
            return None
        return {"content": [{**self._token(one.token, one.value),
                             "top_logprobs": [self._token(*other) for other in one.others]} for one in likelihoods],
                "refusal": None}

    def _token(self, token: int, value: float) -> dict:
        text, content = shown_token(self.tokenizer, token)
        # JSON has no infinity
        return {"token": text, "logprob": max(value, -9999.0), "bytes": list(content)}

    def _head(self, kind: str) -> dict:
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model}

    def _chunk(self, number: int, delta: dict, logprobs: dict | None, finished: str | None, with_usage: bool) -> dict:
        choice = {"index": number, "delta": delta, "logprobs": logprobs, "finish_reason": finished}
        chunk: dict[str, Any] = {**self._head("chat.completion.chunk"), "choices": [choice]}
        return {**chunk, "usage": None} if with_usage else chunk


def shown_token(tokenizer: SentencePieceText, token: int) -> tuple[str, bytes]:
    """A token's text and its bytes; a byte that is no character of its own is shown as `bytes:\\xNN`."""
    if token >= len(tokenizer):         # of a vocabulary that is padded
        return "", b""
    piece = tokenizer._convert_id_to_token(token)
    if piece.startswith(BYTE) and piece.endswith(">"):
        content = bytes([int(piece[3:-1], 16)])
        return (content.decode("ascii") if content < b"\x80" else f"bytes:\\x{content[0]:02x}"), content
    text = piece.replace(SPACE, " ")
    return text, text.encode()


def event(value: object) -> bytes:
    """A server-sent event."""
    return b"data: " + (value if isinstance(value, bytes) else json.dumps(value, ensure_ascii=False).encode()) + b"\n\n"


def models(settings: ServerSettings, images: ImageProcessor, created: int) -> dict:
    """What `/v1/models` shows."""
    return {"object": "list", "data": [model(name, settings, images, created) for name in settings.models]}


def model(name: str, settings: ServerSettings, images: ImageProcessor, created: int) -> dict:
    """One model; of its own beside OpenAI's keys: mode, positions, limits, whether control tokens are taken, a mark of
    its weights, and how pictures are cut."""
    limits = settings.limits
    return {"id": name, "object": "model", "created": created, "owned_by": "mindformers_ixc",
            "mode": settings.models[name], "max_model_len": limits.positions, "max_new_tokens": limits.new_tokens,
            "max_pictures": limits.pictures, "max_answers": limits.answers, "max_beams": limits.beams,
            "max_body_bytes": limits.body, "control_tokens": settings.control_tokens, "weights": settings.weights,
            "images": {key: getattr(images, key) for key in IMAGE_KEYS}}
