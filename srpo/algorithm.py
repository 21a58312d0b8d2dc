"""What the trainer asks of an algorithm: gradients of an update, what they were of, and what they cost."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from srpo.batches import CleanBatches
from srpo.config import TrainConfig
from srpo.distributed import Ranks
from srpo.models import Flux
from srpo.prompts import Prompt
from srpo.rewards import Reward
from srpo_kernels.checkpointing import Mode

__all__ = ["Algorithm", "Draw", "DrawingAlgorithm", "NonFiniteError", "Seconds"]

T = TypeVar("T")

#: Forward passes that a forward and its backward cost, the backward two. Selective checkpointing repeats no GEMM.
_WITH_BACKWARD: dict[Mode, int] = {"none": 3, "selective": 3, "block": 4}


class NonFiniteError(RuntimeError):
    """A score or gradient is NaN or infinite; the weights have not been touched by it."""


@dataclass(frozen=True)
class Draw:
    """One backward pass of an update. Keeps no graph once its loss has gone backward."""

    loss: Tensor
    branch_losses: Tensor  # [K]
    scores: Tensor  # [K, B]
    branches: tuple[str, ...]
    captions: list[Prompt]
    timestep: int | None  # or step of the rollout; None where there is not one for all images
    forwards: float  # of the transformer for one image, that it cost: see `Algorithm.trained`

    def non_finite(self) -> str | None:
        """Branch and prompt of the first score that is NaN or infinite."""
        bad = (~self.scores.isfinite()).nonzero().tolist()
        if not bad:
            return None
        branch, row = bad[0]
        score = self.scores[branch, row].item()
        return f"the {self.branches[branch]} branch scored {score} for prompt {self.captions[row].text!r}"


class Seconds(dict[str, float]):
    """Time of each phase of an update, with the device's work done."""

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self._device = device

    @contextmanager
    def of(self, phase: str) -> Iterator[None]:
        """Add the time of the block to `phase`."""
        start = time.perf_counter()
        yield
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        self[phase] = self.get(phase, 0.0) + time.perf_counter() - start


class Algorithm(ABC):
    """The gradient of a whole batch, left in the transformer's parameters.

    All that is random is a pure function of the seed, the step and a number that no rank shares.

    Args:
        sharded: the transformer's gradients are averaged in backward. checkpointing: what its blocks keep for backward.
    """

    #: Optimizer steps of an update; `accumulate` is called for each.
    parts = 1

    def __init__(
        self,
        config: TrainConfig,
        ranks: Ranks,
        flux: Flux,
        reward: Reward,
        batches: CleanBatches,
        *,
        sharded: bool,
        checkpointing: Mode = "none",
    ) -> None:
        self.config = config
        self._ranks, self._flux, self._reward, self._batches = ranks, flux, reward, batches
        self._sharded, self._with_backward = sharded, _WITH_BACKWARD[checkpointing]

    @classmethod
    def backwards(cls, config: TrainConfig) -> int:
        """Backward passes of each clean batch in an optimizer step."""
        return config.run.draws_per_rollout

    @abstractmethod
    def scored(self, step: int, captions: Sequence[Prompt]) -> list[str]:
        """All prompts that the reward will be asked about for `captions`."""

    @abstractmethod
    def accumulate(self, step: int, check: Callable[[], None], seconds: Seconds, part: int = 0) -> list[Draw]:
        """Add the mean gradient over all draws of all ranks to the parameters.

        `check` may raise between model calls, for as long as the update has not changed the weights.

        Raises:
            NonFiniteError: a score of any rank is not finite; all ranks raise together.
        """

    def trained(self, rows: int) -> int:
        """Forward passes of one image that a gradient of `rows` images costs: the backward counts as two, and what
        checkpointing repeats as one."""
        return rows * self._with_backward

    def backward(self, loss: Tensor, *, last: bool) -> None:
        """Add the gradient of `loss`, of the optimizer step's `last` one or not."""
        self._flux.reduce_gradients(last, every=self.config.run.reduce == "backward")
        loss.backward()

    def finish(self, step: int, draws: Sequence[Draw]) -> None:
        """Check the scores of all draws of an optimizer step, and average its gradients over ranks."""
        problem = next(filter(None, (draw.non_finite() for draw in draws)), None)
        if self._ranks.any(problem is not None):
            raise NonFiniteError(f"update {step + 1}: {problem or 'a score of another rank is not finite'}")
        if not self._sharded:  # FSDP2 averages them in backward
            parameters = self._flux.transformer.parameters()
            self._ranks.average(parameter.grad for parameter in parameters if parameter.grad is not None)

    def record(self, step: int, draws: Sequence[Draw]) -> dict[str, Any]:
        """What the log keeps of an update's draws: means over all of them and all ranks, and forwards in all."""
        del step
        names = draws[0].branches
        losses = torch.stack([draw.branch_losses for draw in draws]).mean(0)
        scores = torch.stack([draw.scores.mean(1) for draw in draws]).mean(0)
        forwards = torch.tensor(float(sum(draw.forwards for draw in draws)), device=losses.device)
        self._ranks.average([losses, scores, forwards])
        return {
            "losses": {"total": losses.sum().item(), **dict(zip(names, losses.tolist(), strict=True))},
            "scores": dict(zip(names, scores.tolist(), strict=True)),
            "timesteps": [draw.timestep for draw in draws if draw.timestep is not None],
            "forwards": round(forwards.item() * self._ranks.world),
        }


class DrawingAlgorithm(Algorithm, Generic[T]):
    """One whose clean batches each have draws, with a backward pass each."""

    @abstractmethod
    def load(self, step: int, index: int, check: Callable[[], None]) -> T:
        """What the draws of this rank's clean batch `index` begin with; `check` may raise between model calls."""

    @abstractmethod
    def draw(self, step: int, name: str, batch: T) -> Draw:
        """The loss of draw `name` ("number of the batch/of the draw") of an update, ready for backward."""

    def accumulate(self, step: int, check: Callable[[], None], seconds: Seconds, part: int = 0) -> list[Draw]:
        del part  # the only one
        count, batches = self.backwards(self.config), self._batches
        total = batches.count * count
        draws: list[Draw] = []
        for index in range(batches.count):
            with seconds.of("text"):
                batches.embed_texts(step, index, self.scored)
            with seconds.of("rollout"):
                batch = self.load(step, index, check)
            for number in range(count):
                check()
                with seconds.of("gradient"):
                    draw = self.draw(step, f"{batches.number(index)}/{number}", batch)
                    self.backward(draw.loss / total, last=len(draws) == total - 1)
                draws.append(replace(draw, loss=draw.loss.detach()))
        with seconds.of("gradient"):
            self.finish(step, draws)
        return draws
