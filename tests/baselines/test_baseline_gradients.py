"""The gradient of an update of each baseline, against its algorithm written out in plain PyTorch and float64."""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import quick_config
from torch import Tensor
from torch.nn.functional import normalize

from srpo.algorithm import Seconds
from srpo.assets import resolve_asset
from srpo.models import Flux
from srpo.objective import branches, draw_timestep
from srpo.randomness import generator
from srpo.trainer import Trainer

#: One clean batch of two images, three rollout steps.
SMALL = ("srpo.batch_size=2", "srpo.rollout_steps=3", "srpo.shift=3", "srpo.guidance=2.5", "srpo.rollout_guidance=2.5")
GRPO = ("dancegrpo.generations=4", "dancegrpo.optimizer_steps=2", "dancegrpo.clip_range=0.02")


class Plain:
    """The trainer's models, computing in `dtype` without its operators, sampling, or losses."""

    def __init__(self, trainer: Trainer, dtype: torch.dtype) -> None:
        self.config, self.dtype, self.batches, self.reward = trainer.config, dtype, trainer.batches, trainer.reward
        self.flux = Flux.load(resolve_asset("tiny", "pipeline"), max_sequence_length=16, trainable=True)
        self.flux.transformer.load_state_dict(trainer.flux.transformer.state_dict())
        self.transformer, self.vae = self.flux.transformer.to(dtype), self.flux.vae.to(dtype)
        self.clip = deepcopy(trainer.reward.model).to(dtype)
        self.captions = trainer.batches.chosen(0, 0)[0]
        self.texts = [caption.text for caption in self.captions]
        self.noise = trainer.batches.noise(0, 0).to(dtype)
        t = torch.linspace(1, 0, self.config.srpo.rollout_steps + 1, dtype=torch.float64)
        self.sigmas = (3 * t / (1 + 2 * t)).tolist()

    def velocity(self, x: Tensor, sigma: float) -> Tensor:
        rows, tokens = x.shape[:2]
        encoded = self.flux.encode_prompts(self.texts)
        side = int(tokens**0.5)
        ids = torch.tensor([[0, row, column] for row in range(side) for column in range(side)], dtype=self.dtype)
        return self.transformer(
            hidden_states=x,
            timestep=torch.full((rows,), sigma, dtype=self.dtype),
            guidance=torch.full((rows,), 2.5, dtype=self.dtype),
            pooled_projections=encoded.pooled.to(self.dtype),
            encoder_hidden_states=encoded.prompt_embeds.to(self.dtype),
            txt_ids=torch.zeros(encoded.prompt_embeds.shape[1], 3, dtype=self.dtype),
            img_ids=ids,
            return_dict=False,
        )[0]

    def rolled_out(self, until: int) -> Tensor:
        x = self.noise
        with torch.no_grad():
            for step in range(until):
                x = x + (self.sigmas[step + 1] - self.sigmas[step]) * self.velocity(x, self.sigmas[step])
        return x

    def score(self, x0: Tensor) -> Tensor:
        """Cosines of images and prompts."""
        side = int(x0.shape[1] ** 0.5)
        patches = x0.reshape(len(x0), side, side, -1, 2, 2)
        latents = torch.einsum("nhwcij->nchiwj", patches).reshape(len(x0), -1, 2 * side, 2 * side)
        config = self.vae.config
        images = self.vae.decode(latents / config.scaling_factor + config.shift_factor).sample / 2 + 0.5
        pixels = self.reward.preprocess(images.clamp(0, 1))
        features = self.clip.get_image_features(pixel_values=pixels).pooler_output
        prompts = self.reward.embed_prompts(self.prompts).to(self.dtype)
        return (normalize(features, dim=-1) * prompts).sum(-1)

    @property
    def prompts(self) -> list[str]:
        own = getattr(self.config, self.config.algorithm)
        return [f"bold. {text}" for text in self.texts] if own.control else self.texts

    def gradients(self) -> list[Tensor]:
        return [parameter.grad.double() for parameter in self.transformer.parameters()]

    # --- the algorithms ------------------------------------------------------------------------

    def direct_align(self) -> None:
        x0, objective = self.rolled_out(3), self.config.srpo
        denoise, _ = branches(objective, draw_timestep(objective, generator(0, 0, 0, "timestep/0/0")))
        start, end = denoise.sigma_from, denoise.sigma_to
        x = (1 - start) * x0 + start * self.noise
        x = x + (end - start) * self.velocity(x, start)
        scores = self.score((x - end * self.noise) / (1 - end))
        torch.relu(0.76 - scores).mean().backward()

    def refl(self) -> None:
        late = int(torch.randint(1, 3, (), generator=generator(0, 0, 0, "late/0")))
        x = self.rolled_out(late)
        x0 = x - self.sigmas[late] * self.velocity(x, self.sigmas[late])
        (1e-3 * (2 - self.score(x0)).mean()).backward()

    def draft(self) -> None:
        own = self.config.draft
        x = self.rolled_out(3 - own.k)
        for step in range(3 - own.k, 3):
            x = x + (self.sigmas[step + 1] - self.sigmas[step]) * self.velocity(x, self.sigmas[step])
        terms, level = [self.score(x).mean()], self.sigmas[2]
        for number in range(1, own.lv + 1):
            noise = self.batches._flux.noise(2, 32, 32, generator(0, 0, 0, f"lv/0/{number}")).to(self.dtype)
            again = (1 - level) * x.detach() + level * noise
            terms.append(self.score(again - level * self.velocity(again, level)).mean())
        (-sum(terms) / len(terms)).backward()

    def log_probability(self, x: Tensor, following: Tensor, step: int) -> Tensor:
        velocity, sigma = self.velocity(x, self.sigmas[step]), self.sigmas[step]
        change = self.sigmas[step + 1] - sigma
        score = -(x - (1 - sigma) * (x - sigma * velocity)) / sigma**2
        mean = x + (velocity - 0.3**2 / 2 * score) * change
        return torch.distributions.Normal(mean, 0.3 * (-change) ** 0.5).log_prob(following).mean((1, 2))

    def roll_out(self) -> None:
        """Four images of each prompt, from one noise, by the SDE."""
        self.states, self.rewards, self.old = [], [], []
        with torch.no_grad():
            for image in range(4):
                random, states, old = generator(0, 0, 0, f"sde/0/{image}"), [self.noise], []
                for step in range(2):
                    x, sigma, change = states[-1], self.sigmas[step], self.sigmas[step + 1] - self.sigmas[step]
                    velocity = self.velocity(x, sigma)
                    score = -(x - (1 - sigma) * (x - sigma * velocity)) / sigma**2
                    noise = self.batches._flux.noise(2, 32, 32, random).to(self.dtype)
                    states.append(x + (velocity - 0.3**2 / 2 * score) * change + 0.3 * (-change) ** 0.5 * noise)
                    old.append(self.log_probability(x, states[-1], step))
                self.rewards.append(self.score(states[2] - self.sigmas[2] * self.velocity(states[2], self.sigmas[2])))
                self.states.append(states)
                self.old.append(old)

    def dancegrpo(self, part: int = 0) -> None:
        if part == 0:
            self.roll_out()
        rewards, total = torch.stack(self.rewards), 0.0
        for image in (2 * part, 2 * part + 1):
            advantage = (rewards[image] - rewards.mean(0)) / rewards.std(0)
            # Of two transitions, a fraction of 0.6 is one: each row its own.
            order = torch.rand(2, 2, generator=generator(0, 0, 0, f"steps/0/{image}")).argsort(1)[:, 0].tolist()
            for row, step in enumerate(order):
                states = self.states[image]
                new = self.log_probability(states[step], states[step + 1], step)[row]
                ratio = (new - self.old[image][step][row]).exp()
                clipped = ratio.clamp(0.98, 1.02)
                total = total - torch.minimum(advantage[row] * ratio, advantage[row] * clipped) / 4
        total.backward()


