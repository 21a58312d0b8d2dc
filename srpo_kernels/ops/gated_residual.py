"""A branch added to its residual stream through a gate for every image, as DiT and FLUX blocks end.

`gated_residual_layer_norm_modulate` goes on to the next half of the block: its input, in the same pass.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from srpo_kernels.ops._modulation import as_rows, as_vector, check_modulation, check_width, dense_rows, unpack, wide
from srpo_kernels.ops._register import define, describe
from srpo_kernels.ops.layer_norm_modulate import modulate, modulate_backward, stack_wanted

__all__ = ["gated_residual", "gated_residual_layer_norm_modulate"]

# --- reference ------------------------------------------------------------------------------------


def _sum(residual: Tensor, gate: Tensor, branch: Tensor) -> Tensor:
    """Not rounded to the dtype of residual."""
    dtype = wide(residual)
    return residual.to(dtype) + gate.to(dtype)[:, None] * branch.to(dtype)


def gated_residual_reference(residual: Tensor, gate: Tensor, branch: Tensor) -> Tensor:
    """residual and branch [B, S, D], gate [B, D] -> [B, S, D]."""
    return _sum(residual, gate, branch).to(residual.dtype).contiguous()


def _backward_reference(
    gradient: Tensor, gate: Tensor | None, branch: Tensor | None, gate_dtype: torch.dtype, branch_dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    dgate, dbranch = _fake_backward(gradient, gate, branch, gate_dtype, branch_dtype)
    gradient = gradient.to(wide(gradient))
    if branch is not None:
        dgate = (gradient * branch.to(gradient.dtype)).sum(1).to(gate_dtype)
    if gate is not None:
        dbranch = (gradient * gate.to(gradient.dtype)[:, None]).to(branch_dtype).contiguous()
    return dgate, dbranch


def gated_residual_layer_norm_modulate_reference(
    residual: Tensor, gate: Tensor, branch: Tensor, scale: Tensor, shift: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """residual and branch [B, S, D], vectors [B, D] -> the sum, its modulation, and the sum's statistics [2, B, S]."""
    new = _sum(residual, gate, branch)
    modulated, statistics = modulate(new, scale, shift, eps)
    return new.to(residual.dtype).contiguous(), modulated.to(residual.dtype).contiguous(), statistics


