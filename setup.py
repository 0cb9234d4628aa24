"""Packaging entry point; the metadata lives in pyproject.toml, the optional CPU kernels are named here."""
from setuptools import Extension, setup

# Optional: without a C compiler the package installs and works, only CPU inference is slower. It is no Python module,
# just a shared library that MindSpore loads. -ffast-math (for vectorised exp and sums) is not passed to the linker,
# where it would change the floating-point mode of the whole process.
kernels = Extension("mindformers_ixc.native._kernels",
                    ["mindformers_ixc/native/kernels.c", "mindformers_ixc/native/images.c"],
                    depends=["mindformers_ixc/native/vectorised.h"], libraries=["m"],
                    extra_compile_args=["-O3", "-ffast-math", "-fopenmp"], extra_link_args=["-fopenmp"], optional=True)

setup(ext_modules=[kernels])
