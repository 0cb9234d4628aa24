"""Prefill and decode time of one request, this package against PyTorch eager, side by side in one process.

    python benchmarks/decode.py --threads 1
    python benchmarks/decode.py --threads 2
    python benchmarks/decode.py --threads 2 --busy          # beside a process that keeps a core busy
    python benchmarks/decode.py --threads 2 --avx2          # wider instructions switched off on both sides

Both sides run the same medium model with the same random weights in float32: ViT 256 wide x 6 on tiles of 224 pixels,
language model 512 wide x 6 with 8 heads and 4 key/value heads, vocabulary 8192. The prompt has 512 positions, one
2 x 2 picture among them; 64 tokens follow, greedily. First the outputs are compared, then the two sides take turns;
the medians of the rounds are printed. A decoded token reads every weight of the language model once, so its floor is
what as many threads take to read them and do nothing else, which is measured in between; how long a pass over several
rows takes is printed last. Needs torch beside the package's own dependencies, and a C compiler.
"""
from __future__ import annotations

import argparse
import contextlib
import ctypes
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

NEW_TOKENS, PROMPT = 64, 512


def parse() -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--threads", type=int, default=1, help="threads of each side")
    parser.add_argument("--rounds", type=int, default=5, help="timed rounds of each side")
    parser.add_argument("--busy", action="store_true", help="let a process of its own keep a core busy meanwhile")
    parser.add_argument("--avx2", action="store_true", help="switch wider instructions off on both sides")
    parser.add_argument("--rows", type=int, nargs="*", default=[1, 2, 4, 8], help="rows of the last measurement")
    return parser.parse_args()


def medium_config():
    """The model both sides run."""
    from mindformers_ixc.models.configuration import IXC25Config

    # MLP widths and LoRA ranks keep the 7B model's proportions (3.5 x and 4 x the width, width / 16)
    return IXC25Config(vocab_size=8192, hidden_size=512, intermediate_size=1792, num_hidden_layers=6,
                       num_attention_heads=8, num_key_value_heads=4, plora_rank=32, plora_alpha=32,
                       vision_config={"image_size": 224, "patch_size": 14, "hidden_size": 256, "num_hidden_layers": 6,
                                      "num_attention_heads": 4, "intermediate_size": 1024},
                       task_lora_ranks={}, seq_length=PROMPT, max_tiles=5)


def medium_model():
    """A random model; no parameter is zero, so that a missing term would show."""
    import numpy as np
    from mindspore import Tensor

    from mindformers_ixc.generation.causal_lm import IXC25ForCausalLM

    model = IXC25ForCausalLM(medium_config())
    rng = np.random.default_rng(0)
    for parameter in model.get_parameters():
        scale = 0.3 if "embeddings" in parameter.name else 1.5 * parameter.shape[-1] ** -0.5
        value = 1 + 0.1 * rng.standard_normal(parameter.shape) if "norm" in parameter.name else \
            scale * rng.standard_normal(parameter.shape)
        parameter.set_data(Tensor(value.astype(np.float32)))
    model.set_train(False)
    return model


def prompt(config):
    """512 positions: text, a 2 x 2 picture, text."""
    import numpy as np

    from mindformers_ixc.processing.encoded import EncodedSample
    from mindformers_ixc.processing.image import Grid, image_token_count

    rng = np.random.default_rng(1)
    grid, vision = Grid(2, 2), config.vision_config
    count = image_token_count(grid, vision.tokens_per_side)
    mask = np.zeros(PROMPT, np.int32)
    mask[40:40 + count] = 1
    ids = np.where(mask == 1, config.pad_token_id, rng.integers(3, config.vocab_size, PROMPT)).astype(np.int32)
    pixels = rng.standard_normal((5, 3, vision.image_size, vision.image_size)).astype(np.float32)
    return EncodedSample(ids, np.full_like(ids, -100), mask, [grid], pixels, vision.tokens_per_side)


class Ours:
    """This package's engine."""

    def __init__(self, model, sample):
        from mindformers_ixc.generation.engine import InferenceEngine

        self.engine, self.sample = InferenceEngine(model), sample

    def vision(self):
        """Time of the picture's tokens alone."""
        self.engine.encode_images(self.sample).asnumpy()

    def prefill(self):
        """From pixels and ids to the first logits."""
        self.decoder = self.engine.decoder([self.sample], NEW_TOKENS)
        return self.decoder.prefill()[0]

    def step(self, token):
        """One more token."""
        import numpy as np

        return self.decoder.step(np.array([token], np.int32))[0]


