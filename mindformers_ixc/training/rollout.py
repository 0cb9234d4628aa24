"""Groups of answers for a step: sampled by the weights as they are, scored by rules, and put into its batch.

What is sampled depends on the run's seed, the place of a prompt in the run and the weights alone. So a resumed run, and
one over more devices, go on with the same answers as far as the weights are the same.
"""
from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from mindformers.tools.register import MindFormerConfig
from mindspore import Tensor
from mindspore.dataset import GeneratorDataset

from mindformers_ixc import terminal
from mindformers_ixc.data.batch import LOGPS_COLUMN, MATCH_COLUMN, REWARDS_COLUMN
from mindformers_ixc.errors import TrainingError
from mindformers_ixc.generation.assistant import Assistant
from mindformers_ixc.generation.options import GenerationOptions
from mindformers_ixc.generation.scoring import Scorer
from mindformers_ixc.generation.store import Store
from mindformers_ixc.grpo_options import REWARD_MODEL, RULES, rollout_options
from mindformers_ixc.models.ixc25 import IXC25Model
from mindformers_ixc.models.loss import IGNORE_INDEX
from mindformers_ixc.processing.encoded import EncodedSample
from mindformers_ixc.processing.image import Tiles
from mindformers_ixc.scores import exact_match
from mindformers_ixc.training.log import TrainingLog

logger = logging.getLogger(__name__)

# Rounds from the beginning after which it is said that none has taught anything.
IDLE_ROUNDS = 10

# Columns of a batch by name.
Columns = dict[str, np.ndarray]

# A sampled answer: its ids, with what ended it, and their log-probabilities.
Drawn = tuple[list[int], list[float]]


@dataclass
class Prompt:
    """A prompt of a row.

    Attributes:
        sample: encoded, without the last answer.
        expected: ids of that answer.
    """

    sample: EncodedSample
    expected: list[int]


def prompt_of(columns: Mapping[str, np.ndarray], row: int, tokens_per_side: int) -> Prompt:
    """What stands before the last answer of a row.

    Args:
        columns: of a batch, as `data.groups.GroupTable` makes them.
        row: its number.
        tokens_per_side: tokens along a side of a tile.
    """
    ids, labels, mask, index = (columns[name][row, 0] for name in ("input_ids", "labels", "image_mask", "vision_index"))
    labelled = np.flatnonzero(labels != IGNORE_INDEX)
    start = int(labelled[np.flatnonzero(np.diff(labelled, prepend=-2) > 1)[-1]])       # the last answer's first target
    length, places = start + 1, mask[:start + 1] == 1
    # behind the rows of all tiles a batch has room for stand the separators; here they stand behind those of the sample
    each, room = tokens_per_side ** 2, len(columns["view_index"][row])
    local = index[:length][places & (index[:length] < room * each)]
    count = int(local.max(initial=-1)) // each + 1
    moved = index[:length] - (room - count) * each * (index[:length] >= room * each)
    tiles = Tiles(columns["pixel_values"][row], columns["global_views"][row], columns["view_index"][row]).first(count)
    where = np.where(places, moved, 0).astype(np.int32) if count else None
    sample = EncodedSample(ids[:length], np.full(length, IGNORE_INDEX, np.int32), mask[:length], [], tiles,
                           tokens_per_side, where)
    return Prompt(sample, labels[start:labelled[-1] + 1].tolist())


def put(columns: Columns, row: int, prompt: Prompt, group: Sequence[Drawn], padding: int) -> None:
    """Puts the answers of a group behind their prompt, in place.

    Args:
        columns: `input_ids`, `labels` and `sampled_logps` of a batch.
        row: of the prompt.
        prompt: as `prompt_of` gives it.
        group: the answers.
        padding: id of positions behind an answer.
    """
    start = len(prompt.sample.input_ids)
    for number, (ids, logps) in enumerate(group):
        end = start + len(ids)
        columns["input_ids"][row, number, start:] = padding
        columns["input_ids"][row, number, start:end] = ids
        columns["labels"][row, number] = IGNORE_INDEX
        columns["labels"][row, number, start - 1:end - 1] = ids            # already shifted
        columns[LOGPS_COLUMN][row, number] = 0.0
        columns[LOGPS_COLUMN][row, number, start - 1:end - 1] = logps


