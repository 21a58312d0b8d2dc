"""How near to a clean image one model call comes: Direct-Align's recovery against the prediction of x0."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from statistics import mean

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from srpo import page
from srpo.assets import TINY, resolve_asset
from srpo.batches import CleanBatch, CleanBatches
from srpo.config import TrainConfig, load_config
from srpo.distributed import Ranks
from srpo.experiments.experiment import Conclusion, Experiment, Row, Setting, interval, measured
from srpo.images import panels
from srpo.model_directory import check_model_directory
from srpo.models import Flux
from srpo.precision import compute_dtype
from srpo.rewards import load_reward
from srpo.rewards.cosine import CosineReward
from srpo.sources import Sources
from srpo.tiny.digits import export_images
from srpo_kernels import inject_noise, recover

__all__ = ["ALIGNED", "PREDICTION", "STEPS", "Recovery"]

SIGMAS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95)
#: Steps of Direct-Align: of the whole noise level, it predicts x0; the official recipe's is 0.021.
STEPS: dict[str, float] = {
    "prediction of x0": 1.0,
    "Direct-Align, step 0.3": 0.3,
    "Direct-Align, step 0.1": 0.1,
    "Direct-Align, step 0.02": 0.02,
}
PREDICTION, *ALIGNED = STEPS
_SHOWN = 2  # images in the picture


class Recovery(Experiment):
    """Noise at level sigma is put into clean images; one model call later, how much of them is back?"""

    name = "recovery"
    claim = (
        "with the injected noise known, one step recovers a clean image even from high noise, where the prediction "
        "of x0 is blurred (arXiv 2509.06942, section 3.1)."
    )
    seeds = (5, 2)

    @torch.no_grad()
    def measure(self, setting: Setting, out: Path, say: Callable[[str], None]) -> Iterator[Row]:
        config = _config(setting, out)
        model = check_model_directory(resolve_asset(config.model.path, "pipeline"), _size(config))
        ranks, dtype = Ranks.join(config.run.device), compute_dtype(config.model.precision)
        sources = Sources(config, model)
        reward = load_reward(config.reward, config.srpo, device=ranks.device, dtype=dtype)
        flux = Flux.load(
            model,
            device=ranks.device,
            precision=config.model.precision,
            max_sequence_length=config.model.max_sequence_length,
            text_cache=config.model.text_cache,
        )
        flux.patch(config.model.kernels)
        batches = CleanBatches(config, ranks, flux, reward, sources)
        strip: dict[str, list[Tensor]] = {}
        for seed in range(setting.seeds):
            found: dict[tuple[float, str], list[tuple[float, float | None]]] = {}
            for index in range(batches.count):
                batch = batches.load(seed, index, lambda: None)
                images = flux.decode_packed(batch.x0, batches.size)
                for sigma in SIGMAS:
                    for name, again in _recovered(flux, batch, sigma, config).items():
                        errors = _errors(again, images, reward if isinstance(reward, CosineReward) else None)
                        found.setdefault((sigma, name), []).extend(errors)
                        if seed == index == 0:
                            strip.setdefault(name, []).append(again[:_SHOWN])
            say(f"seed {seed}")
            for (sigma, name), errors in found.items():
                decibels, distances = zip(*errors, strict=True)
                distance = None if None in distances else mean(distances)
                yield {"seed": seed, "sigma": sigma, "method": name, "psnr": mean(decibels), "distance": distance}
        titled = [(name, torch.stack(parts, 1).flatten(0, 1)) for name, parts in strip.items()]
        panels(titled, len(SIGMAS), stacked=True).save(out / f"{self.name}.png")

    def table(self, rows: Sequence[Row]) -> tuple[list[str], list[list[str]]]:
        header = ["sigma", *(f"{name}: PSNR, dB" for name in STEPS)]
        return header, [[f"{sigma:g}", *(measured(_of(rows, name, sigma)) for name in STEPS)] for sigma in SIGMAS]

    def curves(self, rows: Sequence[Row]) -> list[str]:
        figures = [page.curves("PSNR, dB", "sigma", _series(rows, "psnr"))]
        if all(row["distance"] is not None for row in rows):
            title = "1 - cosine of the reward's image embeddings"
            figures.append(page.curves(title, "sigma", _series(rows, "distance")))
        return figures

    def conclusions(self, rows: Sequence[Row]) -> list[Conclusion]:
        return [self._gain(rows, name) for name in ALIGNED]

    def _gain(self, rows: Sequence[Row], name: str) -> Conclusion:
        """What a method is nearer by, seed by seed, at the levels above its step: below, both are the same."""
        gains = {
            sigma: [a - b for a, b in zip(_of(rows, name, sigma), _of(rows, PREDICTION, sigma), strict=True)]
            for sigma in SIGMAS
            if sigma > STEPS[name]
        }
        nearer = [sigma for sigma, values in gains.items() if interval(values)[0] > interval(values)[1]]
        first, last = min(gains), max(gains)
        text = (
            f"{name} is nearer to the clean image than the {PREDICTION} at {len(nearer)} of {len(gains)} noise levels: "
            f"by {measured(gains[first])} dB at sigma {first:g} and {measured(gains[last])} dB at {last:g} "
            f"({len(gains[first])} seeds, 95 % intervals)."
        )
        return Conclusion(text, len(nearer) == len(gains))


def _config(setting: Setting, out: Path) -> TrainConfig:
    """The recipe with a noise for each image; on the tiny world, with real digits."""
    overrides = ["srpo.noise=independent", *setting.overrides]
    config = load_config(setting.recipe, overrides)
    if config.model.path != TINY or config.data.mode != "online":
        return config
    export_images(out / "images", config.srpo.batch_size * setting.seeds, 0)
    return load_config(
        setting.recipe, [*overrides, "data.mode=offline", f"data.images={json.dumps(str(out / 'images'))}"]
    )


def _size(config: TrainConfig) -> tuple[int, int]:
    return config.srpo.height, config.srpo.width


def _recovered(flux: Flux, batch: CleanBatch, sigma: float, config: TrainConfig) -> dict[str, Tensor]:
    """Images [B, 3, H, W] that each method makes of a clean batch with noise of one level in it."""
    x0, noise, captions, _ = batch
    x_t = inject_noise(x0, noise, sigma)
    conditioning = flux.encode_prompts([caption.text for caption in captions])
    levels = torch.full((len(x0),), sigma, device=x0.device)
    velocity = flux.velocity(x_t, levels, conditioning, config.srpo.guidance, _size(config))
    found = {}
    for name, step in STEPS.items():
        again = recover(x_t, noise, velocity, sigma, max(0.0, sigma - step))
        found[name] = flux.decode_packed(again, _size(config))
    return found


def _errors(found: Tensor, wanted: Tensor, reward: CosineReward | None) -> list[tuple[float, float | None]]:
    """Of each image the PSNR in dB, and the distance between embeddings."""
    decibels = -10 * (found - wanted).square().flatten(1).mean(1).clamp(min=1e-10).log10()
    if reward is None:
        return [(value, None) for value in decibels.tolist()]
    distances = 1 - cosine_similarity(reward.embed_images(found), reward.embed_images(wanted))
    return list(zip(decibels.tolist(), distances.tolist(), strict=True))


def _of(rows: Sequence[Row], name: str, sigma: float, key: str = "psnr") -> list[float]:
    """One value a seed."""
    return [row[key] for row in rows if row["method"] == name and row["sigma"] == sigma]


def _series(rows: Sequence[Row], key: str) -> dict[str, tuple[Sequence[float], Sequence[float]]]:
    return {name: (SIGMAS, [mean(_of(rows, name, sigma, key)) for sigma in SIGMAS]) for name in STEPS}
