"""Exports: read back to the same bits and pixels, by others and by ourselves, and what they say about themselves."""

from __future__ import annotations

import hashlib
import inspect
import json
import re
import shutil
from collections import namedtuple
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from diffusers import FluxPipeline, FluxTransformer2DModel
from diffusers.loaders import single_file_model, single_file_utils
from helpers import quick_config
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

from srpo import single_file
from srpo.checkpoint import Checkpoints
from srpo.cli import main
from srpo.config import dump_config
from srpo.errors import InputError
from srpo.export import export_run
from srpo.rundir import write_config
from srpo.runlog import RunLog
from srpo.samples import load_flux, open_source
from srpo.single_file import (
    from_bfl,
    quantize,
    read_single_file,
    single_file_metadata,
    stored_bytes,
    to_bfl,
    write_single_file,
)

TINY = Path(single_file.__file__).parent / "tiny/assets/pipeline"
CONVERT = single_file_utils.convert_flux_transformer_checkpoint_to_diffusers


def tuned_run(directory: Path, model: Path | str, *overrides: str, steps: tuple[int, ...] = (1, 2)) -> Path:
    """A run directory as training leaves it, of a model whose every weight has moved."""
    settings = ["run.sample_steps=2", "run.micro_batch=2", f"model.path={json.dumps(str(model))}"]
    config = quick_config(directory, *settings, *overrides)
    write_config(directory, config)
    transformer = TINY if model == "tiny" else Path(model)
    state = load_file(transformer / "transformer/diffusion_pytorch_model.safetensors")
    random = torch.Generator().manual_seed(0)
    log = RunLog(directory, start=0, total=len(steps), tensorboard=False)
    for step in steps:
        state = {name: t + 0.02 * torch.randn(t.shape, generator=random) for name, t in state.items()}
        Checkpoints(directory / "checkpoints", len(steps)).save(step, state, dump_config(config))
        losses, scores = {"total": 1.0 / step, "denoise": 0.5 / step}, {"denoise": 0.1 * step}
        log.update(step, {"losses": losses, "scores": scores, "grad_norm": 3.0, "seconds": {"rollout": 1.0}})
    log.close()
    return directory


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tuned_run(tmp_path_factory.mktemp("runs") / "run", "tiny")


def checkpoint(run: Path, step: int = 2) -> dict[str, Tensor]:
    return load_file(run / f"checkpoints/step-{step:06d}/transformer.safetensors")


def pixels(source: str | Path, out: Path, *options: str) -> np.ndarray:
    arguments = ["sample", str(source), "--prompt", "digit three", "--prompt", "digit nine", "--out", str(out)]
    assert main([*arguments, *options]) == 0
    return np.stack([np.array(Image.open(out / f"{index:05d}.png")) for index in range(2)])


def read_by_diffusers(
    monkeypatch: pytest.MonkeyPatch, file: Path, model: Path, dtype: torch.dtype
) -> dict[str, Tensor]:
    """What `from_single_file` reads, offline. It knows only FLUX.1's width, so it is told this model's."""
    config = json.loads((model / "transformer/config.json").read_text())
    width = config["attention_head_dim"] * config["num_attention_heads"]
    source = inspect.getsource(CONVERT)
    assert source.count("inner_dim = 3072") == 1
    namespace: dict[str, Any] = dict(vars(single_file_utils))
    exec(source.replace("inner_dim = 3072", f"inner_dim = {width}"), namespace)
    leftovers: list[str] = []

    def convert(checkpoint: dict[str, Tensor], **kwargs: Any) -> dict[str, Tensor]:
        converted = namespace[CONVERT.__name__](checkpoint, **kwargs)
        leftovers.extend(checkpoint)  # what the reader did not take
        return converted

    entry = single_file_model.SINGLE_FILE_LOADABLE_CLASSES["FluxTransformer2DModel"]
    monkeypatch.setitem(entry, "checkpoint_mapping_fn", convert)
    loaded = FluxTransformer2DModel.from_single_file(
        str(file), config=str(model), subfolder="transformer", torch_dtype=dtype, local_files_only=True
    )
    assert leftovers == []
    return loaded.state_dict()


