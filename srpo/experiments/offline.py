"""Real images as x0, against rollouts of the model's own."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from srpo.assets import TINY
from srpo.config import load_config
from srpo.errors import InputError
from srpo.experiments.arms import Arm, shown, trained
from srpo.experiments.experiment import Conclusion, Experiment, Row, Setting, measured
from srpo.experiments.looks import cost_to_reach, curve_figure, ends_table, last, surely
from srpo.images import panels
from srpo.tiny.digits import export_images

__all__ = ["Offline"]

ONLINE, MIXED, OFFLINE = ARMS = ("online", "mixed", "offline")
IMAGES = 1000  # of the paper's photographs there were fewer than 1500


class Offline(Experiment):
    """The same training on the model's own rollouts, on real images, and on both."""

    name = "offline"
    claim = "real images can take the place of online rollouts; fewer than 1500 photographs helped further."
    seeds = (5, 2)

    def measure(self, setting: Setting, out: Path, say: Callable[[str], None]) -> Iterator[Row]:
        images = [f"data.images={json.dumps(str(_images(setting, out)))}"]
        arms = [Arm(name, (f"data.mode={name}", *(images if name != ONLINE else ())), every=1) for name in ARMS]
        yield from trained(arms, setting, out, say)
        panels(shown(arms, out, 20), 10, stacked=True).save(out / f"{self.name}.png")

    def table(self, rows: Sequence[Row]) -> tuple[list[str], list[list[str]]]:
        columns = {"moved": "moved", "kept": "kept", "diverse": "diversity", "forwards": "forwards"}
        return ends_table(rows, ARMS, columns)

    def curves(self, rows: Sequence[Row]) -> list[str]:
        return [
            curve_figure(rows, ARMS, "moved", "moved", "forwards"),
            curve_figure(rows, ARMS, "moved", "moved"),
            curve_figure(rows, ARMS, "kept", "kept"),
            curve_figure(rows, ARMS, "diverse", "diversity"),
        ]

    def conclusions(self, rows: Sequence[Row]) -> list[Conclusion]:
        return [one for arm in (OFFLINE, MIXED) for one in _conclusions(rows, arm)]


def _conclusions(rows: Sequence[Row], arm: str) -> Iterator[Conclusion]:
    """Whether an arm moves the model, whether further than online, and at what cost."""
    moved, online = last(rows, arm, "moved"), last(rows, ONLINE, "moved")
    yield Conclusion(
        f"{arm}: moved {measured(moved)} in as many updates as online, {measured(online)}.", surely(moved) > 0
    )
    further = [mine - other for mine, other in zip(moved, online, strict=True)]
    yield Conclusion(f"{arm}: {measured(further)} further than online.", surely(further) > 0)
    if (target := 0.9 * min(*moved, *online)) <= 0:
        return
    pairs = zip(cost_to_reach(rows, ONLINE, target), cost_to_reach(rows, arm, target), strict=True)
    saved = [other / mine for other, mine in pairs]
    text = f"{arm}: {measured(saved)} times fewer forwards than online until it has moved {target:.2f}."
    yield Conclusion(text, None)


def _images(setting: Setting, out: Path) -> Path:
    """The recipe's images; of the tiny world digits, written to `out`."""
    config = load_config(setting.recipe, setting.overrides)
    if config.data.images is not None:
        return Path(config.data.images)
    if config.model.path != TINY:
        raise InputError("experiment offline needs data.images: a folder of captioned images")
    export_images(out / "images", IMAGES, 0)
    return out / "images"
