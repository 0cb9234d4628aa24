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

# Samples of a data set that shows what a rank takes whatever its data; rows that are looked up after the first batch.
FEW, READ = 1000, 2000
ANSWER = "A cat that sits on a sofa and looks out of the window. "


def make_data(folder: Path, samples: int) -> Path:
    """A JSON list of so many samples of one picture, with answers of several lengths."""
    for number in range(PICTURES):
        picture = folder / f"{number}.jpg"
        if not picture.exists():            # a picture that changes makes indices of its samples outdated
            Image.new("RGB", (640 + 24 * number, 480), (number, 0, 0)).save(picture)
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


def memory(index: Path) -> dict[str, float]:
    """Memory of this process in MB: its own, and its share of the index's pages, of which each process counts its part.

    Programs and libraries are no part of it: their pages are shared with whatever else runs on the machine.
    """
    own = mapped = 0
    of_index = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        name, _, value = line.partition(":")
        if "-" in name.split(" ")[0]:                       # a new mapping
            of_index = "/" in line and line[line.index("/"):].startswith(f"{index}/")
        elif name == "Anonymous":
            own += int(value.split()[0])
        elif name == "Pss" and of_index:
            mapped += int(value.split()[0])
    totals = dict(line.split(":", 1) for line in Path("/proc/self/smaps_rollup").read_text().splitlines()[1:])
    own += int(totals["Pss_Shmem"].split()[0])
    return {"own": own / 1024, "mapped": mapped / 1024}


def child(data: Path, packed: bool, step: int, rank: tuple[int, int], wait: bool) -> None:
    """One rank: opens the data, takes the batch of a step, and prints what it took.

    Memory is looked at when the first row is read: all that depends on the number of samples is there, and no batch.
    """
    from mindformers.tools.register import MindFormerConfig

    import mindformers_ixc  # noqa: F401
    from mindformers_ixc.data.index.folders import index_folder
    from mindformers_ixc.data.rows import ConversationTable
    from mindformers_ixc.training.datasets import IXC25SFTDataset

    index, held, read = index_folder().resolve(), list[dict](), ConversationTable.__getitem__
    IXC25SFTDataset._generate_shard_info = staticmethod(lambda: rank)      # as in a run of so many

    def first_read(table: ConversationTable, place: int) -> tuple:
        if not held:
            held.append(memory(index))
        return read(table, place)

    ConversationTable.__getitem__ = first_read
    before, started = memory(index), time.perf_counter()
    dataset = IXC25SFTDataset(MindFormerConfig(**section(data, packed)))
    opened = time.perf_counter() - started
    if step:
        dataset.set_init_step(step)
    columns = next(dataset.create_dict_iterator(num_epochs=1, output_numpy=True))
    first_batch = time.perf_counter() - started
    plan, samples = dataset.plan_sampler.plan, dataset.conversations.samples
    expected = [samples[number].id for row in plan.batch(step)[:3] for number in row]
    for place in np.random.default_rng(0).integers(0, plan.epoch_rows, READ).tolist():
        for number in plan.row(place):
            samples[number]
    print(json.dumps({"open": opened, "first batch": first_batch,
                      **{name: held[0][name] - before[name] for name in before},
                      "mapped later": memory(index)["mapped"], "ids": expected,
                      "sum": int(columns["input_ids"].astype(np.int64).sum())}), flush=True)
    if wait:
        sys.stdin.readline()


def start(data: Path, packed: bool, step: int = 0, rank: tuple[int, int] = (0, 1),
          wait: bool = False) -> subprocess.Popen:
    """Starts a rank."""
    words = [sys.executable, __file__, "--child", str(data), "--step", str(step), "--rank", *map(str, rank),
             *(["--packed"] if packed else []), *(["--wait"] if wait else [])]
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
    parser.add_argument("--folder", type=Path, help="where the samples and their index are made, and kept (default: a "
                                                    "temporary one)")
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--step", type=int, default=0, help=argparse.SUPPRESS)
    parser.add_argument("--rank", type=int, nargs=2, default=(0, 1), help=argparse.SUPPRESS)
    parser.add_argument("--wait", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        child(arguments.child, arguments.packed, arguments.step, tuple(arguments.rank), arguments.wait)
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        os.environ["MINDFORMERS_IXC_INDEX"] = str(folder / "index")
        few, data = (path if path.exists() else make_data(folder, samples)
                     for samples in (FEW, arguments.samples) for path in [folder / f"{samples}.json"])
        measure(data, few, arguments.packed)


def measure(data: Path, few: Path, packed: bool) -> None:
    """Prints the figures of some data, beside those of a few samples."""
    first = result(start(data, packed))
    print(f"index, plan and first batch   {first['first batch']:8.1f} s (only what is not there yet)")
    again = [result(start(data, packed)) for _ in range(3)]
    print(f"first batch, all cached       {middle(again, 'first batch'):8.1f} s   "
          f"(the data set is there after {middle(again, 'open'):.2f} s)")
    result(start(few, packed))
    for name, found in ((f"with {FEW:,} samples", [result(start(few, packed))]), ("with all", again)):
        print(f"memory of a rank {name:21}{middle(found, 'own'):8.1f} MB its own, {middle(found, 'mapped'):.1f} MB of "
              f"the index, {middle(found, 'mapped later'):.1f} MB of it after {READ:,} rows")
    for _ in range(2):              # rows of a larger global batch are planned first
        ranks = [start(data, packed, rank=(number, 2), wait=True) for number in range(2)]
        held = [result(rank) for rank in ranks]
        for rank in ranks:
            rank.communicate("\n")
    print(f"two ranks together            {sum(one['own'] for one in held):8.1f} MB their own, "
          f"{sum(one['mapped'] for one in held):.1f} MB of the index")
    resumed = [result(start(data, packed, RESUMED)) for _ in range(2)]
    same = all(resumed[0][key] == resumed[1][key] for key in ("ids", "sum"))
    print(f"batch of step {RESUMED:,}         {resumed[0]['first batch']:8.1f} s, again "
          f"{resumed[1]['first batch']:.1f} s, the same samples: {same}")


def middle(found: list[dict], name: str) -> float:
    """The median of what ranks say."""
    return float(np.median([one[name] for one in found]))


if __name__ == "__main__":
    main()
