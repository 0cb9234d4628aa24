"""What is done around the import of MindSpore and MindFormers, which takes seconds, prints, and starts threads."""
from __future__ import annotations

import argparse
import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from mindformers_ixc import interruption, terminal
from mindformers_ixc.doctor.libraries import how_to_install
from mindformers_ixc.errors import ConfigError


@contextlib.contextmanager
def importing(arguments: argparse.Namespace, whole: contextlib.ExitStack | None = None) -> Iterator[None]:
    """Says that they are loaded, keeps what they print in a log file, and lets Ctrl-C end the process meanwhile.

    Args:
        arguments: of the command; LOG_MF_PATH is set.
        whole: ended after the command, if the libraries are to be kept off the terminal until then (`run`, whose
            signals are looked after elsewhere). The log of a process that msrun started is its output already.

    Raises:
        ConfigError: when they cannot be imported, for want of a package or of a library of the system.
    """
    with contextlib.ExitStack() as own:
        if whole is None:
            own.enter_context(interruption.leaving_at_interrupt())
        if not arguments.verbose and "MS_ROLE" not in os.environ:
            log = Path(os.environ["LOG_MF_PATH"]) / f"{arguments.command}.log"
            log.parent.mkdir(parents=True, exist_ok=True)
            (own if whole is None else whole).enter_context(terminal.current.libraries_to(log))
        own.enter_context(terminal.current.doing("Loading MindSpore and MindFormers", at_once=True))
        try:
            yield
        except ImportError as error:
            if (error.name or "").startswith("mindformers_ixc"):
                raise
            steps = [how_to_install(str(error)), "let `mindformers doctor` look at this machine"]
            raise ConfigError(f"MindSpore or MindFormers cannot be imported: {error}; "
                              f"{' and '.join(filter(None, steps))}.") from error