class Rollout:
    """Makes batches of prompts batches of groups.

    Args:
        model: that trains.
        dataset: its `GeneratorDataset`, for the prompts' samples and this rank's share.
        options: of `grpo_options.rollout_options`.
        seed: of sampling.
        parts: of a batch that are sampled one after another, as the step takes them: caches of all might not fit.
        log: of the run, which knows the step.
    """

    def __init__(self, model: IXC25Model, dataset: GeneratorDataset, options: Mapping[str, Any], seed: int,
                 parts: int, log: TrainingLog):
        self.model, self.options, self.seed, self.parts, self.log = model, options, seed, parts, log
        self.table, self.sampler = dataset.conversations, dataset.plan_sampler
        self.assistant: Assistant | None = None
        self.scorer: Scorer | None = None
        self.idle: int | None = 0       # rounds so far of which all groups had equal rewards; None after another one

    def __call__(self, columns: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """The columns of the step to come, in their order, from those that the data set made."""
        names = self.table.columns
        found = self.batch(self.log.next_step, {name: column.asnumpy() for name, column in zip(names, columns)})
        return tuple(Tensor(found[name]) for name in names)

    def batch(self, step: int, columns: Columns) -> Columns:
        """The batch of a step with sampled answers, their log-probabilities, rewards and exact matches.

        Args:
            step: counted from 0 over the whole run.
            columns: of the batch, as the data set made them.

        Raises:
            TrainingError: for a reward that is no finite number.
        """
        columns = {name: column.copy() for name, column in columns.items()}
        rows = range(len(columns["input_ids"]))
        prompts = [prompt_of(columns, row, self.model.config.vision_config.tokens_per_side) for row in rows]
        groups = self._drawn(step, prompts, columns["input_ids"].shape[1:])
        for row in rows:
            put(columns, row, prompts[row], groups[row], self.table.processor.pad_token_id)
        answers = [[self._text(ids) for ids, _ in group] for group in groups]
        expected = [self._text(prompt.expected) for prompt in prompts]
        columns[REWARDS_COLUMN] = self.rewards(step, answers, expected)
        self._watch(columns[REWARDS_COLUMN], step + 1 == self.log.total)
        columns[MATCH_COLUMN] = np.array([exact_match(group, [wanted] * len(group))
                                          for group, wanted in zip(answers, expected)], np.float32)
        return columns

    def _watch(self, rewards: np.ndarray, is_last: bool) -> None:
        """Says once that a run has learnt nothing because no answer of a group earned more than another."""
        if self.idle is None or np.ptp(rewards, 1).any():
            self.idle = None
            return
        self.idle += 1
        if is_last or self.idle == IDLE_ROUNDS:
            logger.warning(f"In all {self.idle} rounds so far the answers to a prompt earned the same, so nothing was "
                           f"learnt. The rules are {', '.join(self.options['rewards'])}: take data of which the model "
                           "earns some rewards, larger groups, or rules that tell its answers apart.")
            self.idle = None

    def places(self, step: int, rows: int) -> list[int]:
        """Places in the run of this rank's rows of a step."""
        first = (step * self.sampler.ranks + self.sampler.rank) * rows
        return list(range(first, first + rows))

    def _drawn(self, step: int, prompts: Sequence[Prompt], shape: tuple[int, ...]) -> list[list[Drawn]]:
        """The answers to every prompt, of a batch of groups of the shape `(N, L)`."""
        self.model.set_train(False)
        try:
            if self.assistant is None:
                # of weights that change nothing stays right, and training needs the memory
                self.assistant = Assistant(self.model, self.table.processor, Store(0))
            room = shape[1] - max(len(prompt.sample.input_ids) for prompt in prompts)
            options = GenerationOptions(min(self.options["max_new_tokens"], room), do_sample=True, top_k=0,
                                        stop_token_ids=self.assistant.stop_token_ids)
            seeds = [[self.seed, place] for place in self.places(step, len(prompts))]
            samples, size = [prompt.sample for prompt in prompts], len(prompts) // self.parts
            groups: list[list[Drawn]] = []
            for first in range(0, len(prompts), size):
                part = slice(first, first + size)
                groups += self.assistant.draw_groups(samples[part], options, shape[0], self.model.config.adapter_mode,
                                                     seeds[part])
            self.assistant.engine.caches.clear()
        finally:
            self.model.set_train(True)
        return groups

    def _text(self, ids: Sequence[int]) -> str:
        assert self.assistant is not None, "answers were sampled before"
        return self.assistant.decode(ids)

    def rewards(self, step: int, answers: Sequence[Sequence[str]], expected: Sequence[str]) -> np.ndarray:
        """Rewards of answers, float32 `(B, N)`.

        Args:
            step: counted from 0 over the whole run.
            answers: of each prompt.
            expected: of each prompt.

        Raises:
            TrainingError: for a number that is not finite, for sums beyond float32, and as `of_rule`.
        """
        samples = self.sampler.batch(step)[self.sampler.rank * len(answers):]
        flat = [answer for group in answers for answer in group]
        wanted = [one for one, group in zip(expected, answers) for _ in group]
        total = np.zeros(len(flat))
        for name, weight in self.options["rewards"].items():
            found = self._judged(samples, answers) if name == REWARD_MODEL else of_rule(name, flat, wanted, step)
            odd = next((number for number, value in enumerate(found) if not math.isfinite(value)), None)
            if odd is not None:
                where = self.table.describe(samples[odd // len(answers[0])])
                raise TrainingError(f"Step {step + 1}: the reward {name} of the answer {flat[odd]!r:.80} to {where} is "
                                    f"{found[odd]}, which is no finite number. Mend the rule, or leave it out of "
                                    "rollout.rewards; the step was not taken.")
            total += weight * found
        if np.abs(total).max(initial=0.0) > np.finfo(np.float32).max:
            raise TrainingError(f"Step {step + 1}: the rewards by the weights of rollout.rewards are up to "
                                f"{np.abs(total).max():.3g}, beyond float32; give smaller weights. The step was not "
                                "taken.")
        return total.reshape(len(answers), -1).astype(np.float32)

    def _judged(self, samples: Sequence[int], answers: Sequence[Sequence[str]]) -> np.ndarray:
        """What the reward model gives."""
        if self.scorer is None:
            with terminal.current.doing("Loading the reward model"):
                self.scorer = Scorer.from_directory(self.options["reward_model"])
        encoded = []
        for index, group in zip(samples, answers):
            shown = self.table.shown(index)
            encoded += [self.scorer.encode([*shown.turns[:-1], ("assistant", answer)], shown.images, where=shown.where)
                        for answer in group]
        return np.array(self.scorer.score_samples(encoded), np.float64)


def of_rule(name: str, answers: Sequence[str], expected: Sequence[str], step: int) -> np.ndarray:
    """What a rule gives answers, float64 `(n,)`; it may be one that somebody has added.

    Args:
        name: of the rule.
        answers: of all prompts.
        expected: of each of these answers.
        step: counted from 0 over the whole run.

    Raises:
        TrainingError: when it fails, or gives anything but a number for each.
    """
    where = f"Step {step + 1}: the rule {name} of rollout.rewards"
    try:
        found = np.asarray(RULES[name](answers, expected), np.float64)
    except Exception as error:
        raise TrainingError(f"{where} failed with {type(error).__name__}: {error}. Mend the rule, or leave it out; the "
                            "step was not taken.") from error
    if found.shape != (len(answers),):
        raise TrainingError(f"{where} gives an array of the shape {found.shape} for {len(answers)} answers; a rule "
                            "returns a list with a number for each, in their order.")
    return found


def stretch_schedule(config: MindFormerConfig, rounds: int) -> None:
    """Lets the learning rate's schedule count updates, of which a round may have several; MindFormers counts rounds.

    Args:
        config: of the run, changed in place.
        rounds: of the whole run.
    """
    if config.get("lr_schedule") and config.lr_schedule.get("total_steps") in (None, -1):
        config.lr_schedule.total_steps = rounds * rollout_options(config.get("rollout"))["updates"]
