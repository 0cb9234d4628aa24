"""The page of `mindformers data preview`: what the data is, and samples as the model sees them."""
from __future__ import annotations

import base64
import io
import math
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
from PIL import Image

from mindformers_ixc.cli.preview_text import clipped, counts, picture_text, token_texts, verdict, visible
from mindformers_ixc.data.advice import histogram as ranges
from mindformers_ixc.data.preview import GIVEN, LEARNT, PICTURE, Board, Look, Seen, Stretch
from mindformers_ixc.data.preview_data import Data, Entry, file_names
from mindformers_ixc.pages import drawing
from mindformers_ixc.pages.page import cards, facts, page, section, table, text, values
from mindformers_ixc.processing.tokenizer import SentencePieceText

# Bounds of the page: tokens of text that are shown of all samples and of each, bytes of all pictures in base64,
# pictures of a sample, problems, and characters of what a run leaves out of a sample.
ALL_TOKENS, TOKENS, FEWEST_TOKENS = 36_000, 4_000, 300
ALL_PICTURE_BYTES = 1_200_000
PICTURES, PROBLEMS, CHARACTERS = 4, 20, 3_000

# Pixels of a picture in the page, in all and along its longer side; and the qualities of JPEG that are tried.
AREA, SIDE, QUALITIES = 400 * 400, 1600, (82, 65, 45)

# Sides of a board as it is shown, in pixels: the longer one, and the shorter one at least; and of a global view.
LONG, SHORT, VIEW = 300, 96, 84

BARS = 30

LEGEND = {LEARNT: "with loss: the model learns to predict it", GIVEN: "without loss",
          PICTURE: "positions of a picture"}


def preview_page(data: Data, looks: list[Look], how: Mapping[str, object], note: str) -> str:
    """The page.

    Args:
        data: what was read.
        looks: samples to be shown.
        how: names and values of the settings that it was read by.
        note: a sentence about them.
    """
    title = file_names(data)
    pieces: dict[int, str] = {}
    samples = "".join(_samples(data, looks, pieces))
    body = (f'<h1>{text(title)}</h1><p class="sub">{text(note)}</p>{cards(headline(data))}'
            + section("The data", _summary(data), _sources(data), f"<details><summary>How it is read</summary>"
                      f"{facts(how)}</details>")
            + section("Samples that cannot be used", _problems(data, looks))
            + section("Samples", f'<p class="note">{text(_choice(data, looks))}</p>', _legend(), samples))
    return page(title, body + values("pieces", pieces))


def headline(data: Data) -> dict[str, object]:
    """The numbers of the data that are looked at first."""
    known, drawn = data.known, data.looked_at < data.count
    fitted, usable = len(known.numbers) + len(data.uncut), len(known.numbers)
    cut, out = int(((known.kept > 0) & (known.kept < known.rounds)).sum()), int((known.kept == 0).sum())
    found: dict[str, object] = {"preference pairs" if data.reader.pairs else "samples": f"{data.count:,}"}
    if drawn:
        found["read"] = f"{data.looked_at:,}"
    if data.named:
        return found             # of the samples themselves more is said
    # an index does not know whether two samples have one file
    pictures = "pictures" if data.indexed is None else "uses of pictures"
    found |= {pictures: f"{data.pictures:,}", "questions": f"{data.questions:,}",
              "without a picture": _share(data.text_only, usable, True) if drawn else f"{data.text_only:,}",
              "cut": _share(cut, fitted, drawn), "left out": _share(out + len(data.uncut), fitted, drawn)}
    if data.problems:
        found["not usable"] = _share(len(data.problems), data.looked_at, drawn)
    return found


def _is_cut(entry: Entry) -> bool:
    return 0 < entry.kept < entry.rounds


def _share(part: int, whole: int, drawn: bool = False) -> str:
    """A number, and its share where it is not 0; of samples that were drawn the share alone tells something."""
    if drawn:
        return f"{part / whole:.1%} of {whole:,}"
    return f"{part:,} ({part / whole:.1%})" if part else "0"


def _summary(data: Data) -> str:
    """Histograms of what samples take, and of how many of them."""
    if data.named:
        return f'<p class="note">{text(f"Of the {data.count:,} samples only those that are named were read.")}</p>'
    known, parts = data.known, []
    for name, found, limit in (("positions", known.positions, data.reader.longest),
                               ("tiles", known.tiles, data.reader.budget.max_tiles)):
        most = int(np.argmax(found))
        drawn = drawing.histogram(name, _ranges(found, limit), limit, "a row holds", "sample")
        caption = f"mean {np.mean(found):,.1f}, the most {found[most]:,} (sample {known.numbers[most]})"
        parts.append(f'<div class="chart"><h3>{name.capitalize()} of a sample</h3>{drawn}'
                     f'<p class="note">{text(caption)}</p></div>')
    drawn_of = "" if data.looked_at == data.count else (
        f'<p class="note">Of the {data.count:,} samples {data.looked_at:,}, drawn by chance, were read; mindformers '
        "data check looks at all of them.</p>")
    return f'<div class="charts">{"".join(parts)}</div>{drawn_of}'


