"""The loss on held-out conversations is the model's mean loss, whatever form training returns it in."""
from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import mindspore as ms
import numpy as np
import pytest
from mindformers.tools.register import MindFormerConfig
from mindspore import Tensor

from mindformers_ixc import device
from mindformers_ixc.cli.yaml_file import read_yaml
from mindformers_ixc.errors import TrainingError
from mindformers_ixc.generation.cells import row_parts
from mindformers_ixc.models.configuration import IXC25Config
from mindformers_ixc.models.ixc25 import IXC25Model
from mindformers_ixc.models.preference import IXC25ForPreference
from mindformers_ixc.training import evaluation
from mindformers_ixc.training.early_stopping import AlreadyOver, Standing, standing, why_over
from mindformers_ixc.training.evaluation import HeldOut, MeanLoss, evaluation_options

SIZES = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1,
         "num_attention_heads": 4, "num_key_value_heads": 2, "plora_rank": 2, "plora_alpha": 2, "seq_length": 12,
         "max_tiles": 1, "task_lora_ranks": {"sft": 2, "dpo": 2}, "adapter_mode": "write",
         "vision_config": {"image_size": 28, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
                           "intermediate_size": 16}}


def model_of(cls=IXC25Model, **fields):
    ms.set_seed(5)
    model = cls(IXC25Config(**SIZES, **fields))
    model.set_train(False)
    return model


@pytest.fixture(scope="module")
def batch() -> list[Tensor]:
    rng = np.random.default_rng(0)
    ids = rng.integers(3, 64, (3, 12)).astype(np.int32)
    labels = np.where(rng.random((3, 12)) < 0.5, ids, -100).astype(np.int32)
    mask = np.zeros_like(ids)
    mask[:, 2] = 1
    pixels = rng.integers(0, 256, (3, 1, 3, 28, 28), np.uint8)
    views, slots = rng.normal(size=(3, 1, 3, 28, 28)).astype(np.float32), np.array([[1], [0], [1]], np.int32)
    return [*map(Tensor, (ids, labels, pixels, views, slots, mask, mask))]


@pytest.fixture(scope="module")
def expected(batch) -> bytes:
    return model_of()(*batch).asnumpy().tobytes()


@pytest.mark.parametrize(("cls", "fields"), [
    (IXC25Model, {}), (IXC25Model, {"calculate_per_token_loss": True}),
    (IXC25Model, {"loss_form": "sources", "num_sources": 2}), (IXC25ForPreference, {})])
def test_it_is_bit_equal_to_the_loss_of_a_plain_step(batch, expected, cls, fields):
    model = model_of(cls, **fields)
    names = [parameter.name for parameter in model.get_parameters()]
    loss = MeanLoss(model)
    assert loss(*batch).asnumpy().tobytes() == expected
    assert [parameter.name for parameter in model.get_parameters()] == names


def test_batches_weigh_as_their_labelled_positions_and_rest_is_blank():
    fields = read_yaml(Path(__file__).parents[2] / "yaml_configs" / "ixc25_sft_tiny.yaml")
    data = MindFormerConfig(**fields).train_dataset
    options = evaluation_options({"dataset_dir": "pkg:mindformers_ixc/demo/train.json", "max_samples": 5})
    held_out, batches = HeldOut(data, options), []

    def mean_loss(*columns):
        batches.append([column.asnumpy() for column in columns])
        return Tensor(np.float32(len(batches)))

    found = held_out.loss(mean_loss)
    counts = [(labels != -100).sum() for _, labels, *_ in batches]
    assert [len(labels) for _, labels, *_ in batches] == [4, 4]            # one shape, one graph
    assert (batches[1][1][1:] == -100).all() and counts[1] > 0
    assert found == pytest.approx((counts[0] + 2 * counts[1]) / sum(counts))
    own, others = list(held_out.rows(False)), list(held_out.rows(True))
    assert len(own) == len(others) == 5
    assert any((a["pixel_values"] != b["pixel_values"]).any() for a, b in zip(own, others))


def test_rows_are_padded_to_what_the_devices_share(monkeypatch):
    model = SimpleNamespace(config=SimpleNamespace(parallel_config=SimpleNamespace(
        data_parallel=2, model_parallel=3, use_seq_parallel=True)), set_train=lambda on: None)
    callback = evaluation.Evaluation.__new__(evaluation.Evaluation)
    callback.options, callback.graph = {"batch_size": 4, "metrics": []}, None
    callback.is_scored, callback.held_out = False, None
    monkeypatch.setattr(evaluation, "is_parallel", lambda: True)
    monkeypatch.setattr(evaluation, "MeanLoss", lambda model: "graph")
    monkeypatch.setattr(evaluation, "of_whole_batches", lambda graph, config: graph)
    assert callback._values(model) == {} and callback.options["batch_size"] == 6
    model.config.parallel_config.use_seq_parallel = False
    callback.graph = None
    assert callback._values(model) == {} and callback.options["batch_size"] == 6
    assert row_parts(model.config) == 2


