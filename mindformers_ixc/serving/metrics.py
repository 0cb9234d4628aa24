"""What `/metrics` shows, in Prometheus' text form."""
from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Sequence

from mindformers_ixc.serving.scheduling import Scheduler
from mindformers_ixc.version import __version__

# Upper ends of the classes that times are counted in, in seconds.
CLASSES = (0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0)

# Seconds over which tokens a second are counted.
WINDOW = 10.0


class Times:
    """A histogram of seconds."""

    def __init__(self) -> None:
        self.counts, self.total, self.number = [0] * len(CLASSES), 0.0, 0
        self._lock = threading.Lock()

    def add(self, seconds: float) -> None:
        """Counts one more."""
        with self._lock:
            self.total += seconds
            self.number += 1
            for place, end in enumerate(CLASSES):
                self.counts[place] += seconds <= end

    def lines(self, name: str) -> list[str]:
        """In Prometheus' form."""
        classes = [f'{name}_bucket{{le="{end:g}"}} {count}' for end, count in zip(CLASSES, self.counts)]
        return [*classes, f'{name}_bucket{{le="+Inf"}} {self.number}', f"{name}_sum {self.total:.6f}",
                f"{name}_count {self.number}"]


class Metrics:
    """Counts of a server.

    Args:
        scheduler: whose state is shown.
        clock: seconds.

    Attributes:
        more: gives further lines: name, kind, meaning and value.
        responses: of HTTP, by status.
    """

    def __init__(self, scheduler: Scheduler, clock: Callable[[], float] = time.monotonic):
        self.scheduler, self.clock = scheduler, clock
        self.first_token, self.whole = Times(), Times()
        self.more: Callable[[], Sequence[tuple[str, str, str, float]]] = lambda: ()
        self.responses: dict[int, int] = {}
        self._seen: deque[tuple[float, int]] = deque([(clock(), 0)])

    def began(self, seconds: float) -> None:
        """A request has its first token, so long after it was read."""
        self.first_token.add(seconds)

    def answered(self, seconds: float) -> None:
        """A request has been answered."""
        self.whole.add(seconds)

    def responded(self, status: int) -> None:
        """A response was sent."""
        self.responses[status] = self.responses.get(status, 0) + 1

    def rate(self) -> float:
        """New tokens a second, over the last seconds that this was asked for."""
        now, tokens = self.clock(), self.scheduler.counts.new_tokens
        while len(self._seen) > 1 and self._seen[1][0] < now - WINDOW:
            self._seen.popleft()
        then, before = self._seen[0]
        self._seen.append((now, tokens))
        return (tokens - before) / (now - then) if now > then else 0.0

    def text(self) -> str:
        """All of it."""
        scheduler, counts = self.scheduler, self.scheduler.counts
        plain = [
            ("queue", "gauge", "requests that wait", scheduler.queued),
            ("reading", "gauge", "requests whose prompt is being computed", len(scheduler.reading)),
            ("running", "gauge", "answers that are being written",
             len(scheduler.writing) + (scheduler.whole is not None)),
            ("rows", "gauge", "answers that may be written at once", scheduler.decoder.most),
            ("draining", "gauge", "1 while no new requests are taken", int(scheduler.is_draining)),
            ("new_tokens_total", "counter", "tokens of answers", counts.new_tokens),
            ("prompt_positions_total", "counter", "positions of prompts", counts.prompt_positions),
            ("steps_total", "counter", "decoding steps", counts.steps),
            ("pieces_total", "counter", "pieces of prompts", counts.pieces),
            ("longest_tick_seconds", "gauge", "longest time that an answer waited for its next token",
             counts.longest_tick),
            ("tokens_per_second", "gauge", "tokens of answers a second, lately", round(self.rate(), 3)),
            *self.more()]
        lines = [f'# TYPE mindformers_ixc_info gauge\nmindformers_ixc_info{{version="{__version__}"}} 1']
        for name, kind, meaning, value in plain:
            lines += [f"# HELP mindformers_ixc_{name} {meaning}", f"# TYPE mindformers_ixc_{name} {kind}",
                      f"mindformers_ixc_{name} {value}"]
        lines.append("# TYPE mindformers_ixc_requests_total counter")
        lines += [f'mindformers_ixc_requests_total{{end="{end}"}} {count}' for end, count in counts.requests.items()]
        lines.append("# TYPE mindformers_ixc_responses_total counter")
        lines += [f'mindformers_ixc_responses_total{{status="{status}"}} {count}'
                  for status, count in sorted(self.responses.items())]
        for name, times in (("time_to_first_token_seconds", self.first_token), ("request_seconds", self.whole)):
            lines += [f"# TYPE mindformers_ixc_{name} histogram", *times.lines(f"mindformers_ixc_{name}")]
        return "\n".join(lines) + "\n"
