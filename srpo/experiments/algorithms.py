"""Every algorithm as an arm: what it takes for all of them to want the same thing, on the same number of images."""

from __future__ import annotations

import math

from srpo.config import load_config
from srpo.experiments.arms import Arm
from srpo.experiments.experiment import Setting

__all__ = ["ALGORITHMS", "algorithm_arm"]

#: All are told by the control word where to go. ReFL's threshold binds nowhere, and its loss is not scaled down; within
#: DanceGRPO's own clip_range of 1e-4 a model this small goes half as far.
ALGORITHMS: dict[str, tuple[str, ...]] = {
    "srpo": (),
    "direct_align": ("algorithm=direct_align", "direct_align.control=true"),
    "refl": ("algorithm=refl", "refl.control=true", "refl.threshold=null", "refl.weight=1"),
    "draft": ("algorithm=draft", "draft.control=true"),
    "draft_lv": ("algorithm=draft", "draft.control=true", "draft.lv=2"),
    "dancegrpo": ("algorithm=dancegrpo", "dancegrpo.control=true", "dancegrpo.clip_range=0.01"),
}


def algorithm_arm(
    algorithm: str, setting: Setting, name: str, updates: int, *overrides: str, rate: float = 1.0, every: int = 0
) -> Arm:
    """An arm of `ALGORITHMS`, to be `trained` with no overrides of the setting's: it has them, before its own.

    An optimizer step is on as many images whatever the algorithm; DanceGRPO takes several of them an update.
    `rate`: the learning rate in that of the recipe.
    """
    given = (*ALGORITHMS[algorithm], *setting.overrides)
    config = load_config(setting.recipe, given)
    own = [f"srpo.updates={updates}", f"srpo.learning_rate={rate * config.srpo.learning_rate}"]
    if config.dancegrpo is not None:
        prompts = max(1, config.srpo.batch_size * config.dancegrpo.optimizer_steps // config.dancegrpo.generations)
        own += [f"srpo.batch_size={prompts}", f"run.micro_batch={math.gcd(prompts, config.run.micro_batch)}"]
    return Arm(name, (*given, *own, *overrides), every)
