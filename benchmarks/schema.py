"""The result file: one JSON per run. What was not measured is null, a failure is a status, and neither is ever 0."""

from __future__ import annotations

import json
import math
import types
import typing
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, Literal

from benchmarks.stats import quantile

__all__ = [
    "SOURCES",
    "Ceilings",
    "Device",
    "Figures",
    "Finding",
    "Git",
    "Measurement",
    "Process",
    "ResultError",
    "Run",
    "Software",
    "read",
    "write",
]

SCHEMA = 1


class ResultError(ValueError):
    """A result file that cannot be read; says where and why."""


@dataclass(frozen=True, kw_only=True)
class Git:
    sha: str | None
    dirty: bool | None
    patch: str | None = None  # what a dirty tree differs by, hashed


@dataclass(frozen=True, kw_only=True)
class Software:
    python: str
    torch: str
    triton: str | None = None
    cuda: str | None = None
    ptxas: str | None = None
    driver: str | None = None
    system: str | None = None
    packages: dict[str, str | None] = field(default_factory=dict)  # other ones that are timed, or time
    variables: dict[str, str] = field(default_factory=dict)  # of the environment, that change what runs


@dataclass(frozen=True, kw_only=True)
class Device:
    name: str
    capability: str | None = None
    multiprocessors: int | None = None
    memory_bytes: int | None = None
    l2_bytes: int | None = None
    mig: bool | None = None
    power_limit_w: float | None = None
    max_sm_mhz: float | None = None
    max_memory_mhz: float | None = None
    other_processes: int | None = None
    uuid_hash: str | None = None

    @property
    def slug(self) -> str:
        """Its folder's name: "nvidia-h200"."""
        return "-".join(self.name.lower().split())


@dataclass(frozen=True, kw_only=True)
class Ceilings:
    """Rates of this very device."""

    copy_gb_s: float | None = None  # of a large copy, reads and writes together
    memory_gb_s: float | None = None  # bus width times memory clock: nothing can be faster
    matmul_tflop_s: float | None = None  # of a large bf16 matrix product


@dataclass(frozen=True, kw_only=True)
class Process:
    """What one fresh process measured, in the measurement's unit."""

    n: int
    median: float
    q25: float
    q75: float
    minimum: float
    sm_mhz: float | None = None
    memory_mhz: float | None = None
    temperature_c: float | None = None
    power_w: float | None = None
    throttled_ns: dict[str, int] | None = None  # by reason, while it measured

    @classmethod
    def of(cls, samples: list[float], **conditions: Any) -> Process:
        quartiles: Any = {name: quantile(samples, q) for name, q in (("q25", 0.25), ("median", 0.5), ("q75", 0.75))}
        return cls(n=len(samples), minimum=min(samples), **quartiles, **conditions)


Status = Literal["ok", "error", "skipped", "contaminated"]
Source = Literal["scheduled", "pull-request", "local"]
SOURCES: tuple[str, ...] = typing.get_args(Source)


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """One thing timed. `form` is "ours", or what ours is held against, which gates nothing."""

    name: str
    mode: str  # forward, forward+backward, step, ...
    form: str = "ours"
    part: str = "ops"
    unit: Literal["ms"] = "ms"
    status: Status = "ok"
    error: str | None = None
    version: str | None = None  # of what does the timing
    recipe: str | None = None  # of what is timed: shapes, dtypes, layouts
    contract: dict[str, str] = field(default_factory=dict)  # clock, scope, cache, regime, fill
    processes: list[Process] = field(default_factory=list)
    bytes: float | None = None  # moved at least
    flops: float | None = None
    peak_gb: float | None = None
    joules: float | None = None  # an iteration
    accuracy: dict[str, float] | None = None
    details: dict[str, Any] = field(default_factory=dict)

    @property
    def id(self) -> str:
        return f"{self.name}, {self.mode}" + ("" if self.form == "ours" else f", {self.form}")

    @property
    def milliseconds(self) -> float | None:
        return quantile([process.median for process in self.processes], 0.5) if self.processes else None

    @property
    def gb_s(self) -> float | None:
        return self._rate(self.bytes, 1e9)

    @property
    def tflop_s(self) -> float | None:
        return self._rate(self.flops, 1e12)

    def _rate(self, amount: float | None, unit: float) -> float | None:
        time = self.milliseconds
        return None if amount is None or time is None else amount / (time * 1e-3) / unit


@dataclass(frozen=True, kw_only=True)
class Figures:
    """Static figures of one kernel, operator or model, or why there are none."""

    id: str
    pins: str  # the file of their pins, without its suffix
    tools: str  # that they depend on
    values: dict[str, Any] = field(default_factory=dict)
    error: str | None = None


@dataclass(frozen=True)
class Finding:
    """One static figure that is not as expected, or all of an id where `figure` is empty."""

    verdict: str  # of `benchmarks.static.figures`
    pins: str
    id: str
    figure: str = ""
    pin: float | None = None
    value: float | None = None
    reason: str = ""  # of the pin, or of the verdict

    def __str__(self) -> str:
        told = f"{self.figure} {self.numbers} (pinned: {self.reason})" if self.figure else self.reason
        return f"{self.verdict:9} {self.pins} {self.id}: {told}"

    @property
    def numbers(self) -> str:
        return " -> ".join("none" if n is None else f"{n:,.12g}" for n in (self.pin, self.value))


