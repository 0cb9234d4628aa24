"""What rows hold and what a step is worth: means counted by hand, days, and the command with data and without."""
from __future__ import annotations

import dataclasses
import json
from types import SimpleNamespace

import numpy as np
import pytest
from planned import recipe
from test_plan import SFT, run

from mindformers_ixc.config import ModelConfig
from mindformers_ixc.data.advice import Needs
from mindformers_ixc.data.batch import BATCH_COLUMNS, PACKING_COLUMNS
from mindformers_ixc.errors import ConfigError, DataError
from mindformers_ixc.operations import training_costs
from mindformers_ixc.planning import rows as rows_module
from mindformers_ixc.planning.cost import Assumptions, step_time
from mindformers_ixc.planning.rows import RowMeans, describe_rows, read_rows, steps_of_run, usage
from mindformers_ixc.planning.workload import local_parameters, place, read_workload

POSITIONS, TILES, IMAGES = (np.array(column) for column in ([3000, 1000, 2000, 9000], [7, 0, 5, 30], [1, 0, 1, 1]))
WORDS = ["--config", str(SFT), "--devices", "8", "--no_compile", "--runner_config.gradient_accumulation_steps", "32"]
SHAPE = {"seq_length": 8192, "max_tiles": 19, "max_images": 9}
for name, value in {**SHAPE, "packing": False}.items():
    WORDS += [f"--model.model_config.{name}", str(value), f"--train_dataset.{name}", str(value)]
WORDS += ["--train_dataset.input_columns", f"[{', '.join(BATCH_COLUMNS)}]"]
PACKING = ["--model.model_config.packing", "True", "--train_dataset.packing", "True", "--train_dataset.input_columns",
           f"[{', '.join((*BATCH_COLUMNS, *PACKING_COLUMNS))}]"]


@pytest.fixture
def data(monkeypatch):
    """Four samples, the last of which fits no row; all others are packed into one. The sections that were measured."""
    asked = []

    def measure(section):
        asked.append(section)
        return Needs(POSITIONS, TILES, IMAGES, np.zeros(4, int))

    def pack(positions, tiles, images, seed, *, seq_length, max_tiles, max_images, max_segments):
        assert (positions.sum(), tiles.sum(), images.sum()) == (6000, 12, 2)
        assert (seq_length, max_tiles, max_images, max_segments) == (8192, 19, 9, 32)
        return SimpleNamespace(lists=lambda: iter([[2, 0, 1]]))

    monkeypatch.setattr(rows_module, "measure", measure)
    monkeypatch.setattr(rows_module, "drawn", lambda needs, mixture, seed: needs)
    monkeypatch.setattr(rows_module, "pack", pack)
    return asked


def test_means_over_rows():
    found = describe_rows(POSITIONS, TILES, [[0, 1], [2]], 8192)
    assert found == RowMeans(1.5, 3000.0, 6.0, (3000 ** 2 + 1000 ** 2 + 4192 ** 2 + 2000 ** 2 + 6192 ** 2) / 2, 2, 3, 1)


def test_rows_of_a_recipe(data):
    unpacked = read_rows({}, ModelConfig(seq_length=8192, max_tiles=19))
    assert (unpacked.samples, unpacked.rows, unpacked.total, unpacked.left_out) == (1.0, 3, 3, 1)
    packed = read_rows({"seed": 3}, ModelConfig(seq_length=8192, max_tiles=19, packing=True))
    assert (packed.samples, packed.positions, packed.tiles, packed.rows) == (3.0, 6000.0, 12.0, 1)
    assert packed.squares == 3000 ** 2 + 1000 ** 2 + 2000 ** 2 + 2192 ** 2


def test_an_epoch_may_draw_more_samples_than_were_measured(data):
    found = read_rows({"data_loader": {"mixture": {"samples_per_epoch": 4000}}}, ModelConfig(seq_length=8192))
    assert (found.samples, found.rows, found.total, found.left_out) == (1.0, 3000, 3000, 1000)


def test_data_of_which_nothing_fits_are_refused(data):
    with pytest.raises(DataError, match="None of the 4 samples fits a row of seq_length 512"):
        read_rows({}, ModelConfig(seq_length=512, max_tiles=19))


def test_a_step_is_worth_its_real_samples():
    config = ModelConfig(seq_length=8192, max_tiles=19, packing=True)
    costs, means = training_costs(config), RowMeans(3.0, 6000.0, 12.0)
    found = usage(config, None, means, 64, 50.0, 4000)
    assert found.goodput == pytest.approx(costs.of(6000, 12) / costs.of(8192, 19))
    assert (found.samples, found.samples_per_second) == (192, 3.84)
    assert found.days == pytest.approx(4000 * 50 / 86400)
    assert usage(config, None, None, 64, 50.0, None) == rows_module.Usage(None, None, None, None, None)
    assert usage(ModelConfig(), None, None, 64, 50.0, None).samples_per_second == 1.28


