"""Time and memory of a training step, this package against PyTorch eager, side by side in one process.

    python benchmarks/train_step.py --threads 1
    python benchmarks/train_step.py --threads 2
    python benchmarks/train_step.py --threads 2 --busy

Both sides train the whole medium model in float32 from the same random weights: ViT 256 wide x 6 on tiles of 224
pixels, language model 512 wide x 6, vocabulary 8192; two samples of 512 positions, each with a picture of 2 x 2 tiles;
AdamW with clipping. This package's side is what `mindformers run` builds: the step cell around MindFormers' optimizer
with its groups and schedule. First the losses of three steps and the weights after them are compared, then the two
sides take turns; the medians are printed, with the share of what the products alone would take at the speed of a large
product, which each side's own library reaches. Then each side trains in a process of its own, for its peak memory and
the time until the first step is done; ours also with a step that was kept (`context.enable_compile_cache`). Needs torch
beside the package's own dependencies.
"""
from __future__ import annotations

import argparse
import importlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from neighbour import neighbour

LENGTH, SAMPLES, RATE, COMPARED = 512, 2, 1e-4, 3
SIDES = ("ours", "torch")


def parse() -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--threads", type=int, default=1, help="threads of each side")
    parser.add_argument("--rounds", type=int, default=5, help="timed steps of each side")
    parser.add_argument("--busy", action="store_true", help="take turns beside a process that keeps a core busy")
    parser.add_argument("--profile", metavar="FOLDER", help="only write MindSpore's profile of two steps there")
    parser.add_argument("--alone", choices=SIDES, help=argparse.SUPPRESS)
    parser.add_argument("--keep", metavar="FOLDER", help=argparse.SUPPRESS)
    return parser.parse_args()


def training_model():
    """The medium model of decode.py, ready to train; dropout is off, for the libraries draw other noise."""
    from decode import medium_model

    model = medium_model()
    model.set_train(True)
    for _, cell in model.cells_and_names():
        if hasattr(cell, "plora_dropout"):
            cell.plora_dropout.set_rate(0.0)
    return model


def batch(config) -> dict:
    """Two samples by column: text, a 2 x 2 picture, text; what follows the picture carries loss."""
    import numpy as np
    from decode import prompt

    sample, rng = prompt(config), np.random.default_rng(2)
    is_text, side, tiles = sample.image_mask == 0, config.vision_config.image_size, config.max_tiles
    ids = np.stack([sample.input_ids] * SAMPLES)
    ids[1, is_text] = rng.integers(3, config.vocab_size, is_text.sum())
    targets = np.roll(ids, -1, 1)
    labels = np.where(np.arange(LENGTH) < LENGTH - 100, -100, targets)
    return {"input_ids": ids, "labels": labels.astype(np.int32),
            "pixel_values": rng.integers(0, 256, (SAMPLES, tiles, 3, side, side)).astype(np.uint8),
            "global_views": rng.standard_normal((SAMPLES, 1, 3, side, side)).astype(np.float32),
            "view_index": np.stack([(np.arange(tiles) == 0).astype(np.int32)] * SAMPLES),
            "vision_index": np.stack([sample.vision_index(tiles)] * SAMPLES),
            "image_mask": np.stack([sample.image_mask] * SAMPLES)}


