"""Bytes on one GPU, term by term, in each phase of an update."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from srpo.plan.setting import Setting
from srpo.precision import compute_dtype
from srpo_kernels.checkpointing import FluxPolicy, flux_policy
from srpo_kernels.optim.streaming import DEVICE_BYTES

__all__ = ["PHASES", "Memory", "Term", "memory"]

PHASES = ("rollout", "gradient", "optimizer")

GB = 10**9
#: CUDA context, loaded kernels, workspaces of cuBLAS and cuDNN; NCCL's buffers. Assumed.
CONTEXT, COMMUNICATION = 1.5 * GB, 0.5 * GB
#: What the allocator loses of memory that comes and goes. Assumed.
FRAGMENTATION = 0.1
#: The part of a GPU's memory left free, for what is not reckoned with.
RESERVE = 0.03
#: What diffusers' own code keeps, relative to patched: 22 and 20 units a block for 17.1 and 16.1, 5.9 GB of the decoder
#: for 1.9 (docs/patching.md).
UNPATCHED_BLOCKS, UNPATCHED_DECODER = 1.26, 3.1
#: Tensors of the decoder's largest size that live at once beside what is kept. Assumed.
DECODER_TENSORS = 3
#: Elements that attention's input, q, k, v and output, and the image, add to what the decoder's norms keep; counted.
DECODER_EXTRA = 1.02


@dataclass(frozen=True)
class Term:
    """Bytes held in each phase."""

    name: str
    rollout: float = 0.0
    gradient: float = 0.0
    optimizer: float = 0.0

    @classmethod
    def always(cls, name: str, nbytes: float) -> Term:
        return cls(name, nbytes, nbytes, nbytes)

    @property
    def most(self) -> float:
        return max(self.rollout, self.gradient, self.optimizer)


@dataclass(frozen=True)
class Memory:
    """Of one GPU. `host` is in host memory, for each GPU; `policy` is what blocks keep, "auto" decided."""

    terms: tuple[Term, ...]
    host: float
    policy: FluxPolicy
    capacity: float

    def total(self, phase: str) -> float:
        """Bytes in a phase."""
        return sum(getattr(term, phase) for term in self.terms)

    @property
    def peak(self) -> float:
        return max(map(self.total, PHASES))

    @property
    def fits(self) -> bool:
        return self.peak <= self.capacity


def memory(setting: Setting) -> Memory:
    """What `setting` needs of each GPU's memory."""
    models, states = list(_models(setting)), list(_states(setting))
    capacity = setting.gpu.memory_gb * GB
    policy = _policy(setting, free=capacity - sum(term.most for term in models))
    if setting.float8:
        models.append(Term.always("e4m3 copy of linear weights", setting.sizes.float8))
    working = list(_working(setting, policy))
    lost = (FRAGMENTATION * sum(getattr(term, phase) for term in working) for phase in PHASES)
    working.append(Term(f"lost to fragmentation: {FRAGMENTATION:.0%} of what comes and goes", *lost))
    reserve = Term.always(f"reserve: {RESERVE:.0%} of the GPU's memory", RESERVE * capacity)
    terms = tuple(term for term in (*models, *states, *working, reserve) if term.most)
    host = setting.state_bytes / setting.shards if setting.offloads else 0.0
    return Memory(terms, host, policy, capacity)


def _models(setting: Setting) -> Iterator[Term]:
    """What is there from the start."""
    sizes, config = setting.sizes, setting.config
    item, weight = setting.item, setting.weight_item
    yield Term.always("CUDA context and libraries", CONTEXT)
    if setting.count > 1:
        yield Term.always("NCCL buffers", COMMUNICATION)
    yield Term.always(f"transformer weights, {_name(weight)}", sizes.parameters * weight / setting.shards)
    yield Term.always("VAE weights", sizes.vae_parameters * item)
    if config.model.text_cache is None:  # with it they are loaded for prompts that it lacks only: for none, one hopes
        yield Term.always(f"T5 and CLIP text encoders, {_name(item)}", (sizes.t5 + sizes.clip) * item)
    yield Term.always(f"reward vision tower, {_name(item)}", sizes.reward_vision * item)
    yield Term.always(f"reward text tower, fp32 ({config.reward.type})", sizes.reward_text * 4)


