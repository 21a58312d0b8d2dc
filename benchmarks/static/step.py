"""Memory of SRPO's training step on FLUX.1-dev at full size: the real code on fake tensors, every storage counted."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace
from typing import Any

import open_clip
import torch
from open_clip.transformer import QuickGELU
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from srpo.config import TrainConfig, load_config
from srpo.models import Conditioning, Flux
from srpo.objective import branches, srpo_loss
from srpo.optimizer import set_gradient_dtype
from srpo.plan.sizes import Sizes
from srpo.rewards.towers import freeze
from srpo_kernels import relative_reward, resize_normalize
from srpo_kernels.checkpointing import Mode, flux_policy

__all__ = ["Models", "materialise", "models", "step_figures"]

_MEAN, _STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


class Peak(TorchDispatchMode):
    """Within the block, the bytes of all storages that operators make, now and at most."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known: dict[int, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        del types
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and tensor.untyped_storage()._cdata not in self._known:
                storage = tensor.untyped_storage()
                self._known[storage._cdata] = storage.nbytes()
                self.now += storage.nbytes()
                weakref.finalize(storage, self._freed, storage._cdata)
        self.peak = max(self.peak, self.now)
        return result

    def _freed(self, key: int) -> None:
        self.now -= self._known.pop(key)

    def highest(self, run: Callable[[], Any]) -> tuple[Any, int]:
        """What `run` returns, and the most bytes there were meanwhile."""
        self.peak = self.now
        return run(), self.peak


class Reward:
    """ViT-H-14 as HPSv2.1 has it, after its prompts were embedded."""

    def __init__(self, model: Any) -> None:
        self.model = model

    def embed_images(self, images: Tensor) -> Tensor:
        pixels = resize_normalize(images, 224, _MEAN, _STD, value_range=(0, 1))
        return self.model.encode_image(pixels.to(torch.bfloat16)).float()

    def relative(self, images: Tensor, positive: list[str], negative: list[str], kappa: Tensor) -> Tensor:
        wanted, other = (torch.empty(len(prompts), 1024) for prompts in (positive, negative))
        return relative_reward(self.embed_images(images), wanted, other, kappa)

    def score(self, images: Tensor, prompts: list[str]) -> Tensor:
        raise NotImplementedError  # no part of the official form


@dataclass(frozen=True)
class Models:
    """All that a step needs, patched, with the recipe it is of."""

    config: TrainConfig
    flux: Flux
    reward: Reward

    @property
    def size(self) -> tuple[int, int]:
        return self.config.srpo.height, self.config.srpo.width

    def latents(self, batch: int) -> Tensor:
        height, width = self.flux.latent_size(*self.size)
        return torch.empty(batch, height * width // 4, 64)

    def velocity(self, batch: int) -> Callable[[Tensor, Tensor], Tensor]:
        """For `batch` images, with empty prompts."""
        length = self.config.model.max_sequence_length
        text, pooled = (torch.empty(batch, *shape, dtype=torch.bfloat16) for shape in ((length, 4096), (768,)))
        return partial(
            self.flux.velocity,
            conditioning=Conditioning(text, pooled),
            guidance=self.config.srpo.guidance,
            size=self.size,
        )


@contextmanager
def models(side: int) -> Iterator[Models]:
    """The models of the official recipe at `side` pixels; within the block tensors are fake, on the CPU.

    There attention is one operator that keeps what flash attention keeps on a GPU. On the meta device it would be
    composed of products.
    """
    # Nothing is read: FLUX.1-dev's sizes stand in for a directory that is not there, and no text encoder is needed.
    absent = ["model.path=absent", "model.text_cache=absent", "reward.path=absent"]
    config = load_config("flux-dev-hps", [*absent, f"srpo.height={side}", f"srpo.width={side}"])
    sizes = Sizes.of(config)
    sizes.vae.register_to_config(scaling_factor=0.3611, shift_factor=0.1159)
    with torch.device("meta"):
        tower = open_clip.CLIP(**open_clip.get_model_config("ViT-H-14"))
    freeze(tower, [tower.visual], torch.bfloat16, activation=QuickGELU)
    with FakeTensorMode(allow_non_fake_inputs=True):
        for module in (sizes.transformer.bfloat16(), sizes.vae.bfloat16(), tower):
            materialise(module)
        parts = dict(transformer=sizes.transformer, vae=sizes.vae, text_encoder=None, text_encoder_2=None)
        pipeline: Any = SimpleNamespace(**parts, vae_scale_factor=8)
        flux = Flux(pipeline, precision="bf16", max_sequence_length=config.model.max_sequence_length)
        flux.patch("auto")
        yield Models(config, flux, Reward(tower))


def materialise(model: nn.Module) -> None:
    """From the meta device to fake tensors on the CPU; modules' own conversions cannot swap these."""
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            empty = torch.empty(parameter.shape, dtype=parameter.dtype)
            module.register_parameter(name, nn.Parameter(empty, parameter.requires_grad))
        for name, buffer in module.named_buffers(recurse=False):
            module._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype)


def step_figures(side: int, mode: Mode) -> dict[str, Any]:
    """Bytes on the GPU in the last gradient pass of an update, and in the optimizer's step, which is in place.

    Resident are weights, gradients, summed over the passes before, and the optimizer's states, whose sizes are those
    `srpo` reckons with.
    """
    with Peak() as peak, models(side) as step:
        config, transformer = step.config, step.flux.transformer
        parameters = list(transformer.parameters())
        batch, pair = config.run.micro_batch, branches(config.srpo, config.srpo.timesteps // 2)
        set_gradient_dtype(config.optimizer, parameters, config.srpo.batch_size // batch)
        for parameter in parameters:
            parameter.grad = torch.empty_like(parameter, dtype=torch.float32)
        gradients = sum(parameter.grad.nbytes for parameter in parameters)
        states = config.optimizer.reserved_bytes(parameters, config.model.precision) - gradients
        text = config.model.max_sequence_length
        noise, x0 = step.latents(1), step.latents(batch)
        flux_policy(transformer, mode, batch=2 * batch, tokens=x0.shape[1] + text)
        resident = peak.now + states

        def forward() -> Tensor:
            return srpo_loss(
                x0,
                noise,
                ["a caption"] * batch,
                controls=("positive", "negative"),
                branches=pair,
                velocity=step.velocity(len(pair) * batch),
                decode=step.flux.decode,
                reward=step.reward,
                threshold=config.srpo.threshold,
                latent=step.flux.layout(step.size),
                checkpoint=mode != "none",
            ).loss

        loss, highest = peak.highest(forward)
        _, backward = peak.highest(loss.backward)
    return {
        "resident_bytes": resident,
        "peak_forward_bytes": highest + states,
        "peak_backward_bytes": backward + states,
        "peak_optimizer_bytes": peak.now + states,
    }
