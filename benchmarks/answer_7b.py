"""The whole 7B in 4 bits answers on this machine: memory, loading, the time to a token, and floors of the same process.

    python benchmarks/answer_7b.py FOLDER --threads 2           # needs 6 GB of room in FOLDER, some minutes

A model directory with random weights of the exact shapes and formats that `mindformers quantize` writes is made in
FOLDER (and removed at the end, unless `--keep`), with its digests and the demo's small tokenizer. One process loads it
for the first time, comparing every byte with its digests; another one loads it as every later process does, and asks
about a picture of 2 x 2 tiles, through `Assistant` as a user does.

Memory is what the process has resident at most, mapped pages of the file counted; it is read before the floors are
measured. The floor of a token is the bytes it reads, of weights and of keys and values, over the bandwidth of a copy
(bytes read and written); that of picture and prompt is what MindSpore's float32 products of the same shapes take, for
the positions that there are. All with as many threads.
"""
from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from quantized import copy_bandwidth

# What a mode reads beside the base: rank of each task LoRA.
PAIRS = {"base": {}, "write": {"sft": 256, "dpo": 256}, "web": {"web": 512}}
# Pieces of the demo's tokenizer.
PIECES = 1024
# Positions of the products that the floor is made of.
ROWS = 512


def parse() -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("folder", type=Path, help="where the model is written; made if need be")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--layers", type=int, default=32, help="decoder layers, 24 of the tower stay")
    parser.add_argument("--tokens", type=int, default=24, help="new tokens of the answer")
    parser.add_argument("--mode", choices=PAIRS, default="base", help="the model gets the pairs of this mode")
    parser.add_argument("--text", action="store_true", help="ask without the picture: memory of a mode in less time")
    parser.add_argument("--keep", action="store_true", help="leave the model there; one that is there is taken")
    parser.add_argument("--part", choices=("verify", "ask"), help=argparse.SUPPRESS)
    return parser.parse_args()


def make(folder: Path, layers: int, mode: str) -> None:
    """Writes a 4-bit model directory of the 7B's shapes whose numbers are random."""
    import numpy as np

    from mindformers_ixc.checkpoint.digests import write_digests
    from mindformers_ixc.checkpoint.quantise import kind_of
    from mindformers_ixc.checkpoint.quantised import FORMATS, OWN, SECTION, Quantization, array_shapes
    from mindformers_ixc.checkpoint.tensor_file import TensorFile
    from mindformers_ixc.config import ModelConfig
    from mindformers_ixc.demo import demo_path
    from mindformers_ixc.parameters import parameter_table

    config = ModelConfig(num_hidden_layers=layers, task_lora_ranks=PAIRS[mode])
    quantization, tensors, rng = Quantization(OWN, 4, "BF16"), [], np.random.default_rng(0)
    for name, entry in parameter_table(config).items():
        kind = kind_of(name, config, quantization)
        if kind is None:
            tensors.append((name, "BF16", entry.shape))
            continue
        tensors += [(f"{name[:-7]}.{part}", FORMATS[kind][part], shape)
                    for part, shape in array_shapes(kind, entry.shape).items()]
    folder.mkdir(parents=True)
    file = TensorFile(folder / "model.safetensors", tensors)
    file.open()
    # scales of weights whose outputs are about as large as their inputs; norms are 1
    constants = {"F16": np.float16(0.003), "F32": np.float32(0.0003), "norm": np.uint16(0x3F80), "qzeros": np.uint8(8)}
    for name, dtype, shape in tensors:
        constant = next((value for key, value in constants.items() if key == dtype or key in name), None)
        if constant is not None:
            value = np.full(shape, constant)
            if name == "output.scales":
                value[PIECES:] = 0           # tokens that the tokenizer does not have are never the likeliest
        elif dtype == "BF16":                # between 2^-7 and 2^-6, with either sign
            value = (rng.integers(0, 2**16, shape, np.uint16) & 0x807F) | np.uint16(0x3C00)
        else:
            value = rng.integers(0, 256, shape, np.uint8).view({"U8": np.uint8, "I8": np.int8}[dtype])
        file.write(name, 0, value)
    file.sync()
    file.close()
    (folder / "config.json").write_text(json.dumps({**config.to_public_dict(), SECTION: quantization.to_section()}))
    shutil.copy(demo_path("tokenizer.model"), folder)
    write_digests(folder)


def resident() -> dict[str, float]:
    """GB that are resident now, mapped pages of files apart."""
    fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines() if ":" in line)
    return {key: int(fields[f"Rss{key}"].split()[0]) * 1024 / 1e9 for key in ("Anon", "File")}


