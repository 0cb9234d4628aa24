"""NEFTune: the noise against its formula in NumPy, and what it depends on."""
from __future__ import annotations

import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor, nn
from mindspore.ops import functional as F

from mindformers_ixc.models.configuration import IXC25Config
from mindformers_ixc.models.dropout import FEATURE_MIX_FIRST, FEATURE_MIX_SECOND, FEATURE_SHIFT, PositionNoise
from mindformers_ixc.models.embedding_noise import SALT, EmbeddingNoise
from mindformers_ixc.models.ixc25 import IXC25Model

ALPHA, WIDTH, LENGTH = 5.0, 96, 40
LENGTHS = np.array([[40] * 40, [30] * 30 + [0] * 10, [12] * 12 + [20] * 20 + [0] * 8], np.int32)
SEEDS = np.array([3, 2 ** 31 - 1, 17], np.int32)


class Noise(nn.Cell):
    def __init__(self, alpha: float, train: bool = True):
        super().__init__()
        self.positions, self.noise = PositionNoise(LENGTH), EmbeddingNoise(alpha, WIDTH)
        self.set_train(train)

    def construct(self, x, seeds, lengths):
        return self.noise(x, self.positions(seeds), lengths)


def noise_of(cell, seeds=SEEDS, lengths=LENGTHS, x=None) -> np.ndarray:
    x = np.zeros((lengths.size, WIDTH), np.float32) if x is None else x
    return cell(Tensor(x), Tensor(seeds), Tensor(lengths)).asnumpy()


@pytest.fixture(scope="module")
def noisy() -> Noise:
    return Noise(ALPHA)


def test_it_is_uniform_by_the_papers_formula_without_padding(noisy):
    steps = (np.arange(LENGTH, dtype=np.int64) * 0x9E3779B + 1).astype(np.int32).astype(np.int64) * 0x2C1B3C7
    seeds = (2 * (SEEDS[:, None].astype(np.int64) * 0x85EBCA7 + steps) + 1).astype(np.int32).reshape(-1, 1)
    columns = np.random.RandomState((WIDTH, SALT)).randint(-2 ** 31, 2 ** 31 - 1, (1, WIDTH)).astype(np.int32)
    with np.errstate(over="ignore"):
        bits = (seeds ^ columns) * np.int32(FEATURE_MIX_FIRST)
        bits = (bits ^ (bits >> FEATURE_SHIFT)) * np.int32(FEATURE_MIX_SECOND)
    lengths = LENGTHS.reshape(-1, 1).astype(np.float64)
    size = np.where(lengths > 0, ALPHA / np.sqrt(np.maximum(lengths, 1) * WIDTH), 0)
    np.testing.assert_allclose(noise_of(noisy), bits / 2.0 ** 31 * size, rtol=1e-5, atol=1e-7)
    unit = (bits / 2.0 ** 31)[lengths[:, 0] > 0]
    count = unit.size
    assert abs(unit.mean()) < 4 * np.sqrt(1 / 3 / count)                       # four standard errors
    assert abs((unit ** 2).mean() - 1 / 3) < 4 * np.sqrt(4 / 45 / count)
    shares = np.histogram(unit, 20, (-1, 1))[0] / count
    assert abs(shares - 0.05).max() < 4 * np.sqrt(0.05 * 0.95 / count)
    for one, other in ((unit[:-1], unit[1:]), (unit[:, :-1], unit[:, 1:])):    # of neighbours neither tells the other
        assert abs((one * other).mean()) < 4 / 3 / np.sqrt(one.size)


def test_a_sample_has_its_noise_whatever_else_is_in_the_batch(noisy):
    whole = noise_of(noisy).reshape(3, LENGTH, WIDTH)
    alone = noise_of(noisy, SEEDS[2:], LENGTHS[2:]).reshape(1, LENGTH, WIDTH)
    assert whole[2:].tobytes() == alone.tobytes()
    assert (whole[1] != noise_of(noisy, SEEDS + 1).reshape(3, LENGTH, WIDTH)[1])[:30].mean() > 0.99


@pytest.mark.parametrize("cell", [Noise(0.0), Noise(ALPHA, train=False)])
def test_without_strength_or_training_nothing_changes(cell):
    x = np.random.default_rng(0).normal(size=(LENGTHS.size, WIDTH)).astype(np.float32)
    assert noise_of(cell, x=x).tobytes() == x.tobytes()


def test_gradients_go_through_it_unchanged(noisy):
    def total(x, seeds, lengths, factors):
        return (noisy(x, seeds, lengths) * factors).sum()

    factors = np.random.default_rng(1).normal(size=(LENGTHS.size, WIDTH)).astype(np.float32)
    x = Tensor(np.zeros_like(factors))
    found = F.grad(total)(x, Tensor(SEEDS), Tensor(LENGTHS), Tensor(factors)).asnumpy()
    np.testing.assert_array_equal(found, factors)


SIZES = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4,
         "num_key_value_heads": 2, "plora_rank": 2, "plora_alpha": 2, "plora_dropout": 0.0, "seq_length": 12,
         "max_tiles": 1, "task_lora_ranks": {},
         "vision_config": {"image_size": 28, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
                           "intermediate_size": 16}}


class Loss(nn.Cell):
    """The loss of text by the columns that the noise and the weights are made of."""

    def __init__(self, **fields):
        super().__init__()
        ms.set_seed(5)
        self.model = IXC25Model(IXC25Config(**SIZES, **fields))
        self.set_train(True)

    def construct(self, ids, labels, seed, lengths, weights):
        return self.model(ids, labels, noise_seed=seed, lengths=lengths, loss_weights=weights)


@pytest.fixture(scope="module")
def batch():
    rng = np.random.default_rng(0)
    ids = rng.integers(3, 64, (2, 12)).astype(np.int32)
    labels = np.where(rng.random((2, 12)) < 0.6, ids, -100).astype(np.int32)
    lengths = np.array([[12] * 12, [8] * 8 + [0] * 4], np.int32)
    return ids, labels, np.array([4, 5], np.int32), lengths


def loss_of(cell, batch, weights=None) -> np.ndarray:
    return cell(*map(Tensor, batch), None if weights is None else Tensor(weights)).asnumpy()


def test_a_model_trains_with_noise_and_answers_without(batch):
    plain, noisy = Loss(), Loss(neftune_alpha=5.0)
    found = loss_of(noisy, batch)
    assert found != loss_of(plain, batch)
    again = loss_of(Loss(neftune_alpha=5.0), batch)
    assert again.tobytes() == found.tobytes()
    noisy.set_train(False)
    assert loss_of(noisy, batch).tobytes() == loss_of(plain, batch).tobytes()


def test_weights_make_the_loss_a_weighted_mean(batch):
    """Against the losses of single positions; weights of 1 change no bit."""
    cell, labels = Loss(), batch[1]
    labelled = labels != -100
    expected = loss_of(cell, batch)
    assert loss_of(cell, batch, labelled.astype(np.float32)).tobytes() == expected.tobytes()
    single = []
    for place in np.argwhere(labelled).tolist():
        only = np.full_like(labels, -100)
        only[tuple(place)] = labels[tuple(place)]
        single.append(float(loss_of(cell, (batch[0], only, *batch[2:]))))
    weights = np.where(labelled, np.random.default_rng(2).uniform(0, 0.01, labels.shape), 0).astype(np.float32)
    found = loss_of(cell, batch, weights)
    assert found == pytest.approx(np.average(single, weights=weights[labelled]), rel=1e-5)
    sums = loss_of
    assert sums(Loss(), batch, np.zeros_like(weights)) == 0
