"""What would make a run fit: the change that costs its user least."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from typing import Any

from srpo.errors import InputError
from srpo.plan.memory import Memory, memory
from srpo.plan.setting import Setting

__all__ = ["Advice", "Change", "advise"]


@dataclass(frozen=True)
class Change:
    """An override of the recipe, and what it costs."""

    key: str
    value: str | int
    cost: str

    def __str__(self) -> str:
        return f"{self.key}={self.value}"

    def apply(self, setting: Setting) -> Setting:
        """`setting` so changed. Raises `InputError` or `ValueError` when it cannot be."""
        if self.key == "run.sharding":
            return replace(setting, sharding=self.value)  # type: ignore[arg-type]
        section, _, name = self.key.partition(".")
        changed: Any = replace(getattr(setting.config, section), **{name: self.value})
        return replace(setting, config=replace(setting.config, **{section: changed}))


@dataclass(frozen=True)
class Advice:
    """Changes that make it fit on the same GPUs (none: nothing known does), and how many GPUs would do without any."""

    changes: tuple[Change, ...]
    peak: float | None  # bytes on each GPU after them
    gpus: int | None  # with run.sharding=fsdp


def advise(setting: Setting) -> Advice:
    """What would make `setting` fit: the fewest changes, and of as many those that cost least.

    In the order of cost: what leaves the numbers of the run as they are (text_cache, checkpointing, image_chunk,
    micro_batch, sharding over the GPUs at hand and how it exchanges), what rounds more (frozen weights, sums of
    gradients, the optimizer's moments, its weights), and what makes updates slower (offload). A combination costs what
    its most costly change does.
    """
    known = list(_changes(setting))
    after = _after(setting, found) if (found := _fewest(setting, known)) else None
    return Advice(tuple(found), after.peak if after else None, _more_gpus(setting))


def _fewest(setting: Setting, known: Sequence[Change]) -> Sequence[Change]:
    strongest = {change.key: change for change in known}  # of a key the last
    if not _fits(setting, list(strongest.values())):
        return ()
    for number in range(1, len(strongest) + 1):
        choices = combinations(range(len(known)), number)
        for choice in sorted(choices, key=lambda indices: indices[::-1]):
            changes = [known[index] for index in choice]
            if len({change.key for change in changes}) == number and _fits(setting, changes):
                return changes
    return ()


def _changes(setting: Setting) -> Iterator[Change]:
    """In the order of their cost."""
    model, run, optimizer = setting.config.model, setting.config.run, setting.config.optimizer
    precision = model.precision
    if model.text_cache is None:
        yield Change("model.text_cache", "text-cache", "a directory that `srpo embed` fills first")
    if model.checkpointing == "none":
        yield Change("model.checkpointing", "selective", "elementwise passes and images run twice")
    if model.checkpointing != "block":
        yield Change("model.checkpointing", "block", "the gradient pass runs forward twice")
    if setting.rows > 1 and model.image_chunk != 1:
        yield Change("model.image_chunk", 1, "images are decoded one by one")
    smaller = [size for size in range(run.micro_batch - 1, 0, -1) if run.micro_batch % size == 0]
    for size in smaller:
        yield Change("run.micro_batch", size, "smaller matrix products")
    if setting.count > 1 and setting.sharding == "none":
        yield Change("run.sharding", "fsdp", "weights are gathered in every pass")
    if setting.keeps_whole_gradients:
        yield Change("run.reduce", "backward", "gradients are scattered in every backward")
    if setting.count > 1 and run.rollout_gather == "whole" and precision != "fp8-rollout":
        yield Change("run.rollout_gather", "blocks", "weights are gathered in every step of a rollout")
    if setting.sharding != "none" and precision == "fp8" and model.lora is None and not run.fp8_all_gather:
        yield Change("run.fp8_all_gather", True, "gradients of inputs are of the e4m3 weights, too")
    if optimizer.name == "torch":
        yield Change("optimizer.name", "srpo", "this package's AdamW in place of torch's")
    weights, moments = optimizer.modes(precision)
    if optimizer.name == "torch" or (weights, precision == "fp32") == ("fp32", False):
        yield Change("optimizer.weights", "split32", "none: exactly fp32, stored in two parts")
    if model.lora is not None and precision != "fp8":
        yield Change("model.precision", "fp8", "the frozen weights of blocks in e4m3")
    if precision != "fp32" and optimizer.gradients != "bf16":
        yield Change("optimizer.gradients", "bf16", "rounded sums: 0.7 % error of a sum of 32 random gradients")
    for smaller_moments, error in (("M4", "0.4 %"), ("M3", "2 %"), ("M2", "6 %")):
        order = ("fp32", "M4", "M3", "M2")
        if order.index(smaller_moments) > order.index(moments):
            cost = f"{error} error of the displacement after 200 updates, simulated"
            yield Change("optimizer.moments", smaller_moments, cost)
    if precision != "fp32" and weights != "split24":
        yield Change("optimizer.weights", "split24", "a byte less of every weight, stochastically rounded")
    if setting.average_bytes and optimizer.offload == "none":
        yield Change("optimizer.offload", "ema", "averages pass through host memory when they are updated")
    if optimizer.offload != "states":
        yield Change("optimizer.offload", "states", "updates pass states through host memory")


def _after(setting: Setting, changes: Sequence[Change]) -> Memory | None:
    """Memory with `changes`; None where the recipe cannot have them."""
    for change in changes:
        try:
            setting = change.apply(setting)
        except (InputError, ValueError):
            return None
    return memory(setting)


def _fits(setting: Setting, changes: Sequence[Change]) -> bool:
    after = _after(setting, changes)
    return after is not None and after.fits


def _more_gpus(setting: Setting) -> int | None:
    """The smallest power of two of GPUs, more than now, among which it fits as it is when sharded."""
    count = 2
    while count <= setting.config.srpo.batch_size:
        if count > setting.count:
            try:
                more = replace(setting, count=count, sharding="fsdp")
            except InputError:
                return None
            if memory(more).fits:
                return count
        count *= 2
    return None
