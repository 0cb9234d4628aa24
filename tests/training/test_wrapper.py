"""The train-step cell on a model of eight weights: every step against its closed formula."""
from __future__ import annotations

import mindspore as ms
import numpy as np
import pytest
from mindformers.core.optim import AdamW
from mindspore import Parameter, Tensor, nn
from mindspore.ops import functional as F

from mindformers_ixc.checkpoint.sources import AVERAGE_PREFIX
from mindformers_ixc.training.averaging import AveragedOptimizer, averaged_weights, averages_of
from mindformers_ixc.training.wrapper import IXC25GroupStepCell, IXC25TrainOneStepCell, portable_wrapper

WIDTH, LENGTH, RATE = 8, 6, 0.25
START = np.linspace(-1.0, 1.0, WIDTH).astype(np.float32)


class Fit(nn.Cell):
    """Mean squared error of `x @ weight` over labelled positions; with `reports`, its sum and their number as well."""

    def __init__(self, reports: bool = False):
        super().__init__()
        self.weight, self.reports = Parameter(Tensor(START.copy()), name="weight"), reports

    def construct(self, x, labels):
        labelled = F.cast(labels != -100, ms.float32)
        errors = F.square((x * self.weight).sum(axis=-1) - F.cast(labels, ms.float32)) * labelled
        loss = errors.sum() / F.maximum(labelled.sum(), 1.0)
        if self.reports:
            return loss, F.stop_gradient(F.stack((errors.sum(), labelled.sum())))
        return loss


class WeightedFit(nn.Cell):
    """The same error, a mean weighted by position."""

    def __init__(self):
        super().__init__()
        self.weight = Parameter(Tensor(START.copy()), name="weight")

    def construct(self, x, labels, weights):
        errors = F.square((x * self.weight).sum(axis=-1) - F.cast(labels, ms.float32)) * weights
        return errors.sum() / F.maximum(weights.sum(), 1e-12)


