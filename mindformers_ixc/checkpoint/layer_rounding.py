"""A decoder layer in four bits: each linear in the way whose outputs differ least.

Rounding to the nearest minds every weight alike. What counts is the output. Two things help, and go together: inputs
that are large get the finer numbers (`scaling`), and the rounding error of a weight is made good by those that are
rounded after it, as far as their inputs go together (GPTQ, arXiv 2210.17323).
"""
from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from mindformers_ixc.checkpoint.host_model import HostLayer
from mindformers_ixc.checkpoint.packing import GROUP, MOST_4, round_4, widen_4
from mindformers_ixc.checkpoint.scaling import NORMS, Fold, compared_rows, divided_norm, energy, row_divisors, search

# Ways of rounding a linear: to the nearest, with factors, column by column, and both.
NEAREST, AWQ_WAY, GPTQ_WAY, BOTH = "nearest", "AWQ", "GPTQ", "AWQ and GPTQ"
WAYS = (NEAREST, AWQ_WAY, GPTQ_WAY, BOTH)
WITH_FACTORS, BY_COLUMNS = (AWQ_WAY, BOTH), (GPTQ_WAY, BOTH)

# Added to the diagonal of the inputs' second moments, as a part of its mean, so that they can be inverted.
DAMPING = 0.01

# Numbers, scales and zeros, as `packing.round_4` gives them.
Rounded = tuple[np.ndarray, np.ndarray, np.ndarray]


def inverse_factor(moments: np.ndarray) -> np.ndarray:
    """The upper triangle U, in float32, with U^T U the inverse of the moments, which are damped.

    Of inputs that are divided by factors it is U with its columns multiplied by them.
    """
    damped, diagonal = moments.astype(np.float64), np.diagonal(moments)
    damped.flat[::len(damped) + 1] += np.where(diagonal > 0, 0, 1) + DAMPING * max(float(diagonal.mean()), 1e-20)
    return np.linalg.cholesky(np.linalg.inv(damped)).T.astype(np.float32)


def round_by_outputs(weight: np.ndarray, factor: np.ndarray) -> Rounded:
    """A weight `(O, F)` in four bits as `packing.round_4` gives it, rounded column by column.

    The error of a column goes, by the inverse of the moments, to the columns after it; scales and zeros of a group are
    those of its weights when its turn comes.

    Args:
        weight: in float32.
        factor: what `inverse_factor` gives of the inputs.
    """
    left, width = weight.copy(), weight.shape[1]
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


@dataclass(frozen=True)
class Choice:
    """What was taken for a linear.

    Attributes:
        path: of the linear, below its layer.
        way: in which it is rounded, one of `WAYS`.
        nearest: error of its outputs, rounded to the nearest.
        chosen: error of what was taken.
    """

    path: str
    way: str
    nearest: float
    chosen: float


@dataclass
class Decisions:
    """What was decided for a layer, by which another run makes the same of it.

    Attributes:
        ways: of the linears.
        factors: of their inputs, and of the norms that are divided by them; what has none is missing.
    """

    ways: dict[str, str] = field(default_factory=dict)
    factors: dict[str, np.ndarray] = field(default_factory=dict)


