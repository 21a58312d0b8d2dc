"""What low precision does to SRPO: velocities, rollouts, rewards, gradients and training, against fp32.

    python -m benchmarks.precision [--json PATH] [--quick]

On the tiny model, and on a stack of blocks of FLUX.1-dev's width with random weights. Without a GPU, e4m3 is emulated
exactly. `--quick` leaves out the trainings.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from diffusers import FluxTransformer2DModel
from torch import Tensor

from srpo.assets import TINY, resolve_asset
from srpo.config import TrainConfig, load_config
from srpo.latents import image_ids
from srpo.models import Flux
from srpo.objective import branches, srpo_loss
from srpo.precision import Precision
from srpo.randomness import generator
from srpo.rewards import load_reward
from srpo.sampling import rollout, sample_images
from srpo.tiny.digits import NAMES
from srpo.tiny.judge import Judge
from srpo.trainer import Trainer
from srpo_kernels import Float8Rollout, convert_to_float8

__all__ = ["compare", "shifts", "tiny_rows", "wide_rows"]

#: FLUX embeds 1000 times these, and times the guidance, in the compute dtype: values that bf16 rounds to those of fp32,
#: or the error of that rounding, which has nothing to do with the layers, would drown every other.
SIGMAS = (1.0, 0.896, 0.704, 0.496, 0.304, 0.1, 0.05)
GUIDANCE = 3.584
LOW: tuple[Precision, ...] = ("bf16", "fp8")
_IMAGES = 20


def compare(actual: Tensor, exact: Tensor) -> dict[str, float]:
    """Cosine, and error relative to the norm of `exact`."""
    actual, exact = actual.double().flatten(), exact.double().flatten()
    return {
        "cosine": torch.cosine_similarity(actual, exact, 0).item(),
        "error": ((actual - exact).norm() / exact.norm()).item(),
    }


def tiny_rows() -> Iterator[dict[str, Any]]:
    """Quantities of the tiny model in every low precision against fp32."""
    config = load_config("tiny")
    exact = _Tiny(config, "fp32")
    x0 = exact.rollout()
    known = exact.quantities(x0)
    for precision in LOW:
        for name, value in _Tiny(config, precision).quantities(x0).items():
            yield {"model": "tiny", "quantity": name, "precision": precision, **compare(value, known[name])}


class _Tiny:
    """The tiny model in one precision, with the noise, prompts and timestep that all precisions share."""

    def __init__(self, config: TrainConfig, precision: Precision) -> None:
        self.config, self.size = config, (config.srpo.height, config.srpo.width)
        stored: Any = "fp32" if precision == "fp32" else "bf16"
        self.flux = Flux.load(
            resolve_asset(TINY, "pipeline"),
            precision=precision,
            max_sequence_length=config.model.max_sequence_length,
            trainable=True,
            weights=stored,
        )
        self.flux.patch("auto")
        self.reward = load_reward(config.reward, config.srpo, device=torch.device("cpu"), dtype=self.flux.vae.dtype)
        self.captions = [f"digit {NAMES[index % len(NAMES)]}" for index in range(_IMAGES)]
        self.noise = self.flux.noise(_IMAGES, *self.size, generator(0, 0, 0, "precision"))

    def rollout(self) -> Tensor:
        objective = self.config.srpo
        return rollout(
            self.flux,
            self.noise,
            self.captions,
            size=self.size,
            steps=objective.rollout_steps,
            shift=objective.shift,
            guidance=objective.rollout_guidance,
            quantized=True,
        )

    def quantities(self, x0: Tensor) -> dict[str, Tensor]:
        """Velocities at points between `x0` and the noise, the rollout's latents, its scores, the loss's gradient."""
        conditioning = self.flux.encode_prompts(self.captions)
        velocity = self.flux.trajectory(SIGMAS, conditioning, GUIDANCE, self.size, quantized=True)
        found = {
            f"velocity at sigma {sigma}": velocity(x0.lerp(self.noise, sigma), step)
            for step, sigma in enumerate(SIGMAS)
        }
        latents = self.rollout()
        found["rollout latents"] = latents
        with torch.no_grad():
            scores = self.reward.score(self.flux.decode_packed(latents, self.size), self.captions)
        found["reward"] = scores.float()
        found["gradient"] = self._gradient(x0)
        return found

    def _gradient(self, x0: Tensor) -> Tensor:
        objective, flux = self.config.srpo, self.flux
        pair = branches(objective, objective.timesteps // 2)
        conditioning = flux.encode_prompts(self.captions).repeat(len(pair))
        output = srpo_loss(
            x0,
            self.noise,
            self.captions,
            controls=("bold", "thin"),
            branches=pair,
            velocity=partial(flux.velocity, conditioning=conditioning, guidance=objective.guidance, size=self.size),
            decode=flux.decode,
            reward=self.reward,
            threshold=None,
            latent=flux.layout(self.size),
        )
        parameters = list(flux.transformer.parameters())
        gradients = torch.autograd.grad(output.loss, parameters, allow_unused=True)
        return torch.cat([g.float().flatten() for g in gradients if g is not None])


def wide_rows(*, singles: int = 1, side: int = 8, text: int = 8, **changes: Any) -> Iterator[dict[str, Any]]:
    """Velocity and parameter gradient of one double and some single blocks as wide as FLUX.1-dev's."""
    torch.manual_seed(0)
    model = FluxTransformer2DModel(num_layers=1, num_single_layers=singles, guidance_embeds=True, **changes)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    width = model.config
    inputs: dict[str, Any] = dict(
        hidden_states=torch.randn(1, (side // 2) ** 2, width.in_channels),
        encoder_hidden_states=torch.randn(1, text, width.joint_attention_dim),
        pooled_projections=torch.randn(1, width.pooled_projection_dim),
        img_ids=image_ids(side, side),
        txt_ids=torch.zeros(text, 3),
        guidance=torch.full((1,), GUIDANCE),
        return_dict=False,
    )
    upstream = torch.randn(1, (side // 2) ** 2, width.in_channels)

    def run(view: Any, dtype: torch.dtype, sigma: float) -> Tensor:
        cast = {name: x.to(dtype) if name.endswith(("states", "projections")) else x for name, x in inputs.items()}
        return view(timestep=torch.full((1,), sigma), **cast)[0].float()

    def gradient(dtype: torch.dtype) -> Tensor:
        model.zero_grad()
        run(model, dtype, 0.496).backward(upstream)
        return torch.cat([x.grad.float().flatten() for x in model.single_transformer_blocks.parameters()])

    with torch.no_grad():
        exact = {sigma: run(model, torch.float32, sigma) for sigma in SIGMAS}
    exact_gradient = gradient(torch.float32)
    model.bfloat16()
    quantized = Float8Rollout(model)
    for precision, view in (("bf16", model), ("fp8", quantized)):
        for sigma in SIGMAS:
            with torch.no_grad():
                found = run(view, torch.bfloat16, sigma)
            yield _wide(f"velocity at sigma {sigma}", precision, found, exact[sigma])
        if precision == "fp8":
            convert_to_float8(model)
        yield _wide("gradient", precision, gradient(torch.bfloat16), exact_gradient)


def _wide(quantity: str, precision: str, actual: Tensor, exact: Tensor) -> dict[str, Any]:
    return {"model": "FLUX width", "quantity": quantity, "precision": precision, **compare(actual, exact)}


def shifts(precisions: Sequence[Precision], seeds: Sequence[int], control: str = "bold") -> Iterator[dict[str, Any]]:
    """The demo's training in some precisions and seeds: the attribute's shift in SD and the class accuracy after it."""
    judge = Judge.load()
    attribute = {"bold": "stroke", "thin": "stroke", "red": "colour", "blue": "colour"}[control]
    for precision in precisions:
        for seed in seeds:
            with tempfile.TemporaryDirectory() as directory:
                config = load_config("tiny", [f"data.control_group={control}", f"model.precision={precision}"])
                run = replace(config.run, dir=str(Path(directory) / "run"), seed=seed, sample_every=0, save_every=100)
                trainer = Trainer(replace(config, run=run))
                before = _measure(judge, config, trainer.flux)
                if trainer.fit() < config.srpo.updates:
                    raise SystemExit("stopped by a signal")
                after = _measure(judge, config, trainer.flux)
            shift = after[attribute] - before[attribute]
            yield {"precision": precision, "seed": seed, "shift": shift, "accuracy": after["accuracy"]}


def _measure(judge: Judge, config: TrainConfig, flux: Flux, count: int = 100) -> dict[str, float]:
    objective, size = config.srpo, (config.srpo.height, config.srpo.width)
    labels = torch.arange(count) % len(NAMES)
    images = sample_images(
        flux,
        flux.noise(count, *size, generator(0, 0, 0, "evaluation")),
        [f"digit {NAMES[label]}" for label in labels.tolist()],
        size=size,
        steps=config.run.sample_steps,
        shift=objective.shift,
        guidance=objective.guidance,
    )
    return judge.measure(images, labels)


def main() -> None:
    """Print the tables, and write them."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.precision", description=__doc__)
    parser.add_argument("--json", type=Path, help="also write the rows to this file")
    parser.add_argument("--quick", action="store_true", help="leave out the trainings")
    options = parser.parse_args()
    torch.set_num_threads(1)
    report: dict[str, list[dict[str, Any]]] = {"quantities": [], "training": []}
    for row in (*tiny_rows(), *wide_rows()):
        report["quantities"].append(row)
        print(f"{row['model']:10} {row['precision']:5} {row['quantity']:22} cosine {row['cosine']:.6f}", end=" ")
        print(f"error {row['error']:.4f}", flush=True)
    for row in () if options.quick else shifts(("bf16", "fp8-rollout", "fp8"), (0, 1, 2)):
        report["training"].append(row)
        print(f"trained in {row['precision']:11} seed {row['seed']}: {row['shift']:+.2f} SD", end=" ")
        print(f"accuracy {row['accuracy']:.3f}", flush=True)
    if options.json is not None:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
