"""From a pickle of weights to safetensors with a checksum beside it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from safetensors.torch import save

from srpo.errors import InputError
from srpo.rewards.weights import checksum, read_state, sidecar
from srpo.sealed import replace_file

__all__ = ["Converted", "convert"]


@dataclass(frozen=True)
class Converted:
    """What `convert` did."""

    source: str  # SHA-256 of the file read
    written: str  # and of the file written
    tensors: int
    parameters: int


def convert(source: Path, out: Path) -> Converted:
    """Write the tensors of `source` to the safetensors file `out`, and its SHA-256 to ``OUT.sha256``.

    `source` is read without running code from it, and may hold named tensors only, at its top or below "state_dict",
    "model" or "module". Names, dtypes and values stay; tensors that share memory become separate.

    Raises `InputError` when it holds anything else, or when a file to write is there: nothing is overwritten.
    """
    if out.suffix != ".safetensors":
        raise InputError(f"output {out} must end in .safetensors")
    for path in (out, sidecar(out)):
        if path.exists():
            raise InputError(f"output {path} already exists; choose another or remove it")
    state = read_state(source, "file")
    digest = checksum(source)
    content = save({name: tensor.contiguous().clone() for name, tensor in state.items()})
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        replace_file(out, content)
        written = checksum(out)
        replace_file(sidecar(out), f"{written}  {out.name}\n".encode())
    except OSError as error:
        raise InputError(f"output {out} cannot be written: {error}") from None
    return Converted(digest, written, len(state), sum(tensor.numel() for tensor in state.values()))
