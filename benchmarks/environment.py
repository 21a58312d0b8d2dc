"""``python -m benchmarks env``: what a run records of this machine. No host names, no paths, no plain UUIDs."""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

import srpo_kernels
from benchmarks.nvml import Gpu
from benchmarks.schema import Device, Git, Software

__all__ = ["device", "git", "gpu", "gpu_visible", "memory_gb_s", "rehearse", "software"]

_PACKAGES = ("torchvision", "diffusers", "transformers", "open_clip_torch", "liger-kernel", "torchao", "bitsandbytes")
#: Variables that change what runs. Values with a path in them are not kept.
_VARIABLES = ("TRITON_", "TORCHINDUCTOR_", "PYTORCH_", "CUDA_LAUNCH_BLOCKING", "CUBLAS_", "NVIDIA_TF32_OVERRIDE")


def git() -> Git:
    """The checkout that `srpo_kernels` was imported from, which is what is measured."""

    def ask(*arguments: str) -> bytes | None:
        folder = Path(srpo_kernels.__file__).resolve().parent
        try:
            done = subprocess.run(["git", *arguments], cwd=folder, capture_output=True)
        except FileNotFoundError:
            return None
        return done.stdout if done.returncode == 0 else None

    sha, patch = ask("rev-parse", "HEAD"), ask("diff", "HEAD", "--", ":/*.py", ":/csrc")
    if sha is None or patch is None:
        return Git(sha=None, dirty=None)
    changed = hashlib.sha256(patch).hexdigest()[:12] if patch else None
    return Git(sha=sha.decode().strip(), dirty=bool(patch), patch=changed)


def software() -> Software:
    import triton
    from triton import knobs

    own = {key: value for key, value in sorted(os.environ.items()) if key.startswith(_VARIABLES)}
    return Software(
        python=sys.version.split()[0],
        torch=torch.__version__,
        triton=triton.__version__,
        cuda=torch.version.cuda,
        ptxas=knobs.nvidia.ptxas.version,
        driver=gpu().driver(),
        system=f"{platform.system()} {platform.machine()}",
        packages={package: _version(package) for package in _PACKAGES},
        variables={key: value for key, value in own.items() if os.sep not in value},
    )


def device() -> Device:
    """The GPU in use, or the processor's architecture."""
    if not gpu_visible():
        return Device(name="cpu")
    found = torch.cuda.get_device_properties(torch.cuda.current_device())
    return Device(
        name=found.name,
        capability=f"{found.major}.{found.minor}",
        multiprocessors=found.multi_processor_count,
        memory_bytes=found.total_memory,
        l2_bytes=found.L2_cache_size,
        uuid_hash=hashlib.sha256(str(found.uuid).encode()).hexdigest()[:12],
        **gpu().facts(),
    )


@cache
def gpu() -> Gpu:
    """NVML's view of torch's current device."""
    if not gpu_visible():
        return Gpu(None)
    return Gpu(str(torch.cuda.get_device_properties(torch.cuda.current_device()).uuid))


def gpu_visible() -> bool:
    """Whether torch has a GPU that is not hidden; hiding it works at any time, though torch looks only once."""
    return os.environ.get("CUDA_VISIBLE_DEVICES") != "" and torch.cuda.is_available()


def rehearse() -> None:
    """Hide the GPU, from child processes too, and compile nothing: every line runs, none is timed."""
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    torch.compiler.set_stance("force_eager")


def memory_gb_s() -> float | None:
    """Bus width times memory clock, both edges: what no kernel can exceed. None where the driver tells neither."""
    if not gpu_visible():
        return None
    found = torch.cuda.get_device_properties(torch.cuda.current_device())
    width, kilohertz = getattr(found, "memory_bus_width", 0), getattr(found, "memory_clock_rate", 0)
    return 2 * width / 8 * kilohertz * 1e3 / 1e9 if width and kilohertz else None


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def main(arguments: Sequence[str]) -> int:
    argparse.ArgumentParser(prog="python -m benchmarks env", description=__doc__).parse_args(arguments)
    found = {"git": asdict(git()), "software": asdict(software()), "device": asdict(device())}
    print(json.dumps(found | {"conditions": asdict(gpu().conditions())}, indent=1))
    return 0
