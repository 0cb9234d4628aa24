"""Whether a YAML's parallel section fits a model and a number of devices; asked before anything is compiled."""
from __future__ import annotations

import os
from dataclasses import dataclass

from mindformers_ixc.config import ConfigError, IXC25Config
from mindformers_ixc.parallel.cuts import allowed_degrees, check_degree, check_stages

DEGREES = ("data_parallel", "model_parallel", "pipeline_stage", "micro_batch_num")


@dataclass(frozen=True)
class Layout:
    """How a step is spread over devices.

    Attributes:
        data_parallel: replicas that take different samples.
        model_parallel: tensor-parallel devices of a replica's stage.
        pipeline_stage: stages.
        micro_batch_num: micro batches of a pipelined step.
    """

    data_parallel: int = 1
    model_parallel: int = 1
    pipeline_stage: int = 1
    micro_batch_num: int = 1

    @property
    def devices(self) -> int:
        """Devices it takes."""
        return self.data_parallel * self.model_parallel * self.pipeline_stage

    def __str__(self) -> str:
        return f"dp {self.data_parallel} x tp {self.model_parallel} x pp {self.pipeline_stage}"


def layout_of(fields: dict) -> Layout:
    """The layout of a YAML's `parallel_config`.

    Raises:
        ConfigError: for a degree that is no positive number.
    """
    section = fields.get("parallel_config") or {}
    values = {name: 1 if section.get(name) is None else section[name] for name in DEGREES}
    for name, value in values.items():
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ConfigError(f"parallel_config.{name} is {value!r}; it must be a whole number of at least 1.")
    return Layout(**values)


def check_layout(config: IXC25Config, layout: Layout, devices: int | None = None) -> None:
    """Refuses a layout that a model or a cluster cannot have.

    Args:
        config: sizes of the model.
        layout: of the run.
        devices: of the cluster; not compared if unknown.

    Raises:
        ConfigError: naming the values found and those that work.
    """
    check_degree(config, layout.model_parallel)
    check_stages(config, layout.pipeline_stage)
    if layout.pipeline_stage > 1 and layout.micro_batch_num < layout.pipeline_stage:
        raise ConfigError(
            f"parallel_config.micro_batch_num is {layout.micro_batch_num}, fewer than the {layout.pipeline_stage} "
            f"stages, so some would never have work; choose {layout.pipeline_stage} or more.")
    if devices is not None and layout.devices != devices:
        raise ConfigError(
            f"{layout} are {layout.devices} devices, but there are {devices}. The degrees that fill them: "
            f"{_suggestions(config, devices)}.")


def check_run(fields: dict, devices: int | None = None) -> None:
    """Checks the layout of a YAML's fields, if they are of this package's model.

    Args:
        fields: of the YAML, overrides applied.
        devices: of the cluster; by default what msrun says, where it started this process.

    Raises:
        ConfigError: see `check_layout`.
    """
    section = (fields.get("model") or {}).get("model_config") or {}
    if section.get("type") != "IXC25Config" or not fields.get("use_parallel"):
        return
    if devices is None and os.environ.get("MS_WORKER_NUM", "").isdigit():
        devices = int(os.environ["MS_WORKER_NUM"])
    config = IXC25Config(**{key: value for key, value in section.items() if key != "type"})
    check_layout(config, layout_of(fields), devices)


def check_global_batch(layout: Layout, global_batch: int) -> None:
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


def layouts_for(config: IXC25Config, devices: int) -> list[Layout]:
    """Every layout that fills a number of devices, tensor parallel first; micro batches as many as stages."""
    found = []
    for tensor in reversed(allowed_degrees(config)):
        if devices % tensor:
            continue
        for stages in range(1, min(devices // tensor, config.num_hidden_layers) + 1):
            if devices // tensor % stages == 0:
                found.append(Layout(devices // tensor // stages, tensor, stages, stages))
    return found


def _suggestions(config: IXC25Config, devices: int) -> str:
    shown = [str(layout) for layout in layouts_for(config, devices)]
    return "; ".join(shown[:6]) + (f" and {len(shown) - 6} more" if len(shown) > 6 else "") if shown else "none"
