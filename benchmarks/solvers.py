"""How far a rollout of few steps ends from one of many, by solver.

    python -m benchmarks.solvers [--json PATH]

The tiny model's latents against those of `REFERENCE` steps of the second-order solver from the same noise.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from srpo.assets import TINY, resolve_asset
from srpo.config import load_config
from srpo.models import Flux
from srpo.randomness import generator
from srpo.sampling import Solver, rollout
from srpo.tiny.digits import NAMES

__all__ = ["solver_rows"]

REFERENCE = 100
STEPS = (5, 8, 10, 15, 20, 25, 50)
SOLVERS: tuple[Solver, ...] = ("euler", "adams2")


def solver_rows(steps: tuple[int, ...] = STEPS, images: int = 40) -> Iterator[dict[str, Any]]:
    """Relative error of the final latents for every solver and number of steps, in one model call a step."""
    config = load_config("tiny")
    objective, size = config.srpo, (config.srpo.height, config.srpo.width)
    flux = Flux.load(resolve_asset(TINY, "pipeline"), max_sequence_length=config.model.max_sequence_length)
    flux.patch("auto")
    captions = [f"digit {NAMES[index % len(NAMES)]}" for index in range(images)]
    noise = flux.noise(images, *size, generator(0, 0, 0, "solvers"))

    def latents(count: int, solver: Solver) -> torch.Tensor:
        return rollout(
            flux,
            noise,
            captions,
            size=size,
            steps=count,
            shift=objective.shift,
            guidance=objective.rollout_guidance,
            solver=solver,
        )

    exact = latents(REFERENCE, "adams2")
    for solver in SOLVERS:
        for count in steps:
            error = (latents(count, solver) - exact).norm() / exact.norm()
            yield {"solver": solver, "steps": count, "error": error.item()}


def main() -> None:
    """Print the table, and write it."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.solvers", description=__doc__)
    parser.add_argument("--json", type=Path, help="also write the rows to this file")
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    for row in solver_rows():
        rows.append(row)
        print(f"{row['solver']:7} {row['steps']:3} steps: relative error {row['error']:.4f}", flush=True)
    if options.json is not None:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
