"""Into how many parts a run's devices share the work: the degrees of a YAML's `parallel_config`."""
from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from mindformers_ixc.errors import ConfigError
from mindformers_ixc.sections import check_values, whole

DEGREES = ("data_parallel", "model_parallel", "pipeline_stage", "micro_batch_num")


@dataclass(frozen=True)
class Degrees:
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
        """Devices that the layout takes: the product of its degrees."""
        return self.data_parallel * self.model_parallel * self.pipeline_stage

    def __str__(self) -> str:
        return f"dp {self.data_parallel} x tp {self.model_parallel} x pp {self.pipeline_stage}"


def degrees_of(fields: dict) -> Degrees:
    """The degrees of a YAML's `parallel_config`.

    Raises:
        ConfigError: for a degree that is no positive number.
    """
    section = fields.get("parallel_config") or {}
    check_values(section, dict.fromkeys(DEGREES, whole(1)), "parallel_config")
    return Degrees(**{name: section[name] for name in DEGREES if section.get(name) is not None})


class HasDegrees(Protocol):
    """What has the degrees of a layout: `Degrees`, or a model's parallel configuration."""

    @property
    def data_parallel(self) -> int:
        """Replicas that take different samples."""

    @property
    def model_parallel(self) -> int:
        """Tensor-parallel devices of a replica's stage."""

    @property
    def pipeline_stage(self) -> int:
        """Stages."""


def are_replicas(degrees: HasDegrees) -> bool:
    """Whether the devices of a run that answers have a whole model each, and a share of the requests."""
    return degrees.data_parallel > 1 and degrees.model_parallel * degrees.pipeline_stage == 1


def inference_layout(degrees: HasDegrees) -> dict:
    """The `parallel_config` of a model that answers, from that of a run.

    Args:
        degrees: of the run.

    Raises:
        ConfigError: for replicas of several devices.
    """
    replicas, each = degrees.data_parallel, degrees.model_parallel * degrees.pipeline_stage
    if replicas != 1:
        raise ConfigError(
            f"parallel_config.data_parallel is {replicas} and each replica has {each} devices, but in run_mode predict "
            "replicas are of one device, or one is of all devices. Set data_parallel to 1, or model_parallel and "
            "pipeline_stage; with more devices than one replica needs split the request file over several runs.")
    # a decoded position cannot be cut, so the positions between the linears are whole, whatever training does
    return {"data_parallel": 1, "model_parallel": degrees.model_parallel,
            "pipeline_stage": degrees.pipeline_stage, "vocab_emb_dp": False, "use_seq_parallel": False}
