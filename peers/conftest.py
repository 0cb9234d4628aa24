"""Graph mode on the CPU for the peers, which are collected apart from the tests."""
from __future__ import annotations

import os

import pytest

os.environ.setdefault("GLOG_v", "3")


@pytest.fixture(scope="session", autouse=True)
def graph_mode_on_cpu():
    import mindspore as ms

    ms.set_context(mode=ms.GRAPH_MODE)
    ms.set_device("CPU")
