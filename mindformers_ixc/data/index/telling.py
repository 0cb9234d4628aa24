"""How far an index is: a bar on a terminal, a line now and then elsewhere, where a build may take minutes too."""
from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator

from mindformers_ixc import terminal
from mindformers_ixc.tables import clip

# Seconds between two lines in what is no terminal.
LINE_EVERY_S = 30.0

# Columns of a source's name beside a bar.
LONGEST_NAME = 24

_BAR = "{desc}: {percentage:3.0f}% |{bar}| {n:,} of {total:,}, {rate_noinv_fmt}, {remaining} left"


@contextlib.contextmanager
def measuring(name: str, total: int, done: int = 0) -> Iterator[Callable[[int], object]]:
    """Shows how many samples of a source are measured.

    Args:
        name: of the source.
        total: its samples.
        done: those that were measured before.

    Yields:
        What is told of samples that were measured now.
    """
    if terminal.current.interactive:
        with terminal.current.counting(total, f"indexing {clip(name, LONGEST_NAME)}", " samples", initial=done,
                                       bar_format=_BAR) as bar:
            yield bar.update
        return
    lines = _Lines(name, total, done)
    yield lines.update
    lines.end()


class _Lines:
    """The same as lines of a log; arguments as of `measuring`."""

    def __init__(self, name: str, total: int, done: int):
        self.name, self.total, self.before, self.done = name, total, done, done
        self.began = self.told = time.monotonic()
        kept = f", of which {done:,} are measured already" if done else ""
        terminal.current.note(f"Indexing {name}, {total:,} samples{kept} ...")

    def update(self, count: int) -> None:
        """Notes samples that were measured, and says so if it is time."""
        self.done += count
        if time.monotonic() - self.told >= LINE_EVERY_S and self.done < self.total:
            self.told = time.monotonic()
            left = (self.total - self.done) / self.rate
            terminal.current.note(f"Indexing {self.name}: {self.done:,} of {self.total:,} samples "
                                  f"({self.done / self.total:.0%}), {self.rate:,.0f} a second, about {_span(left)} "
                                  "left")

    def end(self) -> None:
        """Says how long it took."""
        took = _span(time.monotonic() - self.began)
        terminal.current.note(f"Indexed {self.name}: {self.total:,} samples, in {took}, {self.rate:,.0f} a second.")

    @property
    def rate(self) -> float:
        """Samples a second."""
        return max(1, self.done - self.before) / max(1e-3, time.monotonic() - self.began)


def _span(seconds: float) -> str:
    """A time as people say it."""
    whole = max(1, round(seconds))
    if whole < 120:
        return f"{whole} s"
    return f"{whole // 60} min" if whole < 7200 else f"{whole / 3600:.1f} h"