def test_measuring_leaves_the_training_steps_context_and_strategy_file_alone(tmp_path):
    names = ("parallel_mode", "dataset_strategy", "strategy_ckpt_save_file", "pipeline_result_broadcast", "full_batch")
    training = {"parallel_mode": "semi_auto_parallel", "dataset_strategy": ((2, 1), (2, 1, 1, 1, 1)),
                "strategy_ckpt_save_file": str(tmp_path / "strategy.ckpt")}
    try:
        for strategy in (((2, 1), (2, 1, 1, 1, 1)), "full_batch", "data_parallel"):
            ms.set_auto_parallel_context(**{**training, "dataset_strategy": strategy})
            before = [ms.get_auto_parallel_context(name) for name in names]
            with device.measuring():
                assert ms.get_auto_parallel_context("full_batch")
                assert ms.get_auto_parallel_context("dataset_strategy") == "full_batch"
                assert ms.get_auto_parallel_context("pipeline_result_broadcast")
                assert not ms.get_auto_parallel_context("strategy_ckpt_save_file")
            assert [ms.get_auto_parallel_context(name) for name in names] == before
    finally:
        ms.reset_auto_parallel_context()


class FakeTraining:
    """A run of six steps in two epochs as `Evaluation` sees it: measures a loss that falls until step 4."""

    LOSSES = {2: 3.0, 4: 1.0, 6: 2.0}

    def __init__(self, folder, monkeypatch, start: int = 0):
        monkeypatch.setattr(evaluation, "HeldOut", lambda data, options: self)
        monkeypatch.setattr(evaluation, "MeanLoss", lambda model: None)
        monkeypatch.setattr(evaluation, "get_output_root_path", lambda: str(folder))
        self.folder, self.now, self.measured = folder, start, []
        self.trained_model = SimpleNamespace(set_train=lambda on: None)
        self.train_dataset = SimpleNamespace(get_dataset_size=lambda: 3)
        self.config = SimpleNamespace(runner_config=SimpleNamespace(initial_step=start, epochs=2))
        self.parameters = SimpleNamespace(cur_step_num=0)
        section = {"dataset_dir": "x.json", "every": 2, "metrics": ["loss"], "keep_best": "loss"}
        self.callback = evaluation.Evaluation(self, section, {})

    def original_args(self):
        return self.parameters

    def loss(self, mean_loss, shuffled=False):
        self.measured.append(self.now)
        return self.LOSSES[self.now]

    def save_directory(self, name):
        (self.folder / name).mkdir(exist_ok=True)
        (self.folder / name / "step").write_text(str(self.now))

    def run(self, until: int = 6):
        self.callback.on_train_begin(self)
        while self.now < until:
            self.now += 1
            self.parameters.cur_step_num += 1
            self.callback.on_train_step_end(self)
        self.callback.on_train_end(self)
        return self

    def results(self):
        return (self.folder / "evaluations.jsonl").read_text(), (self.folder / "best" / "step").read_text()


WHOLE = "".join(json.dumps({"step": step, "loss": loss}) + "\n" for step, loss in FakeTraining.LOSSES.items()), "4"


def test_a_run_measures_when_it_is_due_and_once_at_the_end(tmp_path, monkeypatch):
    run = FakeTraining(tmp_path, monkeypatch).run()
    assert run.results() == WHOLE and run.measured == [2, 4, 6]


def test_a_measurement_that_is_no_number_is_never_the_best_and_hides_none(tmp_path, monkeypatch):
    monkeypatch.setattr(FakeTraining, "LOSSES", {2: float("nan"), 4: 3.0, 6: float("nan")})
    assert FakeTraining(tmp_path, monkeypatch).run().results()[1] == "4"


def test_watchers_are_told_every_row(tmp_path, monkeypatch):
    run, seen = FakeTraining(tmp_path, monkeypatch), []
    run.callback.watchers.append(seen.append)
    run.run()
    assert seen == [{"step": step, "loss": loss} for step, loss in FakeTraining.LOSSES.items()]


