"""The training dataset: conversations to batches of fixed shapes, decoded and cut into tiles in worker processes."""
from __future__ import annotations

import multiprocessing
import zlib
from collections.abc import Sequence

import numpy as np
from mindformers.dataset.base_dataset import BaseDataset
from mindformers.models.build_tokenizer import build_tokenizer
from mindformers.tools.logger import logger
from mindformers.tools.register import MindFormerModuleType, MindFormerRegister
from mindspore.dataset import GeneratorDataset
from tqdm import tqdm

from mindformers_ixc.data.batch import BATCH_COLUMNS, EXTRA_COLUMNS, PACKING_COLUMNS
from mindformers_ixc.data.conversations import (
    CAPTION_PROMPTS,
    PROGRESS_FROM,
    Conversation,
    DataError,
    load_sources,
    read_image_sizes,
)
from mindformers_ixc.data.mixture import Plan, make_plan
from mindformers_ixc.data.packing import join_samples, pack_samples
from mindformers_ixc.data.sampling import PlanSampler
from mindformers_ixc.processing.image import HD_NUM_TRAINING, ImageError
from mindformers_ixc.processing.processor import IXC25ImageProcessor, IXC25Processor
from mindformers_ixc.processing.prompt import IGNORE_INDEX, IMAGE_PLACEHOLDER
from mindformers_ixc.processing.video import VideoError

# Keys of the `train_dataset` section and the type each must have; MindFormers' own ones come last.
DATASET_KEYS = {
    "data_loader": dict, "tokenizer": dict, "seq_length": int, "max_tiles": int, "hd_num": int,
    "image_transform": str, "image_size": int,
    "patch_size": int, "max_bad_share": float, "input_columns": list, "batch_size": int, "drop_remainder": bool,
    "num_parallel_workers": int, "python_multiprocessing": bool, "repeat": int, "seed": int, "prefetch_size": int,
    "numa_enable": bool, "packing": bool, "construct_args_key": list,
}
LOADER_KEYS = {"type": str, "dataset_dir": (str, list), "image_folder": str, "shuffle": bool, "caption_prompts": list,
               "mixture": dict}

# Share of samples whose pictures fail to decode above which a run stops: more than a stray damaged file.
MAX_BAD_SHARE = 0.01


def fit_pairs(processor: IXC25Processor, sample: Conversation, seq_length: int, max_tiles: int,
              hd_num: int) -> tuple[int, tuple[int, int]]:
    """How many question-answer pairs of a conversation fit, counted from its start.

    Args:
        processor: counts positions and tiles.
        sample: conversation with known picture sizes.
        seq_length: positions at most.
        max_tiles: tiles at most.
        hd_num: tiles of a picture at most.

    Returns:
        Number of pairs, and (positions, tiles) of the whole conversation if all fit, else of the first pair that does
        not fit with everything before it.
    """
    system = 1 if sample.turns[0][0] == "system" else 0
    pairs = (len(sample.turns) - system) // 2
    for count in range(pairs, 0, -1):
        part = first_pairs(sample, count)
        needed = processor.conversation_length(part.turns, part.sizes, hd_num, sample.where)
        if needed[0] <= seq_length and needed[1] <= max_tiles:
            return count, needed
        shortest = needed
    return 0, shortest


def first_pairs(sample: Conversation, pairs: int) -> Conversation:
    """The first question-answer pairs of a conversation with the pictures that belong to them."""
    system = 1 if sample.turns[0][0] == "system" else 0
    turns = sample.turns[:system + 2 * pairs]
    places = sum(text.count(IMAGE_PLACEHOLDER) for _, text in turns)
    if not any(IMAGE_PLACEHOLDER in text for _, text in sample.turns):
        places = len(sample.images)
    return Conversation(sample.source, sample.index, sample.id, turns, sample.images[:places], sample.sizes[:places])


