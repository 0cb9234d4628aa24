"""GRPO: the loss against its formulae in float64, the network against the numpy reference."""
from __future__ import annotations

import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor
from only_loss import Only
from reference import GOLDENS, ReferenceModel

from mindformers_ixc.checkpoint.model_directory import load_weights
from mindformers_ixc.config import read_config
from mindformers_ixc.errors import ConfigError
from mindformers_ixc.models.configuration import IXC25Config
from mindformers_ixc.models.grpo import GroupLoss, IXC25ForGRPO
from mindformers_ixc.training.parts import train_only

SIZE, LENGTH, ANSWERS = 56, 14, 3              # of a tile of the reference model, of a sequence, of a group


def expected(logps, labels, rewards, matches, sampled, reference, beta: float, clip: float):
    """Loss, its gradient by the log-probabilities `(B*N, L)`, and the report, in float64 from the paper's formulae."""
    logps, sampled, reference, rewards = (one.astype(np.float64) for one in (logps, sampled, reference, rewards))
    std = rewards.std(1, keepdims=True)
    equal = np.ptp(rewards, axis=1) == 0
    advantage = ((rewards - rewards.mean(1, keepdims=True)) / (std + 1e-4)).reshape(-1, 1)
    advantage[np.repeat(equal, rewards.shape[1])] = 0.0
    real = labels != -100
    share = real / real.sum(1, keepdims=True)
    ratio = np.exp(logps - sampled)
    limited = np.clip(ratio, 1 - clip, 1 + clip) * advantage
    clipped = limited < ratio * advantage
    kl = np.exp(reference - logps) - (reference - logps) - 1
    loss = -((np.minimum(ratio * advantage, limited) - beta * kl) * share).sum() / len(logps)
    slopes = -(np.where(clipped, 0, ratio * advantage) - beta * (1 - np.exp(reference - logps))) * share / len(logps)
    n = rewards.shape[1]
    report = [rewards.sum(), n * std.sum(), matches.sum(), (kl * share).sum(), (clipped * share).sum(), real.sum(),
              n * equal.sum(), rewards.size]
    return loss, slopes, np.array(report)


@pytest.mark.parametrize(("beta", "spread"), [(0.0, 1.0), (0.04, 0.0), (0.04, 0.1), (1.0, 1.0)])
def test_loss_gradient_and_report_follow_their_formulae(beta, spread):
    rng = np.random.default_rng(3)
    labels = rng.integers(0, 9, (12, 7)).astype(np.int32)
    labels[rng.random(labels.shape) < 0.3] = -100
    labels[:, 0] = 1
    real = labels != -100
    logps = (-2 * rng.random(labels.shape) * real).astype(np.float32)
    sampled, reference = ((logps + spread * rng.standard_normal(labels.shape) * real).astype(np.float32)
                          for _ in range(2))
    rewards = rng.integers(0, 3, (3, 4)).astype(np.float32)
    rewards[1] = 0.1                                # a group of equal rewards, whose mean is rounded
    matches = (rewards > 1).astype(np.float32)
    cell = GroupLoss(beta, 0.2)
    inputs = [Tensor(one) for one in (-logps, labels, rewards, matches, sampled, -reference)]
    value, report = (out.asnumpy() for out in cell(*inputs))
    gradient = -ms.ops.GradOperation()(Only(cell))(*inputs).asnumpy()
    loss, slopes, sums = expected(logps, labels, rewards, matches, sampled, reference, beta, 0.2)
    assert value == pytest.approx(loss, rel=1e-5, abs=1e-6)
    np.testing.assert_allclose(gradient, slopes, rtol=1e-4, atol=1e-6)
    sums[3] *= beta > 0
    np.testing.assert_allclose(report, sums, rtol=1e-5, atol=1e-5)
    assert (report[4] > 0) == (spread == 1.0)
    if not beta:
        assert not gradient[4:8].any(), "a group of equal rewards teaches nothing"


def batch() -> list[np.ndarray]:
    """Two prompts, one of them a picture of four tokens, with three answers of several lengths each."""
    rng = np.random.default_rng(4)
    ids = rng.integers(3, 400, (2, ANSWERS, LENGTH)).astype(np.int32)
    labels = np.full_like(ids, -100)
    for prompt, start in enumerate((6, 8)):
        ids[prompt, :, :start] = ids[prompt, 0, :start]
        for answer in range(ANSWERS):
            end = LENGTH - answer
            labels[prompt, answer, start - 1:end - 1] = ids[prompt, answer, start:end]
            ids[prompt, answer, end:] = 2
    pixels = np.zeros((2, 1, 3, SIZE, SIZE), np.float32)
    pixels[0] = rng.normal(size=pixels.shape[1:])
    index, mask = np.zeros_like(ids), np.zeros_like(ids)
    index[0, :, :4], mask[0, :, :4], ids[0, :, :4] = np.arange(4), 1, 2
    rewards = np.array([[1.0, 0.0, 0.25], [0.0, 0.0, 2.0]], np.float32)
    sampled = rng.normal(0, 0.3, ids.shape).astype(np.float32)
    return [ids, labels, pixels, index, mask, rewards, (rewards == 1).astype(np.float32), sampled]


