"""The program of a process that measures some parts of a source: `python -m ... FOLDER NUMBER COUNT`.

It prints the number of samples of each part that it has written, and the sentences of `building.SAYS` and `ENDS`; on a
full disk its exit code is the system's number of that error.
"""
from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import numpy as np

from mindformers_ixc.data.conversations import ReadingOptions
from mindformers_ixc.data.index.building import ENDS, JOB, SAYS, SCAN, measure_parts
from mindformers_ixc.data.index.folders import FULL
from mindformers_ixc.data.index.keys import Measures
from mindformers_ixc.data.index.kinds import open_reader
from mindformers_ixc.data.rows import SectionOptions, make_processor, own_tokenizer
from mindformers_ixc.interruption import die_with
from mindformers_ixc.reading import current as reads


def main(folder: Path, number: int, count: int) -> None:
    """Measures every `count`-th of the missing parts, from `number` on."""
    job = json.loads((folder / JOB).read_text(encoding="utf-8"))
    die_with(job["parent"])
    reads.limit, reads.say, reads.end = job["read_timeout"], _say, _end
    places = np.load(folder / SCAN, mmap_mode="r")
    section = job["section"]
    measures = Measures(section, make_processor(SectionOptions(section), own_tokenizer(section)),
                        job["hd_num"], True, job["decode"])
    reader = open_reader(job["source"], ReadingOptions(**job["options"]))
    size, time = job["state"]
    reader.records.expect(size, time, compared=False)
    measure_parts(reader, measures, places, job["missing"][number::count], folder / "parts",
                  lambda samples: print(samples, flush=True))


def _say(sentence: str) -> None:
    print(SAYS + sentence, flush=True)


def _end(sentence: str) -> None:
    print(ENDS + sentence, flush=True)
    os._exit(1)


if __name__ == "__main__":
    try:
        main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
    except OSError as full:
        if full.errno not in FULL:
            raise
        sys.exit(full.errno)
