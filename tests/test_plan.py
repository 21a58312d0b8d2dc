"""`srpo plan`: its counts against the real models, its floors against the published ones, its advice."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FluxTransformer2DModel
from plan_helpers import each_size_once  # noqa: F401
from test_patching_vae import kept_by_decoder
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    CLIPConfig,
    CLIPModel,
    Qwen2VLConfig,
    Qwen2VLModel,
    SiglipVisionConfig,
    SiglipVisionModel,
)

from srpo.cli import main
from srpo.config import TrainConfig, load_config
from srpo.errors import InputError
from srpo.hardware import GPUS, Gpu, parse_gpu
from srpo.lora import LoraConfig, add_adapters
from srpo.plan import Efficiencies, Plan, make_plan
from srpo.plan.memory import DECODER_EXTRA, activation_room
from srpo.plan.rewards import Tower
from srpo.plan.sizes import Sizes
from srpo_kernels.checkpointing import flux_policy

PARAMETERS = 11_901_408_320
GB = 1e9
RECIPES = sorted(path.stem for path in (Path(__file__).parent.parent / "srpo/recipes").glob("*.yaml"))


def sizes(side: int = 720, recipe: str = "flux-dev-hps", *overrides: str) -> Sizes:
    return Sizes.of(load_config(recipe, [f"srpo.height={side}", f"srpo.width={side}", *overrides]))


@cache
def configured(recipe: str, *overrides: str) -> TrainConfig:
    return load_config(recipe, overrides)


def plan(gpu: str = "H200", count: int = 1, *overrides: str, recipe: str = "flux-dev-hps", **options: Any) -> Plan:
    return make_plan(recipe, configured(recipe, *overrides), GPUS[gpu], count, **options)


def terms(made: Plan, phase: str = "gradient") -> dict[str, float]:
    """Bytes by the first word of the term's name."""
    return {term.name: getattr(term, phase) for term in made.memory.terms}


def term(made: Plan, start: str, phase: str = "gradient") -> float:
    (found,) = (value for name, value in terms(made, phase).items() if name.startswith(start))
    return found


# --- counts ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def flux() -> FluxTransformer2DModel:
    with torch.device("meta"):
        return FluxTransformer2DModel(guidance_embeds=True)


def test_parameters_are_those_of_the_real_models(flux: FluxTransformer2DModel) -> None:
    found = sizes()
    assert found.parameters == sum(parameter.numel() for parameter in flux.parameters()) == PARAMETERS
    assert found.t5 == 4_762_310_656
    assert found.clip == 123_060_480
    assert found.vae_parameters == 83_819_683
    assert found.reward.wide + found.reward.parameters == 986_109_441
    pickscore = sizes(720, "flux-dev-pickscore")
    assert pickscore.reward == replace(found.reward, missing=pickscore.reward.missing)
    assert found.largest_block == sum(p.numel() for p in flux.transformer_blocks[0].parameters())
    linear = [m for m in flux.transformer_blocks[0].modules() if isinstance(m, torch.nn.Linear)]
    assert found.float8 < PARAMETERS
    assert found.float8 % sum(m.weight.numel() for m in linear if m.out_features != 6 * 3072) == pytest.approx(
        38 * 12 * 3072**2 % (24 * 3072**2)
    )


@pytest.mark.parametrize(("side", "tokens"), [(720, 2537), (1024, 4608)])
def test_flops_are_those_of_the_real_transformer(flux: FluxTransformer2DModel, side: int, tokens: int) -> None:
    found = sizes(side)
    assert found.tokens == tokens
    with torch.device("meta"), torch.no_grad(), FlopCounterMode(display=False) as counter:
        flux(
            hidden_states=torch.empty(1, tokens - 512, 64),
            encoder_hidden_states=torch.empty(1, 512, 4096),
            pooled_projections=torch.empty(1, 768),
            timestep=torch.empty(1),
            guidance=torch.empty(1),
            img_ids=torch.empty(tokens - 512, 3),
            txt_ids=torch.empty(512, 3),
        )
    assert found.forward.total == pytest.approx(counter.get_total_flops(), rel=1e-3)


