"""The compiled libraries; everything static is in pyproject.toml.

SRPO_BUILD_CPP and SRPO_BUILD_CUDA are auto (build what can be built), 0 or 1. Nothing needs the libraries: the package
is complete in Python. Building needs torch in the building environment: `python setup.py build_ext --inplace`, or
`pip install --no-build-isolation .`.
"""

from __future__ import annotations

import os
import shutil
import sysconfig
from pathlib import Path
from typing import Any

from setuptools import setup

SOURCES = Path("csrc")
TARGET = "-DTORCH_TARGET_VERSION=0x020b000000000000"  # the stable ABI of torch 2.11
# What errno and traps would need keeps loops from vectorising, and short copies are no calls; none changes a bit.
EXACT = ["-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math", "-fno-tree-loop-distribute-patterns"]
# Vectors wider than the baseline are passed between inlined functions only; the other warning is of GCC's own headers.
QUIET = ["-Wno-psabi", "-Wno-maybe-uninitialized"]
CPP = ["-std=c++17", "-O3", "-g0", "-fvisibility=hidden", *EXACT, *QUIET, TARGET]
NVCC = ["-std=c++17", "-O3", "-fmad=false", "-Xcompiler=-fvisibility=hidden", "-DUSE_CUDA", TARGET]


def choice(name: str) -> str:
    value = os.environ.get(name, "auto")
    if value not in {"auto", "0", "1"}:
        raise SystemExit(f"{name} must be auto, 0 or 1, got {value!r}")
    return value


def wanted(name: str, missing: str) -> bool:
    """Whether to build what `name` names, which is impossible if anything is `missing`; says what was decided."""
    chosen = choice(name)
    if chosen == "1" and missing:
        raise SystemExit(f"{name}=1 needs {missing}")
    building = chosen != "0" and not missing
    decision = "building" if building else f"not building without {missing}" if missing else "not building"
    print(f"srpo-kernels: {name}={chosen}: {decision}")
    return building


def extensions() -> dict[str, Any]:
    """The arguments of `setup` that build the libraries which are wanted and possible."""
    try:
        import torch
        from torch.utils.cpp_extension import CUDA_HOME, BuildExtension, CppExtension, CUDAExtension
    except ImportError:
        for name in ("SRPO_BUILD_CPP", "SRPO_BUILD_CUDA"):
            wanted(name, "torch in the building environment (--no-build-isolation)")
        return {}
    headers = Path(sysconfig.get_path("include"), "Python.h").exists()
    compiler = headers and shutil.which(os.environ.get("CXX", "c++").split()[0])
    depends = [str(path) for path in SOURCES.rglob("*.*")]
    shared: dict[str, Any] = dict(py_limited_api=True, depends=depends, extra_link_args=["-s"])
    found = []
    if wanted("SRPO_BUILD_CPP", "" if compiler else "a C++ compiler and Python's headers"):
        sources = ["csrc/python.cpp", "csrc/ops_cpu.cpp", "csrc/cpu/adamw.cpp"]
        found.append(CppExtension("srpo_kernels._C", sources, extra_compile_args={"cxx": CPP}, **shared))
    nvcc = CUDA_HOME is not None and shutil.which("nvcc", path=f"{CUDA_HOME}/bin")
    possible = compiler and nvcc and torch.version.cuda is not None
    if wanted("SRPO_BUILD_CUDA", "" if possible else "nvcc and a CUDA build of torch"):
        os.environ.setdefault("TORCH_CUDA_ARCH_LIST", "9.0a;10.0a")  # never ask the local GPU
        sources = ["csrc/python.cpp", "csrc/ops_cuda.cu", "csrc/cuda/adamw.cu"]
        flags = {"cxx": CPP, "nvcc": NVCC}
        found.append(CUDAExtension("srpo_kernels._C_cuda", sources, extra_compile_args=flags, **shared))
    return {
        "ext_modules": found,
        "cmdclass": {"build_ext": BuildExtension},
        "options": {"bdist_wheel": {"py_limited_api": "cp310"}} if found else {},
    }


setup(**extensions())
