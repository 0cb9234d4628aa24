"""Pictures a second that workers decode and cut into tiles: this package's data set against torchvision's transforms.

    pip install torchvision            # the one that belongs to the installed torch
    python benchmarks/input_pipeline.py [--pictures 64] [--rounds 3] [--workers 2] [--packing]

1080p JPEGs, hd_num 18, the training transform. The other side does what the public code does: Pillow's resize and white
padding, ToTensor, Normalize, torch's bicubic resize for the global view, and a torch DataLoader with as many worker
processes. Both hand over batches of one picture (with --packing this package's of one row, which holds several), this
package's with local tiles as bytes; the tiles are compared.
"""
from __future__ import annotations

import argparse
import io
import json
import os
import statistics
import sys
import tarfile
import tempfile
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

HD_NUM, SIDE = 18, 560
BAR = 2.5
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


def make_pictures(folder: Path, count: int) -> list[Path]:
    """1080p photograph-like JPEGs of smooth noise."""
    paths = []
    for i in range(count):
        noise = np.random.default_rng(i).integers(0, 255, (54, 96, 3), np.uint8)
        path = folder / f"{i:03d}.jpg"
        Image.fromarray(noise).resize((1920, 1080), Image.BICUBIC).save(path, quality=90)
        paths.append(path)
    return paths


class TorchPictures:
    """The public path as a torch data set."""

    def __init__(self, paths: list[Path]):
        self.paths = paths

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int):
        import torch
        from torchvision import transforms

        from mindformers_ixc.processing.image import plan_partition

        torch.set_num_threads(1)          # as a DataLoader's workers do
        image = Image.open(self.paths[index]).convert("RGB")
        plan = plan_partition(*image.size, HD_NUM, SIDE, training=True)
        width, height = plan.padded
        image = transforms.functional.resize(image, plan.resized[::-1])
        top, left = plan.offset[1], plan.offset[0]
        padding = [left, top, width - image.width - left, height - image.height - top]
        image = transforms.functional.pad(image, padding, fill=(255, 255, 255))
        x = transforms.Compose([transforms.ToTensor(), transforms.Normalize(MEAN, STD)])(image)
        view = torch.nn.functional.interpolate(x[None], size=(SIDE, SIDE), mode="bicubic")
        rows, columns = plan.grid
        tiles = x.reshape(3, rows, SIDE, columns, SIDE).permute(1, 3, 0, 2, 4).reshape(-1, 3, SIDE, SIDE)
        return torch.cat([view, tiles])


def torch_round(paths: list[Path], workers: int) -> float:
    """Pictures a second, workers started before."""
    from torch.utils.data import DataLoader

    loader = iter(DataLoader(TorchPictures(paths), batch_size=1, num_workers=workers))
    next(loader)
    began = time.perf_counter()
    for _ in loader:
        pass
    return (len(paths) - 1) / (time.perf_counter() - began)


def make_source(kind: str, folder: Path, paths: list[Path]) -> Path:
    """The pictures as a JSON list of paths, a tar shard, or a Parquet table in row groups of 100, as published ones."""
    path = folder / f"data.{kind}"
    if kind == "tar":
        with tarfile.open(path, "w") as archive:
            for i, picture in enumerate(paths):
                for name, content in ((f"{i:06d}.jpg", picture.read_bytes()), (f"{i:06d}.txt", b"noise")):
                    member = tarfile.TarInfo(name)
                    member.size = len(content)
                    archive.addfile(member, io.BytesIO(content))
    elif kind == "parquet":
        rows = [{"id": str(i), "image": {"bytes": picture.read_bytes(), "path": picture.name}, "caption": "noise"}
                for i, picture in enumerate(paths)]
        pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=100)
    else:
        path.write_text(json.dumps([{"id": i, "image": str(picture), "caption": "noise"}
                                    for i, picture in enumerate(paths)]))
    return path


