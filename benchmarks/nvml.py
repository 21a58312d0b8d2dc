"""Clocks, power, temperature, throttling and energy of a GPU through NVML. What it cannot tell is None, never 0."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

__all__ = ["Conditions", "Gpu", "harm", "joules"]

#: Cumulative nanoseconds by field, so that a slowdown between two looks is seen too.
_COUNTERS = {"power_cap": 74, "software_thermal": 269, "hardware_thermal": 270, "power_brake": 271}
#: What makes a time worthless; a power cap is how matrix products run.
_HARMFUL = ("software_thermal", "hardware_thermal", "power_brake")
_ENERGY_SECONDS = 2.0  # the counter moves every 20 to 100 ms


@dataclass(frozen=True)
class Conditions:
    """Of a GPU at one time."""

    sm_mhz: float | None
    memory_mhz: float | None
    temperature_c: float | None
    power_w: float | None
    throttled_ns: dict[str, int] | None  # cumulative

    def since(self, before: Conditions) -> dict[str, Any]:
        """The fields of a `Process` that ended now and began at `before`."""
        spent = None
        if self.throttled_ns is not None and before.throttled_ns is not None:
            spent = {k: v - before.throttled_ns[k] for k, v in self.throttled_ns.items() if k in before.throttled_ns}
        own = {key: getattr(self, key) for key in ("sm_mhz", "memory_mhz", "temperature_c", "power_w")}
        return own | {"throttled_ns": spent}


def harm(throttled_ns: Mapping[str, int] | None) -> str | None:
    """Why times taken under this are worth nothing, or None."""
    found = [reason for reason in _HARMFUL if (throttled_ns or {}).get(reason, 0) > 0]
    return f"the GPU was slowed down: {', '.join(found)}" if found else None


class Gpu:
    """The GPU whose UUID torch gives; without NVML, or with no such GPU, nothing is known of it."""

    def __init__(self, uuid: str | None, library: Any = None) -> None:
        self._library, self._handle = library, None
        if library is None:
            with suppress(ImportError):
                import pynvml  # type: ignore[import-untyped]

                self._library = pynvml
        if self._library is not None and uuid is not None:
            with suppress(self._library.NVMLError):
                self._library.nvmlInit()
                self._handle = self._library.nvmlDeviceGetHandleByUUID(f"GPU-{uuid.removeprefix('GPU-')}")

    def ask(self, name: str, *arguments: Any) -> Any:
        """What ``nvmlDevice<name>`` returns, or None."""
        if self._handle is None:
            return None
        try:
            return getattr(self._library, f"nvmlDevice{name}")(self._handle, *arguments)
        except (self._library.NVMLError, AttributeError):  # not supported by the device, the driver or the wrapper
            return None

    def conditions(self) -> Conditions:
        power = self.ask("GetPowerUsage")  # mW
        return Conditions(
            sm_mhz=self.ask("GetClockInfo", 1),
            memory_mhz=self.ask("GetClockInfo", 2),
            temperature_c=self.ask("GetTemperature", 0),
            power_w=None if power is None else power / 1000,
            throttled_ns=self._throttled(),
        )

    def _throttled(self) -> dict[str, int] | None:
        values = self.ask("GetFieldValues", list(_COUNTERS.values()))
        if values is None:
            return None
        known = {
            name: int(value.value.ullVal)
            for name, value in zip(_COUNTERS, values, strict=True)
            if value.nvmlReturn == 0
        }
        return known or None

    def facts(self) -> dict[str, Any]:
        """The fields of a `Device` that only NVML knows."""
        limit, mig = self.ask("GetEnforcedPowerLimit"), self.ask("GetMigMode")
        running = self.ask("GetComputeRunningProcesses")
        return {
            "power_limit_w": None if limit is None else limit / 1000,
            "mig": None if mig is None else bool(mig[0]),
            "max_sm_mhz": self.ask("GetMaxClockInfo", 1),
            "max_memory_mhz": self.ask("GetMaxClockInfo", 2),
            "other_processes": None if running is None else max(0, len(running) - 1),
        }

    def driver(self) -> str | None:
        if self._handle is None:
            return None
        version = self._library.nvmlSystemGetDriverVersion()
        return version.decode() if isinstance(version, bytes) else version


def joules(gpu: Gpu, run: Callable[[], Any], synchronize: Callable[[], None]) -> float | None:
    """Energy of one `run`, over at least two seconds of them; None where the GPU does not count it."""
    synchronize()
    before, began, count = gpu.ask("GetTotalEnergyConsumption"), time.perf_counter(), 0
    if before is None:
        return None
    while time.perf_counter() - began < _ENERGY_SECONDS:
        for _ in range(10):
            run()
        synchronize()
        count += 10
    after = gpu.ask("GetTotalEnergyConsumption")
    return None if after is None or after <= before else (after - before) / 1000 / count