class Ours:
    """The step as `mindformers run` builds it on a CPU."""

    def __init__(self, model, columns):
        from mindformers.core import build_optim
        from mindformers.core.lr import ConstantWarmUpLR
        from mindformers.tools.register import MindFormerConfig
        from mindformers.trainer.optimizer_grouped_parameters import get_optimizer_grouped_parameters
        from mindformers.wrapper import build_wrapper
        from mindspore import Tensor

        from mindformers_ixc.training.optimizer import native_optimizer
        from mindformers_ixc.training.step import StepPlan

        rate = ConstantWarmUpLR(learning_rate=RATE, warmup_steps=0, total_steps=1000)
        groups = get_optimizer_grouped_parameters(model, 0.0, rate, "AdamW", model_params=set())
        section = MindFormerConfig(type="AdamW", betas=[0.9, 0.95], eps=1e-8)
        plan = StepPlan()
        with native_optimizer(section, model.trainable_params()):
            optimizer = build_optim(section, default_args={"params": groups, "learning_rate": rate})
        optimizer = plan.optimizer(optimizer)
        section = MindFormerConfig(scale_sense=1.0, use_clip_grad=True, max_grad_norm=1.0,
                                   **plan.cell("MFTrainOneStepCell"))
        self.cell = build_wrapper(section, default_args={"network": model, "optimizer": optimizer})
        self.cell.set_train(True)
        self.model, self.columns = model, [Tensor(value) for value in columns.values()]

    def step(self) -> float:
        """One step; its loss."""
        return float(self.cell(*self.columns)[0].asnumpy())

    def weights(self) -> dict:
        """The weights now."""
        return {parameter.name: parameter.asnumpy() for parameter in self.model.get_parameters()}


class Torch:
    """PyTorch eager with autograd and its own AdamW."""

    def __init__(self, model, columns):
        import torch
        from torch_training import TorchTrainer

        torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
        self.trainer = TorchTrainer({p.name: p.asnumpy().copy() for p in model.get_parameters()}, model.config)
        self.columns = columns

    def step(self) -> float:
        """One step; its loss."""
        return self.trainer.step(self.columns, RATE)

    def weights(self) -> dict:
        """The weights now."""
        return {name: value.detach().numpy() for name, value in self.trainer.p.items()}


def compare(sides: dict, start: dict) -> None:
    """Some steps of both; stops unless losses are the same and weights have moved alike."""
    import numpy as np

    for number in range(COMPARED):
        losses = [side.step() for side in sides.values()]
        print(f"step {number}: loss " + ", ".join(f"{name} {loss:.6f}" for name, loss in zip(sides, losses)))
        if abs(losses[0] - losses[1]) > 1e-4 * abs(losses[1]):
            sys.exit("The two sides do not compute the same; their times would mean nothing.")
    ours, other = (side.weights() for side in sides.values())
    moved = sum(float(np.square(other[name] - start[name], dtype=np.float64).sum()) for name in start)
    apart = sum(float(np.square(ours[name] - other[name], dtype=np.float64).sum()) for name in start)
    print(f"weights after {COMPARED} steps: {(apart / moved) ** 0.5:.1e} of the way they went lies between the sides")
    if not moved or apart > 1e-4 * moved:
        sys.exit("The two sides' weights differ; their times would mean nothing.")


def product_speed() -> float:
    """Operations a second of MindSpore's product 1024 x 2048 x 2048."""
    import numpy as np
    from mindspore import Tensor, nn, ops

    class Product(nn.Cell):
        """The product as a graph."""

        def construct(self, x, y):
            """x y^T."""
            return ops.MatMul(transpose_b=True)(x, y)

    x, y = Tensor(np.ones((1024, 2048), np.float32)), Tensor(np.ones((2048, 2048), np.float32))
    product, times = Product(), []
    for _ in range(20):
        began = time.perf_counter()
        product(x, y).asnumpy()
        times.append(time.perf_counter() - began)
    return 2 * 1024 * 2048 * 2048 / min(times)


def operations(config) -> float:
    """Operations of a step's products with weights (`mindformers_ixc.operations`, without attention)."""
    from mindformers_ixc.operations import training_costs

    costs, vision = training_costs(config), config.vision_config
    attention = 3 * 4.0 * vision.positions ** 2 * vision.hidden_size * vision.num_hidden_layers
    return costs.of(SAMPLES * LENGTH, SAMPLES * config.max_tiles) - attention * SAMPLES * config.max_tiles


def memory(name: str) -> float:
    """Resident memory of this process in GiB: VmRSS now, VmHWM at most (`getrusage` counts the parent's)."""
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(status[name].split()[0]) / 2 ** 20