def peak() -> float:
    """GB that were resident at most."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


class Watch:
    """Seconds of calls by name, of those inside each other the inner ones' only."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._inside = [0.0]

    def timed(self, owner: Any, method: str, name: str) -> None:
        """Times a method from now on."""
        real: Callable[..., Any] = getattr(owner, method)

        def call(*arguments: Any, **named: Any) -> Any:
            start = time.perf_counter()
            self._inside.append(0.0)
            try:
                return real(*arguments, **named)
            finally:
                whole = time.perf_counter() - start
                self.seconds[name] = self.seconds.get(name, 0.0) + whole - self._inside.pop()
                self._inside[-1] += whole

        setattr(owner, method, call)


class Clock:
    """A streamer that notes when tokens come, and what had been spent on what before the first one."""

    def __init__(self, watch: Watch):
        self.watch, self.before = watch, dict(watch.seconds)
        self.begin, self.times, self.spent = time.perf_counter(), [], {}

    def put(self, ids) -> None:
        """Takes the next ids; the prompt's place is empty."""
        if len(ids):
            self.times.append(time.perf_counter() - self.begin)
            if len(self.times) == 1:
                self.spent = self.since()

    def since(self) -> dict[str, float]:
        """Seconds by name since the beginning."""
        return {name: value - self.before.get(name, 0.0) for name, value in self.watch.seconds.items()}

    def end(self) -> None:
        """Nothing is kept."""


def say(what: str, seconds: float, rest: str = "") -> None:
    """A line of the report, with what is resident now."""
    now = resident()
    print(f"{what:44}{seconds:8.2f} s   resident {now['Anon'] + now['File']:5.2f} GB, {now['File']:5.2f} of it mapped"
          f"{rest}", flush=True)


def load(folder: Path):
    """The model, as every interface loads it."""
    import mindspore as ms

    from mindformers_ixc.generation.assistant import Assistant

    ms.set_context(mode=ms.GRAPH_MODE)
    ms.set_device("CPU")
    say("imports", time.perf_counter() - START)
    start = time.perf_counter()
    assistant = Assistant.from_directory(folder)
    return assistant, time.perf_counter() - start


def verify(folder: Path) -> None:
    """Loads for the first time."""
    _, seconds = load(folder)
    say("loading for the first time, with digests", seconds)


def ask(arguments: argparse.Namespace, folder: Path) -> None:
    """Loads, asks, and prints what each took."""
    import numpy as np
    from mindspore.common import api

    from mindformers_ixc.generation.options import GenerationOptions

    watch = Watch()
    assistant, seconds = load(folder)
    say("loading, compared with digests before", seconds)
    watch.timed(api._cell_graph_executor, "compile", "compilation")
    watch.timed(assistant.engine, "encode_images", "picture")
    question = {"query": "What is shown in this picture, and what is written on it?"}
    if not arguments.text:
        picture = np.random.default_rng(0).integers(0, 255, (1120, 1120, 3), dtype=np.uint8)
        question.update(images=[picture], hd_num=4)
    sample, clocks = assistant.encode(question), []
    for what in ("first question", "second question, longer by a round"):
        clock = Clock(watch)
        clocks.append(clock)
        answer = assistant.reply(question, GenerationOptions(max_new_tokens=arguments.tokens), arguments.mode, clock)
        parts = ", ".join(f"{name} {value:.1f} s" for name, value in clock.spent.items() if value > 0.05)
        later = clock.since().get("compilation", 0.0) - clock.spent.get("compilation", 0.0)
        say(f"{what}: first token", clock.times[0], f", {peak():.2f} GB at most\n    ({parts}; after it compilation "
            f"{later:.1f} s, the answer of {len(clock.times)} tokens {clock.times[-1] - clock.times[0] - later:.1f} s)")
        question = {**question, "query": "And what is behind it?", "history": [(question["query"], answer)]}
    first = clocks[0]
    picture_s = first.spent.get("picture", 0.0)
    report(assistant.model, sample, [1000 * (b - a) for a, b in zip(first.times[3:], first.times[4:])], picture_s,
           first.times[0] - picture_s - first.spent.get("compilation", 0.0), arguments.threads)