def _fused_backward_reference(
    dnew: Tensor | None,
    dmodulated: Tensor,
    residual: Tensor,
    gate: Tensor,
    branch: Tensor,
    scale: Tensor,
    statistics: Tensor,
    wanted: list[bool],
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    total, dscale, dshift = modulate_backward(dmodulated, _sum(residual, gate, branch), scale, statistics)
    if dnew is not None:
        total = total + dnew.to(total.dtype)
    dgate = (total * branch.to(total.dtype)).sum(1)
    dbranch = total * gate.to(total.dtype)[:, None]
    dresidual, dbranch = (
        gradient.to(like.dtype).contiguous() if want else like.new_empty(0)
        for gradient, like, want in ((total, residual, wanted[0]), (dbranch, branch, wanted[2]))
    )
    return dresidual, dbranch, stack_wanted([dgate, dscale, dshift], [wanted[1], *wanted[3:]], dtype)


# --- contract -------------------------------------------------------------------------------------


def _fake_backward(
    gradient: Tensor, gate: Tensor | None, branch: Tensor | None, gate_dtype: torch.dtype, branch_dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    images, _, width = gradient.shape
    dgate = gradient.new_empty(0 if branch is None else (images, width), dtype=gate_dtype)
    return dgate, gradient.new_empty(0 if gate is None else gradient.shape, dtype=branch_dtype)


_forward = define(
    "gated_residual_fwd(Tensor residual, Tensor gate, Tensor branch) -> Tensor",
    fake=lambda residual, gate, branch: residual.new_empty(residual.shape),
    cpu=gated_residual_reference,
    cuda="srpo_kernels._triton.gated_residual:forward",
)
#: Without `gate` there is no gradient for branch, without `branch` none for gate.
_backward = define(
    "gated_residual_bwd(Tensor gradient, Tensor? gate, Tensor? branch, ScalarType gate_dtype, "
    "ScalarType branch_dtype) -> (Tensor dgate, Tensor dbranch)",
    fake=_fake_backward,
    cpu=_backward_reference,
    cuda="srpo_kernels._triton.gated_residual:backward",
)


def _fused_fake_forward(residual: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    new, modulated = residual.new_empty(residual.shape), residual.new_empty(residual.shape)
    return new, modulated, residual.new_empty(2, *residual.shape[:2], dtype=wide(residual))


def _fused_fake_backward(
    _dnew: Tensor | None,
    _dmodulated: Tensor,
    residual: Tensor,
    gate: Tensor,
    branch: Tensor,
    _scale: Tensor,
    _statistics: Tensor,
    wanted: list[bool],
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    dresidual, dbranch = (
        like.new_empty(like.shape if want else 0) for like, want in ((residual, wanted[0]), (branch, wanted[2]))
    )
    return dresidual, dbranch, residual.new_empty(wanted[1] + sum(wanted[3:]), *gate.shape, dtype=dtype)


_fused_forward = define(
    "gated_residual_layer_norm_modulate_fwd(Tensor residual, Tensor gate, Tensor branch, Tensor scale, Tensor shift, "
    "float eps) -> (Tensor new_residual, Tensor modulated, Tensor statistics)",
    fake=_fused_fake_forward,
    cpu=gated_residual_layer_norm_modulate_reference,
    cuda="srpo_kernels._triton.gated_residual_layer_norm_modulate:forward",
)
#: `wanted`: the gradients of forward's five tensors; `vectors` holds those of gate, scale and shift, in `dtype`.
_fused_backward = define(
    "gated_residual_layer_norm_modulate_bwd(Tensor? dnew, Tensor dmodulated, Tensor residual, Tensor gate, "
    "Tensor branch, Tensor scale, Tensor statistics, bool[] wanted, ScalarType dtype) "
    "-> (Tensor dresidual, Tensor dbranch, Tensor vectors)",
    fake=_fused_fake_backward,
    cpu=_fused_backward_reference,
    cuda="srpo_kernels._triton.gated_residual_layer_norm_modulate:backward",
)

# --- autograd -------------------------------------------------------------------------------------


class _GatedResidual(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, residual: Tensor, gate: Tensor, branch: Tensor) -> Tensor:
        _, for_gate, for_branch = ctx.needs_input_grad
        ctx.save_for_backward(gate if for_branch else None, branch if for_gate else None)
        ctx.dtypes = gate.dtype, branch.dtype
        return _forward(residual, gate, branch)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        gate, branch = ctx.saved_tensors  # once: checkpointing recomputes on the first access
        dgate = dbranch = None
        if gate is not None or branch is not None:
            dgate, dbranch = _backward(dense_rows(gradient), gate, branch, *ctx.dtypes)
        return gradient, None if branch is None else dgate, None if gate is None else dbranch


class _GatedResidualLayerNormModulate(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, residual: Tensor, gate: Tensor, branch: Tensor, scale: Tensor, shift: Tensor, eps: float
    ) -> tuple[Tensor, Tensor]:
        new, modulated, statistics = _fused_forward(residual, gate, branch, scale, shift, eps)
        ctx.save_for_backward(residual, gate, branch, scale, statistics)
        ctx.dtypes = gate.dtype, scale.dtype, shift.dtype
        ctx.set_materialize_grads(False)
        return new, modulated

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dnew: Tensor | None, dmodulated: Tensor | None) -> tuple[Tensor | None, ...]:
        residual, gate, branch, scale, statistics = ctx.saved_tensors  # once: checkpointing recomputes on the first
        for_residual, for_gate, for_branch, for_scale, for_shift = wanted = list(ctx.needs_input_grad[:5])
        if dnew is not None:
            dnew = dense_rows(dnew)
        if dmodulated is None:  # only the sum was used
            if dnew is None:
                return (None,) * 6
            dgate, dbranch = _backward(
                dnew, gate if for_branch else None, branch if for_gate else None, gate.dtype, branch.dtype
            )
            return dnew, dgate if for_gate else None, dbranch if for_branch else None, None, None, None
        dresidual, dbranch, vectors = _fused_backward(
            dnew,
            dense_rows(dmodulated),
            residual,
            gate,
            branch,
            scale,
            statistics,
            wanted,
            torch.promote_types(torch.promote_types(*ctx.dtypes[:2]), ctx.dtypes[2]),
        )
        dgate, dscale, dshift = unpack(vectors, ctx.dtypes, [for_gate, for_scale, for_shift])
        return dresidual if for_residual else None, dgate, dbranch if for_branch else None, dscale, dshift, None


# --- public functions -----------------------------------------------------------------------------


def gated_residual(residual: Tensor, gate: Tensor, branch: Tensor) -> Tensor:
    """``residual + gate * branch``.

    Args:
        residual, branch: [B, ..., D]. Rows may be any stride apart (a slice of a joint sequence): no copy.
        gate: [B, D] or [B, 1, D], such as a chunk of a modulation [B, 6 D]: no copy.

    Returns:
        A contiguous tensor, shaped and typed as residual. Computed in fp32 (float64 for a float64 residual).
        Differentiable in all three, whose dtypes may differ. Backward gives residual the incoming gradient itself; it
        needs gate, and branch if gate is to have a gradient, which is summed over tokens in a fixed order.

    Raises:
        TypeError: a tensor is not floating. ValueError: shapes or devices do not fit.
    """
    check_modulation("gated_residual", {"residual": residual, "branch": branch}, {"gate": gate})
    return _GatedResidual.apply(as_rows(residual), as_vector(gate), as_rows(branch)).reshape(residual.shape)


def gated_residual_layer_norm_modulate(
    residual: Tensor, gate: Tensor, branch: Tensor, scale: Tensor, shift: Tensor, eps: float = 1e-6
) -> tuple[Tensor, Tensor]:
    """``new = residual + gate * branch`` and ``LN(new) * (1 + scale) + shift``, which sees `new` before it is rounded.

    Args:
        residual, branch: [B, ..., D], D at most 8192. Rows may be any stride apart (a slice of a joint sequence): no
            copy.
        gate, scale, shift: [B, D] or [B, 1, D], such as chunks of a modulation [B, 6 D]: no copy.
        eps: added to the variance.

    Returns:
        (new residual, its modulation), contiguous, shaped and typed as residual. Computed in fp32 (float64 for a
        float64 residual). Differentiable in all five tensors, whose dtypes may differ; backward needs residual, gate,
        branch, scale and two fp32 numbers a row, computes the sum again, and sums over tokens in a fixed order.

    Raises:
        TypeError: a tensor is not floating. ValueError: shapes or devices do not fit, or residual is too wide.
    """
    op = "gated_residual_layer_norm_modulate"
    vectors = {"gate": gate, "scale": scale, "shift": shift}
    check_modulation(op, {"residual": residual, "branch": branch}, vectors)
    check_width(op, "residual", residual)
    new, modulated = _GatedResidualLayerNormModulate.apply(
        as_rows(residual), as_vector(gate), as_rows(branch), as_vector(scale), as_vector(shift), eps
    )
    return new.reshape(residual.shape), modulated.reshape(residual.shape)


describe(
    gated_residual,
    formula="residual + gate * branch",
    shapes="residual and branch [B, ..., D], gate [B, D] or [B, 1, D] -> [B, ..., D]",
    saved="nothing",
    floor="forward: read 2, write 1; backward: read 2 (1 without the gradient of gate), write 1",
    schemas=("gated_residual_fwd", "gated_residual_bwd"),
)
describe(
    gated_residual_layer_norm_modulate,
    formula="new = residual + gate * branch, and LN(new) (1 + scale) + shift",
    shapes="residual and branch [B, ..., D], gate, scale and shift [B, D] or [B, 1, D] -> [B, ..., D], twice",
    saved="two fp32 numbers per row: mean and 1 / deviation",
    floor="forward: read 2, write 2; backward: read 4 (3 when only one result was used), write 2",
    schemas=("gated_residual_layer_norm_modulate_fwd", "gated_residual_layer_norm_modulate_bwd"),
)