def test_figures_of_the_facts() -> None:
    small, large = sizes(), sizes(1024)
    for found, linear, attention, decode in ((small, 32.75, 4.51, 5.04), (large, 59.49, 14.87, 10.47)):
        assert found.forward.blocks / 1e12 == pytest.approx(linear, abs=0.01)
        assert found.forward.attention / 1e12 == pytest.approx(attention, abs=0.01)
        assert found.decode.flops / 1e12 == pytest.approx(decode, abs=0.01)
    assert small.reward.flops / 1e12 == pytest.approx(0.335, abs=0.002)


_CLIP_L = dict(hidden_size=1024, intermediate_size=4096, num_attention_heads=16, patch_size=14)
_QWEN_TEXT = dict(
    vocab_size=64,
    hidden_size=512,
    intermediate_size=1024,
    num_attention_heads=4,
    num_key_value_heads=1,
    bos_token_id=None,
    eos_token_id=None,
)
_QWEN_TEXT["rope_parameters"] = dict(rope_type="default", rope_theta=1e6, mrope_section=[16, 24, 24])


def reward_files(kind: str, folder: Path) -> tuple[list[str], Any]:
    """Overrides for a reward of two layers, whose configuration is in `folder`, and the model of it."""
    config: Any
    if kind == "siglip_aesthetic":
        config = SiglipVisionConfig(**_CLIP_L, image_size=384, num_hidden_layers=2)
    elif kind == "hpsv3":
        vision = dict(depth=2, embed_dim=320, num_heads=4, hidden_size=512)
        config = Qwen2VLConfig(text_config=dict(_QWEN_TEXT, num_hidden_layers=2), vision_config=vision)
    else:
        config = CLIPConfig(vision_config=dict(_CLIP_L, num_hidden_layers=2), text_config={})
    config.save_pretrained(folder)
    classes = {"siglip_aesthetic": SiglipVisionModel, "hpsv3": Qwen2VLModel}
    # Qwen2-VL looks at the values of its grids, which a meta tensor has not.
    with torch.device("cpu" if kind == "hpsv3" else "meta"):
        model = classes.get(kind, CLIPModel)(config)
    named = dict(type=kind, path=folder, **({"processor": folder} if kind == "hpsv3" else {}))
    if kind.endswith("aesthetic"):
        named["head"] = "head"
    return [f"reward.{key}={value}" for key, value in named.items()], model


def run_reward(model: Any, towers: tuple[Tower, ...]) -> None:
    """One image through it."""
    if isinstance(model, Qwen2VLModel):
        vision, text = towers
        side = math.isqrt(vision.tokens)
        model.get_image_features(torch.zeros(side**2, 1176), torch.tensor([[1, side, side]]))
        line = torch.zeros(1, text.tokens, model.config.text_config.hidden_size)
        model.language_model(inputs_embeds=line, use_cache=False)
    else:
        vision = getattr(model, "vision_model", model)
        size = vision.config.image_size
        vision(pixel_values=torch.empty(1, 3, size, size, device="meta"))


@pytest.mark.parametrize("kind", ["clip", "aesthetic", "siglip_aesthetic", "hpsv3"])
def test_flops_and_parameters_of_rewards_are_those_of_the_real_ones(kind: str, tmp_path: Path) -> None:
    overrides, model = reward_files(kind, tmp_path)
    form = ["srpo.form=image_only", "srpo.threshold=null"] if kind.endswith("aesthetic") else []
    found = sizes(720, "flux-dev-hps", *overrides, *form).reward
    assert not found.missing or kind == "hpsv3"
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        run_reward(model, found.towers)
    # Embeddings of patches, what follows the layers, and Qwen's merger are left out.
    assert found.flops == pytest.approx(counter.get_total_flops(), rel=0.1)
    assert found.flops < counter.get_total_flops()
    used = [
        weight.numel() for name, weight in model.named_parameters() if kind != "aesthetic" or name.startswith("vis")
    ]
    assert found.parameters + found.wide == sum(used)


