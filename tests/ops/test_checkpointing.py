"""checkpointed_reward: the plain path's values and gradients, for a fraction of its memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.utils.checkpoint
from torch import Tensor, nn

import srpo_kernels as sk
from srpo_kernels.checkpointing import checkpointed_reward

BATCH, BRANCHES, SIZE = 3, 2, (4, 6)


class Path(nn.Module):
    """A small decoder and scorer, with dropout so that randomness matters."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.convolution = nn.Conv2d(2, 8, 3, padding=1)
        self.out = nn.Conv2d(8, 3, 3, padding=1)
        self.dropout = nn.Dropout(dropout)
        for parameter in self.parameters():
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.2
        self.batches: list[int] = []

    def decode(self, latents: Tensor) -> Tensor:
        self.batches.append(len(latents))
        return self.out(torch.tanh(self.dropout(self.convolution(latents))))

    def score(self, images: Tensor, rows: slice) -> Tensor:
        weight = torch.arange(BATCH * BRANCHES, dtype=images.dtype, device=images.device)[rows] + 1
        return weight * images.square().mean((1, 2, 3))


def inputs(device: str, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)

    def draw(rows: int) -> Tensor:
        return torch.randn(rows, 6, 8, generator=generator, dtype=torch.float64).to(device, dtype)

    levels = torch.rand(BATCH, BRANCHES, generator=generator).to(device) * 0.9
    made = dict(x_t=draw(BATCH * BRANCHES), noise=draw(BATCH), velocity=draw(BATCH * BRANCHES).requires_grad_())
    return {**made, "sigma_from": levels, "sigma_to": levels * 0.8}


def plain(path: Path, given: dict[str, Any]) -> Tensor:
    latents = sk.recover(**given, unpack=SIZE, scaling_factor=0.5, shift_factor=0.1)
    return path.score(path.decode(latents), slice(0, BATCH * BRANCHES))


def checkpointed(path: Path, given: dict[str, Any], chunk: int | None = None) -> Tensor:
    latent = dict(unpack=SIZE, scaling_factor=0.5, shift_factor=0.1)
    return checkpointed_reward(**given, **latent, decode=path.decode, score=path.score, chunk=chunk)


def value_and_gradients(run: Callable, path: Path, given: dict[str, Any], *rest: Any) -> list[Tensor]:
    torch.manual_seed(3)
    scores = run(path, given, *rest)
    return [scores.detach(), *torch.autograd.grad(scores.sum(), [given["velocity"], *path.parameters()])]


@pytest.mark.parametrize("dropout", [0.0, 0.5])
@pytest.mark.parametrize("prior", [False, True])
def test_is_bitwise_the_plain_path(dropout: float, prior: bool, device: str) -> None:
    path, given = Path(dropout).double().to(device), inputs(device)
    if prior:
        given["noise"] = sk.NoisePrior(4)
    ours, expected = (value_and_gradients(run, path, given) for run in (checkpointed, plain))
    assert all(torch.equal(a, b) for a, b in zip(ours, expected, strict=True))


@pytest.mark.parametrize("chunk", [1, 2, 4, 6, 100])
@pytest.mark.parametrize("noise", ["own", "shared", "prior"])
def test_chunks_change_nothing(chunk: int, noise: str, device: str) -> None:
    path, given = Path().double().to(device), inputs(device)
    given["noise"] = {"own": given["noise"], "shared": given["noise"][:1], "prior": sk.NoisePrior(4)}[noise]
    expected = value_and_gradients(plain, path, given)
    path.batches.clear()
    ours = value_and_gradients(checkpointed, path, given, chunk)
    assert max(path.batches) == min(chunk, 6)
    assert sum(path.batches) == 2 * 6  # once forward, once again for backward
    for a, b in zip(ours, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)


def test_one_chunk_is_alive_at_a_time(device: str) -> None:
    """Backward rebuilds a chunk, frees it, and only then rebuilds the next."""
    path, given = Path().double().to(device), inputs(device)
    events: list[str] = []
    decode = path.decode

    def watched(latents: Tensor) -> Tensor:
        events.append("build")
        images = decode(latents)
        if images.requires_grad:
            latents.register_hook(lambda _: events.append("done"))
        return images

    path.decode = watched  # type: ignore[method-assign]
    scores = checkpointed(path, given, 2)
    assert events == ["build"] * 3
    events.clear()
    scores.sum().backward()
    assert events == ["build", "done"] * 3


def test_autocast_is_restored(device: str) -> None:
    path, given = Path().to(device), inputs(device, torch.float32)
    with torch.autocast(device, torch.bfloat16):
        scores = [run(path, given) for run in (checkpointed, plain)]
    gradients = [torch.autograd.grad(score.sum(), given["velocity"])[0] for score in scores]
    assert torch.equal(*scores)
    assert torch.equal(*gradients)


