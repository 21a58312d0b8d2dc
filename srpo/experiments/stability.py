"""Where the preference that a model was tuned for shows: at every noise level, and with every number of steps?"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from statistics import fmean

import numpy as np
import torch
from torch import Tensor

from srpo import page
from srpo.experiments.arms import Arm, trained
from srpo.experiments.experiment import Conclusion, Experiment, Row, Setting, measured
from srpo.experiments.looks import surely
from srpo.experiments.witness import Witness
from srpo.images import panels
from srpo.latents import shifted_sigmas
from srpo.randomness import generator
from srpo.sampling import Solver, integrate, rollout
from srpo.trainer import Trainer

__all__ = ["Stability"]

ARMS = {
    "srpo": (),
    "direct_align": ("algorithm=direct_align", "direct_align.control=true"),
    "refl": ("algorithm=refl", "refl.control=true"),
}
EULER = {f"{steps} steps": steps for steps in (4, 8, 10, 20, 50)}
SAMPLERS: dict[str, tuple[int, Solver]] = {
    **{name: (steps, "euler") for name, steps in EULER.items()},
    "10 steps of adams2": (10, "adams2"),
}
_LEVEL = "sigma "
_SHOWN = 2  # images in the picture


class Stability(Experiment):
    """Predictions of x0 all along a rollout, and images of several samplers, before a training and after it."""

    name = "stability"
    claim = "rewards are optimised over the whole trajectory, not at its end only."
    seeds = (4, 2)

    def measure(self, setting: Setting, out: Path, say: Callable[[str], None]) -> Iterator[Row]:
        quick = ("srpo.updates=4",) if setting.quick else ()
        arms = [Arm(name, (*quick, *overrides), also=_seen) for name, overrides in ARMS.items()]
        yield from trained(arms, setting, out, say, images=50)
        files = sorted((out / "srpo/0").glob("levels-*.npy"))  # of the first look and of the last
        titled = [(name, torch.from_numpy(np.load(file))) for name, file in zip(("base", "srpo"), files, strict=True)]
        panels(titled, len(titled[0][1]) // _SHOWN, stacked=True).save(out / f"{self.name}.png")

    def table(self, rows: Sequence[Row]) -> tuple[list[str], list[list[str]]]:
        lines = []
        for place in [*_spread(_levels(rows)), *SAMPLERS]:
            before, after = _at(rows, "srpo", place, "kept")
            lines.append([place, *map(measured, [*(_moved(rows, arm, place) for arm in ARMS), before, after])])
        return ["", *(f"{arm}: moved" for arm in ARMS), "base: kept", "srpo: kept"], lines

    def curves(self, rows: Sequence[Row]) -> list[str]:
        def figure(title: str, x_label: str, places: dict[str, float]) -> str:
            x = list(places.values())
            series = {arm: (x, [fmean(_moved(rows, arm, place)) for place in places]) for arm in ARMS}
            return page.curves(title, x_label, series)

        levels = {level: float(level.removeprefix(_LEVEL)) for level in _levels(rows)}
        return [
            figure("predictions of x0: moved", "sigma", levels),
            figure("images: moved", "Euler steps", {name: float(steps) for name, steps in EULER.items()}),
        ]

    def conclusions(self, rows: Sequence[Row]) -> list[Conclusion]:
        return [Conclusion(of(rows, arm), None) for of in (_along, _across) for arm in ARMS]


@torch.no_grad()
def _seen(trainer: Trainer, looker: Witness, update: int) -> Row:
    """What the witness says of images of every place, which a file of the run shows two of."""
    flux, size, batch = trainer.flux, trainer.size, trainer.config.run.micro_batch
    noise = flux.noise(len(looker.prompts), *size, generator(trainer.config.run.seed, 0, 0, "stability"))
    parts: dict[str, list[Tensor]] = {}
    for first in range(0, len(noise), batch):
        for place, latents in _latents(trainer, noise[first : first + batch], looker.prompts[first : first + batch]):
            parts.setdefault(place, []).append(flux.decode_packed(latents, size).cpu())
    images = {place: torch.cat(of) for place, of in parts.items()}
    levels = _spread([place for place in images if place.startswith(_LEVEL)])
    strip = torch.stack([images[level][:_SHOWN] for level in levels], 1).flatten(0, 1)
    np.save(trainer.directory / f"levels-{update}.npy", strip.numpy())
    return {"seen": {place: looker.judged(of) for place, of in images.items()}}


def _latents(trainer: Trainer, noise: Tensor, prompts: list[str]) -> Iterator[tuple[str, Tensor]]:
    """Predictions of x0 at each level of a rollout from `noise`, and what every sampler makes of it."""
    flux, size, objective = trainer.flux, trainer.size, trainer.config.srpo
    sigmas = shifted_sigmas(trainer.config.run.sample_steps, objective.shift).tolist()
    velocity = flux.trajectory(sigmas[:-1], flux.encode_prompts(prompts), objective.guidance, size)
    predictions: dict[str, Tensor] = {}

    def evaluate(x: Tensor, step: int) -> Tensor:
        v = velocity(x, step)
        predictions[f"{_LEVEL}{sigmas[step]:.3g}"] = x - sigmas[step] * v
        return v

    integrate(evaluate, noise, sigmas)
    yield from predictions.items()
    sample = partial(rollout, flux, noise, prompts, size=size, shift=objective.shift, guidance=objective.guidance)
    for name, (steps, solver) in SAMPLERS.items():
        yield name, sample(steps=steps, solver=solver)


def _levels(rows: Sequence[Row]) -> list[str]:
    return [place for place in rows[0]["seen"] if place.startswith(_LEVEL)]


def _spread(places: Sequence[str]) -> list[str]:
    """Ten of them at most."""
    return list(places[:: -(-len(places) // 10)])


def _at(rows: Sequence[Row], arm: str, place: str, key: str) -> tuple[list[float], list[float]]:
    """What each seed's first and last look saw."""
    of = [[row for row in rows if row["arm"] == arm and row["seed"] == seed] for seed in _seeds(rows)]
    ends = ([looks[end].get("seen", {}).get(place, {}).get(key, math.nan) for looks in of] for end in (0, -1))
    before, after = ends
    return before, after


def _seeds(rows: Sequence[Row]) -> list[int]:
    return sorted({row["seed"] for row in rows})


def _moved(rows: Sequence[Row], arm: str, place: str) -> list[float]:
    return [after - before for before, after in zip(*_at(rows, arm, place, "at"), strict=True)]


def _share(rows: Sequence[Row], arm: str, place: str, of: str) -> str:
    pairs = zip(_moved(rows, arm, place), _moved(rows, arm, of), strict=True)
    return measured([part / whole if whole else math.nan for part, whole in pairs])


def _along(rows: Sequence[Row], arm: str) -> str:
    levels = _levels(rows)
    sure = sum(surely(_moved(rows, arm, level)) > 0 for level in levels)
    shown = (levels[0], levels[len(levels) // 2], levels[-1])
    said = ", ".join(f"{measured(_moved(rows, arm, level))} at {level}" for level in shown)
    share = _share(rows, arm, levels[0], levels[-1])
    text = f"{arm}: predictions of x0 have moved at {sure} of {len(levels)} levels of a rollout: {said}"
    return f"{text}; at the first level {share} of what it is at the last."


def _across(rows: Sequence[Row], arm: str) -> str:
    said = ", ".join(f"{measured(_moved(rows, arm, name))} with {name}" for name in SAMPLERS)
    few, *_, many = EULER
    return f"{arm}: images have moved {said}; with {few} {_share(rows, arm, few, many)} of what it is with {many}."
