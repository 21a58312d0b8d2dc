"""Seconds of one update, phase by phase: arithmetic, bytes and collectives over what a GPU gets of its ceilings."""

from __future__ import annotations

from dataclasses import astuple, dataclass, field, fields

from srpo.hardware import GPUS_PER_NODE, Gpu
from srpo.plan.memory import UNPATCHED_DECODER, Memory
from srpo.plan.setting import Setting

__all__ = ["Efficiencies", "Phase", "Work", "phases"]

#: Elements moved by the passes between GEMMs of a double and a single block, in units of tokens x width
#: (tests/test_flux_memory.py), and what diffusers' own passes move relative to that (facts: 96 GB for 19).
PASSES, UNPATCHED_PASSES = (23, 19), 5
#: Passes of the decoder over what it keeps. Assumed.
DECODER_PASSES = 5
#: Bytes a parameter of torch's default AdamW in fp32 with its clip (optimizer design, section 5).
TORCH_STEP = 92


def _share(value: float, source: str) -> float:
    return field(default=value, metadata={"source": source})


@dataclass(frozen=True)
class Efficiencies:
    """The parts of a GPU's ceilings (`srpo.hardware.Gpu`) that are reckoned with."""

    linear: float = _share(0.85, "linear layers, of the matmul ceiling: assumed")
    fp8: float = _share(
        0.70, "e4m3 linear layers, quantising included: 107 and 101 ms a step at 1024 px, published, H100"
    )
    attention: float = _share(
        0.65, "attention, of the bf16 ceiling: with linear, 128-131 ms at 1024 px, published, H200"
    )
    convolution: float = _share(0.55, "the VAE: 29 ms to decode 1024 px, published, H200")
    memory: float = _share(0.80, "passes between GEMMs, optimizer, of the copy bandwidth: assumed")
    link: float = _share(0.75, "collectives, of the link: assumed")

    @classmethod
    def floors(cls) -> Efficiencies:
        """All of every ceiling: no step is faster."""
        return cls(*(1.0 for _ in fields(cls)))


@dataclass(frozen=True)
class Work:
    """FLOPs by what runs them, and bytes."""

    linear: float = 0.0
    fp8: float = 0.0
    fp32: float = 0.0
    attention: float = 0.0
    convolution: float = 0.0
    moved: float = 0.0  # bytes of GPU memory, reads and writes

    def __add__(self, other: Work) -> Work:
        return Work(*(a + b for a, b in zip(astuple(self), astuple(other), strict=True)))

    def __mul__(self, times: float) -> Work:
        return Work(*(times * value for value in astuple(self)))

    @property
    def flops(self) -> float:
        return sum(astuple(self)) - self.moved

    def arithmetic(self, gpu: Gpu, got: Efficiencies, *, fp32: bool = False) -> float:
        """Seconds of all FLOPs; `fp32`: nothing runs in bf16."""
        rate = (gpu.fp32_tflops if fp32 else gpu.bf16_tflops) * 1e12
        # Without e4m3 products the same values are multiplied in bf16.
        fp8 = self.fp8 / (gpu.fp8_tflops * 1e12 * got.fp8 if gpu.fp8_tflops else rate * got.linear)
        wide = self.fp32 / (gpu.fp32_tflops * 1e12 * got.linear)
        shares = ((self.linear, got.linear), (self.attention, got.attention), (self.convolution, got.convolution))
        return fp8 + wide + sum(flops / (rate * share) for flops, share in shares)

    def traffic(self, gpu: Gpu, got: Efficiencies) -> float:
        """Seconds of all bytes."""
        return self.moved / (gpu.bandwidth_tb_s * 1e12 * got.memory)


@dataclass(frozen=True)
class Phase:
    """A phase of one update, as the log times it. Collectives that overlap count where they outlast the rest."""

    name: str
    tflop: float
    moved_gb: float
    link_gb: float
    arithmetic: float  # seconds
    memory: float  # seconds
    collectives: float  # seconds
    seconds: float


def phases(setting: Setting, memory: Memory, got: Efficiencies) -> list[Phase]:
    """The phases of one update on each GPU."""
    batches, draws, run = setting.batches, setting.draws, setting.config.run
    online = batches * (1 - setting.offline)
    forwards = setting.config.srpo.rollout_steps * online
    rollout = forward(setting, run.micro_batch, quantized=setting.float8) * forwards
    if online:  # all weights quantised: when they have been gathered, or once an update
        rollout += Work(moved=3 * setting.float8_copy * (online if setting.gathers_whole else 1))
    if setting.config.data.latent_cache is None:
        encode = Work(convolution=setting.sizes.encode_flops, moved=DECODER_PASSES * _decoder_bytes(setting) / 2)
        rollout += encode * (run.micro_batch * batches * setting.offline)
    weights = setting.gathered_bytes if setting.shards > 1 else 0
    gradients = setting.trained * setting.gradient_item if setting.shards > 1 else 0
    scattered = gradients * (1 if run.reduce == "update" else draws)
    return [
        _phase("text", _texts(setting), setting, got),
        _phase("rollout", rollout, setting, got, before=weights * online)
        if setting.gathers_whole
        else _phase("rollout", rollout, setting, got, beside=weights * forwards),
        _phase(
            "gradient",
            gradient(setting, memory.policy.mode) * draws,
            setting,
            got,
            beside=(2 if run.reshard_after_forward else 1) * weights * draws + scattered,
            replicated=gradients / setting.shards,
        ),
        _optimizer(setting, got),
    ]


