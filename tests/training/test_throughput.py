"""What a step is fed, packed or not, and preference pairs; the words of a line."""
from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest

from mindformers_ixc.config import ModelConfig
from mindformers_ixc.operations import training_costs
from mindformers_ixc.training.throughput import Throughput, TimeLeft, duration, line, short, work_of

NEEDS = np.array([[10, 2], [12, 0], [16, 4], [8, 2]], np.int32)


def dataset(rows, **table):
    sampler = SimpleNamespace(rows=lambda step: rows[step], row_shape=(32, 6))
    return SimpleNamespace(conversations=SimpleNamespace(**table), plan_sampler=sampler)


def test_packed_rows_count_their_samples():
    work = work_of(dataset([[[0, 1], [2]], [[3]]], needs=NEEDS), 0)
    assert (work.samples, work.lengths, work.positions, work.tiles) == ((0, 1, 2), (10, 12, 16), 38, 6)
    assert (work.computed_positions, work.computed_tiles) == (64, 12)
    assert all(isinstance(value, int) for value in (*work.samples, *work.lengths, work.tiles))


def test_a_pair_has_two_texts_and_one_set_of_pictures():
    work = work_of(dataset([[[0]]], needs=np.array([[10, 14, 3]], np.int32)), 0)
    assert (work.lengths, work.tiles) == ((10, 14), 3)
    assert (work.computed_positions, work.computed_tiles) == (64, 6)


def test_the_reference_is_a_forward_pass_without_its_pair():
    config = ModelConfig(adapter_mode="write")
    alone, both = (training_costs(config, ["task_lora.dpo"], reference) for reference in (None, "dpo"))
    other = training_costs(ModelConfig(adapter_mode="write", task_lora_ranks={"sft": 256, "dpo": 1}), ())
    assert both.tile == alone.tile and both.pair == 2 * alone.pair
    narrow = 2 * 1 * sum(sum(shape) for shape in [(6144, 4096), (4096, 4096), *[(14336, 4096)] * 3])
    assert both.position - alone.position == pytest.approx(other.position - 32 * narrow)


def test_devices_and_peak():
    config = ModelConfig()
    work = work_of(dataset([[[0, 1], [2]]], needs=NEEDS), 0)
    one, eight = (Throughput(config, ["language"], devices, 320.0).of([work], 2.0) for devices in (1, 8))
    assert one["tflops"] == pytest.approx(8 * eight["tflops"]) and one["mfu"] == pytest.approx(one["tflops"] / 320)
    assert one["goodput"] == eight["goodput"]
    assert "mfu" not in Throughput(config, ["language"], 1).of([work], 2.0)


def test_the_time_left_is_by_the_median():
    left = TimeLeft()
    assert [left.after(seconds, steps) for seconds, steps in ((90.0, 10), (2.0, 9), (2.0, 8))] == [900.0, 414.0, 16.0]
    assert left.after(2.0, -1) == 0.0


@pytest.mark.parametrize(("value", "text"), [(0.0512, "0.0512"), (7, "7"), (999.4, "999"), (999.6, "1k"),
                                             (36012, "36k"), (2.5e6, "2.5M"), (3e12, "3e+03G")])
def test_short_numbers(value, text):
    assert short(value) == text


@pytest.mark.parametrize(("seconds", "text"), [(0.4, "0 s"), (59.6, "1 min 0 s"), (3700, "1 h 1 min"),
                                               (3 * 86400 + 7300, "3 d 2 h")])
def test_durations(seconds, text):
    assert duration(seconds) == text


def test_a_loss_that_is_no_number_has_a_line_too():
    row = {"step": 3, "loss": None, "seconds": 2.0, "samples_per_second": 8.0, "seconds_left": 0.0}
    assert line(row, 3) == "step 3/3: loss not finite, 2 s, 8 samples/s, 0 s left"
