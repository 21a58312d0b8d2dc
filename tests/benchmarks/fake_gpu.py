"""A GPU that is not there: events, NVML and memory counters that answer what a test says."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from benchmarks import environment, nvml, timing
from benchmarks.schema import Device

_L2 = 50 << 20


class NVMLError(Exception):
    """As pynvml's."""


class FakeNvml:
    """NVML of one GPU. `answers` by function name; what has none is not supported. Counters move by `step` a look."""

    NVMLError = NVMLError

    def __init__(self, step: dict[int, int] | None = None, **answers: Any) -> None:
        self.answers: dict[str, Any] = answers
        self.step, self.looks, self.handles = step or {}, 0, list[str]()

    def nvmlInit(self) -> None: ...

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> str:
        self.handles.append(uuid)
        return uuid

    def nvmlSystemGetDriverVersion(self) -> bytes:
        return b"580.1"

    def nvmlDeviceGetFieldValues(self, _: str, fields: list[int]) -> list[Any]:
        self.looks += 1
        return [
            SimpleNamespace(
                nvmlReturn=0 if field in self.step else 3,
                value=SimpleNamespace(ullVal=1000 + self.looks * self.step.get(field, 0)),
            )
            for field in fields
        ]

    def __getattr__(self, name: str) -> Any:
        key = name.removeprefix("nvmlDevice")
        if key not in self.answers:
            raise AttributeError(name)
        answer = self.answers[key]

        def call(*arguments: Any) -> Any:
            if isinstance(answer, Exception):
                raise answer
            return answer(*arguments[1:]) if callable(answer) else answer

        return call


class FakeEvent:
    """Events one millisecond apart."""

    now = 0.0

    def __init__(self, enable_timing: bool) -> None:
        assert enable_timing

    def record(self) -> None:
        FakeEvent.now += 1.0
        self.at = FakeEvent.now

    def elapsed_time(self, end: FakeEvent) -> float:
        return end.at - self.at


def install(monkeypatch: pytest.MonkeyPatch, library: FakeNvml | None = None) -> list[int]:
    """Pretend that the CPU is a GPU called Fake; returns the cycles that the queue was held, as they are asked for."""
    held: list[int] = []
    properties = SimpleNamespace(L2_cache_size=_L2)
    gpu = nvml.Gpu("uuid", library or FakeNvml())
    replaced: dict[Any, dict[str, Any]] = {
        timing: {"has_clock": lambda: True},
        environment: {"gpu": lambda: gpu, "device": lambda: Device(name="Fake", power_limit_w=700.0)},
        torch.cuda: {
            "Event": FakeEvent,
            "_sleep": held.append,
            "synchronize": lambda: None,
            "current_device": lambda: 0,
            "get_device_properties": lambda _: properties,
            "reset_peak_memory_stats": lambda: None,
            "max_memory_allocated": lambda: 3 << 30,
            "memory_allocated": lambda: 1 << 30,
        },
    }
    for owner, attributes in replaced.items():
        for name, value in attributes.items():
            monkeypatch.setattr(owner, name, value)
    return held
