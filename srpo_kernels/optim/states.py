"""Loading and converting optimizer states: the native form, and that of `torch.optim.AdamW`."""

from __future__ import annotations

from copy import deepcopy
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from srpo_kernels.optim.sharding import local, local_rows, matrix
from srpo_kernels.optim.storage import Storage
from srpo_kernels.optim.work import every_storage, storages

if TYPE_CHECKING:
    from srpo_kernels.optim.adamw import AdamW

__all__ = ["canonical", "load_canonical", "load_native"]

_CANONICAL_OPTIONS = ("lr", "betas", "eps", "weight_decay")


def _parameters(optimizer: AdamW, saved: dict[str, Any]) -> dict[int, Tensor]:
    """Parameter by its number in the saved state; raises `ValueError` unless the groups fit."""
    groups, saved_groups = optimizer.param_groups, saved["param_groups"]
    if len(groups) != len(saved_groups):
        raise ValueError(f"AdamW: the state has {len(saved_groups)} parameter groups, the optimizer {len(groups)}")
    found: dict[int, Tensor] = {}
    for number, (group, other) in enumerate(zip(groups, saved_groups, strict=True)):
        if len(group["params"]) != len(other["params"]):
            raise ValueError(
                f"AdamW: group {number} of the state has {len(other['params'])} parameters, "
                f"the optimizer's {len(group['params'])}"
            )
        found.update(zip(other["params"], group["params"], strict=True))
    return found


def _set_options(group: dict[str, Any], options: dict[str, Any]) -> None:
    """Take over options, a tensor as learning rate keeping its identity: captured graphs and schedulers hold it."""
    lr = group["lr"]
    group.update(deepcopy(options))
    if isinstance(lr, Tensor):
        group["lr"] = lr.copy_(torch.as_tensor(options["lr"]))


def _mine(value: Tensor, like: Tensor, what: str) -> Tensor:
    """The local part of `value`, which is either sharded as `like` is or whole."""
    if tuple(value.shape) != tuple(like.shape):
        raise ValueError(f"AdamW: {what} has shape {list(value.shape)}, expected {list(like.shape)}")
    if isinstance(value, DTensor):
        if (
            not isinstance(like, DTensor)
            or value.placements != like.placements
            or value.device_mesh != like.device_mesh
        ):
            raise ValueError(f"AdamW: {what} is not sharded as its parameter is")
        return local(value)
    if isinstance(like, DTensor):
        first, count = local_rows(like)
        return value[first : first + count]
    return value


@torch.no_grad()
def load_native(optimizer: AdamW, saved: dict[str, Any]) -> None:
    """`AdamW.load_state_dict` without hooks. Nothing is changed unless everything fits."""
    parameters = _parameters(optimizer, saved)
    for number, (group, other) in enumerate(zip(optimizer.param_groups, saved["param_groups"], strict=True)):
        for name in ("weights", "moments"):
            if other.get(name) != group[name]:
                raise ValueError(
                    f"AdamW: group {number} of the state has {name}={other.get(name)!r}, "
                    f"the optimizer {group[name]!r}; "
                    "use canonical_state_dict and load_canonical_state_dict to convert"
                )
    numbers = {parameter: number for number, parameter in parameters.items()}
    entries = {parameters[number]: entry for number, entry in saved["state"].items() if number in parameters}
    copies = []
    fresh: dict[Tensor, dict[str, Any]] = {parameter: {} for parameter in entries}
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if parameter not in entries:
                continue
            state = optimizer.state.get(parameter) or fresh[parameter]
            Storage.of(parameter, state, group, offload=optimizer.offload)
            fresh[parameter] = state
            entry, what = entries[parameter], f"the state of parameter {numbers[parameter]}"
            if entry.keys() != state.keys():
                raise ValueError(f"AdamW: {what} holds {sorted(entry)}, expected {sorted(state)}")
            for name, target in state.items():
                value = entry[name]
                if value.dtype != target.dtype:
                    raise ValueError(f"AdamW: {name} in {what} is {value.dtype}, expected {target.dtype}")
                copies.append((local(target), _mine(value, target, f"{name} in {what}")))
    for target, value in copies:
        if target.data_ptr() != value.data_ptr():  # DCP reads into the optimizer's own tensors
            target.copy_(value)
    optimizer.state.clear()
    optimizer.state.update(fresh)
    for group, other in zip(optimizer.param_groups, saved["param_groups"], strict=True):
        _set_options(group, {name: value for name, value in other.items() if name != "params"})


