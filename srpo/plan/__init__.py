"""What a run will need and take, reckoned from its recipe: no GPU, no weights.

`make_plan` adds up the bytes of each GPU term by term, the seconds of an update phase by phase, and, where the bytes
are too many, finds the smallest change that would do.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from srpo.config import TrainConfig
from srpo.errors import InputError
from srpo.hardware import Gpu
from srpo.plan.changes import Advice, advise
from srpo.plan.collectives import Collective, count_collectives
from srpo.plan.measured import Comparison, compare
from srpo.plan.memory import PHASES, Memory, memory
from srpo.plan.report import text
from srpo.plan.setting import Setting, Sharding
from srpo.plan.sizes import Sizes
from srpo.plan.timing import Efficiencies, Phase, phases

__all__ = ["Collective", "Efficiencies", "Plan", "make_plan"]


@dataclass(frozen=True)
class Plan:
    """Memory and time of a recipe on GPUs; `str()` shows it."""

    recipe: str
    setting: Setting
    memory: Memory
    phases: list[Phase]
    efficiencies: Efficiencies
    advice: Advice | None  # where it does not fit
    comparisons: list[Comparison]
    collectives: list[Collective] | None = None  # counted, where that was asked for

    @property
    def seconds(self) -> float:
        """Of one update."""
        return sum(phase.seconds for phase in self.phases)

    def __str__(self) -> str:
        return text(self)

    def as_dict(self) -> dict[str, Any]:
        """The plan as JSON has it: bytes and seconds."""
        setting, memory, advice = self.setting, self.memory, self.advice
        return {
            "recipe": self.recipe,
            "gpu": dataclasses.asdict(setting.gpu),
            "count": setting.count,
            "sharding": setting.sharding,
            "assumed": list(setting.sizes.assumed),
            "parameters": setting.sizes.parameters,
            "forward_flops": dataclasses.asdict(setting.sizes.forward),
            "checkpointing": memory.policy.mode,
            "memory": {
                "terms": [dataclasses.asdict(term) for term in memory.terms],
                "totals": {phase: memory.total(phase) for phase in PHASES},
                "capacity": memory.capacity,
                "host": memory.host,
            },
            "fits": memory.fits,
            "advice": advice
            and {
                "changes": [dataclasses.asdict(change) for change in advice.changes],
                "peak": advice.peak,
                "gpus": advice.gpus,
            },
            "phases": [dataclasses.asdict(phase) for phase in self.phases],
            "seconds": self.seconds,
            "efficiencies": dataclasses.asdict(self.efficiencies),
            "measured": [dataclasses.asdict(row) for row in self.comparisons],
            "collectives": self.collectives and [dataclasses.asdict(each) for each in self.collectives],
        }


def make_plan(
    recipe: str,
    config: TrainConfig,
    gpu: Gpu,
    count: int = 1,
    *,
    sharding: Sharding | None = None,
    efficiencies: Efficiencies | None = None,
    results: Path | None = None,
    collectives: bool = False,
) -> Plan:
    """The plan of `config`, called `recipe`, on `count` GPUs.

    Args:
        sharding: default the recipe's. efficiencies: parts of the GPU's ceilings to reckon with.
        results: folder of measurements to compare with. collectives: count what ranks exchange, in about a minute.

    Raises:
        InputError: the algorithm is not SRPO, the batch cannot be dealt out, a file that is there cannot be used, or
            sizes do not fit the model.
    """
    if config.baseline is not None:
        raise InputError(f"plans are reckoned for algorithm srpo only, got {config.algorithm}")
    chosen: Sharding = getattr(config.run, "sharding", "none") if sharding is None else sharding
    setting = Setting(config, gpu, count, chosen, Sizes.of(config))
    got = efficiencies or Efficiencies()
    needed = memory(setting)
    return Plan(
        recipe=recipe,
        setting=setting,
        memory=needed,
        phases=phases(setting, needed, got),
        efficiencies=got,
        advice=None if needed.fits else advise(setting),
        comparisons=compare(setting, got, results) if results else [],
        collectives=count_collectives(setting) if collectives else None,
    )
