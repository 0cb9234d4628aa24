"""What `pip install .` puts into place, by setuptools' own step that copies the files."""
from __future__ import annotations

import os
import re
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


def test_everything_else_is_where_it_was_but_what_is_compiled(installed):
    there = {name for name in files(installed / "mindformers_ixc") if not name.startswith("recipes/")}
    sources = {"native/kernels.c", "native/images.c", "native/vectorised.h"}
    assert there == files(ROOT / "mindformers_ixc") - sources


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


def test_the_source_distribution_has_what_the_documents_link_to(tmp_path):
    done = subprocess.run([sys.executable, "setup.py", "-q", "egg_info", "--egg-base", str(tmp_path)], cwd=ROOT,
                          capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    there = set(next(tmp_path.glob("*.egg-info/SOURCES.txt")).read_text(encoding="utf-8").splitlines())
    for page in (ROOT / "README.md", ROOT / "docs" / "quickstart.md"):
        links = re.findall(r"\]\((?!https?://)([^)#\s]+)", page.read_text(encoding="utf-8"))
        targets = {os.path.relpath((page.parent / link).resolve(), ROOT) for link in links}
        assert len(targets) > 5
        assert targets <= there
