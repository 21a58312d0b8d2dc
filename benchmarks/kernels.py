"""``python -m benchmarks kernels``: operators at FLUX shapes against eager, torch.compile and Liger.

Without a GPU every one runs once on a tiny shape, is checked, and is said not to be measured.
"""

from __future__ import annotations

import argparse
import hashlib
import re
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import environment, timing
from benchmarks.accuracy import accuracy
from benchmarks.case import Case, Output
from benchmarks.cases import cases
from benchmarks.fresh import measure, merged
from benchmarks.nvml import harm, joules
from benchmarks.peers import liger
from benchmarks.report.quick import quick_table
from benchmarks.schema import SCHEMA, Ceilings, Measurement, Process, Run, now, write

__all__ = ["Plan", "backward", "call_of", "forward", "measurements", "new_run", "planned_of", "regex", "status"]

MATCH = "regular expression on `operator [shape], mode`, after which peers have `, eager` and so on"
UNMEASURED = "not measured: no GPU"
_TRIES, _PAUSE = 3, 5.0
_ABOVE_PEAK = 1.02  # of the memory's rate: what is faster was not read


@dataclass(frozen=True)
class Plan:
    """What to measure and how; `budget` in seconds, after which the rest is skipped."""

    match: str = ""
    budget: float = float("inf")
    regime: str = "sustained"  # or "burst", from a cool device
    energy: bool = False
    device: str = "cuda"
    small: bool = False


def measurements(plan: Plan, ceilings: Ceilings) -> Iterator[Measurement]:
    """Every case's forms and modes that match, each as soon as it is measured. A failure is one of them."""
    ends = time.monotonic() + plan.budget
    for case in cases(plan.device, small=plan.small):
        wanted = [m for m in planned_of(case, plan) if re.search(plan.match, m.id)]
        if not wanted:
            continue
        if time.monotonic() > ends:
            spent = f"the budget of {plan.budget:g} s was spent"
            yield from (replace(each, status="skipped", error=spent) for each in wanted)
            continue
        torch.manual_seed(0)
        first = case.make()
        copies = timing.rotation(_nbytes(first)) if timing.has_clock() else None
        inputs = [first, *(case.make() for _ in range((copies.copies if copies else 1) - 1))]
        for each in wanted:
            # What fails, out of memory say, is one of the results; the others are measured all the same.
            try:
                yield _measured(case, each, inputs, copies, plan, ceilings)
            except (RuntimeError, ValueError, TypeError, AttributeError) as error:
                yield replace(each, status="error", error=f"{type(error).__name__}: {str(error)[:300]}")


def planned_of(case: Case, plan: Plan) -> Iterator[Measurement]:
    """The measurements of a case, not measured yet."""
    forms = ["ours", "eager", *(["compiled"] if case.compiled else []), *(["liger"] if liger(case) else [])]
    contract = {"clock": "events", "scope": "device", "regime": plan.regime, "fill": "the case's own, seed 0"}
    for mode in ("forward", "forward+backward")[: 2 if case.differentiable else 1]:
        elements = case.forward_elements + (case.backward_elements if mode != "forward" else 0)
        about: dict[str, Any] = dict(version=_version(), contract=contract, bytes=elements * case.dtype.itemsize)
        for form in forms:
            yield Measurement(name=f"{case.op} [{case.shape}]", mode=mode, form=form, **about)


def _measured(
    case: Case,
    planned: Measurement,
    inputs: list[dict[str, Tensor]],
    copies: timing.Rotation | None,
    plan: Plan,
    ceilings: Ceilings,
) -> Measurement:
    call = call_of(case, planned)
    cache = copies.cache if copies else "none"
    planned = replace(planned, recipe=_recipe(case, inputs[0]), contract={**planned.contract, "cache": cache})
    planned = replace(planned, peak_gb=_peak_gb(partial(call, inputs[0])))
    problem, process, timed = None, None, None
    for _ in range(_TRIES):
        before = environment.gpu().conditions()
        timed = timing.samples(call, inputs, warm=3.0 if plan.regime == "sustained" else 0.0)
        if not timed.milliseconds:
            break
        process = Process.of(timed.milliseconds, **environment.gpu().conditions().since(before))
        problem = _problem(planned, process, cache, ceilings)
        if problem is None:
            break
        time.sleep(_PAUSE)
    assert timed is not None
    eager = call_of(case, replace(planned, form="eager"))
    errors = accuracy(case, eager, timed) if planned.form == "ours" else None
    if errors is not None and errors["error"] > errors["allowed"]:
        message = f"a timed call is wrong: error {errors['error']:.2g}, allowed {errors['allowed']:.2g}"
        return replace(planned, status="error", error=message)
    if process is None:
        return replace(planned, status="skipped", accuracy=errors, error=UNMEASURED)
    spent = joules(environment.gpu(), partial(call, inputs[0]), torch.cuda.synchronize) if plan.energy else None
    found = replace(planned, processes=[process], accuracy=errors, joules=spent)
    return found if problem is None else replace(found, status="contaminated", error=problem)


