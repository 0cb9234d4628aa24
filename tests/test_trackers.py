"""Trackers: what they are told, by stand-ins for their packages, and their offline modes where they are installed."""
from __future__ import annotations

import importlib.util
import json
import sqlite3
import sys
import time
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

from mindformers_ixc.cli.inputs import check_inputs
from mindformers_ixc.cli.yaml_file import apply_overrides, read_yaml
from mindformers_ixc.errors import ConfigError, TrainingError
from mindformers_ixc.trackers import (
    IDENTITIES,
    TRACKED,
    TRACKERS,
    TrackerOptions,
    check_tracker,
    open_tracker,
    require_packages,
)

SETTINGS = {"seed": 42, "model": {"sizes": [1, 2], "dtype": None, "object": Path("x")}}
CALLBACK = {"type": "IXC25Tracker", "tracker": "wandb"}


class Recorder(ModuleType):
    """A tracker's package that writes down what it is told; `begin` is the function that begins a run."""

    def __init__(self, name: str, begin: str):
        super().__init__(name)
        self.calls: list[tuple] = []
        self.run = SimpleNamespace(
            id="new", url="https://tracker.test/new", info=SimpleNamespace(run_id="new"),
            define_metric=lambda name, **more: self.calls.append(("define_metric", name, more)),
            log=lambda values: self.calls.append(("log", values)),
            finish=lambda **more: self.calls.append(("finish", more)))
        setattr(self, begin, self._begin)

    def _begin(self, **arguments):
        self.calls.append(("begin", arguments))
        return self.run

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return lambda *words, **more: self.calls.append((name, *words, *([more] if more else [])))


@pytest.fixture
def package(monkeypatch):
    def make(name: str) -> Recorder:
        made = Recorder(name, {"mlflow": "start_run"}.get(name, "init"))
        monkeypatch.setitem(sys.modules, name, made)
        return made
    return make


def test_wandb_is_told_by_its_own_calls(package, tmp_path):
    wandb = package("wandb")
    options = TrackerOptions("wandb", "charts", options={"tags": ["a"]})
    tracker = open_tracker(options, tmp_path, SETTINGS, goes_on=False)
    tracker.write(3, {"loss": 1.5, "evaluation/loss": 2.0})
    tracker.close(failed=True)
    begun = wandb.calls[0][1]
    assert {name: begun[name] for name in ("project", "name", "dir", "mode", "id", "resume", "tags")} == {
        "project": "charts", "name": tmp_path.name, "dir": str(tmp_path), "mode": "online", "id": None, "resume": None,
        "tags": ["a"]}
    assert begun["config"] == {"seed": 42, "model": {"sizes": [1, 2], "dtype": None, "object": "x"}}
    assert wandb.calls[1:] == [("define_metric", "step", {}), ("define_metric", "*", {"step_metric": "step"}),
                               ("log", {"loss": 1.5, "evaluation/loss": 2.0, "step": 3}), ("finish", {"exit_code": 1})]
    assert tracker.where == "at https://tracker.test/new"


def test_swanlab_is_told_by_its_own_calls(package, tmp_path):
    swanlab = package("swanlab")
    tracker = open_tracker(TrackerOptions("swanlab", name="first", mode="offline"), tmp_path, SETTINGS, goes_on=False)
    tracker.write(3, {"loss": 1.5})
    tracker.close(failed=False)
    begun = swanlab.calls[0][1]
    assert (begun["project"], begun["name"], begun["log_dir"], begun["mode"], begun["id"]) == (
        "mindformers_ixc", "first", str(tmp_path / "swanlog"), "offline", None)
    assert swanlab.calls[1:] == [("log", {"loss": 1.5}, {"step": 3}), ("finish", {"state": "success"})]
    assert f"`swanlab sync {tmp_path}/swanlog/run-*` sends it" in tracker.where


def test_mlflow_is_told_by_its_own_calls(package, tmp_path, monkeypatch):
    monkeypatch.delenv("MLFLOW_DISABLE_TELEMETRY", raising=False)
    mlflow = package("mlflow")
    tracker = open_tracker(TrackerOptions("mlflow", "charts", mode="offline"), tmp_path, SETTINGS, goes_on=False)
    tracker.write(3, {"loss": 1.5, "loss/a (1)": 2.0})
    tracker.close(failed=False)
    assert mlflow.calls == [
        ("set_tracking_uri", f"sqlite:///{tmp_path / 'mlflow.db'}"), ("get_experiment_by_name", "charts"),
        ("create_experiment", "charts", (tmp_path / "mlruns").as_uri()), ("set_experiment", "charts"),
        ("begin", {"run_id": None, "run_name": tmp_path.name}),
        ("log_params", {"seed": "42", "model.sizes": "[1, 2]", "model.dtype": "None", "model.object": "x"}),
        ("log_metrics", {"loss": 1.5, "loss/a _1_": 2.0}, {"step": 3}), ("end_run", {"status": "FINISHED"})]


@pytest.mark.parametrize("name", TRACKERS)
def test_a_resumed_run_goes_on_where_it_was(name, package, tmp_path):
    (tmp_path / IDENTITIES).write_text(json.dumps({name: "before", "other": "x"}))
    key = "run_id" if name == "mlflow" else "id"
    for goes_on, identity in ((True, "before"), (False, None)):
        recorder = package(name)
        open_tracker(TrackerOptions(name), tmp_path, SETTINGS, goes_on)
        begun = next(call[1] for call in recorder.calls if call[0] == "begin")
        assert begun[key] == identity
    assert not any(call[0] == "log_params" for call in recorder.calls if goes_on)
    assert json.loads((tmp_path / IDENTITIES).read_text()) == {name: "new", "other": "x"}


