"""Triton kernels of `srpo_kernels.ops.inject_noise`."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from srpo_kernels._triton._common import accumulator, device_guard, elementwise
from srpo_kernels._triton.noise_prior import draw


@triton.jit
def inject_noise_kernel(
    x0_ptr,
    noise_ptr,
    sigma_ptr,
    alpha_ptr,  # None: rectified flow's 1 - sigma
    out_ptr,
    count,  # elements of an image
    noise_stride,  # elements between two images' noise: count, or 0 when they share it
    seed,
    offset,
    BRANCHES: tl.constexpr,
    PRIOR: tl.constexpr,
    SHARED: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One read of x0 and noise, one write per branch. Grid: (blocks of an image, images)."""
    first = tl.program_id(0) * BLOCK
    image = tl.program_id(1)
    columns = first + tl.arange(0, BLOCK)
    mask = columns < count
    x0 = tl.load(x0_ptr + image.to(tl.int64) * count + columns, mask=mask, other=0.0).to(ACC)
    if PRIOR:
        noise = draw(first, image * (0 if SHARED else 1), seed, offset, BLOCK).to(ACC)
    else:
        noise = tl.load(noise_ptr + image.to(tl.int64) * noise_stride + columns, mask=mask, other=0.0).to(ACC)
    for branch in tl.static_range(BRANCHES):
        sigma = tl.load(sigma_ptr + image * BRANCHES + branch).to(ACC)
        alpha = 1 - sigma if alpha_ptr is None else tl.load(alpha_ptr + image * BRANCHES + branch).to(ACC)
        row = tl.cast(branch, tl.int64) * tl.num_programs(1) + image
        out = alpha * x0 + sigma * noise
        tl.store(out_ptr + row * count + columns, out.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def branch_sum_kernel(
    gradient_ptr, weight_ptr, out_ptr, count, BRANCHES: tl.constexpr, ACC: tl.constexpr, BLOCK: tl.constexpr
):
    """Sum over branches of weight times gradient, in branch order. Grid as above."""
    image = tl.program_id(1)
    columns = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = columns < count
    total = tl.zeros((BLOCK,), ACC)
    for branch in range(BRANCHES):
        row = tl.cast(branch, tl.int64) * tl.num_programs(1) + image
        gradient = tl.load(gradient_ptr + row * count + columns, mask=mask, other=0.0).to(ACC)
        total += tl.load(weight_ptr + image * BRANCHES + branch).to(ACC) * gradient
    tl.store(out_ptr + image.to(tl.int64) * count + columns, total.to(out_ptr.dtype.element_ty), mask=mask)


def forward(x0: Tensor, noise: Tensor, sigma: Tensor, alpha: Tensor | None) -> Tensor:
    return _launch(x0, noise, sigma, alpha, noise.shape[1] if noise.shape[0] == x0.shape[0] else 0)


def forward_prior(x0: Tensor, sigma: Tensor, alpha: Tensor | None, seed: int, offset: int, shared: bool) -> Tensor:
    return _launch(x0, x0, sigma, alpha, 0, seed=seed, offset=offset, prior=True, shared=shared)


def branch_sum(gradient: Tensor, weight: Tensor) -> Tensor:
    branches, batch, count = gradient.shape
    out = gradient.new_empty(batch, count)
    if out.numel():
        block, warps = elementwise(count, gradient)
        with device_guard(gradient):
            branch_sum_kernel[(triton.cdiv(count, block), batch)](
                gradient, weight, out, count, BRANCHES=branches, ACC=accumulator(gradient), BLOCK=block, num_warps=warps
            )
    return out


def _launch(
    x0: Tensor,
    noise: Tensor,
    sigma: Tensor,
    alpha: Tensor | None,
    noise_stride: int,
    *,
    seed: int = 0,
    offset: int = 0,
    prior: bool = False,
    shared: bool = False,
) -> Tensor:
    batch, count = x0.shape
    branches = sigma.shape[1]
    out = x0.new_empty(branches, batch, count)
    if out.numel():
        block, warps = elementwise(count, x0)
        with device_guard(x0):
            inject_noise_kernel[(triton.cdiv(count, block), batch)](
                x0,
                noise,
                sigma,
                alpha,
                out,
                count,
                noise_stride,
                seed,
                offset,
                BRANCHES=branches,
                PRIOR=prior,
                SHARED=shared,
                ACC=accumulator(x0),
                BLOCK=block,
                num_warps=warps,
            )
    return out