def batch(counts, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Inputs and labels; sample i has `counts[i]` labelled positions."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(len(counts), LENGTH, WIDTH)).astype(np.float32)
    labels = rng.integers(-5, 5, (len(counts), LENGTH)).astype(np.int32)
    labels[np.arange(LENGTH) >= np.array(counts)[:, None]] = -100
    return x, labels


def loss_and_gradient(weight, x, labels) -> tuple[float, np.ndarray]:
    labelled, count = labels != -100, max((labels != -100).sum(), 1)
    errors = np.where(labelled, x.astype(np.float64) @ weight - labels, 0.0)
    return float((errors ** 2).sum() / count), 2 * np.einsum("bl,blw->w", errors, x) / count


def cell_of(optimizer=None, reports: bool = False, ema_decay: float | None = None, **options) -> IXC25TrainOneStepCell:
    network = Fit(reports)
    optimizer = (optimizer or (lambda weights: nn.SGD(weights, learning_rate=RATE)))(network.trainable_params())
    if ema_decay is not None:
        optimizer = AveragedOptimizer(optimizer, ema_decay)
    cell = IXC25TrainOneStepCell(network, optimizer, **options)
    cell.set_train(True)
    return cell


def step(cell, x, labels):
    return [None if out is None else out.asnumpy() for out in cell(Tensor(x), Tensor(labels))]


def weight_of(cell) -> np.ndarray:
    return cell.network.weight.asnumpy().copy()


@pytest.mark.parametrize("counts", [(1, 2, 6, 5), (0, 0, 4, 1)])
def test_parts_with_unequal_labels_take_the_step_of_the_whole_batch(counts):
    x, labels = batch(counts)
    cell = cell_of(micro_batches=2, labels_column=1)
    outputs = step(cell, x, labels)
    loss, gradient = loss_and_gradient(START, x, labels)
    assert outputs[0] == pytest.approx(loss, rel=1e-5)
    np.testing.assert_allclose(weight_of(cell), START - RATE * gradient, rtol=1e-5, atol=1e-5)


def test_three_adam_steps_in_parts_are_those_of_whole_batches():
    def adam(weights):
        return AdamW(weights, learning_rate=0.1, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)

    apart, whole = cell_of(adam, micro_batches=4, labels_column=1), cell_of(adam)
    for seed in range(3):
        data = batch((6, 1, 2, 4), seed)
        assert step(apart, *data)[0] == pytest.approx(step(whole, *data)[0], rel=1e-5)
        np.testing.assert_allclose(weight_of(apart), weight_of(whole), rtol=1e-4, atol=1e-5)
    assert abs(weight_of(whole) - START).max() > 0.1


def test_without_a_labels_column_all_parts_weigh_the_same():
    x, labels = batch((1, 1, 6, 5))
    cell = cell_of(micro_batches=2)
    outputs = step(cell, x, labels)
    parts = [loss_and_gradient(START, x[half], labels[half]) for half in (slice(0, 2), slice(2, 4))]
    assert outputs[0] == pytest.approx((parts[0][0] + parts[1][0]) / 2, rel=1e-5)
    expected = START - RATE * (parts[0][1] + parts[1][1]) / 2
    np.testing.assert_allclose(weight_of(cell), expected, rtol=1e-5, atol=1e-5)
    whole = START - RATE * loss_and_gradient(START, x, labels)[1]
    assert abs(expected - whole).max() > 1e-2, "the batch must tell the two apart"


@pytest.mark.parametrize("micro_batches", [1, 4])
def test_the_report_is_the_sum_over_micro_batches(micro_batches):
    x, labels = batch((3, 0, 6, 5))
    cell = cell_of(reports=True, micro_batches=micro_batches, labels_column=1, report_shape=(2,))
    step(cell, x, labels)
    loss, gradient = loss_and_gradient(START, x, labels)
    np.testing.assert_allclose(cell.train_report.asnumpy(), [14 * loss, 14], rtol=1e-5)
    np.testing.assert_allclose(weight_of(cell), START - RATE * gradient, rtol=1e-5, atol=1e-5)


def test_a_round_of_groups_is_sampled_once_and_reports_all_its_steps():
    x, labels = batch((3, 0, 6, 5))
    network, asked = Fit(True), []
    cell = IXC25GroupStepCell(network, nn.SGD(network.trainable_params(), learning_rate=RATE), report_shape=(2,))
    cell.set_train(True)
    cell.updates, cell.rollout = 2, lambda columns: asked.append(columns) or (Tensor(x), columns[1])
    outputs = step(cell, 0 * x, labels)
    assert len(asked) == 1
    first, gradient = loss_and_gradient(START, x, labels)
    second, then = loss_and_gradient(START - RATE * gradient, x, labels)
    assert outputs[0] == pytest.approx(second, rel=1e-5)
    np.testing.assert_allclose(weight_of(cell), START - RATE * (gradient + then), rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(cell.train_report.asnumpy(), [14 * (first + second), 28], rtol=1e-5)


def average_of(cell) -> np.ndarray:
    return averages_of(cell)["weight"].asnumpy().copy()


def test_the_average_keeps_its_share_of_every_step():
    decay, x, labels = 0.75, *batch((6, 6))
    cell = cell_of(ema_decay=decay)
    assert [parameter.name for parameter in averages_of(cell).values()] == [f"{AVERAGE_PREFIX}weight"]
    assert not any(parameter.name.startswith(AVERAGE_PREFIX) for parameter in cell.trainable_params())
    loaded = START + 1                       # a checkpoint that is loaded when all cells are there
    cell.network.weight.set_data(Tensor(loaded))
    weight, average = loaded.astype(np.float64), loaded.astype(np.float64)
    for _ in range(3):
        step(cell, x, labels)
        weight = weight - RATE * loss_and_gradient(weight, x, labels)[1]
        average = decay * average + (1 - decay) * weight
        np.testing.assert_allclose(weight_of(cell), weight, rtol=1e-4, atol=1e-4)
        np.testing.assert_allclose(average_of(cell), average, rtol=1e-4, atol=1e-4)


def test_a_resumed_run_goes_on_with_the_average_it_had():
    decay, x, labels = 0.75, *batch((6, 6))
    cell = cell_of(ema_decay=decay)
    averages_of(cell)["weight"].set_data(Tensor(START * 0 + 9))
    cell.optimizer.global_step.set_data(Tensor([5], ms.int32))
    step(cell, x, labels)
    weight = START - RATE * loss_and_gradient(START, x, labels)[1]
    np.testing.assert_allclose(average_of(cell), decay * 9 + (1 - decay) * weight, rtol=1e-4, atol=1e-4)


def test_the_average_of_groups_with_schedules_of_their_own():
    def groups(weights):
        return AdamW([{"params": weights, "weight_decay": 0.0, "lr": nn.ExponentialDecayLR(0.1, 0.9, 2)}],
                     learning_rate=0.1)

    cell = cell_of(groups, ema_decay=0.5)
    x, labels = batch((6, 6))
    before = weight_of(cell)
    assert float(step(cell, x, labels)[3]) == pytest.approx(0.1)
    np.testing.assert_allclose(average_of(cell), (before + weight_of(cell)) / 2, rtol=1e-5)


@pytest.mark.parametrize("share", [0.1, 10.0])
def test_clipping_gives_the_norm_before_it_and_applies_the_gradient_after_it(share):
    x, labels = batch((2, 5))
    gradient = loss_and_gradient(START, x, labels)[1]
    norm = float(np.sqrt((gradient ** 2).sum()))
    cell = cell_of(use_clip_grad=True, max_grad_norm=share * norm)
    outputs = step(cell, x, labels)
    assert float(outputs[4].reshape(())) == pytest.approx(norm, rel=1e-5)
    np.testing.assert_allclose(weight_of(cell), START - RATE * min(share, 1.0) * gradient, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("micro_batches", [1, 2])
def test_a_loss_scale_leaves_the_step_as_it_is(micro_batches):
    x, labels = batch((6, 2))
    cell = cell_of(scale_sense=1024.0, micro_batches=micro_batches, labels_column=1)
    outputs = step(cell, x, labels)
    loss, gradient = loss_and_gradient(START, x, labels)
    assert (float(outputs[2]), bool(outputs[1])) == (1024.0, False)
    assert outputs[0] == pytest.approx(loss, rel=1e-5)
    np.testing.assert_allclose(weight_of(cell), START - RATE * gradient, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_gradient_that_is_not_finite_changes_nothing_and_is_told(bad):
    x, labels = batch((6, 6))
    cell = cell_of(micro_batches=2, labels_column=1, ema_decay=0.5, use_clip_grad=True, max_grad_norm=1.0)
    spoilt = x.copy()
    spoilt[1, 2, 3] = bad
    assert bool(step(cell, spoilt, labels)[1])
    np.testing.assert_array_equal(weight_of(cell), START)
    assert not bool(step(cell, x, labels)[1])           # and the next step is taken
    gradient = loss_and_gradient(START, x, labels)[1]
    np.testing.assert_allclose(weight_of(cell), START - RATE * gradient / np.sqrt((gradient ** 2).sum()), rtol=1e-4,
                               atol=1e-5)


def test_averaged_weights_are_there_for_a_while_only():
    network, average = Fit(), Parameter(Tensor(START + 3), name="ema.weight")
    with averaged_weights(network, {"weight": average, "other": average}):
        np.testing.assert_array_equal(network.weight.asnumpy(), START + 3)
        network.weight.set_data(Tensor(START * 0))
    np.testing.assert_array_equal(network.weight.asnumpy(), START)
    np.testing.assert_array_equal(average.asnumpy(), START + 3)
    with pytest.raises(KeyError), averaged_weights(network, {"weight": average}):
        raise KeyError
    np.testing.assert_array_equal(network.weight.asnumpy(), START)


def adam_of(weights):
    return AdamW(weights, learning_rate=nn.ExponentialDecayLR(0.1, 0.9, 2), betas=(0.9, 0.95), weight_decay=0.1)


def state_of(cell) -> dict[str, np.ndarray]:
    return {parameter.name: parameter.asnumpy().copy() for parameter in cell.get_parameters()
            if parameter.name not in ("spike_limits", "was_spike")}


@pytest.mark.parametrize("micro_batches", [1, 2])
@pytest.mark.parametrize("which", [0, 1])
def test_a_step_above_a_limit_changes_nothing_at_all(which, micro_batches):
    """Weights, moments, average, step count and rate: as if that batch had never been there."""
    options = {"use_clip_grad": True, "max_grad_norm": 1.0, "skips_spikes": True, "ema_decay": 0.5, "labels_column": 1,
               "micro_batches": micro_batches}
    cell, without = cell_of(adam_of, **options), cell_of(adam_of, **options)
    good, spike = batch((6, 6)), batch((6, 4), 1)
    first = step(cell, *good)
    assert cell.was_spike.asnumpy() == 0 and not first[1]
    loss, gradient = loss_and_gradient(weight_of(cell).astype(np.float64), *spike)
    value = (loss, np.sqrt((gradient ** 2).sum()))[which]
    limits = np.full(2, np.inf, np.float32)
    limits[which] = 0.999 * value
    cell.spike_limits.set_data(Tensor(limits))
    before = state_of(cell)
    outputs = step(cell, *spike)
    assert cell.was_spike.asnumpy() == 1 and not outputs[1]       # no overflow
    assert outputs[0] == pytest.approx(loss, rel=1e-4)
    assert all((before[name] == value).all() for name, value in state_of(cell).items())
    limits[which] = 1.001 * value
    cell.spike_limits.set_data(Tensor(limits))
    step(cell, *spike)
    assert cell.was_spike.asnumpy() == 0 and (weight_of(cell) != before["weight"]).all()
    step(without, *good)
    step(without, *spike)
    found, expected = state_of(cell), state_of(without)
    assert found.keys() == expected.keys() and len(found) > 4
    for name, value in expected.items():
        np.testing.assert_array_equal(found[name], value, err_msg=name)


def test_without_limits_a_cell_takes_the_steps_it_always_took():
    plain, watching = cell_of(adam_of), cell_of(adam_of, skips_spikes=True)
    for seed in range(2):
        outputs = [step(cell, *batch((6, 3), seed)) for cell in (plain, watching)]
        assert outputs[0][0].tobytes() == outputs[1][0].tobytes()
        assert weight_of(plain).tobytes() == weight_of(watching).tobytes()


def test_a_loss_that_is_no_number_is_no_spike_but_an_overflow():
    x, labels = batch((6, 6))
    cell = cell_of(skips_spikes=True)
    cell.spike_limits.set_data(Tensor(np.array([1e-3, np.inf], np.float32)))
    x[0, 0, 0] = np.nan
    assert bool(step(cell, x, labels)[1]) and cell.was_spike.asnumpy() == 0
    np.testing.assert_array_equal(weight_of(cell), START)


def test_parts_whose_losses_have_weights_take_the_step_of_the_whole_batch():
    rng = np.random.default_rng(3)
    x, labels = batch((6, 2, 5, 1))
    weights = np.where(labels != -100, rng.uniform(0, 0.05, labels.shape), 0).astype(np.float32)
    weights[:2] *= 0.1
    network = WeightedFit()
    cell = IXC25TrainOneStepCell(network, nn.SGD(network.trainable_params(), learning_rate=RATE), micro_batches=2,
                                 labels_column=2)
    cell.set_train(True)
    loss = cell(*map(Tensor, (x, labels, weights)))[0].asnumpy()
    labelled = np.where(labels != -100, labels, 0)
    errors = (x.astype(np.float64) @ START - labelled) * (labels != -100)
    assert loss == pytest.approx((weights * errors ** 2).sum() / weights.sum(), rel=1e-5)
    gradient = 2 * np.einsum("bl,blw->w", weights * errors, x) / weights.sum()
    np.testing.assert_allclose(weight_of(cell), START - RATE * gradient, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("name", "wrapper"), [("MFTrainOneStepCell", "IXC25TrainOneStepCell"),
                                               ("MFPipelineWithLossScaleCell", "IXC25PipelineWithLossScaleCell"),
                                               ("SomethingElse", "SomethingElse")])
def test_the_cpu_has_wrappers_of_its_own(name, wrapper):
    assert portable_wrapper(name) == wrapper
