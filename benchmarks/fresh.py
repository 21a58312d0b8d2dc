"""Measuring in fresh processes, of this checkout or of another, and merging what they found."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from benchmarks.schema import Measurement, ResultError, Run, read

__all__ = ["Measure", "checkout", "measure", "merged"]

ROOT = Path(__file__).parent.parent
#: Options of `benchmarks kernels`, and the folder whose packages it measures.
Measure = Callable[[Sequence[str], Path], Run]


def measure(options: Sequence[str], folder: Path = ROOT) -> Run:
    """One fresh process of `benchmarks kernels`; raises `ResultError` with the end of what it said, if it fails."""
    with tempfile.TemporaryDirectory() as scratch:
        out = Path(scratch) / "run.json"
        command = [sys.executable, "-m", "benchmarks", "kernels", *options, "--procs", "1", "--out", str(out)]
        environment = os.environ | {"PYTHONPATH": str(folder)}
        done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
        if done.returncode not in (0, 4):  # 4: some measurement failed, and the file says which
            raise ResultError(f"a measuring process ended with {done.returncode}: {done.stderr.strip()[-2000:]}")
        return read(out)


@contextmanager
def checkout(revision: str) -> Iterator[Path]:
    """A folder with the packages of `revision`, "." for those of the working tree, under these very benchmarks.

    Both sides are thus measured alike, and benchmarks need not be as old as what they measure. Raises `ResultError` for
    an unknown revision.
    """
    with tempfile.TemporaryDirectory() as scratch:
        tree, folder = Path(scratch) / "tree", Path(scratch) / "measured"
        if revision != ".":
            add = ["git", "-C", str(ROOT), "worktree", "add", "--detach", "--quiet", str(tree), revision]
            done = subprocess.run(add, capture_output=True, text=True)
            if done.returncode:
                raise ResultError(f"{revision!r} cannot be checked out: {done.stderr.strip()}")
        try:
            folder.mkdir()
            for package in ("srpo", "srpo_kernels"):
                (folder / package).symlink_to((ROOT if revision == "." else tree) / package)
            (folder / "benchmarks").symlink_to(ROOT / "benchmarks")
            yield folder
        finally:
            if revision != ".":
                remove = ["git", "-C", str(ROOT), "worktree", "remove", "--force", str(tree)]
                subprocess.run(remove, capture_output=True, check=True)


def merged(runs: Sequence[Run]) -> Run:
    """The processes of all `runs` of one code as one run, in their order. What failed in any has failed."""
    known = [run.by_id for run in runs]
    names = dict.fromkeys(name for found in known for name in found)
    return replace(runs[-1], measurements=[_merged([found.get(name) for found in known]) for name in names])


def _merged(found: Sequence[Measurement | None]) -> Measurement:
    there = [each for each in found if each is not None]
    if len(there) < len(found):
        return replace(there[0], status="error", error="not measured by every process", processes=[])
    for status in ("error", "skipped", "contaminated"):
        if bad := [each for each in there if each.status == status]:
            kept = [p for each in there for p in each.processes] if status == "contaminated" else []
            return replace(bad[0], processes=kept)
    return replace(there[-1], processes=[process for each in there for process in each.processes])