def _problem(planned: Measurement, process: Process, cache: str, ceilings: Ceilings) -> str | None:
    """Why these times are worth nothing, or None."""
    if slowed := harm(process.throttled_ns):
        return slowed
    rate = replace(planned, processes=[process]).gb_s
    limit = ceilings.memory_gb_s
    if cache == "cold" and rate and limit and rate > _ABOVE_PEAK * limit:
        return f"{rate:.0f} GB/s is more than the memory's {limit:.0f}"
    return None


def call_of(case: Case, planned: Measurement) -> Callable[[dict[str, Tensor]], Any]:
    """What is timed: inputs in, output or gradients out."""
    forms = {"ours": case.ours, "eager": case.eager, "compiled": case.eager, "liger": liger(case)}
    form = forms[planned.form]
    assert form is not None
    if planned.form == "compiled":
        torch.compiler.reset()
        form = torch.compile(form)
    return partial(forward, form) if planned.mode == "forward" else partial(backward, form, case=case)


def forward(form: Callable[..., Output], inputs: dict[str, Tensor]) -> Output:
    with torch.no_grad():
        return form(**inputs)


def backward(form: Callable[..., Output], inputs: dict[str, Tensor], case: Case) -> tuple[Tensor, ...]:
    """Gradients, the outputs being their own upstream gradients."""
    given = {name: t.detach().requires_grad_(name in case.differentiable) for name, t in inputs.items()}
    output = form(**given)
    outputs = (output,) if isinstance(output, Tensor) else output
    wanted = [given[name] for name in case.differentiable]
    return torch.autograd.grad(outputs, wanted, [each.detach() for each in outputs])


def _nbytes(inputs: dict[str, Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in inputs.values())


def _peak_gb(call: Callable[[], Any]) -> float | None:
    """What one call allocates at most beyond its inputs, its result included."""
    if not timing.has_clock():
        return None
    call()  # compiles
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    return (torch.cuda.max_memory_allocated() - before) / 1e9


def _recipe(case: Case, inputs: dict[str, Tensor]) -> str:
    """Of what goes in: names, shapes, dtypes, strides, and which of them get gradients."""
    about = [(name, list(t.shape), str(t.dtype), list(t.stride())) for name, t in sorted(inputs.items())]
    return hashlib.sha256(repr((about, sorted(case.differentiable))).encode()).hexdigest()[:12]


def _version() -> str:
    return timing.source_hash(timing.__file__, __file__)


def new_run(tier: str, ceilings: Ceilings) -> Run:
    """A run of this machine and checkout, nothing measured yet."""
    about: dict[str, Any] = dict(git=environment.git(), software=environment.software(), device=environment.device())
    made: dict[str, Any] = dict(schema=SCHEMA, run_id=uuid.uuid4().hex[:12], created=now(), tier=tier)
    return Run(ceilings=ceilings, **made, **about)


def status(run: Run) -> int:
    """4 if anything failed."""
    return 4 if any(measurement.status == "error" for measurement in run.measurements) else 0


def regex(text: str) -> str:
    """`text`, if it is a regular expression."""
    try:
        re.compile(text)
    except re.error as error:
        raise argparse.ArgumentTypeError(f"{text!r} is no regular expression: {error}") from None
    return text


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks kernels", description=__doc__)
    parser.add_argument("--match", type=regex, default="", help=MATCH)
    parser.add_argument("--procs", type=int, default=1, help="fresh processes (default 1; verdicts need 5)")
    parser.add_argument("--budget", type=float, default=float("inf"), help="seconds, then the rest is skipped")
    parser.add_argument("--regime", choices=("sustained", "burst"), default="sustained", help="default %(default)s")
    parser.add_argument("--energy", action="store_true", help="joules an iteration, at least 2 s more each")
    parser.add_argument("--dry", action="store_true", help="tiny shapes on the CPU, whatever GPU there is")
    parser.add_argument("--out", type=Path, help="result file; default benchmarks/results/DEVICE/kernels-ID.json")
    options = parser.parse_args(arguments)
    if options.procs < 1:
        parser.error(f"--procs must be at least 1, got {options.procs}")
    run = _one(options) if options.procs == 1 else merged([measure(arguments) for _ in range(options.procs)])
    path = options.out or Path(__file__).parent / f"results/{run.device.slug}/kernels-{run.run_id}.json"
    write(run, path)
    print(quick_table(run))
    print(f"written: {path}")
    return status(run)


def _one(options: argparse.Namespace) -> Run:
    timed = timing.has_clock() and not options.dry
    if not timed:
        environment.rehearse()
    plan = Plan(
        options.match, options.budget, options.regime, options.energy, "cuda" if timed else "cpu", small=not timed
    )
    ceilings = timing.ceilings()
    run = new_run("kernels", ceilings)
    return replace(run, measurements=list(measurements(plan, ceilings)))
