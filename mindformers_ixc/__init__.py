"""InternLM-XComposer-2.5 for MindFormers.

Importing this package imports neither MindSpore nor MindFormers. As soon as MindFormers is imported, before or after,
everything is registered with it: model, configuration, tokenizer, processors, datasets, trainer, step cells, PET types
and the `multimodal_chat` pipeline (`mindformers_ixc.registration`). The names below are imported when they are used.
"""
from __future__ import annotations

import contextlib
import gc
import importlib
import importlib.abc
import importlib.util
import logging
import os
import sys
import threading
from typing import TYPE_CHECKING, Any

from mindformers_ixc.version import __version__

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from importlib.machinery import ModuleSpec
    from types import ModuleType

    from mindformers_ixc.errors import ConfigError
    from mindformers_ixc.registration import (
        InternLM2Tokenizer,
        IXC25Config,
        IXC25ForCausalLM,
        IXC25ForGRPO,
        IXC25ForPreference,
        IXC25ForReward,
        IXC25GroupDataset,
        IXC25ImageProcessor,
        IXC25PreferenceDataset,
        IXC25Processor,
        IXC25SFTDataset,
        IXC25Tracker,
        IXC25Trainer,
        IXC25VideoProcessor,
        IXC25VisionConfig,
        IXC25VisionModel,
    )

__all__ = [
    "ConfigError",
    "IXC25Config",
    "IXC25ForCausalLM",
    "IXC25ForGRPO",
    "IXC25ForPreference",
    "IXC25ForReward",
    "IXC25GroupDataset",
    "IXC25ImageProcessor",
    "IXC25PreferenceDataset",
    "IXC25Processor",
    "IXC25SFTDataset",
    "IXC25Tracker",
    "IXC25Trainer",
    "IXC25VideoProcessor",
    "IXC25VisionConfig",
    "IXC25VisionModel",
    "InternLM2Tokenizer",
    "__version__",
]

_REGISTRATION = f"{__name__}.registration"


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = f"{__name__}.errors" if name == "ConfigError" else _REGISTRATION
    return getattr(importlib.import_module(module), name)


def __dir__() -> list[str]:
    return sorted(__all__)


def _let_threads_sleep() -> None:
    """Has OpenMP's threads that wait for work, or for each other, sleep after microseconds instead of milliseconds.

    A thread that looks on and on keeps its core from the one it waits for: beside a busy core, a kernel of half a
    millisecond took eight. libgomp reads this when it is loaded, with MindSpore.
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "2000")


class _StandardError:
    """Standard error, whatever that is when something is written: programs put others in its place."""

    def write(self, text: str) -> int:
        """Writes a text."""
        return sys.stderr.write(text)

    def flush(self) -> None:
        """Hands over what was written."""
        sys.stderr.flush()


@contextlib.contextmanager
def _off_standard_output() -> Iterator[None]:
    """Lets MindFormers, while it is imported, choose standard error and a folder of the user's cache for its log.

    It would choose standard output, which is for answers, and `./output/log`; LOG_MF_PATH is heeded. It warns of parts
    of itself that lack their libraries, and MindSpore of modules that it still uses: nobody here can change that, so it
    is only logged where all goes to a file or is asked for.
    """
    screen = importlib.import_module(f"{__name__}.terminal").current
    if "LOG_MF_PATH" not in os.environ:
        resources = importlib.import_module(f"{__name__}.resources")
        os.environ["LOG_MF_PATH"] = str(resources.usable_log_folder()[0])
    before = logging.root.manager.disable
    if not screen.verbose and screen.log_path is None:
        logging.disable(max(before, logging.WARNING))
    try:
        with contextlib.ExitStack() as elsewhere:
            if threading.current_thread() is threading.main_thread():     # another has a stream of its own (`chat`)
                elsewhere.enter_context(contextlib.redirect_stdout(_StandardError()))      # type: ignore[type-var]
            yield
            importlib.import_module("mindformers.tools.logger").get_logger()      # made now, if not before
    finally:
        logging.disable(before)


def _import_tensorboardx() -> None:
    """Imports tensorboardX, which MindFormers does, as where PyTorch is not installed.

    It would import PyTorch, which takes more than a third of the time of all these imports, for one type in hints of
    its methods; a method that is given a tensor of PyTorch imports that itself.
    """
    if "torch" in sys.modules or "tensorboardX" in sys.modules:
        return
    importlib.import_module("mindspore")      # which chooses the protobuf that both can live with
    sys.modules["torch"] = None        # type: ignore[assignment] # an import of it ends in ImportError
    try:
        with contextlib.suppress(ImportError):
            importlib.import_module("tensorboardX")
    finally:
        del sys.modules["torch"]


class _AfterMindFormers(importlib.abc.MetaPathFinder):
    """Registers everything when the import of MindFormers has ended.

    Modules of this package that need MindFormers are in packages whose `__init__` imports it first; so none of them is
    half imported when registration imports it.
    """

    def find_spec(self, fullname: str, path: Sequence[str] | None,
                  target: ModuleType | None = None) -> ModuleSpec | None:
        """See `importlib.abc.MetaPathFinder`; finds `mindformers` as it would be found without this class."""
        if fullname != "mindformers":
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is None or spec.loader is None:
            return spec
        run = spec.loader.exec_module

        def exec_module(module: ModuleType) -> None:
            # the import makes very many objects that all stay alive: walking them again and again, and once more when
            # the process ends, takes a quarter of its time and finds nothing
            was_enabled = gc.isenabled()
            gc.disable()
            try:
                with _off_standard_output():
                    _import_tensorboardx()
                    run(module)
                importlib.import_module(_REGISTRATION)
                gc.freeze()
            finally:
                if was_enabled:
                    gc.enable()

        # on this one loader only; mypy takes any assignment to a method for a mistake
        spec.loader.exec_module = exec_module        # type: ignore[method-assign]
        return spec


_let_threads_sleep()
if "mindformers" in sys.modules:
    importlib.import_module(_REGISTRATION)
else:
    sys.meta_path.insert(0, _AfterMindFormers())
