"""Weights of 4, 8 and 16 bits against float32 ones: products of the 7B model's shapes, and the 7B model itself.

    python benchmarks/quantized.py --threads 2                   # products, against MindSpore's MatMul in float32
    python benchmarks/quantized.py --threads 2 --model FOLDER    # the 7B in 4 bits: 6 GB of room, removed at the end

Outputs are compared first: with float64 for the products of weights as they are stored. Every side of a round goes once
over as many copies of its weight as no cache holds, as a step of decoding does; the medians of the rounds are printed.
The floors: the bytes of a weight over the bandwidth of a copy (bytes read and written), both sides with as many
threads; and what MindSpore's product of as many rows reaches.

The 7B model has random weights of the exact shapes (without task LoRAs, which mode base does not read); a 2 x 2 picture
and a question of 2069 positions are answered by it.
"""
from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import statistics
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

# Inputs and outputs of the products: wqkv, w1 and w3, w2, and the head.
SHAPES = {"wqkv": (4096, 6144), "w1": (4096, 14336), "w2": (14336, 4096), "output": (4096, 92544)}
# Bytes that are read in a round at least: more than caches hold.
ROUND_BYTES = 200 * 2**20
PROMPT, TEXT_BEFORE = 2069, 20


def parse() -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--threads", type=int, default=2, help="threads of each side")
    parser.add_argument("--rounds", type=int, default=5, help="timed rounds of each side")
    parser.add_argument("--rows", type=int, default=512, help="positions of a prompt's product")
    parser.add_argument("--model", type=Path, metavar="FOLDER", help="measure the 7B model; where it is written")
    parser.add_argument("--layers", type=int, default=32, help="its decoder layers")
    parser.add_argument("--tokens", type=int, default=16, help="its decoded tokens")
    return parser.parse_args()


def median(seconds: list[float]) -> float:
    """In milliseconds."""
    return 1000 * statistics.median(seconds)


