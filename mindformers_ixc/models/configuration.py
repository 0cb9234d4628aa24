"""The configurations as MindFormers' registry and Auto classes have them; fields and checks are `config`'s."""
from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mindformers.models.configuration_utils import PretrainedConfig
from mindformers.models.utils import convert_mstype
from mindformers.modules.transformer import TransformerOpParallelConfig
from mindformers.tools.register import MindFormerModuleType, MindFormerRegister

from mindformers_ixc.config import ModelConfig, VisionConfig
from mindformers_ixc.fields import ALIASES, DTYPE_FIELDS, FRAMEWORK_FIELDS


def _split(given: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """What MindFormers' base class takes, and the fields of the tables with whatever else a file held."""
    framework = {name: given[name] for name in FRAMEWORK_FIELDS if name in given}
    return framework, {name: value for name, value in given.items() if name not in framework}


class _Unkept:
    """MindFormers' dict of a configuration, without the note of which names came from a file."""

    def to_dict(self) -> dict[str, Any]:
        """MindFormers' `PretrainedConfig.to_dict`, without the note of which names a file had."""
        found = super().to_dict()        # type: ignore[misc]
        for name in ("_kept", "says_tasks"):
            found.pop(name, None)
        return found


@MindFormerRegister.register(MindFormerModuleType.CONFIG)
class IXC25VisionConfig(_Unkept, VisionConfig, PretrainedConfig):
    """`VisionConfig` as one of MindFormers' configurations.

    Args:
        **given: fields of `fields.VISION_FIELDS` and MindFormers' own.
    """

    def __init__(self, /, **given: Any):
        framework, own = _split(given)
        PretrainedConfig.__init__(self, **framework)
        VisionConfig.__init__(self, **own)


@MindFormerRegister.register(MindFormerModuleType.CONFIG)
class IXC25Config(_Unkept, ModelConfig, PretrainedConfig):
    """`ModelConfig` for MindFormers: dtypes are MindSpore's, `parallel_config` is MindFormers'.

    Args:
        **given: fields of `fields.FIELDS` and MindFormers' own.
    """

    attribute_map = ALIASES
    vision_class = IXC25VisionConfig

    def __init__(self, /, **given: Any):
        framework, own = _split(given)
        parallel = own.pop("parallel_config", None)
        PretrainedConfig.__init__(self, **framework)
        ModelConfig.__init__(self, **own)
        if parallel is None or isinstance(parallel, Mapping):
            parallel = TransformerOpParallelConfig(**(parallel or {}))
        self.parallel_config = parallel
        for name in DTYPE_FIELDS:
            setattr(self, name, convert_mstype(getattr(self, name)))