def assert_same(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert found[name].dtype == tensor.dtype, name
        assert torch.equal(found[name], tensor), name


def columns(double: int, single: int, *, guidance: bool, width: int = 3072) -> dict[str, Tensor]:
    """The state of a FLUX transformer of any width whose matrices have one column: the layout moves rows only."""
    with torch.device("meta"):
        model = FluxTransformer2DModel(
            num_layers=double,
            num_single_layers=single,
            num_attention_heads=width // 128,
            guidance_embeds=guidance,
        )
    random = torch.Generator().manual_seed(0)
    return {
        name: torch.randn(t.shape[0], *[1] * (t.ndim - 1), generator=random) for name, t in model.state_dict().items()
    }


# --- the layout -------------------------------------------------------------------------------


@pytest.mark.parametrize(("double", "single", "guidance"), [(19, 38, True), (19, 38, False), (1, 3, True)])
def test_diffusers_own_reader_gives_back_every_bit_at_the_width_of_flux(
    double: int, single: int, guidance: bool
) -> None:
    state = columns(double, single, guidance=guidance)
    written = to_bfl(state)
    taken = dict(written)
    assert_same(CONVERT(taken), state)
    assert not taken, "the reader left something over"
    assert_same(from_bfl(written), state)


@pytest.mark.parametrize(("double", "single"), [(0, 2), (2, 0), (0, 0), (11, 12)])
def test_any_number_of_blocks(double: int, single: int) -> None:
    state = columns(double, single, guidance=False, width=256)
    written = to_bfl(state)
    assert len([name for name in written if name.endswith("qkv.weight")]) == 2 * double
    assert len([name for name in written if name.endswith("linear1.weight")]) == single
    assert_same(from_bfl(written), state)


def test_layout_against_its_description() -> None:
    """Fused tensors and the swap, said again by hand."""
    state = columns(1, 1, guidance=True, width=256)
    written = to_bfl(state)
    single = [state[f"single_transformer_blocks.0.{name}.weight"] for name in ("attn.to_q", "attn.to_k", "attn.to_v")]
    mlp = state["single_transformer_blocks.0.proj_mlp.weight"]
    assert torch.equal(written["single_blocks.0.linear1.weight"], torch.cat([*single, mlp]))
    text = [state[f"transformer_blocks.0.attn.add_{name}_proj.bias"] for name in "qkv"]
    assert torch.equal(written["double_blocks.0.txt_attn.qkv.bias"], torch.cat(text))
    scale, shift = state["norm_out.linear.weight"].chunk(2)
    assert torch.equal(written["final_layer.adaLN_modulation.1.weight"], torch.cat([shift, scale]))
    assert torch.equal(
        written["single_blocks.0.norm.key_norm.scale"], state["single_transformer_blocks.0.attn.norm_k.weight"]
    )


def test_names_that_are_missing_or_have_no_place_are_told() -> None:
    state = columns(1, 1, guidance=True, width=256)
    with pytest.raises(ValueError, match=r"^adapter\.weight has no place$"):
        to_bfl({**state, "adapter.weight": torch.zeros(1)})
    gone = {name: t for name, t in state.items() if "attn.to_k" not in name}
    with pytest.raises(ValueError, match=r"^single_transformer_blocks\.0\.attn\.to_k\.bias \(and 3 more\) is missing$"):
        to_bfl(gone)
    with pytest.raises(ValueError, match=r"^img_in\.bias is missing$"):
        from_bfl({name: t for name, t in to_bfl(state).items() if name != "img_in.bias"})


@pytest.mark.slow
def test_unmodified_from_single_file_at_the_width_of_flux(tmp_path: Path) -> None:
    changes = dict(num_layers=1, num_single_layers=1, joint_attention_dim=32, pooled_projection_dim=32)
    with torch.device("meta"):
        model = FluxTransformer2DModel(guidance_embeds=True, **changes)
    model.save_config(tmp_path / "model/transformer")
    random = torch.Generator().manual_seed(0)
    state = {
        name: torch.randint(-1000, 1000, t.shape, generator=random, dtype=torch.int16).view(torch.bfloat16)
        for name, t in model.state_dict().items()
    }
    write_single_file(tmp_path / "one.safetensors", state, "bf16", {})
    loaded = FluxTransformer2DModel.from_single_file(
        str(tmp_path / "one.safetensors"),
        config=str(tmp_path / "model"),
        subfolder="transformer",
        torch_dtype=torch.bfloat16,
        local_files_only=True,
    ).state_dict()
    assert loaded.keys() == state.keys()
    assert all(torch.equal(loaded[name].view(torch.int16), t.view(torch.int16)) for name, t in state.items())


# --- one file ---------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("which", ["tiny", "flux_shaped"])
def test_from_single_file_reads_every_bit(
    which: str, dtype: str, flux_shaped: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = TINY if which == "tiny" else flux_shaped
    run = tuned_run(tmp_path / "run", "tiny" if which == "tiny" else model, steps=(1,))
    file = tmp_path / "tuned.safetensors"
    assert main(["export", str(run), "--out", str(file), "--format", "comfyui", "--dtype", dtype]) == 0
    kind = {"fp32": torch.float32, "bf16": torch.bfloat16}[dtype]
    wanted = {name: tensor.to(kind) for name, tensor in checkpoint(run, 1).items()}
    assert_same(read_single_file(file), wanted)
    assert_same(read_by_diffusers(monkeypatch, file, model, kind), wanted)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run", "tuned.md", "tuned.safetensors"]
    assert file.stat().st_size == pytest.approx(stored_bytes(wanted, dtype), abs=40_000)  # type: ignore[arg-type]


def test_reads_with_comfyuis_checkpoint_prefix(run: Path, tmp_path: Path) -> None:
    prefixed = {f"model.diffusion_model.{name}": tensor for name, tensor in to_bfl(checkpoint(run)).items()}
    save_file(prefixed, tmp_path / "prefixed.safetensors")
    assert_same(read_single_file(tmp_path / "prefixed.safetensors"), checkpoint(run))


def test_header_says_what_the_file_is(run: Path, tmp_path: Path) -> None:
    export_run(run, tmp_path / "tuned.safetensors", layout="comfyui", step=1)
    header = single_file_metadata(tmp_path / "tuned.safetensors")
    wanted = {
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.architecture": "flux-1-other",  # not 3072 wide
        "modelspec.title": "SRPO fine-tuning of tiny",
        "modelspec.license": "Apache-2.0",
        "modelspec.resolution": "32x32",
        "srpo.step": "1",
        "srpo.dtype": "fp32",
    }
    assert wanted.items() <= header.items()
    assert hashlib.sha256(header["srpo.recipe"].encode()).hexdigest() == header["srpo.recipe_sha256"]
    assert yaml.safe_load(header["srpo.recipe"])["srpo"]["batch_size"] == 4


# --- fp8 --------------------------------------------------------------------------------------


def test_fp8_dequantises_within_half_a_step_of_e4m3(run: Path, tmp_path: Path) -> None:
    file = tmp_path / "tuned.safetensors"
    export_run(run, file, layout="comfyui", dtype="fp8")
    stored, exact, read = load_file(file), checkpoint(run), read_single_file(file)
    marker = stored.pop("scaled_fp8")
    assert marker.dtype == torch.float8_e4m3fn
    assert marker.shape == (2,)
    quantised = {name for name, tensor in stored.items() if tensor.dtype == torch.float8_e4m3fn}
    scales = {name for name in stored if name.endswith(".scale_weight")}
    assert scales == {name.removesuffix("weight") + "scale_weight" for name in quantised}
    assert all(stored[name].dtype == torch.float32 and stored[name].ndim == 0 for name in scales)
    assert {re.sub(r"\d+", "N", name, count=1) for name in quantised} == {
        *(f"double_blocks.N.{kind}_{name}.weight" for kind in ("img", "txt") for name in ("attn.qkv", "attn.proj")),
        *(f"double_blocks.N.{kind}_{name}.weight" for kind in ("img", "txt") for name in ("mlp.0", "mlp.2", "mod.lin")),
        *(f"single_blocks.N.{name}.weight" for name in ("linear1", "linear2", "modulation.lin")),
    }
    wanted, found = to_bfl(exact), to_bfl(read)
    for name, tensor in wanted.items():
        if name in quantised:
            scale = stored[name.removesuffix("weight") + "scale_weight"]
            torch.testing.assert_close(scale, tensor.abs().max() / 448, rtol=1e-6, atol=0)
            bound = torch.maximum(tensor.abs() * 2**-4, scale * 2**-10) * (1 + 1e-5)  # normal and subnormal numbers
            assert ((found[name] - tensor).abs() <= bound).all(), name
            assert (found[name] - tensor).norm() < 0.03 * tensor.norm(), name
        else:
            assert torch.equal(found[name], tensor.bfloat16()), name
    assert file.stat().st_size == pytest.approx(stored_bytes(exact, "fp8"), abs=40_000)
    assert file.stat().st_size < 0.3 * (run / "checkpoints/step-000002/transformer.safetensors").stat().st_size


def test_sizes_of_flux_dev() -> None:
    """Those of docs/export.md."""
    with torch.device("meta"):
        state = FluxTransformer2DModel(guidance_embeds=True).state_dict()
    sizes = [round(stored_bytes(state, dtype) / 1e9, 1) for dtype in ("fp32", "bf16", "fp8")]
    assert sizes == [47.6, 23.8, 12.0]
    assert stored_bytes(state, "fp8") == pytest.approx(
        sum(t.nbytes for t in quantize(to_bfl(state)).values()), abs=2000
    )


# --- sampling from all of them ----------------------------------------------------------------


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_same_pixels_from_run_directory_and_file(precision: str, tmp_path: Path) -> None:
    run = tuned_run(tmp_path / "run", "tiny", f"model.precision={precision}")
    export_run(run, tmp_path / "pipeline", shard_gb=0.001)
    export_run(run, tmp_path / "tuned.safetensors", layout="comfyui")
    wanted = pixels(run, tmp_path / "of-run")
    assert not np.array_equal(wanted, pixels(run, tmp_path / "of-base", "--step", "0"))
    assert np.array_equal(wanted, pixels(tmp_path / "pipeline", tmp_path / "of-pipeline"))
    assert np.array_equal(wanted, pixels(tmp_path / "tuned.safetensors", tmp_path / "of-file", "--model", str(TINY)))


def test_fp8_file_samples_nearly_the_same(run: Path, tmp_path: Path) -> None:
    export_run(run, tmp_path / "tuned.safetensors", layout="comfyui", dtype="fp8")
    exact = pixels(run, tmp_path / "of-run").astype(float)
    found = pixels(tmp_path / "tuned.safetensors", tmp_path / "of-file").astype(float)  # base model from the recipe
    assert 0 < np.abs(found - exact).mean() < 2


def test_models_that_hold_no_recipe_are_sampled_with_one_given(run: Path, tmp_path: Path) -> None:
    save_file(to_bfl(checkpoint(run)), tmp_path / "plain.safetensors")
    options = ("--recipe", str(run / "config.yaml"))
    wanted = pixels(run, tmp_path / "of-run")
    assert np.array_equal(wanted, pixels(tmp_path / "plain.safetensors", tmp_path / "of-file", *options))
    base = pixels(TINY, tmp_path / "of-tiny", *options)
    assert np.array_equal(base, pixels(run, tmp_path / "of-base", "--step", "0"))


def test_loader_function(run: Path) -> None:
    flux = load_flux(open_source(run, step=1))
    assert_same(flux.transformer.state_dict(), checkpoint(run, 1))
    moved = open_source(run, model=TINY, overrides=["srpo.guidance=2.0"]).config
    assert (moved.model.path, moved.srpo.guidance) == (str(TINY), 2.0)


# --- directory and card -----------------------------------------------------------------------


def test_directory_has_shards_the_base_models_other_files_and_a_card(tmp_path: Path) -> None:
    base = tmp_path / "base"
    shutil.copytree(TINY, base)
    (base / "LICENSE.md").write_text("the licence")
    (base / "vae/pytorch_model.bin").write_text("another copy")
    out = tmp_path / "out/tuned"
    moved = tuned_run(tmp_path / "run", base)
    assert main(["export", str(moved), "--out", str(out), "--shard-size", "0.001"]) == 0
    shards = sorted(out.glob("transformer/*.safetensors"))
    assert len(shards) > 3
    assert max(shard.stat().st_size for shard in shards) < 1_100_000
    assert_same(dict(FluxPipeline.from_pretrained(out).transformer.state_dict()), checkpoint(moved))
    for name in ("LICENSE.md", "vae/diffusion_pytorch_model.safetensors", "tokenizer/tokenizer.json"):
        assert (out / name).read_bytes() == (base / name).read_bytes()
    assert not (out / "vae/pytorch_model.bin").exists()

    card = (out / "README.md").read_text()
    front = yaml.safe_load(card.split("---\n")[1])
    assert (front["base_model"], front["license"]) == (str(base), "other")
    assert "Non-Commercial" in card
    assert "| score, denoise | 0.1 | 0.2 |" in card
    assert "| loss, total | 1 | 0.5 |" in card
    assert f"torch {version('torch')}" in card
    assert "after 2 updates, in fp32" in card
    listed = dict(reversed(line.split("  ")) for line in re.findall(r"^[0-9a-f]{64}  .*$", card, re.M))
    files = {path.relative_to(out).as_posix(): path for path in out.rglob("*") if path.is_file()}
    assert listed.keys() == files.keys() - {"README.md"}
    for name, digest in listed.items():
        assert hashlib.sha256(files[name].read_bytes()).hexdigest() == digest
    assert hashlib.sha256((out / "recipe.yaml").read_bytes()).hexdigest() in card


def test_card_of_a_file_counts_up_to_its_step(run: Path, tmp_path: Path) -> None:
    export_run(run, tmp_path / "tuned.safetensors", layout="comfyui", step=1)
    card = (tmp_path / "tuned.md").read_text()
    assert "after 1 updates" in card
    assert "update 2" not in card
    assert hashlib.sha256((tmp_path / "tuned.safetensors").read_bytes()).hexdigest() in card
    assert "Apache-2.0" in card


def test_caches_stay_behind_and_a_run_without_a_log_says_so(tmp_path: Path) -> None:
    mixed = "reward.parts=[{path: tiny, weight: 2}, {path: other, weight: -0.5}]"
    changes = ["reward.type=mixture", "reward.path=''", mixed, f"reward.text_cache={tmp_path}/cache"]
    run = tuned_run(tmp_path / "run", "tiny", *changes)
    (run / "log.jsonl").unlink()
    export_run(run, tmp_path / "tuned")
    assert yaml.safe_load((tmp_path / "tuned/recipe.yaml").read_text())["reward"]["text_cache"] is None
    card = (tmp_path / "tuned/README.md").read_text()
    assert "The run has no log." in card
    assert "| reward | 2 x clip, tiny; -0.5 x clip, other |" in card


# --- failures ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--format", "comfyui", "--out", "tuned"], "--out {}/tuned must end in .safetensors with --format comfyui"),
        (["--format", "comfyui", "--out", "there.safetensors"], "there.safetensors already exists"),
        (["--format", "comfyui", "--out", "card.safetensors"], "card.md already exists"),
        (["--format", "comfyui", "--out", "x.safetensors", "--shard-size", "1"], "--shard-size is for --format diff"),
        (["--out", "x", "--dtype", "fp8"], "--dtype fp8 is for --format comfyui"),
        (["--out", "x", "--shard-size", "0"], "--shard-size must be positive, got 0.0"),
        (["--out", "x", "--step", "7"], "has no checkpoint of --step 7 (kept: 1, 2)"),
        (["--out", "full"], "output {}/full already exists"),
        (["--out", "card.md/x"], "nothing was exported to --out {}/card.md/x"),
        (["--out", "card.md/x.safetensors", "--format", "comfyui"], "nothing was exported to --out {}/card.md/x"),
    ],
)
def test_arguments_that_do_not_fit(
    arguments: list[str], message: str, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "there.safetensors").write_text("kept")
    (tmp_path / "card.md").write_text("kept")
    (tmp_path / "full").mkdir()
    (tmp_path / "full/file").write_text("kept")
    before = sorted(tmp_path.rglob("*"))
    at = arguments.index("--out") + 1
    assert main(["export", str(run), *arguments[:at], str(tmp_path / arguments[at]), *arguments[at + 1 :]]) == 2
    assert message.format(tmp_path) in capsys.readouterr().err
    assert sorted(tmp_path.rglob("*")) == before
    assert (tmp_path / "there.safetensors").read_text() == "kept"


