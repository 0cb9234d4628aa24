"""Set-up of the whole suite: quiet libraries, graph mode on the CPU, paths to helpers and reference outputs."""
from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path

import pytest

# MindSpore and MindFormers read these while they are imported
os.environ.setdefault("GLOG_v", "3")
os.environ.setdefault("LOG_MF_PATH", tempfile.mkdtemp(prefix="mindformers_ixc_log_"))

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE.parent / "scripts"), str(HERE / "helpers")]


@pytest.fixture(scope="session", autouse=True)
def graph_mode_on_cpu():
    """Every test computes in graph mode on the CPU unless it says otherwise."""
    import mindspore as ms

    ms.set_context(mode=ms.GRAPH_MODE)
    ms.set_device("CPU")


@pytest.fixture(scope="module", autouse=True)
def same_weights():
    """Models that tests build without weights of their own get the same ones in every run."""
    import mindspore as ms

    ms.set_seed(20240703)


@pytest.fixture(scope="session")
def goldens() -> Path:
    """Folder of reference outputs of the public model."""
    return HERE / "data" / "goldens"