def own_dataset(source: Path, workers: int, packing: bool):
    """This package's data set over a source."""
    from mindformers.dataset.build_dataset import build_dataset
    from mindformers.tools.register import MindFormerConfig

    from mindformers_ixc.data.batch import BATCH_COLUMNS, PACKING_COLUMNS
    from mindformers_ixc.demo import demo_path

    section = {"data_loader": {"type": "IXC25DataLoader", "dataset_dir": str(source), "shuffle": False},
               "tokenizer": {"type": "InternLM2Tokenizer", "vocab_file": str(demo_path("tokenizer.model"))},
               "seq_length": 16384 if packing else 8192, "max_tiles": 40 if packing else 16, "packing": packing,
               "hd_num": HD_NUM, "image_size": SIDE, "patch_size": 14,
               "batch_size": 1, "num_parallel_workers": workers, "python_multiprocessing": True, "prefetch_size": 2,
               "numa_enable": False, "repeat": 1, "seed": 0, "drop_remainder": True,
               "input_columns": [*BATCH_COLUMNS, *(PACKING_COLUMNS if packing else ())]}
    return build_dataset(MindFormerConfig(type="IXC25SFTDataset", dataset_config=MindFormerConfig(**section)))


def own_round(dataset) -> float:
    """Pictures a second, workers started before."""
    plan = dataset.conversations.plan
    pictures = sum(len(plan.row(place)) for place in range(1, dataset.get_dataset_size()))
    iterator = dataset.create_tuple_iterator(num_epochs=1, output_numpy=True, do_copy=False)
    next(iterator)
    began = time.perf_counter()
    for _ in iterator:
        pass
    return pictures / (time.perf_counter() - began)


def main() -> int:
    """Measures all sides in turn; returns 0 if the tiles are equal and this package is `BAR` times as fast."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pictures", type=int, default=64, help="pictures a round")
    parser.add_argument("--rounds", type=int, default=3, help="rounds of each side")
    parser.add_argument("--sources", nargs="+", default=["json", "tar", "parquet"], help="what the pictures lie in")
    parser.add_argument("--workers", type=int, default=2, help="worker processes of each side")
    parser.add_argument("--packing", action="store_true", help="rows of several pictures")
    arguments = parser.parse_args()

    import mindformers_ixc  # noqa: F401 - before torch, as decord wants it
    from mindformers_ixc.data.batch import BATCH_COLUMNS, PIXEL_COLUMNS
    from mindformers_ixc.processing.image import Tiles

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        paths = make_pictures(folder, arguments.pictures)
        os.environ["MINDFORMERS_IXC_INDEX"] = str(folder / "index")
        datasets = {kind: own_dataset(make_source(kind, folder, paths), arguments.workers, arguments.packing)
                    for kind in arguments.sources}
        found: dict[str, list[float]] = {side: [] for side in (*datasets, "torchvision")}
        difference = 0.0
        for dataset in datasets.values():
            other = TorchPictures(paths)[dataset.conversations.plan.row(0)[0]].numpy()
            row = next(dataset.create_tuple_iterator(num_epochs=1, output_numpy=True))
            first = Tiles(*(row[BATCH_COLUMNS.index(name)][0] for name in PIXEL_COLUMNS)).normalised()
            difference = max(difference, float(np.abs(first[:len(other)] - other).max()))
        for _ in range(arguments.rounds):
            for kind, dataset in datasets.items():
                found[kind].append(own_round(dataset))
            found["torchvision"].append(torch_round(paths, arguments.workers))
    rates = {side: statistics.median(rounds) for side, rounds in found.items()}
    print(f"torchvision {rates['torchvision']:.1f} pictures/s; largest difference of the tiles {difference:.1e}")
    ratios = {kind: rates[kind] / rates["torchvision"] for kind in datasets}
    for kind, ratio in ratios.items():
        print(f"this package, {kind:8s} {rates[kind]:.1f} pictures/s: {ratio:.2f} x")
    return int(min(ratios.values()) < BAR or difference > 1e-5)


if __name__ == "__main__":
    sys.exit(main())