def copy_bandwidth(threads: int) -> float:
    """Bytes read and written per second by a copy that no cache holds, by as many threads; the best of several."""
    import numpy as np

    source, target = np.ones(2**29, np.uint8), np.zeros(2**29, np.uint8)
    parts = [slice(len(source) * i // threads, len(source) * (i + 1) // threads) for i in range(threads)]
    best = 0.0
    with ThreadPoolExecutor(threads) as pool:
        for _ in range(7):
            start = time.perf_counter()
            list(pool.map(lambda part: np.copyto(target[part], source[part]), parts))
            best = max(best, 2 * len(source) / (time.perf_counter() - start))
    return best


def stored_arrays(kind: str, weight):
    """A weight `(O, F)` as it is stored, and what that means."""
    import numpy as np

    from mindformers_ixc.checkpoint import packing
    from mindformers_ixc.checkpoint.dtypes import from_float32, to_float32

    if kind == "int4":
        numbers, scales, zeros = packing.round_4(weight)
        return [packing.pack_4(numbers), scales, zeros], lambda end: packing.widen_4(numbers[:end], scales[:end],
                                                                                     zeros[:end])
    if kind == "int8":
        numbers, scales = packing.round_8(weight)
        return [numbers, scales], lambda end: packing.widen_8(numbers[:end], scales[:end])
    if kind == "bf16":
        bits = from_float32(weight, "BF16")
        return [bits], lambda end: to_float32(bits[:end], "BF16")
    return [weight.astype(np.float32)], lambda end: weight[:end]


def graph_of(kind: str, arrays: list, copies: int):
    """A graph that multiplies by as many copies of a weight, one after the other."""
    import numpy as np
    from mindspore import Parameter, Tensor, nn, ops
    from mindspore.common import np_dtype

    from mindformers_ixc.native import kernels

    def parameter(array, name):
        copy = np.array(array)
        copy = copy.view(np_dtype.bfloat16) if kind == "bf16" else copy
        return Parameter(Tensor.from_numpy(copy), name=name, requires_grad=False)

    class One(nn.Cell):
        """One product; the inputs of all depend on each other, so that none runs beside another."""

        def __init__(self, number):
            super().__init__()
            for place, array in zip(("first", "second", "third"), arrays):
                setattr(self, place, parameter(array, f"{place}_{number}"))
            self.count = len(arrays)
            self.product = ops.MatMul(transpose_b=True) if kind == "f32" else \
                kernels.kernel(f"linear_{kind}", lambda x, weight, *_: (x[0], weight[0]))

        def construct(self, x):
            """Maps `(N, F)` to `(N, O)`."""
            if self.count == 3:
                return self.product(x, self.first, self.second, self.third)
            if self.count == 2:
                return self.product(x, self.first, self.second)
            return self.product(x, self.first)

    class All(nn.Cell):
        """All of them; their sum keeps each."""

        def __init__(self):
            super().__init__()
            self.all = nn.CellList([One(number) for number in range(copies)])

        def construct(self, x):
            """Maps `(N, F)` to `(N, O)`."""
            y = x
            for one in self.all:
                y = one(ops.depend(x, y))
            return y

    return All()


def products(arguments: argparse.Namespace) -> None:
    """Prints what a product takes, by shape and kind of weight."""
    import mindspore as ms
    import numpy as np
    from mindspore import Tensor

    ms.set_context(mode=ms.GRAPH_MODE)
    ms.set_device("CPU")
    bandwidth, rng = copy_bandwidth(arguments.threads), np.random.default_rng(0)
    print(f"{arguments.threads} threads; a copy reads and writes {bandwidth / 1e9:.1f} GB/s")
    print(f"{'':8}{'weight':>7}{'1 row, ms':>11}{'GB/s':>7}{'of floor':>10}{f'{arguments.rows} rows, ms':>14}"
          f"{'GFLOP/s':>9}{'of MatMul':>11}{'error':>10}")
    for name, (width, outputs) in SHAPES.items():
        weight = (rng.standard_normal((outputs, width), np.float32) * width ** -0.5).astype(np.float32)
        inputs = [Tensor(rng.standard_normal((rows, width), np.float32)) for rows in (1, arguments.rows)]
        graphs, sizes, errors, times = {}, {}, {}, {}
        for kind in ("f32", "int4", "int8", "bf16"):
            arrays, meaning = stored_arrays(kind, weight)
            sizes[kind] = sum(array.nbytes for array in arrays)
            copies = max(1, -(-ROUND_BYTES // sizes[kind]))
            many = graph_of(kind, arrays, copies)
            graphs[kind] = many, many if copies == 1 else graph_of(kind, arrays, 1), copies
            expected = inputs[1].asnumpy()[:16].astype(np.float64) @ meaning(512).T.astype(np.float64)
            found = graphs[kind][1](inputs[1]).asnumpy()[:16, :512]
            errors[kind] = np.abs(found - expected).max() / expected.std()
            times[kind] = [], []
        for turn in range(arguments.rounds + 2):
            for kind, (many, single, copies) in graphs.items():
                for place, (graph, x) in enumerate(((many, inputs[0]), (single, inputs[1]))):
                    start = time.perf_counter()
                    graph(x).asnumpy()
                    seconds = time.perf_counter() - start
                    if turn > 1:        # MindSpore tries thread numbers at first
                        times[kind][place].append(seconds / (copies if place == 0 else 1))
        whole = median(times["f32"][1])
        for kind, (one, several) in times.items():
            floor, row, rows = 1000 * sizes[kind] / bandwidth, median(one), median(several)
            print(f"{name:8}{kind:>7}{row:11.2f}{sizes[kind] / row / 1e6:7.1f}{100 * floor / row:9.0f}%{rows:14.1f}"
                  f"{2e-6 * arguments.rows * width * outputs / rows:9.0f}{100 * whole / rows:10.0f}%"
                  f"{errors[kind]:10.1e}", flush=True)


def make(folder: Path, layers: int) -> None:
    """Writes a 4-bit model directory of the 7B's shapes whose numbers are random."""
    import numpy as np

    from mindformers_ixc.checkpoint.quantise import kind_of
    from mindformers_ixc.checkpoint.quantised import FORMATS, OWN, SECTION, Quantization, array_shapes
    from mindformers_ixc.checkpoint.tensor_file import TensorFile
    from mindformers_ixc.config import ModelConfig
    from mindformers_ixc.parameters import parameter_table

    config, quantization = ModelConfig(num_hidden_layers=layers, task_lora_ranks={}), Quantization(OWN, 4, "BF16")
    tensors, rng = [], np.random.default_rng(0)
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
        elif dtype == "BF16":                # between 2^-7 and 2^-6, with either sign
            value = (rng.integers(0, 2**16, shape, np.uint16) & 0x807F) | np.uint16(0x3C00)
        else:
            value = rng.integers(0, 256, shape, np.uint8).view({"U8": np.uint8, "I8": np.int8}[dtype])
        file.write(name, 0, value)
    file.sync()
    file.close()
    (folder / "config.json").write_text(json.dumps({**config.to_public_dict(), SECTION: quantization.to_section()}))


def resident() -> dict[str, float]:
    """GB that are resident now, mapped pages of files apart, and the most that ever were."""
    fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    now = {key: int(fields[f"Rss{key}"].split()[0]) / 1e6 for key in ("Anon", "File")}
    return {**now, "peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6}


def whole_model(arguments: argparse.Namespace) -> None:
    """Prints what loading, the picture, the prompt and a token of the 7B model take."""
    import mindspore as ms
    import numpy as np

    from mindformers_ixc.generation.assistant import Assistant
    from mindformers_ixc.generation.causal_lm import IXC25ForCausalLM
    from mindformers_ixc.generation.loading import load_model

    ms.set_context(mode=ms.GRAPH_MODE)
    ms.set_device("CPU")
    folder = arguments.model / "quantized_7b"
    size = sum(file.stat().st_size for file in folder.iterdir())
    print(f"{arguments.threads} threads; {arguments.layers} layers, {size / 1e9:.2f} GB on disk; before loading "
          f"{resident()['peak']:.1f} GB are resident", flush=True)
    start = time.perf_counter()
    assistant = Assistant(load_model(folder, IXC25ForCausalLM), None)
    print(f"load: {time.perf_counter() - start:.1f} s; resident {resident()}", flush=True)
    sample = prompt(assistant.model.config)
    start = time.perf_counter()
    assistant.engine.encode_images(sample).asnumpy()
    print(f"picture, 5 tiles, with compilation: {time.perf_counter() - start:.1f} s; resident {resident()}", flush=True)
    decoder = assistant.engine.decoder([sample], arguments.tokens + 3)
    start = time.perf_counter()
    tokens = decoder.prefill().argmax(-1)
    print(f"picture and prompt of {len(sample.input_ids)} positions (a graph of {decoder.bucket}), with compilation: "
          f"{time.perf_counter() - start:.1f} s; resident {resident()}", flush=True)
    times = []
    for _ in range(arguments.tokens + 3):
        start = time.perf_counter()
        scores = decoder.step(tokens)
        times.append(time.perf_counter() - start)
        assert np.isfinite(scores).all()
        tokens = scores.argmax(-1)
    times = times[3:]
    read, bandwidth = bytes_of_a_token(assistant.model), copy_bandwidth(arguments.threads)
    seconds = statistics.median(times)
    print(f"a token: {1000 * seconds:.0f} ms, reads {read / 1e9:.2f} GB: {read / seconds / 1e9:.1f} GB/s, "
          f"{100 * read / bandwidth / seconds:.0f} % of a copy's {bandwidth / 1e9:.1f} GB/s; resident {resident()}",
          flush=True)


def bytes_of_a_token(model) -> int:
    """Bytes of the weights that a decoded token reads: the decoder's linears and the head, without the pairs."""
    return sum(parameter.nbytes for parameter in model.get_parameters()
               if parameter.name.endswith((".qweight", ".scales", ".qzeros"))
               and (parameter.name.startswith(("model.layers", "output"))))


def prompt(config):
    """Text, a 2 x 2 picture, text."""
    import numpy as np

    from mindformers_ixc.processing.image import Grid, image_token_count
    from mindformers_ixc.processing.processor import EncodedSample

    rng, grid, vision = np.random.default_rng(1), Grid(2, 2), config.vision_config
    count, mask = image_token_count(grid, vision.tokens_per_side), np.zeros(PROMPT, np.int32)
    mask[TEXT_BEFORE:TEXT_BEFORE + count] = 1
    ids = np.where(mask == 1, config.pad_token_id, rng.integers(3, config.vocab_size, PROMPT)).astype(np.int32)
    pixels = rng.standard_normal((5, 3, vision.image_size, vision.image_size)).astype(np.float32)
    return EncodedSample(ids, np.full_like(ids, -100), mask, [grid], pixels, vision.tokens_per_side)


def main() -> None:
    """Measures one or the other, in a process whose libraries know the number of threads from the beginning."""
    arguments = parse()
    threads = {"OMP_NUM_THREADS": str(arguments.threads)}
    if not threads.items() <= os.environ.items():
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, **threads})
    if not arguments.model:
        products(arguments)
        return
    folder = arguments.model / "quantized_7b"
    try:
        make(folder, arguments.layers)
        whole_model(arguments)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main()