@pytest.mark.parametrize("name", ["out", "out.safetensors"])
@pytest.mark.parametrize("how", ["no space", "while writing", "not a transformer"])
def test_failure_leaves_nothing(
    how: str, name: str, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise OSError("No space left on device")

    if how == "no space":
        usage = namedtuple("usage", "total used free")
        monkeypatch.setattr("shutil.disk_usage", lambda _: usage(10**9, 10**9, 1_000_000))
        message = r"--out .*out.*: 0\.0\d GB needed, 0\.00 GB free"
    elif how == "while writing":
        monkeypatch.setattr("srpo.exported.model_card", fail)
        message = r"nothing was exported to --out .*out.*: No space left"
    else:
        load: Callable[..., dict[str, Tensor]] = lambda _, **__: {"x": torch.zeros(1)}  # noqa: E731
        monkeypatch.setattr("srpo.exported.load_weights", load)
        message = "does not fit the base model" if name == "out" else "is no FLUX transformer"
    with pytest.raises(InputError, match=message):
        export_run(run, tmp_path / name, layout="comfyui" if "." in name else "diffusers")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{}/empty"], "{}/empty is neither a run directory (config.yaml) nor a pipeline (model_index.json)"),
        (["{}/pipeline"], "pipeline {}/pipeline holds no recipe.yaml, so give --recipe"),
        (["{}/pipeline", "--recipe", "tiny", "--model", "tiny"], "--model and {}/pipeline: a pipeline directory is a"),
        (["{}/plain.safetensors"], "{}/plain.safetensors holds no recipe, so give --recipe"),
        (["{}/plain.safetensors", "--recipe", "flux-dev-hps"], "its base model data/FLUX.1-dev is not here: give --m"),
        (
            ["{}/plain.safetensors", "--recipe", "tiny"],
            "is not a FLUX transformer as one file: final_layer.adaLN_modulation.1.bias (",
        ),
        (["{}/broken.safetensors"], "{}/broken.safetensors is not a readable safetensors file"),
        (["{}/plain.safetensors", "--step", "1"], "--step is for a run directory, which {}/plain.safetensors is not"),
        (["tiny", "--step", "1"], "--step is for a run directory, which tiny is not"),
        (["tiny", "--recipe", "tiny"], "--recipe is for a pipeline directory or a single file, which tiny is not"),
        (["{}/none.safetensors"], "none.safetensors' is neither a file nor a shipped recipe"),
    ],
)
def test_sources_that_cannot_be_sampled(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken.safetensors").write_text("no header")
    (tmp_path / "pipeline").symlink_to(TINY)
    save_file({"x": torch.zeros(1)}, tmp_path / "plain.safetensors")
    formatted = [argument.format(tmp_path) for argument in arguments]
    assert main(["sample", *formatted, "--prompt", "x", "--out", str(tmp_path / "images")]) == 2
    printed = capsys.readouterr().err
    assert message.format(tmp_path) in printed
    assert printed.count("\n") == 1
    assert not (tmp_path / "images").exists()


def test_file_of_another_model_is_refused(run: Path, flux_shaped: Path, tmp_path: Path) -> None:
    export_run(run, tmp_path / "tuned.safetensors", layout="comfyui")
    source = open_source(tmp_path / "tuned.safetensors", model=flux_shaped)
    with pytest.raises(InputError, match=r"tuned\.safetensors does not fit the model .*pipeline"):
        load_flux(source)


def test_scale_without_its_weight_is_told(run: Path, tmp_path: Path) -> None:
    state = quantize(to_bfl(checkpoint(run)))
    del state["single_blocks.0.linear1.weight"]
    save_file(state, tmp_path / "damaged.safetensors")
    with pytest.raises(InputError, match=r"has single_blocks\.0\.linear1\.scale_weight, but no"):
        read_single_file(tmp_path / "damaged.safetensors")
