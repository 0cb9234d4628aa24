"""A server with the medium model: what eight clients at once get beside one after the other, and a short question
while a long prompt is read.

    python benchmarks/serving.py
    python benchmarks/serving.py --new_tokens 64 --rounds 5

Everything runs in one process over HTTP on 127.0.0.1: the medium model of `benchmarks/decode.py` with random weights in
float32, the tokenizer of the starter. First every answer of the eight at once is compared with the one alone; then both
ways take turns, and the medians of the rounds are printed. Needs the extra `serve`.
"""
from __future__ import annotations

import argparse
import os
import statistics
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

CLIENTS, POSITIONS = 8, 2048
LONG = 600          # words of the long prompt, three tokens each


def parse() -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--threads", type=int, default=2, help="of the kernels")
    parser.add_argument("--rounds", type=int, default=3, help="timed rounds of each way")
    parser.add_argument("--new_tokens", type=int, default=48, help="of each answer")
    parser.add_argument("--piece", type=int, default=64, help="positions of a piece of a prompt")
    return parser.parse_args()


def start(arguments: argparse.Namespace) -> tuple[str, object]:
    """A server of the medium model; its address and itself."""
    import mindspore as ms
    from decode import medium_model

    import mindformers_ixc  # noqa: F401 - registers the model
    from mindformers_ixc.generation.assistant import Assistant
    from mindformers_ixc.processing.processor import ImageProcessor, Processor
    from mindformers_ixc.processing.tokenizer import Tokenizer
    from mindformers_ixc.serving.app import make_app
    from mindformers_ixc.serving.decoders import make_decoder
    from mindformers_ixc.serving.guard import Guard
    from mindformers_ixc.serving.limits import Limits
    from mindformers_ixc.serving.listening import listen
    from mindformers_ixc.serving.scheduling import Scheduler
    from mindformers_ixc.serving.server import HttpServer
    from mindformers_ixc.serving.service import Service
    from mindformers_ixc.serving.settings import ServerSettings

    ms.set_context(mode=ms.GRAPH_MODE)
    ms.set_device("CPU")
    folder = Path(__file__).parents[1] / "mindformers_ixc" / "starter"
    processor = Processor(ImageProcessor(224), Tokenizer.from_directory(folder))
    assistant = Assistant(medium_model(), processor)
    settings = ServerSettings("medium", limits=Limits(positions=POSITIONS, queue_each=64))
    decoder = make_decoder(assistant, CLIENTS, POSITIONS, arguments.piece)
    decoder.warm_up("base")
    service = Service(processor, Scheduler(decoder), settings)
    server = HttpServer(Guard(make_app(service), settings, "127.0.0.1"), service, settings.limits, 5.0)
    listening, ready = listen("127.0.0.1", 0), threading.Event()
    threading.Thread(target=server.run, args=(listening, ready.set), daemon=True).start()
    ready.wait()
    return f"http://127.0.0.1:{listening.getsockname()[1]}", server


def ask(address: str, text: str, new_tokens: int) -> tuple[str, float, float]:
    """An answer, the seconds to its first piece, and those of all of it."""
    from mindformers_ixc.serving.client import Client

    begun, first, pieces = time.perf_counter(), None, []
    request = {"messages": [{"role": "user", "content": text}], "stream": True, "max_tokens": new_tokens}
    for event in Client(address).chat(request):
        first = first or time.perf_counter() - begun
        pieces.append(event["choices"][0]["delta"].get("content") or "")
    return "".join(pieces), first or 0.0, time.perf_counter() - begun


def main() -> None:
    """Compares, measures, prints."""
    arguments = parse()
    os.environ["OMP_NUM_THREADS"] = str(arguments.threads)
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:arguments.threads])
    address, server = start(arguments)
    texts = [f"Question {number} about picture {number * 7}: what is it?" for number in range(CLIENTS)]
    answers = [ask(address, text, arguments.new_tokens)[0] for text in texts]
    with ThreadPoolExecutor(CLIENTS) as pool:
        def at_once() -> list:
            return list(pool.map(lambda text: ask(address, text, arguments.new_tokens), texts))

        equal = [found[0] for found in at_once()] == answers
        print(f"answers of {CLIENTS} at once are those alone: {equal}")
        if not equal:
            sys.exit("The two ways do not give the same; their times would mean nothing.")
        times: dict[str, list[float]] = {"one after the other": [], "at once": []}
        for _ in range(arguments.rounds):
            begun = time.perf_counter()
            for text in texts:
                ask(address, text, arguments.new_tokens)
            times["one after the other"].append(time.perf_counter() - begun)
            begun = time.perf_counter()
            at_once()
            times["at once"].append(time.perf_counter() - begun)
    tokens = CLIENTS * arguments.new_tokens
    for way, found in times.items():
        print(f"{CLIENTS} answers of {arguments.new_tokens} tokens {way}: {statistics.median(found):.2f} s, "
              f"{tokens / statistics.median(found):.1f} tokens a second")
    ratio = statistics.median(times["one after the other"]) / statistics.median(times["at once"])
    print(f"at once is {ratio:.2f} times as fast")
    print_first_tokens(address, arguments)
    server.end()


def print_first_tokens(address: str, arguments: argparse.Namespace) -> None:
    """Seconds to the first token of a short question, alone and while a long prompt is read."""
    alone, beside, long = [], [], []
    for number in range(5 * arguments.rounds):
        alone.append(ask(address, f"Short one {number}?", 1)[1])
    for number in range(arguments.rounds):
        # another one each time, so that nothing is taken over
        words = " ".join(f"{number}a" for _ in range(LONG))
        thread = threading.Thread(target=lambda text=words: long.append(ask(address, text, 1)[1]))
        thread.start()
        time.sleep(0.1)
        while thread.is_alive():
            found = ask(address, f"Short two {number} {len(beside)}?", 1)[1]
            if thread.is_alive():
                beside.append(found)
        thread.join()
    print(f"first token of a short question alone: {statistics.median(alone) * 1e3:.0f} ms, while a long prompt is "
          f"read ({statistics.median(long):.2f} s, {len(beside)} short questions meanwhile): "
          f"{statistics.median(beside) * 1e3:.0f} ms, {statistics.median(beside) / statistics.median(alone):.2f} times")


if __name__ == "__main__":
    main()