@dataclass(frozen=True, kw_only=True)
class Run:
    schema: int
    run_id: str
    created: str  # ISO 8601, UTC
    tier: str
    git: Git
    software: Software
    device: Device
    source: Source = "local"
    pair: str | None = None  # shared with the run whose processes took turns with this one's
    regressions: list[str] | None = None  # what was slower than the baseline; null before it is compared
    ceilings: Ceilings = field(default_factory=Ceilings)
    measurements: list[Measurement] = field(default_factory=list)
    static: list[Figures] = field(default_factory=list)
    findings: list[Finding] = field(default_factory=list)  # what of it was not as pinned

    @property
    def eligible(self) -> bool:
        """Whether later runs may be held against it: clean, scheduled, complete, compared and not slower."""
        whole = bool(self.measurements) and all(m.status == "ok" for m in self.measurements)
        return whole and self.git.dirty is False and self.source == "scheduled" and self.regressions == []

    @property
    def by_id(self) -> dict[str, Measurement]:
        return {measurement.id: measurement for measurement in self.measurements}


def now() -> str:
    return datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ")


def read(path: Path) -> Run:
    """The run in `path`. Raises `ResultError`, naming file, place and what was expected there."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"), parse_constant=_not_a_number)
    except (OSError, ValueError) as error:
        raise ResultError(f"{path}: not a readable result file: {error}") from error
    if isinstance(value, dict) and value.get("schema") != SCHEMA:
        raise ResultError(f"{path}: schema {value.get('schema')!r}, this version reads {SCHEMA}")
    try:
        run: Run = _load(Run, value, "")
    except ResultError as error:
        raise ResultError(f"{path}: {error}") from None
    _check(path, run)
    return run


def write(run: Run, path: Path) -> Path:
    """Write all of `run`, or leave what was there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(asdict(run), indent=1, allow_nan=False) + "\n", encoding="utf-8")
    partial.replace(path)
    return path


def _check(path: Path, run: Run) -> None:
    """What types do not say."""
    if len(run.by_id) != len(run.measurements):
        ids = [measurement.id for measurement in run.measurements]
        raise ResultError(f"{path}: measured twice: {sorted({name for name in ids if ids.count(name) > 1})}")
    for measurement in run.measurements:
        if (measurement.status == "ok") != bool(measurement.processes) and measurement.status != "contaminated":
            raise ResultError(f"{path}: {measurement.id}: {measurement.status}, {len(measurement.processes)} processes")
        for process in measurement.processes:
            if min(process.n, process.minimum, process.q25, process.median, process.q75) <= 0:
                raise ResultError(f"{path}: {measurement.id}: a time or a count that is not positive")


def _not_a_number(text: str) -> float:
    raise ValueError(f"{text} is no measurement; what was not measured is null")


def _load(kind: Any, value: Any, where: str) -> Any:
    """`value`, out of JSON, as `kind`: a dataclass, a list, a dict, a choice or a scalar."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if kind is Any:
        return value
    if origin is types.UnionType or origin is typing.Union:
        if value is None and type(None) in arguments:
            return None
        return _load(next(each for each in arguments if each is not type(None)), value, where)
    if origin is Literal:
        return value if value in arguments else _refuse(where, f"one of {list(arguments)}", value)
    if origin is list:
        items = value if isinstance(value, list) else _refuse(where, "a list", value)
        return [_load(arguments[0], item, f"{where}[{index}]") for index, item in enumerate(items)]
    if origin is dict:
        items = value if isinstance(value, dict) else _refuse(where, "an object", value)
        return {key: _load(arguments[1], item, f"{where}.{key}") for key, item in items.items()}
    if is_dataclass(kind):
        return _record(kind, value, where)
    if kind is float and isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
        return float(value)
    if kind is not float and type(value) is kind:
        return value
    return _refuse(where, {float: "a finite number", int: "an integer"}.get(kind, f"a {kind.__name__}"), value)


def _record(kind: Any, value: Any, where: str) -> Any:
    items = value if isinstance(value, dict) else _refuse(where, "an object", value)
    hints, known = typing.get_type_hints(kind), {each.name for each in fields(kind)}
    if unknown := sorted(set(items) - known):
        raise ResultError(f"{where or 'the file'}: unknown {unknown}, known are {sorted(known)}")
    loaded = {name: _load(hints[name], items[name], f"{where}.{name}".lstrip(".")) for name in items}
    try:
        return kind(**loaded)
    except TypeError as error:
        raise ResultError(f"{where or 'the file'}: {str(error).partition(' ')[2]}") from None


def _refuse(where: str, expected: str, value: Any) -> Any:
    raise ResultError(f"{where or 'the file'} must be {expected}, got {str(value)[:40]!r}")
