"""The tensors of a checkpoint in files: whole ones as safetensors, sharded ones by torch.distributed.checkpoint.

Names of an optimizer's states are ``<parameter>/<state>``, so that they differ from those of a model's tensors.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.tensor import DTensor

from srpo.distributed import ALONE, Ranks
from srpo_kernels.optim.sharding import local, local_rows

__all__ = ["is_state", "parameter_of", "read_into", "read_whole", "stored", "write_tensors", "writer_of"]

_MODEL, _OPTIMIZER = "transformer.safetensors", "optimizer.safetensors"


def is_state(name: str) -> bool:
    """Whether a tensor of that name is an optimizer's state."""
    return "/" in name


def parameter_of(name: str) -> str:
    """The parameter that a tensor of that name is, or is a state of."""
    return name.partition("/")[0]


def write_tensors(directory: Path, tensors: Mapping[str, Tensor], ranks: Ranks) -> None:
    """Write `tensors` into `directory`, which all ranks must do together; nothing is synced to the disk.

    Rank 0 writes them when they are whole. Of DTensors each rank writes what it holds, once where several hold it.

    Raises `OSError`, `safetensors.SafetensorError`.
    """
    if any(isinstance(tensor, DTensor) for tensor in tensors.values()):
        writer = FileSystemWriter(directory, sync_files=False)
        try:
            save(dict(tensors), storage_writer=writer, process_group=ranks.control)
        except CheckpointException as error:  # it holds a traceback of each rank
            raise next(iter(error.failures.values()))[0] from None
    elif ranks.is_main:
        for file, states in ((_MODEL, False), (_OPTIMIZER, True)):
            found = {name: tensor.contiguous() for name, tensor in tensors.items() if is_state(name) == states}
            save_file(found, directory / file)


def writer_of(file: str) -> int:
    """The rank that writes a file of this name."""
    match = re.match(r"__(\d+)_", file)
    return int(match[1]) if match else 0


def stored(directory: Path) -> dict[str, Tensor]:
    """What `write_tensors` wrote, as tensors on the meta device."""
    if _is_whole(directory):
        return {name: tensor.to("meta") for name, tensor in _load(directory).items()}
    metadata = FileSystemReader(directory).read_metadata().state_dict_metadata
    return {
        name: torch.empty(entry.size, dtype=entry.properties.dtype, device="meta")
        for name, entry in metadata.items()
        if isinstance(entry, TensorStorageMetadata)
    }


def read_whole(directory: Path, names: Iterable[str]) -> dict[str, Tensor]:
    """The tensors of these names in host memory, however they were written."""
    if _is_whole(directory):
        tensors = _load(directory)
        return {name: tensors[name] for name in names}
    layout = stored(directory)
    found = {name: torch.empty_like(layout[name], device="cpu") for name in names}
    read_into(directory, found, ALONE)
    return found


def read_into(directory: Path, targets: Mapping[str, Tensor], ranks: Ranks) -> None:
    """Fill `targets`, whole or sharded by rows, however they were written; all ranks must do so together.

    A rank reads what it holds of them.

    Raises ValueError when there is no tensor of a target's name, shape and dtype.
    """
    layout = stored(directory)
    for name, target in targets.items():
        there = layout.get(name)
        if there is None or (there.shape, there.dtype) != (target.shape, target.dtype):
            found = "nothing" if there is None else f"{list(there.shape)} of {there.dtype}"
            raise ValueError(f"{directory} holds {found} for {name}, not {list(target.shape)} of {target.dtype}")
    if _is_whole(directory):
        for name, value in _load(directory).items():
            if name in targets:
                _fill(targets[name], value)
    else:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "torch.distributed is")  # a single process is no mistake
            load(
                dict(targets),
                storage_reader=FileSystemReader(directory),
                process_group=ranks.control,
                no_dist=ranks.world == 1,
            )


@torch.no_grad()
def _fill(target: Tensor, value: Tensor) -> None:
    if isinstance(target, DTensor):
        first, count = local_rows(target)
        value = value[first : first + count] if value.ndim else value
    local(target).copy_(value)


def _is_whole(directory: Path) -> bool:
    return (directory / _MODEL).is_file()


def _load(directory: Path) -> dict[str, Tensor]:
    """All tensors of whole files, which are read when they are used."""
    return {**load_file(directory / _MODEL), **load_file(directory / _OPTIMIZER)}