def test_compiles_without_graph_breaks(device: str) -> None:
    path, given = Path().double().to(device), inputs(device)
    expected = value_and_gradients(plain, path, given)
    path.batches = None  # type: ignore[assignment]
    path.decode = lambda latents: path.out(torch.tanh(path.convolution(latents)))  # type: ignore[method-assign]
    compiled = torch.compile(lambda given: checkpointed(path, given), fullgraph=True, backend="aot_eager")
    scores = compiled(given)
    gradients = torch.autograd.grad(scores.sum(), [given["velocity"], *path.parameters()])
    for a, b in zip([scores, *gradients], expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)


def test_keeps_under_three_percent_of_the_720_px_image_path() -> None:
    """FLUX.1's VAE decoder and a ViT-H's width, on the meta device: only sizes are counted."""
    from diffusers import AutoencoderKL

    with torch.device("meta"):
        vae = AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            block_out_channels=(128, 256, 512, 512),
            layers_per_block=2,
            latent_channels=16,
            use_quant_conv=False,
            use_post_quant_conv=False,
        ).to(torch.bfloat16)
        tower = nn.Conv2d(3, 1280, 14, 14).to(torch.bfloat16)
        tokens = (2, 2025, 64)
        x_t, noise, velocity = (torch.empty(tokens, dtype=torch.bfloat16) for _ in range(3))
    vae.requires_grad_(False)
    velocity.requires_grad_()
    given = dict(x_t=x_t, noise=noise, velocity=velocity, sigma_from=0.9, sigma_to=0.8)

    def score(images: Tensor, _rows: slice) -> Tensor:
        return tower(images[:, :, :224, :224]).mean((1, 2, 3))

    def kept(run: Callable[[], Tensor]) -> int:
        seen: dict[int, int] = {}

        def note(tensor: Tensor) -> Tensor:
            seen[id(tensor)] = tensor.numel() * tensor.element_size()
            held.append(tensor)
            return tensor

        held: list[Tensor] = []
        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            run()
        return sum(seen.values())

    def decode(latents: Tensor) -> Tensor:
        return vae.decode(latents, return_dict=False)[0]

    whole = kept(lambda: score(decode(sk.recover(**given, unpack=(90, 90))), slice(0, 2)))
    region = kept(lambda: checkpointed_reward(**given, unpack=(90, 90), decode=decode, score=score))
    region += sum(tensor.numel() * tensor.element_size() for tensor in (x_t, noise, velocity))  # its inputs
    print(f"kept: plain {whole / 1e9:.2f} GB, checkpointed {region / 1e6:.2f} MB")
    assert region < 0.03 * whole


def test_bad_chunk_is_refused() -> None:
    with pytest.raises(ValueError, match=r"^checkpointed_reward: chunk must be at least 1, got 0$"):
        checkpointed(Path().double(), inputs("cpu"), 0)


def _inject(x: Tensor, y: Tensor) -> Tensor:
    return sk.inject_noise(x, y, 0.3)


def _recover(x: Tensor, y: Tensor) -> Tensor:
    return sk.recover(x, y, x * 2, 0.5, 0.4)


def _reward(x: Tensor, y: Tensor) -> Tensor:
    return sk.relative_reward(x, y[:, :3], -y[:, :3], 0.1, projection=y[:3])


def _loss(x: Tensor, y: Tensor) -> Tensor:
    return sk.relative_reward_loss(x, y, -y, 0.1, 0.7)[0]


def _resize(x: Tensor, y: Tensor) -> Tensor:
    return sk.resize_normalize((x[:, :3] * y[:, :3]).reshape(2, 3, 1, 1).expand(2, 3, 8, 8), 4, [0.5] * 3, [0.5] * 3)


@pytest.mark.parametrize("operator", [_inject, _recover, _reward, _loss, _resize])
def test_every_operator_may_be_checkpointed(operator: Callable[[Tensor, Tensor], Tensor], device: str) -> None:
    generator = torch.Generator().manual_seed(2)
    given = [torch.randn(2 if operator is not _reward else 4, 4, generator=generator).to(device) for _ in range(2)]
    given = [tensor.requires_grad_() for tensor in given]
    plain = operator(*given)
    recomputed = torch.utils.checkpoint.checkpoint(operator, *given, use_reentrant=False)
    gradients = (torch.autograd.grad(output.sum(), given, allow_unused=True) for output in (plain, recomputed))
    for expected, got in zip(*gradients, strict=True):
        assert (expected is None) == (got is None)
        assert expected is None or torch.equal(expected, got)
