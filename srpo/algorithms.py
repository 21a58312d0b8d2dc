"""Every algorithm by the name that a recipe calls it."""

from __future__ import annotations

from srpo.algorithm import Algorithm
from srpo.baselines.dancegrpo import DanceGRPO
from srpo.baselines.direct_align import DirectAlign
from srpo.baselines.draft import DRaFT
from srpo.baselines.refl import ReFL
from srpo.update import Update

__all__ = ["ALGORITHMS"]

ALGORITHMS: dict[str, type[Algorithm]] = {
    "srpo": Update,
    "direct_align": DirectAlign,
    "refl": ReFL,
    "draft": DRaFT,
    "dancegrpo": DanceGRPO,
}
