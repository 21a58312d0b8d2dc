"""A recipe's sections of the algorithms that are not SRPO: each one's own numbers, as its authors have them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, get_args

__all__ = [
    "ALGORITHMS",
    "BASELINES",
    "AlgorithmName",
    "BaselineConfig",
    "DRaFTConfig",
    "DanceGRPOConfig",
    "DirectAlignConfig",
    "ReFLConfig",
]

AlgorithmName = Literal["srpo", "direct_align", "refl", "draft", "dancegrpo"]
ALGORITHMS: tuple[str, ...] = get_args(AlgorithmName)


@dataclass(frozen=True)
class BaselineConfig:
    """What all of them have. All raise `ValueError`, naming the key, when a number is out of range."""

    name: ClassVar[str]
    title: ClassVar[str]
    #: Whether x0 is made by a rollout of the algorithm's own, so that there is nothing for real images to do.
    rolls_out: ClassVar[bool] = True

    control: bool = False  # score with the positive control word before the prompt, as SRPO does, and not the prompt

    def check(self, mode: str, draws_per_rollout: int, rollout_steps: int) -> None:
        """Raises `ValueError` when other sections ask for what the algorithm does not do."""
        del rollout_steps
        if self.rolls_out and mode != "online":
            raise ValueError(f"data.mode must be online for algorithm {self.name}, got {mode}")
        if self.rolls_out and draws_per_rollout != 1:
            raise ValueError(f"run.draws_per_rollout must be 1 for algorithm {self.name}, got {draws_per_rollout}")

    def _require(self, holds: bool, key: str, accepted: str) -> None:
        if not holds:
            raise ValueError(f"{self.name}.{key} must be {accepted}, got {getattr(self, key)!r}")

    def _check_threshold(self) -> None:
        threshold: Any = getattr(self, "threshold")  # noqa: B009 - of those that have one
        self._require(threshold is None or math.isfinite(threshold), "threshold", "a finite number or null")


@dataclass(frozen=True)
class DirectAlignConfig(BaselineConfig):
    """Direct-Align without the relative reward: the denoise branch, scored by one prompt (arXiv 2509.06942)."""

    name, title = "direct_align", "Direct-Align"
    rolls_out = False

    threshold: float | None = None  # loss is relu(threshold - score); null: -score

    def __post_init__(self) -> None:
        self._check_threshold()


@dataclass(frozen=True)
class ReFLConfig(BaselineConfig):
    """ReFL (arXiv 2304.05977): a rollout to a random late step, whose prediction of x0 is scored."""

    name, title = "refl", "ReFL"

    late: float = 0.25  # the last part of the rollout's steps, of which one is drawn: 30 to 39 of 40
    threshold: float | None = 2.0  # loss is weight * relu(threshold - score); null: -weight * score
    weight: float = 1e-3

    def __post_init__(self) -> None:
        self._check_threshold()
        self._require(0 < self.late <= 1, "late", "in (0, 1]")
        self._require(0 < self.weight < math.inf, "weight", "positive and finite")


@dataclass(frozen=True)
class DRaFTConfig(BaselineConfig):
    """DRaFT (arXiv 2309.17400): the gradient of -score through the last steps of a rollout."""

    name, title = "draft", "DRaFT"

    k: int = 1  # DRaFT-K: steps that the gradient goes through
    lv: int = 0  # DRaFT-LV: images noised again to the last step's level and denoised, to average over; the authors: 2

    def __post_init__(self) -> None:
        self._require(self.k >= 1, "k", "at least 1")
        self._require(self.lv >= 0, "lv", "at least 0")
        self._require(self.lv == 0 or self.k == 1, "lv", "0 unless draft.k is 1")

    def check(self, mode: str, draws_per_rollout: int, rollout_steps: int) -> None:
        super().check(mode, draws_per_rollout, rollout_steps)
        self._require(self.k <= rollout_steps, "k", f"at most srpo.rollout_steps, {rollout_steps}")


@dataclass(frozen=True)
class DanceGRPOConfig(BaselineConfig):
    """DanceGRPO (arXiv 2505.07818) with the numbers that its authors publish for FLUX."""

    name, title = "dancegrpo", "DanceGRPO"

    generations: int = 12  # images of each prompt, from one initial noise
    optimizer_steps: int = 3  # of an update; each takes its share of every prompt's images
    eta: float = 0.3  # of the SDE: noise per square root of sigma
    timestep_fraction: float = 0.6  # of an image's transitions but the last: those that are trained
    clip_range: float = 1e-4  # of the ratio of probabilities
    advantage_clip: float = 5.0
    # Score as SRPO does, (1 + kappa) positive - negative with srpo.discount_denoise's first kappa; of any reward, as
    # nothing is differentiated.
    relative: bool = False

    def __post_init__(self) -> None:
        self._require(not (self.relative and self.control), "control", "false when relative is true")
        self._require(self.generations >= 2, "generations", "at least 2")
        divides = self.optimizer_steps >= 1 and self.generations % self.optimizer_steps == 0
        self._require(divides, "optimizer_steps", f"a divisor of dancegrpo.generations, {self.generations}")
        self._require(0 < self.timestep_fraction <= 1, "timestep_fraction", "in (0, 1]")
        for key in ("eta", "clip_range", "advantage_clip"):
            self._require(0 < getattr(self, key) < math.inf, key, "positive and finite")

    def check(self, mode: str, draws_per_rollout: int, rollout_steps: int) -> None:
        super().check(mode, draws_per_rollout, rollout_steps)
        if self.trained_steps(rollout_steps) < 1:
            raise ValueError(
                f"dancegrpo.timestep_fraction {self.timestep_fraction} of the transitions but the last of "
                f"srpo.rollout_steps {rollout_steps} is none"
            )

    def trained_steps(self, rollout_steps: int) -> int:
        """Transitions of each image that are trained."""
        return int((rollout_steps - 1) * self.timestep_fraction)


#: By algorithm; the name of its section, too.
BASELINES: dict[str, type[BaselineConfig]] = {
    kind.name: kind for kind in (DirectAlignConfig, ReFLConfig, DRaFTConfig, DanceGRPOConfig)
}
