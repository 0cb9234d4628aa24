"""The program of a process that measures some parts of a source: `python -m ... FOLDER NUMBER COUNT`.

It prints the number of samples of each part that it has written.
"""
from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np

from mindformers_ixc.data.conversations import ReadingOptions
from mindformers_ixc.data.index.building import JOB, SCAN, Measures, measure_parts
from mindformers_ixc.data.index.kinds import open_reader
from mindformers_ixc.data.rows import SectionOptions, make_processor, own_tokenizer
from mindformers_ixc.interruption import die_with


def main(folder: Path, number: int, count: int) -> None:
    """Measures every `count`-th of the missing parts, from `number` on."""
    job = json.loads((folder / JOB).read_text(encoding="utf-8"))
    die_with(job["parent"])
    places = np.load(folder / SCAN, mmap_mode="r")
    section = job["section"]
    measures = Measures(section, make_processor(SectionOptions(section), own_tokenizer(section)),
                        job["hd_num"], True, job["decode"])
    reader = open_reader(job["source"], ReadingOptions(**job["options"]))
    measure_parts(reader, measures, places, job["missing"][number::count], folder / "parts",
                  lambda samples: print(samples, flush=True))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
