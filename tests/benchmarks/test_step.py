"""The step that is timed is the one that is trained, and its references compute the same gradient."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from benchmarks import step_models
from benchmarks.__main__ import main
from benchmarks.our_step import OurStep
from benchmarks.phases import Phases
from benchmarks.reference_step import Setting, reference_gradient
from benchmarks.schema import read
from benchmarks.step import FORMS, setting
from srpo.config import TrainConfig
from srpo.models import Flux
from srpo.randomness import generator

CPU = torch.device("cpu")
PHASES = {"text", "rollout", "inject", "forward", "decode", "reward", "image backward", "backward"}


def reference(config: TrainConfig, style: str, dtype: torch.dtype) -> tuple[dict[str, Tensor], Phases]:
    flux = step_models.flux("tiny", config, CPU, dtype=dtype)
    flux.vae.to(dtype)
    size = (config.srpo.height, config.srpo.width)
    noise = flux.noise(1, *size, generator(config.run.seed, 0, 0, "noise/0")).to(dtype)

    def text(caption: str) -> tuple[Tensor, Tensor]:
        found = flux.encode_prompts([caption])
        return found.prompt_embeds, found.pooled

    phases = Phases(CPU)
    scorer = step_models.scorer("tiny", CPU, dtype)
    given: Setting = setting(config, flux, 0)
    reference_gradient(style, flux.transformer, flux.vae, scorer, text, noise, given, phases, {})
    return gradients(flux), phases


def gradients(flux: Flux) -> dict[str, Tensor]:
    found = {name: parameter.grad for name, parameter in flux.transformer.named_parameters()}
    return {name: grad.double() for name, grad in found.items() if grad is not None}


@pytest.fixture(scope="module")
def config() -> TrainConfig:
    return step_models.recipe("tiny", None, ["srpo.rollout_steps=3"])


def test_references_have_the_trainers_gradient(config: TrainConfig) -> None:
    """Against float64, srpo's is no worse than four times what the plain step's fp32 is."""
    exact, _ = reference(config, "eager", torch.float64)
    plain, phases = reference(config, "eager", torch.float32)
    official, _ = reference(config, "official", torch.float32)
    flux = step_models.flux("tiny", config, CPU)
    ours = OurStep(config, flux, step_models.reward("tiny", config, CPU))
    watched = Phases(CPU)
    ours.gradient(0, watched)
    found = gradients(flux)
    assert found.keys() == plain.keys() == official.keys() == exact.keys()
    eps = torch.finfo(torch.float32).eps
    for name, value in exact.items():
        slack = 4 * max((other[name] - value).abs().max().item() for other in (plain, official))
        worst = (found[name] - value).abs().max().item()
        assert worst <= eps * value.abs().max().item() + slack, name
    assert sum(value.square().sum() for value in exact.values()) > 0
    assert set(watched.seconds()) == PHASES
    assert {name.partition(",")[0] for name in phases.seconds()} == PHASES
    assert {f"{phase}, {branch}" for phase in ("forward", "backward") for branch in ("denoise", "inversion")} <= set(
        phases.seconds()
    )


def test_step_is_timed_in_every_form_and_its_phases_are_the_whole(tmp_path: Path) -> None:
    file = tmp_path / "step.json"
    assert main(["step", "srpo.rollout_steps=2", "--repeats=2", f"--out={file}"]) == 0
    run = read(file)
    for form in FORMS:
        of_form = {m.mode: m for m in run.measurements if m.form == form}
        assert set(of_form) == PHASES | {"optimizer", "step"}
        whole = of_form.pop("step")
        assert whole.flops
        assert whole.flops > of_form["rollout"].flops + of_form["backward"].flops
        assert set(of_form["forward"].details) == (
            set() if form == "ours" else {"forward, denoise ms", "forward, inversion ms"}
        )
        assert all(m.processes[0].n == 2 for m in of_form.values())
        assert sum(m.processes[0].minimum for m in of_form.values()) <= whole.processes[0].minimum * (1 + 1e-9)


def test_unknown_reference_and_recipe_key_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["step", "--reference=fast"])
    assert "--reference must be of eager, official or none, got fast" in capsys.readouterr().err
    assert main(["step", "srpo.rollout_stepz=2", f"--out={tmp_path}/x.json"]) == 2
    assert "did you mean 'srpo.rollout_steps'" in capsys.readouterr().err


def test_phases_nest_and_switch(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(float(tick) for tick in range(100))
    monkeypatch.setattr("benchmarks.phases.time.perf_counter", lambda: next(clock))
    phases = Phases(CPU)
    with phases.of("a"):
        with phases.of("b"):
            pass
        phases.switch("c")
    with phases.of("a"):
        pass
    # Seconds 0 a, 1 b, 2 a, 3 c, 4 none, 5 a, 6 none.
    assert phases.seconds() == {"a": 3.0, "b": 1.0, "c": 1.0}