@torch.no_grad()
def canonical(optimizer: AdamW) -> dict[str, Any]:
    """`AdamW.canonical_state_dict`."""
    theirs = torch.optim.AdamW([torch.zeros(())]).defaults
    groups: list[dict[str, Any]] = []
    count = 0
    for group in optimizer.param_groups:
        options = {name: value for name, value in group.items() if name in _CANONICAL_OPTIONS or name == "initial_lr"}
        groups.append({**theirs, **deepcopy(options), "params": list(range(count, count + len(group["params"])))})
        count += len(group["params"])
    found: dict[str, Any] = {"state": {}, "param_groups": groups}
    masters, averages = {}, {}
    for number, (_, storage) in enumerate(every_storage(optimizer)):
        if storage is not None:
            found["state"][number] = {
                "step": storage.state["step"].clone(),
                "exp_avg": storage.whole(storage.first()),
                "exp_avg_sq": storage.whole(storage.second()),
            }
            masters[number] = storage.whole(storage.weight())
            if "ema" in storage.state:
                averages[number] = storage.state["ema"].clone()
    found["master_weights"] = masters
    if averages:
        found["ema_weights"] = averages
    return found


@torch.no_grad()
def load_canonical(optimizer: AdamW, saved: dict[str, Any]) -> None:
    """`AdamW.load_canonical_state_dict`. Nothing is changed unless everything fits."""
    parameters = _parameters(optimizer, saved)
    for number, other in enumerate(saved["param_groups"]):
        for name in ("amsgrad", "maximize"):
            if other.get(name):
                raise ValueError(f"AdamW: group {number} of the state has {name}=True, which is not supported")
    tensors: dict[Tensor, dict[str, Tensor]] = {}
    for name in ("exp_avg", "exp_avg_sq"):
        for number, entry in saved["state"].items():
            tensors.setdefault(parameters[number], {})[name] = entry[name]
    for name in ("master_weights", "ema_weights"):
        values = saved.get(name, {})
        for number, value in values.items() if isinstance(values, dict) else enumerate(values):
            tensors.setdefault(parameters[number], {})[name] = value
    numbers = {parameter: number for number, parameter in parameters.items()}
    rows = {
        parameter: {
            name: matrix(_mine(value, parameter, f"{name} of parameter {numbers[parameter]}"))
            for name, value in found.items()
        }
        for parameter, found in tensors.items()
    }
    optimizer.state.clear()
    for _, storage in storages(optimizer, rows):
        parameter, step = storage.parameter, storage.state["step"]
        found = {name: value.to(parameter.device) for name, value in rows[parameter].items()}
        if "exp_avg" in found:
            step.copy_(torch.as_tensor(saved["state"][numbers[parameter]]["step"]))
            moments = (found["exp_avg"].float(), found["exp_avg_sq"].float())
            storage.store(storage.encode(step, moments=moments))
        if "master_weights" in found:
            storage.store(storage.encode(step, weight=found["master_weights"].float()))
        if "ema" in storage.state:
            storage.store({"ema": found["ema_weights"] if "ema_weights" in found else storage.weight()})
    for group, other in zip(optimizer.param_groups, saved["param_groups"], strict=True):
        _set_options(group, {name: other[name] for name in _CANONICAL_OPTIONS})
