"""Training in parallel layouts through the command line, against the single process: what scripts/parallel_parity.py
prints, for the layouts that no other test trains in."""
from __future__ import annotations

import parallel_parity as parity
import pytest

pytestmark = pytest.mark.slow


def test_a_pipeline_of_tensor_parallel_stages_trains_as_one_process_does(tmp_path):
    parity.write_start(tmp_path / "start")
    alone = {**parity.options_of(parity.Layout(), 1, 1000), **parity.write_sources(tmp_path),
             "load_checkpoint": tmp_path / "start"}
    parity.run(parity.Layout(), tmp_path / "single", alone)
    assert parity.check_layouts(tmp_path, ["tp2pp2"], 1) == 0
    steps, _, weights = parity.compare(tmp_path / "single", tmp_path / "tp2pp2")
    assert steps == parity.STEPS_AN_EPOCH
    assert weights <= parity.BAR


# Pairs go through the same step whatever their loss: one of them accumulates in tensor parallel, the other does not.
def test_preferences_with_everything_else_frozen(tmp_path):
    assert parity.check_preferences(tmp_path, ("tp2", "dp2", "pp2")) == 0


def test_scores_are_learnt_as_one_process_does(tmp_path):
    assert parity.check_rewards(tmp_path, ("tp2accumulated", "dp2", "pp2")) == 0


def test_accumulation_in_sequence_with_a_frozen_tower_and_replicas_that_read_their_own_samples(tmp_path):
    parity.write_start(tmp_path / "start")
    shared = {**parity.write_sources(tmp_path), "load_checkpoint": tmp_path / "start",
              "train_parts": "[projector, separators, task_lora.web]"}
    parity.run(parity.Layout(), tmp_path / "single", {**parity.options_of(parity.Layout(), 1, 1000), **shared})
    for name, more in (("tp2accumulated", {"parallel_config.use_seq_parallel": True}),
                       ("dp2", {"parallel.full_batch": False})):
        layout = parity.LAYOUTS[name]
        parity.run(layout, tmp_path / name, {**parity.options_of(layout, 1, 1000), **shared, **more})
        steps, numbers, weights = parity.compare(tmp_path / "single", tmp_path / name)
        assert (steps, max(numbers, weights) <= parity.BAR) == (parity.STEPS_AN_EPOCH, True), (name, numbers, weights)