@pytest.mark.parametrize("start", [2, 3, 4, 6])
@pytest.mark.parametrize("lost", ["nothing", "row", "cut", "doubled", "best", "all"])
def test_a_resumed_run_has_the_rows_of_one_that_was_not_interrupted(tmp_path, monkeypatch, start, lost):
    """Killed in the measurement of the step whose checkpoint is the last, or anywhere after it."""
    FakeTraining(tmp_path, monkeypatch).run(until=min(start + 1, 6))
    file, best = tmp_path / "evaluations.jsonl", tmp_path / "best"
    lines = file.read_text().splitlines()
    due = start in FakeTraining.LOSSES
    if lost in ("row", "cut", "all") and due:
        file.write_text("".join(line + "\n" for line in lines[:-1]) + (lines[-1][:9] if lost == "cut" else ""))
    if lost == "doubled":
        file.write_text("\n".join([*lines, "[]", '{"step": 1', lines[-1]]))
    if lost in ("best", "all") and start in (2, 4):
        (best / "step").unlink()
        best.rmdir()
    run = FakeTraining(tmp_path, monkeypatch, start).run()
    assert run.results() == WHOLE
    assert run.measured == [step for step in (2, 4, 6)
                            if step > start or (step == start and lost in ("row", "cut", "all"))]


def test_of_several_ranks_all_measure_and_decide_and_one_writes(tmp_path, monkeypatch):
    for name in ("one", "other"):
        (tmp_path / name).mkdir()
        monkeypatch.setattr(evaluation, "reports_loss", lambda name=name: name == "one")
        run = FakeTraining(tmp_path / name, monkeypatch).run()
        assert run.measured == [2, 4, 6]
        assert (tmp_path / name / "best" / "step").read_text() == "4"        # every rank puts its part down
        assert (tmp_path / name / "evaluations.jsonl").exists() == (name == "one")


def test_a_run_that_was_stopped_on_the_way_measures_no_end(tmp_path, monkeypatch):
    assert FakeTraining(tmp_path, monkeypatch).run(until=5).measured == [2, 4]