def test_rewards_without_files_are_the_published_ones() -> None:
    """Parameters: HPSv3's, ImageReward's BLIP-L and BERT, SigLIP so400m's and CLIP ViT-L/14's vision towers."""
    plain = ("srpo.form=image_only", "srpo.threshold=null")
    cases = {
        ("reward.type=hpsv3", "reward.processor=none"): (7_744_923_136, 0),
        ("reward.type=image_reward", "reward.processor=none"): (303_301_632, 141_977_088),
        ("reward.type=siglip_aesthetic", "reward.head=none", *plain): (428_225_600, 0),
        ("reward.type=aesthetic", "reward.head=none", *plain): (303_966_208, 0),
    }
    for overrides, expected in cases.items():
        made = plan("H200", 1, "reward.path=none", *overrides)
        found = made.setting.sizes.reward
        assert (found.parameters, found.wide) == expected, overrides
        assert "reward none does not exist: reckoned with the published" in str(made)
    mixed = plan(
        "H200",
        1,
        "reward.type=mixture",
        "reward.path=''",
        "reward.parts=[{path: a}, {path: b, type: hpsv3, processor: c}]",
    )
    parts = mixed.setting.sizes.reward
    assert parts.parameters + parts.wide == 7_744_923_136 + 986_109_441
    assert mixed.phases[2].tflop > plan("H200", 1).phases[2].tflop
    held = plan("H200", 1, "validation.held_out={type: hpsv3, path: a, processor: b}")
    assert term(held, "rewards of validation") == 2 * 7_744_923_136


def test_decoder_keeps_what_the_patched_one_does(monkeypatch: pytest.MonkeyPatch) -> None:
    for side in (720, 1024):
        counted = kept_by_decoder(side, monkeypatch, patched=True)
        assert sizes(side).decode.kept * 2 * DECODER_EXTRA == pytest.approx(counted, rel=0.02)


def test_sizes_come_from_a_model_directory(flux_shaped: Path, clip_shaped: Path) -> None:
    from diffusers import FluxPipeline
    from transformers import CLIPModel

    changes = (f"model.path={flux_shaped}", f"reward.path={clip_shaped}", "reward.type=clip")
    found, pipeline = sizes(64, "flux-dev-hps", *changes), FluxPipeline.from_pretrained(flux_shaped)
    parts = dict(parameters="transformer", vae_parameters="vae", t5="text_encoder_2", clip="text_encoder")
    for name, part in parts.items():
        assert getattr(found, name) == sum(p.numel() for p in getattr(pipeline, part).parameters()), part
    reward = CLIPModel.from_pretrained(clip_shaped)
    assert found.reward.wide + found.reward.parameters == sum(p.numel() for p in reward.parameters())
    assert found.assumed == ()
    assert len(sizes().assumed) == 2


# --- memory ---------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["none", "selective", "block"])
@pytest.mark.parametrize("batch", [1, 4])
def test_blocks_keep_what_the_policy_says(flux: FluxTransformer2DModel, mode: Any, batch: int) -> None:
    made = plan("H200", 1, f"model.checkpointing={mode}", f"run.micro_batch={batch}")
    policy = flux_policy(flux, mode, batch=2 * batch, tokens=2537)
    assert term(made, "kept by transformer blocks") == policy.bytes[mode]
    again = mode != "none"
    assert any(name.startswith("images, recomputed") for name in terms(made)) == again


def test_terms_at_flux_dev() -> None:
    made = plan("H200", 1)
    assert term(made, "transformer weights, bf16") == 2 * PARAMETERS
    assert term(made, "gradients, fp32") == 4 * PARAMETERS, "32 backward passes are summed"
    assert term(made, "optimizer state: split32 weights, M4 moments") == 6 * PARAMETERS
    assert term(made, "T5 and CLIP") == pytest.approx(9.77 * GB, rel=0.01)
    once = plan("H200", 1, "srpo.batch_size=1")
    assert term(once, "gradients, bf16") == 2 * PARAMETERS
    small = plan("H200", 1, "srpo.batch_size=1", "optimizer.moments=M2", "optimizer.weights=split24")
    assert term(small, "optimizer state") == pytest.approx(3.1 * PARAMETERS)
    full = plan("H200", 1, "optimizer.name=torch")
    assert term(full, "transformer weights, fp32") == term(full, "gradients, fp32") == 4 * PARAMETERS
    assert term(full, "fp32 weights cast") == 2 * PARAMETERS
    assert term(full, "temporaries", "optimizer") == 4 * PARAMETERS
    tiny = plan("H200", 1, "model.precision=fp32", "model.path=tiny", "srpo.height=32", "run.save_async=false")
    assert not tiny.memory.host


