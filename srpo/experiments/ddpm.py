"""Direct-Align and SRPO on a model of another kind: one that predicts the noise of a DDPM schedule."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path
from statistics import mean

import torch
from torch import Tensor

from srpo import page
from srpo.assets import TINY, resolve_asset
from srpo.config import load_config
from srpo.errors import InputError
from srpo.experiments.arms import Arm, trained
from srpo.experiments.experiment import Conclusion, Experiment, Row, Setting, measured
from srpo.experiments.looks import gained, last, surely
from srpo.experiments.recovery import ALIGNED, PREDICTION, STEPS
from srpo.experiments.witness import compared_digits, judge
from srpo.images import panels
from srpo.objective import Branch, SRPOConfig, branches, draw_timestep, srpo_loss
from srpo.randomness import generator
from srpo.rewards import Reward, load_reward
from srpo.tiny import ATTRIBUTES
from srpo.tiny.digits import NAMES, SIZE, caption, load
from srpo.tiny.epsilon import EpsilonModel
from srpo.tiny.models import CHANNELS
from srpo_kernels import inject_noise, recover
from srpo_kernels.optim import AdamW

__all__ = ["DDPM", "nearest", "translated"]

SHARES = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)  # of noise in an image: sigma / (alpha + sigma)
WORDS = ATTRIBUTES["stroke"]
#: Noise-predicting models and their rates, in the recipe's, which was made for the rectified flow.
RATES = {"epsilon": 1.0, "epsilon at a third of the rate": 1 / 3}
FLOW = "rectified flow"
MODELS = (*RATES, FLOW)
_IMAGES, _SHOWN, _DIGITS = 100, 20, 32
_SHAPE = (CHANNELS, SIZE // 4, SIZE // 4)


class DDPM(Experiment):
    """What `recovery` and the tiny recipe's training come to with a noise-predicting UNet."""

    name = "ddpm"
    claim = (
        "Direct-Align and relative rewards are measured on a rectified flow, FLUX.1-dev (arXiv 2509.06942), and on no "
        "model that predicts the noise of a DDPM schedule."
    )
    seeds = (3, 2)

    def measure(self, setting: Setting, out: Path, say: Callable[[str], None]) -> Iterator[Row]:
        config = load_config(setting.recipe, setting.overrides)
        if config.model.path != TINY:
            raise InputError("experiment ddpm needs the tiny world (--recipe tiny): it has a noise-predicting model")
        model = EpsilonModel.load(resolve_asset(TINY, "epsilon"), resolve_asset(TINY, "pipeline"))
        for seed in range(setting.seeds):
            yield from _recovered(model, seed)
        reward = load_reward(config.reward, config.srpo, device="cpu", dtype=torch.float32)
        strip: dict[str, Tensor] = {}
        words = WORDS[:1] if setting.quick else WORDS
        for (name, rate), word, seed in product(RATES.items(), words, range(setting.seeds)):
            recipe = replace(config.srpo, learning_rate=config.srpo.learning_rate * rate)
            tuned = replace(model, unet=copy.deepcopy(model.unet))
            first = None
            for update in (0, recipe.updates):
                if update:
                    train(tuned, recipe, reward, (word, WORDS[word == WORDS[0]]), seed)
                found, images = _look(tuned, seed)
                first = first or found
                strip.setdefault(_arm(name, word) if update else "before", images[:_SHOWN])
                row = {"arm": _arm(name, word), "seed": seed, "update": update}
                yield row | found | compared_digits(found, first, "stroke", 1 if word == WORDS[0] else -1)
            say(f"{_arm(name, word)}, seed {seed}: {recipe.updates} updates")
        panels(list(strip.items()), 10, stacked=True).save(out / f"{self.name}.png")
        yield from trained(
            [Arm(_arm(FLOW, word), (f"data.control_group={word}",)) for word in words], setting, out, say
        )

    def table(self, rows: Sequence[Row]) -> tuple[list[str], list[list[str]]]:
        header = ["share of noise", *(f"{name}: PSNR, dB" for name in STEPS)]
        return header, [[f"{share:g}", *(measured(_psnr(rows, name, share)) for name in STEPS)] for share in SHARES]

    def curves(self, rows: Sequence[Row]) -> list[str]:
        series = {name: (SHARES, [mean(_psnr(rows, name, share)) for share in SHARES]) for name in STEPS}
        return [page.curves("PSNR, dB", "sigma / (alpha + sigma)", series)]

    def conclusions(self, rows: Sequence[Row]) -> list[Conclusion]:
        arms = {row["arm"] for row in rows}
        moves = [_moved(rows, model, word) for word in WORDS for model in MODELS if _arm(model, word) in arms]
        return [*(_gain(rows, name) for name in ALIGNED), *moves]


def nearest(model: EpsilonModel, share: float) -> int:
    """The timestep at which noise has this share, ``sigma / (alpha + sigma)``, of an image; -1, the clean image, for 0.

    In rectified flow the share is sigma: equal shares are equal ratios of signal to noise.
    """
    alpha, sigma = model.levels(torch.arange(-1, len(model.scheduler.alphas_cumprod)))
    return int((sigma / (alpha + sigma) - share).abs().argmin()) - 1


