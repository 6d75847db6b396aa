# Copyright 2026 The Stackformer authors. Licensed under the Apache License, Version 2.0.
"""Builds the optional C++ library; everything else about the package is in pyproject.toml.

The library is loaded with ctypes and needs neither torch nor Python to build. Without a compiler, or with one
without GCC's vector extensions, the package is installed without it and computes the same in torch.
"""

import sys

from setuptools import Extension, setup

# No -ffast-math: linked in, it would change the floating-point mode of the whole process.
FLAGS = ["-O3", "-std=c++17", "-fno-math-errno", "-fno-trapping-math", "-Wno-psabi"]
OPENMP = ["-fopenmp"] if sys.platform.startswith("linux") else []

setup(
    ext_modules=[
        Extension(
            "stackformer._memory_bank",
            sources=["stackformer/csrc/memory_bank.cpp"],
            extra_compile_args=FLAGS + OPENMP,
            extra_link_args=OPENMP,
            optional=True,
        )
    ]
)
