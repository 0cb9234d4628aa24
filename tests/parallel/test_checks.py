"""Layouts and parallel sections that cannot work are refused, with what would, before anything starts."""
from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import mindformers_ixc_cli
from mindformers_ixc import ConfigError, IXC25Config
from mindformers_ixc.cli import job
from mindformers_ixc.cli import launch as launching
from mindformers_ixc.cli import run as running
from mindformers_ixc.cli.yaml_file import apply_overrides, read_yaml
from mindformers_ixc.data.batch import BATCH_COLUMNS, EXTRA_COLUMNS, column_ranks
from mindformers_ixc.parallel.checks import (
    SIZE_VARIABLES,
    check_global_batch,
    check_possible,
    check_run,
    complete_parallel,
    layouts_for,
)
from mindformers_ixc.parallel.degrees import DEGREES, Degrees, degrees_of

YAMLS = Path(__file__).parents[2] / "yaml_configs"
TINY = YAMLS / "ixc25_sft_tiny.yaml"
PARALLEL = {"use_parallel": True, "parallel.parallel_mode": 1, "parallel.full_batch": True,
            "parallel.gradients_mean": False}
PUBLIC = IXC25Config()

# What is refused on so many devices, and the words of the sentence: of the tiny YAML, whose model has 4 layers and 4
# key/value groups, 4 vision heads.
REFUSED = [
    # degrees
    ({"parallel_config.model_parallel": 2}, 4, "dp 1 x tp 2 x pp 1 are 2 devices, but there are 4. The degrees that "
     r"fill them: dp 1 x tp 4 x pp 1; dp 2 x tp 2 x pp 1; dp 1 x tp 2 x pp 2"),
    ({"parallel_config.model_parallel": 3}, 3, r"Tensor parallel 3 does not divide .*4 key/value groups.* 1, 2, 4\.$"),
    ({"parallel_config.model_parallel": 8}, 8, r"Tensor parallel 8 does not divide .*4 vision heads.* 1, 2, 4\.$"),
    ({"parallel_config.pipeline_stage": 8, "parallel_config.micro_batch_num": 8}, 8, r"has 4, so choose 1 to 4\.$"),
    ({"parallel_config.pipeline_stage": 4, "parallel_config.micro_batch_num": 3}, 4,
     r"micro_batch_num is 3, fewer than the 4 stages, .*; choose 4 or more\.$"),
    ({"parallel_config.data_parallel": 0}, 2, "data_parallel is 0; it must be a whole number of at least 1"),
    ({"parallel_config.model_parallel": -2}, 2, "model_parallel is -2; it must be a whole number"),
    ({"parallel_config.context_parallel": 2}, 2, "parallel_config.context_parallel is 2, .* the only choice is 1"),
    ({"parallel_config.expert_parallel": 2}, 2, "parallel_config.expert_parallel is 2, .* the only choice is 1"),
    ({"parallel_config.seq_split_num": 2}, 2, "parallel_config.seq_split_num is 2, .* the only choice is 1"),
    ({"micro_batch_interleave_num": 2}, 2, "^micro_batch_interleave_num is 2, .* the only choice is 1"),
    # answering
    ({"run_mode": "predict", "parallel_config.data_parallel": 2, "parallel_config.model_parallel": 2}, 4,
     "data_parallel is 2 and each replica has 2 devices, but in run_mode predict replicas are of one device"),
    ({"run_mode": "predict", "load_checkpoint": "starter", "parallel_config.data_parallel": 2}, 3,
     "dp 2 x tp 1 x pp 1 are 2 devices, but there are 3"),
    ({"run_mode": "predict", "parallel.parallel_mode": 0}, 2, "is 0, in which every device would have a whole model"),
    # modes
    ({"parallel.parallel_mode": 4, "parallel_config.data_parallel": 2}, 2, r"parallel_mode is 4; the choices are 0 "),
    ({"parallel.parallel_mode": "STAND_ALONE", "parallel_config.data_parallel": 2}, 2, "is 'STAND_ALONE'; the choices"),
    ({"parallel.parallel_mode": 0, "parallel_config.model_parallel": 2}, 2,
     r"each of the 2 devices trains a whole model .* has dp 1 x tp 2 x pp 1; set data_parallel to 2 and"),
    ({"parallel.parallel_mode": 0, "parallel_config.data_parallel": 2, "parallel_config.model_parallel": 2}, 2,
     "has dp 2 x tp 2 x pp 1; set data_parallel to 2 and the others to 1"),
    ({"parallel.parallel_mode": 0, "parallel_config.data_parallel": 2}, 4, "set data_parallel to 4"),
    ({"parallel.parallel_mode": 0, "parallel_config.data_parallel": 2}, 2,
     "gradients_mean is False, so in parallel_mode 0 the gradients would be 2 times .* set it to True"),
    *(({"parallel.gradients_mean": True, f"parallel_config.{degree}": 2, "parallel_config.micro_batch_num": 2}, 2,
       "gradients_mean is True, .* divided once more and be too small; set it to False")
      for degree in ("data_parallel", "model_parallel", "pipeline_stage")),
    # batches
    ({"runner_config.gradient_accumulation_steps": 3, "parallel_config.pipeline_stage": 2,
      "parallel_config.micro_batch_num": 2}, 2, "set it to 1 and parallel_config.micro_batch_num to 6 for the same"),
    ({"parallel.full_batch": False, "parallel_config.data_parallel": 2, "parallel.dataset_strategy": [[1, 1]] * 9}, 2,
     r"dataset_strategy is \[\[1, 1\], .*data_parallel \(2\)"),
    ({"parallel.full_batch": False, "parallel_config.data_parallel": 2, "parallel.dataset_strategy": [[2, 1], [1, 1]]},
     2, r"dataset_strategy is \[\[2, 1\], \[1, 1\]\];"),
    ({"parallel.full_batch": False, "parallel_config.data_parallel": 2, "parallel.dataset_strategy": [[2, 1]]}, 2,
     "dataset_strategy has 1 lists, but train_dataset.input_columns has 9 columns"),
    ({"parallel_config.use_seq_parallel": True, "parallel_config.model_parallel": 4, "train_dataset.seq_length": 158,
      "model.model_config.seq_length": 158}, 4, "seq_length 158 does not divide into the 4 .* such as 156 or 160"),
    # no devices
    ({}, 1, "there is a single device; run it with `mindformers run --use_parallel False`"),
]


