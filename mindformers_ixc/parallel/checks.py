"""Whether a YAML's parallel section fits a model and a number of devices; asked before anything is compiled."""
from __future__ import annotations

import os
from dataclasses import replace

from mindformers_ixc.config import ModelConfig, read_config
from mindformers_ixc.data.batch import BATCH_COLUMNS, column_ranks
from mindformers_ixc.errors import ConfigError
from mindformers_ixc.parallel.cuts import allowed_degrees, check_degree, check_stages
from mindformers_ixc.parallel.degrees import Degrees, are_replicas, degrees_of, inference_layout
from mindformers_ixc.parallel.stages import stages_of_layers

# MindFormers' `parallel.parallel_mode`, by number and by name: those in which its compiler cuts the graph, and those in
# which every device has a whole model and only gradients travel.
GRAPH_MODES = (1, 2, "SEMI_AUTO_PARALLEL", "AUTO_PARALLEL")
DATA_MODES = (0, 3, "DATA_PARALLEL", "HYBRID_PARALLEL")

# Degrees of MindFormers that this model's cells do not have, and where they stand.
ABSENT_DEGREES = {"context_parallel": "parallel_config.", "expert_parallel": "parallel_config.",
                  "seq_split_num": "parallel_config.", "micro_batch_interleave_num": ""}

# MindFormers' defaults of the section `parallel`, where the file says nothing.
DEFAULTS = {"parallel_mode": 1, "full_batch": True, "gradients_mean": False}

# How launchers tell a process the number of processes: msrun, rank tables, mpirun.
SIZE_VARIABLES = ("MS_WORKER_NUM", "RANK_SIZE", "OMPI_COMM_WORLD_SIZE")


def check_possible(config: ModelConfig, layout: Degrees, devices: int | None = None, replicas: bool = True) -> None:
    """Refuses a layout that a model or a cluster cannot have.

    Args:
        config: sizes of the model.
        layout: of the run.
        devices: of the cluster; not compared if unknown.
        replicas: whether data parallel is to be among the suggestions.

    Raises:
        ConfigError: naming the values found and those that work.
    """
    check_degree(config, layout.model_parallel)
    check_stages(config, layout.pipeline_stage)
    if layout.pipeline_stage > 1 and layout.micro_batch_num < layout.pipeline_stage:
        raise ConfigError(
            f"parallel_config.micro_batch_num is {layout.micro_batch_num}, fewer than the {layout.pipeline_stage} "
            f"stages, so some would never have work; choose {layout.pipeline_stage} or more.")
    if layout.pipeline_stage > 1:
        stages_of_layers(config, layout.pipeline_stage)
    tensor = layout.model_parallel
    if config.parallel_config.use_seq_parallel and config.seq_length % tensor:
        below = config.seq_length // tensor * tensor
        near = f"{below} or {below + tensor}" if below else tensor
        raise ConfigError(
            f"parallel_config.use_seq_parallel is True, but seq_length {config.seq_length} does not divide into the "
            f"{tensor} parts of tensor parallel; choose a multiple of {tensor}, such as {near}, or set it to False.")
    if devices is not None and layout.devices != devices:
        raise ConfigError(
            f"{layout} are {layout.devices} devices, but there are {devices}. The degrees that fill them: "
            f"{_suggestions(config, devices, replicas)}.")


