"""The training data as MindFormers and MindSpore take them: classes of the registry over `data`'s rows and plans."""
from __future__ import annotations

import logging
import os
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
from mindformers.dataset.base_dataset import BaseDataset
from mindformers.models.build_tokenizer import build_tokenizer
from mindformers.tools.register import MindFormerConfig, MindFormerModuleType, MindFormerRegister
from mindspore.dataset import GeneratorDataset, Sampler

from mindformers_ixc.data.batch import BATCH_COLUMNS, REFERENCE_COLUMN, SCORE_COLUMN
from mindformers_ixc.data.columns import unmap
from mindformers_ixc.data.fitting import Shapes
from mindformers_ixc.data.groups import GroupTable
from mindformers_ixc.data.index.keys import Measures
from mindformers_ixc.data.index.plans import saved
from mindformers_ixc.data.index.samples import IndexedSource, SampleSet, make_samples
from mindformers_ixc.data.index.sources import measures_of, open_sources
from mindformers_ixc.data.learning import ALL
from mindformers_ixc.data.mixture import Planner, make_planner
from mindformers_ixc.data.packed_plan import Packing
from mindformers_ixc.data.packer import Budget
from mindformers_ixc.data.preferences import PreferenceTable
from mindformers_ixc.data.rows import ConversationTable, bad_share_of, make_processor
from mindformers_ixc.data.sampling import PlanSampler, RunPlan
from mindformers_ixc.data.sections import row_budget
from mindformers_ixc.errors import DataError
from mindformers_ixc.native import library
from mindformers_ixc.processing.image import HD_NUM_TRAINING
from mindformers_ixc.processing.processor import Processor
from mindformers_ixc.reading import watch_reads

logger = logging.getLogger(__name__)


class MindSporeSampler(PlanSampler, Sampler):
    """`PlanSampler` as one of MindSpore's samplers; arguments as there."""

    def get_indices(self) -> np.ndarray:
        """Places of an epoch, of which there may be millions; MindSpore's own way makes a Python object of each."""
        return self.take()

    def __init__(self, *arguments, **options):
        PlanSampler.__init__(self, *arguments, **options)
        Sampler.__init__(self, num_samples=len(self))


def section_processor(config: MindFormerConfig) -> Processor:
    """The processor of a `train_dataset` section; its tokenizer may be any of MindFormers' registry."""
    return make_processor(config, build_tokenizer(dict(config.tokenizer)))


def batched(cls, table: ConversationTable, planner: Planner, config: MindFormerConfig) -> GeneratorDataset:
    """A MindSpore dataset of batches from a table and the plan of its rows.

    Args:
        cls: MindFormers' dataset class, which knows this rank's share.
        table: rows; gets the plan.
        planner: makes the plan of the run.
        config: the `train_dataset` section.
    """
    rank, ranks = cls._generate_shard_info()
    shard = (0, 1) if ranks is None else (rank, ranks)
    table.plan = planner(config.batch_size * shard[1])
    if table.plan.note:
        logger.info(table.plan.note)
    sampler = MindSporeSampler(table.plan, config.batch_size, shard, (config.seq_length, config.max_tiles))
    library()              # built here, if it has not been, and not while the workers want it
    workers, cores = config.num_parallel_workers or 1, os.cpu_count() or 1
    if workers > cores:      # MindSpore takes no more
        logger.warning(f"train_dataset.num_parallel_workers is {workers}, but this machine has {cores} cores; {cores} "
                       "are used.")
    dataset = GeneratorDataset(table, list(table.columns), sampler=sampler, num_parallel_workers=min(workers, cores),
                               python_multiprocessing=bool(config.python_multiprocessing))
    dataset = dataset.batch(config.batch_size, drop_remainder=True)
    dataset = dataset.repeat(config.repeat) if (config.repeat or 1) > 1 else dataset
    dataset.conversations, dataset.plan_sampler = table, sampler   # for reports
    dataset.set_init_step = sampler.start_at   # MindSpore's own way cannot restart a Python sampler inside an epoch
    return dataset


@MindFormerRegister.register(MindFormerModuleType.DATASET_LOADER)
class IXC25DataLoader:
    """The sources of a `data_loader` section.

    Args:
        dataset_dir: a source (`mindformers_ixc.data.records`), a `.txt` list file, or a list of these.
        image_folder: where relative image paths start.
        image_root: a folder that every picture and video must lie in; by default any file may be named.
        ignore_keys: keys of samples that are not read.
        shuffle: whether each epoch has an order of its own.
        seed: of sampling and shuffling.
        caption_prompts: questions for samples that are captions, one chosen at random for each.
        mixture: weights of the sources (`mindformers_ixc.data.mixture`); without, an epoch has every sample once.
        fetch: whether http(s) addresses of pictures and videos are fetched, into the user's cache.
        index_dir: where the indices of the sources lie; by default in the user's cache.
        read_timeout: seconds that reading a file may take before the process ends (`mindformers_ixc.reading`).
        loss_on: which answers carry loss (`mindformers_ixc.data.learning`); by default all.
    """

    def __init__(self, dataset_dir: str, image_folder: str | None = None, shuffle: bool = True, seed: int = 0,
                 caption_prompts: Sequence[str] | None = None, mixture: dict | None = None,
                 image_root: str | None = None, ignore_keys: Sequence[str] = (), fetch: bool = False,
                 index_dir: str | None = None, read_timeout: float | None = None, loss_on: str | None = None):
        self.shuffle, self.seed, self.mixture, self.index_dir = shuffle, seed, mixture, index_dir
        self.read_timeout = read_timeout
        self.section = {"dataset_dir": dataset_dir, "image_folder": image_folder, "caption_prompts": caption_prompts,
                        "image_root": image_root, "ignore_keys": ignore_keys, "fetch": fetch, "loss_on": loss_on}

    def sources(self, measures: Measures, bad_share: float = 0.0, kind: str = "sample") -> list[IndexedSource]:
        """The sources, each with its index, which is built where there is none; arguments as of `open_sources`.

        Args:
            measures: how samples are measured.
            kind: of the samples, of `KINDS`.

        Raises:
            DataError: for unusable data.
        """
        watch_reads(self.read_timeout)
        return open_sources(self.section, self.seed, measures, self.index_dir, bad_share, kind=kind)


