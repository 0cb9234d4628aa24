"""The training dataset: conversations to batches of fixed shapes, decoded and cut into tiles in worker processes."""
from __future__ import annotations

import multiprocessing
from collections.abc import Sequence

import numpy as np
from mindformers.dataset.base_dataset import BaseDataset
from mindformers.models.build_tokenizer import build_tokenizer
from mindformers.tools.logger import logger
from mindformers.tools.register import MindFormerModuleType, MindFormerRegister
from mindspore.dataset import GeneratorDataset
from tqdm import tqdm

from mindformers_ixc.data.batch import BATCH_COLUMNS
from mindformers_ixc.data.conversations import (
    CAPTION_PROMPTS,
    PROGRESS_FROM,
    Conversation,
    DataError,
    load_sources,
    read_image_sizes,
)
from mindformers_ixc.data.sampling import EpochSampler
from mindformers_ixc.processing.image import HD_NUM_TRAINING, ImageError
from mindformers_ixc.processing.processor import IXC25ImageProcessor, IXC25Processor
from mindformers_ixc.processing.prompt import IMAGE_PLACEHOLDER

# Keys of the `train_dataset` section and the type each must have; MindFormers' own ones come last.
DATASET_KEYS = {
    "data_loader": dict, "tokenizer": dict, "seq_length": int, "max_tiles": int, "hd_num": int,
    "image_transform": str, "image_size": int,
    "patch_size": int, "max_bad_share": float, "input_columns": list, "batch_size": int, "drop_remainder": bool,
    "num_parallel_workers": int, "python_multiprocessing": bool, "repeat": int, "seed": int, "prefetch_size": int,
    "numa_enable": bool,
}
LOADER_KEYS = {"type": str, "dataset_dir": (str, list), "image_folder": str, "shuffle": bool, "caption_prompts": list}

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

    A picture that turns out to be damaged only when it is decoded is replaced by the next sample of the same kind.

    Args:
        processor: encodes samples.
        samples: conversations that fit.
        seq_length: positions of a sample.
        max_tiles: tiles of a sample.
        hd_num: tiles of a picture at most.
        max_bad_share: share of damaged samples above which reading stops.
    """

    def __init__(self, processor: IXC25Processor, samples: Sequence[Conversation], seq_length: int, max_tiles: int,
                 hd_num: int, max_bad_share: float = MAX_BAD_SHARE):
        self.processor, self.samples = processor, list(samples)
        self.seq_length, self.max_tiles, self.hd_num = seq_length, max_tiles, hd_num
        self.max_bad_share = max_bad_share
        self._bad = SharedFlags(len(self.samples))

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[np.ndarray, ...]:
        kind, error = bool(self.samples[index].images), None
        for step in range(len(self.samples)):
            candidate = (int(index) + step) % len(self.samples)
            if bool(self.samples[candidate].images) != kind or self._bad[candidate]:
                continue
            try:
                return self._encode(self.samples[candidate])
            except ImageError as failure:
                error = failure
                self._bad.set(candidate)
                logger.warning(f"Left out: {failure}")
                if self.bad_samples > max(1, self.max_bad_share * len(self.samples)):
                    break
        raise DataError(f"{self.bad_samples} of {len(self.samples)} samples have damaged pictures, more than the share "
                        f"max_bad_share {self.max_bad_share} allows. The last one: {error}")

    @property
    def bad_samples(self) -> int:
        """Samples found damaged so far, by any worker."""
        return self._bad.count()

    def _encode(self, sample: Conversation) -> tuple[np.ndarray, ...]:
        encoded = self.processor.encode_conversation(sample.turns, sample.images, sample.where, self.hd_num)
        columns = encoded.pad(self.seq_length, self.max_tiles, self.processor.pad_token_id)
        return tuple(columns[name] for name in BATCH_COLUMNS)


@MindFormerRegister.register(MindFormerModuleType.DATASET_LOADER)
class IXC25DataLoader:
    """Reads and checks the samples of a `data_loader` section.

    Args:
        dataset_dir: `.json`, `.txt` list file, or a list of these.
        image_folder: where relative picture paths start.
        shuffle: whether each epoch has an order of its own.
        seed: of sampling and shuffling.
        caption_prompts: questions for samples that are captions, one chosen at random for each.
    """

    def __init__(self, dataset_dir, image_folder: str | None = None, shuffle: bool = True, seed: int = 0,
                 caption_prompts: Sequence[str] = CAPTION_PROMPTS):
        self.shuffle, self.seed = shuffle, seed
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
        table, kinds, shuffle = cls._table(config)
        rank, ranks = cls._generate_shard_info()
        rank, ranks = (0, 1) if ranks is None else (rank, ranks)
        sampler = EpochSampler(kinds, config.batch_size, config.seed or 0, shuffle,
                               config.get("drop_remainder", True), (rank, ranks))
        dataset = GeneratorDataset(table, list(BATCH_COLUMNS), sampler=sampler,
                                   num_parallel_workers=config.num_parallel_workers or 1,
                                   python_multiprocessing=bool(config.python_multiprocessing))
        dataset = dataset.project(list(config.input_columns or BATCH_COLUMNS))
        dataset = dataset.batch(config.batch_size, drop_remainder=True)
        dataset = dataset.repeat(config.repeat) if (config.repeat or 1) > 1 else dataset
        dataset.conversations = table   # for the report at the end of a run
        return dataset

    @classmethod
    def _table(cls, config) -> tuple[ConversationTable, list[list[int]], bool]:
        loader_options = {key: value for key, value in config.data_loader.items() if key != "type"}
        loader = IXC25DataLoader(seed=config.seed or 0, **loader_options)
        tokenizer = build_tokenizer(dict(config.tokenizer))
        hd_num = config.hd_num or HD_NUM_TRAINING
        images = IXC25ImageProcessor(config.image_size or 560, config.patch_size or 14, hd_num_training=hd_num,
                                     training_transform=config.image_transform or "training")
        processor = IXC25Processor(images, tokenizer)
        samples = fit_samples(processor, loader.samples, config.seq_length, config.max_tiles, hd_num)
        kinds = [[i for i, sample in enumerate(samples) if bool(sample.images) == with_images]
                 for with_images in (True, False)]
        logger.info(f"{len(kinds[0])} multimodal and {len(kinds[1])} text-only conversations.")
        share = MAX_BAD_SHARE if config.max_bad_share is None else config.max_bad_share
        return (ConversationTable(processor, samples, config.seq_length, config.max_tiles, hd_num, share), kinds,
                loader.shuffle)


def check_dataset_section(section: dict) -> None:
    """Checks keys and types of a `train_dataset` section as the user wrote it.

    Raises:
        DataError: naming the key, its value and the choices.
    """
    _check_section(section, DATASET_KEYS, "train_dataset")
    _check_section(section["data_loader"], LOADER_KEYS, "train_dataset.data_loader")


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


