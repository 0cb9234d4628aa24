"""What a row of a Parquet table costs by the size of its row groups, shuffled and in the file's own order.

    python benchmarks/row_groups.py [--rows 20000] [--groups 100 10000] [--reads 60] [--folder DIR]

Rows have a picture's worth of bytes (100 kB, noise). Each figure is of a process of its own: milliseconds a row, and
the memory that it took at most, beyond what it had before. The files, 2 GB each by default, are removed.
"""
from __future__ import annotations

import argparse
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

PICTURE = 100_000

# Orders of rows, and how many times as many rows are read in each.
ORDERS = {"shuffled": 1, "in order": 20}


def write(path: Path, rows: int, group: int) -> None:
    """A table of noise in row groups of one size."""
    schema = pa.schema([("image", pa.struct([("bytes", pa.binary()), ("path", pa.string())])),
                        ("caption", pa.string())])
    rng = np.random.default_rng(0)
    with pq.ParquetWriter(path, schema) as writer:
        for first in range(0, rows, group):
            members = [{"image": {"bytes": rng.bytes(PICTURE), "path": f"{number}.jpg"}, "caption": "noise"}
                       for number in range(first, min(rows, first + group))]
            writer.write_table(pa.Table.from_pylist(members, schema), row_group_size=group)


def read(path: Path, order: str, count: int) -> tuple[float, float]:
    """Milliseconds a row, and MiB that reading took."""
    from mindformers_ixc.data.records import open_records

    records = open_records(path)
    places = list(records)
    if order == "shuffled":
        random.Random(0).shuffle(places)
    before = most_memory()
    began = time.perf_counter()
    for index, place in places[:count]:
        for file in records.read(index, place).files.values():
            file.read()
    each = (time.perf_counter() - began) / min(len(places), count)
    return each * 1000, most_memory() - before


def most_memory() -> float:
    """MiB that this process has taken at most."""
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return int(status.partition("VmHWM:")[2].split()[0]) / 1024


def main() -> int:
    """Measures every size of groups; returns 0."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=20_000, help="rows of a file")
    parser.add_argument("--groups", nargs="+", type=int, default=[100, 10_000], help="rows of a row group")
    parser.add_argument("--folder", help="for the files; by default a temporary one")
    parser.add_argument("--reads", type=int, default=60, help="shuffled rows that are read; in order 20 times as many")
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        path, order = arguments.child
        print("{:.1f} ms a row, {:.0f} MiB".format(*read(Path(path), order, arguments.reads)))
        return 0
    for group in arguments.groups:
        with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
            path = Path(folder) / "data.parquet"
            write(path, arguments.rows, group)
            for order, times in ORDERS.items():
                words = ["--reads", str(times * arguments.reads), "--child", str(path), order]
                ended = subprocess.run([sys.executable, __file__, *words], check=True, text=True,
                                       stdout=subprocess.PIPE)
                print(f"groups of {group:6d} rows, {order:8s}: {ended.stdout.strip()}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
