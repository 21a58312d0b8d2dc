"""A convolution whose weights are constants: it keeps them for backward, and not the image that went in."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import conv2d, conv_transpose2d

__all__ = ["frozen_conv2d"]


def frozen_conv2d(
    x: Tensor, weight: Tensor, bias: Tensor | None, stride: Any, padding: Any, dilation: Any, groups: int
) -> Tensor:
    """`torch.nn.functional.conv2d`, differentiable in `x` [B, C, H, W] alone.

    PyTorch's own keeps `x` for the gradient of the weight whether or not there will be one.
    """
    return _FrozenConv2d.apply(x, weight, bias, stride, padding, dilation, groups)


class _FrozenConv2d(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, *geometry: Any) -> Tensor:
        ctx.save_for_backward(weight)
        ctx.geometry, ctx.size = geometry, x.shape[2:]
        return conv2d(x, weight, bias, *geometry)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        (weight,) = ctx.saved_tensors
        stride, padding, dilation, groups = ctx.geometry
        # The adjoint of a strided convolution does not know which of several sizes its input had.
        reached = (
            (out - 1) * step - 2 * pad + spread * (taps - 1) + 1
            for out, step, pad, spread, taps in zip(
                gradient.shape[2:], stride, padding, dilation, weight.shape[2:], strict=True
            )
        )
        missing = tuple(size - end for size, end in zip(ctx.size, reached, strict=True))
        dx = conv_transpose2d(gradient, weight, None, stride, padding, missing, groups, dilation)
        return dx, None, None, None, None, None, None