def check_run(fields: dict, devices: int | None = None) -> None:
    """Checks the parallel sections of a YAML's fields, if they are of this package's model.

    Args:
        fields: of the YAML, overrides applied.
        devices: of the cluster; by default what the launcher that started this process says.

    Raises:
        ConfigError: see `check_possible`; also for a mode, a degree or a way to read batches that does not go with
            them, and for a process that is alone.
    """
    section = (fields.get("model") or {}).get("model_config") or {}
    if section.get("type") != "IXC25Config" or not fields.get("use_parallel"):
        return
    devices = _devices_here() if devices is None else devices
    if devices == 1:
        raise ConfigError("use_parallel is True, but there is a single device; run it with `mindformers run "
                          "--use_parallel False`, or give `mindformers launch` more devices.")
    layout = degrees_of(fields)
    for name, where in ABSENT_DEGREES.items():
        value = ((fields.get("parallel_config") or {}) if where else fields).get(name)
        if value not in (None, 1):
            raise ConfigError(f"{where}{name} is {value!r}, which this model does not have; the only choice is 1. It "
                              "has data_parallel, model_parallel and pipeline_stage.")
    parallel = {**DEFAULTS, **(fields.get("parallel") or {})}
    mode = parallel["parallel_mode"]
    if isinstance(mode, bool) or mode not in (*GRAPH_MODES, *DATA_MODES):
        raise ConfigError(f"parallel.parallel_mode is {mode!r}; the choices are 0 (data parallel), 1 (semi-auto "
                          "parallel), 2 (auto parallel, here the same as 1) and 3 (hybrid, here the same as 0).")
    if fields.get("run_mode") == "predict":
        _check_inference(fields, mode, layout, devices)
        return
    if mode in DATA_MODES:
        _check_data_mode(parallel, layout, devices)
        return
    sequence = bool((fields.get("parallel_config") or {}).get("use_seq_parallel"))
    sizes = {key: value for key, value in section.items() if key != "type"}
    config = ModelConfig(**{**sizes, "parallel_config": {"use_seq_parallel": sequence}})
    check_possible(config, layout, devices)
    _check_batches(fields, parallel, layout)


def _check_inference(fields: dict, mode: int | str, layout: Degrees, devices: int) -> None:
    """Checks a run that answers; the model is that of the directory."""
    if mode in DATA_MODES:
        raise ConfigError(f"parallel.parallel_mode is {mode!r}, in which every device would have a whole model and "
                          "give the same answers; set it to 1 (semi-auto parallel), and parallel_config.data_parallel "
                          "to the number of devices where each is to answer a share.")
    section = fields["model"]["model_config"]
    replicated = are_replicas(layout)
    parallel_config = inference_layout(Degrees() if replicated else layout)
    placed = {key: section[key] for key in ("vision_parallel", "offset") if key in section}
    config = read_config(fields["load_checkpoint"], parallel_config=parallel_config, **placed)
    check_possible(config, replace(layout, micro_batch_num=layout.pipeline_stage), devices, replicas=replicated)


def _devices_here() -> int:
    for name in SIZE_VARIABLES:
        if os.environ.get(name, "").isdigit():
            return int(os.environ[name])
    raise ConfigError("use_parallel is True, but this process is alone: no launcher says how many devices there are. "
                      "Start it with `mindformers launch -n DEVICES` instead of `mindformers run`, or set use_parallel "
                      "to False.")


def _check_data_mode(parallel: dict, layout: Degrees, devices: int) -> None:
    """Checks a run in which every device has a whole model; MindFormers takes no notice of the layout then."""
    if layout.model_parallel * layout.pipeline_stage > 1 or layout.data_parallel != devices:
        raise ConfigError(
            f"parallel.parallel_mode is {parallel['parallel_mode']!r}, in which each of the {devices} devices trains a "
            f"whole model on samples of its own, but parallel_config has {layout}; set data_parallel to {devices} and "
            "the others to 1, or parallel_mode to 1 (semi-auto parallel).")
    if not parallel["gradients_mean"]:
        raise ConfigError(
            f"parallel.gradients_mean is False, so in parallel_mode {parallel['parallel_mode']!r} the gradients would "
            f"be {devices} times those of the batch; set it to True.")


