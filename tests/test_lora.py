"""LoRA runs: what is trained and kept, resumption, ranks, exports that others and we read back."""

from __future__ import annotations

import inspect
import json
import shutil
import sys
from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from diffusers import FluxPipeline, FluxTransformer2DModel
from diffusers.loaders import lora_conversion_utils, lora_pipeline
from helpers import quick_config, state_of
from safetensors.torch import load_file, save_file
from test_export import TINY, assert_same, pixels, read_by_diffusers
from torch import Tensor

from srpo.checkpoint import load_weights
from srpo.cli import main
from srpo.config import dump_config, load_config
from srpo.digests import weights_fingerprint
from srpo.errors import InputError
from srpo.export import export_run
from srpo.lora import LoraConfig, add_adapters, merge
from srpo.lora_file import LORA_NAME, from_kohya, to_kohya
from srpo.models import Flux
from srpo.runlog import read_log
from srpo.samples import load_flux, open_source
from srpo.single_file import single_file_metadata
from srpo.trainer import Trainer

CONVERT = lora_conversion_utils._convert_kohya_flux_lora_to_diffusers
RANK = "model.lora={rank: 4, alpha: 8}"
WIDTH = 96  # of the tiny model


def train(directory: Path, *overrides: str, updates: int = 2, resume: bool = False) -> Trainer:
    trainer = Trainer(quick_config(directory, f"srpo.updates={updates}", RANK, *overrides), resume=resume)
    trainer.fit()
    return trainer


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two updates at a rate that moves pixels, of attention and MLP."""
    directory = tmp_path_factory.mktemp("lora") / "run"
    train(directory, "model.lora.targets=attention+mlp", "srpo.learning_rate=3e-3", "run.sample_steps=2")
    return directory


def adapters(run: Path, step: int = 2) -> dict[str, Tensor]:
    return load_weights(run / f"checkpoints/step-{step:06d}")


def base_weights() -> dict[str, Tensor]:
    return load_file(TINY / "transformer/diffusion_pytorch_model.safetensors")


# --- the recipe -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("model.lora.rnk=8", "unknown key 'model.lora.rnk': did you mean 'model.lora.rank'?"),
        ("model.lora.rank=0", "model.lora.rank must be at least 1, got 0"),
        ("model.lora.alpha=-1", r"model.lora.alpha must be positive or null \(rank\), got -1.0"),
        (
            "model.lora.targets=atention",
            "must be attention, attention.mlp, all or a list .* got 'atention'; did you mean",
        ),
        ("model.lora.targets=[]", "model.lora.targets must name at least one layer"),
        ("model.lora.targets=[attn.to_qq]", r"'attn.to_qq' is the end of no layer's name; did you mean 'attn.to_q'\?"),
        ("model.lora.targets=[x_embedder]", "'x_embedder' is the end of no layer's name"),  # of no block
        (
            "optimizer.name=torch",
            "model.lora with model.precision bf16 trains bf16 adapters: optimizer.name must be srpo",
        ),
    ],
)
def test_settings_that_do_not_fit(setting: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        load_config("tiny", ["model.precision=bf16", "model.lora.rank=4", setting])


def test_recipe_keeps_what_was_set(tmp_path: Path) -> None:
    config = load_config("tiny", ["model.lora.targets=[to_q, transformer_blocks.0.ff.net.2]"])
    (tmp_path / "recipe.yaml").write_text(dump_config(config))
    assert load_config(tmp_path / "recipe.yaml") == config
    assert config.model.lora == LoraConfig(16, None, ("to_q", "transformer_blocks.0.ff.net.2"))
    assert config.model.lora.scale == 1
    assert LoraConfig(4, 6).scale == 1.5


@pytest.mark.parametrize(
    ("targets", "double", "single"),
    [
        ("attention", 8, 3),
        ("attention+mlp", 12, 5),
        ("all", 14, 6),
        (("to_q", "proj_out", "transformer_blocks.1.ff.net.2"), 1, 2),
    ],
)
def test_targets_of_flux_dev(targets: Any, double: int, single: int) -> None:
    """Linear layers of blocks, and of no other part: proj_out is also the name of the last layer."""
    with torch.device("meta"):
        transformer = FluxTransformer2DModel(guidance_embeds=True)
    layers = LoraConfig(targets=targets).layers(transformer)
    named = isinstance(targets, tuple)
    assert len([name for name in layers if name.startswith("transformer_blocks.")]) == 19 * double + named
    assert len([name for name in layers if name.startswith("single_transformer_blocks.")]) == 38 * single
    assert len(layers) == 19 * double + 38 * single + named
    linear = {name for name, module in transformer.named_modules() if isinstance(module, torch.nn.Linear)}
    assert set(layers) <= linear
    if targets == "all":
        assert len(linear - set(layers)) == 10


def test_layer_of_a_block_that_is_not_there() -> None:
    with pytest.raises(InputError, match=r"no layer whose name ends in transformer_blocks\.9\.attn\.to_q"):
        Flux.load(TINY, lora=LoraConfig(targets=("to_k", "transformer_blocks.9.attn.to_q")), max_sequence_length=16)


def test_peft_that_is_not_installed_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(InputError, match=r"model\.lora needs peft \(pip install 'srpo-kernels\[lora\]'\)"):
        add_adapters(torch.nn.Linear(1, 1), LoraConfig(), 0)


def test_adapters_start_from_the_seed_and_change_nothing() -> None:
    def loaded(seed: int, targets: str = "attention") -> dict[str, Tensor]:
        torch.manual_seed(seed + 7)  # must not matter
        lora = LoraConfig(4, targets=targets)
        return dict(Flux.load(TINY, lora=lora, seed=seed, max_sequence_length=16).trainable())

    found, more = loaded(0), loaded(0, "all")
    plain = FluxTransformer2DModel.from_config(FluxTransformer2DModel.load_config(TINY / "transformer"))
    assert {name.partition(".lora_")[0] for name in more} == set(LoraConfig(targets="all").layers(plain))
    assert len(more) > len(found)
    assert all(torch.equal(tensor, more[name]) for name, tensor in found.items())
    other = loaded(1)
    for name, tensor in found.items():
        if "lora_B" in name:
            assert not tensor.any()
        else:
            assert not torch.equal(tensor, other[name])
            assert tensor.abs().max() <= tensor.shape[1] ** -0.5
            assert tensor.std() == pytest.approx((3 * tensor.shape[1]) ** -0.5, rel=0.15)


# --- training ---------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp8-rollout", "fp8"])
def test_only_adapters_learn(precision: str, tmp_path: Path) -> None:
    """Under every policy of what blocks keep for backward; with fp8 over a base in e4m3, emulated here."""
    policy = {"fp32": "none", "bf16": "block"}.get(precision, "selective")
    settings = [f"model.precision={precision}", f"model.checkpointing={policy}", "model.lora.targets=all"]
    trainer = Trainer(quick_config(tmp_path, RANK, *settings, "srpo.updates=2", "srpo.learning_rate=1e-3"))
    before = {name: parameter.clone() for name, parameter in trainer.flux.transformer.named_parameters()}
    kept = torch.float32 if precision == "fp32" else torch.bfloat16
    own = {tensor.dtype for name, tensor in before.items() if ".lora_" not in name}
    assert own == ({kept, torch.uint8} if precision == "fp8" else {kept})
    batch = trainer.batches.load(0, 0, lambda: None)
    start = trainer.update.draw(0, "0/0", batch).loss.item()
    trainer.fit()
    after = dict(trainer.flux.transformer.named_parameters())
    moved = {name for name, tensor in before.items() if not torch.equal(after[name], tensor)}
    assert moved == {name for name in after if ".lora_" in name}
    assert all((parameter.grad is None) == (".lora_" not in name) for name, parameter in after.items())
    assert {parameter.dtype for parameter in trainer.parameters} == {kept}
    assert trainer.update.draw(0, "0/0", batch).loss < start
    assert adapters(tmp_path).keys() == set(trainer.names)
    files = (tmp_path / "checkpoints/step-000002").iterdir()
    assert sum(file.stat().st_size for file in files) < sum(tensor.nbytes for tensor in before.values())


def test_resumed_run_is_bitwise_the_uninterrupted_one(tmp_path: Path) -> None:
    changes = ("model.precision=fp8", "srpo.learning_rate=1e-3")
    train(tmp_path / "whole", *changes, updates=2)
    train(tmp_path / "parts", *changes, updates=1)
    resumed = train(tmp_path / "parts", *changes, updates=2, resume=True).flux
    assert state_of(tmp_path / "whole", 2) == state_of(tmp_path / "parts", 2)
    assert read_log(tmp_path / "whole")[1]["losses"] == read_log(tmp_path / "parts")[1]["losses"]
    resumed.unpatch()
    assert torch.equal(velocity(load_flux(open_source(tmp_path / "parts")).transformer), velocity(resumed.transformer))


def test_adapters_belong_to_their_settings_and_base(tmp_path: Path) -> None:
    base = tmp_path / "base"
    shutil.copytree(TINY, base)
    changes = (f"model.path={json.dumps(str(base))}", "run.sample_steps=1")
    train(tmp_path / "run", *changes, updates=1)
    with pytest.raises(InputError, match=r"another config: model\.lora was \{.*'rank': 4.*\}, is \{.*'rank': 8"):
        train(tmp_path / "run", *changes, "model.lora.rank=8", resume=True)
    export_run(tmp_path / "run", tmp_path / "lora", layout="lora")
    assert len(pixels(tmp_path / "lora", tmp_path / "images", "--model", str(TINY))) == 2  # a copy is as good

    weights = base / "transformer/diffusion_pytorch_model.safetensors"
    FluxTransformer2DModel.from_config(FluxTransformer2DModel.load_config(TINY / "transformer")).save_pretrained(
        base / "transformer"
    )
    assert weights.is_file()
    refusals = (
        lambda: train(tmp_path / "run", *changes, updates=2, resume=True),
        lambda: export_run(tmp_path / "run", tmp_path / "merged"),
        lambda: load_flux(open_source(tmp_path / "run")),
        lambda: load_flux(open_source(tmp_path / "lora")),
    )
    for refusal in refusals:
        with pytest.raises(InputError, match=r"holds adapters for other weights than those of .*base \(fingerprint"):
            refusal()
    (tmp_path / "run/base.json").unlink()
    with pytest.raises(InputError, match=r"run .* does not say which base model its adapters are for"):
        export_run(tmp_path / "run", tmp_path / "merged")


def test_fingerprint_is_of_values_however_files_are_split(tmp_path: Path) -> None:
    state = base_weights()
    save_file(state, tmp_path / "one.safetensors", metadata={"format": "pt"})
    names = sorted(state)
    for part, file in ((names[::2], "a"), (names[1::2], "b")):
        save_file({name: state[name] for name in part}, tmp_path / f"{file}.safetensors")
    whole = weights_fingerprint([tmp_path / "one.safetensors"])
    assert weights_fingerprint([tmp_path / "b.safetensors", tmp_path / "a.safetensors"]) == whole
    state["proj_out.bias"][0] += 1
    save_file(state, tmp_path / "other.safetensors")
    assert weights_fingerprint([tmp_path / "other.safetensors"]) != whole
    (tmp_path / "broken.safetensors").write_bytes(b"no safetensors file, but long enough")
    with pytest.raises(ValueError, match=r"broken\.safetensors is not a safetensors file"):
        weights_fingerprint([tmp_path / "broken.safetensors"])


# --- layouts ----------------------------------------------------------------------------------


def random_adapters(targets: Any, rank: int = 2, width: int = 3072) -> tuple[dict[str, Tensor], dict[str, int]]:
    """Adapters for one double and two single blocks of that width, and how many rows each layer has."""
    with torch.device("meta"):
        model = FluxTransformer2DModel(num_layers=1, num_single_layers=2, num_attention_heads=width // 128)
    random = torch.Generator().manual_seed(0)
    found = {}
    for name in LoraConfig(targets=targets).layers(model):
        rows, columns = model.get_submodule(name).weight.shape
        found[f"{name}.lora_A.weight"] = torch.randn(rank, columns, generator=random)
        found[f"{name}.lora_B.weight"] = torch.randn(rows, rank, generator=random)
    return found, {name.removesuffix(".weight"): len(tensor) for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize("targets", ["attention", "all", ("to_q", "add_v_proj", "ff.net.2")])
def test_diffusers_own_reader_takes_stacks_apart(targets: Any) -> None:
    """At FLUX.1's width, the only one it knows. It multiplies A by alpha / rank, here a power of two."""
    found, rows = random_adapters(targets)
    written, _ = to_kohya(found, LoraConfig(2, 4), rows)
    back, scale = from_kohya(written)
    assert scale == 2
    assert_same(back, found)
    read = CONVERT(dict(written))
    for name, tensor in found.items():
        assert torch.equal(read.pop(f"transformer.{name}"), tensor * 2 if "lora_A" in name else tensor), name
    assert not any(tensor.any() for tensor in read.values())  # the stacks' layers without an adapter