def _states(setting: Setting) -> Iterator[Term]:
    """Gradients, there through all of an update but its first rollout, and optimizer state."""
    config, count = setting.config, setting.sizes.parameters / setting.shards
    yield Term.always(f"gradients, {_name(setting.gradient_item)}", count * setting.gradient_item)
    if setting.offloads:
        yield Term("optimizer state passing through", optimizer=DEVICE_BYTES)
    else:
        weights, moments = config.optimizer.modes(config.model.precision)
        state = f"{weights} weights, {moments} moments"
        yield Term.always(f"optimizer state: {state}", setting.state_bytes / setting.shards)


def _policy(setting: Setting, free: float) -> FluxPolicy:
    """As the trainer decides, from what is free when all models are there, and gradients and states are not yet."""
    config, sizes = setting.config, setting.sizes
    parameters = [torch.empty(sizes.parameters, device="meta")]
    reserved = config.optimizer.reserved_bytes(parameters, config.model.precision) / setting.shards
    return flux_policy(
        _Blocks(setting),
        config.model.checkpointing,
        batch=setting.rows,
        tokens=sizes.tokens,
        dtype=compute_dtype(config.model.precision),
        free=max(0, int(free - reserved)) if config.model.checkpointing == "auto" else None,
    )


class _Blocks:
    """As much of a transformer as `flux_policy` reckons with."""

    def __init__(self, setting: Setting) -> None:
        self.inner_dim = setting.sizes.transformer.inner_dim
        self.transformer_blocks, self.single_transformer_blocks = map(range, setting.sizes.blocks)

    def enable_gradient_checkpointing(self, _function: object) -> None:
        """Nothing is run."""

    def disable_gradient_checkpointing(self) -> None:
        """Nothing is run."""


def _working(setting: Setting, policy: FluxPolicy) -> Iterator[Term]:
    """What comes and goes."""
    config, sizes, rows, item = setting.config, setting.sizes, setting.rows, setting.item
    batch, patched = config.run.micro_batch, config.model.kernels != "off"
    block = policy.bytes["none"] / sum(sizes.blocks)  # what one block of the gradient pass keeps
    kept, decoder = float(policy.bytes[policy.mode]), sizes.decode.kept * item * DECODER_EXTRA
    if not patched:
        decoder *= UNPATCHED_DECODER
        kept *= UNPATCHED_BLOCKS if policy.mode == "none" else 1
        block *= UNPATCHED_BLOCKS
    # Backward reaches the images first and frees them before blocks run again; what blocks keep is there all the time.
    yield Term(f"kept by transformer blocks: {policy.mode}, {rows} images", gradient=kept)
    again = block * (1 if policy.mode == "none" else 2)  # a block's gradients, and the block computed again
    whole = min(config.model.image_chunk or rows, rows) if setting.recomputes_images else rows
    graph = whole * setting.twins * (sizes.vision.kept * item) + whole * decoder
    largest = DECODER_TENSORS * sizes.decode.largest * item
    images = graph + whole * largest
    name = "images, recomputed" if setting.recomputes_images else "images"
    yield Term(f"{name} {whole} at a time: graph of decoder and reward", gradient=images)
    if again > images:
        yield Term("one block computed again, beyond the images", gradient=again - images)
    if setting.offline < 1:
        yield Term("one block of the rollout", rollout=block * batch / rows)
        if patched and setting.shards == 1:
            steps = config.srpo.rollout_steps
            yield Term("modulation vectors of all steps", rollout=steps * batch * sizes.modulations * item)
    if setting.offline and config.data.latent_cache is None:
        yield Term("encoding real images", rollout=batch * largest)
    if setting.shards > 1:
        gathered = 2 * sizes.largest_block * setting.weight_item  # one computes, the next is on its way
        gradient = gathered + sizes.largest_block * setting.weight_item
        yield Term("gathered blocks, and gradients of one", rollout=gathered, gradient=gradient)
    if setting.autocast:
        cast = (sizes.parameters if setting.shards == 1 else 2 * sizes.largest_block) * item
        yield Term("fp32 weights cast to bf16", rollout=cast, gradient=cast)
    if config.optimizer.name == "torch":
        yield Term("temporaries of torch's step", optimizer=4 * sizes.parameters / setting.shards)


def _name(item: int) -> str:
    return {2: "bf16", 4: "fp32"}[item]