def fields_of(options: dict) -> dict:
    fields = read_yaml(TINY)
    apply_overrides(fields, {**PARALLEL, **options})
    return fields


def arguments_of(command: str, out: Path, options: dict, *words):
    return mindformers_ixc_cli.parse(
        [command, *words, "--config", str(TINY), "--output_dir", str(out),
         *(word for key, value in options.items() for word in (f"--{key}", str(value)))])


@pytest.fixture
def nothing_starts(monkeypatch):
    """Fails a test in which a process or a training would start; no launcher has started this process."""
    def refuse(*_, **__):
        raise AssertionError("something was started")

    monkeypatch.setattr(job.subprocess, "Popen", refuse)
    monkeypatch.setattr(running, "_run_trainer", refuse)
    for name in SIZE_VARIABLES:
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize(("options", "devices", "message"), REFUSED)
def test_launch_refuses_before_anything_is_started_or_written(tmp_path, nothing_starts, options, devices, message):
    arguments = arguments_of("launch", tmp_path / "out", {**PARALLEL, **options}, "-n", str(devices))
    with pytest.raises(ConfigError, match=message):
        launching.launch(arguments)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("options", "devices", "message"), REFUSED)
def test_run_refuses_under_a_launcher(tmp_path, nothing_starts, monkeypatch, options, devices, message):
    monkeypatch.setenv("MS_WORKER_NUM", str(devices))
    with pytest.raises(ConfigError, match=message):
        running.run(arguments_of("run", tmp_path / "out", {**PARALLEL, **options}))
    assert not list(tmp_path.iterdir())


def test_a_run_that_is_alone_is_told_how_to_start(tmp_path, nothing_starts):
    with pytest.raises(ConfigError, match=r"this process is alone.* Start it with `mindformers launch -n DEVICES`"):
        running.run(arguments_of("run", tmp_path / "out", PARALLEL))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["MS_WORKER_NUM", "RANK_SIZE", "OMPI_COMM_WORLD_SIZE"])
def test_every_launcher_is_understood(monkeypatch, nothing_starts, name):
    monkeypatch.setenv(name, "2")
    check_run(fields_of({"parallel_config.model_parallel": 2}))
    with pytest.raises(ConfigError, match="there are 2"):
        check_run(fields_of({"parallel_config.model_parallel": 4}))


