"""A plan as text."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import fields
from typing import TYPE_CHECKING

from srpo.plan.memory import PHASES

if TYPE_CHECKING:
    from srpo.plan import Plan

__all__ = ["text"]


def text(plan: Plan) -> str:
    """The plan for people to read."""
    return "\n".join(_lines(plan))


def _lines(plan: Plan) -> Iterator[str]:
    setting, memory = plan.setting, plan.memory
    config, sizes, run = setting.config, setting.sizes, setting.config.run
    yield f"{plan.recipe} on {setting.count} x {setting.gpu}"
    for note in sizes.assumed:
        yield f"note: {note}"
    parameters = f"{sizes.parameters / 1e9:.2f} B parameters" if sizes.parameters > 1e8 else f"{sizes.parameters:,}"
    height, width = sizes.image
    image = f"{height} x {width} px: {sizes.tokens} tokens, {_flops(sizes.forward.total)} an image"
    yield f"transformer: {parameters}; {image}"
    per_update = f"clean batches: {setting.batches} of {run.micro_batch}, draws of each: {run.draws_per_rollout}"
    spread = f"; weights sharded over {setting.shards}" if setting.shards > 1 else ""
    yield f"update of {config.srpo.batch_size} images; on each GPU {per_update}{spread}"
    yield f"{memory.policy}"

    yield from ("", "memory of each GPU, GB")
    rows = [[term.name, *(_gb(getattr(term, phase)) for phase in PHASES)] for term in memory.terms]
    rows.append(["total", *(_gb(memory.total(phase)) for phase in PHASES)])
    yield from _table(["", *PHASES], rows)
    yield from (f"host memory for {name}: {_gb(size)} GB for each GPU" for name, size in memory.host.items())
    yield from _verdict(plan)

    yield from ("", "time of an update, estimated")
    rows = [
        [
            phase.name,
            *(f"{value:,.{1 if value >= 0.1 else 3}f}" for value in (phase.tflop, phase.moved_gb, phase.link_gb)),
            *(f"{value:.3f}" for value in (phase.arithmetic, phase.memory, phase.collectives, phase.seconds)),
        ]
        for phase in plan.phases
    ]
    rows.append(["total", "", "", "", "", "", "", f"{plan.seconds:.3f}"])
    heads = ["", "TFLOP", "GB moved", "GB sent", "arithmetic s", "memory s", "collectives s", "seconds"]
    yield from _table(heads, rows)
    hours = plan.seconds * config.srpo.updates / 3600
    taken = f"{hours:.3g} hours, {hours * setting.count:.3g} GPU hours"
    yield f"{config.srpo.updates} updates: {taken}, without sample grids and checkpoints"
    yield from ("", "reckoned with these parts of the GPU's ceilings")
    given = [
        [each.name, f"{getattr(plan.efficiencies, each.name):.2f}", f"  {each.metadata['source']}"]
        for each in fields(plan.efficiencies)
    ]
    yield from _table([], given, left=(0, 2))

    if plan.collectives is not None:
        yield from ("", "exchanged in an update, counted among pretended ranks")
        shown = [
            [each.kind, str(each.ranks), str(each.calls), _gb(each.bytes), _gb(each.sent)] for each in plan.collectives
        ]
        yield from _table(["", "ranks", "calls", "GB", "GB sent by each"], shown)

    if plan.comparisons:
        yield from ("", "measured before, in benchmarks/results")
        shown = [
            [row.what, f"{row.estimate:.2f}", f"{row.measured:.2f}", f"{row.estimate / row.measured:.2f}", row.unit]
            for row in plan.comparisons
        ]
        yield from _table(["", "estimate", "measured", "ratio", ""], shown)
    else:
        yield from ("", f"nothing measured on {setting.gpu.name} yet: python -m benchmarks gpu does")


def _verdict(plan: Plan) -> Iterator[str]:
    memory, gpu = plan.memory, plan.setting.gpu
    left = memory.capacity - memory.peak
    if memory.fits:
        yield f"fits: {_gb(left)} GB of {gpu.name}'s {gpu.memory_gb:g} GB left at the peak"
        return
    over = [phase for phase in PHASES if memory.total(phase) > memory.capacity]
    yield f"does not fit: {_gb(-left)} GB more than {gpu.name}'s {gpu.memory_gb:g} GB ({', '.join(over)})"
    advice = plan.advice
    if advice is None:
        return
    if advice.changes and advice.peak is not None:
        what = "smallest change that fits" if len(advice.changes) == 1 else "no single change fits; the fewest that do"
        yield f"{what}, at {_gb(advice.peak)} GB: {' '.join(map(str, advice.changes))}"
        yield from (f"  {change}: {change.cost}" for change in advice.changes)
    else:
        yield "no combination of known changes fits"
    if advice.gpus is not None:
        yield f"or {advice.gpus} GPUs with run.sharding=fsdp and nothing else changed"


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]], left: tuple[int, ...] = (0,)) -> Iterator[str]:
    """Columns of text, those of `left` to the left."""
    every = [heads, *rows] if heads else list(rows)
    widths = [max(map(len, column)) for column in zip(*every, strict=True)]
    for row in every:
        cells = (
            cell.ljust(width) if index in left else cell.rjust(width)
            for index, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        yield "  ".join(("", *cells)).rstrip()


def _gb(nbytes: float) -> str:
    gigabytes = nbytes / 1e9
    return "-" if not nbytes else f"{gigabytes:.2f}" if gigabytes >= 0.01 else f"{gigabytes:.4f}"


def _flops(flops: float) -> str:
    return f"{flops / 1e12:.1f} TFLOP" if flops >= 1e11 else f"{flops / 1e9:.3g} GFLOP"
