"""Comparing revisions in processes that take turns, measuring noise, and keeping runs."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from simulated import NOISE, drawn, measurement, run

from benchmarks import fresh, history
from benchmarks.__main__ import main
from benchmarks.ab import alternate, confirmed
from benchmarks.fresh import checkout, measure, merged
from benchmarks.noise import measure_noise, read_noise
from benchmarks.schema import Device, Git, ResultError, Run, read, write
from benchmarks.verdict import Margins, Verdict

_FIRST, _SECOND = Path("first"), Path("second")
_NO_NOISE = Margins({})


def simulated(factor: Callable[[Path, int], float], sd: float = NOISE) -> Callable[[Sequence[str], Path], Run]:
    """Stands for a fresh process: of a folder, the `call`-th, `factor(folder, call)` times one millisecond."""
    random, calls = np.random.default_rng(0), []

    def one(options: Sequence[str], folder: Path) -> Run:
        calls.append((folder, tuple(options)))
        return run({"gelu": drawn(random, 1, sd=sd, factor=factor(folder, len(calls)))})

    one.calls = calls  # type: ignore[attr-defined]
    return one


def test_revisions_take_turns_and_are_paired() -> None:
    one = simulated(lambda *_: 1.0)
    base, new = alternate(_FIRST, _SECOND, 3, ["--match", "x"], one)
    order = "".join("AB"[folder == _SECOND] for folder, _ in one.calls)  # type: ignore[attr-defined]
    assert order == "ABBAAB"
    assert base.pair == new.pair is not None
    assert [len(side.measurements[0].processes) for side in (base, new)] == [3, 3]


def test_drift_of_the_whole_machine_is_no_regression() -> None:
    """Ten percent slower from the first process to the last: A before B throughout would have seen it."""
    comparison = confirmed(_FIRST, _SECOND, 6, [], _NO_NOISE, simulated(lambda _, call: 1 + 0.01 * call, sd=0.002))
    assert [each.verdict for each in comparison.differences] == [Verdict.SAME]


def test_a_slower_revision_is_measured_again_before_it_is_called_so() -> None:
    one = simulated(lambda folder, _: 1.05 if folder == _SECOND else 1.0)
    (found,) = confirmed(_FIRST, _SECOND, 5, [], _NO_NOISE, one).differences
    assert found.verdict is Verdict.SLOWER
    assert found.reason.startswith("confirmed: +")
    assert [options for _, options in one.calls[10:]] == [("--match", "^gelu,\\ forward$")] * 10  # type: ignore[attr-defined]


def test_what_is_slower_once_only_is_inconclusive() -> None:
    one = simulated(lambda folder, call: 1.05 if folder == _SECOND and call <= 10 else 1.0)
    (found,) = confirmed(_FIRST, _SECOND, 5, [], _NO_NOISE, one).differences
    assert (found.verdict, found.reason) == (Verdict.INCONCLUSIVE, "slower once, SAME when measured again")


def test_merging_keeps_processes_in_order_and_every_failure() -> None:
    sides = [run([measurement([value]), measurement([value], "b"), measurement([value], "c")]) for value in (1.0, 2.0)]
    broken = replace(sides[1], measurements=[sides[1].measurements[0], measurement([], "b", status="error", error="!")])
    found = merged([sides[0], broken]).by_id
    assert [p.median for p in found["gelu [4], forward"].processes] == [1.0, 2.0]
    assert (found["b, forward"].status, found["b, forward"].error) == ("error", "!")
    assert found["c, forward"].error == "not measured by every process"


@pytest.fixture
def repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two commits that differ in one package, seen as this project."""
    root = tmp_path / "repository"
    for package in ("srpo", "srpo_kernels", "benchmarks"):
        (root / package).mkdir(parents=True)
        (root / package / "__init__.py").write_text("value = 1\n")
    git = ["git", "-C", str(root), "-c", "user.name=a", "-c", "user.email=a@b"]
    subprocess.run(["git", "init", "-q", str(root)], check=True)
    for value in (1, 2):
        (root / "srpo_kernels/__init__.py").write_text(f"value = {value}\n")
        subprocess.run([*git, "add", "."], check=True)
        subprocess.run([*git, "commit", "-qm", str(value)], check=True)
    (root / "srpo_kernels/__init__.py").write_text("value = 3\n")
    monkeypatch.setattr(fresh, "ROOT", root)
    return root


