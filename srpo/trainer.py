"""The training loop: clean batches, SRPO gradients, optimizer steps, checkpoints that resume bitwise."""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from pathlib import Path

import torch
from torch import Tensor

from srpo.assets import resolve_asset
from srpo.checkpoint import Checkpoints, load_optimizer_tensors, optimizer_tensors
from srpo.config import TrainConfig, dump_config
from srpo.data import BadImageError, CaptionedImage
from srpo.distributed import Ranks
from srpo.errors import InputError
from srpo.images import save_grid
from srpo.models import Flux, check_model_directory, compute_dtype
from srpo.objective import branches, draw_timestep, srpo_loss, with_control
from srpo.optimizer import load_optimizer, set_gradient_dtype, take_step
from srpo.prompts import Prompt
from srpo.randomness import generator
from srpo.rewards import Reward, load_reward
from srpo.rundir import updates_done, write_bad_images, write_config
from srpo.runlog import RunLog
from srpo.sampling import rollout, sample_images
from srpo.sharding import load_whole, mesh_of, whole_tensors
from srpo.signals import Stop, StopRequestedError
from srpo.sources import Sources
from srpo_kernels.checkpointing import FluxPolicy, flux_policy, free_memory

__all__ = ["NonFiniteError", "Trainer", "clean_batches"]


class NonFiniteError(RuntimeError):
    """A score or gradient is NaN or infinite; the weights have not been touched by it."""


@dataclass(frozen=True)
class _Draw:
    """One timestep draw on one clean batch. Keeps no graph once its loss has gone backward."""

    loss: Tensor
    branch_losses: Tensor  # [K]
    scores: Tensor  # [K, B]
    branches: tuple[str, ...]
    captions: list[Prompt]
    timestep: int

    def non_finite(self) -> str | None:
        """Branch and prompt of the first score that is NaN or infinite."""
        bad = (~self.scores.isfinite()).nonzero().tolist()
        if not bad:
            return None
        branch, row = bad[0]
        score = self.scores[branch, row].item()
        return f"the {self.branches[branch]} branch scored {score} for prompt {self.captions[row].text!r}"