def fit_samples(processor: IXC25Processor, samples: Sequence[Conversation], seq_length: int, max_tiles: int,
                hd_num: int) -> list[Conversation]:
    """Cuts conversations to the fixed shapes, only between whole pairs, and reports what was lost.

    Raises:
        DataError: when nothing fits, with the lengths that would.
    """
    kept, cut, dropped, needs = [], 0, 0, []
    for sample in tqdm(samples, desc="measuring samples", unit="sample", disable=len(samples) < PROGRESS_FROM):
        pairs, needed = fit_pairs(processor, sample, seq_length, max_tiles, hd_num)
        if pairs == 0:
            dropped += 1
            needs.append(needed)
            continue
        part = first_pairs(sample, pairs)
        cut += len(part.turns) < len(sample.turns)
        kept.append(part)
    if needs:
        fits = (f"the shortest dropped sample's first question and answer need {min(n for n, _ in needs)} positions "
                f"and {min(t for _, t in needs)} tiles, the longest {max(n for n, _ in needs)} and "
                f"{max(t for _, t in needs)}")
        if not kept:
            raise DataError(f"None of the {len(samples)} samples fits seq_length {seq_length} and max_tiles "
                            f"{max_tiles}: {fits}. Raise them or lower hd_num (now {hd_num}).")
        logger.warning(f"{dropped} of {len(samples)} samples do not fit seq_length {seq_length} and max_tiles "
                       f"{max_tiles} and are left out: {fits}.")
    if cut:
        logger.warning(f"{cut} of {len(samples)} conversations are cut between whole turns to fit seq_length "
                       f"{seq_length} and max_tiles {max_tiles}.")
    return kept


class SharedFlags:
    """One flag a sample, shared by all worker processes.

    MindSpore deep-copies a source before it forks the workers; a copy must still be the same memory.
    """

    def __init__(self, count: int):
        self._flags = multiprocessing.Array("b", count)

    def __deepcopy__(self, memo) -> SharedFlags:
        return self

    def __getitem__(self, index: int) -> bool:
        return bool(self._flags[index])

    def set(self, index: int) -> None:
        """Raises one flag."""
        self._flags[index] = 1

    def count(self) -> int:
        """Number of raised flags."""
        return sum(self._flags)


class ConversationTable:
    """Random access to encoded, padded samples; MindSpore's worker processes read from it.

    A row is one conversation, or several packed into one sequence. A row with a picture that turns out to be damaged
    only when it is decoded is replaced by the next row of the same kind.

    Args:
        processor: encodes samples.
        samples: conversations that fit.
        seq_length: positions of a row.
        max_tiles: tiles of a row.
        hd_num: tiles of a picture at most.
        max_bad_share: share of damaged rows above which reading stops.
        packs: indices of the samples of each row; by default every sample is a row.
        columns: what a row holds, of `mindformers_ixc.data.batch`.
        seed: of the noise.
    """

    def __init__(self, processor: IXC25Processor, samples: Sequence[Conversation], seq_length: int, max_tiles: int,
                 hd_num: int, max_bad_share: float = MAX_BAD_SHARE, packs: Sequence[Sequence[int]] | None = None,
                 columns: Sequence[str] = BATCH_COLUMNS, seed: int = 0):
        self.processor, self.samples = processor, list(samples)
        self.packs = [[i] for i in range(len(self.samples))] if packs is None else [list(pack) for pack in packs]
        self.seq_length, self.max_tiles, self.hd_num = seq_length, max_tiles, hd_num
        self.max_bad_share, self.columns, self.seed = max_bad_share, tuple(columns), seed
        self.source_names = list(dict.fromkeys(sample.source for sample in self.samples))
        self._bad = SharedFlags(len(self.packs))

    def __len__(self) -> int:
        return len(self.packs)

    def __getitem__(self, code: int) -> tuple[np.ndarray, ...]:
        """The row `code % len(self)`; `code // len(self)` is its place in the run (`PlanSampler`)."""
        place, index = divmod(int(code), len(self))
        kind, error = self.is_multimodal(index), None
        for step in range(len(self)):
            candidate = (index + step) % len(self)
            if self.is_multimodal(candidate) != kind or self._bad[candidate]:
                continue
            try:
                return self._encode(candidate, place)
            except (ImageError, VideoError) as failure:
                error = failure
                self._bad.set(candidate)
                logger.warning(f"Left out: {failure}")
                if self.bad_samples > max(1, self.max_bad_share * len(self)):
                    break
        raise DataError(f"{self.bad_samples} of {len(self)} samples have damaged pictures, more than the share "
                        f"max_bad_share {self.max_bad_share} allows. The last one: {error}")

    @property
    def bad_samples(self) -> int:
        """Rows found damaged so far, by any worker."""
        return self._bad.count()

    def is_multimodal(self, index: int) -> bool:
        """Whether a row has pictures."""
        return bool(self.samples[self.packs[index][0]].images)

    def source_of(self, index: int) -> str:
        """Name of a row's source."""
        return self.samples[self.packs[index][0]].source

    def describe(self, index: int) -> str:
        """Names a row's samples in messages."""
        return " and ".join(self.samples[i].where for i in self.packs[index])

    def _encode(self, index: int, place: int) -> tuple[np.ndarray, ...]:
        members = [self.samples[i] for i in self.packs[index]]
        encoded = [self.processor.encode_conversation(sample.turns, sample.images, sample.where, self.hd_num)
                   for sample in members]
        columns = join_samples(encoded, self.seq_length, self.max_tiles, self.processor.pad_token_id)
        if not (columns["labels"] != IGNORE_INDEX).any():
            raise DataError(f"{self.describe(index)}: nothing in it carries loss; its answers are empty.")
        columns["noise_seed"] = noise_seed(self.seed, place)
        columns["source"] = np.int32(self.source_names.index(members[0].source))
        return tuple(columns[name] for name in self.columns)


