"""How one parameter's weight and moments are stored: state tensors, and decoding and encoding them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from srpo_kernels.optim import reference
from srpo_kernels.optim.reference import BLOCK
from srpo_kernels.optim.sharding import local, local_rows, matrix, sharded_like

__all__ = ["MOMENTS", "SMALL", "WEIGHTS", "Storage", "modes"]

WEIGHTS = ("fp32", "split32", "split24", "bf16_sr")
MOMENTS = ("fp32", "M4", "M3", "M2")
#: Tensors with fewer elements, and those of one dimension, keep exact states: all of FLUX's are 1 MB.
SMALL = 16 * 1024

#: State tensors of the parameter's shape and their dtypes.
_REMAINDER = {"split32": torch.int16, "split24": torch.int8}
_FIRST = {"fp32": torch.float32, "M4": torch.bfloat16, "M3": torch.uint8, "M2": torch.uint8}
_SECOND = {"fp32": torch.float32, "M4": torch.bfloat16, "M3": torch.bfloat16, "M2": torch.uint8}


def modes(parameter: Tensor, group: dict[str, Any]) -> tuple[str, str]:
    """`weights` and `moments` that `parameter` is stored in, small tensors being stored exactly."""
    if parameter.ndim > 1 and parameter.numel() >= SMALL:
        return group["weights"], group["moments"]
    return "fp32" if group["weights"] == "fp32" else "split32", "fp32"


@dataclass(frozen=True)
class Storage:
    """A parameter, its state, and where it is in the parameter list.

    The state of a DTensor is DTensors of its placements: those of the parameter's shape, and scales
    [rows, ceil(columns / 128)]. `step` is an fp32 tensor without dimensions, as in torch.
    """

    parameter: Tensor
    state: dict[str, Any]
    weights: str
    moments: str
    offset: int  # global index of the parameter's first element
    seed: int

    @classmethod
    @torch.no_grad()
    def of(cls, parameter: Tensor, state: dict[str, Any], group: dict[str, Any], offset: int, seed: int) -> Storage:
        """The storage of `parameter`; an empty `state` is filled with that before the first step."""
        storage = cls(parameter, state, *modes(parameter, group), offset, seed)
        if not state:
            storage._initialise(group["ema_decay"] is not None)
        return storage

    def _initialise(self, ema: bool) -> None:
        parameter = self.parameter
        mine = local(parameter)

        def zeros(dtype: torch.dtype) -> Tensor:
            return sharded_like(parameter, mine.new_zeros(mine.shape, dtype=dtype), tuple(parameter.shape))

        def scales() -> Tensor:
            blocks = -(-matrix(mine).shape[1] // BLOCK)
            ones = mine.new_ones((mine.shape[0], blocks), dtype=torch.float32)
            return sharded_like(parameter, ones, (parameter.shape[0], blocks))

        self.state["step"] = torch.zeros((), device=mine.device)
        if self.weights in _REMAINDER:
            self.state["remainder"] = zeros(_REMAINDER[self.weights])
        self.state["exp_avg"] = zeros(_FIRST[self.moments])
        if self.moments in ("M3", "M2"):
            self.state["exp_avg_scale"] = scales()
        self.state["exp_avg_sq"] = zeros(_SECOND[self.moments])
        if self.moments == "M2":
            self.state["exp_avg_sq_scale"] = scales()
        if ema:
            self.state["ema"] = self.whole(self.weight())

    def whole(self, rows: Tensor) -> Tensor:
        """A copy of local values [rows, columns] as the tensor that the parameter is: its shape and its sharding."""
        mine = local(self.parameter)
        return sharded_like(self.parameter, rows.reshape(mine.shape).clone(), tuple(self.parameter.shape))

    def _local(self, name: str) -> Tensor:
        return local(self.parameter if name == "weight" else self.state[name])

    # --- fp32 matrices of the local rows ------------------------------------------------------

    def weight(self) -> Tensor:
        """The weight in fp32, exact."""
        weight = matrix(self._local("weight").detach())
        if self.weights == "split32":
            return reference.join16(weight.contiguous(), matrix(self._local("remainder")))
        if self.weights == "split24":
            return reference.join24(weight.contiguous(), matrix(self._local("remainder")))
        return weight.float()

    def first(self) -> Tensor:
        """The first moment in fp32."""
        stored = matrix(self._local("exp_avg"))
        if self.moments in ("M3", "M2"):
            return reference.decode_blocks(stored, self._local("exp_avg_scale"))
        return stored.float()

    def second(self) -> Tensor:
        """The second moment in fp32."""
        stored = matrix(self._local("exp_avg_sq"))
        if self.moments == "M2":
            return reference.decode_roots(stored, self._local("exp_avg_sq_scale"))
        return stored.float()

    def encode(
        self, step: Tensor, *, weight: Tensor | None = None, moments: tuple[Tensor, Tensor] | None = None
    ) -> dict[str, Tensor]:
        """What to store, by name ("weight" is the parameter itself), for new fp32 values after step number `step`."""
        low, high = self._random(step)
        found: dict[str, Tensor] = {}
        if weight is not None:
            if self.weights == "split32":
                found["weight"], found["remainder"] = reference.split16(weight)
            elif self.weights == "split24":
                found["weight"], found["remainder"] = reference.split24(weight, low)
            elif self.weights == "bf16_sr":
                found["weight"] = reference.round_down_bits(weight, low, 16).bfloat16()
            else:
                found["weight"] = weight
        if moments is not None:
            first, second = moments
            if self.moments in ("M3", "M2"):
                found["exp_avg"], found["exp_avg_scale"] = reference.encode_blocks(first)
            else:
                found["exp_avg"] = first.to(_FIRST[self.moments])
            if self.moments == "M2":
                found["exp_avg_sq"], found["exp_avg_sq_scale"] = reference.encode_roots(second, high)
            elif self.moments == "fp32":
                found["exp_avg_sq"] = second
            else:
                found["exp_avg_sq"] = reference.round_down_bits(second, high, 16).bfloat16()
        return found

    def _random(self, step: Tensor) -> tuple[Tensor, Tensor]:
        """The two 16-bit random numbers of every local element, as int32 matrices."""
        rows = matrix(self._local("weight"))
        if self.moments == "fp32" and self.weights in ("fp32", "split32"):
            return (torch.empty(0, device=rows.device),) * 2
        start = self.offset + local_rows(self.parameter)[0] * rows.shape[1]
        words = reference.random_words(self.seed, step, start, rows.numel()).view(rows.shape)
        return (words & 0xFFFF).int(), (words >> 16).int()

    def store(self, values: dict[str, Tensor], where: Tensor | bool = True) -> None:
        """Write what `encode` returned; nothing changes if `where`, a bool on the device, is false."""
        for name, value in values.items():
            target = self._local(name)
            value = value.reshape(target.shape)
            target.copy_(torch.where(where, value, target) if isinstance(where, Tensor) else value)