def test_offload_moves_states_to_the_host() -> None:
    made = plan("H200", 1, "optimizer.offload=states")
    assert made.memory.host["optimizer state"] == 6 * PARAMETERS
    assert made.memory.host["a copy of weights and states to save"] == (2 + 6) * PARAMETERS
    assert term(made, "optimizer state passing through", "optimizer") == 256 * 2**20
    optimizer = made.phases[-1]
    assert optimizer.seconds == pytest.approx(6 * PARAMETERS / 55e9), "both ways at once over the host's bus"
    assert "host memory for optimizer state: 71.41 GB" in str(made)


def test_averages_are_on_the_gpu_or_the_host() -> None:
    plain, here, there = (
        plan("H200", 1, *options)
        for options in ((), ("optimizer.ema_decay=0.9",), ("optimizer.ema_decay=0.9", "optimizer.offload=ema"))
    )
    assert term(here, "optimizer state: ") - term(plain, "optimizer state: ") == 4 * PARAMETERS
    assert term(there, "optimizer state: ") == term(plain, "optimizer state: ")
    assert there.memory.host["optimizer state"] == 4 * PARAMETERS
    assert there.phases[-1].seconds == pytest.approx(4 * PARAMETERS / 55e9)
    rare = plan("H200", 1, "optimizer.ema_decay=0.9", "optimizer.ema_every=10")
    moved = [made.phases[-1].moved_gb for made in (plain, rare, here)]
    assert moved[1] - moved[0] == pytest.approx((moved[2] - moved[0]) / 10)


def test_adapters_are_all_that_is_trained(flux: FluxTransformer2DModel) -> None:
    """Rank 16 on attention: 19 blocks of eight and 38 of three layers from 3072 to 3072."""
    adapters = 16 * 2 * 3072 * (19 * 8 + 38 * 3)
    block = "model.checkpointing=block"
    lora = ("model.lora.rank=16", "model.text_cache=somewhere", block)
    made, low, whole = plan("H200", 1, *lora), plan("H200", 1, *lora, "model.precision=fp8"), plan("H200", 1, block)
    assert made.setting.trained == adapters
    assert term(made, "gradients, fp32") == 4 * adapters
    assert term(made, "optimizer state") == 6 * adapters
    assert term(made, "transformer weights, bf16, and adapters") == 2 * (PARAMETERS + adapters)
    float8 = made.setting.sizes.float8
    assert term(low, "transformer weights, e4m3 and bf16") == 2 * (PARAMETERS + adapters) - float8
    assert not any(name.startswith("e4m3 copy") for name in terms(low)), "there is no other"
    assert low.phases[1].seconds < made.phases[1].seconds
    passes = [made.phases[2].arithmetic for made in (made, whole)]
    assert passes[0] == pytest.approx(passes[1] * 3 / 4, rel=0.1), "no gradients of frozen weights; with recomputation"
    with torch.device("meta"):
        copy = FluxTransformer2DModel.from_config(flux.config)
    add_adapters(copy, LoraConfig(rank=4, targets="all"), seed=0)
    real = sum(parameter.numel() for name, parameter in copy.named_parameters() if "lora_" in name)
    assert sizes().adapters(LoraConfig(rank=4, targets="all")) == real


def test_text_cache_keeps_text_encoders_away() -> None:
    made = plan("H200", 1, "model.text_cache=somewhere")
    assert not any(name.startswith("T5") for name in terms(made))
    assert made.phases[0].seconds < plan("H200", 1).phases[0].seconds / 4


