"""What samples need, which budgets of a row suit them, and what `mindformers data plan` says."""
from __future__ import annotations

import importlib.util
import io
import json
from pathlib import Path

import numpy as np
import pytest

from mindformers_ixc.cli.data import data as data_command
from mindformers_ixc.cli.data_plan import make_data_plan
from mindformers_ixc.cli.yaml_file import read_yaml
from mindformers_ixc.data.advice import Needs, advise, best, best_of_lengths, candidates, drawn, histogram, measure
from mindformers_ixc.data.packer import Budget
from mindformers_ixc.errors import ConfigError, DataError
from mindformers_ixc.operations import Costs
from mindformers_ixc_cli import parse

ROOT = Path(__file__).parents[2]
TINY = str(ROOT / "yaml_configs" / "ixc25_sft_tiny.yaml")
DEMO = "pkg:mindformers_ixc/demo/train.json"


@pytest.fixture(scope="module")
def benchmark():
    """The program that draws mixtures like real ones."""
    spec = importlib.util.spec_from_file_location("goodput_benchmark", ROOT / "benchmarks" / "goodput.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(("budget", "least"), [
    (Budget(16384, 36, 12, 32), 0.96), (Budget(9216, 20, 10, 32), 0.925), (Budget(8192, 19, 9, 32), 0.865)])
def test_rows_of_the_reference_mixture_are_full(benchmark, budget, least):
    needs = benchmark.draw(benchmark.MIXTURES["reference"], 4000, 1)
    assert 2800 < needs.positions.mean() < 3000
    advice = advise(needs, [budget], benchmark.COSTS)[0]
    assert advice.goodput > least
    assert advice.goodput > benchmark.packed_by_source(needs.take(np.flatnonzero(needs.fits(budget))), budget) + 0.08
    assert advice.without_pictures < 0.01


@pytest.mark.parametrize("name", ["documents only", "short captions only", "text only"])
def test_a_budget_that_suits_other_mixtures_is_found(benchmark, name):
    needs = benchmark.draw(benchmark.MIXTURES[name], 400, 1)
    needs = needs.take(np.flatnonzero(needs.positions < 16000))
    found = best(best_of_lengths(advise(needs, candidates(needs, 32), benchmark.COSTS)))
    assert found.goodput > 0.93
    assert found.left_out == 0


def test_advice_counts_what_a_row_has():
    needs = Needs(*np.array([(60, 2, 1, 0), (60, 2, 1, 0), (30, 0, 0, 1), (30, 0, 0, 1), (999, 0, 0, 1)], np.int32).T)
    small, full = advise(needs, [Budget(100, 2, 1, 4), Budget(64, 1, 1, 64), Budget(96, 4, 1, 3)], Costs(10, 1, 0))
    assert small.goodput == pytest.approx((180 + 40) / (2 * (100 + 20)))
    assert (small.mean_samples, small.without_pictures, small.left_out) == (2, 0, pytest.approx(0.2))
    assert full.full_of_segments == 1


def test_the_smallest_budget_of_about_the_highest_goodput_is_the_best():
    needs = Needs(*np.array([(97, 0, 0, 0)] * 64, np.int32).T)
    advices = advise(needs, [Budget(length, 1, 1, 16) for length in (150, 420, 820, 1200)], Costs(1, 1, 0))
    assert best(advices).budget.seq_length == 820
    assert best([]) is None


def test_histograms_count_every_value():
    rows = histogram(np.array([5, 5, 6, 40]), 4)
    assert sum(count for _, _, count in rows) == 4
    assert rows[0] == (5, 13, 3) and rows[-1][0] <= 40 <= rows[-1][1]


def test_the_samples_of_a_mixture_are_drawn_by_weight():
    needs = Needs(*np.array([(10, 0, 0, i % 2) for i in range(40)], np.int32).T, ("a", "b"))
    few = drawn(needs, {"weights": {"a": 3, "b": 1}, "samples_per_epoch": 400})
    assert len(few) == 400
    assert abs(int((few.sources == 0).sum()) - 300) <= 3
    assert len(drawn(needs, None, samples=10)) == 10
    with pytest.raises(DataError, match="weight of the source b is 0"):
        drawn(needs, {"weights": [1, 0]})


def section(**fields) -> dict:
    return {**read_yaml(TINY)["train_dataset"], **fields}


def test_what_samples_need_is_what_training_measures():
    needs = measure(section())
    assert needs.names == (DEMO,)
    assert (len(needs), int(needs.positions.max()), sorted(set(needs.tiles.tolist()))) == (56, 119, [3, 5])
    assert set(needs.images.tolist()) == {1}
    with pytest.raises(DataError, match="it must have the type InternLM2Tokenizer and a vocab_file"):
        measure(section(tokenizer={"type": "BertTokenizer"}))


def run(*words: str) -> str:
    arguments = parse(["data", "plan", *words])
    arguments.answers = io.StringIO()
    assert data_command(arguments) == 0
    return arguments.answers.getvalue()


def test_data_plan_shows_histograms_goodput_and_the_best_budget():
    text = run(DEMO, "--config", TINY, "--global_batch", "90")
    assert text.startswith("56 samples of 1 source, 0 of them without a picture; mean 105 positions and 4.4 tiles.\n")
    for part in ("\npositions\n", "\ntiles\n", "goodput 72.2% unpacked", "rows without pictures", "  the recipe's",
                 "The best is seq_length ", "With runner_config.gradient_accumulation_steps ", "(90 are asked for)"):
        assert part in text
    assert sum(line.endswith("  best") for line in text.splitlines()) == 1


def test_data_plan_as_json_and_with_overrides():
    found = json.loads(run(DEMO, DEMO, "--config", TINY, "--json", "--train_dataset.seq_length", "400",
                           "--train_dataset.max_tiles", "16"))
    assert found["samples"] == 112
    assert sum(count for _, _, count in found["tiles"]) == 112
    assert found["recipe"]["budget"] == {"seq_length": 400, "max_tiles": 16, "max_images": 8, "max_segments": 32}
    assert found["recipe"]["mean_samples"] > 2
    assert found["samples_per_step"] == 4
    assert found["best"]["goodput"] >= max(row["goodput"] for row in found["tried"]) - 0.02


def test_a_step_keeps_its_samples():
    plan = make_data_plan(read_yaml(TINY), [DEMO], 200)
    assert plan.micro_batch == 4
    rows = plan.micro_batches(plan.best) * plan.micro_batch
    assert abs(rows * plan.best.mean_samples - 200) <= plan.micro_batch * plan.best.mean_samples / 2


@pytest.mark.parametrize(("words", "message"), [
    (["plan", DEMO], "needs --config"),
    (["plan", DEMO, "--config", TINY, "--global_batch", "0"], "--global_batch is 0; it must be a whole number"),
    (["plan", DEMO, "--config", str(ROOT / "yaml_configs" / "ixc25_dpo_tiny.yaml")], "preference pairs are not packed"),
    (["llava", "one.json"], "needs the published files, then the file to be written"),
    (["llava", "one.json", "two.json", "--json"], "belong to `mindformers data plan`")])
def test_what_data_plan_is_not_for_is_told(words, message):
    arguments = parse(["data", *words])
    arguments.answers = io.StringIO()
    with pytest.raises((ConfigError, DataError), match=message):
        data_command(arguments)
