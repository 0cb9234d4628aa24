"""Held-out samples of a run as they are measured: losses, answers, and scores of pairs by a reward model."""
from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from mindformers.tools.register import MindFormerConfig
from mindspore import Tensor, nn
from mindspore.ops import functional as F

from mindformers_ixc.data.batch import BATCH_COLUMNS, SCORE_COLUMN, full_batches
from mindformers_ixc.data.fitting import Shapes, check_pixels
from mindformers_ixc.data.index.samples import make_samples
from mindformers_ixc.data.index.sources import measures_of, open_sources
from mindformers_ixc.data.learning import ALL, check_weights, with_loss_on
from mindformers_ixc.data.preferences import encode_pair, pair_columns
from mindformers_ixc.data.questions import questions_of
from mindformers_ixc.data.rows import MAX_BAD_SHARE, ListedSamples, check_images
from mindformers_ixc.data.sections import row_budget
from mindformers_ixc.errors import TrainingError
from mindformers_ixc.generation.assistant import Assistant
from mindformers_ixc.models.ixc25 import IXC25Model
from mindformers_ixc.models.reward import IXC25RewardModel
from mindformers_ixc.processing.image import HD_NUM_TRAINING
from mindformers_ixc.reading import watch_reads
from mindformers_ixc.reward_options import BARRIER, EDGE
from mindformers_ixc.training.datasets import section_processor
from mindformers_ixc.training_options import SHUFFLED

# Questions whose answers are written down at every measurement, spread evenly over the held-out ones.
SHOWN = 12


class MeanLoss(nn.Cell):
    """The mean loss of a batch, in whatever form the model's own training loss is.

    Args:
        model: `IXC25Model`; its parameters keep their names.
    """

    def __init__(self, model: IXC25Model):
        super().__init__(auto_prefix=False)
        self.model = model

    def construct(self, input_ids, labels, pixel_values, global_views, view_index, vision_index, image_mask):
        """float32 scalar of the columns of a batch."""
        states = self.model.states(input_ids, pixel_values, global_views, view_index, vision_index, image_mask)
        loss = self.model.loss(self.model.head_losses(states, labels), labels)
        if isinstance(loss, tuple):      # sum and count, of a step in micro batches
            return loss[0] / F.maximum(loss[1], 1.0)
        return loss


class PairScores(nn.Cell):
    """Scores of pairs, chosen answers first.

    Args:
        model: a reward model; its parameters keep their names.
    """

    def __init__(self, model: IXC25RewardModel):
        super().__init__(auto_prefix=False)
        self.model = model

    def construct(self, input_ids, pixel_values, global_views, view_index, vision_index, image_mask, score_positions):
        """float32 `(B, 2)` of the columns of a batch of pairs."""
        return self.model.scores(input_ids, pixel_values, global_views, view_index, vision_index, image_mask,
                                 score_positions)


