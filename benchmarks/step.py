"""``python -m benchmarks step``: one image's SRPO step, phase by phase, as `srpo` runs it and as others do.

On a GPU the models are FLUX.1-dev's and ViT-H-14, at full size with random weights; without one, the tiny ones, timed
by the host's clock. `section.key=value` changes the recipe of `srpo`'s own step.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import environment, step_models, timing
from benchmarks.fresh import ROOT
from benchmarks.kernels import UNMEASURED, new_run, status
from benchmarks.our_step import CAPTION, OurStep
from benchmarks.phases import Phases
from benchmarks.reference_step import Setting, reference_gradient
from benchmarks.schema import Ceilings, Measurement, Process, write
from srpo.config import TrainConfig
from srpo.errors import InputError
from srpo.latents import shifted_sigmas
from srpo.models import Flux
from srpo.objective import branches, draw_timestep
from srpo.plan.sizes import Sizes
from srpo.randomness import generator

__all__ = ["FORMS", "measure_step", "quick", "setting"]

FORMS = ("ours", "eager", "official")
#: A step, timed; and how many of the trained parameters its optimizer stepped.
Step = Callable[[int, Phases], object]


def quick(ceilings: Ceilings, *, small: bool) -> Iterator[Measurement]:
    """The step of the profile, in every form that fits the GPU; `small`: the tiny one, run and not timed."""
    model = "tiny" if small else "flux-dev"
    changes = ["srpo.rollout_steps=2"] if small else _fitting()
    config = step_models.recipe(model, None, changes)
    for form in FORMS:
        for measurement in measure_step(model, form, config, ceilings, repeats=1 if small else 3):
            yield replace(measurement, processes=[], status="skipped", error=UNMEASURED) if small else measurement


def measure_step(
    model: str, form: str, config: TrainConfig, ceilings: Ceilings, *, repeats: int
) -> Iterator[Measurement]:
    """The whole step in `form`, and each of its phases. One that does not fit the GPU is an error."""
    device = torch.device("cuda" if timing.has_clock() else "cpu")
    size = config.srpo.height
    about: dict[str, Any] = dict(
        name=f"SRPO step, {model}, {size} px",
        part="step",
        form=form,
        version=timing.source_hash(__file__),
        recipe=f"{config.srpo.rollout_steps} rollout steps, {config.model.precision}, batch 1, optimizer "
        f"{'/'.join(config.optimizer.modes(config.model.precision))}, offload {config.optimizer.offload}",
        contract={"clock": "events" if device.type == "cuda" else "host", "scope": "device", "fill": "random weights"},
    )
    try:
        step, stepped = _ours(model, config, device) if form == "ours" else _reference(model, form, config, device)
        steps, conditions, joules, peak = _run(step, device, repeats)
    except torch.OutOfMemoryError as error:
        yield Measurement(mode="step", status="error", error=f"out of memory: {str(error).splitlines()[0]}", **about)
        return
    finally:
        gc.collect()
        torch.cuda.empty_cache()
    flops = _flops(config)
    totals = [1e3 * sum(each.values()) for each in steps]
    details: dict[str, Any] = {"optimizer stepped": stepped}
    rate = flops["step"] / (statistics.median(totals) * 1e-3) / 1e12
    if config.model.precision == "bf16" and ceilings.matmul_tflop_s:
        details["MFU, of the measured matmul ceiling"] = round(rate / ceilings.matmul_tflop_s, 4)
    yield Measurement(
        mode="step",
        processes=[Process.of(totals, **conditions)],
        flops=flops["step"],
        peak_gb=peak,
        joules=joules,
        details=details,
        **about,
    )
    for phase in dict.fromkeys(name.partition(",")[0] for name in steps[0]):
        parts = [name for name in steps[0] if name.partition(",")[0] == phase]  # the branches, one after the other
        times = [1e3 * sum(each[name] for name in parts) for each in steps]
        split = {f"{name} ms": round(1e3 * statistics.median(each[name] for each in steps), 3) for name in parts}
        if min(times) > 0:
            yield Measurement(
                mode=phase,
                processes=[Process.of(times, **conditions)],
                flops=flops.get(phase),
                details=split if len(parts) > 1 else {},
                **about,
            )


def _fitting() -> list[str]:
    """What a GPU with less room than weights, gradients and states of FLUX.1-dev take changes in the recipe."""
    room = torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory
    return ["optimizer.offload=states"] if room < _RESIDENT else []


def setting(config: TrainConfig, flux: Flux, step: int) -> Setting:
    """What update `step` of `config` draws, for a reference."""
    objective, run = config.srpo, config.run
    timestep = draw_timestep(objective, generator(run.seed, step, 0, "timestep/0/0"))
    return Setting(
        caption=CAPTION,
        words=(
            objective.positive_controls[step % len(objective.positive_controls)],
            objective.negative_controls[step % len(objective.negative_controls)],
        ),
        branches=branches(objective, timestep),
        sigmas=shifted_sigmas(objective.rollout_steps, objective.shift).tolist(),
        rollout_guidance=objective.rollout_guidance,
        guidance=objective.guidance,
        threshold=objective.threshold,
        latent=flux.latent_size(objective.height, objective.width),
    )


def _ours(model: str, config: TrainConfig, device: torch.device) -> tuple[Step, str]:
    ours = OurStep(config, step_models.flux(model, config, device), step_models.reward(model, config, device))
    return ours.step, "all parameters"


def _reference(model: str, style: str, config: TrainConfig, device: torch.device) -> tuple[Step, str]:
    cuda = device.type == "cuda"
    flux = step_models.flux(model, config, device, dtype=torch.float32 if style == "official" or not cuda else None)
    transformer, vae = flux.transformer, flux.vae
    transformer.requires_grad_(True)
    transformer.enable_gradient_checkpointing()
    vae.requires_grad_(style == "official")
    scorer = step_models.scorer(model, device)
    parameters = list(transformer.parameters())
    chosen = _that_fit(parameters, device)
    count, total = (sum(parameter.numel() for parameter in group) for group in (chosen, parameters))
    objective = config.srpo
    numbers: dict[str, Any] = dict(
        lr=objective.learning_rate, betas=objective.betas, eps=objective.eps, weight_decay=objective.weight_decay
    )
    optimizer = torch.optim.AdamW(chosen, fused=True if style == "eager" else None, **numbers)
    size, kept = (objective.height, objective.width), dict[str, Tensor]()

    def text(caption: str) -> tuple[Tensor, Tensor]:
        found = flux.encode_prompts([caption])
        return found.prompt_embeds, found.pooled

    def step(number: int, phases: Phases) -> None:
        for module in (transformer, vae):
            module.zero_grad(set_to_none=True)
        name = "noise" if objective.noise == "shared" else "noise/0"
        noise = flux.noise(1, *size, generator(config.run.seed, number, 0, name))
        given = setting(config, flux, number)
        reference_gradient(style, transformer, vae, scorer, text, noise, given, phases, kept)
        with phases.of("optimizer"):
            torch.nn.utils.clip_grad_norm_(parameters, objective.max_grad_norm)
            optimizer.step()

    return step, "all parameters" if count == total else f"{count / total:.0%} of all parameters, for lack of memory"


def _that_fit(parameters: Sequence[Tensor], device: torch.device) -> list[Tensor]:
    """The first parameters, as many as have room for gradients, and for moments, of their dtype."""
    if device.type != "cuda":
        return list(parameters)
    free = torch.cuda.mem_get_info(device)[0] - sum(each.nbytes for each in parameters) - _ACTIVATIONS
    chosen = []
    for parameter in parameters:
        free -= 3 * parameter.nbytes  # two moments, and what a step that is not fused makes beside them
        if free < 0:
            break
        chosen.append(parameter)
    return chosen


def _run(step: Step, device: torch.device, repeats: int) -> tuple[list[dict[str, float]], Any, float | None, Any]:
    """Seconds of the phases of each of `repeats` steps after a first; conditions, joules of one, peak memory in GB."""
    cuda, gpu = device.type == "cuda", environment.gpu()
    step(0, Phases(device))
    if cuda:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    before, energy = gpu.conditions(), gpu.ask("GetTotalEnergyConsumption")
    found = []
    for number in range(1, repeats + 1):
        phases = Phases(device)
        step(number, phases)
        found.append(phases.seconds())
    after = gpu.ask("GetTotalEnergyConsumption")
    joules = None if energy is None or after is None or after <= energy else (after - energy) / 1000 / repeats
    peak = torch.cuda.max_memory_allocated() / 1e9 if cuda else None
    return found, gpu.conditions().since(before), joules, peak


def _flops(config: TrainConfig) -> dict[str, float]:
    """Of a step by the algorithm, whatever is computed again: both branches, and gradients of all weights."""
    sizes = Sizes.of(config)
    one, count = sizes.forward.total, 2
    found = {"rollout": config.srpo.rollout_steps * one, "forward": count * one, "backward": 2 * count * one}
    images = count * 2 * (sizes.decode.flops + sizes.reward.flops)  # their weights are frozen
    return {**found, "step": sum(found.values()) + images}


#: 10 bytes a parameter, and room for an image.
_RESIDENT = 130e9
#: What a gradient pass of one checkpointed branch keeps, and the decoder's graph, at 1024 px; with some room.
_ACTIVATIONS = 24 << 30


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks step", description=__doc__)
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="changes to the recipe")
    default = "flux-dev" if timing.has_clock() else "tiny"
    parser.add_argument("--model", choices=step_models.MODELS, default=default, help="default here: %(default)s")
    parser.add_argument("--size", type=int, help="pixels a side (default: the recipe's)")
    parser.add_argument(
        "--reference", default="eager,official", metavar="eager,official", help="also measured; or none"
    )
    parser.add_argument("--repeats", type=int, default=5, help="steps timed (default %(default)s)")
    parser.add_argument("--out", type=Path, help="default benchmarks/results/DEVICE/step-MODEL.json")
    options = parser.parse_args(arguments)
    wanted = [name for name in options.reference.split(",") if name not in ("", "none")]
    if wrong := set(wanted) - set(FORMS):
        parser.error(f"--reference must be of eager, official or none, got {', '.join(sorted(wrong))}")
    if options.repeats < 1:
        parser.error(f"--repeats must be at least 1, got {options.repeats}")
    try:
        config = step_models.recipe(options.model, options.size, options.overrides)
        run = new_run("step", timing.ceilings())
        for form in ("ours", *wanted):
            found = measure_step(options.model, form, config, run.ceilings, repeats=options.repeats)
            run = replace(run, measurements=[*run.measurements, *found])
    except InputError as error:
        print(f"benchmarks step: {error}", file=sys.stderr)
        return 2
    print(table(run.measurements))
    out = options.out or ROOT / "benchmarks/results" / run.device.slug / f"step-{options.model}.json"
    print(f"written: {write(run, out)}")
    return status(run)


def table(measurements: Sequence[Measurement]) -> str:
    """Milliseconds: a row for every phase, a column for every form."""
    forms = list(dict.fromkeys(m.form for m in measurements))
    modes = [*dict.fromkeys(m.mode for m in measurements if m.mode != "step"), "step"]
    known = {(m.mode, m.form): m.milliseconds for m in measurements}

    def cell(value: float | None) -> str:
        return f"{'-' if value is None else f'{value:.2f}':>12}"

    lines = [f"{'ms':16}" + "".join(f"{form:>12}" for form in forms)]
    lines += [f"{mode:16}" + "".join(cell(known.get((mode, form))) for form in forms) for mode in modes]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
