"""Set-up of the whole suite: quiet libraries, graph mode on the CPU, paths to helpers and reference outputs."""
from __future__ import annotations

import contextlib
import gc
import inspect
import logging
import os
import sys
import tempfile
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

# the same examples in every run; what a run finds by luck would fail another one by chance, and so would a busy machine
settings.register_profile("same", derandomize=True, deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("same")

# MindSpore and MindFormers read these while they are imported
os.environ.setdefault("GLOG_v", "3")
os.environ["MINDFORMERS_IXC_INDEX"] = tempfile.mkdtemp(prefix="mindformers_ixc_index_")
os.environ.setdefault("LOG_MF_PATH", tempfile.mkdtemp(prefix="mindformers_ixc_log_"))
if "PYTEST_XDIST_WORKER" in os.environ:
    # compiling is what takes the time, and one thread does it; more in each worker only get into each other's way
    os.environ.setdefault("OMP_NUM_THREADS", "1")

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE.parent / "scripts"), str(HERE / "helpers")]

# The files that take minutes, the longest first: begun last, one would keep a single worker busy at the end.
LONGEST = ["cpu_cluster/test_layouts.py", "training/test_end_to_end.py", "cli/test_launch.py", "test_docs_blocks.py",
           "training/test_interrupted.py", "planning/test_plan_compiled.py", "generation/test_parallel_inference.py",
           "checkpoint/test_convert.py", "cpu_cluster/test_collectives.py", "cpu_cluster/test_processes.py",
           "faults/test_fuzz.py", "models/test_parity.py", "test_notebooks.py", "test_parity_script.py"]


def pytest_configure(config):
    """Workers take files in the order below, not those of most tests first."""
    if hasattr(config.option, "loadscopereorder"):
        config.option.loadscopereorder = False
    _remember_sources()


def _remember_sources():
    """Has `inspect` cut a function out of its file once.

    MindSpore asks for the source of every function in every graph, which is a twelfth of the time of compiling; its own
    cache, of the syntax trees, has the source as its key.
    """
    cut, kept = inspect.getsourcelines, {}

    def getsourcelines(thing):
        function = inspect.unwrap(getattr(thing, "__func__", thing))
        code = getattr(function, "__code__", None)
        if code is None:
            return cut(thing)
        if code not in kept:
            kept[code] = cut(thing)
        lines, number = kept[code]
        return list(lines), number

    inspect.getsourcelines = getsourcelines


def pytest_collection_finish():
    """What was imported and collected stays alive: the garbage collector need not walk it again and again."""
    gc.collect()
    gc.freeze()


def pytest_collection_modifyitems(items):
    """The files that take longest run first."""
    places = {HERE / name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: places.get(item.path, len(places)))


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


def _package_loggers() -> dict[logging.Logger, tuple[int, list]]:
    """Levels and handlers of this package's loggers."""
    return {logger: (logger.level, list(logger.handlers)) for name, logger in logging.root.manager.loggerDict.items()
            if isinstance(logger, logging.Logger) and name.partition(".")[0] == "mindformers_ixc"}


@contextlib.contextmanager
def _process_as_it_was():
    """Gives back what commands set for the whole process they are called in."""
    from mindformers_ixc import terminal

    environment, screen, loggers = dict(os.environ), terminal.current, _package_loggers()
    yield
    terminal.current = screen
    for logger, (level, handlers) in {**dict.fromkeys(_package_loggers(), (logging.NOTSET, [])), **loggers}.items():
        logger.setLevel(level)
        logger.handlers[:] = handlers
    for name in os.environ.keys() - environment.keys():
        del os.environ[name]
    os.environ.update(environment)


@pytest.fixture(scope="module", autouse=True)
def process_after_a_file():
    """What a file's own fixtures set does not reach the next file, whichever that is."""
    with _process_as_it_was():
        yield


@pytest.fixture(autouse=True)
def process_after_a_test(process_after_a_file):
    """What a test sets does not reach the next one."""
    with _process_as_it_was():
        yield


@pytest.fixture(scope="session")
def goldens() -> Path:
    """Folder of reference outputs of the public model."""
    return HERE / "data" / "goldens"


@pytest.fixture(scope="session")
def goldens_more() -> Path:
    """Folder of the second set of reference outputs, in the wide layout."""
    return HERE / "data" / "goldens_more"
