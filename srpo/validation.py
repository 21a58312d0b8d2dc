"""What a run shows of its model along the way: grids of fixed prompts and fixed noise."""

from __future__ import annotations

from pathlib import Path

from srpo.config import TrainConfig
from srpo.distributed import Ranks
from srpo.images import save_grid
from srpo.models import Flux
from srpo.randomness import generator
from srpo.sampling import sample_images
from srpo.sources import Sources

__all__ = ["Validation"]


class Validation:
    """The model of a run, looked at on a fixed validation set, so that steps compare."""

    def __init__(self, config: TrainConfig, ranks: Ranks, flux: Flux, sources: Sources) -> None:
        self.config = config
        self._ranks, self._flux, self._sources = ranks, flux, sources
        self._directory = Path(config.run.dir) / "samples"

    def due(self, step: int) -> bool:
        """Whether to look after update `step` (0: before the first)."""
        every = self.config.run.sample_every
        return bool(every) and (step % every == 0 or step == self.config.srpo.updates)

    def run(self, step: int) -> None:
        """Write the grid of update `step`; by all ranks together."""
        with self._flux.whole():
            if self._ranks.is_main:
                self._write_grid(step)

    def _write_grid(self, step: int) -> None:
        run, objective = self.config.run, self.config.srpo
        size = (objective.height, objective.width)
        prompts = self._sources.sample_prompts(run.sample_count)
        noise = self._flux.noise(len(prompts), *size, generator(run.seed, 0, 0, "sample"))
        images = sample_images(
            self._flux,
            noise,
            prompts,
            batch=run.micro_batch,
            size=size,
            steps=run.sample_steps,
            shift=objective.shift,
            guidance=objective.guidance,
        )
        save_grid(images, self._directory / f"step-{step:06d}.png")
