"""``python -m srpo_kernels``: the operators there are, and what runs them here."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

import torch

from srpo_kernels.extension import extension_status
from srpo_kernels.ops._register import DTYPES, OPS, triton_problem


def table() -> str:
    """Operators with their formula, dtypes and backends."""
    triton = f"({problem})" if (problem := triton_problem()) else version("triton")
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    try:
        own = version("srpo-kernels")
    except PackageNotFoundError:
        own = "from source, not installed"
    lines = [
        f"srpo-kernels {own}, torch {torch.__version__}, triton {triton}, GPU: {gpu}",
        f"CUDA tensors run {'plain PyTorch' if problem else 'Triton kernels'}, CPU tensors the eager reference.",
        f"Optimizers, compiled: {', '.join(f'{name} {state}' for name, state in extension_status().items())}",
        f"dtypes: {', '.join(str(dtype).removeprefix('torch.') for dtype in DTYPES)} (float64 for checking)",
        "",
    ]
    width = max(map(len, OPS))
    for name, info in sorted(OPS.items()):
        backends = sorted({key for schema in info.schemas for key in _backends(schema)})
        lines.append(f"{name:<{width}}  {'/'.join(backends):<9}  {info.formula}")
    return "\n".join(lines)


def _backends(schema: str) -> list[str]:
    """Devices that have a kernel of their own for ``srpo::<schema>``."""
    keys = ("CPU", "CUDA")
    return [key for key in keys if torch._C._dispatch_has_kernel_for_dispatch_key(f"srpo::{schema}", key)]


if __name__ == "__main__":
    print(table())
