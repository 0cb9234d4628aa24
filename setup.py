"""Packaging entry point; the metadata lives in pyproject.toml, the packages are here.

Nothing is compiled at installation, so one wheel serves all: the optional kernels for the CPU are built from their
sources, which are in the wheel, when they are first needed (mindformers_ixc/native/building.py).
"""
from setuptools import find_packages, setup

# The recipes lie beside the package, where they are read and changed, and are installed inside it, where the command
# finds them (cli/recipe_files.py).
setup(packages=[*find_packages(include=["mindformers_ixc*"]), "mindformers_ixc.recipes"],
      package_dir={"mindformers_ixc.recipes": "yaml_configs"})
