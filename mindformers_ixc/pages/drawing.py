"""Drawings that need no program: SVG written by hand, whose parts say what they are under the pointer."""
from __future__ import annotations

from collections.abc import Iterable

from mindformers_ixc.pages.page import text

# Sizes of a histogram in the units of its drawing.
WIDTH, HEIGHT, TOP, BOTTOM = 480, 150, 14, 18

# The limit is in the drawing if the highest value is at least this share of it; else the bars would be too small.
NEAR = 0.4

# Width of a bar at most, where there are few values.
MOST_WIDE = 64.0

# Room that a label takes at the end of the axis, and half of it.
LABEL = 60


def histogram(name: str, rows: Iterable[tuple[int, int, int]], limit: int, limit_name: str, noun: str) -> str:
    """How often values are in ranges, with a line at a limit that is near enough.

    Args:
        name: of what is counted.
        rows: (first, last, number) of each range, ascending and without gaps; none has values on both sides of the
            limit.
        limit: the largest value that fits.
        limit_name: what it is called.
        noun: of what has the values, in the singular.
    """
    rows = list(rows)
    low, end = rows[0][0], rows[-1][1] + 1
    near = limit >= low and limit < end / NEAR
    left, right = low, max(end, limit + 1) if near else end
    most, scale, floor = max(count for *_, count in rows), WIDTH / (right - left), HEIGHT - BOTTOM
    parts = [f'<path class="grid" d="M0 {floor}H{WIDTH}"/>']
    for first, last, count in rows:
        x, width = (first - left) * scale, (last + 1 - first) * scale
        wide = min(MOST_WIDE, max(3.0, width - 1))
        at = min(x + max(.5, (width - wide) / 2), WIDTH - wide)
        high = max(1.5, (floor - TOP) * count / most) if count else 0
        colour = 1 if first > limit else 0
        values = f"{first:,}" if first == last else f"{first:,} to {last:,}"
        tip = text(f"{values} {name}: {count:,} {noun}{'s' * (count != 1)}")
        parts.append(f'<rect class="f{colour}" x="{at:.2f}" y="{floor - high:.2f}" '
                     f'width="{wide:.2f}" height="{high:.2f}"/><rect class="over" x="{x:.2f}" y="{TOP}" '
                     f'width="{width:.2f}" height="{floor - TOP}" data-tip="{tip}"/>')
    parts += _axis(low, rows[-1][1], (limit + 1 - left) * scale if near else None, limit, limit_name,
                   (end - left) * scale)
    return (f'<svg class="histogram" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{text(name)}">'
            f"{''.join(parts)}</svg>")


def _axis(low: int, high: int, at: float | None, limit: int, limit_name: str, end: float) -> list[str]:
    """The lowest and the highest value, and the line of the limit."""
    parts = [f'<text x="0" y="{HEIGHT - 4}">{low:,}</text>']
    if high > low and end > LABEL:
        parts.append(f'<text x="{end:.1f}" y="{HEIGHT - 4}" text-anchor="end">{high:,}</text>')
    if at is not None:
        anchor = "end" if at > WIDTH / 2 else "start"
        parts.append(f'<path class="limit" d="M{min(at, WIDTH - 1):.1f} {TOP - 3}V{HEIGHT - BOTTOM}"/>'
                     f'<text x="{at:.1f}" y="{TOP - 4}" text-anchor="{anchor}">{text(limit_name)} {limit:,}</text>')
    return parts
