"""Converts a random checkpoint of the 7B model's exact shapes to tensor parallel 8 and back: speed, memory, equality.

    python benchmarks/convert_7b.py FOLDER              # about 60 GB of room; everything is removed at the end
    python benchmarks/convert_7b.py FOLDER --layers 4   # a quick look

The source is sharded as the public repository is: three pytorch_model-*.bin files in bfloat16 (with PyTorch; else
three safetensors). A plain copy of the same bytes is timed in the same run, both with everything on the disk at the
end. The way back reads what has digests, so it is timed with their comparison and without (--no_verify); the comparison
alone is timed from the disk, from memory and remembered, beside other digests of the same bytes.
"""
from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np

SHARDS = 3


def parse() -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("folder", type=Path, help="where everything is written")
    parser.add_argument("--layers", type=int, default=32, help="decoder layers (32 is the 7B model)")
    parser.add_argument("--tp", type=int, default=8, help="tensor-parallel degree")
    parser.add_argument("--safetensors", action="store_true", help="source as safetensors even with PyTorch")
    parser.add_argument("--make", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args()


def make(folder: Path, layers: int, with_torch: bool) -> None:
    """Writes the random checkpoint; runs in a process of its own, because it holds a shard in memory."""
    from mindformers_ixc.models.configuration import IXC25Config
    from mindformers_ixc.parameters import parameter_table

    config = IXC25Config(num_hidden_layers=layers)
    table = list(parameter_table(config).values())
    limit, used, shards = sum(math.prod(entry.shape) for entry in table) / SHARDS, 0, [[] for _ in range(SHARDS)]
    for entry in table:
        shards[min(int(used / limit), SHARDS - 1)].append(entry)
        used += math.prod(entry.shape)
    rng, weight_map = np.random.default_rng(0), {}
    for index, shard in enumerate(shards):
        # any bits but the largest exponents: every number is finite
        tensors = {entry.name: random_bits(rng, entry.shape) for entry in shard}
        name = f"{index + 1:05d}-of-{SHARDS:05d}"
        name = f"pytorch_model-{name}.bin" if with_torch else f"model-{name}.safetensors"
        write_shard(tensors, folder / name, with_torch)
        weight_map.update(dict.fromkeys(tensors, name))
        del tensors
    index = "pytorch_model.bin.index.json" if with_torch else "model.safetensors.index.json"
    (folder / index).write_text(json.dumps({"metadata": {"total_size": used * 2}, "weight_map": weight_map}))
    (folder / "config.json").write_text(json.dumps(config.to_public_dict()))


def random_bits(rng, shape: tuple[int, ...]) -> np.ndarray:
    """Random bfloat16 numbers below 2, as bits."""
    bits = np.frombuffer(rng.bytes(2 * math.prod(shape)), np.uint16) & 0xBFFF
    return bits.reshape(shape)


def write_shard(tensors: dict[str, np.ndarray], path: Path, with_torch: bool) -> None:
    """Writes one shard."""
    if with_torch:
        import torch

        torch.save({name: torch.from_numpy(bits.view(np.int16)).view(torch.bfloat16)
                    for name, bits in tensors.items()}, path)
        return
    from mindformers_ixc.checkpoint.tensor_file import TensorFile

    file = TensorFile(path, [(name, "BF16", bits.shape) for name, bits in tensors.items()])
    file.open()
    for name, bits in tensors.items():
        file.write(name, 0, bits)
    file.close()


def copy(source: Path, target: Path) -> float:
    """Seconds of a plain copy of a folder, everything on the disk."""
    start = time.perf_counter()
    shutil.copytree(source, target)
    os.sync()
    return time.perf_counter() - start


def run(arguments: list[str]) -> tuple[float, float]:
    """Seconds and peak resident memory (GiB) of a command and everything it starts, taken every 20 ms."""
    peak, done = [0.0], threading.Event()
    os.sync()
    start = time.perf_counter()
    process = subprocess.Popen(arguments)

    def watch():
        while not done.wait(0.02):
            peak[0] = max(peak[0], sum(map(resident, family(process.pid))))

    thread = threading.Thread(target=watch)
    thread.start()
    code = process.wait()
    os.sync()
    seconds = time.perf_counter() - start
    done.set()
    thread.join()
    if code:
        sys.exit(f"{' '.join(arguments)} failed")
    return seconds, peak[0]


def family(pid: int) -> list[int]:
    """A process and its descendants."""
    found = [pid]
    for parent in found:
        try:
            for task in Path(f"/proc/{parent}/task").iterdir():
                found += map(int, (task / "children").read_text().split())
        except OSError:
            continue
    return found


def resident(pid: int) -> float:
    """Resident memory of a process in GiB, 0 if it is gone."""
    try:
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE") / 2**30
    except (OSError, IndexError):
        return 0.0


def digests(folder: Path) -> dict[str, str]:
    """SHA-256 of every tensor of a checkpoint, with its format and shape."""
    from mindformers_ixc.checkpoint.sources import open_source

    found = {}
    for name, tensor in open_source(folder).tensors.items():
        digest = hashlib.sha256(f"{tensor.dtype} {tensor.shape}".encode())
        for _, piece in tensor.pieces():
            digest.update(np.ascontiguousarray(piece).reshape(-1).view(np.uint8))
        found[name] = digest.hexdigest()
    return found


def main() -> None:
    """Makes, copies, converts, converts back, compares."""
    arguments = parse()
    try:
        import torch  # noqa: F401
        with_torch = not arguments.safetensors
    except ImportError:
        with_torch = False
    if arguments.make:
        make(arguments.make, arguments.layers, with_torch)
        return
    root = arguments.folder / "convert_7b"
    source, cut, back = root / "public", root / "cut", root / "back"
    source.mkdir(parents=True)
    try:
        subprocess.run([sys.executable, __file__, str(root), "--make", str(source), "--layers", str(arguments.layers),
                        *(["--safetensors"] if not with_torch else [])], check=True)
        size = sum(file.stat().st_size for file in source.iterdir()) / 1e9
        print(f"source: {size:.2f} GB in {SHARDS} {'.bin' if with_torch else '.safetensors'} shards", flush=True)
        subprocess.run(["mindformers", "inspect", str(source)], check=True)
        report(source, cut, back, root, size, arguments.tp)
    finally:
        shutil.rmtree(root)


def report(source: Path, cut: Path, back: Path, root: Path, size: float, degree: int) -> None:
    """Measures and prints."""
    plain = copy(source, root / "copy")
    shutil.rmtree(root / "copy")
    print(f"plain copy:        {plain:7.1f} s  {size / plain:6.3f} GB/s", flush=True)
    before = digests(source)
    measure(f"to MindSpore, tp {degree}", ["convert", str(source), str(cut), "--tp", str(degree)], plain, size)
    shutil.rmtree(source)     # 22 GB of room
    measure("back, not verified", ["convert", str(cut), str(back), "--to", "hf", "--no_verify"], plain, size)
    shutil.rmtree(back)
    measure("back to public", ["convert", str(cut), str(back), "--to", "hf"], plain, size)
    compare_digests(cut)
    print(f"bit-equal: {digests(back) == before}", flush=True)


def compare_digests(folder: Path) -> None:
    """Times the comparison of a folder with its digests, and other digests of the same bytes."""
    import zlib

    from mindformers_ixc.checkpoint.digests import SETTLED_S, verify_folder

    files = list(folder.rglob("*.safetensors"))
    size = sum(file.stat().st_size for file in files) / 1e9
    time.sleep(SETTLED_S)

    def timed(title: str, work) -> None:
        start, cpu = time.perf_counter(), time.process_time()
        work()
        seconds = time.perf_counter() - start
        print(f"{title:<28} {seconds:8.2f} s  {size / seconds:8.2f} GB/s  {time.process_time() - cpu:7.2f} s of CPU",
              flush=True)

    for file in files:
        with open(file, "rb") as opened:
            os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    timed("compared, from the disk", lambda: verify_folder(folder, remember=False))
    timed("compared, from memory", lambda: verify_folder(folder, remember=False))
    timed("remembered", lambda: verify_folder(folder))

    def read(update) -> None:
        for file in files:
            with open(file, "rb", buffering=0) as opened:
                while block := opened.read(4 * 2**20):
                    update(block)

    timed("SHA-256, one thread", lambda: read(hashlib.sha256().update))
    timed("BLAKE2b, one thread", lambda: read(hashlib.blake2b().update))
    timed("CRC-32, one thread", lambda: read(zlib.crc32))
    try:
        import xxhash
    except ImportError:
        return
    timed("XXH3, one thread", lambda: read(xxhash.xxh3_128().update))


def measure(title: str, command: list[str], plain: float, size: float) -> None:
    """Runs a conversion and prints its figures."""
    seconds, peak = run(["mindformers", *command])
    print(f"{title:<18} {seconds:7.1f} s  {size / seconds:6.3f} GB/s  {plain / seconds:5.2f} x the copy's speed  "
          f"peak {peak:.2f} GiB", flush=True)


if __name__ == "__main__":
    main()
