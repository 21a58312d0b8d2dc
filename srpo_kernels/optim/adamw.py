"""AdamW whose weights keep every update and whose states take 2 to 8 bytes, with the clip folded into the step."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, overload

import torch
from torch import Tensor
from torch.optim import Optimizer

from srpo_kernels.optim import states
from srpo_kernels.optim.averages import averages_in_place, check_averages
from srpo_kernels.optim.compiled import advance_alike, takes
from srpo_kernels.optim.eager import advance
from srpo_kernels.optim.norm import GradientNorm, gradient_norm
from srpo_kernels.optim.options import check_group, check_options
from srpo_kernels.optim.prepared import Prepared, can_prepare
from srpo_kernels.optim.sharding import shard_groups
from srpo_kernels.optim.storage import Storage
from srpo_kernels.optim.streaming import streamed, wait_for_copies
from srpo_kernels.optim.telemetry import Sums, telemetry
from srpo_kernels.optim.work import Work, every_storage, places, stepped, with_gradients, work_for

if TYPE_CHECKING:
    from srpo_kernels.optim.in_backward import StepInBackward

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
    Nothing waits for the device (but see `offload`). Parameters without a gradient are left alone, as in torch.

    DTensor parameters sharded by rows (FSDP2, also uneven or with a replicating dimension) are stepped on their shards;
    states are DTensors of the same placements. The norm takes one all-reduce of 34 integers and the telemetry another.

    Args:
        params: parameters or groups, which may override everything up to `ema_every`. fp32 parameters for
            ``weights="fp32"``, bf16 for the others; gradients may be fp32 or bf16 (see `Tensor.grad_dtype`).
        lr: a float, or a tensor read on the device. betas, eps, weight_decay: as `torch.optim.AdamW`'s.
        weights, moments: see the tables.
        max_grad_norm: clip the norm of all gradients as `torch.nn.utils.clip_grad_norm_` would; `.grad` stays.
        ema_decay: also keep an fp32 exponential moving average of the weights, updated every `ema_every` steps.
        seed: of the stochastic rounding.
        offload: what stays in host memory, pinned where there is a GPU, and passes through at most 256 MB of device
            memory during a step, whose end then waits for the host: ``"none"``, ``"ema"``, or ``"states"``: averages,
            remainders and moments. The same bits. States of small tensors stay on the device.

    `max_grad_norm`, `seed` and `offload` are not part of the state dict.

    Attributes:
        telemetry: tensors on the device without dimensions, of the last step: `grad_norm` (before clipping),
            `update_norm`, `weight_norm`, `changed` (fraction of the bf16 weights that changed) in fp32 and `nonfinite`
            (gradient elements) in int64. Empty before the first step.

    Raises:
        TypeError, ValueError: an unusable argument, parameter or gradient; the message names its group and index.

    The remainder of a split weight belongs to the bf16 half beside it: load weights before the optimizer's state.
    """

    _telemetry: dict[str, Tensor] | Callable[[], dict[str, Tensor]]
    _in_backward: StepInBackward | None = None  # who steps instead, if anyone
    _averaged = False  # whether parameters are the averages
    _prepared: Prepared | None = None  # the last step, to be taken again

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
        offload: str = "none",
    ) -> None:
        check_options(max_grad_norm, seed, offload)
        self.max_grad_norm, self.seed, self.offload, self.telemetry = max_grad_norm, seed, offload, {}
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
        own = {name: getattr(self, name) for name in ("max_grad_norm", "seed", "offload")}
        return {**super().__getstate__(), **own, "_telemetry": self.telemetry}

    @property
    def state(self) -> Any:
        """Every parameter's state. The next step is prepared anew, since its tensors may be moved or let go."""
        self._prepared = None
        return vars(self)["state"]

    @state.setter
    def state(self, state: Any) -> None:
        vars(self)["state"] = state

    # --- stepping -----------------------------------------------------------------------------

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """One step; returns what `closure`, run first with gradients enabled, returned.

        With `step_in_backward` most parameters are stepped already: this ends the step.
        """
        self._check_exact("step")
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if self._in_backward is not None:
            self._in_backward._end()
        elif self._prepared is None or not self._prepared.step(self, vars(self)["state"]):
            self._prepared = None
            if work := work_for(self, with_gradients(self)):
                self._step(work)
        if self.offload != "none":
            wait_for_copies(next(iter(places(self))).device)
        return loss

    def _step(self, work: Work) -> None:
        alike = [(group, list_) for group, members in work for list_ in _alike(members)]
        if can_prepare(alike):
            prepared = Prepared(self, alike)
            if prepared.step(self, vars(self)["state"]):
                self._prepared = prepared
                return
        norm = gradient_norm([gradient for _, group in work for _, gradient in group])
        self.telemetry = telemetry(norm, self._advance(work, norm, self._coefficient(norm)), stepped(work))

    @property
    def telemetry(self) -> dict[str, Tensor]:
        """Of the last step, see the class."""
        return self._telemetry() if callable(self._telemetry) else self._telemetry

    @telemetry.setter
    def telemetry(self, found: dict[str, Tensor]) -> None:
        self._telemetry = found

    def _coefficient(self, norm: GradientNorm) -> Tensor:
        if self.max_grad_norm is None:
            return torch.ones_like(norm.norm, dtype=torch.float32)
        return norm.coefficient(self.max_grad_norm)

    def _advance(self, work: Work, norm: GradientNorm, coefficient: Tensor) -> list[Sums]:
        """Step everything in `work`; the telemetry's sums."""
        sums = []
        for group, alike in ((group, alike) for group, members in work for alike in _alike(members)):
            storage, _ = alike[0]
            steps = torch.stack([storage.state["step"] for storage, _ in alike]).long() + 1
            step = advance_alike if takes(storage) else advance
            if storage.hosted:
                added = streamed(step, group, alike, steps, norm, coefficient)
            else:
                added = step(group, alike, steps, norm, coefficient)
            sums.append((shard_groups(storage.parameter), added))
        return sums

    def _check_exact(self, what: str) -> None:
        if self._averaged:
            raise RuntimeError(f"AdamW: {what} within average_parameters, where the parameters are not the exact ones")

    # --- weights ------------------------------------------------------------------------------

    @torch.no_grad()
    def master_weights(self) -> list[Tensor]:
        """fp32 copies of all weights in parameter order, exactly as stored; DTensors where the parameters are.

        With ``offload="states"`` in host memory, but for small tensors.
        """
        self._check_exact("master_weights")
        return [
            parameter.detach().to(torch.float32, copy=True) if storage is None else storage.whole(storage.weight())
            for parameter, storage in every_storage(self)
        ]

    @torch.no_grad()
    def ema_weights(self) -> list[Tensor]:
        """fp32 copies of the averaged weights in parameter order; before a parameter's first step, of its weights.

        Raises:
            ValueError: a group has no `ema_decay`.
        """
        check_averages(self, "ema_weights")
        return [
            parameter.detach().to(torch.float32, copy=True) if storage is None else storage.state["ema"].clone()
            for parameter, storage in every_storage(self)
        ]

    def average_parameters(self) -> AbstractContextManager[None]:
        """A context in which parameters are the averages, rounded to their dtype, for sampling and evaluation.

        The exact weights are back, bit by bit, when it ends, however it ends. Parameters before their first step are
        unchanged. Takes a copy of the parameters, in host memory where averages are. Under FSDP2, modules that are not
        resharded after a forward pass must be by `module.reshard()` before and after.

        Raises:
            ValueError: a group has no `ema_decay`.
            RuntimeError: within it: a step, a state dict, `master_weights`, or the context again.
        """
        self._check_exact("average_parameters")
        return averages_in_place(self)

    # --- state dicts --------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """All options and states, as `torch.optim.Optimizer.state_dict`: tensors are the optimizer's own."""
        self._check_exact("state_dict")
        return super().state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore a `state_dict()`, bit by bit; tensors keep their dtypes, and go into those that exist.

        Differs from `Optimizer.load_state_dict`, which casts every state to its parameter's dtype. A state of a
        DTensor may be given whole.

        Raises:
            ValueError: the groups, their `weights` or `moments`, or the state's tensors do not fit this optimizer.
                `load_canonical_state_dict` converts between modes.
        """
        self._check_exact("load_state_dict")
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
        self._check_exact("canonical_state_dict")
        return states.canonical(self)

    def load_canonical_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over the state of `torch.optim.AdamW`, or of this optimizer in any mode.

        Moments are rounded as a step would. With `master_weights` (a list, or a dictionary by parameter index) weights
        are replaced too; otherwise the parameters stay and remainders become zero. The modes stay this optimizer's.

        Raises:
            ValueError: the groups or shapes do not fit, or torch's optimizer used `amsgrad` or `maximize`.
        """
        self._check_exact("load_canonical_state_dict")
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
            storage.hosted,
        )
        found.setdefault(key, []).append((storage, gradient))
    return list(found.values())