@pytest.mark.parametrize(("options", "devices"), [
    ({"parallel_config.model_parallel": 2}, 2), ({"parallel_config.data_parallel": 2}, 2),
    ({"parallel_config.pipeline_stage": 2, "parallel_config.micro_batch_num": 2}, 2),
    ({"parallel_config.model_parallel": 2, "parallel_config.use_seq_parallel": True}, 2),
    ({"parallel_config.model_parallel": 2, "runner_config.gradient_accumulation_steps": 4}, 2),
    ({"parallel.parallel_mode": 2, "parallel_config.data_parallel": 2}, 2),
    ({"parallel.parallel_mode": "SEMI_AUTO_PARALLEL", "parallel_config.data_parallel": 2}, 2),
    ({"parallel.parallel_mode": 0, "parallel.gradients_mean": True, "parallel.full_batch": False,
      "parallel_config.data_parallel": 4}, 4),
    ({"parallel.parallel_mode": 3, "parallel.gradients_mean": True, "parallel_config.data_parallel": 4}, 4),
    ({"parallel_config.data_parallel": 2, "parallel.full_batch": False,
      "parallel.dataset_strategy": [[2, 1]] * 9}, 2),
    ({"parallel": None, "parallel_config.data_parallel": 2}, 2)])
def test_what_works_is_let_through(options, devices):
    check_run(fields_of(options), devices)


def test_a_run_that_answers_is_held_against_the_model_of_its_directory(goldens):
    fields = {"run_mode": "predict", "load_checkpoint": str(goldens / "t1")}       # 2 layers, 2 key/value groups
    for layout in ({"model_parallel": 2}, {"pipeline_stage": 2, "micro_batch_num": 1}):
        check_run(fields_of({**fields, **{f"parallel_config.{key}": value for key, value in layout.items()}}), 2)
    with pytest.raises(ConfigError, match=r"but there are 4. The degrees that fill them: dp 1 x tp 2 x pp 2\.$"):
        check_run(fields_of({**fields, "parallel_config.model_parallel": 2}), 4)
    with pytest.raises(ConfigError, match=r"Tensor parallel 4 does not divide .*2 key/value groups"):
        check_run(fields_of({**fields, "parallel_config.model_parallel": 4}), 4)


def test_a_run_without_use_parallel_or_of_another_model_is_not_looked_at():
    fields = fields_of({"use_parallel": False, "parallel_config.model_parallel": 7})
    check_run(fields, 2)
    fields = fields_of({"model.model_config.type": "LlamaConfig", "parallel_config.model_parallel": 7})
    check_run(fields, 2)


@pytest.mark.parametrize("path", sorted(YAMLS.glob("*ixc25*.yaml")), ids=lambda path: path.name)
def test_every_shipped_yaml_fits_the_devices_it_names(path):
    fields = read_yaml(path)
    check_run(fields, degrees_of(fields).devices)


def test_no_sequence_is_shorter_than_tensor_parallel():
    config = IXC25Config(seq_length=3, parallel_config={"use_seq_parallel": True})
    with pytest.raises(ConfigError, match="choose a multiple of 8, such as 8, or"):
        check_possible(config, Degrees(model_parallel=8))
    check_possible(IXC25Config(seq_length=3), Degrees(model_parallel=8))


def test_offsets_that_do_not_place_every_layer_are_refused():
    config = IXC25Config(offset=[1, 0])
    with pytest.raises(ConfigError, match=r"offset \[1, 0\] gives the 2 pipeline stages 17, 16 layers"):
        check_possible(config, Degrees(pipeline_stage=2, micro_batch_num=2))
    check_possible(config, Degrees())          # without stages nothing is placed


@pytest.mark.parametrize("name", DEGREES)
@pytest.mark.parametrize("value", [0, -1, 2.0, "2", True, [2]])
def test_a_degree_is_a_positive_whole_number(name, value):
    with pytest.raises(ConfigError, match=f"parallel_config.{name} is .*; it must be a whole number of at least 1"):
        degrees_of({"parallel_config": {name: value}})


def test_a_degree_that_is_not_given_is_one():
    assert degrees_of({}) == degrees_of({"parallel_config": {"model_parallel": None}}) == Degrees()
    assert degrees_of({"parallel_config": {"data_parallel": 2, "pipeline_stage": 3}}) == Degrees(2, 1, 3)


@given(st.integers(1, 64))
def test_layouts_fill_the_devices_and_are_allowed(devices):
    found = layouts_for(PUBLIC, devices)
    assert len(set(found)) == len(found)
    assert Degrees(devices, 1, 1, 1) in found
    for layout in found:
        assert layout.devices == devices
        check_possible(PUBLIC, layout, devices)


