"""What a FLUX.1-dev block keeps for backward, launches and moves: at its real width, counted."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.models.transformers.transformer_flux import FluxSingleTransformerBlock, FluxTransformerBlock
from torch import Tensor, nn

from srpo_kernels import patch
from srpo_kernels.checkpointing import _UNITS, flux_policy
from srpo_kernels.patching import attention
from srpo_kernels.testing.trace import Trace

PAGE = Path(__file__).parent.parent / "docs/patching.md"  # states what is counted here
WIDTH, HEADS, TEXT = 3072, 24, 512
BLOCKS = {"double": FluxTransformerBlock, "single": FluxSingleTransformerBlock}
#: Elements moved at least, in units of tokens x width: modulated norms, rotary, GELU, gated residuals.
FLOORS = {"double": 2 + 6 + 4 + 8 + 3, "single": 2 + 4 + 10 + 3}


def _block(kind: str, device: str) -> Any:
    with torch.device("meta"):
        block = BLOCKS[kind](WIDTH, HEADS, WIDTH // HEADS).bfloat16()
    if device == "cpu":  # only sizes matter
        block.to_empty(device="cpu")
        for parameter in block.parameters():
            parameter.data.fill_(0.01)
    return block


def _inputs(tokens: int, device: str, *, grad: bool, batch: int = 1) -> dict[str, Any]:
    text = min(TEXT, tokens // 4)

    def made(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        return torch.ones(*shape, device=device, dtype=dtype)

    rotary = tuple(made(tokens, WIDTH // HEADS, dtype=torch.float32) for _ in range(2))
    image, words = made(batch, tokens - text, WIDTH), made(batch, text, WIDTH)
    streams = {"hidden_states": image.requires_grad_(grad), "encoder_hidden_states": words.requires_grad_(grad)}
    return {**streams, "temb": made(batch, WIDTH), "image_rotary_emb": rotary}


class _Transformer(nn.Module):
    """As much of a `FluxTransformer2DModel` as `flux_policy` needs, around one block."""

    def __init__(self, block: nn.Module, kind: str) -> None:
        super().__init__()
        self.inner_dim = WIDTH
        self.transformer_blocks = nn.ModuleList([block] if kind == "double" else [])
        self.single_transformer_blocks = nn.ModuleList([block] if kind == "single" else [])
        self.run: Callable[..., Any] = lambda block, *args: block(*args)

    def enable_gradient_checkpointing(self, function: Callable) -> None:
        self.run = function

    def disable_gradient_checkpointing(self) -> None:
        pass


def _kept(kind: str, mode: str, *, patched: bool) -> float:
    """Bytes left behind by one block in units of tokens x width x 2, its output standing for the next block's input.

    From two lengths: modulation vectors, which do not grow with the tokens, fall out.
    """
    block = _block(kind, "cpu")
    if patched:
        patch(block)
    model = _Transformer(block, kind)
    kept = {}
    for tokens in (32, 64):
        inputs = _joint(_inputs(tokens, "cpu", grad=True)) if kind == "single" else _inputs(tokens, "cpu", grad=True)
        flux_policy(model, mode, batch=1, tokens=tokens)
        with Trace() as trace:
            out = model.run(block, *inputs.values(), None)
        assert any(tensor.requires_grad for tensor in out)
        kept[tokens] = trace.kept()
        del out
    return (kept[64] - kept[32]) / (32 * WIDTH * 2)


def _joint(inputs: dict[str, Any]) -> dict[str, Any]:
    """Streams as a patched model gives them to single blocks: joined once, before the first."""
    joint = torch.cat([inputs["encoder_hidden_states"], inputs["hidden_states"]], 1).detach()
    joint.requires_grad_(inputs["hidden_states"].requires_grad)
    return {**inputs, "hidden_states": joint, "encoder_hidden_states": joint[:, :0].detach()}


@pytest.mark.parametrize(
    ("kind", "mode", "budget"),
    [
        ("double", "none", 20.5),
        ("single", "none", 17.0),
        ("double", "selective", 11.5),
        ("single", "selective", 10.5),
        ("double", "block", 1.1),
        ("single", "block", 1.1),
    ],
)
def test_what_a_patched_block_keeps(kind: str, mode: str, budget: float) -> None:
    kept = _kept(kind, mode, patched=True)
    assert kept <= budget
    assert kept == pytest.approx(_UNITS[mode][kind == "single"], abs=0.1), "what flux_policy reckons with"
    (row,) = (line for line in PAGE.read_text().splitlines() if line.startswith(f"| `{mode}` | "))
    assert [int(number) for number in re.findall(r"\d+", row)[:2]][kind == "single"] == round(kept)


class _FusedRMSNorm(torch.autograd.Function):
    """Keeps what CUDA's kernel does; the CPU's keeps fp32 copies."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight, x.new_empty(x.shape[:-1], dtype=torch.float32))
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        raise NotImplementedError


@pytest.mark.parametrize(("kind", "units"), [("double", 22), ("single", 20)])
def test_an_unpatched_block_keeps_more(kind: str, units: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nn.RMSNorm, "forward", lambda self, x: _FusedRMSNorm.apply(x, self.weight))
    kept = _kept(kind, "none", patched=False)
    assert kept == pytest.approx(units, abs=0.2)
    (stated,) = re.findall(r"own blocks keep (\d+) / (\d+)", PAGE.read_text())
    assert int(stated[kind == "single"]) == round(kept)


def _traced(kind: str, *, patched: bool, monkeypatch: pytest.MonkeyPatch, batch: int = 1) -> Trace:
    """One forward at 720 px on shapes alone; attention and RMSNorm count as the one launch they are on a GPU."""
    block, inputs = _block(kind, "meta"), _inputs(2537, "meta", grad=False, batch=batch)
    module = "diffusers.models.transformers.transformer_flux.dispatch_attention_fn"

    def attend(query: Tensor, *_: Any, **__: Any) -> Tensor:
        heads_first = [query.transpose(1, 2)] * 3
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(*heads_first)[0].transpose(1, 2)

    monkeypatch.setattr(module, attend)
    monkeypatch.setattr(attention, "dispatch_attention_fn", attend)
    monkeypatch.setattr(nn.RMSNorm, "forward", lambda _, x: torch.relu(x))  # one pass, one launch
    if patched:
        patch(block)
        inputs = _joint(inputs) if kind == "single" else inputs
    with torch.no_grad(), Trace() as trace:
        block(**inputs)
    return trace


@pytest.mark.parametrize("kind", list(BLOCKS))
def test_launches(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    eager = len(_traced(kind, patched=False, monkeypatch=monkeypatch).launches)
    ours = len(_traced(kind, patched=True, monkeypatch=monkeypatch).launches)
    assert ours <= 0.6 * eager
    assert ours == {"double": 26, "single": 12}[kind], "launches of a patched block"


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("kind", list(BLOCKS))
def test_bytes_are_close_to_the_floor(kind: str, batch: int, monkeypatch: pytest.MonkeyPatch) -> None:
    floor = FLOORS[kind] * batch * 2537 * WIDTH * 2
    assert floor <= _traced(kind, patched=True, monkeypatch=monkeypatch, batch=batch).moved() <= 1.15 * floor