class HeldOut:
    """Held-out conversations, measured once and encoded anew for every measurement: their pictures take much memory.

    Args:
        data: the `train_dataset` section: shapes and tokenizer.
        options: of `evaluation_options`.

    Raises:
        DataError: for samples that cannot be used, also with a picture that is damaged behind its header: before the
            run, and not at its first measurement.
    """

    # what the samples are, of `KINDS`, and positions that something else takes behind them
    kind, reserved = "sample", 0

    def __init__(self, data: MindFormerConfig, options: dict):
        self.processor, self.options = section_processor(data), options
        hd_num = data.hd_num or HD_NUM_TRAINING
        self.max_images = row_budget(data).max_images
        loader = data.data_loader or {}      # what it says of trust and of keys holds for held-out samples too
        watch_reads(loader.get("read_timeout"))
        held_out = {"dataset_dir": options["dataset_dir"], "image_folder": options["image_folder"],
                    **{key: loader.get(key) for key in ("image_root", "ignore_keys", "loss_on")}}
        self.loss_on = loader.get("loss_on") or ALL
        sources = open_sources(held_out, 0, measures_of(data, self.processor), loader.get("index_dir"), kind=self.kind)
        shapes = Shapes(data.seq_length - self.reserved, data.max_tiles, hd_num)
        samples = make_samples(sources, shapes, MAX_BAD_SHARE, loader.get("index_dir"))
        self.samples = list(islice(samples, options["max_samples"]))
        check_pixels(self.samples)
        for sample in self.samples:
            check_weights(sample.weights, sample.where)
        check_images(ListedSamples(self.samples), self.max_images)
        self.shape = (data.seq_length, data.max_tiles, hd_num)

    def with_images(self, shuffled: bool) -> Iterator[tuple[Any, list]]:
        """Samples with their images, or those of another one that has as many: the next of `in_turn`."""
        others = self.in_turn([sample for sample in self.samples if sample.images])
        for sample in self.samples:
            images = sample.images
            if shuffled and images:
                images = next((other.images for other in _after(others, sample)
                               if len(other.images) == len(images) and other.images != images), images)
            yield sample, images

    def in_turn(self, samples: list) -> list:
        """Samples in the order in which one gives its images to the one before it."""
        return samples

    def rows(self, shuffled: bool) -> Iterator[dict[str, np.ndarray]]:
        """Columns of every sample, one after another; `shuffled` gives each the images of a later one."""
        length, tiles, hd_num = self.shape
        for sample, images in self.with_images(shuffled):
            encoded = with_loss_on(self.processor.encode_conversation(sample.turns, images, sample.where, hd_num),
                                   self.loss_on, sample.weights, sample.where)
            if len(encoded.input_ids) <= length and encoded.tiles <= tiles:
                yield encoded.pad(length, tiles, self.max_images, self.processor.pad_token_id)

    def loss(self, mean_loss: MeanLoss, shuffled: bool = False) -> float:
        """Mean loss over labelled positions of all samples."""
        total = count = 0.0
        for batch, _ in full_batches(self.rows(shuffled), self.options["batch_size"], _without_labels):
            labelled = sum(int((row["labels"] != -100).sum()) for row in batch)
            columns = [Tensor(np.stack([row[name] for row in batch])) for name in BATCH_COLUMNS]
            total += float(mean_loss(*columns).asnumpy()) * labelled
            count += labelled
        return total / max(count, 1.0)

    def answers(self, assistant: Assistant) -> tuple[list[str], list[str]]:
        """Answers to every question, and what was expected."""
        questions, found = questions_of(self.samples), []
        for batch, real in full_batches(questions, self.options["batch_size"]):
            replies = assistant.answer([question.request(None) for question in batch], self.options["mode"],
                                       max_new_tokens=self.options["max_new_tokens"])
            found += replies[:real]
        return found, [question.expected.strip() for question in questions]

    def shown(self, answers: list[str]) -> list[dict]:
        """Some questions with their pictures and answers, the same ones at every measurement.

        Args:
            answers: to every question, as `answers` gives them.
        """
        questions = questions_of(self.samples)
        count = min(SHOWN, len(questions))
        chosen = [number * len(questions) // count for number in range(count)]
        return [{"sample": questions[i].sample, "question": questions[i].query,
                 "images": [_lasting(image) for image in questions[i].images],
                 "expected": questions[i].expected.strip(), "answer": answers[i]} for i in chosen]


class HeldOutPairs(HeldOut):
    """Held-out pairs of a reward model; arguments and errors as of `HeldOut`."""

    kind, reserved = "pair", 1       # the reward token

    def in_turn(self, samples: list) -> list:
        """Samples in a random order, always the same: neighbours in a file may have much the same picture."""
        return [samples[i] for i in np.random.default_rng(0).permutation(len(samples))]

    def pair_rows(self, shuffled: bool) -> Iterator[tuple[str, dict[str, np.ndarray]]]:
        """What every pair is called, and its columns; `shuffled` gives each the images of another one."""
        length, tiles, hd_num = self.shape
        for pair, images in self.with_images(shuffled):
            encoded = encode_pair(replace(pair, images=images), self.processor, hd_num, scored=True)
            if max(len(one.input_ids) for one in encoded) <= length and encoded[0].tiles <= tiles:
                yield pair.where, pair_columns(encoded, length, tiles, self.max_images, self.processor.pad_token_id)

    def scores(self, pair_scores: PairScores, shuffled: bool = False) -> np.ndarray:
        """float64 scores `(N, 2)` of the pairs, the chosen answers' first.

        Raises:
            TrainingError: for a score that is no finite number.
        """
        found, names = [], (*(name for name in BATCH_COLUMNS if name != "labels"), SCORE_COLUMN)
        for batch, real in full_batches(self.pair_rows(shuffled), self.options["batch_size"]):
            columns = [Tensor(np.stack([row[name] for _, row in batch])) for name in names]
            for (where, _), scores in zip(batch[:real], pair_scores(*columns).asnumpy().astype(np.float64)):
                if not np.isfinite(scores).all():
                    raise TrainingError(f"{where}: the scores of its answers are {scores[0]:g} and {scores[1]:g}, and "
                                        "one of them is no finite number; lower the learning rate, or go on from an "
                                        "earlier checkpoint.")
                found.append(scores)
        return np.array(found).reshape(-1, 2)

    def values(self, pair_scores: PairScores, metrics: Sequence[str], loss_options: dict[str, Any]) -> dict[str, float]:
        """Metrics of the pairs.

        Args:
            pair_scores: the graph.
            metrics: of `training_options.PAIR_METRICS`.
            loss_options: of `reward_options`.
        """
        found = {shuffled: self.scores(pair_scores, shuffled)
                 for shuffled in {name.startswith(SHUFFLED) for name in metrics}}
        return {name: pair_metric(name.removeprefix(SHUFFLED), found[name.startswith(SHUFFLED)], loss_options)
                for name in metrics}


def pair_metric(name: str, scores: np.ndarray, loss_options: dict[str, Any]) -> float:
    """One metric of pairs from their scores `(N, 2)`, the chosen answers' first."""
    chosen, rejected = scores.T
    if name == "loss":
        return float(pair_losses(scores, **loss_options).mean())
    return float({"reward_chosen": chosen, "reward_rejected": rejected, "reward_margin": chosen - rejected,
                  "reward_accuracy": chosen > rejected}[name].mean())


def pair_losses(scores: np.ndarray, loss: str = "ranking", log_barrier: float = 0.0) -> np.ndarray:
    """Losses `(N,)` of pairs from float64 scores `(N, 2)`; formulae and options of `reward_options`."""
    chosen, rejected = scores.T
    logp = -np.logaddexp(0.0, rejected - chosen)
    losses = -logp
    if loss == "focal":
        losses = losses * (1 - 2 * np.maximum(0.0, np.exp(logp) - 0.5)) ** 2
    inside = np.clip(scores, EDGE - BARRIER, BARRIER - EDGE)
    return losses - log_barrier * (np.log(BARRIER + inside) + np.log(BARRIER - inside)).mean(1)


def _lasting(image: object) -> str:
    """A picture's path as it is right from every folder."""
    return str(image) if str(image).startswith("pkg:") else str(Path(str(image)).resolve())


def _without_labels(row: dict) -> dict:
    return {**row, "labels": np.full_like(row["labels"], -100)}


def _after(samples: list, sample) -> list:
    index = next(i for i, other in enumerate(samples) if other is sample)
    return samples[index + 1:] + samples[:index]
