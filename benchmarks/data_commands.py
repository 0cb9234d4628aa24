"""Time and peak memory of what reads whole files of data: converters, preview, init, preference pairs.

    python benchmarks/data_commands.py [--share 1.0] [--only coco_captions ...]

Inputs have the form and the size of what they stand for (COCO captions: 600,000 of 118,287 pictures; OCR-VQA: 1,000,000
covers of five questions; a million samples or preference pairs of one picture); `--share` makes smaller ones. Each
command is a process of its own.
"""
from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path

from data_scale import ANSWER, make_data, memory

PICTURES, CAPTIONS, COVERS, SAMPLES = 118_287, 600_000, 1_000_000, 1_000_000

PARTS = ("coco_captions", "ocr_vqa", "pairs", "preview", "init")


def write_parts(path: Path, parts: Iterable[tuple[str, Iterable[str], str]]) -> Path:
    """Writes a file of lists or objects: what stands in front, entries with commas between them, and what follows."""
    with open(path, "w", encoding="utf-8") as file:
        for before, entries, after in parts:
            file.write(before)
            for number, entry in enumerate(entries):
                file.write((", " if number else "") + entry)
            file.write(after)
    return path


def coco(folder: Path, share: float) -> Path:
    """A file as `captions_train2017.json`."""
    count = max(1, int(PICTURES * share))
    pictures = (json.dumps({"license": 3, "file_name": f"{i:012d}.jpg", "height": 427, "width": 640, "id": i,
                            "coco_url": f"http://images.example/train2017/{i:012d}.jpg",
                            "date_captured": "2013-11-14 17:02:52"}) for i in range(count))
    captions = (json.dumps({"image_id": i % count, "id": i,
                            "caption": f"A bicycle replica with a clock as the front wheel number {i}."})
                for i in range(int(CAPTIONS * share)))
    return write_parts(folder / "captions.json", [('{"info": {"year": 2017}, "images": [', pictures, "], "),
                                                  ('"annotations": [', captions, "]}")])


def covers(folder: Path, share: float) -> Path:
    """A file as OCR-VQA's `dataset.json`."""
    asked = ["Who wrote this book?", "What is the title of this book?", "What type of book is this?",
             "Is this a comedy book?", "Is this book related to Arts?"]
    entries = (f'"{i:010d}": ' + json.dumps({
        "imageURL": f"http://images.example/I/51{i:09d}.jpg", "questions": asked,
        "answers": [f"Author {i}", f"The title of the book number {i}", "Calendars", "No", "Yes"],
        "title": f"The title of the book number {i}", "authorName": f"Author {i}", "genre": "Calendars", "split": 1})
        for i in range(int(COVERS * share)))
    return write_parts(folder / "covers.json", [("{", entries, "}")])


def samples(folder: Path, share: float) -> tuple[Path, Path]:
    """A list of samples of one picture, and the same as lines."""
    listed = make_data(folder, max(1, int(SAMPLES * share)))
    lines = listed.with_suffix(".jsonl")
    with open(listed, encoding="utf-8") as source, open(lines, "w", encoding="utf-8") as target:
        for line in source:
            target.write(line.strip().lstrip("[").removesuffix("]").removesuffix(",") + "\n")
    return listed, lines


def pairs(folder: Path, share: float) -> Path:
    """A list of preference pairs of one picture."""
    make_data(folder, 1)                                   # for the pictures
    entries = (json.dumps({"id": i, "image": f"{i % 20}.jpg", "prompt": f"What is shown in the picture number {i}?",
                           "chosen": ANSWER * (1 + i % 3), "rejected": "A dog. " * (1 + i % 4)})
               for i in range(int(SAMPLES * share)))
    return write_parts(folder / "pairs.json", [("[", entries, "]")])


def open_pairs(path: Path) -> None:
    """Opens pairs as a rank does, reads the first batch, and prints the time and the memory that it took."""
    from mindformers_ixc.cli.yaml_file import read_yaml
    from mindformers_ixc.data.fitting import Shapes
    from mindformers_ixc.data.index.plans import saved
    from mindformers_ixc.data.index.samples import make_samples
    from mindformers_ixc.data.index.sources import measures_of, open_sources
    from mindformers_ixc.data.mixture import make_planner
    from mindformers_ixc.data.preferences import PreferenceTable
    from mindformers_ixc.data.rows import SectionOptions, make_processor, own_tokenizer

    section, folder = read_yaml("ixc25_dpo_tiny")["train_dataset"], path.parent / "index"
    processor = make_processor(SectionOptions(section), own_tokenizer(section))
    index = folder.resolve()
    before, started = memory(index), time.perf_counter()
    sources = open_sources({"dataset_dir": str(path)}, 0, measures_of(section, processor), folder, kind="pair")
    samples = make_samples(sources, Shapes(400, 9, section["hd_num"]), 0.01, folder)
    table = PreferenceTable(processor, samples, 400, 9, section["hd_num"], needs=samples.needs)
    planner = make_planner(samples.name_numbers, samples.images > 0, samples.names, None, 0, True, True)
    table.plan = saved(planner, folder, "pairs")(8)
    for place in range(8):
        table[place]
    held = {name: value - before[name] for name, value in memory(index).items()}
    print(f"{'pairs, opened, and the first batch':40} {time.perf_counter() - started:7.1f} s {held['own']:7.0f} MB its "
          f"own, {held['mapped']:.0f} MB mapped of the index", flush=True)


def run(name: str, *words: object) -> None:
    """Runs a command, and prints its time and peak memory."""
    started = time.perf_counter()
    process = subprocess.Popen([sys.executable, "-m", "mindformers_ixc", *map(str, words)],
                               stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    _, status, used = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"mindformers {' '.join(map(str, words))} ended with {process.returncode}.")
    print(f"{name:40} {time.perf_counter() - started:7.1f} s {used.ru_maxrss / 1024:7.0f} MB", flush=True)


def main() -> None:
    """Prints a line for each command."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--share", type=float, default=1.0, help="of the sizes")
    parser.add_argument("--only", nargs="+", choices=PARTS)
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        open_pairs(arguments.child)
        return
    wanted = arguments.only or PARTS
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        for kind, make in (("coco_captions", coco), ("ocr_vqa", covers)):
            source = make(folder, arguments.share) if kind in wanted else None
            for form in ("json", "jsonl") if source else ():
                run(f"{kind} --format {form}", "data", kind, source, folder / f"out.{form}", "--format", form)
        path = pairs(folder, arguments.share) if "pairs" in wanted else None
        for _ in range(3 if path else 0):                  # the first time the index is built
            subprocess.run([sys.executable, __file__, "--child", str(path)], check=True, stderr=subprocess.DEVNULL)
        if {"preview", "init"}.isdisjoint(wanted):
            return
        for source in samples(folder, arguments.share):
            number = int(SAMPLES * arguments.share * 0.77)
            words = ("data", "preview", source, "--output", folder / "page.html")
            if "preview" in wanted:
                run(f"preview --sample, {source.suffix[1:]}", *words, "--sample", number)
                run(f"preview, {source.suffix[1:]}", *words)
            if "init" in wanted:
                run(f"init, {source.suffix[1:]}", "init", "--data", source, "--output", folder / "my.yaml",
                    "--overwrite")


if __name__ == "__main__":
    main()