def alone(name: str, keep: str | None) -> None:
    """Four steps of one side; prints the seconds of the first, and resident memory before and at most, as JSON."""
    from mindformers_ixc.training import kept_graphs

    kept_graphs.folder = Path(keep) if keep else None
    model = training_model()
    side = {"ours": Ours, "torch": Torch}[name](model, batch(model.config))
    before, began = memory("VmRSS"), time.perf_counter()
    side.step()
    first = time.perf_counter() - began
    for _ in range(3):
        side.step()
    print(json.dumps({"first": first, "before": before, "peak": memory("VmHWM")}))


def profile(folder: str) -> None:
    """Two steps under MindSpore's profiler, after one without it."""
    import mindspore as ms

    model = training_model()
    side = Ours(model, batch(model.config))
    side.step()
    with ms.profiler.profile(activities=[ms.profiler.ProfilerActivity.CPU],
                             on_trace_ready=ms.profiler.tensorboard_trace_handler(folder)):
        for _ in range(2):
            side.step()


def report_alone(threads: int) -> None:
    """Each side in a process of its own; ours also keeping its compiled step, and beginning with the kept one."""
    with tempfile.TemporaryDirectory() as folder:
        kept = ["--keep", folder]
        for name, what, keep in (("torch", "", []), ("ours", "", []), ("ours", ", keeping its step", kept),
                                 ("ours", ", with the kept step", kept)):
            words = [sys.executable, __file__, "--threads", str(threads), "--alone", name, *keep]
            run = subprocess.run(words, capture_output=True, text=True, check=True)
            found = json.loads(run.stdout.splitlines()[-1])
            print(f"{name} alone{what}: first step after {found['first']:.1f} s, peak memory {found['peak']:.2f} GiB "
                  f"({found['peak'] - found['before']:.2f} GiB of it beyond what was there when the steps began)")


def take_turns(sides: dict, rounds: int) -> list[float]:
    """Medians of the seconds of a step of each side."""
    times: dict = {name: [] for name in SIDES}
    for _ in range(rounds):
        for name in SIDES:
            began = time.perf_counter()
            sides[name].step()
            times[name].append(time.perf_counter() - began)
    return [statistics.median(times[name]) for name in SIDES]


def main() -> None:
    """Compares, measures, prints."""
    arguments = parse()
    os.environ["OMP_NUM_THREADS"] = str(arguments.threads)
    if not arguments.busy:                         # beside a neighbour the system says who gets which core
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:arguments.threads])
        importlib.import_module("torch")           # both sides have one OpenMP, and it PyTorch's settings
    importlib.import_module("mindformers_ixc")     # registers the model, and says how OpenMP's threads wait
    import mindspore as ms

    ms.set_context(mode=ms.GRAPH_MODE)
    ms.set_device("CPU")
    if arguments.alone:
        alone(arguments.alone, arguments.keep)
        return
    if arguments.profile:
        profile(arguments.profile)
        return
    model = training_model()
    columns, start = batch(model.config), {p.name: p.asnumpy().copy() for p in model.get_parameters()}
    sides = {"torch": Torch(model, columns), "ours": Ours(model, columns)}
    compare({name: sides[name] for name in SIDES}, start)
    with neighbour(arguments.busy):
        ours, other = take_turns(sides, arguments.rounds)
    print(f"{arguments.threads} thread(s){', beside a busy core' if arguments.busy else ''}, medians of "
          f"{arguments.rounds}: ours {ours:.2f} s, PyTorch {other:.2f} s, PyTorch / ours {other / ours:.2f}")
    work, speed = operations(model.config), product_speed()
    print(f"{work / 1e9:.0f} GFLOP of products at {speed / 1e9:.0f} GFLOP/s, alone, are {work / speed:.2f} s: ours at "
          f"{work / speed / ours:.0%} of that floor, PyTorch at {work / speed / other:.0%}")
    if not arguments.busy:
        report_alone(arguments.threads)


if __name__ == "__main__":
    main()