def test_steps_are_the_epochs_of_the_recipe():
    fields = {"runner_config": {"epochs": 3}}
    means = RowMeans(3.0, total=3000, rows=1000)
    assert steps_of_run(fields, means, 64) == 3 * (1000 // 64)
    with pytest.raises(ConfigError, match="An epoch of the data has 3000 samples, fewer than a step of 6000"):
        steps_of_run(fields, means, 2000)


def test_the_command_reports_the_data(data, capfd):
    code, text, _ = run(capfd, *WORDS, *PACKING, "--data", "data.txt", "--steps", "4000")
    assert code == 0 and data[0]["data_loader"]["dataset_dir"] == "data.txt"
    assert max(map(len, text.splitlines())) <= 120
    assert "32 micro batches of 1 row, global batch 64" in text
    assert "3 samples in 1 rows; 1 do not fit: 3.00 samples, 6,000 of 8,192 positions and 12.0 of 19 tiles a" in text
    lines = [line for line in text.splitlines() if "useful samples a second" in line or "days" in line]
    assert lines[0].startswith("192 samples a step, ") and "; goodput " in lines[0]
    assert lines[1].startswith("4,000 steps take ")
    found = json.loads(run(capfd, *WORDS, *PACKING, "--data", "data.txt", "--steps", "4000", "--json")[1])
    assert found["usage"]["samples_per_second"] == pytest.approx(192 / found["time"]["total"])
    assert found["rows"]["samples"] == 3 and 0 < found["usage"]["goodput"] < 1


def test_useful_samples_are_said_only_where_they_are_known(capfd):
    def said(*words):
        return json.loads(run(capfd, *WORDS, "--json", *words)[1])["usage"]

    assert said()["samples"] == 64
    assert said(*PACKING)["samples"] is None
    assert said(*PACKING, "--mean_samples", "2.5")["samples"] == 160
    assert "useful" not in run(capfd, *WORDS, *PACKING)[1]


@pytest.mark.parametrize(("words", "sentence"), [
    (["--mean_samples", "3"], "model.model_config.packing is False, so a row is one sample"),
    ([*PACKING, "--mean_samples", "0.5"], "--mean_samples is 0.5; it must be a number from 1 to max_segments 32"),
    ([*PACKING, "--mean_samples", "nan"], "--mean_samples is nan"),
    ([*PACKING, "--mean_samples", "3", "--data", "x.json"], "--mean_samples and --data both say"),
    (["--steps", "0"], "--steps is 0; it must be a whole number of at least 1"),
    (["--device_tflops", "-1"], "device_tflops is -1; it must be the peak of a device"),
])
def test_bad_words_are_refused(capfd, words, sentence):
    with pytest.raises(ConfigError) as error:
        run(capfd, *WORDS, *words)
    assert sentence in str(error.value)


def test_data_of_preference_pairs_are_not_measured(capfd):
    words = ["--config", str(SFT.with_name("ixc25_dpo.yaml")), *WORDS[2:], "--data", "x.json"]
    with pytest.raises(ConfigError, match="--data is given with a recipe for preference pairs"):
        run(capfd, *words)


def test_the_peak_of_the_recipe_is_that_of_the_plan(capfd):
    found = json.loads(run(capfd, *WORDS, "--json", "--device_tflops", "160")[1])
    assert found["assumptions"]["tflops"] == 160
    found = json.loads(run(capfd, *WORDS, "--json", "--device_tflops", "160", "--tflops", "200")[1])
    assert found["assumptions"]["tflops"] == 200


def test_losses_without_a_reference_compute_none():
    for loss, computed in (("sigmoid", True), ("simpo", False), ("orpo", False)):
        fields = recipe("dpo", model__model_config__preference={"task": "dpo", "loss": loss})
        assert read_workload(fields).reference == computed


def test_the_time_of_a_step_falls_with_the_squares():
    fields = recipe("sft", model__model_config__use_flash_attention=True, model__model_config__packing=True)
    whole = place(read_workload(fields), 8)
    short = dataclasses.replace(whole, rows=RowMeans(10.0))
    seconds = [step_time(placed, Assumptions(), local_parameters(placed)).compute for placed in (short, whole)]
    assert seconds[0] < 0.97 * seconds[1]
