"""Preference optimisation: the loss against formulae, the model against reference outputs and its own parts."""
from __future__ import annotations

import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor
from only_loss import Only

from mindformers_ixc.checkpoint.model_directory import load_weights
from mindformers_ixc.config import read_config
from mindformers_ixc.errors import ConfigError
from mindformers_ixc.generation.causal_lm import IXC25ForCausalLM
from mindformers_ixc.models.configuration import IXC25Config
from mindformers_ixc.models.preference import LEAST_NLL, IXC25ForPreference, PreferenceLoss
from mindformers_ixc.parameters import part_of
from mindformers_ixc.preference_options import preference_options

SIZE = 56                  # of a tile of the reference model, which has 4 tokens
BETA = 0.1


def log_sigmoid(x):
    return -np.logaddexp(0.0, -x)


def sigmoid(x):
    return np.exp(log_sigmoid(x))


def expected_loss(policy, reference, loss: str, beta: float, smoothing: float = 0.0, tokens=None, alpha: float = 0.0,
                  gamma: float = 0.0) -> tuple[float, np.ndarray]:
    """Loss and its gradient by the policy's summed log-probabilities, in float64, from the papers' formulae."""
    policy, reference = policy.astype(np.float64), reference.astype(np.float64)
    tokens = np.ones_like(policy) if tokens is None else tokens.astype(np.float64)
    each = policy / tokens
    h = (policy[:, 0] - policy[:, 1]) - (reference[:, 0] - reference[:, 1])
    if loss == "orpo":
        certain = np.minimum(each, -LEAST_NLL)
        odds = certain - np.log(-np.expm1(certain))
        ratio = odds[:, 0] - odds[:, 1]
        losses = -each[:, 0] - beta * log_sigmoid(ratio)
        # of log(p / (1 - p)) by log p: 1 / (1 - p)
        slopes = (each < -LEAST_NLL) * -beta * sigmoid(-ratio)[:, None] / -np.expm1(certain) * np.array([1, -1])
        slopes[:, 0] -= 1
        slopes = slopes / tokens
    elif loss == "simpo":
        inner = beta * (each[:, 0] - each[:, 1]) - gamma
        losses = -log_sigmoid(inner)
        slopes = -beta * sigmoid(-inner)[:, None] * np.array([1, -1]) / tokens
    else:
        if loss == "ipo":
            losses, slopes = (h - 1 / (2 * beta)) ** 2, 2 * (h - 1 / (2 * beta))
        else:
            losses = -(1 - smoothing) * log_sigmoid(beta * h) - smoothing * log_sigmoid(-beta * h)
            slopes = beta * (smoothing * sigmoid(beta * h) - (1 - smoothing) * sigmoid(-beta * h))
        slopes = slopes[:, None] * np.array([1.0, -1.0])
        losses = losses - alpha * each[:, 0]
        slopes[:, 0] -= alpha / tokens[:, 0]
    return losses.mean(), slopes / len(h)


def expected_report(policy, reference, beta: float, tokens=None) -> np.ndarray:
    """The report; without a reference (`None`) rewards are a token's."""
    each = policy / (np.ones_like(policy) if tokens is None else tokens)
    rewards = beta * (each if reference is None else policy - reference)
    margins = rewards[:, 0] - rewards[:, 1]
    return np.array([*rewards.sum(0), margins.sum(), (margins > 0).sum(), *policy.sum(0), -each[:, 0].sum(),
                     len(policy)])


CASES = [{"loss": "sigmoid", "beta": 0.1}, {"loss": "sigmoid", "beta": 0.5, "label_smoothing": 0.2},
         {"loss": "ipo", "beta": 0.1}, {"loss": "sigmoid", "beta": 0.1, "rpo_alpha": 0.7},
         {"loss": "ipo", "beta": 0.2, "rpo_alpha": 2.0}, {"loss": "simpo", "beta": 2.0, "gamma": 1.0},
         {"loss": "simpo", "beta": 0.5}, {"loss": "orpo", "beta": 0.1}, {"loss": "orpo", "beta": 3.0}]


@pytest.mark.parametrize("options", CASES, ids=lambda options: "-".join(map(str, options.values())))
@pytest.mark.parametrize("magnitude", [0.001, 1.0, 100.0, 10000.0])
def test_loss_gradient_and_report_follow_their_formulae(options, magnitude):
    rng = np.random.default_rng(7)
    policy, reference = (-magnitude * rng.random((8, 2), np.float32) for _ in range(2))
    tokens = rng.integers(1, 50, (8, 2)).astype(np.float32)
    reference[0] = policy[0]                     # where a pair that starts from zero begins
    policy[1], policy[2, 0], policy[3, 1] = 0.0, 0.0, 0.0      # certain in float32: odds without end
    cell = PreferenceLoss(**options)
    inputs = [Tensor(policy), Tensor(tokens), Tensor(reference) if cell.has_reference else None]
    value, report = (out.asnumpy() for out in cell(*inputs))
    gradient = ms.ops.GradOperation()(Only(cell))(*inputs).asnumpy()
    expected, slopes = expected_loss(policy, reference, options["loss"], options["beta"],
                                     options.get("label_smoothing", 0.0), tokens, options.get("rpo_alpha", 0.0),
                                     options.get("gamma", 0.0))
    assert value == pytest.approx(expected, rel=1e-5)
    np.testing.assert_allclose(gradient, slopes, rtol=1e-3, atol=1e-6 * abs(slopes).max())
    wanted = expected_report(policy, reference if cell.has_reference else None, options["beta"], tokens)
    np.testing.assert_allclose(report, wanted, rtol=1e-5, atol=1e-5 * magnitude)