def test_a_tracker_that_cannot_begin_says_so_before_the_first_step(package, tmp_path):
    recorder = package("wandb")

    def refuse(**_):
        raise RuntimeError("No API key configured.\nUse `wandb login`.")

    recorder.init = refuse
    with pytest.raises(TrainingError, match=r"wandb cannot begin to track the run: No API key configured\. Use `wandb "
                                            r"login`\. Log in .* mode: offline"):
        open_tracker(TrackerOptions("wandb"), tmp_path, SETTINGS, goes_on=False)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("change", "message"), [
    ({"tracker": "wandbb"}, r"callbacks\[2\].tracker is 'wandbb'; the choices are wandb, swanlab, mlflow"),
    ({"tracker": None}, r"callbacks\[2\] lacks tracker"), ({"projects": "x"}, r"unknown key callbacks\[2\].projects"),
    ({"mode": "cloud"}, "the choices are online, offline"), ({"every": 0}, "a whole number of at least 1"),
    ({"options": ["x"]}, "it must be a section")])
def test_wrong_keys_and_values_of_the_callback(change, message):
    check_tracker({**CALLBACK, "project": "x", "mode": "offline", "every": 2, "options": {}}, "callbacks[2]", "my.yaml")
    with pytest.raises(ConfigError, match=f"^my.yaml: .*{message}"):
        check_tracker({**CALLBACK, **change}, "callbacks[2]", "my.yaml")


@pytest.mark.parametrize("name", TRACKERS)
def test_a_missing_package_is_one_sentence_with_the_command(name, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda package: None if package == name else find(package))
    fields = {"callbacks": [{"type": "MFLossMonitor"}, {**CALLBACK, "tracker": name}]}
    with pytest.raises(ConfigError, match=rf'my.yaml: callbacks\[1\] tracks the run with {name}, which is not installed'
                                          rf'; run `pip install "mindformers_ixc\[{name}\]"`'):
        require_packages(fields, "my.yaml")


def test_mlflow_needs_to_be_told_its_server(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda package: object())
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    fields = {"callbacks": [{**CALLBACK, "tracker": "mlflow"}]}
    with pytest.raises(ConfigError, match="MLFLOW_TRACKING_URI does not say where its server is"):
        require_packages(fields, "my.yaml")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://localhost:5000")
    require_packages(fields, "my.yaml")


@pytest.mark.parametrize("callbacks", [None, "x", ["x"], [{"type": "MFLossMonitor"}], [{"type": "IXC25Tracker"}]])
def test_other_callbacks_need_no_package(callbacks):
    require_packages({"callbacks": callbacks}, "my.yaml")


def test_a_run_is_refused_before_anything_is_imported_and_a_plan_is_not(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda package: None)
    words = ["--callbacks.2.type", "IXC25Tracker", "--callbacks.2.tracker", "wandb"]
    with pytest.raises(ConfigError, match=r'callbacks\[2\] .* run `pip install "mindformers_ixc\[wandb\]"`'):
        check_inputs(SimpleNamespace(command="run", config="ixc25_sft_tiny", rest=words))
    check_inputs(SimpleNamespace(command="plan", config="ixc25_sft_tiny", rest=words, html=None))


def test_the_extras_have_the_names_of_the_trackers():
    text = (Path(__file__).parents[1] / "pyproject.toml").read_text(encoding="utf-8")
    extras = text.partition("[project.optional-dependencies]")[2].partition("\n[")[0]
    assert all(f'\n{name} = ["{name}>=' in extras for name in TRACKERS)
    tests = extras.partition("\ntests = [")[2].partition("\n]")[0]      # so that CI skips none of the tests below
    assert all(name in tests for name in ("[swanlab,wandb]", '"mlflow-skinny', '"alembic', '"sqlalchemy'))


def test_a_callback_is_added_on_the_command_line():
    fields = read_yaml("ixc25_sft_tiny")
    apply_overrides(fields, {"callbacks.2.type": "IXC25Tracker", "callbacks.2.tracker": "mlflow"})
    check_tracker(fields["callbacks"][2], "callbacks[2]", "my.yaml")


@pytest.mark.parametrize("name", TRACKERS)
def test_the_real_package_works_offline(name, tmp_path, monkeypatch):
    pytest.importorskip(name)
    pytest.importorskip("alembic" if name == "mlflow" else name)      # of which the small mlflow-skinny has none
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "out"
    folder.mkdir()
    for goes_on in (False, True):
        tracker = open_tracker(TrackerOptions(name, mode="offline"), folder, SETTINGS, goes_on)
        for step in (1, 2):
            tracker.write(step, {"loss": 1.0 / step, "loss/a (1)": 2.0})
        tracker.close(failed=False)
    assert {path.name for path in folder.iterdir()} <= set(TRACKED)
    assert json.loads((folder / IDENTITIES).read_text()) == {name: tracker.identity}
    if name == "mlflow":
        rows = sqlite3.connect(folder / "mlflow.db").execute(
            "select distinct key, value, step from metrics where key = 'loss' order by step").fetchall()
        assert rows == [("loss", 1.0, 1), ("loss", 0.5, 2)]
    else:
        files = list(folder.glob(f"*/*run-*/*{tracker.identity}.{name}"))
        assert len(files) == 2
        until = time.monotonic() + 60           # a process of the package's own writes the last of them
        while (whole := [b"loss/a (1)" in file.read_bytes() for file in files]) != [True, True]:
            assert time.monotonic() < until, whole
            time.sleep(0.1)