@pytest.mark.parametrize(("sharding", "shards"), [("fsdp", 16), ("hsdp", 8)])
def test_sharding_divides(sharding: Any, shards: int) -> None:
    made = plan("H100", 16, "model.checkpointing=block", sharding=sharding)
    for name, item in (("transformer weights", 2), ("gradients, fp32", 4), ("optimizer state", 6)):
        assert term(made, name) == pytest.approx(item * PARAMETERS / shards)
    block = made.setting.sizes.largest_block
    assert term(made, "gathered blocks") == (2 * 2 + 4) * block, "two blocks, and fp32 gradients of one"
    assert term(made, "weights gathered whole", "rollout") == 2 * PARAMETERS
    rollout, gradient = made.phases[1:3]
    weights, scattered = (item * PARAMETERS * (shards - 1) / shards for item in (2, 4))
    assert rollout.link_gb == pytest.approx(2 * weights / GB), "one gathering a rollout, two batches"
    assert rollout.seconds == pytest.approx(rollout.arithmetic + rollout.memory + rollout.collectives)
    summed = 2 * (1 / 2) * 4 * PARAMETERS / 8 if sharding == "hsdp" else 0
    assert gradient.link_gb == pytest.approx((2 * (2 * weights + scattered) + summed) / GB)

    blocks = plan("H100", 16, "model.checkpointing=block", "run.rollout_gather=blocks", sharding=sharding)
    assert term(blocks, "gathered blocks", "rollout") == 2 * 2 * block
    assert blocks.phases[1].link_gb == pytest.approx(2 * 25 * weights / GB), "one gathering a forward"
    assert blocks.phases[1].seconds == max(
        blocks.phases[1].arithmetic + blocks.phases[1].memory, blocks.phases[1].collectives
    )

    once = plan("H100", 16, "model.checkpointing=block", "run.reduce=update", sharding=sharding)
    assert once.phases[2].link_gb == pytest.approx((2 * 2 * weights + scattered + summed) / GB)
    assert term(once, "gradients held whole") == pytest.approx(4 * PARAMETERS * (1 - 1 / shards))
    assert term(once, "gathered blocks") == 2 * 2 * block

    low = plan(
        "H100",
        16,
        *("model.checkpointing=block", "model.precision=fp8", f"run.sharding={sharding}", "run.fp8_all_gather=true"),
        *(("run.shard_size=8",) if sharding == "hsdp" else ()),
    )
    narrow = 2 * PARAMETERS - low.setting.sizes.float8
    assert term(low, "weights gathered whole", "rollout") == narrow
    assert not any(name.startswith("e4m3 copy") for name in terms(low))
    assert low.phases[1].link_gb == pytest.approx(2 * narrow * (shards - 1) / shards / GB)

    whole = plan("H100", 16, "model.checkpointing=block", sharding="none")
    assert whole.phases[-1].link_gb == pytest.approx(2 * 15 / 16 * 4 * PARAMETERS / GB), "one all-reduce"
    assert whole.phases[1].link_gb == whole.phases[2].link_gb == 0


def test_fp8_holds_a_copy_and_saves_time() -> None:
    wide, narrow, trained = (
        plan("H20", 1, f"model.precision={p}", "model.checkpointing=block") for p in ("bf16", "fp8-rollout", "fp8")
    )
    assert term(narrow, "e4m3 copy") == narrow.setting.sizes.float8
    assert narrow.phases[1].seconds < 0.75 * wide.phases[1].seconds
    assert narrow.phases[2].seconds == wide.phases[2].seconds
    assert trained.phases[2].seconds < wide.phases[2].seconds
    old, older = (plan("A100", 1, f"model.precision={p}").phases[1] for p in ("bf16", "fp8-rollout"))
    assert older.arithmetic == pytest.approx(old.arithmetic), "no e4m3 products: the same values in bf16"


# --- time -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("gpu", "side", "overrides", "seconds"),
    [
        ("H200", 720, ("model.checkpointing=block",), 1.59),
        ("H200", 720, ("model.checkpointing=none",), 1.50),
        ("H200", 720, ("model.checkpointing=block", "model.precision=fp8-rollout"), 1.14),
        ("H200", 1024, ("model.checkpointing=block",), 3.18),
        ("H20", 720, ("model.checkpointing=block",), 8.49),
        ("H20", 720, ("model.checkpointing=none",), 7.98),
        ("H20", 720, ("model.checkpointing=block", "model.precision=fp8-rollout"), 5.72),
        ("H20", 1024, ("model.checkpointing=block",), 16.97),
    ],
)
def test_floors_of_one_official_step(gpu: str, side: int, overrides: tuple[str, ...], seconds: float) -> None:
    """The table of the project's facts: arithmetic at full rate, one image, its texts known."""
    shape = ("srpo.batch_size=1", f"srpo.height={side}", f"srpo.width={side}")
    made = plan(gpu, 1, *shape, *overrides, efficiencies=Efficiencies.floors())
    floor = sum(phase.arithmetic for phase in made.phases if phase.name in ("rollout", "gradient"))
    assert floor == pytest.approx(seconds, rel=0.03)