def _check_batches(fields: dict, parallel: dict, layout: Degrees) -> None:
    """Checks how batches are read and averaged in a run whose graph is cut."""
    if parallel["gradients_mean"]:
        # measured: half the gradient norm with dp 2, three quarters with tp 2
        raise ConfigError(
            f"parallel.gradients_mean is True, but in parallel_mode {parallel['parallel_mode']!r} the loss is the mean "
            "over all devices already, so gradients that devices sum up would be divided once more and be too small; "
            "set it to False.")
    accumulated = (fields.get("runner_config") or {}).get("gradient_accumulation_steps") or 1
    if accumulated > 1 and layout.pipeline_stage > 1:
        raise ConfigError(
            f"runner_config.gradient_accumulation_steps is {accumulated}, which MindFormers takes no notice of with "
            f"pipeline stages; set it to 1 and parallel_config.micro_batch_num to "
            f"{accumulated * layout.micro_batch_num} for the same batch.")
    if parallel["full_batch"]:
        return
    strategy = parallel.get("dataset_strategy")
    if strategy is None:
        return      # `complete_parallel` derives it
    columns = (fields.get("train_dataset") or {}).get("input_columns")
    if not isinstance(strategy, (list, tuple)) or not strategy or not all(
            isinstance(cut, (list, tuple)) and list(cut[:1]) == [layout.data_parallel] for cut in strategy):
        raise ConfigError(
            f"parallel.full_batch is False and parallel.dataset_strategy is {strategy!r}; leave it out, or give one "
            f"list for each column, which begins with data_parallel ({layout.data_parallel}) and goes on with ones.")
    if columns and len(strategy) != len(columns):
        raise ConfigError(f"parallel.dataset_strategy has {len(strategy)} lists, but train_dataset.input_columns has "
                          f"{len(columns)} columns; give one list for each.")


def complete_parallel(fields: dict) -> None:
    """Says of every column how it is cut, in a run in which each replica reads its own samples and nobody said it.

    Args:
        fields: of the YAML, checked; `parallel.dataset_strategy` is put in.
    """
    parallel = {**DEFAULTS, **(fields.get("parallel") or {})}
    section = (fields.get("model") or {}).get("model_config") or {}
    if (section.get("type") != "IXC25Config" or not fields.get("use_parallel") or fields.get("run_mode") == "predict"
            or parallel["parallel_mode"] not in GRAPH_MODES or parallel["full_batch"]
            or parallel.get("dataset_strategy") is not None):
        return
    columns = (fields.get("train_dataset") or {}).get("input_columns") or BATCH_COLUMNS
    pairs = (fields.get("train_dataset_task") or {}).get("type") == "IXC25PreferenceDataset"
    replicas = degrees_of(fields).data_parallel
    fields["parallel"]["dataset_strategy"] = [[replicas] + [1] * (rank - 1) for rank in column_ranks(columns, pairs)]


def check_global_batch(layout: Degrees, global_batch: int) -> None:
    """Refuses a global batch that replicas and micro batches do not divide.

    Raises:
        ConfigError: naming the numbers.
    """
    parts = layout.data_parallel * layout.micro_batch_num
    if global_batch % parts:
        below = global_batch // parts * parts
        near = f"{below} or {below + parts}" if below else parts
        raise ConfigError(f"A global batch of {global_batch} does not divide into {layout.data_parallel} replicas with "
                          f"{layout.micro_batch_num} micro batches each; choose a multiple of {parts}, such as {near}.")


def layouts_for(config: ModelConfig, devices: int) -> list[Degrees]:
    """Every allowed layout that fills a number of devices, tensor parallel first; micro batches as many as stages."""
    found = []
    for tensor in reversed(allowed_degrees(config)):
        if devices % tensor:
            continue
        for stages in range(1, min(devices // tensor, config.num_hidden_layers) + 1):
            if devices // tensor % stages == 0:
                found.append(Degrees(devices // tensor // stages, tensor, stages, stages))
    return [layout for layout in found if _is_allowed(config, layout)]


def _is_allowed(config: ModelConfig, layout: Degrees) -> bool:
    try:
        check_possible(config, layout)     # an offset or the length of a sequence may exclude some
    except ConfigError:
        return False
    return True


def _suggestions(config: ModelConfig, devices: int, replicas: bool) -> str:
    shown = [str(layout) for layout in layouts_for(config, devices) if replicas or layout.data_parallel == 1]
    return "; ".join(shown[:6]) + (f" and {len(shown) - 6} more" if len(shown) > 6 else "") if shown else "none"