def test_stacks_are_the_product_of_every_layer_in_its_rows() -> None:
    """Said again by hand, with an alpha that is no multiple of the rank."""
    found, rows = random_adapters("attention+mlp", width=256)
    written, _ = to_kohya(found, LoraConfig(2, 3), rows)
    name = "lora_unet_single_blocks_1_linear1"
    down, up, alpha = (written[f"{name}.{part}"] for part in ("lora_down.weight", "lora_up.weight", "alpha"))
    assert (tuple(down.shape), tuple(up.shape), alpha.item() / len(down)) == ((8, 256), (7 * 256, 8), 1.5)
    product, first = up @ down, 0
    for part in ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"):
        layer = f"single_transformer_blocks.1.{part}"
        wanted = found[f"{layer}.lora_B.weight"] @ found[f"{layer}.lora_A.weight"]
        here = product[first : first + len(wanted)]
        # Zeros add nothing: what differs is the order of two products' sum.
        assert ((here - wanted).abs() <= 2**-22 * (up.abs() @ down.abs())[first : first + len(wanted)]).all()
        first += len(wanted)
    assert first == len(up)


def test_what_is_no_stack_of_ours_is_refused() -> None:
    found, rows = random_adapters("attention", width=256)
    written, _ = to_kohya(found, LoraConfig(2), rows)
    shared = {name: tensor.clone() for name, tensor in written.items()}
    shared["lora_unet_double_blocks_0_img_attn_qkv.lora_up.weight"] += 1
    with pytest.raises(ValueError, match="lora_unet_double_blocks_0_img_attn_qkv is one adapter for several layers"):
        from_kohya(shared)
    with pytest.raises(ValueError, match=r"lora_te1_q\.alpha has no place"):
        from_kohya({**written, "lora_te1_q.alpha": torch.tensor(1.0)})
    with pytest.raises(ValueError, match="adapters do not count alike"):
        from_kohya({**written, "lora_unet_double_blocks_0_img_attn_proj.alpha": torch.tensor(1.0)})
    with pytest.raises(ValueError, match="the adapter of x_embedder has no place in a file for ComfyUI"):
        to_kohya({**found, "x_embedder.lora_A.weight": torch.ones(2, 4)}, LoraConfig(2), rows)