def check(found: list[Tensor], single: Plain, double: Plain) -> None:
    """`found` is as near to float64 as the same formulas in fp32 are, give or take the order of additions."""
    near, wanted, mine = (
        torch.cat([g.flatten().double() for g in each]) for each in (single.gradients(), double.gradients(), found)
    )
    assert wanted.norm() > 0
    budget = (near - wanted).norm()
    assert budget < 1e-3 * wanted.norm(), "otherwise nothing could fail"
    assert (mine - wanted).norm() < 2 * budget + torch.finfo(torch.float32).eps * wanted.norm()


@pytest.mark.parametrize(
    ("algorithm", "overrides"),
    [
        ("direct_align", ["direct_align.threshold=0.76"]),
        ("direct_align", ["direct_align.threshold=0.76", "direct_align.control=true", "model.checkpointing=block"]),
        ("refl", ["refl.late=0.67"]),
        ("refl", ["refl.late=0.67", "refl.control=true"]),
        ("draft", ["draft.k=2"]),
        ("draft", ["draft.k=3", "model.checkpointing=block"]),
        ("draft", ["draft.lv=2"]),
        ("dancegrpo", [*GRPO]),
    ],
    ids=lambda value: value if isinstance(value, str) else "-".join(value),
)
def test_gradient(algorithm: str, overrides: list[str], tmp_path: Path) -> None:
    trainer = Trainer(quick_config(tmp_path, *SMALL, f"algorithm={algorithm}", *overrides))
    plain = [Plain(trainer, dtype) for dtype in (torch.float32, torch.float64)]
    for each in plain:
        getattr(each, algorithm)()
    trainer.update.accumulate(0, lambda: None, Seconds(torch.device("cpu")))
    check([parameter.grad for parameter in trainer.parameters], *plain)


def test_second_optimizer_step_compares_with_the_old_policy(tmp_path: Path) -> None:
    trainer = Trainer(quick_config(tmp_path, *SMALL, "algorithm=dancegrpo", *GRPO))
    plain = [Plain(trainer, dtype) for dtype in (torch.float32, torch.float64)]
    trainer.update.accumulate(0, lambda: None, Seconds(torch.device("cpu")))
    for each in plain:
        each.dancegrpo()
    models: list[Any] = [trainer.flux.transformer, *(each.transformer for each in plain)]
    for model in models:
        random = torch.Generator().manual_seed(0)
        for parameter in model.parameters():
            parameter.grad = None
            parameter.data += (0.003 * torch.randn(parameter.shape, generator=random)).to(parameter.dtype)

    def forbidden() -> None:
        raise AssertionError("weights have changed: the update must be finished")

    trainer.update.accumulate(0, forbidden, Seconds(torch.device("cpu")), 1)
    for each in plain:
        each.dancegrpo(1)
    ratios = [
        (each.log_probability(s[0], s[1], 0) - old[0]).exp()
        for each in plain[1:]
        for s, old in zip(each.states, each.old, strict=True)
    ]
    moved = (torch.cat(ratios) - 1).abs()
    assert (moved > 1e-4).all()
    check([parameter.grad for parameter in trainer.parameters], *plain)
