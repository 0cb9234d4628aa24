"""What cannot be imported becomes a sentence with what to do."""
from __future__ import annotations

import argparse
import contextlib

import pytest

from mindformers_ixc.cli.heavy import importing
from mindformers_ixc.errors import ConfigError

ARGUMENTS = argparse.Namespace(verbose=True, command="chat")


@pytest.mark.parametrize("error,sentence", [
    (ImportError("libgomp.so.1: cannot open shared object file: No such file or directory"),
     r"cannot open shared object file: No such file or directory; install libgomp\.so\.1, a library of the system: "
     r"apt-get install libgomp1 on Debian and Ubuntu and let `mindformers doctor` look at this machine\.$"),
    (ModuleNotFoundError("No module named 'mindspore'", name="mindspore"),
     r"No module named 'mindspore'; let `mindformers doctor` look at this machine\.$")])
def test_libraries_that_are_missing(error, sentence):
    with pytest.raises(ConfigError, match=sentence), importing(ARGUMENTS, contextlib.ExitStack()):
        raise error


def test_a_defect_of_this_package_keeps_its_traceback():
    with pytest.raises(ModuleNotFoundError), importing(ARGUMENTS, contextlib.ExitStack()):
        raise ModuleNotFoundError("No module named 'mindformers_ixc.none'", name="mindformers_ixc.none")