# --- exports ----------------------------------------------------------------------------------


def inputs(dtype: torch.dtype) -> dict[str, Any]:
    random = torch.Generator().manual_seed(3)
    normal = lambda *shape: torch.randn(*shape, generator=random).to(dtype)  # noqa: E731
    return dict(
        hidden_states=normal(2, 16, 16),
        encoder_hidden_states=normal(2, 16, 64),
        pooled_projections=normal(2, 64),
        timestep=torch.tensor([0.25, 0.75], dtype=dtype),
        guidance=torch.full((2,), 3.5, dtype=dtype),
        img_ids=torch.zeros(16, 3),
        txt_ids=torch.zeros(16, 3),
        return_dict=False,
    )


@torch.no_grad()
def velocity(transformer: Any) -> Tensor:
    return transformer(**inputs(transformer.dtype))[0]


@pytest.mark.parametrize("layout", ["lora", "lora-comfyui"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_plain_diffusers_reads_adapters_bit_for_bit(
    layout: str, precision: str, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if precision == "bf16":
        run = tmp_path / "run"
        train(run, "model.precision=bf16", "srpo.learning_rate=3e-3", updates=1)
    out = tmp_path / ("tuned.safetensors" if "comfyui" in layout else "tuned")
    assert main(["export", str(run), "--format", layout, "--out", str(out)]) == 0
    if "comfyui" in layout:
        source = inspect.getsource(CONVERT)
        wide = "dims=[3072, 3072, 3072, 12288]"
        assert source.count(wide) == 1
        namespace = dict(vars(lora_conversion_utils))
        exec(source.replace(wide, f"dims={[WIDTH, WIDTH, WIDTH, 4 * WIDTH]}"), namespace)
        monkeypatch.setattr(lora_pipeline, CONVERT.__name__, namespace[CONVERT.__name__])
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[precision]
    pipeline = FluxPipeline.from_pretrained(TINY, torch_dtype=dtype, local_files_only=True)
    plain = velocity(pipeline.transformer)
    pipeline.load_lora_weights(str(out), local_files_only=True)
    trained = load_flux(open_source(run))
    assert torch.equal(velocity(pipeline.transformer), velocity(trained.transformer))
    assert not torch.equal(velocity(trained.transformer), plain)
    assert_same(dict(load_flux(open_source(out)).trainable()), dict(trained.trainable()))


def test_adapters_sample_as_their_run_does(run: Path, tmp_path: Path) -> None:
    export_run(run, tmp_path / "tuned", layout="lora")
    export_run(run, tmp_path / "tuned.safetensors", layout="lora-comfyui")
    wanted = pixels(run, tmp_path / "of-run")
    assert (wanted != pixels(run, tmp_path / "of-base", "--step", "0")).any()
    assert (wanted == pixels(tmp_path / "tuned", tmp_path / "of-directory", "--model", str(TINY))).all()
    assert (wanted == pixels(tmp_path / "tuned.safetensors", tmp_path / "of-file")).all()


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_merged_exports_are_base_plus_product(
    dtype: str, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with nullcontext() if dtype == "fp32" else pytest.warns(UserWarning, match=r"to bf16 does \d+% as much"):
        export_run(run, tmp_path / "pipeline", dtype=dtype)  # type: ignore[arg-type]
        export_run(run, tmp_path / "tuned.safetensors", layout="comfyui", dtype=dtype)  # type: ignore[arg-type]
    kind, half_step = {"fp32": (torch.float32, 2**-24), "bf16": (torch.bfloat16, 2**-8)}[dtype]
    pipeline = FluxPipeline.from_pretrained(tmp_path / "pipeline", torch_dtype=kind, local_files_only=True)
    found = pipeline.transformer.state_dict()
    assert_same(read_by_diffusers(monkeypatch, tmp_path / "tuned.safetensors", TINY, kind), found)
    trained = adapters(run)
    layers = {name.partition(".lora_")[0] for name in trained}
    for name, tensor in base_weights().items():
        layer = name.removesuffix(".weight")
        if layer not in layers or not name.endswith(".weight"):
            assert torch.equal(found[name], tensor.to(kind))
            continue
        down, up = (trained[f"{layer}.lora_{which}.weight"].double() for which in "AB")
        exact, terms = tensor.double() + 2 * (up @ down), tensor.double().abs() + 2 * (up.abs() @ down.abs())
        # One rounding to what is stored, and in fp32 one for each of four products and of six sums.
        assert ((found[name] - exact).abs() <= half_step * exact.abs() + 10 * 2**-24 * terms).all(), name
        assert not torch.equal(found[name], tensor.to(kind))
    if dtype == "fp32":  # a pixel between two levels may fall to the other side
        wanted = pixels(run, tmp_path / "of-run").astype(int)
        assert abs(pixels(tmp_path / "pipeline", tmp_path / "of-pipeline") - wanted).max() <= 1
        file = pixels(tmp_path / "tuned.safetensors", tmp_path / "of-file")
        assert abs(file - wanted).max() <= 1


def test_merging_names_what_does_not_fit() -> None:
    base = {"a.weight": torch.ones(3, 2)}
    fitting = {"a.lora_A.weight": torch.ones(1, 2), "a.lora_B.weight": torch.ones(3, 1)}
    weights, rounding = merge(base, fitting, 0.5, torch.float32)
    assert torch.equal(weights["a.weight"], torch.full((3, 2), 1.5))
    assert rounding == 0
    weights, rounding = merge(base, fitting, 2**-10, torch.bfloat16)  # less than bf16 can add to one
    assert torch.equal(weights["a.weight"], base["a.weight"].bfloat16())
    assert rounding == 1
    wrong: list[Mapping[str, Tensor]] = [
        {**fitting, "b.lora_A.weight": torch.ones(1, 2)},
        {"a.lora_A.weight": torch.ones(1, 2)},
        {**fitting, "a.lora_B.weight": torch.ones(4, 1)},
    ]
    for found in wrong:
        with pytest.raises(ValueError, match=r"the adapter of [ab] does not fit"):
            merge(base, found, 1, torch.float32)


def test_header_and_card_say_what_adapters_are(run: Path, tmp_path: Path) -> None:
    export_run(run, tmp_path / "tuned", layout="lora", dtype="bf16")
    header = single_file_metadata(tmp_path / "tuned" / LORA_NAME)
    assert header["modelspec.architecture"] == "flux-1-other/lora"
    assert header["srpo.lora"] == "rank 4, alpha 8, on attention+mlp"
    assert header["srpo.base"] == json.loads((run / "base.json").read_text())["transformer"]
    card = (tmp_path / "tuned/README.md").read_text()
    front = yaml.safe_load(card.split("---\n")[1])
    assert (front["base_model_relation"], front["tags"]) == ("adapter", ["srpo", "lora"])
    assert "LoRA adapters (rank 4, alpha 8, on attention+mlp) for the base model's transformer" in card
    assert "after 2 updates, in bf16" in card
    assert yaml.safe_load((tmp_path / "tuned/recipe.yaml").read_text())["model"]["lora"]["rank"] == 4
    with pytest.warns(UserWarning, match="to bf16 does"):
        export_run(run, tmp_path / "merged.safetensors", layout="comfyui", dtype="fp8")
    assert "with LoRA adapters (rank 4, alpha 8, on attention+mlp) merged in" in (tmp_path / "merged.md").read_text()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--format", "lora", "--dtype", "fp8"], "--dtype fp8 is for --format comfyui"),
        (["--format", "lora", "--shard-size", "1"], "--shard-size is for --format diffusers"),
        (["--format", "lora-comfyui"], "tuned must end in .safetensors with --format lora-comfyui"),
    ],
)
def test_arguments_that_do_not_fit(
    arguments: list[str], message: str, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["export", str(run), "--out", str(tmp_path / "tuned"), *arguments]) == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_adapters_of_another_scale_or_of_no_lora_run_are_refused(run: Path, tmp_path: Path) -> None:
    export_run(run, tmp_path / "tuned.safetensors", layout="lora-comfyui")
    source = open_source(tmp_path / "tuned.safetensors", overrides=["model.lora.alpha=4"])
    with pytest.raises(InputError, match=r"counts adapters 2 times, but model\.lora says 1 times"):
        load_flux(source)
    Trainer(quick_config(tmp_path / "whole", "srpo.updates=1")).fit()
    with pytest.raises(InputError, match=r"--format lora is for LoRA runs; .*whole trained the whole transformer"):
        export_run(tmp_path / "whole", tmp_path / "lora", layout="lora")