class Trainer:
    """One SRPO run in its run directory.

    Everything the user gave is checked before weights are loaded, and weights before the run directory is touched.

    Args:
        config: the resolved recipe. resume: go on from the newest checkpoint of ``config.run.dir``.

    Raises:
        InputError: something in the recipe, or what it points to, cannot be used.
    """

    def __init__(self, config: TrainConfig, *, resume: bool = False) -> None:
        self.config = config
        objective, run = config.srpo, config.run
        self.ranks = Ranks.join(run.device)
        self.size = (objective.height, objective.width)
        self.clean_batches = clean_batches(config, self.ranks.world)
        path = resolve_asset(config.model.path, "pipeline")
        model = check_model_directory(path, self.size, text=config.model.text_cache is None)
        self.sources = Sources(config, model)
        self.directory = Path(run.dir)
        self.checkpoints = Checkpoints(self.directory / "checkpoints", run.keep)
        self.start = updates_done(self.directory, config, self.checkpoints, resume=resume)

        dtype = compute_dtype(config.model.precision)
        self.reward = load_reward(config.reward, objective, device=self.ranks.device, dtype=dtype)
        _check_threshold(config, self.reward)
        self.flux = Flux.load(
            model,
            device=self.ranks.device,
            precision=config.model.precision,
            max_sequence_length=config.model.max_sequence_length,
            trainable=True,
            weights=config.optimizer.model_weights(config.model.precision),
            text_cache=config.model.text_cache,
        )
        self._prepare_texts()
        self.flux.patch(config.model.kernels)
        backwards = self.clean_batches * run.draws_per_rollout
        set_gradient_dtype(config.optimizer, self.flux.transformer.parameters(), backwards)
        self.sharded = run.sharding != "none" and self.ranks.world > 1
        if self.sharded:
            self.flux.shard(mesh_of(self.ranks.world, self.ranks.device, run.shard_size))
        self.policy = self._checkpointing_policy()
        named = dict(self.flux.transformer.named_parameters())
        self.names, self.parameters = list(named), list(named.values())
        self.optimizer = load_optimizer(
            config.optimizer,
            objective,
            self.parameters,
            precision=config.model.precision,
            seed=run.seed,
        )
        if self.start:
            weights, state = self.checkpoints.load(self.start)
            load_whole(self.flux.transformer, weights)
            load_optimizer_tensors(self.optimizer, self.names, state)
        if self.ranks.is_main:
            write_config(self.directory, config)
            write_bad_images(self.directory, self.sources.bad_images())
            self.sources.warn()
        self.ranks.barrier()

    def _checkpointing_policy(self) -> FluxPolicy:
        """What the transformer keeps for backward; "auto" leaves room for gradients and optimizer states."""
        config, flux = self.config, self.flux
        height, width = flux.latent_size(*self.size)
        free = None
        if config.model.checkpointing == "auto":
            reserved = config.optimizer.reserved_bytes(list(flux.transformer.parameters()), config.model.precision)
            ranks = (config.run.shard_size or self.ranks.world) if self.sharded else 1
            free = max(0, free_memory(flux.device) - reserved // ranks)
        return flux_policy(
            flux.transformer,
            config.model.checkpointing,
            batch=2 * config.run.micro_batch,  # both branches go through the model together
            tokens=height * width // 4 + config.model.max_sequence_length,
            dtype=compute_dtype(config.model.precision),
            free=free,
        )

    def fit(self, on_update: Callable[[int], None] | None = None) -> int:
        """Train to the last update and return the number of updates done.

        SIGINT or SIGTERM saves a checkpoint and returns early. `on_update` is called after each update with its
        1-based number.

        Raises:
            NonFiniteError: a score or gradient is not finite. SaveError: a checkpoint could not be written.
        """
        run, total = self.config.run, self.config.srpo.updates
        step, saved = self.start, self.start
        log = (
            RunLog(self.directory, start=step, total=total, tensorboard=run.tensorboard) if self.ranks.is_main else None
        )
        try:
            with Stop() as stop:
                if log is not None:
                    kernels = self.flux.patched.report() if self.flux.patched else "off"
                    log.event("start", step=step, updates=total, kernels=kernels, checkpointing=str(self.policy))
                    log.event("data", step=step, **self.sources.record())
                if step == 0:
                    self._sample(0)
                while step < total and not self.ranks.any(stop.signal is not None):
                    try:
                        # Ranks must stop together, so only a lone one may stop within an update.
                        record = self._update(step, stop.check if self.ranks.world == 1 else lambda: None)
                    except StopRequestedError:
                        break
                    step += 1
                    if log is not None:
                        log.update(step, record)
                    if step % run.save_every == 0 or step == total:
                        saved = self._save(step)
                    if run.sample_every and (step % run.sample_every == 0 or step == total):
                        self._sample(step)
                    if on_update is not None:
                        on_update(step)
                if saved != step:
                    self._save(step)
                if log is not None:
                    log.event("stop" if stop.signal else "end", step=step, signal=stop.signal)
        finally:
            if log is not None:
                log.close()
        return step

    # --- one update -------------------------------------------------------------------------

    def _update(self, step: int, check: Callable[[], None]) -> dict:
        """Gradients of the whole batch, then one optimizer step; returns the log record."""
        count = self.config.run.draws_per_rollout
        draws: list[_Draw] = []
        seconds: dict[str, float] = {}
        self.optimizer.zero_grad(set_to_none=True)
        for index in range(self.clean_batches):
            with self._timed(seconds, "text"):
                self._embed_texts(step, self._chosen(step, index)[0])
            with self._timed(seconds, "rollout"):
                x0, noise, captions = self._clean_batch(step, index, check)
            for number in range(count):
                check()
                with self._timed(seconds, "gradient"):
                    draw = self._draw(step, f"{self._batch(index)}/{number}", x0, noise, captions)
                    (draw.loss / (self.clean_batches * count)).backward()
                draws.append(replace(draw, loss=draw.loss.detach()))
        with self._timed(seconds, "optimizer"):
            problem = next(filter(None, (draw.non_finite() for draw in draws)), None)
            if self.ranks.any(problem is not None):
                raise NonFiniteError(f"update {step + 1}: {problem or 'a score of another rank is not finite'}")
            if not self.sharded:  # FSDP2 averages them in backward
                self.ranks.average(parameter.grad for parameter in self.parameters if parameter.grad is not None)
            stepped = take_step(self.optimizer, self.config.srpo.max_grad_norm)
            if not math.isfinite(stepped["grad_norm"]):
                prompts = ", ".join(sorted({caption.text for draw in draws for caption in draw.captions}))
                raise NonFiniteError(
                    f"update {step + 1}: the gradient norm is {stepped['grad_norm']} (prompts: {prompts})"
                )
        return self._record(step, draws, stepped, seconds)

    def _batch(self, index: int) -> int:
        """Number of this rank's clean batch `index` among those of all ranks: what is drawn depends on it alone."""
        return self.ranks.rank * self.clean_batches + index

    def _chosen(self, step: int, index: int) -> tuple[list[Prompt], list[CaptionedImage]]:
        """Captions of a clean batch, and its images: none when it is a rollout's."""
        run, batch = self.config.run, self._batch(index)
        first = (step * self.ranks.world * self.clean_batches + batch) * run.micro_batch
        positions = range(first, first + run.micro_batch)
        return self.sources.at(positions, generator(run.seed, step, 0, f"mode/{batch}"))

    def _controls(self, step: int, captions: list[Prompt]) -> list[tuple[str, str]]:
        """The control words of each caption."""
        return [self.sources.controls.pair(step, caption.positive, caption.negative) for caption in captions]

    def _prepare_texts(self) -> None:
        """Have all that this rank will encode in the cache on disk, so that no text encoder stays in memory."""
        if self.flux.texts is None:
            return
        batches = product(range(self.start, self.config.srpo.updates), range(self.clean_batches))
        texts = [caption.text for batch in batches for caption in self._chosen(*batch)[0]]
        if self.ranks.is_main and self.config.run.sample_every:
            texts += self.sources.sample_prompts(self.config.run.sample_count)
        try:
            self.flux.texts.prepare(texts)
        except OSError as error:
            warnings.warn(f"text cache {self.config.model.text_cache} cannot be written: {error}", stacklevel=2)

    def _embed_texts(self, step: int, captions: list[Prompt]) -> None:
        """Have every text that a clean batch's rollout and draws ask for cached: no text tower runs in them."""
        objective = self.config.srpo
        texts = [caption.text for caption in captions]
        self.flux.encode_prompts(texts)
        if objective.form == "image_only":
            self.reward.embed_prompts(texts)
        else:
            # Each branch's positive word is the other's negative one.
            pairs = zip(texts, self._controls(step, captions), strict=True)
            self.reward.embed_prompts([with_control(word, text) for text, words in pairs for word in words])

    def _clean_batch(self, step: int, index: int, check: Callable[[], None]) -> tuple[Tensor, Tensor, list[Prompt]]:
        """Clean latents, their noise and captions: from a rollout of that noise, or from real images."""
        objective, run = self.config.srpo, self.config.run
        count = run.micro_batch
        if objective.noise == "shared":
            noise = self.flux.noise(1, *self.size, generator(run.seed, step, 0, "noise"))
        else:
            noise = self.flux.noise(count, *self.size, generator(run.seed, step, 0, f"noise/{self._batch(index)}"))

        captions, images = self._chosen(step, index)
        while images:
            latents = []
            try:
                for image in images:
                    latents.append(self.sources.image_latents(image, self.flux.encode_images).to(noise.device))
                return torch.cat(latents), noise, captions
            except BadImageError as error:  # since it was checked: the one that resuming would find in its place
                warnings.warn(f"{image.path} {error}; another image takes its place", stacklevel=2)
                self.sources.reject(image, str(error))
                captions, images = self._chosen(step, index)
        x0 = rollout(
            self.flux,
            noise.expand(count, -1, -1),
            [caption.text for caption in captions],
            size=self.size,
            steps=objective.rollout_steps,
            shift=objective.shift,
            guidance=objective.rollout_guidance,
            solver=run.rollout_solver,
            quantized=True,
            on_step=check,
        )
        return x0, noise, captions

    def _draw(self, step: int, name: str, x0: Tensor, noise: Tensor, captions: list[Prompt]) -> _Draw:
        """The loss of one timestep draw, ready for backward."""
        objective, run = self.config.srpo, self.config.run
        timestep = draw_timestep(objective, generator(run.seed, step, 0, f"timestep/{name}"))
        pair = branches(objective, timestep)
        texts = [caption.text for caption in captions]
        conditioning = self.flux.encode_prompts(texts).repeat(len(pair))
        twin = None
        if objective.form == "image_only":
            shape = (len(pair) * len(captions), 3, *self.size)
            twin = torch.randn(shape, generator=generator(run.seed, step, 0, f"twin/{name}")).to(x0.device)
            twin *= objective.twin_noise
        output = srpo_loss(
            x0,
            noise,
            texts,
            controls=self._controls(step, captions),
            branches=pair,
            velocity=partial(
                self.flux.velocity, conditioning=conditioning, guidance=objective.guidance, size=self.size
            ),
            decode=self.flux.decode,
            reward=self.reward,
            threshold=objective.threshold,
            twin_noise=twin,
            latent=self.flux.layout(self.size),
            checkpoint=self.config.model.checkpointing != "none",
            chunk=self.config.model.image_chunk,
        )
        names = tuple(branch.name for branch in pair)
        scores = output.scores.reshape(len(pair), len(captions))
        return _Draw(output.loss, output.branch_losses, scores, names, captions, timestep)

    def _record(self, step: int, draws: list[_Draw], stepped: dict[str, float], seconds: dict[str, float]) -> dict:
        """What the log keeps of an update: means over all draws and ranks."""
        names = draws[0].branches
        losses = torch.stack([draw.branch_losses for draw in draws]).mean(0)
        scores = torch.stack([draw.scores.mean(1) for draw in draws]).mean(0)
        self.ranks.average([losses, scores])
        controls = self.sources.controls.pair(step)
        own = {words for draw in draws for words in self._controls(step, draw.captions)} - {controls}
        return {
            "losses": {"total": losses.sum().item(), **dict(zip(names, losses.tolist(), strict=True))},
            "scores": dict(zip(names, scores.tolist(), strict=True)),
            **stepped,
            "timesteps": [draw.timestep for draw in draws],
            "controls": list(controls),
            **({"prompt_controls": sorted(map(list, own))} if own else {}),
            "seconds": {name: round(value, 4) for name, value in seconds.items()},
        }

    @contextmanager
    def _timed(self, seconds: dict[str, float], phase: str) -> Iterator[None]:
        """Add the time of the block, with the device's work done, to `phase`."""
        start = time.perf_counter()
        yield
        if self.ranks.device.type == "cuda":
            torch.cuda.synchronize(self.ranks.device)
        seconds[phase] = seconds.get(phase, 0.0) + time.perf_counter() - start

    # --- outputs ----------------------------------------------------------------------------

    def _save(self, step: int) -> int:
        weights = whole_tensors(self.flux.transformer.state_dict(), keep=self.ranks.is_main)
        state = whole_tensors(optimizer_tensors(self.optimizer, self.names), keep=self.ranks.is_main)
        if self.ranks.is_main:
            self.checkpoints.save(step, weights, state, dump_config(self.config))
        self.ranks.barrier()
        return step

    def _sample(self, step: int) -> None:
        """A grid of fixed prompts and fixed noise, so that grids of different steps compare."""
        if not self.config.run.sample_every:
            return
        with self.flux.whole():
            if self.ranks.is_main:
                self._write_samples(step)

    def _write_samples(self, step: int) -> None:
        run, objective = self.config.run, self.config.srpo
        prompts = self.sources.sample_prompts(run.sample_count)
        noise = self.flux.noise(len(prompts), *self.size, generator(run.seed, 0, 0, "sample"))
        images = sample_images(
            self.flux,
            noise,
            prompts,
            batch=run.micro_batch,
            size=self.size,
            steps=run.sample_steps,
            shift=objective.shift,
            guidance=objective.guidance,
        )
        save_grid(images, self.directory / f"samples/step-{step:06d}.png")


def clean_batches(config: TrainConfig, world: int) -> int:
    """Clean batches that each rank needs for one update.

    Raises `InputError` when these cannot be dealt out evenly, or the ranks not into groups that share parameters.
    """
    run = config.run
    if world > 1 and world % (run.shard_size or 1):
        raise InputError(f"run.shard_size ({run.shard_size}) must divide the number of ranks, {world}")
    share = world * run.micro_batch * run.draws_per_rollout
    if config.srpo.batch_size % share:
        raise InputError(
            f"srpo.batch_size ({config.srpo.batch_size}) must be a multiple of ranks x run.micro_batch x "
            f"run.draws_per_rollout = {world} x {run.micro_batch} x {run.draws_per_rollout} = {share}"
        )
    return config.srpo.batch_size // share


def _check_threshold(config: TrainConfig, reward: Reward) -> None:
    """A threshold outside the reward's range would make the loss always zero, or never anything but -score."""
    objective = config.srpo
    limit = max(reward.limit(kappa) for kappa in (*objective.discount_denoise, *objective.discount_inversion))
    if objective.threshold is not None and abs(objective.threshold) >= limit:
        raise InputError(
            f"srpo.threshold {objective.threshold} has no meaning for this reward, whose relative scores lie within "
            f"+-{limit:.4g}; choose one inside, or null for a loss of -score"
        )
