"""The training loop: gradients, optimizer steps, checkpoints that resume bitwise, pictures along the way."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

from srpo.activations import keep_activations
from srpo.algorithm import Draw, NonFiniteError, Seconds
from srpo.algorithms import ALGORITHMS
from srpo.assets import resolve_asset
from srpo.base_model import check_base, read_base, write_base
from srpo.batches import CleanBatches, clean_batches
from srpo.checkpoint import Checkpoints
from srpo.config import TrainConfig, dump_config
from srpo.distributed import Ranks
from srpo.errors import InputError
from srpo.model_directory import check_model_directory
from srpo.models import Flux
from srpo.optimizer import load_optimizer, set_gradient_dtype, take_step
from srpo.precision import compute_dtype
from srpo.rewards import Reward, load_reward
from srpo.rundir import updates_done, write_bad_images, write_config
from srpo.runlog import RunLog
from srpo.saving import Saver
from srpo.sharding import mesh_of
from srpo.signals import Stop, StopRequestedError
from srpo.sources import Sources
from srpo.validation import Validation
from srpo_kernels import extension_status, triton_problem
from srpo_kernels.optim import AdamW

__all__ = ["NonFiniteError", "Trainer"]


class Trainer:
    """One run of SRPO, or of another algorithm, in its run directory.

    Everything the user gave is checked before weights are loaded, and weights before the run directory is touched.

    Args:
        config: the resolved recipe. resume: go on from the newest checkpoint of ``config.run.dir``.
        reward: what makes of the recipe's reward the one to train on, such as a reward of your own.

    Attributes:
        stopped_by: name of the signal that ended `fit` before its last update.

    Raises:
        InputError: something in the recipe, or what it points to, cannot be used.
    """

    stopped_by: str | None = None

    def __init__(
        self, config: TrainConfig, *, resume: bool = False, reward: Callable[[Reward], Reward] = lambda given: given
    ) -> None:
        self.config = config
        objective, run = config.srpo, config.run
        self.ranks = Ranks.join(run.device)
        self.size = (objective.height, objective.width)
        algorithm = ALGORITHMS[config.algorithm]
        backwards = clean_batches(config, self.ranks.world) * algorithm.backwards(config)
        path = resolve_asset(config.model.path, "pipeline")
        model = check_model_directory(path, self.size, text=config.model.text_cache is None)
        self.sources = Sources(config, model)
        self.directory = Path(run.dir)
        self.checkpoints = Checkpoints(self.directory / "checkpoints", run.keep, run.keep_every, self.ranks)
        self.start = updates_done(self.directory, config, self.checkpoints, resume=resume)
        if config.model.lora and self.start:
            check_base(read_base(self.directory), model, f"run {self.directory}")

        dtype = compute_dtype(config.model.precision)
        self.reward = reward(load_reward(config.reward, objective, device=self.ranks.device, dtype=dtype))
        if config.baseline is None:
            _check_threshold(config, self.reward)
        self.flux = Flux.load(
            model,
            device=self.ranks.device,
            precision=config.model.precision,
            max_sequence_length=config.model.max_sequence_length,
            trainable=True,
            weights=config.optimizer.model_weights(config.model.precision),
            text_cache=config.model.text_cache,
            lora=config.model.lora,
            seed=run.seed,
        )
        self.batches = CleanBatches(config, self.ranks, self.flux, self.reward, self.sources)
        self.batches.prepare_texts(self.start)
        self.flux.patch(config.model.kernels)
        set_gradient_dtype(config.optimizer, self.flux.trainable().values(), backwards)
        self.sharded = run.sharding != "none" and self.ranks.world > 1
        if self.sharded:
            mesh = mesh_of(self.ranks.world, self.ranks.device, run.shard_size)
            how = dict(reshard_after_forward=run.reshard_after_forward, fp8_all_gather=run.fp8_all_gather)
            self.flux.shard(mesh, **how)
        self.policy = keep_activations(config, self.flux, self.ranks.world)
        self.update = algorithm(
            config,
            self.ranks,
            self.flux,
            self.reward,
            self.batches,
            sharded=self.sharded,
            checkpointing=self.policy.mode,
        )
        self.batches.prepare_reward(self.start, self.update.scored)
        self.validation = Validation(config, self.ranks, self.flux, self.sources, self.reward)
        named = self.flux.trainable()
        self.names, self.parameters = list(named), list(named.values())
        self.optimizer = load_optimizer(
            config.optimizer,
            objective,
            self.parameters,
            precision=config.model.precision,
            seed=run.seed,
        )
        self.saver = Saver(self.checkpoints, named, self.optimizer, dump_config(config), background=run.save_async)
        if self.start:
            self.validation.restore(self.start)  # may look at step 0, whose weights these still are
            self.saver.restore(self.start)
        if self.ranks.is_main:
            write_config(self.directory, config)
            if config.model.lora:
                write_base(self.directory, model)
            write_bad_images(self.directory, self.sources.bad_images())
            self.sources.warn()
        self.ranks.barrier()

    def fit(self, on_update: Callable[[int], None] | None = None) -> int:
        """Train to the last update and return the number of updates done.

        SIGINT, SIGTERM or SIGUSR1 to any rank saves a checkpoint and returns early. `on_update` is called after each
        update with its 1-based number.

        Raises:
            NonFiniteError: a score or gradient is not finite. SaveError: a checkpoint could not be written.
        """
        run, total = self.config.run, self.config.srpo.updates
        step, saved = self.start, self.start
        log = None
        if self.ranks.is_main:
            log = RunLog(self.directory, start=step, total=total, tensorboard=run.tensorboard, wandb=run.wandb)
        try:
            with Stop(self.ranks) as stop:
                if log is not None:
                    kernels = self.flux.patched.report() if self.flux.patched else "off"
                    log.event(
                        "start",
                        step=step,
                        updates=total,
                        kernels=kernels,
                        triton=triton_problem() or "usable",
                        extension=extension_status(),
                        checkpointing=str(self.policy),
                    )
                    log.event("data", step=step, **self.sources.record())
                if self.validation.pending(step):
                    with self.averaged():
                        self.validation.run(step, log)
                while step < total and not self.validation.stopped:
                    try:
                        stop.check()
                        record = self._step(step, stop.check)
                    except StopRequestedError:
                        self.stopped_by = stop.signal
                        break
                    self.saver.finish()  # so that no more than `save_every` recorded updates can be lost
                    step += 1
                    if log is not None:
                        log.update(step, record)
                    if step % run.save_every == 0 or step == total:
                        self.saver.save(saved := step)
                    if self.validation.due(step):
                        with self.averaged():
                            self.validation.run(step, log)
                    if on_update is not None:
                        on_update(step)
                if saved != step:
                    self.saver.save(step)
                self.saver.finish()
                if log is not None:
                    limits = [breach.monitor for breach in self.validation.stopped]
                    ended = "stop" if self.stopped_by or limits else "end"
                    log.event(ended, step=step, signal=self.stopped_by, limits=limits)
        finally:
            self.saver.close()
            if log is not None:
                log.close()
        return step

    def _step(self, step: int, check: Callable[[], None]) -> dict[str, Any]:
        """Gradients of the whole batch and an optimizer step, for each part of the update; returns the log record."""
        seconds = Seconds(self.ranks.device)
        draws: list[Draw] = []
        for part in range(self.update.parts):
            self.optimizer.zero_grad(set_to_none=True)
            draws += self.update.accumulate(step, check, seconds, part)
            with seconds.of("optimizer"):
                stepped = take_step(self.optimizer, self.config.srpo.max_grad_norm)
            if not math.isfinite(norm := stepped["grad_norm"]):
                prompts = ", ".join(sorted({caption.text for draw in draws for caption in draw.captions}))
                raise NonFiniteError(f"update {step + 1}: the gradient norm is {norm} (prompts: {prompts})")
        rounded = {name: round(value, 4) for name, value in seconds.items()}
        return {**self.update.record(step, draws), **stepped, "seconds": rounded}

    def averaged(self) -> AbstractContextManager[None]:
        """The averaged weights in the place of the exact ones, where the recipe has them kept."""
        if isinstance(self.optimizer, AdamW) and self.config.optimizer.ema_decay is not None:
            return self.optimizer.average_parameters()
        return nullcontext()


def _check_threshold(config: TrainConfig, reward: Reward) -> None:
    """A threshold outside the reward's range would make the loss always zero, or never anything but -score."""
    objective = config.srpo
    limit = max(reward.limit(kappa) for kappa in (*objective.discount_denoise, *objective.discount_inversion))
    if objective.threshold is not None and abs(objective.threshold) >= limit:
        raise InputError(
            f"srpo.threshold {objective.threshold} has no meaning for this reward, whose relative scores lie within "
            f"+-{limit:.4g}; choose one inside, or null for a loss of -score"
        )
