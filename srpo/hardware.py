"""GPUs as `srpo plan` reckons with them: what is measured or stated of each, and how to describe another."""

from __future__ import annotations

import difflib
import math
from dataclasses import dataclass, fields
from typing import Any

from srpo.errors import InputError

__all__ = ["GPUS", "GPUS_PER_NODE", "Gpu", "parse_gpu"]

#: GPUs joined by `Gpu.link_gb_s`; beyond, they talk through `Gpu.network_gb_s`.
GPUS_PER_NODE = 8


@dataclass(frozen=True)
class Gpu:
    """Rates that a large kernel reaches on one GPU: ceilings, of which `srpo.plan.Efficiencies` says what is got."""

    name: str
    memory_gb: float  # 1e9 bytes, all of it
    bf16_tflops: float  # a large matrix product
    fp8_tflops: float  # 0: no e4m3 products; e4m3 values are then multiplied in bf16
    bandwidth_tb_s: float  # of a copy, reads and writes together
    link_gb_s: float  # to the other GPUs of a node, in one direction
    fp32_tflops: float  # without TF32
    network_gb_s: float = 50.0  # to other nodes: a 400 Gb/s adapter each
    host_gb_s: float = 55.0  # to host memory, each way at once: PCIe 5
    source: str = "as given"

    def __str__(self) -> str:
        fp8 = f"{self.fp8_tflops:g} TFLOP/s fp8" if self.fp8_tflops else "no fp8"
        rates = f"{self.bf16_tflops:g} TFLOP/s bf16, {fp8}, {self.bandwidth_tb_s:g} TB/s, link {self.link_gb_s:g} GB/s"
        return f"{self.name}: {self.memory_gb:g} GB, {rates} ({self.source})"


# Memory: nvidia-smi's MiB. Where nothing is measured, a ceiling is the part of the datasheet's dense rate that the H200
# was measured to reach: 790 of 989 TFLOP/s, 4.3 of 4.8 TB/s. The H20 reaches its datasheet's, being small. fp8 of the
# H200: the rate behind the project's floors. Links: NVLink's datasheet, one direction.
_SHARE = "0.8 of the datasheet's FLOP/s, 0.9 of its bandwidth"
GPUS = {
    gpu.name: gpu
    for gpu in (
        Gpu("H20", 102.6, 148, 296, 3.6, 450, 35, source="datasheet; bandwidth 0.9 of it"),
        Gpu("H100", 85.5, 790, 1400, 3.0, 450, 54, source="the H200's FLOP/s, whose chip it has; 0.9 of its bandwidth"),
        Gpu("H200", 150.8, 790, 1400, 4.3, 450, 54, source="bf16 and bandwidth measured; fp8 estimated"),
        Gpu("A100", 85.9, 250, 0, 1.8, 300, 15.6, network_gb_s=25, host_gb_s=25, source=_SHARE),
        Gpu("B200", 192.3, 1800, 3600, 6.9, 900, 60, source=_SHARE),
    )
}

_NEEDED = ("memory_gb", "bf16_tflops", "bandwidth_tb_s")
_OPTIONAL = ("name", "fp8_tflops", "link_gb_s", "fp32_tflops", "network_gb_s", "host_gb_s")


def parse_gpu(text: str) -> Gpu:
    """The GPU called `text`, or described by it: "memory_gb=80,bf16_tflops=700,bandwidth_tb_s=3,...", the fields of
    `Gpu`.

    What a description may leave out: fp8_tflops (0), link_gb_s (25, PCIe's), fp32_tflops (1/16 of bf16_tflops), and
    what has a default. Raises `InputError` naming the nearest valid name or key.
    """
    if "=" not in text:
        known = {name.lower(): gpu for name, gpu in GPUS.items()}
        if text.lower() in known:
            return known[text.lower()]
        near = difflib.get_close_matches(text.lower(), known, 3, 0.4) or list(known)
        names = ", ".join(known[name].name for name in near)
        raise InputError(f"unknown GPU {text!r}; nearest: {names}; or describe it: {'=..,'.join(_NEEDED)}=..")
    given: dict[str, str] = {}
    for entry in filter(None, text.split(",")):
        key, equals, value = (part.strip() for part in entry.partition("="))
        if key not in (*_NEEDED, *_OPTIONAL) or not equals:
            near = difflib.get_close_matches(key, (*_NEEDED, *_OPTIONAL), 1, 0.4)
            raise InputError(f"--gpu: unknown key {key!r}; " + (f"did you mean {near[0]!r}?" if near else _keys()))
        given[key] = value
    if missing := [key for key in _NEEDED if key not in given]:
        raise InputError(f"--gpu: {', '.join(missing)} missing; {_keys()}")
    name = given.pop("name", "custom")
    numbers = {key: _number(key, value) for key, value in given.items()}
    defaults: dict[str, Any] = dict(fp8_tflops=0.0, link_gb_s=25.0, fp32_tflops=numbers["bf16_tflops"] / 16)
    return Gpu(name=name, **{**defaults, **numbers})


def _number(key: str, text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not (0 < value < math.inf or (key == "fp8_tflops" and value == 0)):
        raise InputError(f"--gpu: {key} must be a positive number, got {text!r}")
    return value


def _keys() -> str:
    keys = [field.name for field in fields(Gpu) if field.name in (*_NEEDED, *_OPTIONAL)]
    return f"keys are {', '.join(keys)}"
