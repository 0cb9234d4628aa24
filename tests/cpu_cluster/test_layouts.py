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


# Pairs go through the same step whatever their loss, so each layout is tried with one loss.
FEW = 7 * parity.GLOBAL_BATCH


def test_preferences_with_everything_else_frozen(tmp_path):
    assert parity.check_preferences(tmp_path, ("tp2seqaccumulated", "pp2"), FEW) == 0


def test_scores_are_learnt_as_one_process_does(tmp_path):
    assert parity.check_rewards(tmp_path, ("tp2accumulated", "dp2own"), FEW) == 0
