"""The model of a run looked at along the way: grids, monitors with their limits, and the best checkpoint."""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from statistics import fmean
from typing import Any

from PIL import Image

from srpo.best import write_best
from srpo.checkpoint import Checkpoints
from srpo.config import TrainConfig
from srpo.distributed import Ranks
from srpo.errors import InputError
from srpo.images import make_grid, make_pairs
from srpo.models import Flux
from srpo.monitors import harm_of
from srpo.monitors.looker import Looker
from srpo.monitors.measured import Breach, breaches, passes
from srpo.monitors.reference import Reference
from srpo.monitors.scores import Scores
from srpo.precision import compute_dtype
from srpo.rewards import Reward
from srpo.runlog import RunLog, read_log
from srpo.sources import Sources

__all__ = ["Validation"]


class Validation:
    """The model of a run, looked at on a fixed validation set, so that steps compare with step 0.

    Attributes:
        stopped: the limits of ``validation.stop`` that the last step looked at passed.

    Raises `InputError` when a reward of the `validation` section cannot be used.
    """

    def __init__(self, config: TrainConfig, ranks: Ranks, flux: Flux, sources: Sources, reward: Reward) -> None:
        self.config, self.stopped = config, list[Breach]()
        self._ranks, self._directory = ranks, Path(config.run.dir)
        self._reference: Reference | None = None
        self._best: float | None = None
        if not config.run.sample_every:
            return
        dtype = compute_dtype(config.model.precision)
        scores = Scores.load(reward, config.reward, config.validation, config.srpo, device=ranks.device, dtype=dtype)
        prompts = [prompt for prompt in sources.sample_prompts() for _ in range(config.validation.noises)]
        self._looker = Looker(config, ranks, flux, prompts, scores)

    def due(self, step: int) -> bool:
        """Whether to look after update `step` (0: before the first)."""
        every = self.config.run.sample_every
        return bool(every) and (step % every == 0 or step == self.config.srpo.updates)

    def pending(self, step: int) -> bool:
        """Whether to look at the step that a run starts from: it is due, and was not before it was cut off."""
        return self.due(step) and (step == 0 or all(record["step"] != step for record in self._records()))

    def restore(self, step: int) -> None:
        """Before the weights of checkpoint `step` are loaded: find what step 0 showed, or look again; by all ranks.

        Raises `InputError` when the run stopped at this step for a limit that it still passes.
        """
        if not self.config.run.sample_every:
            return
        found = Reference.read(self._directory, self._looker.key)
        if self._ranks.any(found is None) or found is None:
            found = self._first_look()
        self._reference = found
        self._check_measured(found.measured)
        records = [record for record in self._records() if record["step"] <= step]
        self._refuse_stopped(next((record["values"] for record in records if record["step"] == step), {}), step)
        monitor = self.config.validation.best
        if monitor is not None and self._ranks.is_main:
            kept = Checkpoints(self._directory / "checkpoints", self.config.run.keep).steps()
            for record in records:
                if record["step"] in kept and monitor in record["values"]:
                    self._choose(record["step"], record["values"][monitor])

    def run(self, step: int, log: RunLog | None) -> None:
        """Look at the model after update `step`, and write what is seen; by all ranks. `log`: the main rank's.

        Warns of every limit of ``validation.warn`` that is passed.

        Raises `InputError` at step 0 when ``validation.stop`` or ``validation.best`` asks for what cannot be measured.
        """
        began = time.perf_counter()
        if self._reference is None:
            self._reference = seen = self._first_look()
        else:
            seen = self._looker.look(self._reference)
        section, start = self.config.validation, self._reference.measured
        warned = breaches(seen.measured, start, section.warnings())
        self.stopped = breaches(seen.measured, start, section.stops())
        values = {name: fmean(of.values()) for name, of in seen.measured.items()}
        if step == 0:
            self._check_measured(values)
        if log is None:
            return
        grids = dict(self._grids(step, self._reference, seen))
        with _lost("samples"):
            for path, grid in grids.items():
                path.parent.mkdir(parents=True, exist_ok=True)
                grid.save(path)
        if section.best is not None and step:
            self._choose(step, values[section.best])
        for breach in warned:
            warnings.warn(f"update {step}: {breach}", stacklevel=2)
        limits = {"warn": section.warnings(), "stop": section.stops()}
        record = {
            "values": values,
            "warnings": _listed(warned),
            "stops": _listed(self.stopped),
            "limits": {kind: {name: str(limit) for name, limit in of.items()} for kind, of in limits.items()},
        }
        seconds = round(time.perf_counter() - began, 4)
        log.validation(step, {**record, "set": self._looker.key, "seconds": seconds}, grids)

    def _first_look(self) -> Reference:
        """Look at step 0, and keep it in the run's directory."""
        seen = self._looker.look(None)
        if self._ranks.is_main:
            with _lost("what step 0 showed"):
                seen.write(self._directory, self._looker.key)
        return seen

    def _grids(self, step: int, start: Reference, seen: Reference) -> Iterator[tuple[Path, Image.Image]]:
        """A grid for each size: of step 0, or of pairs of what step 0 and this one show."""
        for number, (size, images) in enumerate(seen.images.items()):
            path = self._directory / "samples" / f"step-{step:06d}{f'-{size}' if number else ''}.png"
            yield path, make_pairs(start.images[size] / 255, images / 255) if step else make_grid(images / 255)

    def _records(self) -> list[dict[str, Any]]:
        """What the run's log holds of the same validation set."""
        return [record for record in read_log(self._directory, "validation") if record["set"] == self._looker.key]

    def _choose(self, step: int, value: float) -> None:
        """Name `step` the best one if it is."""
        monitor = str(self.config.validation.best)
        if math.isfinite(value) and (self._best is None or harm_of(monitor, value - self._best) < 0):
            self._best = value
            with _lost("the name of the best checkpoint"):
                write_best(self._directory, step, monitor, value)

    def _check_measured(self, found: Collection[str]) -> None:
        """No limit may be there in vain."""
        section, monitors = self.config.validation, {name.partition("@")[0] for name in found}
        for key, names in (("stop", [*section.stop]), ("best", [section.best] if section.best else [])):
            for name in names:
                if name not in monitors:
                    raise InputError(
                        f"validation.{key}: {name} cannot be measured in this run (diversity needs two images "
                        "of a prompt, other monitors a reward that reads prompts: docs/monitors.md)"
                    )

    def _refuse_stopped(self, values: dict[str, float], step: int) -> None:
        limits, measured = self.config.validation.stops(), self._reference.measured if self._reference else {}
        for name, value in values.items():
            monitor, start = name.partition("@")[0], fmean(measured[name].values())
            if monitor in limits and passes(name, value, start, limits[monitor]):
                raise InputError(
                    f"the run stopped at update {step}: {name} went from {start:.4g} to {value:.4g}, more than "
                    f"{limits[monitor]} away; raise validation.stop.{monitor} to go on"
                )


@contextmanager
def _lost(what: str) -> Iterator[None]:
    """A full disk is a warning here: the next checkpoint tells whether the run can go on."""
    try:
        yield
    except OSError as error:
        warnings.warn(f"{what} could not be written: {error}", stacklevel=3)


def _listed(found: list[Breach]) -> list[dict[str, Any]]:
    return [asdict(breach) | {"limit": str(breach.limit)} for breach in found]
