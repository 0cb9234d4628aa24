"""Four-bit weights chosen by what goes through them: samples run through the model, a layer after the other.

Rounding to the nearest minds every weight alike. What counts is the output, so the rounding error of a weight can be
made good by those that are rounded after it, as far as their inputs go together (GPTQ, arXiv 2210.17323). Both are
tried for each linear, and the one whose output differs less over the samples is taken. A layer's inputs are those that
the layers before it give as they are quantised.
"""
from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mindformers_ixc.checkpoint.host_model import HostModel
from mindformers_ixc.checkpoint.packing import GROUP, MOST_4, round_4, widen_4
from mindformers_ixc.data.conversations import load_conversations
from mindformers_ixc.errors import DataError
from mindformers_ixc.parameters import linear_shapes
from mindformers_ixc.processing.processor import EncodedSample, Processor

# Samples that are taken where nobody says how many, positions of each and tiles of a picture at most: the tower takes a
# teraflop a tile of 560 pixels.
SAMPLES, POSITIONS, TILES = 16, 2048, 4

# Added to the diagonal of the inputs' second moments, as a part of its mean, so that they can be inverted.
DAMPING = 0.01

# The linear whose inputs another one has, too.
SAME_INPUTS = {"feed_forward.w3": "feed_forward.w1"}

Rounded = tuple[np.ndarray, np.ndarray, np.ndarray]