def _ranges(found: np.ndarray, limit: int) -> Iterator[tuple[int, int, int]]:
    """Ranges of a histogram, the one with the limit in it cut behind it, and the last one at the highest value."""
    for first, last, _ in ranges(found, BARS):
        last = min(last, int(found.max()))
        for low, high in ((first, limit), (limit + 1, last)) if first <= limit < last else ((first, last),):
            yield low, high, int(((found >= low) & (found <= high)).sum())


def _sources(data: Data) -> str:
    """The files, where there are several or a list file says how much of them is taken."""
    if len(data.sources) == 1 and data.sources[0].taken is None:
        return ""
    rows = ([Path(source.name).name, f"{source.count:,}", f"{source.first:,} to {source.first + source.count - 1:,}",
             "all, once" if source.taken is None else f"{source.taken:,} an epoch"] for source in data.sources)
    return table(["source", "samples", "their numbers", "taken"], rows)


def _problems(data: Data, looks: list[Look]) -> str:
    """Samples that a run leaves out, or that stop it where they are many; also those shown with damaged pictures."""
    lines = [(number, "leaves it out, up to max_bad_share", sentence) for number, sentence in data.problems]
    lines += [(number, "leaves it out", sentence) for number, sentence in data.uncut]
    lines += [(found.entry.number, "leaves it out", found.problem) for found in looks if found.problem]
    more = f'<p class="note">and {len(lines) - PROBLEMS:,} more</p>' if len(lines) > PROBLEMS else ""
    return table(["sample", "a run", "why"], sorted(lines)[:PROBLEMS], range(3)) + more if lines else ""


def _choice(data: Data, looks: list[Look]) -> str:
    shown, usable = len(looks), data.count if data.looked_at < data.count else len(data.known.numbers)
    start = "All of them." if shown == usable else f"{shown} of {usable:,}; --sample N shows the one of that number."
    return f"{start} Hold the pointer over a token or a tile. Numbers and positions are counted from 0."


def _legend() -> str:
    keys = "".join(f'<span class="key"><span class="dot {kind}"></span>{text(name)}</span>'
                   for kind, name in LEGEND.items())
    return f'<div class="legend">{keys}</div>'


