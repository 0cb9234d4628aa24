"""What requests may take; read for the command line, so nothing heavy is imported."""
from __future__ import annotations

import socket
from dataclasses import dataclass, fields

from mindformers_ixc.errors import ConfigError
from mindformers_ixc.sections import Rule, above_0, check_value, whole

# Names under which only this machine can be reached.
LOOPBACK = ("127.0.0.1", "localhost", "::1")

# Positions of a piece of a prompt: the more, the longer running answers wait for a part of it. On two cores of a CPU
# the whole prompt is not sooner there with more of them.
PIECES = (64, 128, 256)


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach an address: the network 127.0.0.0/8 is its own, the name 127.org is not."""
    if host in LOOPBACK:
        return True
    try:
        return socket.inet_aton(host)[0] == 127
    except (OSError, UnicodeError):
        return False


# Limits in words, for the help: `--max_NAME`.
MEANINGS = {
    "running": "answers that are written at once",
    "queue": "requests that wait, of all clients",
    "queue_each": "requests that wait, of one client",
    "positions": "positions of prompt and answer (and of the model at most)",
    "new_tokens": "new tokens of an answer, also where a request does not say",
    "answers": "n of a request",
    "beams": "num_beams of a request",
    "body": "bytes of a request",
    "pictures": "pictures and videos of a request",
    "pixels": "pixels of a picture",
    "tiles": "tiles of all pictures of a request",
    "seconds": "seconds that a request may take, waiting included",
    "body_seconds": "seconds in which a request must have come",
    "reading": "requests whose pictures are cut at once",
    "connections": "open connections",
}


@dataclass(frozen=True)
class Limits:
    """What a request and all of them together may take; `MEANINGS` says what each is.

    Raises:
        ConfigError: for a value that is none, by the name of its option.
    """

    running: int = 8
    queue: int = 64
    queue_each: int = 32
    positions: int = 16384
    new_tokens: int = 1024
    answers: int = 8
    beams: int = 8
    body: int = 64 << 20
    pictures: int = 32
    pixels: int = 50_000_000
    tiles: int = 256
    seconds: float = 600.0
    body_seconds: float = 60.0
    reading: int = 4
    connections: int = 256

    def __post_init__(self) -> None:
        for one in fields(self):
            rule: Rule = above_0() if isinstance(one.default, float) else whole(1)
            check_value(f"--max_{one.name}", getattr(self, one.name), rule, ConfigError)
        if self.answers > self.running:
            object.__setattr__(self, "answers", self.running)