def calibration_samples(path: str | Path, processor: Processor, count: int = SAMPLES) -> list[EncodedSample]:
    """Some conversations of a file, spread over those with pictures.

    Args:
        path: conversations, in any form that training reads.
        processor: of the model.
        count: samples at most.

    Raises:
        DataError: for a file without pictures.
    """
    found = [conversation for conversation in load_conversations(path) if conversation.images]
    if not found:
        raise DataError(f"{path} has no sample with a picture; calibration needs what the model will see, pictures and "
                        "text.")
    chosen = [found[len(found) * number // count] for number in range(count)] if len(found) > count else found
    tiles = min(processor.image_processor.hd_num, TILES)
    return [processor.encode_conversation(one.turns, one.images, one.where, tiles) for one in chosen]


def output_error(weight: np.ndarray, rounded: np.ndarray, moments: np.ndarray) -> float:
    """Squared difference of a linear's outputs over all positions, relative to the outputs."""
    def energy(w: np.ndarray) -> float:
        return float(np.einsum("of,of->", w @ moments, w, dtype=np.float64))

    whole = energy(weight)
    return energy(weight - rounded) / whole if whole > 0 else 0.0


def round_by_outputs(weight: np.ndarray, moments: np.ndarray) -> Rounded:
    """A weight `(O, F)` in four bits as `packing.round_4` gives it, rounded column by column.

    The error of a column goes, by the inverse of the moments, to the columns after it; scales and zeros of a group are
    those of its weights when its turn comes.
    """
    left, width = weight.copy(), weight.shape[1]
    diagonal = np.diagonal(moments)
    damped = moments + np.diag(np.where(diagonal > 0, 0, 1) + DAMPING * max(float(diagonal.mean()), 1e-20))
    factor = np.linalg.cholesky(np.linalg.inv(damped.astype(np.float64))).T.astype(np.float32)      # upper triangle
    numbers = np.empty(weight.shape, np.uint8)
    scales = np.empty((len(weight), width // GROUP), np.float16)
    zeros = np.empty(scales.shape, np.uint8)
    for group in range(width // GROUP):
        begin, end = group * GROUP, (group + 1) * GROUP
        block, errors = left[:, begin:end], np.empty((len(weight), GROUP), np.float32)
        _, scale, zero = round_4(block)
        scales[:, group], zeros[:, group] = scale[:, 0], zero[:, 0]
        step, offset = scale[:, 0].astype(np.float32), zero[:, 0].astype(np.float32)
        for place in range(GROUP):
            column, row = block[:, place], factor[begin + place]
            number = np.clip(np.rint(column / step) + offset, 0, MOST_4)
            numbers[:, begin + place] = number
            errors[:, place] = (column - (number - offset) * step) / row[begin + place]
            block[:, place + 1:] -= errors[:, place, None] * row[begin + place + 1:end]
        left[:, end:] -= errors @ factor[begin:end, end:]
    return numbers, scales, zeros


@dataclass
class Choice:
    """What was taken for a linear.

    Attributes:
        name: of the linear.
        nearest: error of its outputs, rounded to the nearest.
        chosen: error of what was taken.
    """

    name: str
    nearest: float
    chosen: float


class Calibrator:
    """Rounds the linears of a model, a layer at a time, in order.

    Args:
        model: the full weights.
        samples: what goes through it.

    Attributes:
        choices: of the layers that are done.
    """

    def __init__(self, model: HostModel, samples: Sequence[EncodedSample]):
        self.model, self.samples = model, samples
        self.choices: list[Choice] = []
        self._states: list[np.ndarray] = []
        self._most = min(POSITIONS, model.config.max_position_embeddings)
        self._images = [sample.image_mask[:self._most] == 1 for sample in samples]
        self._rounded: dict[str, Rounded] = {}
        self._next = 0

    def digest(self) -> str:
        """SHA-256 of what the samples are."""
        digest = hashlib.sha256()
        for sample in self.samples:
            for array in (sample.input_ids, sample.image_mask, sample.pixel_values):
                digest.update(repr(array.shape).encode() + np.ascontiguousarray(array).tobytes())
        return digest.hexdigest()

    def rounded(self, layer: int, path: str) -> Rounded:
        """Numbers, scales and zeros of a linear; layers before it that are not done yet are done first."""
        if layer < self._next - 1:          # only the last layer's are kept
            self._next, self._states, self.choices = 0, [], []
        while self._next <= layer:
            self._do_layer()
        return self._rounded[path]

    def _do_layer(self) -> None:
        if not self._states:
            self._states = [self.model.embeddings(sample)[:self._most] for sample in self.samples]
        layer, seen = self.model.layer(self._next), dict[str, np.ndarray]()

        def look(path: str, inputs: np.ndarray) -> None:
            moments = inputs.T @ inputs
            seen[path] = seen[path] + moments if path in seen else moments

        for x, image in zip(self._states, self._images):
            layer(x, image, look)
        self._rounded = {}
        for path in linear_shapes(self.model.config):
            self._round(layer.weights, path, seen[SAME_INPUTS.get(path, path)])
        self._states = [layer(x, image) for x, image in zip(self._states, self._images)]
        self._next += 1

    def _round(self, weights: dict[str, np.ndarray], path: str, moments: np.ndarray) -> None:
        """Rounds a linear in both ways, keeps the better one, and puts it in the weight's place."""
        weight, tried = weights[path], list[tuple[float, Rounded]]()
        for rounded in (round_4(weight), round_by_outputs(weight, moments)):
            tried.append((output_error(weight, widen_4(*rounded), moments), rounded))
        error, best = min(tried, key=lambda one: one[0])
        self.choices.append(Choice(f"model.layers.{self._next}.{path}", tried[0][0], error))
        self._rounded[path], weights[path] = best, widen_4(*best)

    def sentence(self) -> str:
        """What calibration brought, in a line."""
        before, after = (float(np.mean([getattr(one, name) for one in self.choices])) for name in ("nearest", "chosen"))
        better = sum(one.chosen < one.nearest for one in self.choices)
        return (f"Calibrated with {len(self.samples)} samples: the linears' outputs differ by "
                f"{100 * after ** 0.5:.2f} % (root of the mean square), and by {100 * before ** 0.5:.2f} % with every "
                f"weight rounded to the nearest; {better} of {len(self.choices)} linears are better so.")
