"""Learning scores from pairs: the loss against its formulae, the network against the numpy reference in float64."""
from __future__ import annotations

import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor
from only_loss import Only
from reference import ReferenceModel
from reward_model import make_reward_model

from mindformers_ixc.checkpoint.model_directory import load_weights
from mindformers_ixc.config import read_config
from mindformers_ixc.data.preferences import score_positions
from mindformers_ixc.errors import ConfigError
from mindformers_ixc.models.configuration import IXC25Config
from mindformers_ixc.models.reward import IXC25RewardModel, RewardLoss, ScorePooling
from mindformers_ixc.parameters import part_of
from mindformers_ixc.reward_options import reward_options

SIZE, LENGTH = 56, 14              # of a tile of the reference model, which has 4 tokens; of a sequence


def expected_losses(scores: np.ndarray, loss: str, log_barrier: float) -> np.ndarray:
    """float64 losses `(B,)` by the papers' formulae."""
    scores = scores.astype(np.float64)
    logp = -np.logaddexp(0.0, scores[:, 1] - scores[:, 0])
    losses = -logp
    if loss == "focal":
        losses = (1 - 2 * np.maximum(np.exp(logp) - 0.5, 0)) ** 2 * losses
    inside = np.clip(scores, -4.999, 4.999)
    return losses + log_barrier * (-np.log(5 + inside) - np.log(5 - inside)).mean(1)


OPTIONS = [{"loss": "ranking"}, {"loss": "focal"}, {"loss": "ranking", "log_barrier": 0.01},
           {"loss": "focal", "log_barrier": 0.5}]


@pytest.mark.parametrize("options", OPTIONS, ids=lambda options: "-".join(map(str, options.values())))
@pytest.mark.parametrize("magnitude", [0.01, 1.0, 4.0, 30.0])
def test_loss_gradient_and_report_follow_their_formulae(options, magnitude):
    scores = (magnitude * np.random.default_rng(3).standard_normal((8, 2))).astype(np.float32)
    cell = RewardLoss(**options)
    value, report = (out.asnumpy() for out in cell(Tensor(scores)))
    loss, barrier = options["loss"], options.get("log_barrier", 0.0)
    assert value == pytest.approx(expected_losses(scores, loss, barrier).mean(), rel=1e-5, abs=1e-7)
    gradient = ms.ops.GradOperation()(Only(cell))(Tensor(scores)).asnumpy()
    slopes, step = np.zeros(scores.shape), 1e-6
    for place in np.ndindex(*scores.shape):
        moved = [scores.astype(np.float64), scores.astype(np.float64)]
        moved[0][place] += step
        moved[1][place] -= step
        above, below = (expected_losses(one, loss, barrier).mean() for one in moved)
        slopes[place] = (above - below) / (2 * step)
    smooth = abs(abs(scores) - 4.999) > 1e-2      # nothing is pulled back from beyond, and there is a corner
    np.testing.assert_allclose(gradient[smooth], slopes[smooth], rtol=2e-3, atol=1e-6 * max(1, abs(slopes).max()))
    margins = scores[:, 0] - scores[:, 1]
    np.testing.assert_allclose(report, [*scores.sum(0), margins.sum(), (margins > 0).sum(), 8], rtol=1e-5, atol=1e-5)


def test_pairs_of_micro_batches_are_summed_and_divided_once():
    scores = np.random.default_rng(0).standard_normal((6, 2)).astype(np.float32)
    whole = float(RewardLoss("focal", 0.1)(Tensor(scores))[0].asnumpy())
    cell = RewardLoss("focal", 0.1, summed=True)
    parts = [[float(out.asnumpy()) for out in cell(Tensor(scores[part]))[:2]] for part in (slice(0, 2), slice(2, 6))]
    total, pairs = np.sum(parts, axis=0)
    assert pairs == 6 and total / pairs == pytest.approx(whole, rel=1e-6)


@pytest.mark.parametrize("pooling", ["last", "mean"])
def test_pooling_sees_no_padding(pooling):
    values = np.random.default_rng(1).standard_normal((3, 8)).astype(np.float32)
    lengths = (8, 5, 1)
    positions = np.stack([score_positions(length, 8) for length in lengths])
    found = ScorePooling(pooling)(Tensor(values), Tensor(positions)).asnumpy()
    wanted = [row[length - 1] if pooling == "last" else row[:length].mean() for row, length in zip(values, lengths)]
    np.testing.assert_allclose(found, wanted, rtol=1e-6)