def forward(setting: Setting, images: int, *, quantized: bool) -> Work:
    """The transformer on `images` images."""
    sizes, flops = setting.sizes, setting.sizes.forward
    width, item = sizes.transformer.inner_dim, setting.item
    passes = sum(number * units for number, units in zip(sizes.blocks, PASSES, strict=True))
    if setting.config.model.kernels == "off":
        passes *= UNPATCHED_PASSES
    moved = images * passes * sizes.tokens * width * item
    if setting.autocast:
        moved += 6 * sizes.parameters  # fp32 read, bf16 written
    blocks = dict(fp8=images * flops.blocks) if quantized else dict(linear=images * flops.blocks)
    return Work(moved=moved, attention=images * flops.attention, **blocks) + Work(linear=images * flops.linear)


def gradient(setting: Setting, policy: str) -> Work:
    """One draw: both branches forward, their images decoded and scored, and all of it backward."""
    config, sizes, rows = setting.config, setting.sizes, setting.rows
    ahead = forward(setting, rows, quantized=config.model.precision == "fp8")
    if config.model.precision == "fp8":
        ahead += Work(moved=3 * setting.float8_copy)  # its layers quantise their weights each time
    # To inputs and to weights, but to inputs alone of frozen ones; as much in arithmetic as, assumed, in passes.
    back = forward(setting, rows, quantized=False) * (2 if setting.lora is None else 1)
    again = {"none": Work(), "selective": Work(moved=ahead.moved), "block": ahead}[policy]
    scores = Work(
        convolution=sizes.decode.flops,
        linear=setting.twins * sizes.reward.flops,
        moved=DECODER_PASSES * _decoder_bytes(setting),
    )
    return ahead + again + back + scores * (rows * (3 if setting.recomputes_images else 2))


def _decoder_bytes(setting: Setting) -> float:
    patched = setting.config.model.kernels != "off"
    return setting.sizes.decode.kept * setting.item * (1 if patched else UNPATCHED_DECODER)


def _texts(setting: Setting) -> Work:
    """Texts seen for the first time: a caption for T5, and with each control word for the reward."""
    config, sizes = setting.config, setting.sizes
    captions = setting.batches * config.run.micro_batch
    texts = captions * (1 if config.srpo.form == "image_only" else 2)
    linear = 2 * captions * (sizes.t5 * config.model.max_sequence_length + sizes.clip * 77)
    return Work(linear=linear if config.model.text_cache is None else 0.0, fp32=2 * texts * sizes.reward.texts * 77)


def _optimizer(setting: Setting, got: Efficiencies) -> Phase:
    """Every stored byte read and all but gradients written, gradients once more for their norm."""
    count, gradient_item = setting.trained / setting.shards, setting.gradient_item
    averages = setting.average_bytes / setting.config.optimizer.ema_every
    stored = setting.weight_item + (setting.state_bytes + averages) / setting.trained
    torch = setting.config.optimizer.name == "torch"
    work = Work(moved=count * (TORCH_STEP if torch else 2 * stored + 2 * gradient_item))
    reduced = 0.0 if setting.shards > 1 else _ring(setting.count) * 2 * count * gradient_item
    phase = _phase("optimizer", work, setting, got)
    exchange = reduced / _link(setting.gpu, setting.count, got)
    host = setting.offloaded / setting.shards
    step = max(phase.seconds, host / (setting.gpu.host_gb_s * 1e9))  # both ways at once
    return Phase("optimizer", 0.0, phase.moved_gb, reduced / 1e9, 0.0, step, exchange, step + exchange)


def _phase(
    name: str,
    work: Work,
    setting: Setting,
    got: Efficiencies,
    *,
    before: float = 0.0,
    beside: float = 0.0,
    replicated: float = 0.0,
) -> Phase:
    """A phase with its collectives.

    Args:
        before, beside: bytes of tensors gathered or scattered among the ranks that share weights, which work waits for
            or goes on beside. replicated: those of shards that are summed over replicas, beside work.
    """
    gpu, replicas = setting.gpu, setting.count // setting.shards
    inside, link = _ring(setting.shards), _link(gpu, setting.shards, got)
    across = 2 * _ring(replicas) * replicated
    sent = inside * (before + beside) + across
    waited, hidden = inside * before / link, inside * beside / link + across / _link(gpu, setting.count, got)
    arithmetic = work.arithmetic(gpu, got, fp32=setting.item == 4)
    traffic = work.traffic(gpu, got)
    total = waited + max(arithmetic + traffic, hidden)
    return Phase(name, work.flops / 1e12, work.moved / 1e9, sent / 1e9, arithmetic, traffic, waited + hidden, total)


def _ring(ranks: int) -> float:
    """The part of a tensor that each rank sends when all gather it, or when sums of it are scattered."""
    return (ranks - 1) / ranks


def _link(gpu: Gpu, ranks: int, got: Efficiencies) -> float:
    """Bytes a second of each GPU among `ranks`."""
    return (gpu.link_gb_s if ranks <= GPUS_PER_NODE else gpu.network_gb_s) * 1e9 * got.link