def test_optimizer_moves_what_its_design_says() -> None:
    once = ("srpo.batch_size=1",)
    for moments, milliseconds in (("M4", 49.8), ("M3", 44.4), ("M2", 38.9)):
        made = plan("H200", 1, *once, f"optimizer.moments={moments}", efficiencies=Efficiencies.floors())
        norm = 5.5  # gradients read once more
        assert made.phases[-1].seconds * 1e3 == pytest.approx(milliseconds + norm, rel=0.02)
    assert plan("H200", 1, "optimizer.name=torch").phases[-1].moved_gb == pytest.approx(92 * PARAMETERS / GB)


def test_published_times_are_met() -> None:
    """1024 px on H200: 128-131 ms a denoising step, 29 ms to decode (facts, section 4)."""
    made = plan("H200", 1, "srpo.height=1024", "srpo.width=1024", "srpo.batch_size=1")
    assert made.phases[1].seconds / 25 * 1e3 == pytest.approx(129.5, rel=0.04)


# --- advice ---------------------------------------------------------------------------------


@pytest.mark.parametrize("gpu", list(GPUS))
@pytest.mark.parametrize("recipe", RECIPES)
def test_every_recipe_on_every_gpu(recipe: str, gpu: str) -> None:
    algorithm = load_config(recipe).algorithm
    if algorithm != "srpo":
        with pytest.raises(InputError, match=f"plans are reckoned for algorithm srpo only, got {algorithm}"):
            plan(gpu, 1, recipe=recipe)
        return
    made = plan(gpu, 1, recipe=recipe)
    shown = str(made)
    assert made.memory.peak > 0
    assert 0 < made.seconds < 3600
    json.dumps(made.as_dict())
    if recipe == "tiny":
        assert made.memory.fits
    if made.memory.fits:
        assert made.advice is None
        assert "\nfits: " in shown
        return
    assert "\ndoes not fit: " in shown
    advice = made.advice
    assert advice is not None
    assert advice.changes
    assert str(advice.changes[0]) in shown
    # What is advised does fit, taken as overrides, and none of it can be left out.
    changes = [str(change) for change in advice.changes]
    assert plan(gpu, 1, *changes, recipe=recipe).memory.fits
    for left_out in changes:
        rest = [change for change in changes if change != left_out]
        assert not plan(gpu, 1, *rest, recipe=recipe).memory.fits
    assert advice.gpus is not None
    assert plan(gpu, advice.gpus, recipe=recipe, sharding="fsdp").memory.fits


def on(gigabytes: float, *overrides: str, count: int = 1) -> list[str]:
    """The changes advised on a GPU of so much memory."""
    gpu = replace(GPUS["H200"], memory_gb=gigabytes)
    advice = make_plan("flux-dev-hps", load_config("flux-dev-hps", overrides), gpu, count).advice
    return [] if advice is None else [str(change) for change in advice.changes]


def test_smallest_change_comes_first() -> None:
    assert on(400) == []
    peak = plan("H200", 1, "model.checkpointing=none").memory.peak / GB
    assert on(peak - 5, "model.checkpointing=none") == ["model.text_cache=text-cache"]
    cached = ("model.text_cache=somewhere", "model.checkpointing=none")
    peak = plan("H200", 1, *cached).memory.peak / GB
    assert on(peak - 5, *cached) == ["model.checkpointing=selective"]
    assert on(peak - 15, *cached) == ["model.checkpointing=block"]
    block = ("model.text_cache=somewhere", "model.checkpointing=block")
    peak = plan("H200", 1, *block).memory.peak / GB
    assert on(peak - 2, *block) == ["model.image_chunk=1"]
    assert on(peak - 2, *block, count=2) == ["model.image_chunk=1"]
    assert on(peak - 20, *block, count=2) == ["run.sharding=fsdp"]
    summed = (*block, "model.image_chunk=1", "optimizer.gradients=bf16")
    peak = plan("H200", 1, *summed).memory.peak / GB
    assert on(peak - 5, *summed) == ["optimizer.moments=M3"]
    assert on(peak - 15, *summed) == ["optimizer.moments=M2"]
    assert on(peak - 45, *summed) == ["optimizer.offload=states"]


def test_combinations_and_none() -> None:
    made = plan("H100", 1)
    assert made.advice is not None
    assert len(made.advice.changes) > 1
    assert "no single change fits" in str(made)
    assert on(20) == []
    small = make_plan("flux-dev-hps", load_config("flux-dev-hps"), replace(GPUS["H200"], memory_gb=20.0))
    assert "no combination of known changes fits" in str(small)


