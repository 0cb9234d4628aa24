"""Builds the three libraries of `mindformers_ixc.cpu_cluster` once and keeps them."""
from __future__ import annotations

import hashlib
import importlib.util
import os
import shutil
import subprocess
from pathlib import Path

from mindformers_ixc.errors import BuildError
from mindformers_ixc.files import whole_file
from mindformers_ixc.resources import usable_cache_folder

_HERE = Path(__file__).resolve().parent


def _mindspore_root() -> Path:
    spec = importlib.util.find_spec("mindspore")
    # a dependency of this package, and a folder with an __init__.py
    assert spec is not None and spec.submodule_search_locations is not None
    return Path(spec.submodule_search_locations[0])


def _cache_folder(root: Path) -> Path:
    """One folder for each MindSpore, and for each state of the sources."""
    key = hashlib.sha256(str(root).encode())
    version = root / "version.py"
    for source in [version, Path(__file__), *sorted(_HERE.rglob("*.cc")), *sorted(_HERE.rglob("*.h"))]:
        key.update(source.read_bytes() if source.exists() else b"")
    return usable_cache_folder("cpu_parallel") / key.hexdigest()[:16]


def _options(root: Path) -> dict[str, list[str]]:
    """Compiler options of each library, by name."""
    api = root / "include" / "mindspore"
    folders = (_HERE / "include", api / "ccsrc", api / "core/include", api / "core", api / "core/mindrt/include",
               api / "core/mindrt", api / "ops", api / "ops/include", api, root / "include",
               root / "include/third_party", root / "include/third_party/robin_hood_hashing", root)
    # the hash table is as the wheel is built: without it the layout of Primitive differs
    headers = [*(f"-I{folder}" for folder in folders), "-DENABLE_FAST_HASH_TABLE=1"]
    link = [f"-L{root}/lib", f"-L{root}/lib/plugin", "-lmindspore_core", "-lmindspore_common",
            "-lmindspore_hardware_abstract", f"-Wl,-rpath,{root}/lib:{root}/lib/plugin", "-Wl,--allow-shlib-undefined"]
    return {"device_name": ["-ldl"], "comm_manager": [*headers, *link],
            "collectives": [*headers, *link, "-lmindspore_ops_cpu"]}


def build(name: str) -> Path:
    """Path of a library, which is built if it is missing.

    Args:
        name: `device_name` (to be preloaded), `comm_manager` or `collectives`.

    Raises:
        BuildError: when there is no g++ or it fails.
    """
    root = _mindspore_root()
    library = _cache_folder(root) / f"lib{name}.so"
    if not library.exists():
        _compile(name, _options(root)[name], library)
    return library


def _compile(name: str, options: list[str], library: Path) -> None:
    compiler = shutil.which("g++")
    if compiler is None:
        raise BuildError("Compiling the model's parallel layout without devices needs the C++ compiler g++, which is "
                         "not installed; install your system's g++ package.")
    library.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(library) as partial:        # two processes may build at once
        command = [compiler, "-O1", "-fPIC", "-shared", "-std=c++17", "-w", "-D_GLIBCXX_USE_CXX11_ABI=0",
                   str(_HERE / f"{name}.cc"), "-o", str(partial), *options]
        result = subprocess.run(command, capture_output=True, text=True, check=False)
        if result.returncode:
            first = next((line for line in result.stderr.splitlines() if "error" in line), result.stderr[:300])
            raise BuildError(f"g++ could not build {_HERE / name}.cc against the headers of {_mindspore_root()}: "
                             f"{first}")


def preload_environment(simulated: bool = False) -> dict[str, str]:
    """Variables a process must be started with.

    Args:
        simulated: the process only compiles; MindSpore then skips the back end and its device checks.

    Raises:
        BuildError: when the libraries cannot be built.
    """
    for name in ("comm_manager",) if simulated else ("comm_manager", "collectives"):
        build(name)         # here, once, and not in every rank at the same time
    earlier = os.environ.get("LD_PRELOAD")
    variables = {"LD_PRELOAD": f"{build('device_name')}{':' + earlier if earlier else ''}"}
    if simulated:
        variables["MS_SIMULATION_LEVEL"] = "0"
    return variables
