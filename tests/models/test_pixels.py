"""The cells that make normalised tiles of the pixel columns and take rows of each sample's table."""
from __future__ import annotations

import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor, nn
from mindspore.ops import operations as P

from mindformers_ixc.generation.causal_lm import IXC25ForCausalLM
from mindformers_ixc.models.configuration import IXC25Config
from mindformers_ixc.models.pixels import SampleRows, TilePixels
from mindformers_ixc.processing.image import Tiles

TILES, IMAGES, SIDE, LENGTH = 4, 2, 56, 24
# views in and out of order, one of them twice, and a sample of local tiles alone
SLOTS = np.array([[1, 0, 2, 0], [2, 0, 0, 1], [1, 1, 0, 0], [0, 0, 0, 0]], np.int32)


def columns(batch: int = len(SLOTS), side: int = SIDE) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Bytes, also where a global view belongs, global views, and slots."""
    rng = np.random.default_rng(0)
    return (rng.integers(0, 256, (batch, TILES, 3, side, side), np.uint8),
            rng.standard_normal((batch, IMAGES, 3, side, side)).astype(np.float32), SLOTS[:batch])


def normalised(pixels: np.ndarray, views: np.ndarray, slots: np.ndarray) -> np.ndarray:
    return np.stack([Tiles(*sample).normalised() for sample in zip(pixels, views, slots)])


class Gradient(nn.Cell):
    """Gradients by the inputs of a cell, for a gradient of its output."""

    def __init__(self, cell):
        super().__init__()
        self.cell, self.gradient = cell, ms.ops.GradOperation(get_all=True, sens_param=True)

    def construct(self, *inputs):
        return self.gradient(self.cell)(*inputs)


@pytest.mark.parametrize("dtype", [ms.float32, ms.float16])
def test_the_network_normalises_as_the_host(dtype):
    ms.set_context(mode=ms.GRAPH_MODE)
    pixels, views, slots = columns()
    found = TilePixels(dtype)(Tensor(pixels), Tensor(views), Tensor(slots))
    assert found.dtype == dtype
    expected = normalised(pixels, views, slots).reshape(-1, 3, SIDE, SIDE)
    np.testing.assert_array_equal(found.asnumpy(), expected.astype(found.asnumpy().dtype))


def test_normalised_tiles_pass_as_they_are_and_mixtures_are_refused():
    ms.set_context(mode=ms.GRAPH_MODE)
    cell, (pixels, views, slots) = TilePixels(ms.float32), columns(2)
    tiles = normalised(pixels, views, slots)
    np.testing.assert_array_equal(cell(Tensor(tiles), None, None).asnumpy(), tiles.reshape(-1, 3, SIDE, SIDE))
    for wrong in ((pixels, None, None), (pixels, views, None), (tiles, views, slots)):
        with pytest.raises(ValueError, match="uint8 pixel_values need global_views and view_index"):
            cell(*(None if column is None else Tensor(column) for column in wrong))


def test_global_views_get_no_gradient():
    pixels, views, slots = columns(1, 14)
    ones = Tensor(np.ones((TILES, 3, 14, 14), np.float32))
    _, gradient, _ = Gradient(TilePixels(ms.float32))(Tensor(pixels), Tensor(views), Tensor(slots), ones)
    assert not gradient.asnumpy().any()


class BatchedGather(nn.Cell):
    def __init__(self):
        super().__init__()
        self.gather = P.Gather(batch_dims=1)

    def construct(self, table, index):
        return self.gather(table, index, 1)


@pytest.mark.parametrize("batch", [1, 3])
def test_the_flat_gather_has_the_bits_of_the_batched_one(batch):
    ms.set_context(mode=ms.GRAPH_MODE)
    rng = np.random.default_rng(0)
    table = Tensor(rng.standard_normal((batch, 30, 16)).astype(np.float32))
    index = Tensor(rng.integers(0, 30, (batch, 200)).astype(np.int32))         # every row several times
    above = Tensor(rng.standard_normal((batch, 200, 16)).astype(np.float32))
    flat, batched = SampleRows(), BatchedGather()
    np.testing.assert_array_equal(flat(table, index).asnumpy(), batched(table, index).asnumpy())
    np.testing.assert_array_equal(Gradient(flat)(table, index, above)[0].asnumpy(),
                                  Gradient(batched)(table, index, above)[0].asnumpy())


@pytest.mark.slow
def test_loss_and_gradients_are_those_of_normalised_tiles():
    ms.set_context(mode=ms.GRAPH_MODE)
    ms.set_seed(0)
    model = IXC25ForCausalLM(IXC25Config(
        vocab_size=64, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, plora_rank=4, plora_alpha=4, task_lora_ranks={}, seq_length=LENGTH, max_tiles=TILES,
        plora_dropout=0.0, vision_config={"image_size": SIDE, "hidden_size": 16, "num_hidden_layers": 1,
                                          "num_attention_heads": 2, "intermediate_size": 16}))
    model.set_train(True)
    rng, (pixels, views, slots) = np.random.default_rng(1), columns(2)
    ids = rng.integers(3, 64, (2, LENGTH)).astype(np.int32)
    mask = np.zeros_like(ids)
    mask[:, 2:18] = 1
    index = rng.integers(0, TILES * 4 + 2, ids.shape).astype(np.int32) * mask
    rest = [Tensor(index), Tensor(mask)]
    weights = [weight for weight in model.trainable_params() if "patch_embedding" in weight.name
               or "vision_proj.2" in weight.name]
    step = ms.value_and_grad(model, None, weights)
    found = [step(Tensor(ids), Tensor(ids), *form, *rest) for form in (
        (Tensor(pixels), Tensor(views), Tensor(slots)), (Tensor(normalised(pixels, views, slots)), None, None))]
    losses = [float(loss.asnumpy()) for loss, _ in found]
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)
    for ours, theirs in zip(found[0][1], found[1][1]):
        assert np.abs(theirs.asnumpy()).max() > 1e-6
        np.testing.assert_allclose(ours.asnumpy(), theirs.asnumpy(), rtol=1e-5, atol=1e-8)
