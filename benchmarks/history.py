"""``python -m benchmarks history``: runs kept one file each, never rewritten, in a folder such as a data branch's.

history add DIR RUN...     compare with the baseline and keep it; exit status of the comparison
history confirmed DIR      what the last two scheduled runs of a device and tier both call slower; 1 if anything
history log DIR            medians, a run a line
history export DIR         the same as CSV, a measurement a line
"""

from __future__ import annotations

import argparse
import csv
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from benchmarks.compare import compare
from benchmarks.fresh import merged
from benchmarks.noise import read_noise
from benchmarks.report.summary import short, summary, time
from benchmarks.schema import SOURCES, Measurement, Process, ResultError, Run, read, write
from benchmarks.verdict import Verdict, exit_status, refusal

__all__ = ["add", "baseline", "confirmed", "place", "runs"]

_BASELINE_RUNS = 5


def runs(folder: Path, device: str = "*") -> list[Run]:
    """All runs kept in `folder`, of the device whose slug is given, oldest first."""
    return sorted((read(path) for path in folder.glob(f"runs/{device}/*/*.json")), key=lambda run: run.created)


def place(folder: Path, run: Run) -> Path:
    """Where `run` is kept: a name of its own, so that branches merge without conflict."""
    stamp = run.created.replace("-", "").replace(":", "")
    sha = (run.git.sha or "unknown")[:12]
    return folder / "runs" / run.device.slug / run.created[:7] / f"{stamp}_{sha}_{run.run_id}.json"


def baseline(kept: Sequence[Run], new: Run) -> Run | None:
    """The last five eligible runs of the same tier, device and software as one: a process a run, once there are five.

    Fewer give all their processes. None if there is none.
    """
    last = [run for run in kept if run.eligible and run.tier == new.tier and refusal(run, new) is None][
        -_BASELINE_RUNS:
    ]
    if not last:
        return None
    return replace(last[-1], measurements=[_pooled(m, last) for m in last[-1].measurements])


def _pooled(newest: Measurement, last: Sequence[Run]) -> Measurement:
    def identity(each: Measurement) -> tuple[object, ...]:
        return each.version, each.recipe, each.contract

    alike = [m for run in last if (m := run.by_id.get(newest.id)) and identity(m) == identity(newest)]
    if len(alike) < _BASELINE_RUNS:
        return replace(newest, processes=[process for m in alike for process in m.processes])
    return replace(newest, processes=[Process.of([p.median for p in m.processes]) for m in alike])


def add(folder: Path, run: Run, noise: Path | None = None) -> tuple[Path, str, int]:
    """Keep `run`; returns its file, what is to be said, and the exit status. Raises `ResultError` if it is there."""
    path = place(folder, run)
    if path.exists():
        raise ResultError(f"{path}: already kept; files of a history are never rewritten")
    base = baseline(runs(folder, run.device.slug), run)
    if base is None:
        said, status, slower = "No earlier eligible run on this GPU with this software: nothing to compare.", 0, []
    else:
        comparison = compare(base, run, read_noise(noise, run.device))
        said, status = summary(comparison), exit_status(comparison.differences)
        slower = [d.id for d in comparison.differences if d.verdict is Verdict.SLOWER and d.gates]
    return write(replace(run, regressions=slower), path), said, status


def confirmed(kept: Sequence[Run]) -> list[str]:
    """What the newest two scheduled runs of a tier both call slower."""
    found = []
    for tier in dict.fromkeys(run.tier for run in kept):
        scheduled = [run for run in kept if (run.tier, run.source) == (tier, "scheduled")]
        slower = [run.regressions or [] for run in scheduled[-2:]]
        found += [name for name in slower[-1] if name in slower[0]] if len(slower) == 2 else []
    return found


def _add(options: argparse.Namespace) -> int:
    run = replace(merged([read(path) for path in options.run]), source=options.source)
    path, said, status = add(options.folder, run, options.noise)
    print(f"{said}\nkept: {path}")
    return status


def _confirmed(options: argparse.Namespace) -> int:
    devices = sorted(path.name for path in options.folder.glob("runs/*"))
    found = [f"{device}: {name}" for device in devices for name in confirmed(runs(options.folder, device))]
    print("\n".join(found))
    return 1 if found else 0


def _log(options: argparse.Namespace) -> int:
    for run in runs(options.folder):
        for measurement in run.measurements:
            if options.match in measurement.id:
                value = time(measurement.milliseconds) or measurement.status
                print(f"{run.created}  {short(run)}  {run.device.slug}  {value:>10}  {measurement.id}")
    return 0


def _export(options: argparse.Namespace) -> int:
    writer = csv.writer(sys.stdout, lineterminator="\n")
    writer.writerow(["created", "sha", "device", "torch", "measurement", "status", "ms", "processes", "eligible"])
    for run in runs(options.folder):
        about = [run.created, run.git.sha, run.device.name, run.software.torch]
        for m in run.measurements:
            writer.writerow([*about, m.id, m.status, m.milliseconds, len(m.processes), run.eligible])
    return 0


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks history", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    actions: dict[str, Callable[[argparse.Namespace], int]] = dict(
        add=_add, confirmed=_confirmed, log=_log, export=_export
    )
    for name, action in actions.items():
        command = commands.add_parser(name)
        command.add_argument("folder", type=Path, metavar="DIR")
        command.set_defaults(action=action)
        if name == "add":
            command.add_argument(
                "run", type=Path, nargs="+", metavar="RUN", help="several: fresh processes of one code"
            )
            command.add_argument("--source", choices=SOURCES, default="local", help="only `scheduled` makes baselines")
            command.add_argument("--noise", type=Path, help="default benchmarks/noise/DEVICE.json")
        if name == "log":
            command.add_argument("--match", default="", help="only measurements whose name has this in it")
    options = parser.parse_args(arguments)
    return options.action(options)