def translated(model: EpsilonModel, branch: Branch) -> tuple[Branch, int]:
    """A branch of a rectified flow at the timesteps of equal noise shares, and the timestep it starts from."""
    timesteps = torch.tensor([nearest(model, branch.sigma_from), nearest(model, branch.sigma_to)])
    (alpha_from, alpha_to), (sigma_from, sigma_to) = (levels.tolist() for levels in model.levels(timesteps))
    levels = dict(sigma_from=sigma_from, sigma_to=sigma_to, alpha_from=alpha_from, alpha_to=alpha_to)
    return replace(branch, **levels), int(timesteps[0])


def train(model: EpsilonModel, config: SRPOConfig, reward: Reward, controls: tuple[str, str], seed: int) -> None:
    """All updates of an SRPO recipe, online, as `srpo.trainer` has them, on a noise-predicting model."""
    model.unet.requires_grad_(True)
    optimizer = AdamW(
        model.unet.parameters(),
        config.learning_rate,
        config.betas,
        config.eps,
        config.weight_decay,
        weights="fp32",
        moments="fp32",
        max_grad_norm=config.max_grad_norm,
    )
    captions = [caption(index % len(NAMES)) for index in range(config.batch_size)]
    states = model.encode(captions)
    for step in range(config.updates):
        noise = torch.randn(len(captions), *_SHAPE, generator=generator(seed, step, 0, "ddpm noise"))
        x0 = model.sample(noise, states, config.rollout_steps)
        drawn = branches(config, draw_timestep(config, generator(seed, step, 0, "ddpm timestep")))
        taken, starts = zip(*(translated(model, branch) for branch in drawn), strict=True)
        timesteps = torch.tensor(starts).repeat_interleave(len(captions))

        def predict(x_t: Tensor, _sigma: Tensor, timesteps: Tensor = timesteps) -> Tensor:
            return model.predict(x_t, timesteps, states.repeat(len(x_t) // len(states), 1, 1))

        output = srpo_loss(
            x0,
            noise,
            captions,
            controls=controls,
            branches=taken,
            velocity=predict,
            decode=model.decode,
            reward=reward,
            threshold=config.threshold,
            prediction="epsilon",
        )
        optimizer.zero_grad()
        output.loss.backward()
        optimizer.step()


def _recovered(model: EpsilonModel, seed: int) -> Iterator[Row]:
    """How near to real digits each method comes."""
    data = load(seed=seed, copies=1)
    wanted, labels = data.images[:_DIGITS], data.labels[:_DIGITS]
    x0 = model.encode_images(wanted)
    wanted = model.decode(x0)
    noise = torch.randn(x0.shape, generator=generator(seed, 0, 0, "ddpm recovery"))
    states = model.encode([caption(label) for label in labels.tolist()])
    for share in SHARES:
        start = torch.tensor(nearest(model, share))
        alpha, sigma = model.levels(start)
        x_t = inject_noise(x0, noise, float(sigma), alpha=float(alpha))
        with torch.no_grad():
            predicted = model.predict(x_t, start.expand(len(x_t)), states)
        for name, step in STEPS.items():
            alpha_to, sigma_to = model.levels(torch.tensor(nearest(model, max(0.0, share - step))))
            again = recover(
                x_t,
                noise,
                predicted,
                float(sigma),
                float(sigma_to),
                alpha_from=float(alpha),
                alpha_to=float(alpha_to),
                prediction="epsilon",
            )
            again = model.decode(again)
            decibels = -10 * (again - wanted).square().flatten(1).mean(1).clamp(min=1e-10).log10()
            yield {"arm": name, "seed": seed, "share": share, "psnr": decibels.mean().item()}


def _look(model: EpsilonModel, seed: int) -> tuple[dict[str, float], Tensor]:
    images, labels = model.pictures(_IMAGES, seed=seed)
    return judge().measure(images, labels), images


def _arm(model: str, word: str) -> str:
    return f"{model}, {word}"


def _psnr(rows: Sequence[Row], name: str, share: float) -> list[float]:
    """One value a seed."""
    return [row["psnr"] for row in rows if row["arm"] == name and row["share"] == share]


def _gain(rows: Sequence[Row], name: str) -> Conclusion:
    """What a method is nearer by, seed by seed, at the shares above its step: below, both are the same."""
    gains = {
        share: [a - b for a, b in zip(_psnr(rows, name, share), _psnr(rows, PREDICTION, share), strict=True)]
        for share in SHARES
        if share > STEPS[name]
    }
    nearer = [share for share, values in gains.items() if surely(values) > 0]
    text = (
        f"{name} is nearer to the clean image than the {PREDICTION} at {len(nearer)} of {len(gains)} noise levels: by "
        f"{measured(gains[min(gains)])} dB at a noise share of {min(gains):g} and {measured(gains[max(gains)])} dB at "
        f"{max(gains):g}."
    )
    return Conclusion(text, None)


def _moved(rows: Sequence[Row], model: str, word: str) -> Conclusion:
    arm = _arm(model, word)
    moved = last(rows, arm, "moved")
    after = last(rows, arm, "kept")
    before = [end - more for end, more in zip(after, gained(rows, arm, "kept"), strict=True)]
    verdict = {1: "move strokes towards", 0: "do not surely move strokes towards", -1: "move strokes away from"}
    text = (
        f"{model}: the recipe's updates {verdict[surely(moved)]} {word}, by {measured(moved)} SD; accuracy "
        f"{measured(before, 3)} before and {measured(after, 3)} after, diversity "
        f"{measured(last(rows, arm, 'diverse'))} of what it was ({len(moved)} seeds)."
    )
    return Conclusion(text, None)
