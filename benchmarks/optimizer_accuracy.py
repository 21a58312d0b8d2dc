"""How far AdamW's displacement of the weights is from float64's, on gradients as small as SRPO's clipped ones.

    python -m benchmarks.optimizer_accuracy [--json PATH] [--steps 20 200 1500] [--tiny UPDATES]

Moments of every mode beside those of other libraries, whose rounding is restated here, and beside the libraries
themselves where they are installed (both run on the CPU; torchao compiles its step first); and what weights keep.
With --tiny, moments also on the gradients of so many updates of SRPO on the tiny model, two seconds each.
"""

from __future__ import annotations

import argparse
import importlib
import json
import math
import tempfile
from collections.abc import Callable, Iterable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_pre_hook

from srpo_kernels.optim import AdamW

__all__ = [
    "LIBRARIES",
    "LR",
    "PEERS",
    "Float64",
    "displacement_error",
    "gradients",
    "library_errors",
    "moment_errors",
    "peer_errors",
    "weight_errors",
]

LR = 5e-6
RMS = 9e-7  # of a gradient of norm 0.1 over FLUX's 11.9 B parameters


def gradients(rms: float, steps: int, *, rows: int = 64, spread: float = 1.0) -> Iterator[Tensor]:
    """fp32 [rows, 512] a step: 0.3 of one direction and noise; scales vary by row (e^.7) and by element (e^spread)."""
    generator = torch.Generator().manual_seed(1)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    scale = torch.exp(0.7 * normal(rows, 1) + spread * normal(rows, 512))
    scale *= rms / scale.square().mean().sqrt()
    direction = normal(rows, 512)
    for _ in range(steps):
        yield (scale * (0.3 * direction + math.sqrt(1 - 0.3**2) * normal(rows, 512))).float()