def noise_seed(seed: int, place: int) -> np.int32:
    """Seed of the dropout noise of the sample at a place of the run."""
    return np.int32(zlib.crc32(f"{seed} {place}".encode()) & 0x7FFFFFFF)


@MindFormerRegister.register(MindFormerModuleType.DATASET_LOADER)
class IXC25DataLoader:
    """Reads and checks the samples of a `data_loader` section.

    Args:
        dataset_dir: `.json`, `.txt` list file, or a list of these.
        image_folder: where relative picture paths start.
        shuffle: whether each epoch has an order of its own.
        seed: of sampling and shuffling.
        caption_prompts: questions for samples that are captions, one chosen at random for each.
        mixture: weights of the sources (`mindformers_ixc.data.mixture`); without, an epoch has every sample once.
    """

    def __init__(self, dataset_dir, image_folder: str | None = None, shuffle: bool = True, seed: int = 0,
                 caption_prompts: Sequence[str] = CAPTION_PROMPTS, mixture: dict | None = None):
        self.shuffle, self.seed, self.mixture = shuffle, seed, mixture
        if not caption_prompts or not all(isinstance(prompt, str) for prompt in caption_prompts):
            raise DataError(f"train_dataset.data_loader.caption_prompts is {caption_prompts!r}, expected a list of "
                            "questions.")
        self.samples = load_sources(dataset_dir, image_folder, seed, caption_prompts)
        read_image_sizes(self.samples)


@MindFormerRegister.register(MindFormerModuleType.DATASET)
class IXC25SFTDataset(BaseDataset):
    """Supervised fine-tuning data as MindFormers' `train_dataset_task` builds it."""

    def __new__(cls, dataset_config: dict | None = None, **kwargs):
        """Builds the dataset.

        Args:
            dataset_config: the `train_dataset` section.
            **kwargs: the same fields, when no section is given.

        Returns:
            `GeneratorDataset`, batched and repeated, with the columns of `mindformers_ixc.data.batch`.

        Raises:
            DataError: for unusable data. (Keys and types of the section are checked by `mindformers run`, before
                MindFormers adds keys of its own to it.)
        """
        config = cls.check_dataset_config(dataset_config, locals())
        cls.init_dataset_config(config)
        table, plan = cls._table(config)
        return batched(cls, table, plan, config)

    @classmethod
    def _table(cls, config) -> tuple[ConversationTable, Plan]:
        options = {key: value for key, value in config.data_loader.items() if key != "type"}
        mixture = dict(options.pop("mixture")) if options.get("mixture") else None
        seed = config.seed or 0
        loader = IXC25DataLoader(seed=seed, mixture=mixture, **options)
        processor, hd_num = make_processor(config), config.hd_num or HD_NUM_TRAINING
        samples = fit_samples(processor, loader.samples, config.seq_length, config.max_tiles, hd_num)
        names = list(dict.fromkeys(sample.source for sample in loader.samples))
        packs = None
        if config.packing:
            needs = [processor.conversation_length(s.turns, s.sizes, hd_num, s.where) for s in samples]
            packs = pack_samples(needs, [(s.source, bool(s.images)) for s in samples], config.seq_length,
                                 config.max_tiles, seed)
            logger.info(f"{len(samples)} samples are packed into {len(packs)} sequences.")
        share = MAX_BAD_SHARE if config.max_bad_share is None else config.max_bad_share
        table = ConversationTable(processor, samples, config.seq_length, config.max_tiles, hd_num, share, packs,
                                  list(config.input_columns or BATCH_COLUMNS), seed)
        multimodal = [table.is_multimodal(i) for i in range(len(table))]
        logger.info(f"{sum(multimodal)} multimodal and {len(table) - sum(multimodal)} text-only sequences.")
        plan = make_plan([table.source_of(i) for i in range(len(table))], multimodal, names, mixture, seed,
                         loader.shuffle, config.get("drop_remainder", True))
        return table, plan


