"""Packaging entry point; the metadata lives in pyproject.toml, the packages and the optional CPU kernels are here."""
from setuptools import Extension, find_packages, setup

# Optional: without a C compiler the package installs and works, only CPU inference is slower. It is no Python module,
# just a shared library that MindSpore loads. -ffast-math (for vectorised exp and sums) is not passed to the linker,
# where it would change the floating-point mode of the whole process.
kernels = Extension("mindformers_ixc.native._kernels",
                    ["mindformers_ixc/native/kernels.c", "mindformers_ixc/native/images.c"],
                    depends=["mindformers_ixc/native/vectorised.h"], libraries=["m"],
                    extra_compile_args=["-O3", "-ffast-math", "-fopenmp"], extra_link_args=["-fopenmp"], optional=True)

# The recipes lie beside the package, where they are read and changed, and are installed inside it, where the command
# finds them (cli/recipe_files.py).
setup(ext_modules=[kernels],
      packages=[*find_packages(include=["mindformers_ixc*"]), "mindformers_ixc.recipes"],
      package_dir={"mindformers_ixc.recipes": "yaml_configs"})
