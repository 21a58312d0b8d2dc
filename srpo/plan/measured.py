"""Estimates beside what `python -m benchmarks gpu` measured on the same kind of GPU."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

from srpo.plan.rewards import VIT_H
from srpo.plan.setting import Setting
from srpo.plan.timing import DECODER_PASSES, Efficiencies, Work, forward

__all__ = ["Comparison", "compare"]

#: Pixels a side that benchmarks time the transformer at, with 512 text tokens.
_SIDES = (720, 1024)


@dataclass(frozen=True)
class Comparison:
    """One figure, estimated as `srpo.plan` estimates everything, and measured."""

    what: str
    unit: str
    estimate: float
    measured: float
    file: str


def compare(setting: Setting, got: Efficiencies, results: Path) -> list[Comparison]:
    """All figures in the JSON files of `results` that the plan has an estimate for, of this kind of GPU.

    Other files, and measurements of other models or forms, are passed over.
    """
    return [row for file in sorted(results.rglob("*.json")) for row in _of_file(setting, got, file)]


def _of_file(setting: Setting, got: Efficiencies, file: Path) -> Iterator[Comparison]:
    try:
        run = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError):
        return
    if not isinstance(run, dict) or not {"device", "ceilings", "measurements"} <= set(run):
        return
    if not re.search(rf"\b{re.escape(setting.gpu.name)}\b", run["device"]["name"], re.IGNORECASE):
        return
    if (copy := run["ceilings"]["copy_gb_s"]) is not None:
        yield Comparison("copy bandwidth", "TB/s", setting.gpu.bandwidth_tb_s, copy / 1e3, file.name)
    for row in run["measurements"]:
        work = _work(setting, row) if row["status"] == "ok" else None
        if work is not None:
            seconds = work.arithmetic(setting.gpu, got) + work.traffic(setting.gpu, got)
            milliseconds = median(process["median"] for process in row["processes"])
            yield Comparison(f"{row['name']}, {row['mode']}", "ms", seconds * 1e3, milliseconds, file.name)


def _work(setting: Setting, row: dict[str, Any]) -> Work | None:
    """What a measurement ran, if it is one of FLUX.1-dev as the trainer runs it."""
    form, mode = row["name"], row["mode"]
    passes = 3 if mode == "forward+backward" else 1
    if match := re.fullmatch(r"decoder, patched eager, (\d+) x (\d+) px", form):
        batch, side = map(int, match.groups())
        decode = _at(setting, side).sizes.decode
        once = Work(convolution=decode.flops, moved=2 * DECODER_PASSES * decode.kept)
        return once * (batch * min(passes, 2))
    if match := re.fullmatch(r"ViT-H-14, frozen bf16, batch (\d+)", form):
        return Work(linear=2 * int(match[1]) * VIT_H.flops)
    if match := re.fullmatch(r"(?:transformer|bf16|fp8), patched eager", form):
        steps = int(calls[1]) if (calls := re.fullmatch(r"rollout of (\d+)", mode)) else 1
        if row["flops"] is None or not (calls or mode in ("forward", "forward+backward")):
            return None
        flops = row["flops"] / (passes * steps)
        for side in _SIDES:
            there = _at(setting, side)
            if abs(flops / there.sizes.forward.total - 1) < 0.01:
                once = forward(there, 1, quantized=form.startswith("fp8"))
                return once * (passes * steps)
    return None


def _at(setting: Setting, side: int) -> Setting:
    """The models at side x side pixels and 512 text tokens, patched, in bf16."""
    model = replace(setting.config.model, precision="bf16", kernels="auto")
    sizes = replace(setting.sizes, image=(side, side), text_tokens=512)
    optimizer = replace(setting.config.optimizer, weights="auto", name="srpo")
    return replace(setting, config=replace(setting.config, model=model, optimizer=optimizer), sizes=sizes)