def test_pairs_of_micro_batches_are_summed_and_divided_once():
    rng = np.random.default_rng(0)
    policy, tokens = -rng.random((6, 2), np.float32), np.full((6, 2), 3, np.float32)
    whole = PreferenceLoss("simpo", 2.0, gamma=0.5)(Tensor(policy), Tensor(tokens))[0].asnumpy()
    cell = PreferenceLoss("simpo", 2.0, gamma=0.5, summed=True)
    parts = [[float(out.asnumpy()) for out in cell(Tensor(policy[part]), Tensor(tokens[part]))[:2]]
             for part in (slice(0, 2), slice(2, 6))]
    total, pairs = np.sum(parts, axis=0)
    assert pairs == 6
    assert total / pairs == pytest.approx(float(whole), rel=1e-6)


def test_loss_and_rewards_of_the_reference_outputs(goldens):
    golden = np.load(goldens / "t1" / "dpo.npz")
    policy, reference = (np.stack([golden[f"{role}_chosen"], golden[f"{role}_rejected"]], 1)
                         for role in ("policy", "reference"))
    beta = float(golden["beta"])
    value, report = (
        out.asnumpy() for out in PreferenceLoss("sigmoid", beta)(Tensor(policy), Tensor(np.ones_like(policy)),
                                                                 Tensor(reference)))
    assert value == pytest.approx(float(golden["loss"]), abs=1e-4)
    rewards = [golden["reward_chosen"].sum(), golden["reward_rejected"].sum()]
    np.testing.assert_allclose(report[:3], [*rewards, rewards[0] - rewards[1]], atol=1e-4)


def model_of(goldens, cls=IXC25ForPreference, length: int = 19, **fields):
    config = read_config(goldens / "t1", IXC25Config, adapter_mode="write", seq_length=length, max_tiles=1, **fields)
    model = cls(config)
    load_weights(model, goldens / "t1")
    model.set_train(False)
    return model


def batch_of(goldens, pictures: bool) -> list[np.ndarray]:
    """The reference prompts and answers as `IXC25PreferenceDataset` gives them; optionally behind a picture each."""
    golden = np.load(goldens / "t1" / "dpo.npz")
    prompts, length = golden["prompt"], golden["prompt"].shape[1] + golden["chosen"].shape[1]
    ids = np.full((2, 2, length), 2, np.int32)
    labels = np.full((2, 2, length), -100, np.int32)
    for i, prompt in enumerate(prompts):
        for side, name in enumerate(("chosen", "rejected")):
            text, start = np.concatenate([prompt, golden[name][i]]), len(prompt)
            ids[i, side, :len(text)] = text
            labels[i, side, start - 1:len(text) - 1] = text[start:]
    pixels = np.zeros((2, 1, 3, SIZE, SIZE), np.float32)
    index, mask = np.zeros_like(ids), np.zeros_like(ids)
    if pictures:       # the four tokens of the tile take the place of the prompt's first ones
        pixels = np.random.default_rng(0).normal(size=pixels.shape).astype(np.float32)
        index[:, :, :4], mask[:, :, :4], ids[:, :, :4] = np.arange(4), 1, 2
    return [ids, labels, pixels, index, mask]


def columns_of(batch) -> list:
    """Arguments of the network; all tiles are normalised."""
    ids, labels, pixels, index, mask = map(Tensor, batch)
    return [ids, labels, pixels, None, None, index, mask]


def log_probabilities(model, batch) -> np.ndarray:
    """Summed log-probabilities of the answers from the logits of `IXC25ForCausalLM`, float64 `(B, 2)`."""
    ids, labels, pixels, index, mask = batch
    found = []
    for side in range(2):
        logits = model(Tensor(ids[:, side]), None, Tensor(pixels), vision_index=Tensor(index[:, side]),
                       image_mask=Tensor(mask[:, side]))
        logits = logits.asnumpy().astype(np.float64)
        logits -= np.log(np.exp(logits).sum(-1, keepdims=True))
        labelled = labels[:, side] != -100
        picked = np.take_along_axis(logits, np.maximum(labels[:, side], 0)[..., None], -1)[..., 0]
        found.append((picked * labelled).sum(1))
    return np.stack(found, 1)