def test_layouts_that_an_offset_or_a_length_excludes_are_not_found():
    found = layouts_for(IXC25Config(offset=[1, -1], seq_length=4098, parallel_config={"use_seq_parallel": True}), 8)
    assert {layout.pipeline_stage for layout in found} == {1, 2}
    assert {layout.model_parallel for layout in found} == {1, 2}


@given(st.integers(1, 16), st.integers(1, 16), st.integers(1, 40), st.integers(0, 8))
def test_every_layout_that_is_allowed_is_found(data, tensor, stages, more):
    layout = Degrees(data, tensor, stages, stages + more)
    try:
        check_possible(PUBLIC, layout, layout.devices)
    except ConfigError:
        assert tensor not in (1, 2, 4, 8) or stages > PUBLIC.num_hidden_layers
        return
    assert Degrees(data, tensor, stages, stages) in layouts_for(PUBLIC, layout.devices)


def test_a_message_shows_a_few_layouts_and_how_many_more():
    with pytest.raises(ConfigError, match=r"dp 1 x tp 8 x pp 8; .* and \d+ more\.$"):
        check_possible(PUBLIC, Degrees(), 64)


@given(st.integers(1, 8), st.integers(1, 8), st.integers(1, 200))
def test_a_global_batch_divides_or_is_refused_with_its_neighbours(data, micro, batch):
    layout, parts = Degrees(data, 1, micro, micro), data * micro
    if batch % parts == 0:
        check_global_batch(layout, batch)
        return
    with pytest.raises(ConfigError) as refused:
        check_global_batch(layout, batch)
    below = batch // parts * parts
    near = f"such as {below} or {below + parts}." if below else f"such as {parts}."
    assert str(refused.value).startswith(f"A global batch of {batch} does not divide into {data} replicas")
    assert str(refused.value).endswith(f"choose a multiple of {parts}, {near}")


COLUMN_CUTS = {"input_ids": [2, 1], "labels": [2, 1], "pixel_values": [2, 1, 1, 1, 1],
               "global_views": [2, 1, 1, 1, 1], "view_index": [2, 1], "vision_index": [2, 1],
               "image_mask": [2, 1], "noise_seed": [2], "source": [2, 1], "position_ids": [2, 1]}
OWN_SAMPLES = {"parallel.full_batch": False, "parallel_config.data_parallel": 2}


@pytest.mark.parametrize("columns", [None, ["labels", "noise_seed", "pixel_values", "position_ids"]])
def test_how_columns_are_cut_is_derived(columns):
    fields = fields_of(OWN_SAMPLES)
    if columns:
        fields["train_dataset"]["input_columns"] = columns
    check_run(fields, 2)
    complete_parallel(fields)
    names = fields["train_dataset"]["input_columns"]
    assert fields["parallel"]["dataset_strategy"] == [COLUMN_CUTS[name] for name in names]


def test_answers_of_pairs_have_one_axis_more():
    fields = read_yaml(YAMLS / "ixc25_dpo_tiny.yaml")
    apply_overrides(fields, {**PARALLEL, **OWN_SAMPLES, "train_dataset.input_columns": [
        *BATCH_COLUMNS, "reference_logps"]})
    complete_parallel(fields)
    cuts = dict(zip(fields["train_dataset"]["input_columns"], fields["parallel"]["dataset_strategy"]))
    assert cuts["input_ids"] == cuts["labels"] == cuts["image_mask"] == [2, 1, 1]
    assert (cuts["pixel_values"], cuts["reference_logps"]) == ([2, 1, 1, 1, 1], [2, 1])


@pytest.mark.parametrize("options", [
    {"parallel.full_batch": True}, {"parallel.parallel_mode": 0}, {"use_parallel": False}, {"run_mode": "predict"},
    {"parallel.dataset_strategy": [[2, 1]] * 7}])
def test_nothing_is_derived_where_it_is_not_asked_for(options):
    fields = fields_of({**OWN_SAMPLES, **options})
    complete_parallel(fields)
    assert fields["parallel"].get("dataset_strategy") == options.get("parallel.dataset_strategy")


def test_every_column_has_a_rank():
    columns = [*BATCH_COLUMNS, *EXTRA_COLUMNS, "reference_logps"]
    assert column_ranks(columns) == [2, 2, 5, 5, 2, 2, 2, 2, 2, 1, 2, 2, 2, 2]
    assert column_ranks(columns, pairs=True) == [3, 3, 5, 5, 2, 3, 3, 2, 2, 1, 2, 2, 2, 2]