def test_the_best_model_is_there_before_the_row_that_says_so(tmp_path, monkeypatch):
    run = FakeTraining(tmp_path, monkeypatch)
    monkeypatch.setattr(evaluation, "write_whole", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run.run()
    assert (tmp_path / "best" / "step").read_text() == "2"


@pytest.mark.parametrize("policy", ["stop", "continue"])
def test_a_measurement_that_cannot_be_written_ends_the_run_or_not_as_it_says(tmp_path, monkeypatch, capsys, policy):
    run = FakeTraining(tmp_path, monkeypatch)
    run.config.on_save_error = policy
    ordinary = run.save_directory

    def full(name):
        if run.now == 4:
            raise OSError(28, "No space left on device")
        ordinary(name)

    run.save_directory = full
    if policy == "stop":
        with pytest.raises(TrainingError, match=r"Step 4: its evaluation could not be written.*No space left"):
            run.run()
    else:
        run.run()
        assert "Step 4: its evaluation could not be written" in capsys.readouterr().err
        rows = (tmp_path / "evaluations.jsonl").read_text().splitlines()
        assert [json.loads(row)["step"] for row in rows] == [2, 6]
    assert (tmp_path / "best" / "step").read_text() == ("2" if policy == "stop" else "6")


class Answering(FakeTraining):
    """The same run, measured by its answers too; each says at which step it was given."""

    def __init__(self, folder, monkeypatch, start: int = 0):
        super().__init__(folder, monkeypatch, start)
        self.callback.options["metrics"] = ["loss", "exact_match"]
        caches = SimpleNamespace(clear=lambda: None)
        self.callback.assistant = SimpleNamespace(engine=SimpleNamespace(caches=caches))

    def answers(self, assistant):
        return [f"at {self.now}", "two"], ["one", "two"]

    def shown(self, answers):
        return [{"question": "?", "answer": answers[0]}]


def test_some_answers_are_written_down_and_a_resumed_run_has_those_before_it(tmp_path, monkeypatch):
    Answering(tmp_path, monkeypatch).run(until=5)
    file = tmp_path / "answers.jsonl"
    assert [json.loads(row)["step"] for row in file.read_text().splitlines()] == [2, 4]
    run = Answering(tmp_path, monkeypatch, start=3).run()
    assert run.measured == [4, 6]
    assert [json.loads(row) for row in file.read_text().splitlines()] == [
        {"step": step, "answers": [{"question": "?", "answer": f"at {step}"}]} for step in (2, 4, 6)]
    scores = [json.loads(row)["exact_match"] for row in (tmp_path / "evaluations.jsonl").read_text().splitlines()]
    assert scores == [50.0] * 3


def test_without_questions_no_file_of_answers_is_made(tmp_path, monkeypatch):
    FakeTraining(tmp_path, monkeypatch).run()
    assert not (tmp_path / "answers.jsonl").exists()


def rows_of(metric, *values):
    return [{"step": 10 * number, metric: value} for number, value in enumerate(values, 1)]


@pytest.mark.parametrize(("rows", "metric", "min_delta", "expected"), [
    (rows_of("loss", 3.0, 1.0, 2.0, 1.5), "loss", 0.0, Standing(20, 1.0, 2)),
    (rows_of("loss", 3.0, 1.0, 1.0), "loss", 0.0, Standing(20, 1.0, 1)),                 # as good is not better
    (rows_of("loss", 3.0, 2.5, 2.2, 1.9), "loss", 1.0, Standing(40, 1.9, 0)),           # against the best, not the last
    (rows_of("anls", 0.5, 0.9, 0.7), "anls", 0.0, Standing(20, 0.9, 1)),                 # of scores more is better
    (rows_of("loss", float("nan"), 2.0, float("nan")), "loss", 0.0, Standing(20, 2.0, 1)),
    (rows_of("loss"), "loss", 0.0, Standing())])
def test_a_standing_is_the_best_measurement_and_how_many_were_no_better(rows, metric, min_delta, expected):
    found = standing(rows, metric, min_delta)
    assert (found.step, found.without) == (expected.step, expected.without)
    np.testing.assert_equal(found.value, expected.value)


def test_a_run_that_never_measured_a_number_is_over_too():
    rows = rows_of("loss", *[float("nan")] * 2)
    assert why_over(rows[:1], "loss", 2, 0.0) is None
    assert why_over(rows, "loss", 2, 0.0) == ("Stopped early after step 20: loss was not a number in 2 measurements in "
                                              "a row (evaluation.early_stopping: patience 2, min_delta 0).")


class Stopping(FakeTraining):
    """The same run, in six epochs, whose loss falls until step 4; it ends after two measurements that are no better."""

    LOSSES = {2: 3.0, 4: 1.0, 6: 2.0, 8: 1.0, 10: 0.5, 12: 0.1}

    def __init__(self, folder, monkeypatch, start: int = 0):
        super().__init__(folder, monkeypatch, start)
        self.config.runner_config.epochs = 4
        self.callback.options["early_stopping"] = {"metric": "loss", "patience": 2, "min_delta": 0.25}
        self.asked = False

    def request_stop(self):
        self.asked = True

    def run(self, until: int = 12):
        self.callback.on_train_begin(self)
        while self.now < until and not self.asked:
            self.now += 1
            self.parameters.cur_step_num += 1
            self.callback.on_train_step_end(self)
        self.callback.on_train_end(self)
        return self


def test_a_run_ends_when_its_measurements_get_no_better(tmp_path, monkeypatch):
    run = Stopping(tmp_path, monkeypatch).run()
    assert run.measured == [2, 4, 6, 8] and run.results()[1] == "4"
    assert run.callback.why_over == ("Stopped early after step 8: loss was not better than 1 of step 4 in 2 "
                                     "measurements in a row (evaluation.early_stopping: patience 2, min_delta 0.25).")


@pytest.mark.parametrize(("patience", "said"), [(4, False), (5, True)])
def test_early_stopping_that_never_acts_is_said(tmp_path, monkeypatch, caplog, patience, said):
    run = Stopping(tmp_path, monkeypatch)
    run.callback.options["early_stopping"]["patience"] = patience
    run.callback.on_train_begin(run)
    assert ("after step 12 at the soonest (patience 5, every 2), and this one has 12 steps" in caplog.text) is said


@pytest.mark.parametrize("start", [3, 4, 5, 6, 7])
def test_a_resumed_run_ends_where_the_other_would_have(tmp_path, monkeypatch, start):
    expected = Stopping(tmp_path, monkeypatch).run().results()
    Stopping(tmp_path, monkeypatch).run(until=start)
    run = Stopping(tmp_path, monkeypatch, start).run()
    assert run.now == 8 and run.callback.why_over and run.results() == expected


@pytest.mark.parametrize("lost", [False, True])
def test_a_run_that_has_ended_early_trains_no_further_step(tmp_path, monkeypatch, lost):
    """Killed behind its last checkpoint: before the measurement that ends it, or while it wrote its model."""
    Stopping(tmp_path, monkeypatch).run()
    file = tmp_path / "evaluations.jsonl"
    if lost:
        file.write_text("".join(line + "\n" for line in file.read_text().splitlines()[:-1]))
    run = Stopping(tmp_path, monkeypatch, 8)
    with pytest.raises(AlreadyOver):
        run.run()
    assert run.parameters.run_failed and "Stopped early after step 8" in run.callback.why_over
    assert run.measured == ([8] if lost else [])