def test_the_model_has_the_loss_of_the_reference_outputs(goldens):
    golden = np.load(goldens / "t1" / "dpo.npz")
    reference = np.stack([golden["reference_chosen"], golden["reference_rejected"]], 1)
    model = model_of(goldens, preference={"beta": float(golden["beta"])})
    loss, report = (out.asnumpy() for out in model(*columns_of(batch_of(goldens, False)), Tensor(reference)))
    assert loss == pytest.approx(float(golden["loss"]), abs=1e-4)
    expected = [golden[name].sum() for name in ("reward_chosen", "reward_rejected")]
    np.testing.assert_allclose(report[:2], expected, atol=1e-4)
    answers = golden["chosen"].shape[1]
    np.testing.assert_allclose(report[4:], [golden["policy_chosen"].sum(), golden["policy_rejected"].sum(),
                                            -golden["policy_chosen"].sum() / answers, 2], atol=1e-4)


@pytest.mark.slow
def test_the_reference_is_the_model_without_the_pair_and_gets_no_gradient(goldens):
    batch = batch_of(goldens, True)
    plain = model_of(goldens, IXC25ForCausalLM)
    policy = log_probabilities(plain, batch)
    for parameter in plain.get_parameters():
        if part_of(parameter.name) == "task_lora.dpo" and "_B." in parameter.name:
            parameter.set_data(Tensor(np.zeros(parameter.shape, np.float32)))
    reference = log_probabilities(plain, batch)
    assert abs(policy - reference).max() > 0.5, "the pair must matter"

    model, columns = model_of(goldens, preference={"beta": BETA, "label_smoothing": 0.1}), columns_of(batch)
    loss, report = (out.asnumpy() for out in model(*columns))
    assert loss == pytest.approx(expected_loss(policy, reference, "sigmoid", BETA, 0.1)[0], abs=1e-5)
    tokens = (batch[1] != -100).sum(-1)
    np.testing.assert_allclose(report, expected_report(policy, reference, BETA, tokens), atol=1e-3)

    # the gradient is that of the same loss with the reference given as numbers
    weights = ms.ParameterTuple([p for p in model.trainable_params() if "layers.0.attention.wo." in p.name])
    parts = {part_of(weight.name) for weight in weights}
    assert parts == {"language", "partial_lora", "task_lora.sft", "task_lora.dpo"}
    gradients = ms.ops.GradOperation(get_by_list=True)(Only(model), weights)
    given = gradients(*columns, Tensor(reference.astype(np.float32)))
    for weight, one, other in zip(weights, gradients(*columns), given):
        assert abs(other.asnumpy()).max() > 1e-6, weight.name
        np.testing.assert_allclose(one.asnumpy(), other.asnumpy(), rtol=1e-3, atol=1e-5, err_msg=weight.name)


@pytest.mark.parametrize("loss", ["orpo"])
def test_a_loss_without_a_reference_computes_none(goldens, monkeypatch, loss):
    batch = batch_of(goldens, True)
    policy = log_probabilities(model_of(goldens, IXC25ForCausalLM), batch)
    model, passes = model_of(goldens, preference={"loss": loss}), []
    answers = IXC25ForPreference.answer_logps
    monkeypatch.setattr(IXC25ForPreference, "answer_logps",
                        lambda self, *inputs: passes.append(inputs[-1]) or answers(self, *inputs))
    ms.set_context(mode=ms.PYNATIVE_MODE)
    try:
        value, report = (out.asnumpy() for out in model(*columns_of(batch)))
    finally:
        ms.set_context(mode=ms.GRAPH_MODE)
    assert passes == [("sft", "dpo")]
    options, tokens = preference_options({"loss": loss}), (batch[1] != -100).sum(-1)
    expected = expected_loss(policy, policy, loss, options["beta"], tokens=tokens, gamma=options.get("gamma", 0.0))[0]
    assert value == pytest.approx(expected, rel=1e-4)
    np.testing.assert_allclose(report, expected_report(policy, None, options["beta"], tokens), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(("mode", "task", "words"), [
    ("base", "dpo", "'dpo', which adapter_mode 'base' does not use (it uses none)"),
    ("web", "dpo", "'dpo', which adapter_mode 'web' does not use (web)"),
    ("write", "web", "'web', which adapter_mode 'write' does not use (sft, dpo)")])
def test_a_mode_without_the_task_is_refused(mode, task, words):
    config = IXC25Config(
        vocab_size=16, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, plora_rank=2, task_lora_ranks={"sft": 2, "dpo": 2, "web": 2}, adapter_mode=mode,
        preference={"task": task}, vision_config={"image_size": 28, "hidden_size": 8, "num_hidden_layers": 1,
                                                  "num_attention_heads": 1, "intermediate_size": 8})
    with pytest.raises(ConfigError) as error:
        IXC25ForPreference(config)
    assert words in str(error.value)
