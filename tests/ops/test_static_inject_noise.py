"""inject_noise compiled for GPUs that are not there."""

from __future__ import annotations

import pytest

from srpo_kernels.testing.compile_only import ARCHITECTURES, compile_for

pytestmark = pytest.mark.compile_only


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize(("kind", "block"), [("*bf16", 2048), ("*fp32", 1024)])
@pytest.mark.parametrize("prior", [False, True])
def test_forward(architecture: int, kind: str, block: int, prior: bool) -> None:
    import triton.language as tl

    from srpo_kernels._triton.inject_noise import inject_noise_kernel

    arguments = dict(
        x0_ptr=kind,
        noise_ptr=kind,
        sigma_ptr="*fp32",
        out_ptr=kind,
        count="i32",
        noise_stride="i32",
        seed="i64",
        offset="i64",
        BRANCHES=2,
        PRIOR=prior,
        SHARED=False,
        ACC=tl.float32,
        BLOCK=block,
    )
    compiled = compile_for(inject_noise_kernel, arguments, architecture=architecture, num_warps=4)
    print(compiled.registers, compiled.stack, compiled.shared, compiled.widest_load())
    assert compiled.stack == 0
    assert compiled.widest_load() == 16
