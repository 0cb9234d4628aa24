"""Tokens as texts that can be looked at, and one sample of `mindformers data preview` on the terminal."""
from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from mindformers_ixc.data.preview import GIVEN, LEARNT, PICTURE, Board, Look, Seen, Stretch
from mindformers_ixc.data.preview_data import Data, Entry, Reader
from mindformers_ixc.processing.tokenizer import SentencePieceText

# Tokens of a text that are shown at most on a terminal.
TOKENS = 4000

# What a stretch of positions is called.
WORDS = {PICTURE: "picture", LEARNT: "loss", GIVEN: "no loss"}

_BYTE = re.compile(r"<0x([0-9A-F]{2})>")


def token_texts(tokenizer: SentencePieceText, ids: Sequence[int]) -> list[tuple[str, list[int]]]:
    """The texts of tokens, with their ids; a sign that was cut into bytes is one text of several tokens.

    Args:
        tokenizer: their pieces.
        ids: of the tokens.
    """
    pieces = tokenizer.sp_model.IdToPiece(list(ids)) if ids else []
    found, place = list[tuple[str, list[int]]](), 0
    while place < len(ids):
        shown, count = _sign(pieces[place:place + 4])
        found.append((shown, list(ids[place:place + count])))
        place += count
    return found


def _sign(pieces: list[str]) -> tuple[str, int]:
    """The text of the first piece, or of the first few if they are the bytes of one sign."""
    values = list[int]()
    for piece in pieces:
        match = _BYTE.fullmatch(piece)
        if match is None:
            break
        values.append(int(match[1], 16))
    for count in range(1, len(values) + 1):
        try:
            return bytes(values[:count]).decode("utf-8"), count
        except UnicodeDecodeError:
            continue
    return (f"\\x{values[0]:02x}", 1) if values else (pieces[0].replace("\u2581", " "), 1)


def visible(shown: str, newline: str) -> str:
    """A text in which every sign can be seen; a line's end becomes `newline`."""
    return "".join(newline if sign == "\n" else sign if sign.isprintable() else ascii(sign)[1:-1] for sign in shown)


def clipped(stretches: Sequence[Stretch], tokens: int) -> Iterator[tuple[Stretch, int]]:
    """Stretches of at most so many tokens of text; of more the first and the last ones.

    Yields:
        Stretches, and the positions that are left out before each.
    """
    total = sum(len(one.ids) for one in stretches if one.kind != PICTURE)
    if total <= tokens:
        yield from ((one, 0) for one in stretches)
        return
    head, tail, place, gap = tokens // 2, total - (tokens - tokens // 2), 0, 0
    for one in stretches:
        if one.kind == PICTURE:
            yield one, gap
            gap = 0
            continue
        start, place = place, place + len(one.ids)
        first, last = min(place, head), max(start, tail)
        if start < first:
            yield Stretch(one.kind, one.first, one.ids[:first - start]), gap
            gap = 0
        gap += max(0, min(place, tail) - max(start, head))
        if last < place:
            yield Stretch(one.kind, one.first + last - start, one.ids[last - start:]), gap
            gap = 0


def sample_lines(data: Data, found: Look) -> Iterator[str]:
    """The lines of one sample on the terminal."""
    entry, reader = found.entry, data.reader
    yield f"sample {entry.number}: {entry.where}"
    yield f"  {verdict(reader, entry)}"
    if found.problem:
        yield f"  {found.problem}"
    for number, board in enumerate(found.boards, 1):
        yield f"  picture {number}: {Path(str(board.path)).name}, {picture_text(board)}"
    for name, seen in zip(("chosen: ", "rejected: ") if len(found.seen) > 1 else ("",), found.seen):
        yield f"  {name}{counts(seen)}"
        number = 0
        for stretch, missing in clipped(seen.stretches, TOKENS):
            if missing:
                yield f"    ... {missing} positions of text that are not shown"
            last = stretch.first + len(stretch.ids) - 1
            number += stretch.kind == PICTURE
            shown = str(number) if stretch.kind == PICTURE else "".join(
                visible(part, "\\n") for part, _ in token_texts(reader.processor.tokenizer, stretch.ids))
            yield f"    {f'{stretch.first}-{last}':>11}  {WORDS[stretch.kind]:7}  {shown}"


def picture_text(board: Board) -> str:
    """The sizes of a picture, in words."""
    width, height = board.size
    rows, columns = board.grid
    video = " board of a video's frames" if board.video else ""
    resized = "" if board.resized is None else f" -> {board.resized[0]} x {board.resized[1]}"
    local = "1 tile" if board.grid.tiles == 1 else f"{rows} x {columns} tiles" if min(rows, columns) > 1 \
        else f"{board.grid.tiles} tiles"
    return f"{width} x {height}{video}{resized}, {local} and the global view, {board.positions} positions"


def counts(seen: Seen) -> str:
    """Positions, those with loss, and tiles of a conversation, in words."""
    share = 100 * seen.supervised / seen.positions
    return (f"{seen.positions:,} positions, {seen.supervised:,} of them with loss ({share:.2g}%), "
            f"{seen.encoded.tiles} tiles")


def verdict(reader: Reader, entry: Entry) -> str:
    """Whether a row holds a sample."""
    needed = f"{entry.positions:,} positions and {entry.tiles} tiles"
    row = f"{reader.longest:,} and {reader.budget.max_tiles}"
    if entry.kept == entry.rounds:
        return f"fits a row of {row.replace(' and', ' positions and')} tiles"
    if entry.kept:
        return (f"cut: of its {entry.rounds} question-answer pairs the first {entry.kept} fit; whole it takes "
                f"{needed}, where a row has {row}")
    what = "it does not fit" if entry.rounds == 1 else \
        f"not even the first of its {entry.rounds} question-answer pairs fits"
    return f"left out: {what}; whole it takes {needed}, where a row has {row}"