def _samples(data: Data, looks: list[Look], pieces: dict[int, str]) -> Iterator[str]:
    """The samples, one after the other; `pieces` gets the pieces of all tokens that are shown."""
    tokens = max(FEWEST_TOKENS, min(TOKENS, ALL_TOKENS // max(1, sum(len(found.seen) for found in looks))))
    pictures = sum(min(PICTURES, len(found.boards)) for found in looks)
    for found in looks:
        yield _sample(data, found, tokens, ALL_PICTURE_BYTES // max(1, pictures), pieces)


def _sample(data: Data, found: Look, tokens: int, picture_bytes: int, pieces: dict[int, str]) -> str:
    entry = found.entry
    sample, tokenizer = entry.sides[0], data.reader.processor.tokenizer
    fits = entry.kept == entry.rounds
    head = (f'<h3>Sample {entry.number}</h3><span class="note" title="{text(sample.source)}">'
            f"{text(Path(sample.source).name)}, sample {sample.index}, id {text(sample.id)}</span>")
    lines = f'<p class="{"note" if fits else "bad"}">{text(verdict(data.reader, entry).capitalize())}</p>'
    lines += f'<p class="bad">{text(found.problem)}</p>' if found.problem else ""
    boards = "".join(_board(board, f"{entry.number}-{number}", number, picture_bytes)
                     for number, board in enumerate(found.boards[:PICTURES], 1))
    more = len(found.boards) - PICTURES
    boards += f'<p class="note">and {more} more picture{"s" * (more > 1)}</p>' if more > 0 else ""
    names = ("chosen", "rejected") if len(found.seen) > 1 else ("",)
    talks = "".join(_talk(name, seen, tokens, tokenizer, pieces) for name, seen in zip(names, found.seen))
    left = f'<div class="boards">{boards}</div>' if boards else ""
    return (f'<article class="sample" id="sample-{entry.number}"><header>{head}</header>{lines}'
            f'<div class="{"pair" if boards else ""}">{left}<div>{talks}{_rest(found)}</div></div></article>')


def _talk(name: str, seen: Seen, tokens: int, tokenizer: SentencePieceText, pieces: dict[int, str]) -> str:
    """The tokens of a conversation."""
    inside, number = "", 0
    for stretch, missing in clipped(seen.stretches, tokens):
        inside += f'<em>... {missing:,} positions of text that are not shown ...</em>\n' if missing else ""
        number += stretch.kind == PICTURE
        inside += _picture_span(stretch, number, seen) if stretch.kind == PICTURE else \
            _text_span(stretch, tokenizer, pieces)
    warning = "" if seen.supervised else '<p class="bad">Nothing in it carries loss: a run refuses it.</p>'
    before = f"<strong>{name}</strong>: " if name else ""
    return f'<p class="counts">{before}{counts(seen)}</p>{warning}<div class="tokens">{inside}</div>'


def _picture_span(stretch: Stretch, number: int, seen: Seen) -> str:
    first, count = stretch.first, len(stretch.ids)
    grid = seen.encoded.grids[number - 1]
    tip = (f"picture {number}: positions {first} to {first + count - 1}\nthe global view and {grid.tiles} tiles, with "
           "separators between their rows")
    return f'<b class="{PICTURE}" data-tip="{text(tip)}">picture {number}: {count:,} positions</b>'


def _text_span(stretch: Stretch, tokenizer: SentencePieceText, pieces: dict[int, str]) -> str:
    """Tokens of a kind; the page's program counts their positions from that of the first."""
    inside = []
    for shown, ids in token_texts(tokenizer, stretch.ids):
        for one in ids:
            if one not in pieces:
                pieces[one] = tokenizer.sp_model.IdToPiece(one)
        mark = " class=mark" if len(ids) == 1 and pieces[ids[0]] in tokenizer.control_pieces else ""
        numbers = str(ids[0]) if len(ids) == 1 else f'"{" ".join(map(str, ids))}"'
        inside.append(f"<i{mark} data-t={numbers}>{text(visible(shown, chr(0x21b5) + chr(10)))}</i>")
    return f'<span class="{stretch.kind}" data-p="{stretch.first}">{"".join(inside)}</span>'


def _rest(found: Look) -> str:
    """What a run leaves out of a conversation, as text."""
    entry = found.entry
    if found.seen and not _is_cut(entry):
        return ""
    system = entry.sides[0].turns[0][0] == "system"
    turns = entry.sides[0].turns[system + 2 * entry.kept if entry.kept else 0:]
    whole = "\n".join(f"{role}: {said}" for role, said in turns)
    shown = whole if len(whole) <= CHARACTERS else \
        f"{whole[:CHARACTERS]}\n... {len(whole) - CHARACTERS:,} more characters"
    title = f"The {entry.rounds - entry.kept} question-answer pairs that are cut off" if found.seen else \
        "What the file says"
    return f"<details><summary>{title}</summary><pre>{text(shown)}</pre></details>"


def _board(board: Board, name: str, number: int, picture_bytes: int) -> str:
    """A picture with its tiles, and its global view beside it."""
    height, width = board.pixels.shape[:2]
    image = (f'<image id="p{name}" width="1" height="1" preserveAspectRatio="none" '
             f'href="data:image/jpeg;base64,{_jpeg(board.pixels, picture_bytes)}"/>')
    scale = LONG / max(width, height)
    scale = max(scale, SHORT / min(width, height))
    caption = f"picture {number}, {Path(str(board.path)).name}: {picture_text(board).replace('->', '→')}"
    return (f'<figure><div class="views"><div class="board"><svg width="{width * scale:.0f}" '
            f'height="{height * scale:.0f}" viewBox="0 0 {width} {height}" role="img" '
            f'aria-label="{text(Path(str(board.path)).name)}"><defs>{image}</defs>'
            f'<use href="#p{name}" transform="scale({width} {height})"/>{_grid(board)}</svg></div>'
            f'<svg width="{VIEW}" height="{VIEW}" viewBox="0 0 1 1" role="img" aria-label="its global view">'
            f'<use href="#p{name}"/><rect class="over" width="1" height="1" data-tip="{text(_view_tip(board))}"/></svg>'
            f'</div><figcaption class="note" title="{text(board.path)}">{text(caption)}</figcaption></figure>')


def _view_tip(board: Board) -> str:
    side = board.pixels.shape[0] // board.grid.rows
    return f"tile {board.first}: the global view, the whole board shrunk to {side} x {side} pixels"


def _grid(board: Board) -> str:
    """The lines between tiles, and for each tile what it is."""
    rows, columns = board.grid
    height, width = board.pixels.shape[:2]
    side = height // rows
    lines = "".join(f"M0 {row * side}H{width}" for row in range(1, rows))
    lines += "".join(f"M{column * side} 0V{height}" for column in range(1, columns))
    cells = "".join(
        f'<rect class="over" x="{column * side}" y="{row * side}" width="{side}" height="{side}" '
        f'data-tip="tile {board.first + 1 + row * columns + column}: row {row + 1} of {rows}, column {column + 1} of '
        f'{columns}, {side} x {side} pixels"/>' for row in range(rows) for column in range(columns))
    return f'<path class="cut under" d="{lines}"/><path class="cut" d="{lines}"/>{cells}'


def _jpeg(pixels: np.ndarray, most: int) -> str:
    """A board, made smaller, as JPEG in base64 of at most so many letters."""
    image = Image.fromarray(pixels)
    scale = min(1.0, math.sqrt(AREA / (image.width * image.height)), SIDE / max(image.size))
    while True:
        size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
        small = image.resize(size, Image.Resampling.LANCZOS, reducing_gap=3.0) if scale < 1 else image
        for quality in QUALITIES:
            buffer = io.BytesIO()
            small.save(buffer, format="JPEG", quality=quality)
            found = base64.b64encode(buffer.getvalue()).decode()
            if len(found) <= most or max(size) <= SHORT:
                return found
        scale *= 0.7
