"""`mindformers chat` whose model is a stand-in: MODEL DIRECTORY, then `fails` for one that cannot be loaded.

The model is there once the file `loaded` is in the working folder. It answers with the question's words, with "the"
without end if the question is "Tell me", and with nothing if it is "Nothing".
"""
from __future__ import annotations

import signal
import sys
import time
from itertools import repeat
from pathlib import Path
from types import SimpleNamespace

# as the command does before it imports anything that starts threads
signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})

import mindformers_ixc_cli  # noqa: E402
from mindformers_ixc.cli import chat  # noqa: E402


class StandIn:
    def __init__(self):
        self.engine = SimpleNamespace(between_steps=lambda: None, decoded=0)
        self.model = SimpleNamespace(get_parameters=lambda: [SimpleNamespace(size=1000)])

    def encode(self, query):
        return SimpleNamespace(input_ids=[0] * 9, tiles=0, query=query["query"])

    def prepare(self, positions, max_new_tokens, mode):
        pass

    def stream(self, sample, mode, **options):
        words = repeat("the") if sample.query == "Tell me" else sample.query.replace("Nothing", "").split()
        for number, word in enumerate(words):
            if number:
                self.engine.between_steps()
                self.engine.decoded += 1
                time.sleep(0.01)
            yield f"{word.upper()} "


def load(arguments):
    print("a note of a library")
    while not Path("loaded").exists():
        time.sleep(0.05)
    if sys.argv[2:] == ["fails"]:
        raise ValueError("The weights are damaged.")
    print("The weights are old.", file=sys.stderr)
    return StandIn()


chat.load = load
sys.exit(mindformers_ixc_cli.main(["chat", "--model", sys.argv[1]]))
