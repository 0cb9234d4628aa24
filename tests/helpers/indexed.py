"""Conversations in memory as the samples of a run, over an index of them."""
from __future__ import annotations

import tempfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np

from mindformers_ixc.data.fitting import Shapes
from mindformers_ixc.data.index.measuring import Measured, Measurer, _digest
from mindformers_ixc.data.index.samples import IndexedSource, make_samples
from mindformers_ixc.data.index.store import VERSION, Description, SourceIndex, write_index
from mindformers_ixc.data.rows import MAX_BAD_SHARE
from mindformers_ixc.errors import ImageError
from mindformers_ixc.processing.video import BoardSize


def fit_samples(processor, samples, seq_length, max_tiles, hd_num, max_bad_share=MAX_BAD_SHARE, **options):
    """The conversations that fit, cut, as `make_samples` has them."""
    measurer = Measurer(SimpleNamespace(), processor, hd_num)
    rounds, unusable = [], []
    for number, sample in enumerate(samples):
        try:
            rounds.append(measurer.rounds(sample))
        except ImageError as error:
            rounds.append([])
            unusable.append([number, str(error)])
    sizes = [(*size, int(isinstance(size, BoardSize))) for sample in samples for size in sample.sizes]
    measured = Measured(np.array([_digest(sample) for sample in samples], np.int64),
                        np.array([len(sample.sizes) for sample in samples]),
                        np.array(sizes).reshape(-1, 3),
                        np.array([len(one) for one in rounds]),
                        np.array([row for one in rounds for row in one]).reshape(-1, 3), [], [], [])
    folder = Path(tempfile.mkdtemp())
    write_index(folder, Description(VERSION, "x.json", len(samples), folder.name, "", [], unusable, [], []),
                [np.zeros((len(samples), 3))], [measured])
    reader = SimpleNamespace(name="x.json", read=lambda index, place: samples[index],
                             records=SimpleNamespace(where=lambda index: samples[index].where, changed=False))
    return list(make_samples([IndexedSource(SourceIndex(folder), reader)],
                             Shapes(seq_length, max_tiles, hd_num, **options), max_bad_share, folder))