def batched(cls, table: ConversationTable, plan, config) -> GeneratorDataset:
    """A MindSpore dataset of batches from a table and a plan; used by both dataset classes."""
    rank, ranks = cls._generate_shard_info()
    sampler = PlanSampler(plan, len(table), config.batch_size, (0, 1) if ranks is None else (rank, ranks))
    dataset = GeneratorDataset(table, list(table.columns), sampler=sampler,
                               num_parallel_workers=config.num_parallel_workers or 1,
                               python_multiprocessing=bool(config.python_multiprocessing))
    dataset = dataset.batch(config.batch_size, drop_remainder=True)
    dataset = dataset.repeat(config.repeat) if (config.repeat or 1) > 1 else dataset
    dataset.conversations, dataset.plan_sampler = table, sampler   # for reports
    dataset.set_init_step = sampler.start_at   # MindSpore's own way cannot restart a Python sampler inside an epoch
    return dataset


def make_processor(config) -> IXC25Processor:
    """The processor of a `train_dataset` section."""
    hd_num = config.hd_num or HD_NUM_TRAINING
    images = IXC25ImageProcessor(config.image_size or 560, config.patch_size or 14, hd_num_training=hd_num,
                                 training_transform=config.image_transform or "training")
    return IXC25Processor(images, build_tokenizer(dict(config.tokenizer)))


def check_dataset_section(section: dict) -> None:
    """Checks keys and types of a `train_dataset` section as the user wrote it.

    Raises:
        DataError: naming the key, its value and the choices.
    """
    _check_section(section, DATASET_KEYS, "train_dataset")
    _check_section(section["data_loader"], LOADER_KEYS, "train_dataset.data_loader")
    columns = section.get("input_columns") or list(BATCH_COLUMNS)
    unknown = [name for name in columns if name not in (*BATCH_COLUMNS, *EXTRA_COLUMNS, "reference_logps")]
    missing = [name for name in BATCH_COLUMNS if name not in columns]
    if unknown or missing:
        raise DataError(f"train_dataset.input_columns {'has the unknown column' if unknown else 'lacks'} "
                        f"{(unknown or missing)[0]}; it needs {', '.join(BATCH_COLUMNS)} and may have "
                        f"{', '.join(EXTRA_COLUMNS)}.")
    if bool(section.get("packing")) != all(name in columns for name in PACKING_COLUMNS):
        raise DataError(f"train_dataset.packing is {section.get('packing')!r}; with packing, and only then, "
                        f"input_columns has {' and '.join(PACKING_COLUMNS)}.")


def _check_section(section: dict, keys: dict[str, type], where: str) -> None:
    """Checks keys and types of a section.

    Raises:
        DataError: naming the key, its value and the choices.
    """
    for key, value in section.items():
        if key not in keys:
            raise DataError(f"Unknown key {where}.{key} (value {value!r}); the choices are {', '.join(sorted(keys))}.")
        wanted = keys[key]
        wanted = (int, float) if wanted is float else wanted
        if value is not None and (not isinstance(value, wanted) or (wanted is int and isinstance(value, bool))):
            name = getattr(wanted, "__name__", "text or a list" if wanted == (str, list) else "number")
            raise DataError(f"{where}.{key} is {value!r}, expected {name}.")
    required = [key for key in ("data_loader", "tokenizer", "seq_length", "max_tiles", "batch_size") if key in keys]
    missing = [key for key in required if section.get(key) is None]
    if missing:
        raise DataError(f"{where} lacks {', '.join(missing)}.")