def batch() -> list[np.ndarray]:
    """Two pairs of answers of several lengths, one behind a picture's four tokens and one without."""
    rng = np.random.default_rng(4)
    ids, lengths = np.full((2, 2, LENGTH), 2, np.int32), ((14, 11), (9, 12))
    positions = np.stack([[score_positions(length, LENGTH) for length in pair] for pair in lengths])
    for pair, side in np.ndindex(2, 2):
        ids[pair, side, :lengths[pair][side]] = rng.integers(3, 400, lengths[pair][side])
    pixels = np.zeros((2, 1, 3, SIZE, SIZE), np.float32)
    pixels[0] = rng.normal(size=pixels.shape[1:])
    index, mask = np.zeros_like(ids), np.zeros_like(ids)
    index[0, :, :4], mask[0, :, :4], ids[0, :, :4] = np.arange(4), 1, 2
    return [ids, pixels, index, mask, positions]


def reference_scores(reference: ReferenceModel, data, pooling: str) -> np.ndarray:
    """float64 `(2, 2)` by the numpy reference."""
    ids, pixels, index, mask, positions = data
    features = reference.vit_features(pixels[:, 0].astype(np.float64))
    tables = reference.project(reference._merge(features).reshape(2, 4, -1))
    reference.weights["output.weight"] = reference.weights["v_head.weight"]
    found = np.zeros((2, 2))
    for pair, side in np.ndindex(2, 2):
        x = reference.weights["model.tok_embeddings.weight"][ids[pair, side]]
        image = mask[pair, side] == 1
        x[image] = tables[pair][index[pair, side][image]]
        values = reference.logits(x[None], image[None])[0, :, 0]
        real = positions[pair, side] > 0
        found[pair, side] = values[real][-1] if pooling == "last" else values[real].mean()
    return found


def build(folder, **fields) -> IXC25RewardModel:
    config = read_config(folder, IXC25Config, seq_length=LENGTH, max_tiles=1, plora_dropout=0.0, **fields)
    model = IXC25RewardModel(config)
    load_weights(model, folder)
    return model


def columns_of(data) -> list:
    """Arguments of the network; all tiles are normalised."""
    ids, pixels, index, mask, positions = map(Tensor, data)
    return [ids, None, pixels, None, None, index, mask, positions]


@pytest.mark.parametrize("pooling", ["last", "mean"])
def test_the_loss_of_pairs_is_that_of_the_reference(tmp_path, pooling):
    folder = make_reward_model(tmp_path / "model", pooling)
    model, data = build(folder, reward={"loss": "focal", "log_barrier": 0.1}), batch()
    scores = reference_scores(ReferenceModel(folder), data, pooling)
    loss, report = (out.asnumpy() for out in model(*columns_of(data)))
    assert loss == pytest.approx(expected_losses(scores, "focal", 0.1).mean(), abs=1e-4)
    np.testing.assert_allclose(report[:2], scores.sum(0), atol=1e-4)


def test_every_gradient_is_that_of_the_reference(tmp_path):
    """Along a random direction of each parameter: central differences of the numpy reference in float64."""
    folder = make_reward_model(tmp_path / "model")
    model, data, rng = build(folder), batch(), np.random.default_rng(6)
    reference = ReferenceModel(folder)
    weights = ms.ParameterTuple(model.trainable_params())
    gradients = ms.ops.GradOperation(get_by_list=True)(Only(model), weights)(*columns_of(data))
    seen = set()
    for weight, gradient in zip(weights, gradients):
        name = weight.name.removeprefix("network.")
        values = reference.weights[name]
        if ".post_layernorm." in name:
            continue
        direction = rng.standard_normal(values.shape)
        if name == "model.tok_embeddings.weight":
            direction[2] = 0.0      # the padding's embedding gets no gradient, as in the public code
        found, step, losses = float((gradient.asnumpy() * direction).sum()), 1e-5, []
        for sign in (1, -1):
            reference.weights[name] = values + sign * step * direction
            losses.append(expected_losses(reference_scores(reference, data, "last"), "ranking", 0.0).mean())
        reference.weights[name] = values
        wanted = (losses[0] - losses[1]) / (2 * step)
        assert found == pytest.approx(wanted, rel=1e-4, abs=1e-4), name
        seen.add(part_of(name) if abs(wanted) > 1e-3 else None)
    assert {"vision", "projector", "partial_lora", "language", "reward_head"} <= seen


@pytest.mark.parametrize("section", [{"loss": "hinge"}, {"log_barrier": -1}, {"beta": 0.1}])
def test_options_that_there_are_not_are_refused(section):
    with pytest.raises(ConfigError, match="reward"):
        reward_options(section)
    assert reward_options(None) == {"loss": "ranking", "log_barrier": 0.0}
