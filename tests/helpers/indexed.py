"""Conversations in memory: as the samples of a run over an index of them, and as all that some sources hold."""
from __future__ import annotations

import random
import tempfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np

from mindformers_ixc.data.conversations import (
    ReadingOptions,
    choice_seed,
    load_conversations,
    named_sources,
    raise_errors,
)
from mindformers_ixc.data.fitting import Shapes, first_pairs, pair_count
from mindformers_ixc.data.index.measuring import Measured, Measurer, _digest
from mindformers_ixc.data.index.samples import IndexedSource, make_samples
from mindformers_ixc.data.index.store import VERSION, Description, SourceIndex, write_index
from mindformers_ixc.data.rows import MAX_BAD_SHARE
from mindformers_ixc.errors import DataError, ImageError
from mindformers_ixc.processing.video import BoardSize


def fit_samples(processor, samples, seq_length, max_tiles, hd_num, max_bad_share=MAX_BAD_SHARE, **options):
    """The conversations that fit, cut, as `make_samples` has them."""
    measurer = Measurer(SimpleNamespace(options=ReadingOptions()), processor, hd_num)
    rounds, unusable = [], []
    for number, sample in enumerate(samples):
        try:
            rounds.append(measurer.parts(sample))
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
    reader = SimpleNamespace(name="x.json", options=ReadingOptions(), read=lambda index, place: samples[index],
                             records=SimpleNamespace(where=lambda index: samples[index].where, changed=False))
    return list(make_samples([IndexedSource(SourceIndex(folder), reader)],
                             Shapes(seq_length, max_tiles, hd_num, **options), max_bad_share, folder))


def resample(samples, count, rng):
    """`count` samples: every sample as often as any other, and the rest drawn without repetition."""
    whole, rest = divmod(count, len(samples))
    return list(samples) * whole + rng.sample(list(samples), rest)


def load_sources(dataset_dir, seed=0):
    """Everything that `dataset_dir` names, as samples in memory."""
    samples = []
    for path, count in named_sources(dataset_dir):
        source = load_conversations(path, seed=seed)
        samples += source if count is None else resample(source, count, random.Random(choice_seed(seed, path)))
    return samples


def read_image_sizes(samples, exif="ignore"):
    """Fills in the sizes of the pictures of samples, as the index finds them; what is wrong with any is one error."""
    images = SimpleNamespace(image_processor=SimpleNamespace(exif=exif))
    measurer, errors = Measurer(SimpleNamespace(options=ReadingOptions()), images, 1), []
    for sample in samples:
        try:
            measurer._fill_in_sizes(sample, {})
        except DataError as error:
            errors.append(str(error))
    raise_errors(errors)


def fit_pairs(processor, sample, seq_length, max_tiles, hd_num, max_images=None):
    """How many question-answer pairs of a conversation fit, tried from all of them down, and what is needed of it."""
    for count in range(pair_count(sample), 0, -1):
        part = first_pairs(sample, count)
        needed = processor.conversation_length(part.turns, part.sizes, hd_num, sample.where, part.images)
        few = max_images is None or len(part.images) <= max_images
        if needed[0] <= seq_length and needed[1] <= max_tiles and few:
            return count, needed
        shortest = needed
    return 0, shortest