class Torch:
    """PyTorch eager."""

    def __init__(self, model, sample, threads):
        import torch
        from torch_model import TorchModel

        from mindformers_ixc.models.rotary import rotary_tables

        torch.set_num_threads(threads)
        torch.set_grad_enabled(False)
        self.torch = torch
        self.model = TorchModel({p.name: p.asnumpy() for p in model.get_parameters()}, model.config)
        self.tables = rotary_tables(model.config, PROMPT + NEW_TOKENS)
        self.pixels, self.ids = torch.from_numpy(sample.pixel_values), torch.from_numpy(sample.input_ids).long()
        self.mask = torch.from_numpy(sample.image_mask == 1)

    def vision(self):
        """Time of the picture's tokens alone."""
        self.model.vision_tokens(self.pixels)

    def prefill(self):
        """From pixels and ids to the first logits."""
        self.model.start(PROMPT + NEW_TOKENS, *self.tables)
        return self.model.forward(self.ids, self.model.vision_tokens(self.pixels), self.mask).numpy()

    def step(self, token):
        """One more token."""
        return self.model.forward(self.torch.tensor([token])).numpy()


def run(side):
    """One request, greedily; the seconds of vision, prefill and a decoded token, and what came out."""
    start = time.perf_counter()
    side.vision()
    vision = time.perf_counter() - start
    start = time.perf_counter()
    logits = side.prefill()
    prefill = time.perf_counter() - start
    tokens, every, steps = [int(logits.argmax())], [logits], []
    for _ in range(NEW_TOKENS - 1):
        start = time.perf_counter()
        logits = side.step(tokens[-1])
        tokens.append(int(logits.argmax()))
        steps.append(time.perf_counter() - start)
        every.append(logits)
    half = len(steps) // 2
    return {"vision": vision, "prefill": prefill, "decode": statistics.fmean(steps),
            "first half": statistics.fmean(steps[:half]), "second half": statistics.fmean(steps[half:])}, tokens, every


READER = """
#include <omp.h>
/* Sums up blocks of 16384 numbers: nothing is left out by the compiler, and nothing takes longer than reading them. */
float read_all(const float **blocks, long count, int threads) {
    float sum = 0.0f;
#pragma omp parallel for num_threads(threads) schedule(dynamic, 1) reduction(+ : sum)
    for (long block = 0; block < count; ++block) {
        const float *from = blocks[block];
        float lanes[64] = {0};
        for (int i = 0; i < 16384; i += 64) {
            for (int j = 0; j < 64; j += 16) __builtin_prefetch(from + i + 2048 + j);
            for (int j = 0; j < 64; ++j) lanes[j] += from[i + j];
        }
        for (int j = 0; j < 64; ++j) sum += lanes[j];
    }
    return sum;
}
"""


class Floor:
    """What reading the weights takes that a decoded token reads, as they lie in memory, by so many threads."""

    def __init__(self, model, threads):
        self.threads = threads
        self.arrays = [one.asnumpy().copy() for one in model.get_parameters()
                       if one.name.startswith(("model.layers", "model.norm", "output"))
                       and "lora" not in one.name.lower()]
        self.bytes = sum(array.nbytes for array in self.arrays)
        starts = [array.ctypes.data + 4 * at for array in self.arrays for at in range(0, array.size - 16383, 16384)]
        self.blocks = (ctypes.c_void_p * len(starts))(*starts)
        with tempfile.TemporaryDirectory() as folder:
            library = Path(folder) / "reader.so"
            options = ("-O3", "-march=native", "-ffast-math", "-fopenmp", "-fPIC", "-shared", "-xc", "-")
            subprocess.run(["cc", *options, "-o", library], input=READER, text=True, check=True)
            self.read = ctypes.CDLL(str(library)).read_all

    def measure(self):
        """Seconds of one reading."""
        start = time.perf_counter()
        self.read(self.blocks, ctypes.c_long(len(self.blocks)), self.threads)
        return time.perf_counter() - start


def narrow() -> None:
    """Switches instructions wider than AVX2 off: in oneDNN, MKL, torch and this package's kernels, built for this."""
    os.environ.update({"ONEDNN_MAX_CPU_ISA": "AVX2", "MKL_ENABLE_INSTRUCTIONS": "AVX2", "ATEN_CPU_CAPABILITY": "avx2",
                       "CC": "cc -DNO_AVX512", "XDG_CACHE_HOME": tempfile.mkdtemp(prefix="kernels_")})