def reference_logps(model: ReferenceModel, data: list[np.ndarray]) -> np.ndarray:
    """float64 log-probabilities `(B*N, L)` of the labels in mode write."""
    ids, labels, pixels, index, mask = data[:5]
    tables = model.project(model._merge(model.vit_features(pixels[:, 0].astype(np.float64))).reshape(2, 4, -1))
    found = np.zeros(ids.shape)
    for prompt, answer in np.ndindex(2, ANSWERS):
        x = model.weights["model.tok_embeddings.weight"][ids[prompt, answer]]
        image = mask[prompt, answer] == 1
        x[image] = tables[prompt][index[prompt, answer][image]]
        logits = model.logits(x[None], image[None], "write")[0]
        logits = logits - np.log(np.exp(logits - logits.max(-1, keepdims=True)).sum(-1, keepdims=True)) \
            - logits.max(-1, keepdims=True)
        wanted = labels[prompt, answer]
        real = wanted != -100
        found[prompt, answer, real] = logits[real, wanted[real]]
    return found.reshape(-1, LENGTH)


def test_loss_and_every_gradient_are_those_of_the_reference():
    """Along a random direction of each matrix of the pair: central differences of the numpy reference in float64."""
    config = read_config(GOLDENS / "t1", IXC25Config, adapter_mode="write", seq_length=LENGTH, max_tiles=1,
                         grpo={"beta": 0.5, "clip": 0.2})
    model, data, rng = IXC25ForGRPO(config), batch(), np.random.default_rng(6)
    load_weights(model, GOLDENS / "t1")
    train_only(model, ["task_lora.dpo"])
    model.set_train(False)
    with_pair, without = ReferenceModel(GOLDENS / "t1"), ReferenceModel(GOLDENS / "t1")
    for name, value in without.weights.items():
        if "lora_dpo_B" in name:
            without.weights[name] = np.zeros_like(value)
    fixed, now = reference_logps(without, data), reference_logps(with_pair, data)
    labels, (rewards, matches) = data[1].reshape(-1, LENGTH), data[5:7]
    assert abs(fixed - now).max() > 0.5, "the pair must matter"
    data[7] = ((now + data[7].reshape(now.shape)) * (labels != -100)).astype(np.float32).reshape(data[7].shape)

    def loss_of(logps) -> tuple:
        return expected(logps, labels, rewards, matches, data[7].reshape(-1, LENGTH), fixed, 0.5, 0.2)

    ids, wanted, pixels, index, mask, *others = map(Tensor, data)
    inputs = [ids, wanted, pixels, None, None, index, mask, *others]
    value, report = (out.asnumpy() for out in model(*inputs))
    loss, _, sums = loss_of(now)
    assert value == pytest.approx(loss, abs=1e-4)
    np.testing.assert_allclose(report, sums, rtol=1e-4, atol=1e-4)
    weights = ms.ParameterTuple(model.trainable_params())
    gradients, seen = ms.ops.GradOperation(get_by_list=True)(Only(model), weights)(*inputs), 0
    for weight, gradient in zip(weights, gradients):
        name, step, losses = weight.name.removeprefix("network."), 1e-5, []
        values = with_pair.weights[name]
        direction = rng.standard_normal(values.shape)
        for sign in (1, -1):
            with_pair.weights[name] = values + sign * step * direction
            losses.append(loss_of(reference_logps(with_pair, data))[0])
        with_pair.weights[name] = values
        wanted_slope = (losses[0] - losses[1]) / (2 * step)
        assert float((gradient.asnumpy() * direction).sum()) == pytest.approx(wanted_slope, rel=1e-4, abs=1e-4), name
        seen += abs(wanted_slope) > 1e-3
    assert seen > 0.7 * len(weights)


def test_a_mode_without_the_task_is_refused():
    with pytest.raises(ConfigError, match=r"grpo.task is 'dpo', which adapter_mode 'base' does not use"):
        IXC25ForGRPO(read_config(GOLDENS / "t1", IXC25Config, seq_length=LENGTH, max_tiles=1))
