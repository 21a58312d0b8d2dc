"""The decision rule on data whose truth is known, and the exit status that follows."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from simulated import GPU, NOISE, drawn, measurement, process, run

from benchmarks.compare import compare, fail_on
from benchmarks.schema import Device, Measurement
from benchmarks.stats import log_ratio, process_noise
from benchmarks.verdict import FAIL_ON, Difference, Margins, Verdict, exit_status, judge

_NAME = "gelu [4], forward"
_MARGINS = Margins({_NAME: (NOISE, NOISE)})
_RECORDED = json.loads((Path(__file__).parent / "recorded.json").read_text())
_TRIALS = 300


def verdict(base: Measurement, new: Measurement, margins: Margins = _MARGINS) -> Verdict:
    return judge(base, new, margins).verdict


def trials(factor: float, sd: float = NOISE, processes: int = 5) -> Counter[Verdict]:
    random = np.random.default_rng(1)
    pairs = ((drawn(random, processes, sd=sd), drawn(random, processes, sd=sd, factor=factor)) for _ in range(_TRIALS))
    return Counter(verdict(measurement(base), measurement(new)) for base, new in pairs)


def test_identical_code_is_never_called_slower_or_faster() -> None:
    found = trials(1.0)
    assert set(found) <= {Verdict.SAME, Verdict.INCONCLUSIVE}
    assert found[Verdict.SAME] > 0.98 * _TRIALS


def test_five_percent_is_always_caught() -> None:
    assert trials(1.05) == {Verdict.SLOWER: _TRIALS}
    assert trials(1 / 1.05) == {Verdict.FASTER: _TRIALS}


def test_more_noise_than_was_measured_asks_for_more_rather_than_guesses() -> None:
    found = trials(1.0, sd=0.02)
    assert found[Verdict.INCONCLUSIVE] > found[Verdict.SAME]
    assert found[Verdict.SLOWER] <= 0.02 * _TRIALS


@pytest.mark.parametrize("name", sorted(_RECORDED["medians"]))
def test_processes_recorded_of_one_code_are_never_called_slower(name: str) -> None:
    """Real processes, of one code on a busy machine, dealt into two runs in many ways."""
    medians = np.array(_RECORDED["medians"][name])
    margins = Margins({_NAME: process_noise(medians)})
    random = np.random.default_rng(0)
    found: Counter[Verdict] = Counter()
    for _ in range(_TRIALS):
        dealt = random.permutation(medians)
        found[verdict(measurement(dealt[:5]), measurement(dealt[5:10]), margins)] += 1
    assert found[Verdict.SLOWER] == found[Verdict.FASTER] == 0
    slow = random.permutation(medians)[:10] * (1 + 6 * margins.of(measurement(medians)))
    assert verdict(measurement(medians), measurement(slow), margins) is Verdict.SLOWER


def test_pairs_see_through_drift_that_hides_a_regression_otherwise() -> None:
    """Clocks that drift by 1.5 % are shared by neighbours: A B B A."""
    random, paired, unpaired = np.random.default_rng(2), 0, 0
    for _ in range(100):
        drift = np.exp(random.normal(0, 0.015, 5))
        base, new = (drift * drawn(random, 5, sd=0.0035, factor=factor) for factor in (1.0, 1.03))
        sides = measurement(base), measurement(new)
        paired += verdict(*sides, Margins({}, paired=True)) is Verdict.SLOWER
        unpaired += verdict(*sides, Margins({}, paired=False)) is Verdict.SLOWER
    assert paired >= 90
    assert unpaired <= 40


def test_the_interval_is_the_same_every_time_and_holds_the_truth_about_as_often_as_it_says() -> None:
    random = np.random.default_rng(3)
    sides = drawn(random, 20), drawn(random, 20, factor=1.01)
    assert log_ratio(*sides, paired=False) == log_ratio(*sides, paired=False)
    intervals = [log_ratio(drawn(random, 20), drawn(random, 20, factor=1.01), paired=False) for _ in range(200)]
    assert 0.88 <= np.mean([low <= np.log(1.01) <= high for _, low, high in intervals]) <= 0.99


def test_fewer_than_five_processes_decide_nothing() -> None:
    found = judge(measurement([1.0] * 4), measurement([2.0] * 4), _MARGINS)
    assert (found.verdict, found.reason) == (Verdict.INCONCLUSIVE, "4 processes of 5")
    assert found.change == pytest.approx(1.0)


def test_margins_are_the_largest_of_share_floor_and_noise() -> None:
    assert Margins({}).of(measurement([1.0])) == 0.02
    assert Margins({}).of(measurement([0.01])) == pytest.approx(0.05)  # half a microsecond
    assert Margins({}).of(measurement([40.0], part="step")) == pytest.approx(0.05)  # two milliseconds
    assert Margins({_NAME: (0.03, 0.01)}).of(measurement([1.0])) == pytest.approx(0.09)
    assert Margins({_NAME: (0.03, 0.01)}, paired=True).of(measurement([1.0])) == pytest.approx(0.03)


def test_noise_between_neighbours_leaves_drift_out() -> None:
    random = np.random.default_rng(4)
    drift = np.repeat(np.exp(np.linspace(0, 0.2, 100)), 2)
    total, neighbours = process_noise(list(drift * drawn(random, 200)))
    assert neighbours == pytest.approx(NOISE, rel=0.15)
    assert total > 5 * neighbours


def test_a_change_of_clocks_alone_is_no_verdict_on_what_arithmetic_bounds() -> None:
    def side(milliseconds: float, megahertz: float) -> Measurement:
        return measurement([], flops=1e12, processes=[process(milliseconds, sm_mhz=megahertz)] * 5)

    found = judge(side(1.0, 1980), side(1.1, 1800), _MARGINS)
    assert (found.verdict, found.reason) == (Verdict.INCONCLUSIVE, "clocks moved: by cycles it is SAME")
    assert verdict(side(1.0, 1980), side(1.1, 1980)) is Verdict.SLOWER
    moved_bytes = [replace(each, flops=None) for each in (side(1.0, 1980), side(1.1, 1800))]
    assert verdict(*moved_bytes) is Verdict.SLOWER


@pytest.mark.parametrize(
    ("base", "new", "expected"),
    [
        (None, {}, Verdict.NEW),
        ({}, None, Verdict.MISSING),
        ({}, {"status": "error", "processes": []}, Verdict.ERROR),
        ({}, {"status": "skipped", "processes": []}, Verdict.MISSING),
        ({"status": "skipped", "processes": []}, {"status": "skipped", "processes": []}, Verdict.SKIPPED),
        ({"status": "skipped", "processes": []}, {}, Verdict.NEW),
        ({"status": "error", "processes": []}, {}, Verdict.NEW),
        ({"status": "error", "processes": []}, {"status": "error", "processes": []}, Verdict.ERROR),
        ({}, {"status": "contaminated"}, Verdict.CONTAMINATED),
        ({"status": "contaminated"}, {}, Verdict.CONTAMINATED),
        ({}, {"recipe": "other"}, Verdict.INCOMPARABLE),
        ({}, {"version": "other"}, Verdict.INCOMPARABLE),
        ({}, {"contract": {"clock": "events", "cache": "warm"}}, Verdict.INCOMPARABLE),
        ({}, {}, Verdict.SAME),
    ],
)
def test_identity_and_conditions_come_before_numbers(
    base: dict[str, Any] | None, new: dict[str, Any] | None, expected: Verdict
) -> None:
    sides = (None if changes is None else measurement([1.0] * 5, **changes) for changes in (base, new))
    assert judge(*sides, _MARGINS).verdict is expected


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"device": Device(name="NVIDIA H100")}, "another GPU: name NVIDIA H200 against NVIDIA H100"),
        ({"device": replace(GPU, power_limit_w=600.0)}, "another GPU: power_limit_w 700.0 against 600.0"),
        ({"software": replace(run({}).software, torch="2.16")}, "other software: torch 2.15 against 2.16"),
    ],
)
def test_another_gpu_or_other_software_is_incomparable(change: dict[str, Any], reason: str) -> None:
    found = compare(run({"a": [1.0] * 5}), run({"a": [2.0] * 5}, **change))
    assert found.refused is not None
    assert found.refused.startswith(reason)
    assert [each.verdict for each in found.differences] == [Verdict.INCOMPARABLE]
    assert exit_status(found.differences) == 3


def test_other_software_is_compared_when_that_is_the_question() -> None:
    sides = run({"a": [1.0] * 5}), run({"a": [2.0] * 5}, software=replace(run({}).software, torch="2.16"))
    assert compare(*sides, across_software=True).differences[0].verdict is Verdict.SLOWER


_EVERY = tuple(Verdict)


@pytest.mark.parametrize(
    ("verdicts", "watched", "status"),
    [
        ((Verdict.SAME, Verdict.NEW, Verdict.SKIPPED), _EVERY, 0),
        ((Verdict.SLOWER, Verdict.MISSING, Verdict.INCOMPARABLE, Verdict.FASTER), _EVERY, 3),
        ((Verdict.SLOWER, Verdict.MISSING, Verdict.INCONCLUSIVE), _EVERY, 4),
        ((Verdict.SLOWER, Verdict.ERROR), _EVERY, 4),
        ((Verdict.INCONCLUSIVE, Verdict.FASTER, Verdict.SLOWER), _EVERY, 1),
        ((Verdict.INCONCLUSIVE, Verdict.FASTER), _EVERY, 6),
        ((Verdict.INCONCLUSIVE,), _EVERY, 5),
        ((Verdict.CONTAMINATED,), _EVERY, 5),
        ((Verdict.INCONCLUSIVE, Verdict.FASTER, Verdict.CONTAMINATED), FAIL_ON, 0),
        ((Verdict.SLOWER, Verdict.MISSING), (Verdict.SLOWER,), 1),
    ],
)
def test_exit_status_is_the_one_that_wins(
    verdicts: tuple[Verdict, ...], watched: tuple[Verdict, ...], status: int
) -> None:
    for order in (verdicts, verdicts[::-1]):
        said = [Difference("a", each, new=measurement([1.0])) for each in order]
        assert exit_status(said, watched) == status


def test_what_ours_is_held_against_gates_nothing() -> None:
    base, new = (run([measurement([value] * 5, form="compiled")]) for value in (1.0, 2.0))
    (found,) = compare(base, new).differences
    assert found.verdict is Verdict.SLOWER
    assert exit_status([found]) == 0


def test_fail_on_takes_verdicts_by_name_only() -> None:
    assert fail_on("slower, missing") == (Verdict.SLOWER, Verdict.MISSING)
    with pytest.raises(Exception, match=r"'WRONG' is not a valid Verdict; verdicts are slower, faster, "):
        fail_on("slower,wrong")
