"""PET types of this package: `partial_lora` and `task_lora`."""
from mindformers.pet.pet_model import PET_TYPE_TO_CONFIG_MAPPING, PET_TYPE_TO_MODEL_MAPPING
from mindpet.utils.constants import DELTA_LIST

from mindformers_ixc.pet.lora import (
    IXC25LoraModel,
    PartialLoRAModel,
    PartialLoRAPetConfig,
    TaskLoRAModel,
    TaskLoRAPetConfig,
)


def register_pet_types() -> None:
    """Adds the types to MindFormers' tables, so that `pet_config.pet_type` of a YAML file finds them."""
    for config, model in ((PartialLoRAPetConfig, PartialLoRAModel), (TaskLoRAPetConfig, TaskLoRAModel)):
        PET_TYPE_TO_CONFIG_MAPPING[config.pet_type_name] = config
        PET_TYPE_TO_MODEL_MAPPING[config.pet_type_name] = model
        if config.pet_type_name not in DELTA_LIST:   # MindPet freezes only for types it has heard of
            DELTA_LIST.append(config.pet_type_name)
    # MindFormers replaces cells of its own classes only, and says nothing when it finds none
    PET_TYPE_TO_MODEL_MAPPING["lora"] = IXC25LoraModel
