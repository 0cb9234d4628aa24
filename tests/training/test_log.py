"""What a run writes down of its steps, and the steps it must not go on from."""
from __future__ import annotations

import errno
import json
from types import SimpleNamespace

import numpy as np
import pytest
from mindspore import Parameter, Tensor

from mindformers_ixc import interruption
from mindformers_ixc.errors import TrainingError
from mindformers_ixc.files import METRICS_FILE, read_metrics
from mindformers_ixc.models.preference import REPORT
from mindformers_ixc.training import log as log_module
from mindformers_ixc.training.log import TrainingLog
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

    def __init__(self, folder, start: int = 0, epochs: int = 2, wrapper=None, batch_size: int = 2, **plan):
        self.log, self.stopped = TrainingLog(folder), False
        runner = SimpleNamespace(initial_step=start, epochs=epochs)
        self.model = SimpleNamespace()
        trainer = SimpleNamespace(config=SimpleNamespace(runner_config=runner), trained_model=self.model)
        self.log.bind(fake_dataset(batch_size), StepPlan(**plan), trainer)
        self.wrapper = wrapper or SimpleNamespace()
        self.parameters = SimpleNamespace(train_network=self.wrapper, batch_num=3, cur_step_num=0,
                                          dataset_sink_mode=False)
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
            (holder or self.wrapper).train_report = Tensor(np.array(report, np.float32))
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
    run.step(0.7, report=[2.0, -1.0, 3.0, 3.0, -40.0, -60.0, 4.0], holder=holder)
    row = read_metrics(tmp_path / METRICS_FILE)[0]
    assert {name: row[name] for name in REPORT[:-1]} == {
        "reward_chosen": 0.5, "reward_rejected": -0.25, "reward_margin": 0.75, "reward_accuracy": 0.75,
        "logp_chosen": -10.0, "logp_rejected": -15.0}


@pytest.mark.parametrize(("start", "expected"), [(0, [1.0, 2.0]), (3, [9.0, 9.0])])
def test_the_average_starts_from_loaded_weights_unless_it_was_loaded_too(tmp_path, start, expected):
    weight, average = (Parameter(Tensor(np.array(value, np.float32)), name=name)
                       for value, name in (([1.0, 2.0], "output.weight"), ([9.0, 9.0], "ema.output.weight")))
    wrapper = SimpleNamespace(has_average=True, weights=[weight], average=[average])
    run = FakeRun(tmp_path, start=start, wrapper=wrapper)
    np.testing.assert_array_equal(run.log.average["output.weight"].asnumpy(), expected)
    weight.set_data(Tensor(np.zeros(2, np.float32)))
    np.testing.assert_array_equal(run.log.average["output.weight"].asnumpy(), expected)


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
