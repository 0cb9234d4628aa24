"""The log of requests: one JSON object a line."""
from __future__ import annotations

import json
import threading
from typing import TextIO


class RequestLog:
    """Writes lines; a stream that cannot be written to any more ends nothing.

    Args:
        stream: where to.
    """

    def __init__(self, stream: TextIO):
        self.stream = stream
        self._lock = threading.Lock()

    def __call__(self, line: dict) -> None:
        """Writes one line."""
        text = json.dumps(line, ensure_ascii=True, default=str)
        with self._lock:
            try:
                self.stream.write(text + "\n")
                self.stream.flush()
            except (OSError, ValueError):
                pass
