"""A training run's own state in its checkpoints, written while it goes on."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from threading import Thread

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from srpo.checkpoint import Checkpoints, SaveError
from srpo.state_files import is_state, parameter_of, read_into, stored
from srpo_kernels.optim.sharding import local, local_rows, sharded_like

__all__ = ["Saver", "load_optimizer_tensors", "optimizer_tensors"]

_SEGMENT, _ALIGNMENT = 1 << 30, 64  # bytes


class Saver:
    """Saves and restores the state of a run, on all its ranks together.

    Args:
        weights: the parameters that `optimizer` was given, by name and in its order.
        config: the resolved recipe, kept in every checkpoint.
        background: copy the state to host memory and write the copy while training goes on. The copy's memory, as much
            as this process holds of weights and states, is kept from one save to the next (pinned, where there is a
            GPU). Without: write the state itself, meanwhile nothing goes on.
    """

    def __init__(
        self,
        checkpoints: Checkpoints,
        weights: Mapping[str, nn.Parameter],
        optimizer: torch.optim.Optimizer,
        config: str,
        *,
        background: bool,
    ) -> None:
        self._checkpoints = replace(checkpoints, ranks=checkpoints.ranks.twin()) if background else checkpoints
        self._weights = {name: weight.detach() for name, weight in weights.items()}
        self._optimizer, self._names, self._config = optimizer, list(weights), config
        self._background = background
        self._copies: dict[str, Tensor] = {}
        self._thread: Thread | None = None
        self._failure: SaveError | None = None

    def save(self, step: int) -> None:
        """Save the state after `step` updates, or begin to; `finish` tells how it went.

        Raises `SaveError`.
        """
        self.finish()
        tensors = {**self._weights, **optimizer_tensors(self._optimizer, self._names)}
        if not self._background:
            self._checkpoints.save(step, tensors, self._config)
            return
        if self._checkpoints.ranks.is_main or any(isinstance(tensor, DTensor) for tensor in tensors.values()):
            tensors = self._copied(step, tensors)  # other ranks write nothing of what is whole
        self._thread = Thread(target=self._write, args=(step, tensors), name=f"save-{step}", daemon=True)
        self._thread.start()

    def finish(self) -> None:
        """Wait until the last `save` is published. Raises `SaveError` when it could not be."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._failure is not None:
            failure, self._failure = self._failure, None
            raise failure

    def close(self) -> None:
        """`finish`, with a warning for a failure: for a run that ends for another reason."""
        try:
            self.finish()
        except SaveError as error:
            warnings.warn(str(error), stacklevel=2)

    def restore(self, step: int) -> None:
        """Take over weights and optimizer states of checkpoint `step`, which any number of ranks may have saved.

        Raises ValueError when they do not fit.
        """
        path, ranks = self._checkpoints.path(step), self._checkpoints.ranks
        layout = stored(path)
        unknown = next((name for name in layout if parameter_of(name) not in self._weights), None)
        if unknown is not None:
            raise ValueError(f"{path} holds {unknown}, but no such parameter is trained")
        states = {
            name: _room(self._weights[parameter_of(name)], like) for name, like in layout.items() if is_state(name)
        }
        read_into(path, {**self._weights, **states}, ranks)
        load_optimizer_tensors(self._optimizer, self._names, states)

    def _write(self, step: int, tensors: Mapping[str, Tensor]) -> None:
        try:
            self._checkpoints.save(step, tensors, self._config)
        except SaveError as error:
            self._failure = error

    def _copied(self, step: int, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The tensors' values of now in host memory."""
        parts = {name: local(tensor) for name, tensor in tensors.items()}
        devices = {part.device for part in parts.values() if part.is_cuda}
        new = [name for name in tensors if name not in self._copies]
        try:
            for name, room in zip(new, _host_rooms([parts[name] for name in new], pinned=bool(devices)), strict=True):
                self._copies[name] = sharded_like(tensors[name], room, tuple(tensors[name].shape))
            for name, part in parts.items():
                local(self._copies[name]).copy_(part, non_blocking=True)
        except (MemoryError, RuntimeError) as error:
            raise SaveError(
                f"checkpoint of step {step} could not be copied to host memory ({error}); run.save_async false needs "
                "no copy"
            ) from error
        for device in devices:
            torch.cuda.synchronize(device)
        return self._copies


def optimizer_tensors(optimizer: torch.optim.Optimizer, names: Sequence[str]) -> dict[str, Tensor]:
    """Optimizer state as flat tensors ``<parameter>/<state>``; `names` are the parameters in the optimizer's order."""
    state = optimizer.state_dict()["state"]
    return {f"{names[index]}/{key}": value for index, entry in state.items() for key, value in entry.items()}


def load_optimizer_tensors(
    optimizer: torch.optim.Optimizer, names: Sequence[str], tensors: Mapping[str, Tensor]
) -> None:
    """The inverse of `optimizer_tensors`; hyper-parameters stay the optimizer's own."""
    numbers = {name: number for number, name in enumerate(names)}
    state: dict[int, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        name, _, entry = key.rpartition("/")
        state.setdefault(numbers[name], {})[entry] = value
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def _host_rooms(parts: Sequence[Tensor], *, pinned: bool) -> Iterator[Tensor]:
    """Host memory for each of `parts`, cut out of large segments: torch rounds what it pins up to a power of two."""
    sizes = [-(-part.nbytes // _ALIGNMENT) * _ALIGNMENT for part in parts]
    left, free = sum(sizes), torch.empty(0, dtype=torch.uint8)
    for part, size in zip(parts, sizes, strict=True):
        if size > len(free):
            free = torch.empty(max(size, min(left, _SEGMENT)), dtype=torch.uint8, pin_memory=pinned)
        yield free[: part.nbytes].view(part.dtype).view(part.shape)
        left, free = left - size, free[size:]


def _room(parameter: Tensor, like: Tensor) -> Tensor:
    """Host memory for a state of `parameter` that is `like` this one: of its rows, those that this process holds."""
    if not isinstance(parameter, DTensor) or not like.ndim:
        return torch.empty_like(like, device="cpu")
    shape = (local_rows(parameter)[1], *like.shape[1:])
    return sharded_like(parameter, torch.empty(shape, dtype=like.dtype), tuple(like.shape))