@contextlib.contextmanager
def busy(wanted: bool):
    """Keeps a core busy meanwhile; the process may go to any of the cores that this one may use."""
    if not wanted:
        yield
        return
    process = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        yield
    finally:
        process.kill()
        process.wait()


def tokens_of_rows(ours, sample, rows):
    """Median seconds of a pass over so many rows."""
    import numpy as np

    decoder = ours.engine.decoder([sample] * rows, NEW_TOKENS)
    tokens, steps = decoder.prefill().argmax(-1).astype(np.int32), []
    for _ in range(NEW_TOKENS - 1):
        start = time.perf_counter()
        tokens = decoder.step(tokens).argmax(-1).astype(np.int32)
        steps.append(time.perf_counter() - start)
    decoder.close()
    return statistics.median(steps[5:])


def compare(ours, other) -> None:
    """Stops unless both sides gave the same tokens and close logits."""
    import numpy as np

    (_, tokens, logits), (_, other_tokens, other_logits) = ours, other
    difference = max(float(np.abs(a - b).max()) for a, b in zip(logits, other_logits))
    scale = max(float(np.abs(b).max()) for b in other_logits)
    print(f"tokens equal: {tokens == other_tokens}, largest difference of a logit {difference:.1e} of {scale:.1f}")
    if tokens != other_tokens or difference > 1e-4 * scale:
        sys.exit("The two sides do not compute the same; their times would mean nothing.")


def count_compilations() -> list[str]:
    """Names of the graphs that MindSpore compiles from now on."""
    from mindspore.common import api

    compiled, real = [], api._cell_graph_executor.compile

    def counted(cell, *args, **kwargs):
        phase, is_new = real(cell, *args, **kwargs)
        if is_new:
            compiled.append(type(cell).__name__)
        return phase, is_new

    api._cell_graph_executor.compile = counted
    return compiled


def main() -> None:
    """Compares, measures, prints."""
    arguments = parse()
    os.environ["OMP_NUM_THREADS"] = str(arguments.threads)
    if arguments.avx2:
        narrow()
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:arguments.threads])
    import mindspore as ms

    import mindformers_ixc  # noqa: F401 - registers the model

    ms.set_context(mode=ms.GRAPH_MODE)
    ms.set_device("CPU")
    model = medium_model()
    sample = prompt(model.config)
    sides = {"ours": Ours(model, sample), "torch": Torch(model, sample, arguments.threads)}
    compare(run(sides["ours"]), run(sides["torch"]))
    compiled = count_compilations()
    rounds, floor, readings = {name: [] for name in sides}, Floor(model, arguments.threads), []
    with busy(arguments.busy):
        for _ in range(arguments.rounds):
            for name, side in sides.items():
                rounds[name].append(run(side)[0])
            readings += [floor.measure() for _ in range(5)]
    print(f"graphs compiled in the timed part: {len(compiled)}")
    print(f"{arguments.threads} thread(s), {'beside a busy process, ' if arguments.busy else ''}medians of "
          f"{arguments.rounds}, milliseconds")
    print(f"{'':12}{'ours':>10}{'PyTorch':>10}{'PyTorch / ours':>16}")
    for part in rounds["ours"][0]:
        ours, other = (statistics.median(one[part] for one in rounds[name]) * 1e3 for name in ("ours", "torch"))
        print(f"{part:12}{ours:10.2f}{other:10.2f}{other / ours:16.2f}")
    least = statistics.median(readings) * 1e3
    ours, other = (statistics.median(one["decode"] for one in rounds[name]) * 1e3 for name in ("ours", "torch"))
    print(f"a token reads {floor.bytes / 1e6:.0f} MB, in {least:.2f} ms ({floor.bytes / least / 1e6:.1f} GB/s): "
          f"ours is at {least / ours:.0%} of that floor, PyTorch at {least / other:.0%}")
    with busy(arguments.busy):
        passes = {rows: tokens_of_rows(sides["ours"], sample, rows) for rows in arguments.rows}
    print("a pass over rows: " + ", ".join(f"{rows}: {seconds * 1e3:.2f}" for rows, seconds in passes.items()))


if __name__ == "__main__":
    main()
