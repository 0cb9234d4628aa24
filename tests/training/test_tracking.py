"""The callback that sends a run's numbers to a tracker."""
from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
from mindformers.core.callback import build_callback
from mindspore.train.callback import Callback

from mindformers_ixc import trackers
from mindformers_ixc.errors import ConfigError, TrainingError
from mindformers_ixc.training import tracking
from mindformers_ixc.training.log import TrainingLog


class Fake:
    """A tracker that keeps what it is told, or refuses it."""

    identity, where, broken = "one", "nowhere", ""

    def __init__(self, options, place):
        self.options, self.place, self.rows, self.ended = options, place, [], []
        Fake.last = self

    def write(self, step, values):
        if self.broken == "write":
            raise RuntimeError("no connection.\nTry again")
        self.rows.append((step, values))

    def close(self, failed):
        self.ended.append(failed)
        if self.broken == "close":
            raise RuntimeError("no connection")


class FakeEvaluation(Callback):
    def __init__(self):
        self.watchers = []


@pytest.fixture
def run(tmp_path, monkeypatch):
    """A run of five steps with its log, an evaluation and a tracker, all but MindSpore's part."""
    monkeypatch.setitem(trackers.TRACKERS, "wandb", Fake)
    monkeypatch.setattr(Fake, "broken", "")

    def begin(start: int = 0, **options):
        log = TrainingLog(tmp_path)
        log.start, log.total = start, 5
        log.trainer = SimpleNamespace(config={"seed": 42, "cell": object})
        callback, = build_callback([{"type": "IXC25Tracker", "tracker": "wandb", **options}])
        evaluation = FakeEvaluation()
        parameters = SimpleNamespace(list_callback=[log, callback, evaluation])
        callback.on_train_begin(SimpleNamespace(original_args=lambda: parameters))
        return log, callback, evaluation
    return begin


def row(step: int) -> dict:
    return {"step": step, "loss": 1.0 / step, "overflow": False, "samples": [1, 2], "grad_norm": None,
            "sources": {"a": {"loss": 2.0, "tokens": 3}}}


def tell(watchers, *rows):
    for one in rows:
        for watch in watchers:
            watch(one)


def test_rows_and_evaluations_are_sent(run, tmp_path, capsys):
    log, callback, evaluation = run(project="charts", options={"tags": ["x"]})
    with callback:
        tell(log.watchers, row(1), row(2))
        tell(evaluation.watchers, {"step": 2, "loss": 0.5, "cider": 0.1})
    fake = Fake.last
    assert (fake.options.project, fake.options.options, fake.options.name) == ("charts", {"tags": ["x"]}, tmp_path.name)
    assert fake.place.settings == {"seed": 42, "cell": "<class 'object'>"}
    assert fake.rows == [
        (1, {"loss": 1.0, "overflow": 0.0, "loss/a": 2.0, "tokens/a": 3.0}),
        (2, {"loss": 0.5, "overflow": 0.0, "loss/a": 2.0, "tokens/a": 3.0}),
        (2, {"evaluation/loss": 0.5, "evaluation/cider": 0.1})]
    assert fake.ended == [False]
    assert capsys.readouterr().err == "wandb tracks the run nowhere.\n"


def test_every_so_many_rows_and_the_last(run):
    log, _, _ = run(every=2)
    tell(log.watchers, *(row(step) for step in range(1, 6)))
    assert [step for step, _ in Fake.last.rows] == [2, 4, 5]


def test_a_resumed_run_goes_on(run, tmp_path):
    run()
    assert Fake.last.place.identity is None
    assert json.loads((tmp_path / "tracker.json").read_text()) == {"wandb": "one"}
    run(start=3)
    assert Fake.last.place.identity == "one"


def test_a_failed_run_is_told_to_have_failed(run):
    _, callback, _ = run()
    with pytest.raises(TrainingError), callback:
        raise TrainingError("the loss is not finite")
    assert Fake.last.ended == [True]


def test_a_tracker_that_fails_is_left_out_and_the_run_goes_on(run, monkeypatch, capsys):
    log, callback, _ = run()
    monkeypatch.setattr(Fake, "broken", "write")
    with callback:
        tell(log.watchers, row(1), row(2))
    said = capsys.readouterr().err
    assert said.count("wandb cannot take what the run sends it (no connection. Try again); the run goes on") == 1
    _, callback, _ = run()
    monkeypatch.setattr(Fake, "broken", "close")
    with callback:
        pass
    assert "the run goes on without it" in capsys.readouterr().err


def test_another_rank_sends_nothing(run, monkeypatch, tmp_path):
    monkeypatch.setattr(tracking, "reports_loss", lambda: False)
    log, callback, evaluation = run()
    with callback:
        pass
    assert (log.watchers, evaluation.watchers, list(tmp_path.iterdir())) == ([], [], [])


def test_another_trainer_has_no_log_to_read():
    callback = tracking.IXC25Tracker("wandb")
    parameters = SimpleNamespace(list_callback=[callback])
    with pytest.raises(ConfigError, match=r"reads the log of IXC25Trainer; set trainer\.type to that"):
        callback.on_train_begin(SimpleNamespace(original_args=lambda: parameters))


def test_the_log_tells_every_row_it_writes(tmp_path):
    from test_log import FakeRun

    run, seen = FakeRun(tmp_path), []
    run.log.watchers.append(seen.append)
    run.step(1.0)
    run.step(2.0)
    assert [(one["step"], one["loss"]) for one in seen] == [(1, 1.0), (2, 2.0)]
