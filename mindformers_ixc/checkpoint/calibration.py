"""Four-bit weights chosen by what goes through them: samples run through the model, a layer after the other.

A layer's inputs are those that the layers before it give as they are quantised; `layer_rounding` rounds it.
"""
from __future__ import annotations

import hashlib
import io
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from mindformers_ixc.checkpoint.dtypes import to_float32
from mindformers_ixc.checkpoint.host_model import HostModel
from mindformers_ixc.checkpoint.layer_rounding import WAYS, Choice, Decisions, LayerRounding, Rounded
from mindformers_ixc.checkpoint.quantised import ComputedTensor
from mindformers_ixc.checkpoint.scaling import FOLDS, NORMS, divided_norm, fitted
from mindformers_ixc.checkpoint.tensors import LazyTensor
from mindformers_ixc.data.conversations import load_conversations, named_sources
from mindformers_ixc.errors import CheckpointError, DataError
from mindformers_ixc.files import write_whole
from mindformers_ixc.parameters import layer_of
from mindformers_ixc.processing.encoded import EncodedSample
from mindformers_ixc.processing.processor import Processor

# Samples that are taken where nobody says how many, positions of each and tiles of a picture at most: the tower takes a
# teraflop a tile of 560 pixels.
SAMPLES, POSITIONS, TILES = 16, 2048, 4


