"""Token ids to text as they come: no character is shown before all of its bytes are there."""
from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np

# What a tokenizer decodes the bytes of an unfinished character to.
UNFINISHED = "\ufffd"


class TextTokenizer(Protocol):
    """What turning ids into text takes of a tokenizer."""

    def __len__(self) -> int:
        """Number of ids."""

    def decode(self, ids: list[int], /, *, skip_special_tokens: bool) -> str:
        """Text of ids."""


class Streamer(Protocol):
    """MindFormers' and Hugging Face's streamers: they get new ids as they come."""

    def put(self, ids: np.ndarray, /) -> None:
        """Takes the next ids, int32."""

    def end(self) -> None:
        """No more will come."""


class TextStream:
    """Turns ids into text piece by piece; the pieces joined are the text of all ids.

    Args:
        tokenizer: decodes ids.
        stop_token_ids: ids that end the text and are not shown.
        stop_strings: texts that end the text and are not shown; as long as the text's end may be the beginning of
            one, it is held back.
    """

    def __init__(self, tokenizer: TextTokenizer, stop_token_ids: Sequence[int] = (), stop_strings: Sequence[str] = ()):
        self.tokenizer = tokenizer
        self.stop_token_ids, self.stop_strings = frozenset(stop_token_ids), tuple(stop_strings)
        self.pieces = len(tokenizer)
        self.ids: list[int] = []
        self.shown = 0
        self.finished = False

    def push(self, token: int) -> str:
        """Takes one id and gives the text that is certain now, often a word, sometimes nothing."""
        if self.finished:
            return ""
        if token in self.stop_token_ids:
            return self.flush()
        if token >= self.pieces:
            return ""        # a model whose vocab_size is padded may say what its tokenizer has no piece for
        self.ids.append(token)
        text = self._text()
        cut = self._stop(text)
        if cut is not None:
            self.finished = True
            return self._show(text, cut)
        if text.endswith(UNFINISHED):
            return ""
        return self._show(text, len(text) - self._held(text))

    def flush(self) -> str:
        """Ends the text and gives what was still held back (nothing after a stop string)."""
        if self.finished:
            return ""
        self.finished = True
        text = self._text()
        return self._show(text, len(text))

    def _text(self) -> str:
        # an answer's outer white space is no part of it; the end is stripped by whoever joins the pieces
        return self.tokenizer.decode(self.ids, skip_special_tokens=True).lstrip()

    def _show(self, text: str, end: int) -> str:
        piece, self.shown = text[self.shown:end], max(self.shown, end)
        return piece

    def _stop(self, text: str) -> int | None:
        found = [text.index(stop) for stop in self.stop_strings if stop in text]
        return min(found) if found else None

    def _held(self, text: str) -> int:
        """Characters at the end that may begin a stop string."""
        return max((length for stop in self.stop_strings for length in range(1, len(stop))
                    if text.endswith(stop[:length])), default=0)