def report(model, sample, tokens: list[float], picture_s: float, prompt_s: float, threads: int) -> None:
    """Holds the first question against its floors."""
    from mindformers_ixc.generation.slots import cache_bytes

    images, positions = int(sample.image_mask.sum()), len(sample.input_ids)
    weights, cache = bytes_of_a_token(model), cache_bytes(model.config, 1, positions)
    bandwidth, token = copy_bandwidth(threads), statistics.median(tokens)
    floors = [100 * 1000 * read / bandwidth / token for read in (weights, weights + cache)]
    print(f"a token: {token:.0f} ms ({min(tokens):.0f} to {max(tokens):.0f}), reads {weights / 1e9:.2f} GB of weights, "
          f"{cache / 1e9:.2f} of keys and values; by a copy's {bandwidth / 1e9:.1f} GB/s {floors[0]:.0f} % of the "
          f"weights' floor, {floors[1]:.0f} % of that of both")
    rate: dict[tuple[int, int], float] = {}
    prompt = sum(operations(*shape, positions if is_whole else images) / rated(shape, rate)
                 for shape, is_whole in language_shapes(model))
    tower = sum(operations(*shape, rows) / rated(shape, rate) for shape, rows in tower_shapes(model, sample.tiles))
    print(f"MindSpore's products in float32: {min(rate.values()) / 1e9:.0f} to {max(rate.values()) / 1e9:.0f} GFLOP/s")
    for what, seconds, floor in (("picture", picture_s, tower), (f"prompt of {positions} positions", prompt_s, prompt),
                                 ("both", picture_s + prompt_s, tower + prompt)):
        if floor and seconds:
            print(f"{what}: {seconds:.1f} s, the products alone {floor:.1f} s: {100 * floor / seconds:.0f} %")


def operations(width: int, outputs: int, rows: int) -> float:
    """Of a product."""
    return 2.0 * width * outputs * rows


def rated(shape: tuple[int, int], rate: dict[tuple[int, int], float]) -> float:
    """Operations a second of MindSpore's float32 product with a weight of that width and so many outputs, the best."""
    if shape not in rate:
        import numpy as np
        from mindspore import Tensor, nn, ops

        class Product(nn.Cell):
            """One product."""

            def __init__(self):
                super().__init__()
                self.product = ops.MatMul(transpose_b=True)

            def construct(self, x, weight):
                """Maps `(N, F)` to `(N, O)`."""
                return self.product(x, weight)

        product, times = Product(), []
        x, weight = (Tensor(np.full((count, shape[0]), 0.5, np.float32)) for count in (ROWS, shape[1]))
        for _ in range(12):              # MindSpore tries thread numbers meanwhile
            start = time.perf_counter()
            product(x, weight).asnumpy()
            times.append(time.perf_counter() - start)
        rate[shape] = operations(*shape, ROWS) / min(times)
    return rate[shape]


def language_shapes(model) -> list[tuple[tuple[int, int], bool]]:
    """Width and outputs of every product of the decoder, and whether it is of all positions or of the pictures'."""
    from mindformers_ixc.parameters import linear_shapes

    config, shapes = model.config, []
    for outputs, width in linear_shapes(config).values():
        shapes.append(((width, outputs), True))
        shapes += [((width, config.plora_rank), False), ((config.plora_rank, outputs), False)]
    return shapes * config.num_hidden_layers


def tower_shapes(model, tiles: int) -> list[tuple[tuple[int, int], int]]:
    """Width, outputs and rows of every product of the tower, attention left out, and of the projector."""
    vision, width = model.config.vision_config, model.config.hidden_size
    c, inner, rows, merged = vision.hidden_size, vision.intermediate_size, tiles * vision.positions, 4
    layer = [((c, c), rows)] * 4 + [((c, inner), rows), ((inner, c), rows)]
    return layer * vision.num_hidden_layers + [((merged * c, width), tiles * vision.tokens_per_tile),
                                               ((width, width), tiles * vision.tokens_per_tile)]


def bytes_of_a_token(model) -> int:
    """Bytes of the weights that a decoded token reads: the decoder's linears and the head, without the pairs."""
    return sum(parameter.nbytes for parameter in model.get_parameters()
               if parameter.name.endswith((".qweight", ".scales", ".qzeros"))
               and parameter.name.startswith(("model.layers", "output")) and "lora" not in parameter.name.lower())


def main() -> None:
    """Makes the model here; what is measured runs in processes of its own."""
    arguments = parse()
    folder = arguments.folder / f"answer_7b_{arguments.layers}_{arguments.mode}"
    if arguments.part:
        ask(arguments, folder) if arguments.part == "ask" else verify(folder)
        return
    environment = {**os.environ, "OMP_NUM_THREADS": str(arguments.threads)}
    try:
        if not folder.exists():
            make(folder, arguments.layers, arguments.mode)
        os.utime(folder / "model.safetensors")    # nothing is remembered of it now
        time.sleep(3)                             # and what is younger never is
        size = sum(file.stat().st_size for file in folder.iterdir())
        print(f"{arguments.threads} threads, {arguments.layers} layers, mode {arguments.mode}: {size / 1e9:.2f} GB",
              flush=True)
        for part in ("verify", "ask"):
            subprocess.run([sys.executable, *sys.argv, "--part", part], env=environment, check=True)
    finally:
        if not arguments.keep:
            shutil.rmtree(folder, ignore_errors=True)


START = time.perf_counter()

if __name__ == "__main__":
    main()