def calibration_samples(path: str | Path, processor: Processor, count: int = SAMPLES) -> list[EncodedSample]:
    """Some conversations of a file, spread over those with pictures.

    Args:
        path: conversations, in any form that training reads: a file, a list file (of whose sources all samples count
            alike), or a folder with a table.
        processor: of the model.
        count: samples at most.

    Raises:
        DataError: for a file without pictures.
    """
    found = [conversation for source, _ in named_sources(path) for conversation in load_conversations(source)
             if conversation.images]
    if not found:
        raise DataError(f"{path} has no sample with a picture; calibration needs what the model will see, pictures and "
                        "text.")
    chosen = [found[len(found) * number // count] for number in range(count)] if len(found) > count else found
    tiles = min(processor.image_processor.hd_num, TILES)
    return [processor.encode_conversation(one.turns, one.images, one.where, tiles) for one in chosen]


class Calibrator:
    """Rounds the linears of a model, a layer at a time, in order.

    Args:
        model: the full weights.
        samples: what goes through it.
        ways: of rounding that are tried, of `layer_rounding.WAYS`.
        norm_dtype: format in which norms are written; each in its own by default.
        notes: folder in which a run leaves what it decided, and one that goes on finds it.

    Attributes:
        choices: of the layers that are done.
    """

    def __init__(self, model: HostModel, samples: Sequence[EncodedSample], ways: Sequence[str] = WAYS,
                 norm_dtype: str | None = None, notes: Path | None = None):
        self.model, self.samples, self.ways, self.notes = model, samples, tuple(ways), notes
        self.norm_dtype = norm_dtype
        self.choices: list[Choice] = []
        self._states: list[np.ndarray] = []
        self._most = min(POSITIONS, model.config.max_position_embeddings)
        self._images = [sample.image_mask[:self._most] == 1 for sample in samples]
        self._rounded: dict[str, Rounded] = {}
        self._decisions = Decisions()
        self._next = 0

    def digest(self) -> str:
        """SHA-256 of what the samples are, and of the ways."""
        digest = hashlib.sha256(repr(self.ways).encode())
        for sample in self.samples:
            for array in (sample.input_ids, sample.image_mask, sample.pixel_values):
                digest.update(repr(array.shape).encode() + np.ascontiguousarray(array).tobytes())
        return digest.hexdigest()

    def rounded(self, layer: int, path: str) -> Rounded:
        """Numbers, scales and zeros of a linear; layers before it that are not done yet are done first."""
        self._reach(layer)
        return self._rounded[path]

    def fitted(self, name: str, tensor: LazyTensor) -> LazyTensor:
        """A norm, or a side of a low-rank pair, as the factors of its layer need it; what has none as it is."""
        layer = layer_of(name)
        if layer is None:
            return tensor
        part = name.split(".")[-2]
        if part in NORMS:
            dtype = self._norm_dtype(name)

            def norm(begin: int, end: int) -> np.ndarray:
                self._reach(layer)
                weight, factors = to_float32(tensor.whole(), tensor.dtype), self._decisions.factors.get(part)
                return (weight if factors is None else divided_norm(weight, factors, dtype)[0])[begin:end]

            return ComputedTensor("F32", tensor.shape, norm, dtype)
        follow = fitted(name, self.model.config)
        if follow is None:
            return tensor

        def rows(begin: int, end: int) -> np.ndarray:
            self._reach(layer)
            return follow(to_float32(tensor.rows(begin, end), tensor.dtype), begin, end, self._decisions.factors)

        return ComputedTensor("F32", tensor.shape, rows, tensor.stored_dtype)

    def _norm_dtype(self, name: str) -> str:
        return self.norm_dtype or self.model.tensors[name].stored_dtype

    def _reach(self, layer: int) -> None:
        """Does the layers up to one; what came of it is kept then, of the others it is not."""
        if layer < self._next - 1:
            self._next, self._states, self.choices = 0, [], []
        while self._next <= layer:
            self._do_layer()

    def _do_layer(self) -> None:
        if not self._states:
            self._states = [self.model.embeddings(sample)[:self._most] for sample in self.samples]
        layer, seen = self.model.layer(self._next), dict[str, np.ndarray]()

        def look(path: str, inputs: np.ndarray) -> None:
            moments = inputs.T @ inputs
            seen[path] = seen[path] + moments if path in seen else moments

        for x, image in zip(self._states, self._images):
            layer(x, image, look)
        self._check(seen)
        dtypes = {norm: self._norm_dtype(f"model.layers.{self._next}.{norm}.weight") for norm in NORMS}
        rounding = LayerRounding(layer, self.ways, dtypes, self._noted())
        for fold in FOLDS:
            rounding.round(fold, seen.pop(fold.linears[0]))
        self._rounded, self._decisions = rounding.rounded, rounding.decisions
        self.choices += rounding.choices.values()
        self._note()
        self._states = [layer(x, image) for x, image in zip(self._states, self._images)]
        self._next += 1

    def _check(self, seen: dict[str, np.ndarray]) -> None:
        """Refuses moments that nothing can be chosen by."""
        odd = next((path for path, moments in seen.items() if not np.isfinite(moments).all()), None)
        if odd is not None:
            raise CheckpointError(f"What the samples bring to model.layers.{self._next}.{odd} holds NaN, infinities or "
                                  "numbers whose squares are beyond float32, so nothing can be chosen by it; take a "
                                  "checkpoint that answers, or leave --calibrate out.")

    def _noted(self) -> Decisions | None:
        """What an interrupted run decided for the layer, so that what it has written and what is missing agree."""
        if self.notes is None or not self._notes_file().is_file():
            return None
        with np.load(self._notes_file()) as found:
            arrays = dict(found)
        ways = {name[4:]: str(value) for name, value in arrays.items() if name.startswith("way:")}
        return Decisions(ways, {name: value for name, value in arrays.items() if not name.startswith("way:")})

    def _notes_file(self) -> Path:
        assert self.notes is not None
        return self.notes / f"decisions_{self._next}.npz"

    def _note(self) -> None:
        """Leaves what was decided for the layer on the disk, before anything of the layer is."""
        if self.notes is None:
            return
        ways = {f"way:{path}": np.array(way) for path, way in self._decisions.ways.items()}
        content = io.BytesIO()
        np.savez(content, **ways, **self._decisions.factors)
        write_whole(self._notes_file(), content.getvalue(), sync=True)

    def sentence(self) -> str:
        """What calibration brought."""
        before, after = (float(np.mean([getattr(one, name) for one in self.choices])) for name in ("nearest", "chosen"))
        counts = Counter(one.way for one in self.choices)
        taken = ", ".join(f"{counts[way]} {'rounded to the ' * (way == WAYS[0])}{way}" for way in WAYS if counts[way])
        samples = "1 sample" if len(self.samples) == 1 else f"{len(self.samples)} samples"
        return (f"Calibrated with {samples}: the linears' outputs differ by "
                f"{100 * after ** 0.5:.2f} % (root of the mean square), and by {100 * before ** 0.5:.2f} % with every "
                f"weight rounded to the nearest. Of {len(self.choices)} linears: {taken}.")
