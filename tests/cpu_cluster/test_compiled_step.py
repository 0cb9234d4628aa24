"""The train step as the parallel compiler makes it: only the communication that was meant, every gradient summed."""
from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from mindformers_ixc.config import read_config
from mindformers_ixc.cpu_cluster.build import preload_environment

SCRIPT = Path(__file__).parents[1] / "helpers" / "compiled_step.py"


@pytest.fixture(scope="module")
def compiled(goldens, tmp_path_factory):
    """What the compiler made of the web mode's train step for data parallel 2 x tensor parallel 2."""
    folder = tmp_path_factory.mktemp("graphs")
    environment = {**os.environ, **preload_environment(simulated=True)}
    result = subprocess.run([sys.executable, str(SCRIPT), str(goldens / "t1"), str(folder)], env=environment,
                            capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr[-3000:]
    return json.loads(result.stdout.splitlines()[-1])


@pytest.mark.slow
def test_every_gradient_is_summed_over_its_copies(compiled):
    # a parameter without a mirror operator would drift apart between the ranks
    assert len(compiled["trained"]) == 100
    assert set(compiled["trained"]) == set(compiled["mirrors"])


@pytest.mark.slow
def test_the_forward_pass_sums_where_linears_are_cut_by_columns(compiled, goldens):
    config = read_config(goldens / "t1")
    # out_proj and fc2; the projector; wo and w2, each with A of Partial LoRA and of the web pair; maximum, sum and
    # picked logit of the vocabulary-parallel cross entropy, for each of three chunks, and the first two again, for its
    # logits are not kept; sum and number of the losses (the embedding's sum has a name of its own)
    expected = 2 * config.vision_config.num_hidden_layers + 1 + 2 * 3 * config.num_hidden_layers + 3 * (3 + 2) + 2
    assert compiled["forward_sums"] == expected


@pytest.mark.slow
def test_no_tensor_changes_its_layout(compiled):
    # the weight of the head and the chunks of positions least of all: it would be for every chunk
    assert not compiled["layout_changes"]