@MindFormerRegister.register(MindFormerModuleType.DATASET)
class IXC25SFTDataset(BaseDataset):
    """Supervised fine-tuning data as MindFormers' `train_dataset_task` builds it."""

    def __new__(cls, dataset_config: dict | None = None, **kwargs: Any) -> GeneratorDataset:
        """The dataset of a `train_dataset` section: what MindFormers builds it by.

        Args:
            dataset_config: the `train_dataset` section.
            **kwargs: the same fields, when no section is given.

        Returns:
            Batched and repeated, with the columns of `mindformers_ixc.data.batch`.

        Raises:
            DataError: for unusable data. (Keys and types of the section are checked by `mindformers run`, before
                MindFormers adds keys of its own to it.)
        """
        config = cls.check_dataset_config(dataset_config, locals())
        cls.init_dataset_config(config)
        return batched(cls, *_table(config, "sample"), config)


def _table(config: MindFormerConfig, kind: str) -> tuple[ConversationTable, Planner]:
    """The rows of a section whose samples are of a kind, and what plans a run over them."""
    options = {key: value for key, value in config.data_loader.items() if key != "type"}
    mixture = dict(options.pop("mixture")) if options.get("mixture") else None
    seed, budget = config.seed or 0, row_budget(config)
    processor = section_processor(config)
    loader = IXC25DataLoader(seed=seed, mixture=mixture, **options)
    share = bad_share_of(config)
    sources = loader.sources(measures_of(config, processor), share, kind)
    segments = budget.max_segments if config.packing else None
    columns = list(config.input_columns or BATCH_COLUMNS)
    if REFERENCE_COLUMN in columns and any(source.index.description.lacking for source in sources):
        raise DataError(f"train_dataset.input_columns has {REFERENCE_COLUMN}, but not every pair has that field; "
                        "leave the column out, and the model without the pair is the reference.")
    # a pair with too many pictures is refused, since there is no part of it to be used
    max_images = None if kind == "pair" else budget.max_images
    length = config.seq_length - (SCORE_COLUMN in columns)          # the reward token is measured with no sample
    shapes = Shapes(length, config.max_tiles, config.hd_num or HD_NUM_TRAINING, max_images, segments)
    samples = make_samples(sources, shapes, share, loader.index_dir)
    make: Callable[..., ConversationTable] = PreferenceTable if kind == "pair" else \
        partial(ConversationTable, loss_on=options.get("loss_on") or ALL)
    if config.group_size:
        make = partial(GroupTable, group_size=config.group_size)
    table = make(processor, samples, config.seq_length, config.max_tiles, shapes.hd_num, share, samples.needs, columns,
                 seed, budget.max_images, segments)
    logger.info(f"{samples.multimodal} multimodal and {len(samples) - samples.multimodal} text-only {kind}s.")
    settings = (mixture, seed, loader.shuffle, bool(config.get("drop_remainder", True)))
    packing = budget if config.packing else None
    planner = partial(_plan, samples, packing, settings)
    names = [source.reader.name for source in sources]         # those of a mixture; equal ones are one source
    return table, saved(planner, samples.folder.parent.parent, samples.folder.name, names, bool(packing), budget,
                        *settings)


def _plan(samples: SampleSet, budget: Budget | None, settings: tuple[dict | None, int, bool, bool],
          batch_rows: int) -> RunPlan:
    """The plan of a run over samples; of the ranks of a machine one makes it, and the others look at none of this."""
    numbers, multimodal = samples.name_numbers, samples.images > 0
    unmap(samples.images)
    packing = Packing(samples.needs[:, 0], samples.needs[:, 1], samples.images, numbers, budget) if budget else None
    return make_planner(numbers, multimodal, samples.names, *settings, packing)(batch_rows)


@MindFormerRegister.register(MindFormerModuleType.DATASET)
class IXC25PreferenceDataset(BaseDataset):
    """Preference pairs as MindFormers' `train_dataset_task` builds them; the section is that of `IXC25SFTDataset`."""

    def __new__(cls, dataset_config: dict | None = None, **kwargs: Any) -> GeneratorDataset:
        """Builds the dataset.

        Args:
            dataset_config: as in `IXC25SFTDataset`.
            **kwargs: as there.

        Returns:
            Batched and repeated, with the columns of `mindformers_ixc.data.batch`, two answers a row.

        Raises:
            DataError: for unusable data.
        """
        config = cls.check_dataset_config(dataset_config, locals())
        cls.init_dataset_config(config)
        return batched(cls, *_table(config, "pair"), config)


@MindFormerRegister.register(MindFormerModuleType.DATASET)
class IXC25GroupDataset(IXC25SFTDataset):
    """Prompts for groups of sampled answers; the section is that of `IXC25SFTDataset` with `group_size`.

    Its samples are those of supervised fine-tuning: the last answer of each is what rules compare sampled ones with.
    """