@pytest.mark.parametrize("precision", ["bf16", "fp8-rollout"])
def test_auto_leaves_room_for_all_that_comes_later(precision: str) -> None:
    """Gradients, states, the e4m3 copy and the image path: the first policy with which everything fits, to a gigabyte:
    `flux_policy` leaves a little more for a block that is computed again than the plan has for it."""

    def on(gigabytes: float, mode: str) -> Plan:
        options = (f"model.precision={precision}", f"model.checkpointing={mode}")
        return make_plan("r", configured("flux-dev-hps", *options), replace(GPUS["B200"], memory_gb=gigabytes))

    for mode, weaker in (("selective", "block"), ("block", "block")):
        enough = on(1000, mode).memory.peak / GB - 0.03 * 1000
        assert on(enough / 0.97 + 1, "auto").memory.policy.mode == mode
        assert on(enough / 0.97 + 1, "auto").memory.fits
        assert on(enough / 0.97 - 1, "auto").memory.policy.mode == weaker


def test_the_trainer_asks_for_the_same_room() -> None:
    config = configured("flux-dev-hps", "optimizer.gradients=bf16", "optimizer.moments=M2")
    made = make_plan("r", config, GPUS["B200"])
    names = [entry.name for entry in made.memory.terms]
    loaded = sum(entry.most for entry in made.memory.terms[: names.index("gradients, bf16")])
    capacity = 192.3 * GB
    room = activation_room(config, 1, capacity=capacity, free=capacity - loaded)
    assert room == made.memory.policy.free
    assert activation_room(config, 1, capacity=capacity, free=1e9) == 0


# --- input and output -----------------------------------------------------------------------


def test_gpus_by_name_and_by_description() -> None:
    assert parse_gpu("h200") is GPUS["H200"]
    given = parse_gpu("name=L40S,memory_gb=48,bf16_tflops=300,fp8_tflops=600,bandwidth_tb_s=0.8,link_gb_s=20")
    assert given == Gpu("L40S", 48, 300, 600, 0.8, 20, 18.75)
    assert parse_gpu("memory_gb=48,bf16_tflops=300,bandwidth_tb_s=0.8").fp8_tflops == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--gpu", "H2000"], "unknown GPU 'H2000'; nearest: H200"),
        (["--gpu", "memry_gb=80"], "unknown key 'memry_gb'; did you mean 'memory_gb'?"),
        (["--gpu", "memory_gb=80"], "bf16_tflops, bandwidth_tb_s missing"),
        (["--gpu", "memory_gb=-1,bf16_tflops=1,bandwidth_tb_s=1"], "memory_gb must be a positive number, got '-1'"),
        (["--gpu", "memory_gb=x,bf16_tflops=1,bandwidth_tb_s=1"], "memory_gb must be a positive number, got 'x'"),
        (["--gpu", "H20", "--count", "0"], "--count must be at least 1, got 0"),
        (["--gpu", "H20", "--count", "5"], "srpo.batch_size (32) must be a multiple of ranks"),
        (["--gpu", "H20", "srpo.height=721"], "height must be a positive multiple of 16"),
        (["--gpu", "H20", "srpo.hieght=720"], "did you mean 'srpo.height'?"),
        (["--gpu", "H20", "reward.architecture=ViT-Q"], "'ViT-Q' is not an open_clip model name"),
        (["--gpu", "H20", "reward.architecture=RN50"], "knows ViT rewards only"),
        (["--gpu", "H20", "--json", "/nowhere/plan.json"], "/nowhere/plan.json cannot be written"),
    ],
)
def test_bad_input_is_one_line(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "flux-dev-hps", *arguments]) == 2
    printed = capsys.readouterr().err
    assert message in printed
    assert printed.count("\n") == 1


def test_incomplete_model_directory_and_wrong_sharding(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"transformer/config\.json is missing"):
        plan("H20", 1, f"model.path={tmp_path}")
    with pytest.raises(InputError, match="hsdp needs whole nodes of 8 GPUs, got 12"):
        plan("H20", 12, "srpo.batch_size=12", sharding="hsdp")
    with pytest.raises(InputError, match="must be one of none, fsdp, hsdp"):
        plan("H20", 2, sharding="zero")


