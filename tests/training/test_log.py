"""What a run writes down of its steps, and the steps it must not go on from."""
from __future__ import annotations

import errno
import json
import re
import struct
from types import SimpleNamespace

import numpy as np
import pytest
from mindspore import Parameter, Tensor, nn
from tensorboardX.proto.event_pb2 import Event

from mindformers_ixc import interruption
from mindformers_ixc.config import ModelConfig
from mindformers_ixc.errors import TrainingError
from mindformers_ixc.files import METRICS_FILE, read_metrics
from mindformers_ixc.models.preference import REPORT
from mindformers_ixc.operations import training_costs
from mindformers_ixc.training import log as log_module
from mindformers_ixc.training.averaging import AveragedOptimizer
from mindformers_ixc.training.log import TrainingLog, log_options
from mindformers_ixc.training.step import StepPlan

SAMPLES = 6       # of the data set; batches of two, so that an epoch has three steps
NEEDS = [(10, 2), (12, 0), (16, 4), (8, 2), (4, 0), (16, 3)]      # positions and tiles, of rows of 16 and 4


def fake_dataset(batch_size: int = 2):
    def rows(step: int) -> list[list[int]]:
        return [[(step * batch_size + i) % SAMPLES] for i in range(batch_size)]

    plan = SimpleNamespace(ranks=1, rows=rows, row_shape=(16, 4), batch=lambda step: [row[0] for row in rows(step)])
    table = SimpleNamespace(describe=lambda i: f"charts.json, sample {i}", needs=np.array(NEEDS), columns=())
    return SimpleNamespace(plan_sampler=plan, conversations=table, get_batch_size=lambda: batch_size,
                           get_dataset_size=lambda: SAMPLES // batch_size)


class FakeRun:
    """One run of MindSpore: its context, and steps with given outputs."""

    def __init__(self, folder, start: int = 0, epochs: int = 2, wrapper=None, batch_size: int = 2, model=None,
                 options=None, sinks: bool = False, header=None, **plan):
        self.log, self.stopped = TrainingLog(folder, **(options or {})), False
        runner = SimpleNamespace(initial_step=start, epochs=epochs)
        self.model = model or SimpleNamespace()
        trainer = SimpleNamespace(config=SimpleNamespace(runner_config=runner), trained_model=self.model)
        self.log.bind(fake_dataset(batch_size), StepPlan(**plan), trainer)
        self.log.header = header
        self.wrapper = wrapper or SimpleNamespace()
        self.parameters = SimpleNamespace(train_network=self.wrapper, batch_num=3, cur_step_num=0,
                                          dataset_sink_mode=sinks)
        self.log.on_train_begin(self)

    def original_args(self):
        return self.parameters

    def request_stop(self):
        self.stopped = True

    def step(self, loss: float, overflow: bool = False, norm: float | None = 0.5, report=None, holder=None) -> None:
        self.parameters.cur_step_num += 1
        norm = None if norm is None else Tensor(np.array([norm], np.float32))
        self.parameters.net_outputs = (Tensor(np.float32(loss)), Tensor(overflow), Tensor(1.0),
                                       Tensor(np.float32(0.01)), norm)
        if report is not None:
            (holder or self.wrapper).train_report = Parameter(Tensor(np.array(report, np.float32)))
        self.log.on_train_step_begin(self)
        self.log.on_train_step_end(self)


def test_every_step_is_one_row(tmp_path):
    run = FakeRun(tmp_path / "new" / "folder")
    for loss in (4.0, 3.0, 2.0, 1.0):
        run.step(loss, overflow=loss == 2.0, norm=None if loss == 1.0 else 0.5)
    rows = read_metrics(tmp_path / "new" / "folder" / METRICS_FILE)
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    assert [row["epoch"] for row in rows] == [1, 1, 1, 2]
    assert [row["loss"] for row in rows] == [4.0, 3.0, 2.0, 1.0]
    assert [row["overflow"] for row in rows] == [False, False, True, False]
    assert [row.get("grad_norm") for row in rows] == [0.5, 0.5, 0.5, None]
    assert [row["samples"] for row in rows] == [[0, 1], [2, 3], [4, 5], [0, 1]]
    assert all(row["learning_rate"] == pytest.approx(0.01) for row in rows)
    assert all(row["samples_per_second"] == pytest.approx(2 / row["seconds"]) for row in rows)
    assert "tokens" not in rows[0]


CONFIG = ModelConfig(vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
                     num_key_value_heads=2, plora_rank=0, task_lora_ranks={}, seq_length=16, max_tiles=4,
                     vision_config={"image_size": 28, "hidden_size": 8, "num_hidden_layers": 1, "intermediate_size": 16,
                                    "num_attention_heads": 2})


def fake_model(*names: str):
    """A model of which some parameters train."""
    return SimpleNamespace(config=CONFIG, trainable_params=lambda: [SimpleNamespace(name=name) for name in names])


class Clock:
    """Seconds that pass only when a test says so."""

    def __init__(self, monkeypatch):
        self.now = 100.0
        monkeypatch.setattr(log_module, "time", SimpleNamespace(perf_counter=lambda: self.now))


@pytest.fixture
def clock(monkeypatch):
    return Clock(monkeypatch)


def timed_step(run: FakeRun, clock: Clock, wait: float, work: float, after: float = 0.0) -> None:
    """A step after a wait for its batch, and what other callbacks do after it."""
    run.parameters.cur_step_num += 1
    run.parameters.net_outputs = (Tensor(np.float32(1.0)), Tensor(False), Tensor(1.0), Tensor(np.float32(0.01)), None)
    clock.now += wait
    run.log.on_train_step_begin(run)
    clock.now += work
    run.log.on_train_step_end(run)
    clock.now += after
    run.log.step_end.on_train_step_end(run)


def test_the_numbers_of_a_step_by_hand(tmp_path, clock):
    run = FakeRun(tmp_path, model=fake_model("model.layers.0.attention.wo.weight", "output.weight"),
                  options={"device_tflops": 2e-6})
    timed_step(run, clock, wait=1.0, work=3.0)                       # samples 0 and 1: 22 positions, 2 tiles
    timed_step(run, clock, wait=0.0, work=2.0)                       # samples 2 and 3: 24 positions, 6 tiles
    first, second = read_metrics(tmp_path / METRICS_FILE)
    costs = training_costs(CONFIG, ["language"])
    assert (first["samples"], first["positions"], first["tiles"]) == ([0, 1], 22, 2)
    assert (first["seconds"], first["data_wait"], first["samples_per_second"]) == (4.0, 0.25, 0.5)
    assert (first["positions_per_second"], first["computed_positions_per_second"]) == (22 / 4, 32 / 4)
    assert (first["tiles_per_second"], first["computed_tiles_per_second"]) == (2 / 4, 8 / 4)
    assert first["goodput"] == pytest.approx(costs.of(22, 2) / costs.of(32, 8))
    operations = costs.of(22, 2) + costs.pair * (10 ** 2 + 12 ** 2)
    assert first["tflops"] == pytest.approx(operations / 4 / 1e12)
    assert first["mfu"] == pytest.approx(operations / 4 / 2e6)
    assert (second["positions"], second["tiles"], second["data_wait"], second["seconds"]) == (24, 6, 0.0, 2.0)
    assert (first["seconds_left"], second["seconds_left"]) == (5 * 4.0, 4 * 3.0)          # medians of 4, and of 4 and 2


def test_checkpoints_and_evaluations_are_no_wait_for_data(tmp_path, clock):
    run = FakeRun(tmp_path)
    timed_step(run, clock, wait=0.0, work=2.0, after=50.0)
    timed_step(run, clock, wait=1.0, work=1.0)
    rows = read_metrics(tmp_path / METRICS_FILE)
    assert [(row["seconds"], row["data_wait"]) for row in rows] == [(2.0, 0.0), (2.0, 0.5)]


def test_a_data_sink_hides_the_wait_and_a_row_may_stand_for_several_steps(tmp_path, clock):
    run = FakeRun(tmp_path, model=fake_model("output.weight"), sinks=True)
    run.parameters.cur_step_num = 1                   # sink_size 2: the counter goes on by two
    timed_step(run, clock, wait=1.0, work=3.0)
    row, = read_metrics(tmp_path / METRICS_FILE)
    assert "data_wait" not in row
    assert (row["step"], row["samples"], row["positions"], row["seconds"]) == (2, [0, 1, 2, 3], 46, 1.5)
    assert (row["samples_per_second"], row["positions_per_second"]) == (4 / 3, 46 / 3)


def test_a_model_of_others_has_no_operations(tmp_path):
    run = FakeRun(tmp_path)
    run.step(1.0)
    row, = read_metrics(tmp_path / METRICS_FILE)
    assert "goodput" not in row and "tflops" not in row and row["samples_per_second"] > 0


@pytest.mark.parametrize(("epochs", "every", "steps"), [
    (15, 4, [4, 8, 12, 16, 20, 24, 28, 32, 36, 40, 44, 45]), (10, 100, [3, 6, 9, 12, 15, 18, 21, 24, 27, 30]),
    (2, 100, [1, 2, 3, 4, 5, 6])])
def test_lines_come_every_so_many_steps_ten_at_least_and_at_the_end(tmp_path, capsys, clock, epochs, every, steps):
    run = FakeRun(tmp_path, epochs=epochs, model=fake_model("output.weight"),
                  options={"print_every": every, "device_tflops": 1e-5})
    for _ in range(3 * epochs):
        timed_step(run, clock, wait=0.5, work=1.5)
    compiling, *lines = capsys.readouterr().err.splitlines()
    assert compiling == "Compiling the first step ..."
    assert [line.split(":")[0] for line in lines] == [f"step {step}/{3 * epochs}" for step in steps]
    assert re.match(r"step \d+/\d+: loss 1.0000, rate 0.01, 1 samples/s, [\d.]+ tokens/s, MFU [\d.]+%, waited 25% for "
                    r"data, ", lines[1])
    assert lines[-1].endswith("waited 25% for data")


def test_what_is_shown_before_the_first_step_comes_once(tmp_path, capsys):
    FakeRun(tmp_path, header=lambda: "recipe   x.yaml").step(1.0)
    assert capsys.readouterr().err.splitlines()[:2] == ["recipe   x.yaml", "Compiling the first step ..."]


def test_another_rank_writes_and_measures_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(log_module, "reports_loss", lambda: False)
    monkeypatch.setattr(log_module, "work_of", lambda *_: pytest.fail("measured"))
    run = FakeRun(tmp_path, options={"tensorboard": True}, model=fake_model("output.weight"))
    run.step(1.0)
    run.log.on_train_end(run)
    assert not list(tmp_path.iterdir()) and not capsys.readouterr().err


def test_tensorboard_has_the_numbers_of_every_step(tmp_path):
    run = FakeRun(tmp_path, report="sources", sources=("a", "b"), options={"tensorboard": True})
    run.step(2.0, report=[[6.0, 0.0], [3.0, 0.0]])
    run.step(1.0, report=[[6.0, 4.0], [3.0, 2.0]])
    run.log.on_train_end(run)
    file, = (tmp_path / "tensorboard").iterdir()
    assert file.name.startswith("events.out.tfevents.")
    found = events(file)
    assert [event.session_log.status for event in found if event.HasField("session_log")] == [1]
    values = {(event.step, value.tag): value.simple_value for event in found for value in event.summary.value}
    assert values[1, "loss"] == 2.0 and values[2, "loss"] == 1.0
    assert values[2, "loss/a"] == 2.0 and values[2, "tokens/b"] == 2.0 and (1, "loss/b") not in values
    assert {(2, "seconds"), (2, "samples_per_second"), (2, "learning_rate"), (2, "data_wait")} <= set(values)


def events(file) -> list:
    """Events of a TensorBoard file, read by its format: length, checksum, event, checksum."""
    content, found = file.read_bytes(), []
    while content:
        length, = struct.unpack("<Q", content[:8])
        found.append(Event.FromString(content[12:12 + length]))
        content = content[16 + length:]
    return found


def test_a_resumed_run_hides_what_tensorboard_has_of_the_steps_it_does_again(tmp_path):
    run = FakeRun(tmp_path, start=4, options={"tensorboard": True})
    run.log.on_train_end(run)
    file, = (tmp_path / "tensorboard").iterdir()
    assert [event.step for event in events(file) if event.HasField("session_log")] == [5]


@pytest.mark.parametrize("on_error", ["stop", "continue"])
def test_numbers_that_tensorboard_cannot_take(tmp_path, monkeypatch, capsys, on_error):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    run = FakeRun(tmp_path, options={"tensorboard": True, "on_error": on_error})
    monkeypatch.setattr(log_module.ScalarFile, "write", full)
    if on_error == "stop":
        with pytest.raises(TrainingError, match=r"tensorboard: the numbers of a step could not be written \(No space"):
            run.step(1.0)
        assert run.parameters.run_failed
    else:
        run.step(1.0)
        run.step(1.0)
        assert capsys.readouterr().err.count("the run goes on without TensorBoard") == 1
    assert read_metrics(tmp_path / METRICS_FILE)


def test_options_of_the_log_stand_in_the_recipe():
    assert log_options({"callbacks": [{"type": "MFLossMonitor", "per_print_times": 10}], "tensorboard": True,
                        "device_tflops": 320, "on_save_error": "continue"}) == {
        "on_error": "continue", "device_tflops": 320, "tensorboard": True, "print_every": 10,
        "skip_spikes": None}
    assert log_options({"tensorboard": {"tensorboard_dir": "x"}, "skip_spikes": {"loss": 9.0, "window": None}}) == {
        "on_error": "stop", "device_tflops": 0.0, "tensorboard": False, "print_every": 1,
        "skip_spikes": {"loss": 9.0, "grad_norm": None, "loss_times": None, "grad_norm_times": None, "window": 50,
                        "most_in_a_row": 10}}


def test_the_run_is_asked_to_stop_at_its_last_step_also_when_resumed(tmp_path):
    run = FakeRun(tmp_path, start=4)
    run.step(1.0)
    assert not run.stopped
    run.step(1.0)
    assert run.stopped
    assert [row["step"] for row in read_metrics(tmp_path / METRICS_FILE)] == [5, 6]


@pytest.mark.parametrize("loss", [float("nan"), float("inf")])
def test_a_loss_that_is_no_number_stops_the_run_and_names_the_samples(tmp_path, loss):
    run = FakeRun(tmp_path)
    run.step(4.0)
    with pytest.raises(TrainingError) as error:
        run.step(loss, overflow=True, norm=float("nan"))
    assert str(error.value).startswith("Step 2: the loss of this batch is not finite (its samples: charts.json, sample "
                                       "2; charts.json, sample 3)")
    assert run.parameters.run_failed
    lines = (tmp_path / METRICS_FILE).read_text().splitlines()
    assert '"loss": null' in lines[1]
    row = json.loads(lines[1])
    assert (row["step"], row["samples"], row["overflow"]) == (2, [2, 3], True)


def test_gradients_that_are_no_numbers_stop_the_run_with_a_finite_loss(tmp_path):
    run = FakeRun(tmp_path, start=4)
    with pytest.raises(TrainingError, match=r"Step 5: the gradient of this batch is not finite .*sample 2; "):
        run.step(1.5, overflow=True, norm=float("nan"))
    assert run.parameters.run_failed
    assert [row["loss"] for row in read_metrics(tmp_path / METRICS_FILE)] == [1.5]


def test_of_a_large_batch_eight_samples_are_named(tmp_path):
    run = FakeRun(tmp_path, batch_size=12)
    with pytest.raises(TrainingError) as error:
        run.step(float("nan"))
    assert str(error.value).count("charts.json, sample") == 8
    assert " and 4 more" in str(error.value)


def test_rows_of_steps_that_are_done_again_are_dropped(tmp_path):
    first = FakeRun(tmp_path)
    for loss in (4.0, 3.0, 2.0):
        first.step(loss)
    with open(tmp_path / METRICS_FILE, "a") as file:
        file.write('{"step": 4, "lo')          # the run was killed while it wrote
    resumed = FakeRun(tmp_path, start=2)
    assert [row["step"] for row in read_metrics(tmp_path / METRICS_FILE)] == [1, 2]
    resumed.step(2.5)
    rows = read_metrics(tmp_path / METRICS_FILE)
    assert [(row["step"], row["loss"]) for row in rows] == [(1, 4.0), (2, 3.0), (3, 2.5)]
    assert rows[2]["samples"] == [4, 5]


def test_a_run_that_starts_anew_starts_an_empty_log(tmp_path):
    FakeRun(tmp_path).step(4.0)
    FakeRun(tmp_path).step(7.0)
    assert [row["loss"] for row in read_metrics(tmp_path / METRICS_FILE)] == [7.0]


@pytest.mark.parametrize(("text", "steps"), [
    ('{"step": 1}\n{"step": 2}\n{"step": 3, "loss": 0.1', [1, 2]), ('{"step": 1}\n{"step": 2}\n', [1, 2]),
    ('{"st', []), ("", [])])
def test_a_last_line_cut_short_is_left_out(tmp_path, text, steps):
    path = tmp_path / METRICS_FILE
    assert read_metrics(path) == []
    path.write_text(text)
    assert [row["step"] for row in read_metrics(path)] == steps


def test_sources_have_their_mean_losses_and_tokens(tmp_path):
    run = FakeRun(tmp_path, report="sources", sources=("text.json", "charts.json"))
    run.step(2.0, report=[[12.0, 30.0], [8, 10]])
    run.step(2.0, report=[[0.0, 9.0], [0, 6]])
    rows = read_metrics(tmp_path / METRICS_FILE)
    assert rows[0]["sources"] == {"text.json": {"loss": 1.5, "tokens": 8}, "charts.json": {"loss": 3.0, "tokens": 10}}
    assert rows[1]["sources"] == {"charts.json": {"loss": 1.5, "tokens": 6}}
    assert [row["tokens"] for row in rows] == [18, 6]


@pytest.mark.parametrize("in_model", [False, True])
def test_preferences_have_the_means_of_their_pairs(tmp_path, in_model):
    run = FakeRun(tmp_path, report="preference", in_model=in_model)
    holder = run.model if in_model else run.wrapper
    run.step(0.7, report=[2.0, -1.0, 3.0, 3.0, -40.0, -60.0, 6.0, 4.0], holder=holder)
    row = read_metrics(tmp_path / METRICS_FILE)[0]
    assert {name: row[name] for name in REPORT[:-1]} == {
        "reward_chosen": 0.5, "reward_rejected": -0.25, "reward_margin": 0.75, "reward_accuracy": 0.75,
        "logp_chosen": -10.0, "logp_rejected": -15.0, "nll_chosen": 1.5}


def test_a_reward_model_has_the_means_of_its_pairs(tmp_path):
    run = FakeRun(tmp_path, report="reward")
    run.step(0.7, report=[2.0, -1.0, 3.0, 3.0, 4.0], holder=run.wrapper)
    row = read_metrics(tmp_path / METRICS_FILE)[0]
    assert {name: row[name] for name in row if name.startswith("reward_")} == {
        "reward_chosen": 0.5, "reward_rejected": -0.25, "reward_margin": 0.75, "reward_accuracy": 0.75}


@pytest.mark.parametrize("averaged", [True, False])
def test_the_log_knows_the_averages_by_the_names_of_the_weights(tmp_path, averaged):
    optimizer = nn.SGD([Parameter(Tensor(np.ones(2, np.float32)), name="output.weight")], learning_rate=0.1)
    optimizer = AveragedOptimizer(optimizer, 0.9) if averaged else optimizer
    run = FakeRun(tmp_path, wrapper=SimpleNamespace(optimizer=optimizer))
    assert {name: average.name for name, average in run.log.average.items()} == (
        {"output.weight": "ema.output.weight"} if averaged else {})


def test_a_report_is_zeroed_when_it_was_read(tmp_path):
    run = FakeRun(tmp_path, report="sources", sources=("a.json",), in_model=True)
    run.step(2.0, report=[[12.0], [8]], holder=run.model)
    np.testing.assert_array_equal(run.model.train_report.asnumpy(), [[0], [0]])


def test_a_row_that_was_cut_short_is_dropped_and_rows_that_are_there_twice_are_one(tmp_path):
    rows = ['{"step": 1, "loss": 1}', '{"step": 2, "lo', '{"step": 3, "loss": 3}', '{"step": 3, "loss": 4}', "[]",
            '{"loss": 1}', '{"step": 4, "loss": 5}', '{"step": 5, "lo']
    (tmp_path / METRICS_FILE).write_text("\n".join(rows))
    FakeRun(tmp_path, start=4)
    assert [(row["step"], row["loss"]) for row in read_metrics(tmp_path / METRICS_FILE)] == [(1, 1), (3, 4), (4, 5)]


@pytest.fixture
def full_disk(monkeypatch):
    """Lets rows be written by half, then none at all; gives the switch."""
    switch = {"full": False}
    ordinary = open

    class Half:
        def __init__(self, file):
            self.file = file

        def __enter__(self):
            return self

        def __exit__(self, *_):
            self.file.close()

        def write(self, data):
            self.file.write(data[:len(data) // 2])
            self.file.flush()
            raise OSError(errno.ENOSPC, "No space left on device")

    def opened(path, mode="r", **options):
        file = ordinary(path, mode, **options)
        return Half(file) if switch["full"] and mode == "ab" else file

    monkeypatch.setattr(log_module, "open", opened, raising=False)
    return switch


def test_a_full_disk_ends_the_run_by_a_sentence_and_leaves_whole_rows(tmp_path, full_disk):
    run = FakeRun(tmp_path)
    run.step(1.0)
    full_disk["full"] = True
    with pytest.raises(TrainingError, match=r"metrics\.jsonl.*No space left on device.*resume_training"):
        run.step(2.0)
    assert run.parameters.run_failed
    assert [row["step"] for row in read_metrics(tmp_path / METRICS_FILE)] == [1]
    assert (tmp_path / METRICS_FILE).read_text().endswith("}\n")


def test_with_continue_the_run_goes_on_and_says_it_once(tmp_path, full_disk, capsys):
    run = FakeRun(tmp_path)
    run.log.on_error = "continue"
    full_disk["full"] = True
    run.step(1.0)
    run.step(2.0)
    full_disk["full"] = False
    run.step(3.0)
    assert [row["step"] for row in read_metrics(tmp_path / METRICS_FILE)] == [3]
    assert capsys.readouterr().err.count("No space left on device") == 1


def test_a_run_that_is_asked_to_stop_stops_after_the_step(tmp_path, monkeypatch):
    monkeypatch.setattr(interruption, "current", interruption.Interruption())
    run = FakeRun(tmp_path)
    assert interruption.current.phase == "training"
    run.step(1.0)
    interruption.current.number = 15
    run.step(1.0)
    assert run.stopped and run.log.stopped_after == 2
    run.log.on_train_end(run)
    assert interruption.current.phase == "ending"


def test_at_the_last_step_there_is_nothing_to_stop(tmp_path, monkeypatch):
    monkeypatch.setattr(interruption, "current", interruption.Interruption())
    run = FakeRun(tmp_path, epochs=1)
    run.step(1.0)
    run.step(1.0)
    interruption.current.number = 2
    run.step(1.0)
    assert run.stopped and run.log.stopped_after is None


SPIKES = {"loss": 50.0, "loss_times": 3.0, "grad_norm_times": 10.0, "window": 3, "most_in_a_row": 2}


class SpikeCell:
    """What the log sets and reads of a step's cell."""

    def __init__(self):
        self.spike_limits, self.was_spike = Parameter(Tensor(np.zeros(2, np.float32))), Tensor(np.zeros(1, np.float32))

    def skip(self, run, loss, norm=0.5):
        limits = self.spike_limits.asnumpy()
        self.was_spike = Tensor(np.array([np.float32(loss) > limits[0] or np.float32(norm) > limits[1]], np.float32))
        run.step(loss, norm=norm)


def spiky(folder, losses, start: int = 0):
    cell = SpikeCell()
    run = FakeRun(folder, start, epochs=9, wrapper=cell, options={"skip_spikes": SPIKES})
    for loss in losses:
        cell.skip(run, loss)
    return run, cell.spike_limits.asnumpy().tolist()


def test_limits_follow_from_the_steps_that_were_taken(tmp_path, capsys):
    _, limits = spiky(tmp_path, [])
    assert limits == [50.0, float("inf")]                    # no median before there are as many steps
    _, limits = spiky(tmp_path, [4.0, 49.0, 3.0])
    assert limits == [12.0, 5.0]                             # three times the median 4, ten times 0.5
    _, limits = spiky(tmp_path, [4.0, 49.0, 3.0, 12.5, 2.0])
    assert limits == [9.0, 5.0]                              # of 49, 3, 2: the spike is no measure
    assert [row["skipped"] for row in read_metrics(tmp_path / METRICS_FILE)] == [False] * 3 + [True, False]
    said = capsys.readouterr().err
    assert "Step 4 was skipped: its loss 12.5 is above 12 (its samples: charts.json, sample 0; charts.json, sam" in said
    assert said.count("was skipped") == 1


@pytest.mark.parametrize("start", [1, 3, 4, 5])
def test_a_resumed_run_has_the_limits_it_would_have_had(tmp_path, start):
    losses = [4.0, 49.0, 3.0, 12.5, 13.5, 2.0, 1.0]
    expected = spiky(tmp_path / "whole", losses)[1]
    spiky(tmp_path / "broken", losses[:start])
    run, limits = spiky(tmp_path / "broken", losses[start:], start)
    assert limits == expected and run.log.spikes.in_a_row == 0


@pytest.mark.parametrize("start", [0, 5])
def test_too_many_skipped_steps_in_a_row_end_the_run(tmp_path, start):
    losses = [4.0, 4.0, 4.0, 13.0, 13.0, 13.0]
    if start:
        spiky(tmp_path, losses[:start])
    with pytest.raises(TrainingError, match=r"Step 6: 3 steps in a row were skipped as spikes, more than skip_sp"):
        spiky(tmp_path, losses[start:], start)


def test_an_overflow_sets_no_measure(tmp_path):
    cell = SpikeCell()
    run = FakeRun(tmp_path, epochs=9, wrapper=cell, options={"skip_spikes": SPIKES})
    for loss in (4.0, 4.0, 40.0, 4.0):
        run.step(loss, overflow=loss == 40.0)
    assert cell.spike_limits.asnumpy().tolist() == [12.0, 5.0]


@pytest.mark.parametrize(("times", "window", "said"), [(3.0, 27, True), (3.0, 26, False), (None, 27, False)])
def test_medians_that_a_run_is_too_short_for_are_said(tmp_path, caplog, times, window, said):
    FakeRun(tmp_path, epochs=9, wrapper=SpikeCell(),
            options={"skip_spikes": {"loss": 9.0, "loss_times": times, "window": window}})
    assert ("skip_spikes.window is 27, and the run has 27 steps" in caplog.text) == said


def test_a_norm_may_be_the_spike(tmp_path, capsys):
    run, _ = spiky(tmp_path, [4.0] * 3)
    run.wrapper.skip(run, 4.0, 5.5)
    assert "Step 4 was skipped: its grad_norm 5.5 is above 5 (its samples" in capsys.readouterr().err
