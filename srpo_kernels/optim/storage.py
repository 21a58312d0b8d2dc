"""How one parameter's weight and moments are stored: state tensors, and decoding and encoding them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from srpo_kernels.optim import reference
from srpo_kernels.optim.reference import BLOCK, SECOND_STREAM, WEIGHT_STREAM
from srpo_kernels.optim.sharding import local, local_rows, matrix, sharded_like

__all__ = ["MOMENTS", "OFFLOADS", "SMALL", "WEIGHTS", "Storage", "modes"]

WEIGHTS = ("fp32", "split32", "split24", "bf16_sr")
MOMENTS = ("fp32", "M4", "M3", "M2")
#: Tensors with fewer elements, and those of one dimension, keep exact states: all of FLUX's are 1 MB.
SMALL = 16 * 1024

#: State tensors of the parameter's shape and their dtypes.
_REMAINDER = {"split32": torch.int16, "split24": torch.int8}
_FIRST = {"fp32": torch.float32, "M4": torch.bfloat16, "M3": torch.uint8, "M2": torch.uint8}
_SECOND = {"fp32": torch.float32, "M4": torch.bfloat16, "M3": torch.bfloat16, "M2": torch.uint8}
#: State tensors that each kind of offloading keeps in host memory: those of small parameters stay on the device.
OFFLOADS = {
    "none": frozenset[str](),
    "ema": frozenset({"ema"}),
    "states": frozenset({"remainder", "exp_avg", "exp_avg_scale", "exp_avg_sq", "exp_avg_sq_scale", "ema"}),
}


def _small(parameter: Tensor) -> bool:
    return parameter.ndim < 2 or parameter.numel() < SMALL


def modes(parameter: Tensor, group: dict[str, Any]) -> tuple[str, str]:
    """`weights` and `moments` that `parameter` is stored in, small tensors being stored exactly."""
    if not _small(parameter):
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
    hosted: frozenset[str] = frozenset()  # states in host memory, pinned where the parameter is on a GPU

    @classmethod
    def of(
        cls,
        parameter: Tensor,
        state: dict[str, Any],
        group: dict[str, Any],
        *,
        offset: int = 0,
        seed: int = 0,
        offload: str = "none",
    ) -> Storage:
        """The storage of `parameter`; an empty `state` is filled with that before the first step."""
        hosted = OFFLOADS["none" if _small(parameter) else offload]
        storage = cls(parameter, state, *modes(parameter, group), offset, seed, hosted)
        if not state:
            storage._initialise(group["ema_decay"] is not None)
        return storage

    @torch.no_grad()
    def _initialise(self, ema: bool) -> None:
        mine = local(self.parameter)

        def add(name: str, dtype: torch.dtype, shape: tuple[int, ...], fill: float) -> None:
            part_shape = (*mine.shape[:1], *shape[1:])
            if name in self.hosted:
                part = torch.full(part_shape, fill, dtype=dtype, device="cpu", pin_memory=mine.is_cuda)
            else:
                part = mine.new_full(part_shape, fill, dtype=dtype)
            self.state[name] = sharded_like(self.parameter, part, shape)

        shape = tuple(self.parameter.shape)
        scales = (*shape[:1], -(-matrix(mine).shape[1] // BLOCK))
        self.state["step"] = torch.zeros((), device=mine.device)
        if self.weights in _REMAINDER:
            add("remainder", _REMAINDER[self.weights], shape, 0)
        add("exp_avg", _FIRST[self.moments], shape, 0)
        if self.moments in ("M3", "M2"):
            add("exp_avg_scale", torch.float32, scales, 1)
        add("exp_avg_sq", _SECOND[self.moments], shape, 0)
        if self.moments == "M2":
            add("exp_avg_sq_scale", torch.float32, scales, 1)
        if ema:
            add("ema", torch.float32, shape, 0)
            self.store({"ema": self.weight()})

    def whole(self, rows: Tensor) -> Tensor:
        """A copy of local values [rows, columns] as the tensor that the parameter is: its shape and its sharding."""
        mine = local(self.parameter)
        return sharded_like(self.parameter, rows.reshape(mine.shape).clone(), tuple(self.parameter.shape))

    def _local(self, name: str) -> Tensor:
        return local(self.parameter if name == "weight" else self.state[name])

    # --- fp32 matrices of the local rows, where the states are ---------------------------------

    def weight(self) -> Tensor:
        """The weight in fp32, exact."""
        weight = matrix(self._local("weight").detach()).to(self._local("exp_avg").device)
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
        found: dict[str, Tensor] = {}
        if weight is not None:
            if self.weights == "split32":
                found["weight"], found["remainder"] = reference.split16(weight)
            elif self.weights == "split24":
                found["weight"], found["remainder"] = reference.split24(weight, self._random(step, WEIGHT_STREAM))
            elif self.weights == "bf16_sr":
                random = self._random(step, WEIGHT_STREAM)
                found["weight"] = reference.round_down_bits(weight, random, 16).bfloat16()
            else:
                found["weight"] = weight
        if moments is not None:
            first, second = moments
            if self.moments in ("M3", "M2"):
                found["exp_avg"], found["exp_avg_scale"] = reference.encode_blocks(first)
            else:
                found["exp_avg"] = first.to(_FIRST[self.moments])
            if self.moments == "fp32":
                found["exp_avg_sq"] = second
            else:
                random = self._random(step, SECOND_STREAM)
                if self.moments == "M2":
                    found["exp_avg_sq"], found["exp_avg_sq_scale"] = reference.encode_roots(second, random)
                else:
                    found["exp_avg_sq"] = reference.round_down_bits(second, random, 16).bfloat16()
        return found

    def _random(self, step: Tensor, stream: int) -> Tensor:
        """16 random bits of every local element, as an int32 matrix."""
        rows = matrix(self._local("weight"))
        start = self.offset + local_rows(self.parameter)[0] * rows.shape[1]
        return reference.random_bits(self.seed, stream, step, start, rows.numel()).view(rows.shape)

    def store(self, values: dict[str, Tensor], where: Tensor | bool = True) -> None:
        """Write what `encode` returned; nothing changes if `where`, a bool on the device, is false."""
        for name, value in values.items():
            target = self._local(name)
            value = value.reshape(target.shape)
            target.copy_(torch.where(where, value, target) if isinstance(where, Tensor) else value)
