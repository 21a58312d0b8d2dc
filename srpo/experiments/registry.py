"""Every experiment by name."""

from __future__ import annotations

from srpo.experiments.bias import Bias
from srpo.experiments.convergence import Convergence
from srpo.experiments.ddpm import DDPM
from srpo.experiments.experiment import Experiment
from srpo.experiments.grpo import GRPO
from srpo.experiments.hacking import Hacking
from srpo.experiments.inversion import Inversion
from srpo.experiments.offline import Offline
from srpo.experiments.prompts import Prompts
from srpo.experiments.recovery import Recovery
from srpo.experiments.stability import Stability
from srpo.experiments.timesteps import Timesteps
from srpo.experiments.tokens import Tokens

__all__ = ["EXPERIMENTS"]

_EXPERIMENTS: tuple[Experiment, ...] = (
    Recovery(),
    Timesteps(),
    Convergence(),
    Prompts(),
    Bias(),
    Inversion(),
    Hacking(),
    Offline(),
    DDPM(),
    Stability(),
    Tokens(),
    GRPO(),
)
EXPERIMENTS: dict[str, Experiment] = {experiment.name: experiment for experiment in _EXPERIMENTS}
