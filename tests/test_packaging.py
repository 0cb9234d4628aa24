"""What `pip install .` puts into place, by setuptools' own step that copies the files."""
from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("installed")
    done = subprocess.run([sys.executable, "setup.py", "-q", "build_py", "--build-lib", str(folder)], cwd=ROOT,
                          capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return folder


def files(folder):
    return {str(path.relative_to(folder)) for path in folder.rglob("*")
            if path.is_file() and path.suffix not in (".pyc", ".so")}


def test_the_recipes_are_inside_the_package(installed):
    assert files(installed / "mindformers_ixc" / "recipes") == files(ROOT / "yaml_configs")


def test_everything_else_is_where_it_was(installed):
    there = {name for name in files(installed / "mindformers_ixc") if not name.startswith("recipes/")}
    assert there == files(ROOT / "mindformers_ixc")
    # the kernels' sources, the starter and the mark of types among them
    assert {"native/kernels.c", "native/vectorised.h", "starter/model-00001-of-00001.safetensors", "py.typed"} <= there


def test_the_command_finds_them_there(installed, tmp_path):
    program = ("from mindformers_ixc.cli.recipe_files import find_config; "
               "from mindformers_ixc.cli.yaml_file import read_yaml; "
               "print(find_config('ixc25_sft_tiny')); print(read_yaml('ixc25_web_64')['trainer']['model_name'])")
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, timeout=60,
                          env={"PYTHONPATH": str(installed), "PATH": ""})
    assert done.stdout.splitlines() == [f"{installed}/mindformers_ixc/recipes/ixc25_sft_tiny.yaml", "ixc25_7b"]


@pytest.mark.parametrize("name", ["mindformers", "ixc25"])
def test_the_command_has_two_names(name):
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    assert f'\n{name} = "mindformers_ixc_cli:main"\n' in text.partition("[project.scripts]")[2]
