"""The quality gate of fp8: what e4m3 changes in SRPO, on the tiny model and on blocks like FLUX's, is small."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import pytest

from benchmarks.precision import shifts, tiny_rows, wide_rows

RECORDED = Path(__file__).parent.parent / "benchmarks/results/cpu/precision.json"

#: By what a quantity's name begins with: least cosine, largest relative error. bf16 is allowed a fourth of the errors
#: of velocities, latents and rewards; the gradient of its own rounding is as far off as that of e4m3.
GATE = {
    "velocity": (0.995, 0.10),
    "rollout latents": (0.999, 0.05),
    "reward": (0.9995, 0.02),
    "gradient": (0.99, 0.15),
}


def check(rows: Iterable[dict[str, Any]], quantities: int) -> None:
    seen = []
    for row in rows:
        seen.append(row)
        cosine, error = next(limits for name, limits in GATE.items() if row["quantity"].startswith(name))
        if row["precision"] == "bf16" and row["quantity"] != "gradient":
            cosine, error = 1 - (1 - cosine) / 16, error / 4
        assert row["cosine"] >= cosine, row
        assert 0 < row["error"] <= error, row
    assert len(seen) == 2 * quantities


def test_tiny_model() -> None:
    check(tiny_rows(), 10)


def test_blocks() -> None:
    """FLUX's layers at a twelfth of its width; `python -m benchmarks.precision` takes all of it."""
    check(wide_rows(num_attention_heads=2), 8)


def test_recorded_gate() -> None:
    """The committed measurements, at FLUX's width and of whole trainings, pass it."""
    report = json.loads(RECORDED.read_text())
    check(report["quantities"], 18)
    trained: dict[str, list[dict[str, Any]]] = {}
    for row in report["training"]:
        trained.setdefault(row["precision"], []).append(row)
    assert set(trained) == {"bf16", "fp8-rollout", "fp8"}
    reached = {name: [row["shift"] for row in rows] for name, rows in trained.items()}
    assert all(len(values) >= 3 for values in reached.values())
    for name in ("fp8-rollout", "fp8"):
        assert abs(mean(reached[name]) - mean(reached["bf16"])) <= 2 * max(map(stdev, reached.values()))
        assert min(reached[name]) > 1.0


@pytest.mark.slow
def test_training_with_quantised_rollouts() -> None:
    bf16, fp8 = (row["shift"] for row in shifts(("bf16", "fp8-rollout"), (0,)))
    assert bf16 > 1
    assert fp8 == pytest.approx(bf16, abs=0.3)
