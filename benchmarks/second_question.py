"""Time to the first token of a chat's first question about a picture, and of the second one about the same picture.

    python benchmarks/second_question.py --threads 2

The model and the first question are those of decode.py: 512 positions, one 2 x 2 picture among them. The second one has
the first, an answer of 48 tokens and 40 positions more. First the logits and tokens of the second question's answer are
compared with those of an engine that keeps nothing. Then both questions are asked in turns, each round beginning with
an empty store, and the medians are printed; graphs have been compiled by then. What both take in a new process is
printed too. There the graph of second questions is compiled between the two, as an interactive chat does while the
next question is typed; it comes once in a process, for each size of cache.
"""
from __future__ import annotations

import argparse
import os
import statistics
import sys
import time

from decode import count_compilations, medium_model, prompt

ANSWER, MORE = 48, 40


def parse() -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=5, help="timed rounds")
    return parser.parse_args()


def second_of(first, answer, config):
    """The second question: the first, what was answered, and more."""
    from dataclasses import replace

    import numpy as np

    new = np.concatenate((answer, np.random.default_rng(2).integers(3, config.vocab_size, MORE))).astype(np.int32)
    none = np.zeros(len(new), np.int32)
    return replace(first, input_ids=np.append(first.input_ids, new), labels=np.append(first.labels, none - 100),
                   image_mask=np.append(first.image_mask, none))


def ask(engine, sample):
    """One greedy answer.

    Returns:
        Seconds to the first token's logits, the logits of all tokens, and the tokens.
    """
    import numpy as np

    start = time.perf_counter()
    decoder = engine.decoder([sample], ANSWER + 1)
    logits = [decoder.prefill()[0]]
    first = time.perf_counter() - start
    tokens = [int(logits[0].argmax())]
    for _ in range(ANSWER):
        logits.append(decoder.step(np.array([tokens[-1]], np.int32))[0])
        tokens.append(int(logits[-1].argmax()))
    decoder.close()
    return first, logits, tokens


def compare(found, expected) -> None:
    """Stops unless both answers have the same tokens and close logits."""
    import numpy as np

    difference = max(float(np.abs(a - b).max()) for a, b in zip(found[1], expected[1]))
    scale = max(float(np.abs(b).max()) for b in expected[1])
    print(f"tokens equal: {found[2] == expected[2]}, largest difference of a logit {difference:.1e} of {scale:.1f}")
    if found[2] != expected[2] or difference > 1e-4 * scale:
        sys.exit("The two do not compute the same; their times would mean nothing.")


def main() -> None:
    """Compares, measures, prints."""
    arguments = parse()
    os.environ["OMP_NUM_THREADS"] = str(arguments.threads)
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:arguments.threads])
    import mindspore as ms

    import mindformers_ixc  # noqa: F401 - registers the model
    from mindformers_ixc.fields import REUSE_BYTES
    from mindformers_ixc.generation.engine import InferenceEngine
    from mindformers_ixc.generation.preparing import prepare
    from mindformers_ixc.generation.store import Store

    ms.set_context(mode=ms.GRAPH_MODE)
    ms.set_device("CPU")
    model = medium_model()
    engine, plain = InferenceEngine(model, Store(REUSE_BYTES)), InferenceEngine(model)
    store, question = engine.reuse.store, prompt(model.config)
    compiled = count_compilations()
    cold_first, _, tokens = ask(engine, question)
    second, graphs = second_of(question, tokens[:ANSWER], model.config), len(compiled)
    start = time.perf_counter()
    prepare(engine, len(second.input_ids) + ANSWER + 1, "base")
    prepared, more = time.perf_counter() - start, len(compiled)
    found = ask(engine, second)
    print(f"in a new process: first question {cold_first:.2f} s, {graphs} graphs compiled; {more - graphs} in between, "
          f"{prepared:.2f} s; second question {found[0]:.2f} s, {len(compiled) - more} graphs")
    compare(found, ask(plain, second))
    ask(plain, question)
    del compiled[:]
    times: dict[str, list[float]] = {"first question": [], "second question": [], "first, nothing kept": [],
                                     "second, nothing kept": []}
    for _ in range(arguments.rounds):
        engine.settle()
        store.clear()
        times["first question"].append(ask(engine, question)[0])
        times["second question"].append(ask(engine, second)[0])
        times["first, nothing kept"].append(ask(plain, question)[0])
        times["second, nothing kept"].append(ask(plain, second)[0])
    print(f"graphs compiled in the timed part: {len(compiled)}; kept: {store.bytes / 2**20:.1f} MiB")
    print(f"{arguments.threads} thread(s), medians of {arguments.rounds}, milliseconds to the first token")
    whole = statistics.median(times["first question"])
    for name, values in times.items():
        print(f"{name:24}{statistics.median(values) * 1e3:10.1f}{statistics.median(values) / whole:8.2f} x the first")


if __name__ == "__main__":
    main()