class LayerRounding:
    """Rounds a layer's linears, group by group in the order of `scaling.FOLDS`.

    Args:
        layer: its weights are replaced by what they mean once they are rounded.
        ways: that are tried.
        norm_dtypes: formats in which the norms are written.
        decided: what was decided before, all of it or nothing.

    Attributes:
        rounded: numbers, scales and zeros by linear.
        choices: by linear.
        decisions: for this layer.
    """

    def __init__(self, layer: HostLayer, ways: Sequence[str], norm_dtypes: Mapping[str, str],
                 decided: Decisions | None = None):
        self.layer, self.ways, self.norm_dtypes, self.decided = layer, ways, norm_dtypes, decided
        self.rounded: dict[str, Rounded] = {}
        self.choices: dict[str, Choice] = {}
        self.decisions = Decisions()

    def round(self, fold: Fold, moments: np.ndarray) -> None:
        """Rounds the linears of a group in every way, and keeps what loses least.

        Args:
            fold: the group.
            moments: sum over positions of the products of its inputs, `(F, F)`.
        """
        inverse = inverse_factor(moments) if any(way in BY_COLUMNS for way in self._ways(fold)) else None
        options = []
        for factors in self._factors(fold, moments):
            tried = {path: self._best(path, factors, moments, inverse) for path in fold.linears}
            options.append((sum(choice.chosen for choice in tried.values()), factors, tried))
        _, factors, tried = min(options, key=lambda option: option[0])
        if factors is not None:
            self.decisions.factors.update(dict.fromkeys(fold.linears, factors))
            if fold.before in NORMS:
                self.decisions.factors[fold.before] = factors
        for path, choice in tried.items():
            self.choices[path], self.decisions.ways[path] = choice, choice.way
            self.rounded[path], self.layer.weights[path] = self._in_way(path, choice.way, factors, inverse)

    def _ways(self, fold: Fold) -> Sequence[str]:
        """Ways that are tried for a group."""
        return self.ways if self.decided is None else [self.decided.ways[path] for path in fold.linears]

    def _factors(self, fold: Fold, moments: np.ndarray) -> Iterator[np.ndarray | None]:
        """Factors that are tried for a group; `None` for none."""
        if self.decided is not None:
            yield self.decided.factors.get(fold.linears[0])
            return
        plain = any(way not in WITH_FACTORS for way in self.ways)
        if plain:
            yield None
        if any(way in WITH_FACTORS for way in self.ways):
            found = self._found(fold, moments)
            if not plain or (found != 1).any():
                yield found

    def _found(self, fold: Fold, moments: np.ndarray) -> np.ndarray:
        """The factors that a search finds, as what is before can be divided by them; 1 where it cannot."""
        weights, config = self.layer.weights, self.layer.config
        found = search(fold, [weights[path] for path in fold.linears], moments, config)
        if fold.before in NORMS:
            return divided_norm(self.layer.norms[fold.before], found, self.norm_dtypes[fold.before])[1]
        before, divisors = weights[fold.before], row_divisors(fold.before, {fold.linears[0]: found}, config)
        assert divisors is not None, fold
        rounded, divided = widen_4(*round_4(before)), widen_4(*round_4(before / divisors[:, None]))
        lost = [float(np.square(before - one).sum()) for one in (rounded, divided * divisors[:, None])]
        # rows may become too small for the scales, which are float16
        return found if lost[1] <= 1.01 * lost[0] else np.ones_like(found)

    def _best(self, path: str, factors: np.ndarray | None, moments: np.ndarray, inverse: np.ndarray | None) -> Choice:
        """The way that loses least for a linear, given its inputs' factors."""
        rows = compared_rows(self.layer.weights[path])
        weight = self.layer.weights[path][rows]
        whole = energy(weight, moments) or 1

        def error(meaning: np.ndarray) -> float:
            found = energy(weight - meaning, moments) / whole
            return found if np.isfinite(found) else np.inf

        nearest, found = error(widen_4(*round_4(weight))), []
        for way in self.ways if self.decided is None else (self.decided.ways[path],):
            if (way in WITH_FACTORS) == (factors is not None):
                meaning = self._in_way(path, way, factors, inverse, rows)[1]
                found.append(Choice(path, way, nearest, error(meaning)))
        return min(found, key=lambda choice: choice.chosen)

    def _in_way(self, path: str, way: str, factors: np.ndarray | None, inverse: np.ndarray | None,
                rows: slice = slice(None)) -> tuple[Rounded, np.ndarray]:
        """Rows of a linear rounded in a way, and the weight that they stand for, without factors and divisors."""
        weight = self.layer.weights[path][rows]
        columns = np.ones(weight.shape[1], np.float32) if factors is None else factors
        divisors = row_divisors(path, self.decisions.factors, self.layer.config)
        divided = np.ones((len(weight), 1), np.float32) if divisors is None else divisors[rows, None]
        wanted = weight * columns / divided
        if way in BY_COLUMNS:
            assert inverse is not None, way
            rounded = round_by_outputs(wanted, inverse * columns)
        else:
            rounded = round_4(wanted)
        return rounded, widen_4(*rounded) / columns * divided
