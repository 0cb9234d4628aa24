"""Faults of the log and of plans: nonsense as a peak, padding that counts as work, memory that a step does not take."""
from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
from planned import recipe, workload

from mindformers_ixc.config import ModelConfig
from mindformers_ixc.parallel.degrees import Degrees
from mindformers_ixc.planning.memory import stage_memory
from mindformers_ixc.planning.workload import local_parameters
from mindformers_ixc.training.throughput import Throughput, work_of

GIB = 2 ** 30
COLUMNS = ["input_ids", "labels", "pixel_values", "global_views", "view_index", "vision_index", "image_mask"]


def activations(**overrides) -> tuple[float, float]:
    """GiB of activations and of everything on a device: the SFT recipe on 8 devices, dp 2 x tp 4."""
    fields = recipe("sft", parallel_config__use_seq_parallel=True, parallel__full_batch=False,
                    recompute_config__mp_comm_recompute=False, model__model_config__use_flash_attention=True,
                    **overrides)
    placed = workload(fields, Degrees(2, 4, 1, 32))
    memory = stage_memory(placed, 0, local_parameters(placed)[0])
    return memory.activations / GIB, memory.total / GIB


def test_the_activations_of_the_sft_recipe():
    # they were 16.5 GiB: all logits at once, weights gathered in float32, pictures of float32
    found, total = activations(train_dataset__input_columns=COLUMNS, model__model_config__max_tiles=19,
                               model__model_config__seq_length=8192)
    assert found < 10 and total < 31


def test_rows_of_twice_the_length_fit_64_gigabytes():
    packed = [*COLUMNS, "position_ids", "segment_ends", "noise_seed", "source"]
    _, total = activations(train_dataset__input_columns=packed, model__model_config__packing=True,
                           model__model_config__seq_length=16384, model__model_config__max_tiles=36,
                           model__model_config__max_images=12)
    assert total < 40


def test_a_padded_row_is_not_counted_as_work():
    """The same samples in rows twice as long are as many operations a second, at half the goodput or less."""
    needs = np.array([[1000, 4], [2000, 0]])
    found = []
    for shape in ((2000, 4), (4000, 8)):
        sampler = SimpleNamespace(rows=lambda step: [[0], [1]], row_shape=shape)
        work = work_of(SimpleNamespace(conversations=SimpleNamespace(needs=needs), plan_sampler=sampler), 0)
        found.append(Throughput(ModelConfig(), ["language"], 8).of([work], 2.0))
    assert found[0]["tflops"] == found[1]["tflops"]
    assert found[0]["goodput"] == pytest.approx(2 * found[1]["goodput"])
