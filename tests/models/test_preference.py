"""Preference optimisation: the loss against formulae, the model against reference outputs and its own parts."""
from __future__ import annotations

import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor, nn

from mindformers_ixc.checkpoint.model_directory import load_weights
from mindformers_ixc.config import read_config
from mindformers_ixc.errors import ConfigError
from mindformers_ixc.generation.causal_lm import IXC25ForCausalLM
from mindformers_ixc.models.configuration import IXC25Config
from mindformers_ixc.models.preference import DEFAULTS, IXC25ForPreference, PreferenceLoss, preference_options
from mindformers_ixc.parameters import part_of

SIZE = 56                  # of a tile of the reference model, which has 4 tokens
BETA = 0.1


class Only(nn.Cell):
    """The loss alone, for gradients."""

    def __init__(self, network):
        super().__init__()
        self.network = network

    def construct(self, *inputs):
        return self.network(*inputs)[0]


def log_sigmoid(x):
    return -np.logaddexp(0.0, -x)


def expected_loss(policy, reference, loss: str, beta: float, smoothing: float = 0.0) -> tuple[float, np.ndarray]:
    """Loss and its gradient by the policy's log-probabilities, in float64."""
    policy, reference = policy.astype(np.float64), reference.astype(np.float64)
    h = (policy[:, 0] - policy[:, 1]) - (reference[:, 0] - reference[:, 1])
    if loss == "ipo":
        losses, slopes = (h - 1 / (2 * beta)) ** 2, 2 * (h - 1 / (2 * beta))
    else:
        losses = -(1 - smoothing) * log_sigmoid(beta * h) - smoothing * log_sigmoid(-beta * h)
        slopes = beta * (smoothing * np.exp(log_sigmoid(beta * h)) - (1 - smoothing) * np.exp(log_sigmoid(-beta * h)))
    return losses.mean(), slopes[:, None] * np.array([1, -1]) / len(h)


def expected_report(policy, reference, beta: float) -> np.ndarray:
    rewards = beta * (policy - reference)
    margins = rewards[:, 0] - rewards[:, 1]
    return np.array([*rewards.sum(0), margins.sum(), (margins > 0).sum(), *policy.sum(0), len(policy)])


@pytest.mark.parametrize(("loss", "beta", "smoothing"), [("sigmoid", 0.1, 0.0), ("sigmoid", 0.5, 0.2),
                                                        ("ipo", 0.1, 0.0)])
@pytest.mark.parametrize("magnitude", [1.0, 100.0, 10000.0])
def test_loss_gradient_and_report_follow_their_formulae(loss, beta, smoothing, magnitude):
    rng = np.random.default_rng(7)
    policy, reference = (-magnitude * rng.random((8, 2), np.float32) for _ in range(2))
    reference[0] = policy[0]                     # where a pair that starts from zero begins
    cell = PreferenceLoss(loss, beta, smoothing)
    value, report = (out.asnumpy() for out in cell(Tensor(policy), Tensor(reference)))
    gradient = ms.ops.GradOperation()(Only(cell))(Tensor(policy), Tensor(reference)).asnumpy()
    expected, slopes = expected_loss(policy, reference, loss, beta, smoothing)
    assert value == pytest.approx(expected, rel=1e-5)
    np.testing.assert_allclose(gradient, slopes, rtol=1e-3, atol=1e-6 * abs(slopes).max())
    np.testing.assert_allclose(report, expected_report(policy, reference, beta), rtol=1e-5, atol=1e-5 * magnitude)


def test_loss_and_rewards_of_the_reference_outputs(goldens):
    golden = np.load(goldens / "t1" / "dpo.npz")
    policy, reference = (np.stack([golden[f"{role}_chosen"], golden[f"{role}_rejected"]], 1)
                         for role in ("policy", "reference"))
    beta = float(golden["beta"])
    value, report = (out.asnumpy() for out in PreferenceLoss("sigmoid", beta, 0.0)(Tensor(policy), Tensor(reference)))
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
    np.testing.assert_allclose(report[4:], [golden["policy_chosen"].sum(), golden["policy_rejected"].sum(), 2],
                               atol=1e-4)


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
    np.testing.assert_allclose(report, expected_report(policy, reference, BETA), atol=1e-3)

    # the gradient is that of the same loss with the reference given as numbers
    weights = ms.ParameterTuple([p for p in model.trainable_params() if "layers.0.attention.wo." in p.name])
    parts = {part_of(weight.name) for weight in weights}
    assert parts == {"language", "partial_lora", "task_lora.sft", "task_lora.dpo"}
    gradients = ms.ops.GradOperation(get_by_list=True)(Only(model), weights)
    given = gradients(*columns, Tensor(reference.astype(np.float32)))
    for weight, one, other in zip(weights, gradients(*columns), given):
        assert abs(other.asnumpy()).max() > 1e-6, weight.name
        np.testing.assert_allclose(one.asnumpy(), other.asnumpy(), rtol=1e-3, atol=1e-5, err_msg=weight.name)


def test_options_have_defaults():
    assert preference_options(None) == DEFAULTS
    assert preference_options({"beta": 0.3, "loss": "ipo"}) == {**DEFAULTS, "beta": 0.3, "loss": "ipo"}


@pytest.mark.parametrize(("section", "words"), [
    ({"bta": 0.1}, r"Unknown key .*preference\.bta \(value 0\.1\); the choices are task, loss, beta, label_smoothing"),
    ({"loss": "hinge"}, r"preference\.loss is 'hinge'; the choices are sigmoid, ipo"),
    ({"beta": 0}, r"preference\.beta is 0; it must be a number above 0"),
    ({"beta": -0.1}, r"preference\.beta is -0\.1"),
    ({"beta": float("nan")}, r"preference\.beta is nan"),
    ({"label_smoothing": 0.5}, r"label_smoothing is 0\.5; the sigmoid loss takes 0 up to 0\.5"),
    ({"label_smoothing": -0.1}, r"label_smoothing is -0\.1"),
    ({"loss": "ipo", "label_smoothing": 0.1}, r"label_smoothing is 0\.1; .* ipo takes none")])
def test_options_that_cannot_be_meant_are_refused(section, words):
    with pytest.raises(ConfigError, match=words):
        preference_options(section)


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
