"""Weights of 4, 8 and 16 bits against float32 ones: products of the 7B model's shapes.

    python benchmarks/quantized.py --threads 2

Outputs are compared first: with float64 for the products of weights as they are stored. Every side of a round goes once
over as many copies of its weight as no cache holds, as a step of decoding does; the medians of the rounds are printed.
The floors: the bytes of a weight over the bandwidth of a copy (bytes read and written), both sides with as many
threads; and what MindSpore's product of as many rows reaches.
"""
from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from concurrent.futures import ThreadPoolExecutor

# Inputs and outputs of the products; w3 has the shape of w1, and the head is the output.
SHAPES = {"wqkv": (4096, 6144), "wo": (4096, 4096), "w1": (4096, 14336), "w2": (14336, 4096), "output": (4096, 92544)}
# Bytes that are read in a round at least: more than caches hold.
ROUND_BYTES = 200 * 2**20


def parse() -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--threads", type=int, default=2, help="threads of each side")
    parser.add_argument("--rounds", type=int, default=5, help="timed rounds of each side")
    parser.add_argument("--rows", type=int, default=512, help="positions of a prompt's product")
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


def main() -> None:
    """Measures in a process whose libraries know the number of threads from the beginning."""
    arguments = parse()
    threads = {"OMP_NUM_THREADS": str(arguments.threads)}
    if not threads.items() <= os.environ.items():
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, **threads})
    products(arguments)


if __name__ == "__main__":
    main()
