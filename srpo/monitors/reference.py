"""What step 0 of a run looked like, kept in its directory: later steps are measured against it."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from srpo.monitors.measured import Measured
from srpo.sealed import read_sealed, write_sealed

__all__ = ["REFERENCE_NAME", "Reference"]

REFERENCE_NAME = "validation/step-0.safetensors"


@dataclass(frozen=True)
class Reference:
    """Step 0: its measurements, its images by size, and where and what its velocities were.

    Attributes:
        measured: by monitor and prompt.
        images: uint8 [N, 3, H, W] by "HxW", in the order of `srpo.validation`.
        latents: clean latents [D, S, 4C] that velocities are compared at, noised; velocities: [D, K, S, 4C].
    """

    measured: Measured
    images: dict[str, Tensor]
    latents: Tensor
    velocities: Tensor

    def write(self, directory: Path, key: str) -> None:
        """Keep it in a run's directory, whole or not at all. `key`: all that it depends on. Raises `OSError`."""
        text = torch.tensor(list(json.dumps(self.measured).encode()), dtype=torch.uint8)
        tensors = {f"images/{size}": images for size, images in self.images.items()}
        tensors |= {"measured": text, "latents": self.latents, "velocities": self.velocities}
        path = directory / REFERENCE_NAME
        path.parent.mkdir(parents=True, exist_ok=True)
        write_sealed(path, key, tensors)

    @classmethod
    def read(cls, directory: Path, key: str) -> Reference | None:
        """What `write` kept; None when it is not there, damaged, or of another `key`."""
        tensors = read_sealed(directory / REFERENCE_NAME, key)
        if tensors is None:
            return None
        images = {name.partition("/")[2]: tensors[name] for name in tensors if name.startswith("images/")}
        measured = json.loads(bytes(tensors["measured"].tolist()))
        return cls(measured, images, tensors["latents"], tensors["velocities"])
