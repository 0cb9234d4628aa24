"""What `pip install .` puts into place, by setuptools' own step that copies the files, and what the archives hold."""
from __future__ import annotations

import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("installed")
    done = subprocess.run([sys.executable, "setup.py", "-q", "build_py", "--build-lib", str(folder)], cwd=ROOT,
                          capture_output=True, text=True, timeout=600)
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
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, timeout=300,
                          env={"PYTHONPATH": str(installed), "PATH": ""})
    assert done.stdout.splitlines() == [f"{installed}/mindformers_ixc/recipes/ixc25_sft_tiny.yaml", "ixc25_7b"]


@pytest.mark.parametrize("name", ["mindformers", "ixc25"])
def test_the_command_has_two_names(name):
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    assert f'\n{name} = "mindformers_ixc_cli:main"\n' in text.partition("[project.scripts]")[2]


@pytest.fixture(scope="module")
def tracked():
    """The files that the repository has, for a source distribution has no repository."""
    done = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if done.returncode or not (ROOT / ".git").exists():
        pytest.skip("no git, or no repository")
    return {name for name in done.stdout.splitlines() if (ROOT / name).exists()}


@pytest.fixture(scope="module")
def source_archive(tmp_path_factory):
    """The source distribution, unpacked."""
    folder = tmp_path_factory.mktemp("source")
    setup(ROOT, "egg_info", "--egg-base", str(folder), "sdist", "--dist-dir", str(folder))
    with tarfile.open(next(folder.glob("*.tar.gz"))) as archive:
        archive.extractall(folder)
    return next(path for path in folder.iterdir() if path.is_dir() and not path.name.endswith(".egg-info"))


def setup(folder, *words):
    done = subprocess.run([sys.executable, "setup.py", "-q", *words], cwd=folder, capture_output=True, text=True,
                          timeout=600)
    assert done.returncode == 0, done.stderr


def test_the_source_distribution_is_the_repository(source_archive, tracked):
    made = {"PKG-INFO", "setup.cfg"}
    names = {str(path.relative_to(source_archive)) for path in source_archive.rglob("*") if path.is_file()}
    names = {name for name in names if ".egg-info/" not in name} - made
    assert tracked - names == {".gitignore"}
    ignored = subprocess.run(["git", "check-ignore", *sorted(names - tracked)], cwd=ROOT, capture_output=True,
                             text=True)
    assert ignored.stdout == ""


def test_a_wheel_made_from_the_source_distribution_alone_is_pure_and_whole(source_archive, installed, tmp_path):
    setup(source_archive, "bdist_wheel", "--dist-dir", str(tmp_path))
    wheel = next(tmp_path.glob("*.whl"))
    assert wheel.name.endswith("-py3-none-any.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
    assert names == {str(path.relative_to(installed)) for path in installed.rglob("*")
                     if path.is_file() and path.suffix != ".pyc"}


@pytest.mark.parametrize("name", ["out/model/config.json", "out_ascend/log", "mine/x", "build/lib/x", "dist/x.whl",
                                  "mindformers_ixc.egg-info/PKG-INFO", ".venv/bin/python"])
def test_what_commands_of_the_documentation_write_is_ignored(name, tracked):
    assert subprocess.run(["git", "check-ignore", "-q", name], cwd=ROOT).returncode == 0
    assert name not in tracked


@pytest.mark.slow
def test_a_program_that_uses_the_installed_package_has_its_types_checked(installed, tmp_path):
    program = tmp_path / "program.py"
    program.write_text("""from mindformers_ixc import ConfigError, IXC25ForCausalLM, InternLM2Tokenizer, __version__

def ask(model: IXC25ForCausalLM, tokenizer: InternLM2Tokenizer) -> str:
    answer, history = model.chat(tokenizer, "What is this?", ["a.jpg"])
    reveal_type(history)
    model.chat(tokenizer, "What is this?", [7])
    return answer

version: str = __version__
error: ValueError = ConfigError("no")
""")
    # as of what is installed, errors inside of the package itself are not shown
    config = tmp_path / "mypy.ini"
    config.write_text("[mypy]\nstrict = true\nignore_missing_imports = true\n\n"
                      "[mypy-mindformers_ixc.*]\nignore_errors = true\n")
    done = subprocess.run([sys.executable, "-m", "mypy", "--config-file", str(config), "--cache-dir",
                           str(tmp_path / "cache"), str(program)], cwd=tmp_path, capture_output=True, text=True,
                          timeout=300, env={"MYPYPATH": str(installed), "PATH": ""})
    lines = [line.partition("program.py:")[2] for line in done.stdout.splitlines() if "program.py:" in line]
    assert len(lines) == 2 and done.stdout.splitlines()[-1].startswith("Found 1 error"), done.stdout
    assert lines[0].startswith('5: note: Revealed type is "') and "list[tuple[" in lines[0]
    assert lines[1].startswith("6: error: List item 0 has incompatible type")
