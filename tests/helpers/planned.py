"""Workloads for the tests of plans, from the recipes or with sizes to count by hand."""
from __future__ import annotations

import copy
from pathlib import Path

from mindformers_ixc.cli.yaml_file import read_yaml
from mindformers_ixc.parallel.degrees import Degrees
from mindformers_ixc.planning.workload import LocalParameter, Workload, local_parameters, place, read_workload

RECIPES = Path(__file__).parents[2] / "yaml_configs"

# Tensor parallel 8 without sequence parallel, fused kernels or packing: what the formulae are counted by hand for.
PLAIN = {"parallel_config__data_parallel": 1, "parallel_config__model_parallel": 8,
         "parallel_config__use_seq_parallel": False, "parallel__full_batch": True, "parallel__dataset_strategy": None,
         "runner_config__gradient_accumulation_steps": 64, "recompute_config__mp_comm_recompute": True,
         "model__model_config__use_flash_attention": False, "model__model_config__apply_rope_fusion": False,
         "model__model_config__packing": False, "model__model_config__max_tiles": 19,
         "model__model_config__max_images": None, "train_dataset__input_columns": None}


def recipe(name: str, **overrides) -> dict:
    """Fields of a recipe with some replaced; `a__b=1` is `a.b: 1`. What recipes may choose otherwise is `PLAIN`."""
    fields = read_yaml(RECIPES / f"ixc25_{name}.yaml")
    length = {} if name.startswith("web") else {"model__model_config__seq_length": 8192}
    for key, value in {**({} if name.endswith("_tiny") else {**PLAIN, **length}), **overrides}.items():
        section, *parts = fields, *key.split("__")
        for part in parts[:-1]:
            section = section.setdefault(part, {})
        section[parts[-1]] = value
    return copy.deepcopy(fields)


def workload(fields: dict, layout: Degrees, samples: int = 1) -> Workload:
    """The workload of a YAML's fields in a layout."""
    degrees = {"data_parallel": layout.data_parallel, "model_parallel": layout.model_parallel,
               "pipeline_stage": layout.pipeline_stage, "micro_batch_num": layout.micro_batch_num}
    return place(read_workload(fields), layout.devices, degrees,
                 samples * layout.data_parallel * layout.micro_batch_num)


def answer(placed: Workload, stage: int, operators: tuple = ()) -> dict:
    """What `planning.step.compile_step` would say of a stage if the compiler cut parameters as the formulae do."""
    layout, own = placed.layout, local_parameters(placed)[stage]
    entries = [_entry(layout, parameter, "", parameter.local, "Float32") for parameter in own]
    for prefix in ("adam_m.", "adam_v.", "accu_grads."):
        if prefix == "accu_grads." and not placed.accumulates:
            continue
        for parameter in own:
            local = parameter.local
            if prefix == "accu_grads.":
                local = (local[0] * parameter.optimizer_shards, *local[1:])
            if parameter.trained:
                entries.append(_entry(layout, parameter, prefix, local, "Float32"))
    return {"parameters": entries, "outside": [], "operators": list(operators), "groups": {}, "seconds": 1.5,
            "peak_bytes": 10 ** 9}


def _entry(layout: Degrees, parameter: LocalParameter, prefix: str, local: tuple, dtype: str) -> dict:
    # device matrix (dp, tp), counted from the right: tensor parallel is axis 0
    used = (parameter.local[0] * parameter.optimizer_shards, *parameter.local[1:])
    cuts = [0 if whole != part else -1 for whole, part in zip(parameter.shape, used)]
    return {"name": prefix + parameter.name, "shape": list(parameter.shape), "local": list(local),
            "trained": parameter.trained and not prefix, "optimizer_shards": parameter.optimizer_shards,
            "dtype": dtype, "device_matrix": [layout.data_parallel, layout.model_parallel], "tensor_map": cuts}
