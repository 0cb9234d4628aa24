"""One self-contained HTML page: its style and its little program are in it, and nothing is fetched."""
from __future__ import annotations

import html
import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

# Says who wrote a page, so that a page of this package may be written anew, and somebody else's file may not.
MARK = '<meta name="generator" content="mindformers_ixc">'

_FRAME = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
{mark}
<title>{title}</title>
<style>
{style}</style></head>
<body><main>
{body}
</main>
<div id="hover" role="status" hidden></div>
<script type="application/json" id="charts">{charts}</script>
<script>
{script}</script></body></html>
"""


def text(value: object) -> str:
    """Any value as text that is only text, also between quotes; half of a surrogate pair becomes a question mark."""
    return html.escape(str(value).encode("utf-8", "replace").decode("utf-8"))


def page(title: str, body: str, charts: Sequence[dict] = ()) -> str:
    """A whole page.

    Args:
        title: as text.
        body: HTML; what users wrote in it has gone through `text`.
        charts: what `chart` refers to by number.
    """
    here = Path(__file__).parent
    style, script = ((here / name).read_text(encoding="utf-8") for name in ("style.css", "script.js"))
    return _FRAME.format(mark=MARK, title=text(title), style=style, script=script, body=body, charts=_json(charts))


def is_own(path: str | os.PathLike) -> bool:
    """Whether a file is a page of this package."""
    return MARK in Path(path).read_text(encoding="utf-8", errors="replace")[:2000]


def values(name: str, value: Any) -> str:
    """Numbers and texts that the page's program finds by a name."""
    return f'<script type="application/json" id="{name}">{_json(value)}</script>'


def _json(value: Any) -> str:
    """JSON that cannot end the element it stands in; what is no number is null."""
    return (json.dumps(value, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c").replace(">", "\\u003e")
            .replace("&", "\\u0026"))


def chart(number: int, title: str) -> str:
    """The place of a chart; the page's program draws it.

    Args:
        number: of the chart among those given to `page`.
        title: shown above it.
    """
    return (f'<figure class="chart" data-chart="{number}"><figcaption><h3>{text(title)}</h3></figcaption>'
            f'<div class="plot"></div></figure>')


def line(name: str, points: Iterable[tuple[int, float]], colour: int = 0, clock: Mapping[int, float] | None = None,
         **look: bool) -> dict:
    """A curve of a chart.

    Args:
        name: in the legend and beside the values.
        points: (step, value); those whose value is not finite are left out.
        colour: number of the colour.
        clock: hours by step, for the other horizontal axis.
        look: `smooth`: the curve is shown smoothed, with its own values faint behind; `marks`: its points are few and
            each is marked; `dashed`.

    Returns:
        Of a curve with more than `POINTS` points those that `_thinned` keeps; `mean` is what is smoothed then.
    """
    kept, means = _thinned([(step, value) for step, value in points if math.isfinite(value)])
    found = {"name": name, "colour": colour, "x": [step for step, _ in kept],
             "y": [_short(value) for _, value in kept], **{key: True for key, on in look.items() if on}}
    if clock is not None:
        found["t"] = [_short(clock[step]) if step in clock else None for step, _ in kept]
    return {**found, "mean": [_short(value) for value in means]} if means else found


def _short(value: float) -> float:
    """With as many digits as can be seen."""
    return float(f"{value:.6g}")


# Points of a curve at most; a browser is quick with so many, and a screen has fewer columns.
POINTS = 2000


def _thinned(points: list[tuple[int, float]]) -> tuple[list[tuple[int, float]], list[float]]:
    """Of too many points the lowest and the highest of every few, so that no peak is lost, and for each the mean."""
    if len(points) <= POINTS:
        return points, []
    size = math.ceil(2 * len(points) / POINTS)
    kept, means = list[tuple[int, float]](), list[float]()
    for start in range(0, len(points), size):
        part = points[start:start + size]
        ends = sorted({min(part, key=lambda point: point[1]), max(part, key=lambda point: point[1])})
        kept += ends
        means += [sum(value for _, value in part) / len(part)] * len(ends)
    return kept, means


def table(head: Sequence[str], rows: Iterable[Sequence[object]], words: Iterable[int] = (0,)) -> str:
    """A table whose cells are text.

    Args:
        head: names of the columns.
        rows: cells; a cell that is `Markup` stays as it is.
        words: columns that hold words and stand at the left; numbers stand at the right.
    """
    left = set(words)

    def cells(row: Sequence[object], tag: str) -> str:
        return "".join(f'<{tag}{" class=word" if number in left else ""}>'
                       f"{cell if isinstance(cell, Markup) else text(cell)}</{tag}>" for number, cell in enumerate(row))

    body = "".join(f"<tr>{cells(row, 'td')}</tr>" for row in rows)
    return f'<div class="wide"><table><thead><tr>{cells(head, "th")}</tr></thead><tbody>{body}</tbody></table></div>'


class Markup(str):
    """HTML that a table takes as it is."""


def facts(values: Mapping[str, object]) -> str:
    """A table of names and values."""
    rows = "".join(f"<tr><th>{text(name)}</th><td>{text(value)}</td></tr>" for name, value in values.items())
    return f'<table class="facts">{rows}</table>'


def cards(values: Mapping[str, object]) -> str:
    """The few numbers that matter most, large."""
    return '<div class="cards">' + "".join(
        f'<div class="card"><span>{text(name)}</span><strong>{text(value)}</strong></div>'
        for name, value in values.items()) + "</div>"


def section(title: str, *content: str) -> str:
    """A part of a page with its heading; nothing without content."""
    inside = "".join(content)
    return f"<section><h2>{text(title)}</h2>{inside}</section>\n" if inside else ""


def duration(seconds: float) -> str:
    """A time as people say it."""
    if seconds < 60:
        return f"{seconds:.3g} s"
    whole = round(seconds)
    days, hours, minutes = whole // 86400, whole // 3600 % 24, whole // 60 % 60
    if days:
        return f"{days} d {hours} h"
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {whole % 60} s"