def test_checkouts_hold_a_revision_under_the_same_benchmarks_and_are_removed(repository: Path) -> None:
    seen = {}
    for revision in ("HEAD~1", "HEAD", "."):
        with checkout(revision) as folder:
            seen[revision] = (folder / "srpo_kernels/__init__.py").read_text()
            assert (folder / "benchmarks").resolve() == (repository / "benchmarks").resolve()
        assert not folder.exists()
    assert seen == {"HEAD~1": "value = 1\n", "HEAD": "value = 2\n", ".": "value = 3\n"}
    listed = subprocess.run(["git", "-C", str(repository), "worktree", "list"], capture_output=True, text=True).stdout
    assert len(listed.splitlines()) == 1


@pytest.mark.usefixtures("repository")
def test_a_revision_that_is_not_there_is_status_2(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["ab", "HEAD", "no-such-branch"]) == 2
    assert "benchmarks ab: 'no-such-branch' cannot be checked out" in capsys.readouterr().err


def test_a_measuring_process_that_dies_says_why(tmp_path: Path) -> None:
    (tmp_path / "benchmarks").mkdir()
    (tmp_path / "benchmarks/__main__.py").write_text("raise SystemExit('no such kernel')")
    with pytest.raises(ResultError, match="a measuring process ended with 1: no such kernel"):
        measure([], tmp_path)


def test_a_measuring_process_is_given_its_options_and_read(tmp_path: Path) -> None:
    (tmp_path / "benchmarks").mkdir()
    content = write(run({"gelu": [1.0]}), tmp_path / "run.json").read_text()
    check = "assert sys.argv[1:3] == ['kernels', '--dry']"
    script = f"import pathlib, sys\npathlib.Path(sys.argv[-1]).write_text({content!r})\n{check}"
    (tmp_path / "benchmarks/__main__.py").write_text(script)
    assert measure(["--dry"], tmp_path).measurements[0].milliseconds == 1.0


def test_noise_is_what_processes_of_one_code_differ_by(tmp_path: Path) -> None:
    whole, found = measure_noise(100, [], simulated(lambda *_: 1.0))
    (total, neighbours) = found["noise"]["gelu, forward"]
    assert total == pytest.approx(NOISE, rel=0.3)
    assert neighbours == pytest.approx(NOISE, rel=0.3)
    path = tmp_path / "noise.json"
    path.write_text(json.dumps(found))
    assert read_noise(path, whole.device).noise == {"gelu, forward": (total, neighbours)}
    with pytest.raises(ResultError, match="noise of 'NVIDIA H200', not of 'NVIDIA H100'"):
        read_noise(path, Device(name="NVIDIA H100"))
    path.write_text('{"noise": 3}')
    with pytest.raises(ResultError, match="not a readable noise file"):
        read_noise(path, whole.device)
    assert read_noise(None, Device(name="no such GPU")).noise == {}


# --- history ----------------------------------------------------------------------------------------------------------


def night(index: int, value: float = 1.0, **changes: object) -> Run:
    """A scheduled run, five processes around `value`."""
    medians = drawn(np.random.default_rng(index), 5, factor=value)
    about = {"created": f"2026-11-{index + 1:02d}T03:00:00Z", "run_id": f"{index:012d}", "source": "scheduled"}
    return run({"gelu": medians}, **about | changes)


