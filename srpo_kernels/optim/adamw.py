"""AdamW whose weights keep every update and whose states take 2 to 8 bytes, with the clip folded into the step."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any, overload

import torch
from torch import Tensor
from torch.optim import Optimizer

from srpo_kernels.optim import states
from srpo_kernels.optim.compiled import advance_alike, takes
from srpo_kernels.optim.norm import GradientNorm, gradient_norm
from srpo_kernels.optim.options import check_gradient, check_group, check_options
from srpo_kernels.optim.reference import BINS, advance, scalars, sums_of_squares, total
from srpo_kernels.optim.sharding import add_up, local, matrix, shard_groups
from srpo_kernels.optim.storage import Storage

__all__ = ["AdamW"]


class AdamW(Optimizer):
    """AdamW with decoupled weight decay, for fine-tuning at learning rates that bf16 weights cannot follow.

    | `weights` | stored | the parameter is |
    |---|---|---|
    | `fp32` | 4 bytes | fp32 |
    | `split32` | bf16 + int16 remainder: exactly an fp32 weight | its bf16 half |
    | `split24` | bf16 + int8 remainder, stochastically rounded | its bf16 half |
    | `bf16_sr` | bf16, stochastically rounded: at a learning rate of 5e-6 its noise exceeds 20 steps' signal | bf16 |

    | `moments` | m and v |
    |---|---|
    | `fp32` | fp32, fp32 |
    | `M4` | bf16, bf16 stochastically rounded |
    | `M3` | e4m3 with an fp32 scale per 128 elements of a row, bf16 stochastically rounded |
    | `M2` | e4m3 as in M3, 8-bit eighth root with an fp32 scale per 128 elements, stochastically rounded |

    Tensors of fewer than 16384 elements or of one dimension keep fp32 moments, and `split32` for the narrower weights.
    `srpo_kernels.optim.reference` specifies every operation. The same gradients give the same bits for any sharding:
    random bits are a function of seed, step and the element's place in the parameter list, and norms are exact sums.

    A step for which any gradient is NaN or infinite, or their norm overflows, changes no byte, the step count included.
    Nothing waits for the device. Parameters without a gradient are left alone, as in torch.

    DTensor parameters sharded by rows (FSDP2, also uneven or with a replicating dimension) are stepped on their shards;
    states are DTensors of the same placements. The norm takes one all-reduce of 34 integers and the telemetry another.

    Args:
        params: parameters or groups, which may override everything up to `ema_every`. fp32 parameters for
            ``weights="fp32"``, bf16 for the others; gradients may be fp32 or bf16 (see `Tensor.grad_dtype`).
        lr: a float, or a tensor read on the device. betas, eps, weight_decay: as `torch.optim.AdamW`'s.
        weights, moments: see the tables.
        max_grad_norm: clip the norm of all gradients as `torch.nn.utils.clip_grad_norm_` would; `.grad` stays.
        ema_decay: also keep an fp32 exponential moving average of the weights, updated every `ema_every` steps.
        seed: of the stochastic rounding. Like `max_grad_norm`, not part of the state dict.

    Attributes:
        telemetry: tensors on the device without dimensions, of the last step: `grad_norm` (before clipping),
            `update_norm`, `weight_norm`, `changed` (fraction of the bf16 weights that changed) in fp32 and `nonfinite`
            (gradient elements) in int64. Empty before the first step.

    Raises:
        TypeError, ValueError: an unusable argument, parameter or gradient; the message names its group and index.

    The remainder of a split weight belongs to the bf16 half beside it: load weights before the optimizer's state.
    """

    telemetry: dict[str, Tensor]

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        weights: str = "split32",
        moments: str = "M4",
        max_grad_norm: float | None = None,
        ema_decay: float | None = None,
        ema_every: int = 1,
        seed: int = 0,
    ) -> None:
        check_options(max_grad_norm, seed)
        self.max_grad_norm, self.seed, self.telemetry = max_grad_norm, seed, {}
        super().__init__(
            params,
            dict(
                lr=lr,
                betas=betas,
                eps=eps,
                weight_decay=weight_decay,
                weights=weights,
                moments=moments,
                ema_decay=ema_decay,
                ema_every=ema_every,
            ),
        )

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group; its elements come after all others in the order that random bits are drawn by."""
        super().add_param_group(param_group)
        try:
            check_group(self.param_groups, len(self.param_groups) - 1)
        except (TypeError, ValueError):
            self.param_groups.pop()
            raise

    def __getstate__(self) -> dict[str, Any]:
        own = {name: getattr(self, name) for name in ("max_grad_norm", "seed", "telemetry")}
        return {**super().__getstate__(), **own}

    # --- stepping -----------------------------------------------------------------------------

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """One step; returns what `closure`, run first with gradients enabled, returned."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        work = self._with_gradients()
        if work:
            norm = gradient_norm([gradient for _, group in work for _, gradient in group])
            coefficient = torch.ones_like(norm.norm, dtype=torch.float32)
            if self.max_grad_norm is not None:
                coefficient = norm.coefficient(self.max_grad_norm)
            sums = []
            for group, alike in ((group, alike) for group, members in work for alike in _alike(members)):
                steps = torch.stack([storage.state["step"] for storage, _ in alike]).long() + 1
                if takes(alike[0][0]):
                    added = advance_alike(group, alike, steps, norm, coefficient)
                else:
                    added = _advance(group, alike, steps, norm, coefficient)
                sums.append((shard_groups(alike[0][0].parameter), added))
            self.telemetry = _telemetry(
                norm, sums, [storage.parameter for _, members in work for storage, _ in members]
            )
        return loss

    def _with_gradients(self) -> list[tuple[dict[str, Any], list[tuple[Storage, Tensor]]]]:
        """Groups and, of each, the parameters to step with their gradients."""
        gradients = {}
        for number, group in enumerate(self.param_groups):
            for index, parameter in enumerate(group["params"]):
                if parameter.grad is not None:
                    gradients[parameter] = check_gradient(parameter, number, index)
        return [
            (group, [(storage, gradients[storage.parameter]) for storage in members])
            for group, members in self._stored(gradients.__contains__)
            if members
        ]

    def _stored(self, wanted: Callable[[Tensor], bool]) -> Iterator[tuple[dict[str, Any], list[Storage]]]:
        """The storage of the `wanted` parameters by group."""
        offset = 0
        for group in self.param_groups:
            members = []
            for parameter in group["params"]:
                if wanted(parameter):
                    members.append(Storage.of(parameter, self.state[parameter], group, offset, self.seed))
                offset += -(-parameter.numel() // 4) * 4  # four elements share a Philox counter
            yield group, members

    # --- weights ------------------------------------------------------------------------------

    @torch.no_grad()
    def master_weights(self) -> list[Tensor]:
        """fp32 copies of all weights in parameter order, exactly as stored; DTensors where the parameters are."""
        return [
            parameter.detach().to(torch.float32, copy=True) if storage is None else storage.whole(storage.weight())
            for parameter, storage in self._all()
        ]

    @torch.no_grad()
    def ema_weights(self) -> list[Tensor]:
        """fp32 copies of the averaged weights in parameter order; before a parameter's first step, of its weights.

        Raises:
            ValueError: a group has no `ema_decay`.
        """
        for number, group in enumerate(self.param_groups):
            if group["ema_decay"] is None:
                raise ValueError(f"AdamW: ema_weights needs ema_decay, which group {number} does not have")
        return [
            parameter.detach().to(torch.float32, copy=True) if storage is None else storage.state["ema"].clone()
            for parameter, storage in self._all()
        ]

    def _all(self) -> Iterator[tuple[Tensor, Storage | None]]:
        """Every parameter with its storage, None before its first step."""
        stored = {
            storage.parameter: storage
            for _, members in self._stored(lambda parameter: bool(self.state.get(parameter)))
            for storage in members
        }
        for group in self.param_groups:
            for parameter in group["params"]:
                yield parameter, stored.get(parameter)

    # --- state dicts --------------------------------------------------------------------------

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore a `state_dict()`, bit by bit; tensors keep their dtypes, and go into those that exist.

        Differs from `Optimizer.load_state_dict`, which casts every state to its parameter's dtype. A state of a
        DTensor may be given whole.

        Raises:
            ValueError: the groups, their `weights` or `moments`, or the state's tensors do not fit this optimizer.
                `load_canonical_state_dict` converts between modes.
        """
        state_dict = dict(state_dict)
        for before in self._optimizer_load_state_dict_pre_hooks.values():
            state_dict = before(self, state_dict) or state_dict
        states.load_native(self, state_dict)
        for after in self._optimizer_load_state_dict_post_hooks.values():
            after(self)

    def canonical_state_dict(self) -> dict[str, Any]:
        """The state as `torch.optim.AdamW` would hold it, in fp32; that optimizer loads it.

        Returns:
            `state` (`step`, `exp_avg`, `exp_avg_sq`), `param_groups`, and what torch ignores: `master_weights` and,
            where averages are kept, `ema_weights`, by parameter index. Parameters not yet stepped are left out.
        """
        return states.canonical(self)

    def load_canonical_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over the state of `torch.optim.AdamW`, or of this optimizer in any mode.

        Moments are rounded as a step would. With `master_weights` (a list, or a dictionary by parameter index) weights
        are replaced too; otherwise the parameters stay and remainders become zero. The modes stay this optimizer's.

        Raises:
            ValueError: the groups or shapes do not fit, or torch's optimizer used `amsgrad` or `maximize`.
        """
        states.load_canonical(self, state_dict)


def _alike(members: list[tuple[Storage, Tensor]]) -> list[list[tuple[Storage, Tensor]]]:
    """`members` in lists of those that one call of the extension can take, or that it cannot."""
    found: dict[Any, list[tuple[Storage, Tensor]]] = {}
    for storage, gradient in members:
        parameter = storage.parameter
        key = (
            storage.weights,
            storage.moments,
            parameter.device,
            gradient.dtype,
            shard_groups(parameter),
            takes(storage),
        )
        found.setdefault(key, []).append((storage, gradient))
    return list(found.values())


def _advance(
    group: dict[str, Any],
    members: list[tuple[Storage, Tensor]],
    steps: Tensor,
    norm: GradientNorm,
    coefficient: Tensor,
) -> Tensor:
    """`advance_alike` without the extension."""
    numbers = scalars(steps, group["lr"], group["betas"], group["eps"], group["weight_decay"])
    sums = []
    for (storage, gradient), step, number in zip(members, steps.unbind(), numbers, strict=True):
        weight, first, second, update = advance(
            matrix(local(gradient)), coefficient, storage.weight(), storage.first(), storage.second(), number
        )
        sums.append(_write(storage, group, step, norm.finite, weight, (first, second), update))
    return torch.stack(sums).sum(0)


def _write(
    storage: Storage,
    group: dict[str, Any],
    step: Tensor,
    finite: Tensor,
    weight: Tensor,
    moments: tuple[Tensor, Tensor],
    update: Tensor,
) -> Tensor:
    """Store the results of step number `step` if it is `finite`; returns the telemetry's sums of this parameter."""
    parameter = local(storage.parameter)
    if group["ema_decay"] is not None:
        average = matrix(local(storage.state["ema"]))
        moved = average + (weight - average) * torch.full((), 1 - group["ema_decay"], device=average.device)
        storage.store({"ema": moved}, finite & (step % group["ema_every"] == 0))
    values = storage.encode(step, weight=weight, moments=moments)
    changed = torch.zeros((), dtype=torch.int64, device=parameter.device)
    if parameter.dtype == torch.bfloat16:
        changed = (values["weight"].view(torch.int16) != matrix(parameter).view(torch.int16)).sum()
    storage.store(values, finite)
    storage.state["step"].add_(finite)
    squares = [sums_of_squares(x)[0] for x in (torch.where(finite, update, 0.0), storage.weight())]
    return torch.cat([*squares, torch.where(finite, changed, 0)[None]])


def _telemetry(
    norm: GradientNorm, sums: list[tuple[tuple[Any, ...], Tensor]], parameters: list[Tensor]
) -> dict[str, Tensor]:
    added = add_up(sums)
    halves = sum(parameter.numel() for parameter in parameters if parameter.dtype == torch.bfloat16)
    squares = total(added[: 2 * BINS].view(2, BINS))
    update, weight = torch.sqrt(squares).float().unbind()
    return {
        "grad_norm": norm.norm.float(),
        "update_norm": update,
        "weight_norm": weight,
        "changed": (added[-1] / max(halves, 1)).float(),
        "nonfinite": norm.nonfinite,
    }
