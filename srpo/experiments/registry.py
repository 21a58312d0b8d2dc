"""Every experiment by name."""

from __future__ import annotations

from srpo.experiments.bias import Bias
from srpo.experiments.experiment import Experiment
from srpo.experiments.inversion import Inversion
from srpo.experiments.offline import Offline
from srpo.experiments.prompts import Prompts
from srpo.experiments.recovery import Recovery
from srpo.experiments.stability import Stability
from srpo.experiments.timesteps import Timesteps

__all__ = ["EXPERIMENTS"]

EXPERIMENTS: dict[str, Experiment] = {
    experiment.name: experiment
    for experiment in (Recovery(), Timesteps(), Prompts(), Bias(), Inversion(), Offline(), Stability())
}
