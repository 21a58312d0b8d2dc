"""The kernels of csrc/cuda, compiled by nvcc where there is one; the GPU they are for need not be."""

from __future__ import annotations

import hashlib
import re
import shutil
import subprocess
from collections.abc import Iterable, Iterator
from functools import cache, partial
from pathlib import Path
from typing import Any

from triton.runtime.cache import get_cache_manager

from benchmarks.static.unit import Unit

__all__ = ["MISSING", "assembler_log", "cuda_units", "kernel_figures", "nvcc"]

SOURCES = Path(__file__).parents[2] / "csrc"
_FLAGS = ["-std=c++17", "-O3", "-fmad=false", "-cubin", "-Xptxas=-v"]  # setup.py's, for one architecture
_LOG = "nvcc.log"
MISSING = "csrc/cuda was not compiled: needs nvcc and c++filt"


@cache
def nvcc() -> str | None:
    """Its version, None where it or the tool that reads its names is missing."""
    if not shutil.which("nvcc") or not shutil.which("c++filt"):
        return None
    told = subprocess.run(["nvcc", "--version"], capture_output=True, text=True).stdout
    found = re.search(r"\bV(\d+\.\d+\.\d+)", told)
    return found[1] if found else None


def cuda_units(architectures: Iterable[int]) -> Iterator[Unit]:
    """Every kernel of every file; none where there is no nvcc. Files are compiled here, unless they were before.

    A file that cannot be compiled is a unit that fails.
    """
    version = nvcc()
    if version is None:
        return
    for source in sorted(SOURCES.glob("cuda/*.cu")):
        for architecture in architectures:
            pins, tools = f"sm{architecture}", f"nvcc {version}"
            try:
                kernels = kernel_figures(assembler_log(source, architecture))
            except subprocess.CalledProcessError as error:
                yield Unit(f"csrc/cuda/{source.name}", pins, tools, partial(_fail, error.stderr))
                continue
            for name, figures in kernels.items():
                yield Unit(f"csrc/cuda/{source.name} {name}", pins, tools, partial(dict, figures))


def _fail(log: str) -> dict[str, Any]:
    raise RuntimeError(next((line for line in log.splitlines() if "error" in line), "nvcc failed"))


def assembler_log(source: Path, architecture: int) -> str:
    """What ptxas says of a file's kernels, their names readable; kept in Triton's cache under what it depends on."""
    command = ["nvcc", *_FLAGS, f"-arch=sm_{architecture}a", str(source.relative_to(SOURCES))]
    files = [path.read_bytes() for path in sorted(SOURCES.rglob("*.[ch]u*")) + sorted(SOURCES.glob("*.h"))]
    key = hashlib.sha256(b"\0".join([str([nvcc(), *command]).encode(), *files])).hexdigest()
    manager = get_cache_manager(key)
    kept = manager.get_file(_LOG)
    if kept is None:
        run = subprocess.run([*command, "-o", "/dev/null"], cwd=SOURCES, capture_output=True, text=True, check=True)
        readable = subprocess.run(["c++filt"], input=run.stderr, capture_output=True, text=True, check=True).stdout
        kept = manager.put(readable, _LOG, binary=False)
    return Path(kept).read_text("utf-8")


def kernel_figures(log: str) -> dict[str, dict[str, Any]]:
    """Figures by kernel. Warnings that name none are of the first one."""
    found = {}
    before, *parts = re.split(r"^.*Compiling entry function '(.*)' for .*$", log, flags=re.M)
    for name, text in zip(parts[::2], parts[1::2], strict=True):
        text, before = before + text, ""
        sums = {
            "regs": r"Used (\d+) registers",
            "stack": r"(\d+) bytes stack frame",
            "spill_st": r"(\d+) bytes spill stores",
            "spill_ld": r"(\d+) bytes spill loads",
            "smem": r"(\d+) bytes smem",
        }
        figures = {figure: sum(map(int, re.findall(pattern, text))) for figure, pattern in sums.items()}
        found[_short(name)] = {**figures, "warnings": len(re.findall(r"\b(?:warning|advisory)\s*:", text, re.I))}
    return found


def _short(name: str) -> str:
    """``void srpo::step_kernel<(srpo::Weights)3, true>(srpo::Table)`` -> ``step_kernel<Weights 3, true>``."""
    name = re.sub(r"\(anonymous namespace\)::|\bsrpo::", "", name)
    name = re.sub(r"\((\w+)\)(?=\d)", r"\1 ", name)
    return name.partition("(")[0].removeprefix("void ")