def tiny_gradients(updates: int, rms: float = RMS) -> list[Tensor]:
    """fp32 [rows, 512] an update: what SRPO on the tiny model steps by, all scaled to `rms`, as its clip would."""
    from srpo.config import load_config
    from srpo.trainer import Trainer

    found = []

    def keep(optimizer: torch.optim.Optimizer, *_: object) -> None:
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        found.append(torch.cat([each.grad.float().flatten() for each in parameters if each.grad.ndim > 1]))

    with tempfile.TemporaryDirectory() as folder:
        rare = [f"{name}={updates}" for name in ("srpo.updates", "run.save_every", "run.sample_every")]
        hook = register_optimizer_step_pre_hook(keep)
        try:
            Trainer(load_config("tiny", [f"run.dir={folder}/run", *rare])).fit()
        finally:
            hook.remove()
    rows = [gradient[: gradient.numel() // 512 * 512].view(-1, 512) for gradient in found]
    return [gradient * (rms / gradient.square().mean().sqrt()) for gradient in rows]


class Float64:
    """AdamW in float64, its moments rounded by functions if there are any."""

    def __init__(
        self,
        weight: Tensor,
        *,
        lr: float = LR,
        weight_decay: float = 0.0,
        first: Callable[[Tensor], Tensor] = lambda x: x,
        second: Callable[[Tensor], Tensor] = lambda x: x,
    ) -> None:
        self.weight, self.lr, self.decay = weight.double(), lr, weight_decay
        self.m = self.v = torch.zeros_like(self.weight)
        self.round_first, self.round_second, self.t = first, second, 0

    def step(self, gradient: Tensor) -> None:
        self.t += 1
        gradient = gradient.double()
        m = 0.9 * self.m + 0.1 * gradient
        v = 0.999 * self.v + 0.001 * gradient.square()
        update = (m / (1 - 0.9**self.t)) / ((v / (1 - 0.999**self.t)).sqrt() + 1e-8)
        self.weight = self.weight * (1 - self.lr * self.decay) - self.lr * update
        self.m, self.v = self.round_first(m), self.round_second(v)


def displacement_error(found: Tensor, wanted: Tensor) -> tuple[float, float]:
    """Relative L2 error, and gain, of a displacement."""
    found, wanted = found.double(), wanted.double()
    gain = (found * wanted).sum() / wanted.square().sum()
    return ((found - wanted).norm() / wanted.norm()).item(), gain.item()


# --- other libraries' moments, ported line by line ------------------------------------------------


def _dynamic_map(signed: bool) -> Tensor:
    """bitsandbytes' `create_dynamic_map`, 8 bits."""
    data = [0.0, 1.0]
    for i in range(7):
        borders = torch.linspace(0.1, 1, (2**i if signed else 2 ** (i + 1)) + 1, dtype=torch.float64)
        means = (10.0 ** (i - 6) * (borders[:-1] + borders[1:]) / 2).tolist()
        data += means + ([-mean for mean in means] if signed else [])
    return torch.tensor(sorted(data), dtype=torch.float64)


def _dynamic(signed: bool, smallest_scale: float) -> Callable[[Tensor], Tensor]:
    values = _dynamic_map(signed)
    middles = (values[1:] + values[:-1]) / 2

    def rounded(x: Tensor) -> Tensor:
        blocks = x.view(-1, 256)
        scale = blocks.abs().amax(1, keepdim=True).clamp(min=smallest_scale)
        return (values[torch.bucketize(blocks / scale, middles)] * scale).view_as(x)

    return rounded


def _flash_first(x: Tensor) -> Tensor:
    blocks = x.view(-1, 32)
    scale = blocks.abs().amax(1, keepdim=True).clamp(min=1e-12)
    n = blocks / scale
    codes = torch.round(2 * n / (1 + n.abs()) * 127) / 127
    return (codes / (2 - codes.abs()) * scale.half().double()).view_as(x)


def _flash_second(x: Tensor) -> Tensor:
    blocks = x.view(-1, 32).sqrt()
    scale = blocks.amax(1, keepdim=True).clamp(min=1e-12)
    return (torch.round(blocks / scale * 255) / 255 * scale.half().double()).square().view_as(x)


#: How moments are rounded: bitsandbytes and torchao (8 bits), FlashOptim 0.1.4.
PEERS = {
    "bitsandbytes": (_dynamic(True, 1e-38), _dynamic(False, 1e-38)),
    "torchao": (_dynamic(True, 1e-12), _dynamic(False, 1e-12)),
    "FlashOptim": (_flash_first, _flash_second),
}


#: Those that can be installed from PyPI and run on a CPU (FlashOptim is a Triton kernel).
LIBRARIES = ("bitsandbytes", "torchao")


# --- measurements ---------------------------------------------------------------------------------

Errors = dict[str, tuple[float, float]]  # relative error and gain by name


def moment_errors(moments: list[str], rms: float, steps: int, *, rows: int = 32, spread: float = 1.0) -> Errors:
    """Of AdamW with these `moments` and fp32 weights, which start at zero."""
    return moment_errors_on(gradients(rms, steps, rows=rows, spread=spread), moments, rows)


def moment_errors_on(given: Iterable[Tensor], moments: list[str], rows: int) -> Errors:
    """The same on `given` gradients [rows, 512]."""
    optimizers = {}
    for name in moments:
        parameter = torch.nn.Parameter(torch.zeros(rows, 512))
        optimizers[name] = AdamW([parameter], LR, weight_decay=0.0, weights="fp32", moments=name)
    exact = Float64(torch.zeros(rows, 512))
    for gradient in given:
        exact.step(gradient)
        for optimizer in optimizers.values():
            optimizer.param_groups[0]["params"][0].grad = gradient
            optimizer.step()
    return {
        name: displacement_error(optimizer.master_weights()[0], exact.weight) for name, optimizer in optimizers.items()
    }


def peer_errors(rms: float, steps: int, *, rows: int = 32) -> Errors:
    """The same with moments rounded as other libraries do."""
    return peer_errors_on(gradients(rms, steps, rows=rows), rows)


def peer_errors_on(given: Iterable[Tensor], rows: int) -> Errors:
    """The same on `given` gradients [rows, 512]."""
    exact = Float64(torch.zeros(rows, 512))
    peers = {name: Float64(torch.zeros(rows, 512), first=m, second=v) for name, (m, v) in PEERS.items()}
    for gradient in given:
        for run in (exact, *peers.values()):
            run.step(gradient)
    return {name: displacement_error(run.weight, exact.weight) for name, run in peers.items()}


def library_errors(library: str, rms: float, steps: int, *, rows: int = 32) -> tuple[float, float]:
    """The same of the 8-bit AdamW of `LIBRARIES` itself."""
    parameter, exact = torch.nn.Parameter(torch.zeros(rows, 512)), Float64(torch.zeros(rows, 512))
    optimizer = importlib.import_module(f"{library}.optim").AdamW8bit([parameter], lr=LR, weight_decay=0.0)
    for gradient in gradients(rms, steps, rows=rows):
        exact.step(gradient)
        parameter.grad = gradient
        optimizer.step()
    return displacement_error(parameter.detach(), exact.weight)


def weight_errors(steps: int, *, sigma: float = 0.02, rows: int = 32) -> Errors:
    """Of weights of deviation `sigma` in every mode, and in bf16 rounded to nearest (torch's AdamW); fp32 moments."""
    generator = torch.Generator().manual_seed(5)
    start = (sigma * torch.randn(rows, 512, generator=generator)).bfloat16()
    exact, plain = Float64(start), torch.nn.Parameter(start.clone())
    ours = {}
    for weights in ("split32", "split24", "bf16_sr"):
        parameter = torch.nn.Parameter(start.clone())
        ours[weights] = AdamW([parameter], LR, weight_decay=0.0, weights=weights, moments="fp32")
    theirs = torch.optim.AdamW([plain], lr=LR, weight_decay=0.0)
    for gradient in gradients(RMS, steps, rows=rows):
        half = gradient.bfloat16()
        exact.step(half)
        for optimizer in (*ours.values(), theirs):
            optimizer.param_groups[0]["params"][0].grad = half
            optimizer.step()
    moved = {name: optimizer.master_weights()[0].double() for name, optimizer in ours.items()}
    moved["bf16, nearest"] = plain.detach().double()
    return {name: displacement_error(x - start.double(), exact.weight - start.double()) for name, x in moved.items()}


def main() -> None:
    """Print the rows, and write them."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.optimizer_accuracy", description=__doc__)
    parser.add_argument("--json", type=Path, help="also write the rows to this file")
    parser.add_argument("--steps", type=int, nargs="+", default=[20, 200])
    parser.add_argument("--tiny", type=int, metavar="UPDATES", help="also on the tiny SRPO run's gradients")
    options = parser.parse_args()
    rows: list[dict[str, Any]] = []
    tiny = tiny_gradients(options.tiny) if options.tiny else []
    for steps in options.steps:
        found = {
            "moments": moment_errors(["M4", "M3", "M2"], RMS, steps) | peer_errors(RMS, steps),
            "library": {name: library_errors(name, RMS, steps) for name in LIBRARIES if find_spec(name)},
            "weights": weight_errors(steps),
        }
        if steps <= len(tiny):
            count = len(tiny[0])
            ours = moment_errors_on(tiny[:steps], ["M4", "M3", "M2"], count)
            found["tiny SRPO"] = ours | peer_errors_on(tiny[:steps], count)
        for kind, errors in found.items():
            for name, (error, gain) in errors.items():
                rows.append({"kind": kind, "name": name, "steps": steps, "error": error, "gain": gain})
                print(f"{kind} {name:14} {steps:5} steps: error {error:.4f}, gain {gain:.3f}", flush=True)
    if options.json is not None:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
