"""The package map and the C++ extension; all other metadata is in pyproject.toml.

With ``HDRQ_EXTENSION=required`` in the environment a build without the extension is an error, as wheels want it.
"""

import glob
import os
import sys

from pybind11.setup_helpers import ParallelCompile, Pybind11Extension, build_ext
from setuptools import find_packages, setup


class optional_build_ext(build_ext):
    """Build the C++ path, or say in one line that it is missing."""

    def run(self):
        try:
            super().run()
        except Exception as error:
            if os.environ.get("HDRQ_EXTENSION") == "required":
                raise
            print(f"hdrq: the C++ path is missing, CPU tensors will run in plain PyTorch: {error}", file=sys.stderr)

    def build_extensions(self):
        if self.compiler.compiler_type == "msvc":
            raise RuntimeError("csrc is written in the vector types of GCC and Clang, which MSVC does not have")
        super().build_extensions()


ParallelCompile(default=0).install()  # one file to a core

setup(
    packages=[*find_packages(include=["hdrq", "hdrq.*"]), "hdrq.benchmarks", "hdrq.kernels"],
    package_dir={"hdrq.benchmarks": "benchmarks", "hdrq.kernels": "kernels"},
    ext_modules=[
        Pybind11Extension(
            "hdrq._C",
            sorted(glob.glob("csrc/*.cpp")),
            depends=sorted(glob.glob("csrc/*.h")),
            cxx_std=17,
            # No fused multiply-add and no reordering: the bits are part of the contract (docs/contract.md).
            extra_compile_args=[
                "-O3",
                "-ffp-contract=off",
                "-fno-math-errno",
                "-Wall",
                "-Wno-psabi",
                "-Wno-maybe-uninitialized",
            ],
        )
    ],
    cmdclass={"build_ext": optional_build_ext},
)
