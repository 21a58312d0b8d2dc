"""Every measured case, small and on the CPU: ours is the eager form, and counts what there is to move."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import Tensor

from benchmarks import decoder, tower, transformer
from benchmarks.case import Case
from benchmarks.cases import cases
from benchmarks.kernels import backward, forward
from benchmarks.transformer import _flops, _inputs, _model
from srpo.rewards.towers import freeze
from srpo_kernels import patch


@pytest.mark.parametrize("case", cases("cpu", small=True), ids=lambda case: case.op)
def test_ours_is_what_eager_computes(case: Case) -> None:
    torch.manual_seed(0)
    inputs = case.make()
    allowed = 0.05 if "fp8" in case.op else 0.02  # e4m3 moves a value by 6%, if it moves it
    for run in (forward, *([partial(backward, case=case)] if case.differentiable else [])):
        ours, eager = (_tuple(run(form, inputs=inputs)) for form in (case.ours, case.eager))
        for actual, expected in zip(ours, eager, strict=True):
            assert (actual.shape, actual.dtype) == (expected.shape, expected.dtype)
            if "NoisePrior" not in case.op:  # drawn otherwise
                assert (actual.float() - expected.float()).norm() <= allowed * expected.float().norm()


@pytest.mark.parametrize("case", cases("cpu", small=True), ids=lambda case: case.op)
def test_floors_are_what_there_is_to_move(case: Case) -> None:
    """Forward reads every input, GroupNorm twice, and writes every output; vectors are not counted, a tenth here."""
    inputs = {name: tensor for name, tensor in case.make().items() if not name.startswith("plain_")}  # eager's own
    kept = 2 * inputs["image"].numel() if case.op == "relative_reward_loss" else 0  # a gradient, for backward, in fp32
    again = inputs["x"].numel() if case.op == "group_norm_silu" else 0
    outputs = _tuple(forward(case.ours, inputs))
    sizes = (t.numel() / (2 if t.dtype == torch.float8_e4m3fn else 1) for t in (*inputs.values(), *outputs))
    moved = kept + again + sum(sizes)
    assert 0.85 * moved <= case.forward_elements <= moved
    assert bool(case.backward_elements) == bool(case.differentiable)  # or forward only


def test_full_size_transformer_is_flux_dev() -> None:
    assert _flops(90, 1, {}) == pytest.approx(37.3e12, rel=1e-3)  # 32.75 in linears and 4.51 in attention


def test_transformer_forms_agree() -> None:
    small = dict(num_layers=1, num_single_layers=1, num_attention_heads=2)
    torch.manual_seed(0)
    model, inputs = _model(small, "cpu"), _inputs(4, 1, torch.device("cpu"))
    plain = transformer._forward(model, inputs)
    transformer._train(model, inputs)
    assert all(parameter.grad is not None for parameter in model.parameters())
    patch(model, strict=True)
    ours = transformer._forward(model, inputs)
    for other in (ours, transformer._rollout(model, inputs, graph=False).velocity(inputs["hidden_states"], 1)):
        assert (other - plain).float().norm() <= 0.02 * plain.float().norm()


def test_decoder_forms_agree() -> None:
    torch.manual_seed(0)
    vae = decoder._vae("cpu", block_out_channels=(32, 32, 32, 32), layers_per_block=1)
    z = decoder._latents(32, 1, "cpu")
    plain = [decoder._decode(vae, z), decoder._gradient(vae, z)]
    patch(vae, strict=True)
    for ours, theirs in zip([decoder._decode(vae, z), decoder._gradient(vae, z)], plain, strict=True):
        assert (ours - theirs).float().norm() <= 0.05 * theirs.float().norm()


def test_tower_forms_agree() -> None:
    torch.manual_seed(0)
    model = tower._model("cpu", frozen=False, architecture="ViT-S-32-alt")
    pixels = torch.randn(2, 3, 224, 224)
    released = tower._gradient(model, pixels, autocast=True)
    freeze(model, [model.visual], torch.bfloat16, activation=tower.QuickGELU)
    ours = tower._gradient(model, pixels.bfloat16(), autocast=False)
    assert (ours - released).float().norm() <= 0.05 * released.norm()


def test_the_command_stays_short() -> None:
    """Ten minutes in all, at about 5 s to compile the eager form of a case."""
    assert sum(case.compiled for case in cases("cpu")) <= 45


def _tuple(output: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (output,) if isinstance(output, Tensor) else output