def test_history_keeps_compares_and_finds_what_two_nights_confirm(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    statuses = []
    for index, value in enumerate([1.0] * 6 + [1.1, 1.1]):
        file = write(night(index, value), tmp_path / "new.json")
        statuses.append(main(["history", "add", "--source", "scheduled", str(tmp_path), str(file)]))
        if index == 6:
            assert main(["history", "confirmed", str(tmp_path)]) == 0
    assert statuses == [0] * 6 + [1, 1]  # the slow one did not become the baseline
    capsys.readouterr()
    assert main(["history", "confirmed", str(tmp_path)]) == 1
    assert capsys.readouterr().out == "nvidia-h200: gelu, forward\n"
    assert [kept.eligible for kept in history.runs(tmp_path)] == [True] * 6 + [False] * 2
    assert main(["history", "export", str(tmp_path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 9
    assert lines[1].startswith(f'2026-11-01T03:00:00Z,{"a" * 40},NVIDIA H200,2.15,"gelu, forward",ok,')
    assert main(["history", "log", str(tmp_path), "--match", "gelu"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 8


def test_tiers_confirm_their_own_regressions_only() -> None:
    name = "gelu, forward"
    kernels = [night(index, regressions=slower) for index, slower in enumerate(([name], []))]
    steps = [replace(each, tier="step", regressions=[name]) for each in kernels]
    assert history.confirmed([kernels[0], steps[0], kernels[1]]) == []
    assert history.confirmed([kernels[0], steps[0], kernels[1], steps[1]]) == [name]
    assert history.confirmed([replace(each, source="local") for each in steps]) == []


def test_fresh_processes_are_kept_as_one_run_which_is_local_unless_said(tmp_path: Path) -> None:
    files = [str(write(night(index), tmp_path / f"{index}.json")) for index in range(2)]
    assert main(["history", "add", str(tmp_path), *files]) == 0
    (kept,) = history.runs(tmp_path)
    assert len(kept.measurements[0].processes) == 10
    assert (kept.source, kept.eligible) == ("local", False)


def test_history_files_are_never_rewritten(tmp_path: Path) -> None:
    path, _, _ = history.add(tmp_path, night(0))
    name = "20261101T030000Z_aaaaaaaaaaaa_000000000000.json"
    assert path.relative_to(tmp_path) == Path("runs/nvidia-h200/2026-11") / name
    before = path.read_bytes()
    with pytest.raises(ResultError, match="already kept"):
        history.add(tmp_path, night(0))
    assert path.read_bytes() == before


@pytest.mark.parametrize(
    "change",
    [
        {"git": Git(sha="a" * 40, dirty=True)},
        {"git": Git(sha=None, dirty=None)},
        {"source": "local"},
        {"regressions": ["gelu, forward"]},
        {"regressions": None},
        {"measurements": [measurement([1.0] * 5, status="contaminated")]},
        {"measurements": [measurement([1.0] * 5), measurement([], "b", status="error")]},
        {"measurements": []},
    ],
)
def test_only_clean_scheduled_complete_runs_become_a_baseline(change: dict[str, object]) -> None:
    good = night(0, regressions=[])
    assert good.eligible
    bad = replace(good, **change)  # type: ignore[arg-type]
    assert not bad.eligible
    assert history.baseline([bad], night(1)) is None


def test_baseline_is_the_last_five_nights_on_the_same_gpu_and_software() -> None:
    kept = [night(index, 1 + index, regressions=[]) for index in range(7)]
    other = replace(kept[0], device=Device(name="NVIDIA H100"), created="2026-11-20T00:00:00Z")
    found = history.baseline([*kept, other], night(8))
    assert found is not None
    medians = [p.median for p in found.measurements[0].processes]
    assert medians == pytest.approx([3, 4, 5, 6, 7], rel=0.02)
    few = history.baseline(kept[:2], night(8))
    assert few is not None
    assert len(few.measurements[0].processes) == 10
    assert history.baseline([replace(each, tier="step") for each in kept], night(8)) is None
    renewed = replace(kept[-1].measurements[0], recipe="other shapes")
    changed = history.baseline([*kept[:-1], replace(kept[-1], measurements=[renewed])], night(8))
    assert changed is not None
    assert len(changed.measurements[0].processes) == 5  # of the last night alone


def test_a_run_read_from_a_history_knows_what_was_slower(tmp_path: Path) -> None:
    for index in range(5):
        history.add(tmp_path, night(index))
    path, said, status = history.add(tmp_path, night(6, 1.2))
    assert (status, read(path).regressions) == (1, ["gelu, forward"])
    assert said.startswith("### 1 regression, the worst +")
