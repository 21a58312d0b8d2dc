"""Bytes on one GPU, term by term, in each phase of an update."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from srpo.config import TrainConfig
from srpo.hardware import Gpu
from srpo.plan.setting import Setting
from srpo.plan.sizes import Sizes
from srpo.precision import compute_dtype
from srpo_kernels.checkpointing import FluxPolicy, Mode, flux_policy
from srpo_kernels.optim.streaming import DEVICE_BYTES

__all__ = ["PHASES", "Memory", "Term", "activation_room", "memory"]

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
    """Of one GPU. `host` is in host memory, for each GPU by what it is for; `policy` is what blocks keep, "auto"
    decided."""

    terms: tuple[Term, ...]
    host: dict[str, float]
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
    config, models, states = setting.config, list(_models(setting)), list(_states(setting))
    capacity = setting.gpu.memory_gb * GB
    mode = config.model.checkpointing  # the trainer chooses when all models are there, and nothing else
    room = _room(setting, capacity - sum(term.most for term in models)) if mode == "auto" else None
    policy = _policy(setting, mode, room)
    working = list(_working(setting, policy))
    lost = (FRAGMENTATION * sum(getattr(term, phase) for term in working) for phase in PHASES)
    working.append(Term(f"lost to fragmentation: {FRAGMENTATION:.0%} of what comes and goes", *lost))
    reserve = Term.always(f"reserve: {RESERVE:.0%} of the GPU's memory", RESERVE * capacity)
    terms = tuple(term for term in (*models, *states, *working, reserve) if term.most)
    host = {
        "optimizer state": setting.offloaded / setting.shards,
        "a copy of weights and states to save": _saved(setting) if config.run.save_async else 0.0,
    }
    return Memory(terms, {name: size for name, size in host.items() if size}, policy, capacity)


def activation_room(config: TrainConfig, count: int, *, capacity: float, free: float) -> int:
    """Bytes that transformer blocks may keep for backward, which is what "auto" must fit into.

    Args:
        config: the recipe, on `count` ranks. capacity: of the GPU. free: of it, when all models are loaded and neither
            gradients, optimizer states nor an e4m3 copy of weights is there yet.

    Raises `InputError` when model or reward files cannot be used.
    """
    gpu = Gpu("this", capacity / GB, bf16_tflops=1, fp8_tflops=0, bandwidth_tb_s=1, link_gb_s=1, fp32_tflops=1)
    return _room(Setting(config, gpu, count, config.run.sharding, Sizes.of(config)), free)


def _room(setting: Setting, free: float) -> int:
    images, *others = (term.gradient for term in _beside_blocks(setting))
    # `flux_policy` leaves room for a block that is computed again: by then images are gone.
    again = 2 * _policy(setting, "none").bytes["none"] / sum(setting.sizes.blocks)
    images = max(0.0, images - again)
    left = free - sum(term.most for term in _states(setting)) - RESERVE * setting.gpu.memory_gb * GB
    return max(0, int(left / (1 + FRAGMENTATION) - images - sum(others)))


def _saved(setting: Setting) -> float:
    """Bytes of what is trained and its states: of the shards of each rank, or of all of it on the first one."""
    return (setting.trained * setting.weight_item + setting.state_bytes + setting.average_bytes) / setting.shards


def _models(setting: Setting) -> Iterator[Term]:
    """What is there from the start."""
    sizes, config = setting.sizes, setting.config
    item = setting.item
    yield Term.always("CUDA context and libraries", CONTEXT)
    if setting.count > 1:
        yield Term.always("NCCL buffers", COMMUNICATION)
    name = _name(setting.weight_item)
    if setting.lora is not None:
        name = f"{'e4m3 and ' if setting.frozen_float8 else ''}{name}, and adapters of {setting.trained / 1e6:.1f} M"
    yield Term.always(f"transformer weights, {name}", setting.weight_bytes / setting.shards)
    yield Term.always("VAE weights", sizes.vae_parameters * item)
    if config.model.text_cache is None:  # with it they are loaded for prompts that it lacks only: for none, one hopes
        yield Term.always(f"T5 and CLIP text encoders, {_name(item)}", (sizes.t5 + sizes.clip) * item)
    kind = config.reward.type
    yield Term.always(f"reward {kind}: what gradients pass through, {_name(item)}", sizes.reward.parameters * item)
    released = 0 if config.reward.text_cache is None else sizes.reward.texts  # to host memory, once all is embedded
    yield Term.always(f"reward {kind}: text tower, fp32", (sizes.reward.wide - released) * 4)
    yield Term.always("rewards of validation", sum(part.bytes(item) for part in sizes.validation))


def _states(setting: Setting) -> Iterator[Term]:
    """Gradients, there through all of an update but its first rollout, optimizer state, and copies of weights."""
    config, count = setting.config, setting.trained / setting.shards
    yield Term.always(f"gradients, {_name(setting.gradient_item)}", count * setting.gradient_item)
    if setting.keeps_whole_gradients:
        whole = (setting.trained - count) * setting.gradient_item
        yield Term("gradients held whole until the last backward", rollout=whole, gradient=whole)
    yield Term.always("e4m3 copy of linear weights", setting.float8_copy)
    if setting.offloaded:
        yield Term("optimizer state passing through", optimizer=DEVICE_BYTES)
    weights, moments = config.optimizer.modes(config.model.precision)
    averages = ", averages" if setting.average_bytes else ""
    here = (setting.state_bytes + setting.average_bytes - setting.offloaded) / setting.shards
    yield Term.always(f"optimizer state: {weights} weights, {moments} moments{averages}", here)


def _policy(setting: Setting, mode: Mode | Literal["auto"], free: int | None = None) -> FluxPolicy:
    return flux_policy(
        _Blocks(setting),
        mode,
        batch=setting.rows,
        tokens=setting.sizes.tokens,
        dtype=compute_dtype(setting.config.model.precision),
        free=free,
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
    config, rows, patched = setting.config, setting.rows, setting.config.model.kernels != "off"
    block = policy.bytes["none"] / sum(setting.sizes.blocks)  # what one block of the gradient pass keeps, on average
    kept = float(policy.bytes[policy.mode])
    if not patched:
        kept *= UNPATCHED_BLOCKS if policy.mode == "none" else 1
        block *= UNPATCHED_BLOCKS
    # Backward reaches the images first and frees them before blocks run again; what blocks keep is there all the time.
    yield Term(f"kept by transformer blocks: {policy.mode}, {rows} images", gradient=kept)
    images, *others = _beside_blocks(setting)
    yield images
    again = block * (1 if policy.mode == "none" else 2)  # a block's gradients, and the block computed again
    if again > images.gradient:
        yield Term("one block computed again, beyond the images", gradient=again - images.gradient)
    if setting.offline < 1:
        yield Term("one block of the rollout", rollout=block * config.run.micro_batch / rows)
    yield from others


def _beside_blocks(setting: Setting) -> Iterator[Term]:
    """What comes and goes whatever blocks keep; images first."""
    config, sizes, rows, item = setting.config, setting.sizes, setting.rows, setting.item
    batch, patched = config.run.micro_batch, config.model.kernels != "off"
    decoder = sizes.decode.kept * item * DECODER_EXTRA * (1 if patched else UNPATCHED_DECODER)
    whole = min(config.model.image_chunk or rows, rows) if setting.recomputes_images else rows
    largest = DECODER_TENSORS * sizes.decode.largest * item
    name = "images, recomputed" if setting.recomputes_images else "images"
    scored = setting.twins * sizes.reward.kept * item
    yield Term(f"{name} {whole} at a time: graph of decoder and reward", gradient=whole * (scored + decoder + largest))
    if setting.offline < 1 and patched and (setting.shards == 1 or setting.gathers_whole):
        steps = config.srpo.rollout_steps
        yield Term("modulation vectors of all steps", rollout=steps * batch * sizes.modulations * item)
    if setting.offline and config.data.latent_cache is None:
        yield Term("encoding real images", rollout=batch * largest)
    if setting.gathers_whole:
        yield Term("weights gathered whole for the rollout", rollout=setting.gathered_bytes)
    if setting.shards > 1:
        gathered = 2 * setting.block_bytes  # one computes, the next is on its way
        made = 0 if setting.keeps_whole_gradients else sizes.largest_block * setting.trained / sizes.parameters
        rollout = 0.0 if setting.gathers_whole else gathered
        kept = gathered if config.run.reshard_after_forward else setting.gathered_bytes
        gradient = kept + made * setting.gradient_item
        yield Term("gathered blocks, and gradients of one", rollout=rollout, gradient=gradient)
    if setting.autocast:
        cast = (sizes.parameters if setting.shards == 1 else 2 * sizes.largest_block) * item
        yield Term("fp32 weights cast to bf16", rollout=cast, gradient=cast)
    if config.optimizer.name == "torch":
        yield Term("temporaries of torch's step", optimizer=4 * setting.trained / setting.shards)


def _name(item: int) -> str:
    return {2: "bf16", 4: "fp32"}[item]