def test_command_prints_tables_and_writes_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "plan.json"
    options = ["--gpu", "H200", "--count", "8", "--json", str(out), "--results", str(tmp_path)]
    assert main(["plan", "flux-dev-hps", *options, "model.checkpointing=block"]) == 0
    printed = capsys.readouterr().out
    for expected in (
        "flux-dev-hps on 8 x H200",
        "model data/FLUX.1-dev does not exist: reckoned with the sizes of FLUX.1-dev",
        "transformer weights, bf16",
        "linear       0.85",
        "nothing measured on H200 yet",
        "clean batches: 4 of 1",
    ):
        assert expected in printed
    written = json.loads(out.read_text())
    assert written["parameters"] == PARAMETERS
    assert written["count"] == 8
    assert written["seconds"] == pytest.approx(sum(phase["seconds"] for phase in written["phases"]))
    total = sum(entry["gradient"] for entry in written["memory"]["terms"])
    assert written["memory"]["totals"]["gradient"] == pytest.approx(total)


def test_measurements_stand_beside_estimates(tmp_path: Path) -> None:
    flops = sizes().forward.total
    measured = {
        "device": {"name": "NVIDIA H200"},
        "ceilings": {"copy_gb_s": 4100.0},
        "measurements": [
            row("transformer, patched eager", "forward", 60.0, flops),
            row("transformer, patched eager", "forward+backward", 200.0, 3 * flops),
            row("transformer, unpatched eager", "forward", 80.0, flops),
            row("fp8, patched eager", "rollout of 25", 1200.0, 25 * flops),
            row("fp8, patched eager", "forward", None, flops),
            row("quantising all weights", "refresh", 9.0),
            row("decoder, patched eager, 2 x 1024 px", "forward", 58.0),
            row("ViT-H-14, frozen bf16, batch 2", "forward+backward", 4.0),
        ],
    }
    for device, file in (("NVIDIA H200", "nvidia-h200"), ("NVIDIA H100 80GB HBM3", "nvidia-h100")):
        (tmp_path / f"{file}-1.json").write_text(json.dumps({**measured, "device": {"name": device}}))
    (tmp_path / "broken.json").write_text("{")
    (tmp_path / "solvers.json").write_text("[]")
    made = plan("H200", 1, results=tmp_path)
    assert {comparison.file for comparison in made.comparisons} == {"nvidia-h200-1.json"}
    found = {comparison.what: comparison for comparison in made.comparisons}
    assert len(found) == 6
    assert found["copy bandwidth"].measured == 4.1
    forward = found["transformer, patched eager, forward"]
    per_step = plan("H200", 1, "srpo.batch_size=1").phases[1].seconds / 25 * 1e3
    assert forward.estimate == pytest.approx(per_step, rel=1e-6)
    assert found["transformer, patched eager, forward+backward"].estimate == pytest.approx(3 * forward.estimate)
    assert found["fp8, patched eager, rollout of 25"].estimate < 25 * forward.estimate
    assert found["decoder, patched eager, 2 x 1024 px, forward"].estimate == pytest.approx(2 * 29, rel=0.1)
    lines = [line for line in str(made).splitlines() if "transformer, patched eager, forward " in line]
    assert lines[0].split()[-4:] == [f"{forward.estimate:.2f}", "60.00", f"{forward.estimate / 60:.2f}", "ms"]


def row(name: str, mode: str, milliseconds: float | None, flops: float | None = None) -> dict[str, Any]:
    """A measurement as `benchmarks.schema` writes it, as far as it is read; of None, one that was skipped."""
    status = "skipped" if milliseconds is None else "ok"
    processes = [] if milliseconds is None else [{"median": milliseconds}]
    return {"name": name, "mode": mode, "status": status, "flops": flops, "processes": processes}


def test_text_tower_of_a_reward_with_a_cache_leaves_the_gpu() -> None:
    block = "model.checkpointing=block"
    before, after = plan("H200", 1, block).memory, plan("H200", 1, block, "reward.text_cache=texts").memory
    [tower] = [term for term in before.terms if "text tower" in term.name]
    assert tower.most > 1e9  # ViT-H-14's, in fp32
    assert not [term for term in after.terms if "text tower" in term.name]
    assert before.peak - after.peak == pytest.approx(tower.most)
