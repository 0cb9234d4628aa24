"""Index, start, memory and resuming with millions of samples.

    python benchmarks/data_scale.py [--samples 1000000] [--packed]

Samples of one picture each are made by the script (pictures are few and reused); each figure is of a process of its
own, which imports MindSpore and MindFormers first: times and memory are what comes on top.
"""
from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from PIL import Image

PICTURES, BATCH, RESUMED = 20, 8, 100_000
ANSWER = "A cat that sits on a sofa and looks out of the window. "


def make_data(folder: Path, samples: int) -> Path:
    """A JSON list of so many samples of one picture, with answers of several lengths."""
    for number in range(PICTURES):
        Image.new("RGB", (640 + 24 * number, 480), (number, 0, 0)).save(folder / f"{number}.jpg")
    path = folder / f"{samples}.json"
    with open(path, "w", encoding="utf-8") as file:
        for number in range(samples):
            turns = [{"from": "human", "value": f"<ImageHere>What is shown in the picture number {number}?"},
                     {"from": "bot", "value": ANSWER * (1 + number % 3)}]
            row = {"id": number, "image": f"{number % PICTURES}.jpg", "conversations": turns}
            file.write(("[" if not number else ",\n") + json.dumps(row))
        file.write("]")
    return path


def section(data: Path, packed: bool) -> dict:
    """`train_dataset` of a run over the data."""
    columns = ["input_ids", "labels", "pixel_values", "global_views", "view_index", "vision_index", "image_mask"]
    more = {"packing": True, "max_segments": 32, "input_columns": [*columns, "segment_ends", "position_ids"]}
    return {"data_loader": {"type": "IXC25DataLoader", "dataset_dir": str(data)},
            "tokenizer": {"type": "InternLM2Tokenizer", "vocab_file": "pkg:mindformers_ixc/demo/tokenizer.model"},
            "seq_length": 2304 * (4 if packed else 1), "max_tiles": 9 * (4 if packed else 1), "hd_num": 4,
            "batch_size": BATCH, "seed": 1, **(more if packed else {})}


def memory(process: int | str = "self") -> dict[str, float]:
    """Memory of a process in MB: its share of what is shared (PSS), and what is its own."""
    fields = dict(line.split(":", 1) for line in Path(f"/proc/{process}/smaps_rollup").read_text().splitlines()[1:])
    return {name: int(fields[name].split()[0]) / 1024 for name in ("Pss", "Private_Dirty")}


def child(data: Path, packed: bool, step: int, wait: bool) -> None:
    """One rank: opens the data, takes the batch of a step, and prints what it took."""
    from mindformers.tools.register import MindFormerConfig

    import mindformers_ixc  # noqa: F401
    from mindformers_ixc.training.datasets import IXC25SFTDataset

    before, started = memory(), time.perf_counter()
    dataset = IXC25SFTDataset(MindFormerConfig(**section(data, packed)))
    opened = time.perf_counter() - started
    if step:
        dataset.set_init_step(step)
    sampler = dataset.plan_sampler
    expected = [dataset.conversations.samples[index].id for index in sampler.batch(step)[:3]]
    held = memory()
    columns = next(dataset.create_dict_iterator(num_epochs=1, output_numpy=True))
    print(json.dumps({"open": opened, "first batch": time.perf_counter() - started,
                      **{name: held[name] - before[name] for name in held}, "ids": expected,
                      "sum": int(columns["input_ids"].astype(np.int64).sum())}), flush=True)
    if wait:
        sys.stdin.readline()


def start(data: Path, packed: bool, step: int = 0, wait: bool = False) -> subprocess.Popen:
    """Starts a rank."""
    words = [sys.executable, __file__, "--child", str(data), "--step", str(step), *(["--packed"] if packed else []),
             *(["--wait"] if wait else [])]
    return subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)


def result(process: subprocess.Popen) -> dict:
    """What a rank prints."""
    for line in process.stdout:
        if line.startswith("{"):
            return json.loads(line)
    raise SystemExit("A rank ended without a word; run it with --child to see why.")


def main() -> None:
    """Prints the figures, one a line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--samples", type=int, default=1_000_000)
    parser.add_argument("--packed", action="store_true")
    parser.add_argument("--folder", type=Path, help="where the samples are made, and kept (default: a temporary one)")
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--step", type=int, default=0, help=argparse.SUPPRESS)
    parser.add_argument("--wait", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        child(arguments.child, arguments.packed, arguments.step, arguments.wait)
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        os.environ["MINDFORMERS_IXC_INDEX"] = str(Path(temporary) / "index")
        path = folder / f"{arguments.samples}.json"
        measure(path if path.exists() else make_data(folder, arguments.samples), arguments.packed)


def measure(data: Path, packed: bool) -> None:
    """Prints the figures of some data."""
    first = result(start(data, packed))
    print(f"index, plan and first batch   {first['first batch']:8.1f} s")
    again = [result(start(data, packed)) for _ in range(3)]
    print(f"first batch, all cached       {np.median([one['first batch'] for one in again]):8.1f} s   "
          f"(the data set is there after {np.median([one['open'] for one in again]):.2f} s)")
    print(f"memory of a rank              {np.median([one['Pss'] for one in again]):8.1f} MB, of which "
          f"{np.median([one['Private_Dirty'] for one in again]):.1f} MB its own")
    ranks = [start(data, packed, wait=True) for _ in range(2)]
    held = [result(rank) for rank in ranks]
    for rank in ranks:
        rank.communicate("\n")
    print(f"two ranks together            {sum(one['Pss'] for one in held):8.1f} MB")
    resumed = [result(start(data, packed, RESUMED)) for _ in range(2)]
    same = all(resumed[0][key] == resumed[1][key] for key in ("ids", "sum"))
    print(f"batch of step {RESUMED:,}         {resumed[0]['first batch']:8.1f} s, again "
          f"{resumed[1]['first batch']:.1f} s, the same samples: {same}")


if __name__ == "__main__":
    main()
