"""Estimates beside what `python -m benchmarks.gpu` measured on the same kind of GPU."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

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

    Other files, and rows of other models or forms, are passed over.
    """
    return [row for file in sorted(results.glob("*.json")) for row in _of_file(setting, got, file)]


def _of_file(setting: Setting, got: Efficiencies, file: Path) -> Iterator[Comparison]:
    try:
        report = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError):
        return
    device = report.get("environment", {}).get("device") if isinstance(report, dict) else None
    if not device or not re.search(rf"\b{re.escape(setting.gpu.name)}\b", str(device), re.IGNORECASE):
        return
    if "copy_bandwidth_tb_s" in report:
        bandwidth = setting.gpu.bandwidth_tb_s
        yield Comparison("copy bandwidth", "TB/s", bandwidth, report["copy_bandwidth_tb_s"], file.name)
    for part in ("transformer", "float8", "decoder", "tower"):
        for row in report.get(part) or ():
            work = _work(setting, row)
            if work is not None:
                seconds = work.arithmetic(setting.gpu, got) + work.traffic(setting.gpu, got)
                yield Comparison(f"{row['form']}, {row['mode']}", "ms", seconds * 1e3, row["ms"], file.name)


def _work(setting: Setting, row: dict[str, Any]) -> Work | None:
    """What a benchmark's row ran, if it is one of FLUX.1-dev as the trainer runs it."""
    form, mode = row["form"], row["mode"]
    passes = 3 if mode == "forward+backward" else 1
    if match := re.fullmatch(r"decoder, patched eager, (\d+) x (\d+) px", form):
        batch, side = map(int, match.groups())
        decode = _at(setting, side).sizes.decode
        once = Work(convolution=decode.flops, moved=2 * DECODER_PASSES * decode.kept)
        return once * (batch * min(passes, 2))
    if match := re.fullmatch(r"ViT-H-14, frozen bf16, batch (\d+)", form):
        return Work(linear=2 * int(match[1]) * setting.sizes.vision.flops)
    if match := re.fullmatch(r"(?:transformer|bf16|fp8), patched eager", form):
        steps = int(calls[1]) if (calls := re.fullmatch(r"rollout of (\d+)", mode)) else 1
        if "tflop_s" not in row or not (calls or mode in ("forward", "forward+backward")):
            return None
        flops = row["tflop_s"] * row["ms"] * 1e9 / (passes * steps)
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
