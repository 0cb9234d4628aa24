"""Building the kernels when they are first needed: once, apart for each machine, and never left when they are wrong."""
from __future__ import annotations

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from mindformers_ixc import native
from mindformers_ixc.errors import BuildError
from mindformers_ixc.native import building as module
from mindformers_ixc.native.building import build, compilers, place

needs_compiler = pytest.mark.skipif(not compilers(), reason="no C compiler")


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """Where the kernels are kept; they are built as they are otherwise but for optimisation, most of the time."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(module, "_COMPILE", tuple("-O0" if word == "-O3" else word for word in module._COMPILE))
    return tmp_path / "cache"


def left(cache: Path) -> list[str]:
    """What lies in the cache beside locks."""
    return [path.name for path in cache.rglob("*") if path.is_file() and path.suffix != ".lock"]


def compiler(folder: Path, text: str) -> str:
    path = folder / "compiler"
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return str(path)


@needs_compiler
def test_threads_that_want_it_at_once_build_it_once(cache, tmp_path, monkeypatch):
    calls = tmp_path / "calls"
    real = " ".join(compilers()[0])
    monkeypatch.setenv("CC", compiler(tmp_path, f'echo "$*" >> {calls}; exec {real} "$@"'))
    with ThreadPoolExecutor(3) as pool:
        built = list(pool.map(lambda _: build(), range(3)))
    assert built == [place()] * 3 and left(cache) == [place().name]
    assert len(calls.read_text().splitlines()) == len(module._SOURCES) + 1      # and the link
    monkeypatch.setenv("CC", "/nowhere")
    assert build() == place()                                    # no compiler is needed any more
    program = subprocess.run([sys.executable, "-m", "mindformers_ixc.native"], capture_output=True, text=True)
    assert program.returncode == 1 and "needs a C compiler" in program.stderr
    whole = place().read_bytes()
    for content in (b"", whole[:5000], whole[:-1], bytes(len(whole))):         # as after a loss of power
        place().write_bytes(content)
        with pytest.raises(BuildError, match="needs a C compiler"):            # to build it anew
            build()
    place().write_bytes(whole)
    assert build() == place()


@needs_compiler
@pytest.mark.parametrize("name,sentence", [
    ("linear", "Error: a product has other numbers than NumPy's."),
    ("linear_int4", "Error: a product with whole numbers has other numbers than NumPy's."),
    ("resize_image", "Error: a picture is resized to other bytes than Pillow's.")])
def test_a_library_that_is_wrong_is_not_kept(name, sentence, cache, tmp_path, monkeypatch):
    """The compiler is told to put another function, which does nothing, in the place of one."""
    other = tmp_path / "other.h"
    other.write_text(f"__attribute__((weak)) int {name}(void) {{ return 0; }}\n#define {name} unused_{name}\n")
    monkeypatch.setenv("CC", f"{compilers()[0][0]} -include {other}")
    with pytest.raises(BuildError) as raised:
        build()
    assert sentence in str(raised.value) and left(cache) == []


@needs_compiler
def test_a_library_that_does_not_load_is_not_kept(cache, monkeypatch):
    monkeypatch.setenv("CC", f"{compilers()[0][0]} -Dresize_image=another_name")
    with pytest.raises(BuildError, match="undefined symbol: resize_image"):
        build()
    assert left(cache) == []


def test_without_a_compiler_or_a_folder_there_are_none_and_that_is_no_error(cache, tmp_path, monkeypatch):
    monkeypatch.setenv("CC", str(tmp_path / "nothing"))
    with pytest.raises(BuildError, match="install your system's gcc"):
        build()
    assert native.library.__wrapped__() is None and not cache.exists()
    monkeypatch.setenv("CC", compiler(tmp_path, "echo a warning >&2; echo fatal error: disk full >&2; exit 3"))
    with pytest.raises(BuildError, match=r"compile the kernels for the CPU \(exit code 3\): fatal error: disk full"):
        build()
    monkeypatch.setenv("CC", '"gcc')
    with pytest.raises(BuildError, match=r"CC is '\"gcc', which is no command \(No closing quotation\); unset it"):
        build()
    monkeypatch.setenv("CC", compiler(tmp_path, "exit 0"))
    monkeypatch.setenv("XDG_CACHE_HOME", "/proc/nowhere")
    with pytest.raises(BuildError, match=r"cannot be kept in /proc/nowhere.*set XDG_CACHE_HOME"):
        build()
    with pytest.raises(BuildError, match="no home folder"):
        place({"HOME": ""})
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)
    with pytest.raises(BuildError, match="no home folder"):
        place({})


def test_a_compiler_that_hangs_is_given_up(cache, tmp_path, monkeypatch):
    monkeypatch.setenv("CC", compiler(tmp_path, "exec sleep 60"))
    monkeypatch.setattr(module, "_PATIENCE_S", 0.1)
    with pytest.raises(BuildError, match="did not end"):
        build()


def test_other_machines_that_share_the_home_folder_have_their_own(cache, monkeypatch):
    here = place()
    monkeypatch.setattr(module.platform, "libc_ver", lambda: ("glibc", "2.17"))
    older = place()
    monkeypatch.setattr(module.platform, "machine", lambda: "aarch64")
    assert len({here, older, place()}) == 3
