"""Checks what a run's YAML says of GRPO: network, data set, rollout and what trains belong together."""
from __future__ import annotations

from mindformers_ixc.data.batch import BATCH_COLUMNS, GROUP_COLUMNS
from mindformers_ixc.errors import ConfigError
from mindformers_ixc.fields import MODE_ADAPTERS
from mindformers_ixc.grpo_options import grpo_options, rollout_options
from mindformers_ixc.parallel.checks import DEFAULTS, GRAPH_MODES
from mindformers_ixc.training_options import GROUP_NETWORK

DATASET = "IXC25GroupDataset"


def check_groups(fields: dict, source: str) -> None:
    """Checks a run that learns from rewards, and that another run names nothing of it.

    Args:
        fields: of the YAML, whose sections have been checked by themselves.
        source: name of the file, for the messages.

    Raises:
        ConfigError: one sentence naming the key, the value and what is wanted.
    """
    model, data = fields["model"], fields.get("train_dataset") or {}
    section, kind = model["model_config"], (fields.get("train_dataset_task") or {}).get("type")
    arch = (model.get("arch") or {}).get("type")
    if (arch == GROUP_NETWORK) != (kind == DATASET):
        raise ConfigError(f"{source}: model.arch.type is {arch!r}, but train_dataset_task.type is {kind!r}; {DATASET} "
                          f"belongs to {GROUP_NETWORK}, and it to that.")
    columns = data.get("input_columns") or ()
    if arch != GROUP_NETWORK:
        named = [name for name, given in (("model.model_config.grpo", section.get("grpo")),
                                          ("rollout", fields.get("rollout")),
                                          ("train_dataset.group_size", data.get("group_size")),
                                          *((f"train_dataset.input_columns {name}", name in columns)
                                            for name in GROUP_COLUMNS)) if given]
        if named:
            raise ConfigError(f"{source}: {named[0]} is for GRPO, which model.arch.type {GROUP_NETWORK} trains by; "
                              "take it out, or name that network.")
        return
    rollout_options(fields.get("rollout"))
    task = grpo_options(section.get("grpo"))["task"]
    check_task(section, task, "grpo", source)
    if fields.get("train_parts") != [f"task_lora.{task}"]:
        raise ConfigError(f"{source}: train_parts is {fields.get('train_parts')!r}; with GRPO it is "
                          f"[task_lora.{task}], because the reference is the model without the pair that trains.")
    if data.get("group_size") is None:
        raise ConfigError(f"{source}: train_dataset.group_size is missing; it says how many answers to a prompt are "
                          "compared, at least 2.")
    if (data.get("data_loader") or {}).get("loss_on") is not None:
        raise ConfigError(f"{source}: train_dataset.data_loader.loss_on says which answers are learnt from, and GRPO "
                          "learns from sampled ones in place of the last; take it out.")
    if list(columns) != [*BATCH_COLUMNS, *GROUP_COLUMNS]:
        raise ConfigError(f"{source}: train_dataset.input_columns is {', '.join(map(str, columns)) or 'missing'}; "
                          f"{GROUP_NETWORK} takes {', '.join((*BATCH_COLUMNS, *GROUP_COLUMNS))}, in this order.")
    if (fields.get("runner_config") or {}).get("sink_mode", True):
        raise ConfigError(f"{source}: runner_config.sink_mode is True, where batches go past the sampling of "
                          "answers to the device; set it to False.")
    parallel = {**DEFAULTS, **(fields.get("parallel") or {})}
    if fields.get("use_parallel") and parallel["parallel_mode"] in GRAPH_MODES:
        raise ConfigError(f"{source}: parallel.parallel_mode is {parallel['parallel_mode']!r}, but GRPO trains on one "
                          "device or data-parallel, where every device samples for its own prompts; set it to 0.")


def check_task(section: dict, task: str, name: str, source: str) -> None:
    """Refuses a mode that does not use the task LoRA that is to train.

    Args:
        section: `model_config`.
        task: that trains.
        name: of the section that names it.
        source: name of the file.
    """
    mode = section.get("adapter_mode") or "base"
    adapters = MODE_ADAPTERS.get(mode)      # an unknown mode is refused where the model is built
    if adapters is not None and task not in adapters:
        raise ConfigError(f"{source}: model.model_config.{name}.task is '{task}', which adapter_mode '{mode}' does not "
                          f"use ({', '.join(adapters) or 'it uses none'}).")

