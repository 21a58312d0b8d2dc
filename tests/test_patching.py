"""`patch`: what it computes, what it leaves alone, and that nothing is left of it when it is removed."""

from __future__ import annotations

import copy
import math
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FluxPipeline
from diffusers.models.attention_dispatch import AttentionBackendName
from diffusers.models.transformers.transformer_flux import (
    FluxAttnProcessor,
    FluxIPAdapterAttnProcessor,
    FluxSingleTransformerBlock,
)
from small_flux import IMAGE, TEXT, inputs, model
from torch import Tensor

from srpo_kernels import FluxRollout, patch
from srpo_kernels.checkpointing import flux_policy
from srpo_kernels.patching import TRANSFORMER_OPS, attention, flux
from srpo_kernels.patching.handle import Rule, fingerprint, install, is_patched
from srpo_kernels.testing.budget import SLACK
from srpo_kernels.testing.trace import Trace


def outputs(network: torch.nn.Module, given: dict[str, Any]) -> dict[str, Tensor]:
    """The forward pass and the gradient of every parameter."""
    network.zero_grad()
    out = network(**given)[0]
    weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(2)).to(out.dtype)
    (out * weight).sum().backward()
    gradients = {name: p.grad.clone() for name, p in network.named_parameters() if p.grad is not None}
    return {"output": out.detach(), **gradients}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def errors(got: dict[str, Tensor], exact: dict[str, Tensor]) -> dict[str, float]:
    """Root mean square error of each, relative to its root mean square."""
    return {n: ((got[n].double() - e).norm() / e.norm().clamp_min(1e-30)).item() for n, e in exact.items()}


def assert_as_accurate(patched: dict[str, Tensor], plain: dict[str, Tensor], exact: dict[str, Tensor]) -> None:
    """Against float64: no tensor more than `SLACK` times as far off as diffusers' own.

    In bf16, where we round less often, they must not be further off on the whole (geometric mean) either.
    """
    assert patched.keys() == plain.keys() == exact.keys()
    ours, theirs = errors(patched, exact), errors(plain, exact)
    ratios = {name: (ours[name] + 1e-30) / (theirs[name] + 1e-30) for name in exact if ours[name] != theirs[name]}
    assert max(ratios.values(), default=1.0) <= SLACK, max(ratios, key=ratios.__getitem__)
    if plain["output"].dtype == torch.bfloat16:
        assert sum(map(math.log, ratios.values())) <= 0.0


def exactly(network: torch.nn.Module, given: dict[str, Any]) -> dict[str, Tensor]:
    """The same model and inputs in float64."""
    wide = copy.deepcopy(network).double()
    return outputs(wide, {n: v.double() if isinstance(v, Tensor) and "ids" not in n else v for n, v in given.items()})


# --- what it computes -------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("batch", [1, 2])
def test_forward_and_every_gradient_are_as_accurate(dtype: torch.dtype, batch: int) -> None:
    network, given = model(dtype), inputs(dtype, batch)
    exact, plain = exactly(network, given), outputs(network, given)
    patch(network, strict=True)
    assert_as_accurate(outputs(network, given), plain, exact)


@pytest.mark.parametrize("name", TRANSFORMER_OPS)
def test_each_op_alone(name: str) -> None:
    network, given = model(), inputs()
    exact, plain = exactly(network, given), outputs(network, given)
    handle = patch(network, ops=[name])
    assert handle.replaced
    assert all(entry.uses == (name,) for entry in handle.replaced)
    assert_as_accurate(outputs(network, given), plain, exact)


def test_autocast_over_fp32_weights() -> None:
    network, given = model(), inputs()
    exact = exactly(network, given)
    with torch.autocast("cpu", torch.bfloat16):
        plain = outputs(network, given)
        patch(network)
        ours = outputs(network, given)
    assert ours["output"].dtype == plain["output"].dtype == torch.bfloat16
    assert_as_accurate(ours, plain, exact)


def test_fp16_is_clipped_as_diffusers_clips() -> None:
    block = FluxSingleTransformerBlock(64, 2, 32).half()
    given = dict(
        hidden_states=torch.full((1, 4, 64), 6e4, dtype=torch.float16),
        encoder_hidden_states=torch.full((1, 2, 64), 6e4, dtype=torch.float16),
        temb=torch.randn(1, 64).half(),
        image_rotary_emb=(torch.ones(6, 32), torch.zeros(6, 32)),
    )
    block.norm.linear.bias.data.fill_(10)
    block.proj_out.bias.data.fill_(3e4)
    assert torch.equal(block(**given)[1], torch.full_like(given["hidden_states"], 65504))
    patch(block)
    text, image = block(**given)
    assert torch.equal(text, torch.full_like(text, 65504))
    assert torch.equal(image, torch.full_like(image, 65504))


def test_pipeline_samples_the_same_picture(flux_shaped: Path) -> None:
    pipeline = FluxPipeline.from_pretrained(flux_shaped)
    pipeline.set_progress_bar_config(disable=True)
    options = dict(prompt="digit", height=32, width=32, num_inference_steps=3, max_sequence_length=8)

    def latents(pipeline: FluxPipeline) -> Tensor:
        noise = torch.randn(1, 4, 64, generator=torch.Generator().manual_seed(0))
        return pipeline(**options, latents=noise, output_type="latent").images

    plain = latents(pipeline)
    with patch(pipeline.transformer, strict=True):
        ours = latents(pipeline)
    assert not torch.equal(ours, plain)  # something else did run
    torch.testing.assert_close(ours, plain, rtol=0, atol=64 * torch.finfo(torch.float32).eps * plain.abs().max().item())
    assert torch.equal(latents(pipeline), plain)


# --- compiled, checkpointed, adapted ----------------------------------------------------------


@pytest.mark.parametrize("whole", [True, False], ids=["whole", "per block"])
def test_compiles_in_one_graph_and_once(whole: bool) -> None:
    network, given = model(num_layers=1, num_single_layers=1), inputs()
    patch(network)
    expected = outputs(network, given)
    torch.compiler.reset()
    if whole:
        network.compile(fullgraph=True, backend="aot_eager")
    else:
        network.compile_repeated_blocks(fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        network(**given)
    first = outputs(network, given)
    with torch.compiler.set_stance("fail_on_recompile"):
        for timestep in (0.125, 0.5):
            outputs(network, {**given, "timestep": torch.full((2,), timestep)})
            with torch.no_grad():
                network(**{**given, "timestep": torch.full((2,), timestep)})
    for name, tensor in expected.items():
        torch.testing.assert_close(first[name], tensor, rtol=1e-5, atol=1e-6)
    torch.compiler.reset()


@pytest.mark.parametrize("mode", ["selective", "block"])
def test_checkpointing_changes_nothing(mode: str) -> None:
    network, given = model(), inputs()
    patch(network)
    plain = outputs(network, given)
    flux_policy(network, mode, batch=2, tokens=TEXT + IMAGE)
    assert same(outputs(network, given), plain)
    flux_policy(network, "none", batch=2, tokens=TEXT + IMAGE)
    assert not network.gradient_checkpointing


@pytest.mark.parametrize("first", ["lora", "patch"])
def test_lora_before_and_after(first: str) -> None:
    from peft import LoraConfig

    def adapt() -> None:
        targets = ["to_q", "to_out.0", "add_k_proj", "net.0.proj", "proj_mlp", "proj_out"]
        torch.manual_seed(3)
        network.add_adapter(LoraConfig(r=2, init_lora_weights=False, target_modules=targets))

    network, given = model(), inputs()
    if first == "lora":
        adapt()
        handle = patch(network, strict=True)
    else:
        handle = patch(network, strict=True)
        adapt()
    ours = outputs(network, given)
    scaled = network(**given, joint_attention_kwargs={"scale": 0.5})[0]
    assert any("lora" in name for name in ours)
    handle.remove()
    assert_as_accurate(ours, outputs(network, given), exactly(network, given))
    plain = network(**given, joint_attention_kwargs={"scale": 0.5})[0]
    torch.testing.assert_close(scaled, plain, rtol=1e-4, atol=1e-5)
    assert (scaled - ours["output"]).abs().max() > 1e-3


def test_controlnet_residuals_are_added_where_diffusers_adds_them() -> None:
    network, given = model(), inputs()
    residuals = [torch.randn(2, IMAGE, 64, generator=torch.Generator().manual_seed(i)) for i in range(4)]
    given |= dict(controlnet_block_samples=residuals[:2], controlnet_single_block_samples=residuals[2:])
    exact, plain = exactly(network, given | _wide(given)), outputs(network, given)
    patch(network)
    assert_as_accurate(outputs(network, given), plain, exact)


def _wide(given: dict[str, Any]) -> dict[str, Any]:
    return {name: [t.double() for t in value] for name, value in given.items() if isinstance(value, list)}


def test_ip_adapter_goes_through_diffusers_own_processor() -> None:
    network, given = model(), inputs()
    handle = patch(network)
    torch.manual_seed(4)
    double = network.transformer_blocks[0]
    double.attn.set_processor(FluxIPAdapterAttnProcessor(64, 24, scale=0.7))
    streams = dict(
        hidden_states=torch.randn(2, IMAGE, 64),
        encoder_hidden_states=torch.randn(2, TEXT, 64),
        temb=torch.randn(2, 64),
        image_rotary_emb=network.pos_embed(torch.cat([given["txt_ids"], given["img_ids"]])),
        joint_attention_kwargs={"ip_hidden_states": [torch.randn(2, 3, 24)]},
    )
    ours = double(**streams)
    handle.remove()
    for a, b in zip(ours, double(**streams), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    refused = patch(network).refused
    assert [(entry.name, entry.reason) for entry in refused] == [
        ("transformer_blocks.0.attn", "its processor is a FluxIPAdapterAttnProcessor, not FluxAttnProcessor")
    ]


# --- attention backends -----------------------------------------------------------------------


@pytest.fixture
def single() -> tuple[FluxSingleTransformerBlock, dict[str, Any]]:
    torch.manual_seed(0)
    block = FluxSingleTransformerBlock(64, 2, 32)
    given = dict(
        hidden_states=torch.randn(1, IMAGE, 64, requires_grad=True),
        encoder_hidden_states=torch.randn(1, TEXT, 64, requires_grad=True),
        temb=torch.randn(1, 64),
        image_rotary_emb=(torch.rand(IMAGE + TEXT, 32), torch.rand(IMAGE + TEXT, 32)),
    )
    return block, given


def test_backend_without_backward_is_refused_when_gradients_are_on(single: Any) -> None:
    block, given = single
    patch(block)
    block.attn.processor._attention_backend = AttentionBackendName.SAGE
    with pytest.raises(ValueError, match=r"^patch: attention backend 'sage' has no backward; choose one of native,"):
        block(**given)


def test_backend_that_loses_the_gradient_is_refused(single: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    block, given = single
    patch(block)
    monkeypatch.setattr(attention, "dispatch_attention_fn", lambda query, *_, **__: query.detach())
    with pytest.raises(ValueError, match=r"^patch: attention backend 'native' has no backward"):
        block(**given)
    with torch.no_grad():
        block(**given)


def test_chosen_backend_is_used(single: Any) -> None:
    block, given = single
    expected = block(**given)[1]
    patch(block)
    block.attn.processor._attention_backend = AttentionBackendName._NATIVE_MATH
    torch.testing.assert_close(block(**given)[1], expected, rtol=1e-5, atol=1e-5)


def test_flash_attention_3_takes_over_from_the_default_only(single: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    block, given = single
    expected = block(**given)[1]
    patch(block)
    calls: list[int] = []

    def flash(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        calls.append(1)
        heads_first = (x.transpose(1, 2) for x in (query, key, value))
        return torch.nn.functional.scaled_dot_product_attention(*heads_first).transpose(1, 2)

    monkeypatch.setattr(attention, "_flash_attention_3", lambda *_: flash)
    torch.testing.assert_close(block(**given)[1], expected, rtol=1e-5, atol=1e-5)
    block.attn.processor._attention_backend = AttentionBackendName._NATIVE_MATH
    block(**given)
    assert calls == [1]


def test_queries_and_keys_made_again_are_those_kept(single: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    block, given = single
    patch(block)

    def gradients() -> list[Tensor]:
        return list(torch.autograd.grad(block(**given)[1].square().sum(), list(block.parameters())))

    ours = gradients()
    monkeypatch.setattr(attention, "remade_in_backward", lambda *_: attention.nullcontext())
    assert all(torch.equal(a, b) for a, b in zip(ours, gradients(), strict=True))


# --- rotary tables ----------------------------------------------------------------------------


def test_rotary_tables_are_kept_for_the_very_same_ids() -> None:
    network, given = model(), inputs()
    expected = network.pos_embed(given["img_ids"])
    patch(network)
    with torch.inference_mode():
        first = network.pos_embed(given["img_ids"])
    assert network.pos_embed(given["img_ids"])[0] is first[0]
    assert not first[0].is_inference()  # or training could not use them
    assert all(torch.equal(a, b) for a, b in zip(first, expected, strict=True))
    assert network.pos_embed(given["img_ids"].clone())[0] is not first[0]
    given["img_ids"] += 1
    assert not torch.equal(network.pos_embed(given["img_ids"])[0], first[0])


# --- rollout ----------------------------------------------------------------------------------


def rollout_of(network: Any, given: dict[str, Any], timesteps: list[float], **options: Any) -> FluxRollout:
    return FluxRollout(
        network,
        given["encoder_hidden_states"],
        given["pooled_projections"],
        timesteps,
        txt_ids=given["txt_ids"],
        img_ids=given["img_ids"],
        guidance=3.5,
        **options,
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_rollout_is_the_plain_loop(dtype: torch.dtype) -> None:
    network, given, timesteps = model(dtype), inputs(dtype), [0.875, 0.5, 0.25]

    def at(network: Any, given: dict[str, Any], level: float) -> Tensor:
        with torch.no_grad():
            return network(**given | {"timestep": torch.full_like(given["timestep"], level)})[0]

    wide = {n: v.double() if isinstance(v, Tensor) and "ids" not in n else v for n, v in given.items()}
    exact = [at(copy.deepcopy(network).double(), wide, level) for level in timesteps]
    patch(network)
    plain = [at(network, given, level) for level in timesteps]
    rollout = rollout_of(network, given, timesteps)
    for step in (2, 0, 1):  # in any order
        ours = rollout.velocity(given["hidden_states"], step)
        assert not ours.requires_grad
        assert ours.dtype == dtype
        error, theirs = ((x.double() - exact[step]).abs().max() for x in (ours, plain[step]))
        assert error <= SLACK * theirs


def test_rollout_makes_modulations_once(monkeypatch: pytest.MonkeyPatch) -> None:
    network, given = model(), inputs()
    patch(network)
    rollout = rollout_of(network, given, [0.5, 0.25])
    for block in network.transformer_blocks:
        monkeypatch.setattr(block.norm1.linear, "forward", lambda *_: pytest.fail("computed in the loop"))
    rollout.velocity(given["hidden_states"], 0)


def test_rollout_step_waits_for_nothing() -> None:
    network, given = model(), inputs()
    patch(network)
    rollout = rollout_of(network, given, [0.5, 0.25])
    with Trace() as trace:
        rollout.velocity(given["hidden_states"], 1)
    ran = {launch.name for launch in trace.launches}
    assert "aten::addmm" in ran
    assert not ran & {"aten::_local_scalar_dense", "aten::nonzero", "aten::_to_copy", "aten::lift_fresh"}
    assert not ran & {"aten::sin", "aten::cos", "aten::exp"}  # rotary tables and time embeddings are there already


def test_rollout_refusals() -> None:
    network, given = model(), inputs()
    with pytest.raises(ValueError, match=r"^FluxRollout: transformer's adaptive norms are not patched"):
        rollout_of(network, given, [0.5])
    patch(network)
    with pytest.raises(ValueError, match=r"^FluxRollout: graph=True needs CUDA tensors, got cpu$"):
        rollout_of(network, given, [0.5], graph=True)


# --- in, out, and what stays ------------------------------------------------------------------


def test_removal_restores_bitwise_and_nothing_else_changed() -> None:
    network, given = model(), inputs()
    before, state = outputs(network, given), {n: t.clone() for n, t in network.state_dict().items()}
    parameters = dict(network.named_parameters())
    calls: list[str] = []
    for name in ("transformer_blocks.0", "transformer_blocks.0.norm1", "single_transformer_blocks.1.attn"):
        network.get_submodule(name).register_forward_hook(lambda *_, name=name: calls.append(name))
    with patch(network) as handle:
        assert same(network.state_dict(), state)
        assert all(parameters[name] is parameter for name, parameter in network.named_parameters())
        outputs(network, given)
        assert sorted(calls) == sorted(
            ["transformer_blocks.0", "transformer_blocks.0.norm1", "single_transformer_blocks.1.attn"]
        )
        assert is_patched(network.norm_out)
    assert not any("forward" in module.__dict__ for module in network.modules())
    assert same(outputs(network, given), before)
    handle.remove()  # again: nothing


def test_copies_and_pickles() -> None:
    network, given = model(), inputs()
    plain = outputs(network, given)
    patch(network)
    ours = outputs(network, given)
    assert not same(ours, plain)
    assert same(outputs(copy.deepcopy(network), given), ours)
    assert same(outputs(pickle.loads(pickle.dumps(network)), given), plain)  # a pickle knows nothing of the patch


def test_report_names_every_module() -> None:
    network = model(num_layers=1, num_single_layers=1)
    network.transformer_blocks[0].ff.net[0].approximate = "none"
    handle = patch(network)
    lines = handle.report().splitlines()
    assert lines[0] == "11 modules patched, 1 refused"
    assert any(line.split() == ["norm_out", "AdaLayerNormContinuous:", "layer_norm_modulate"] for line in lines), (
        handle.report()
    )
    assert "GELU: refused: its GELU is not the tanh approximation" in handle.report()
    assert repr(handle) == "PatchHandle(11 modules patched, 1 refused)"


def test_what_cannot_be_patched_is_refused_with_its_reason() -> None:
    network = model()
    double, single = network.transformer_blocks[0], network.single_transformer_blocks[0]
    double.norm2.register_forward_hook(lambda *_: None)
    double.norm1.norm = torch.nn.LayerNorm(64)
    double.attn.norm_q = torch.nn.LayerNorm(32)
    single.attn.norm_k.eps = 1e-3
    single.act_mlp.register_forward_pre_hook(lambda *_: None)
    single.norm.forward = lambda *_, **__: None
    network.norm_out.__class__ = type("Mine", (type(network.norm_out),), {"forward": lambda *_: None})
    assert {entry.name: entry.reason for entry in patch(network).refused} == {
        "transformer_blocks.0": "its LayerNorm has forward hooks",
        "transformer_blocks.0.norm1": "its LayerNorm has weights",
        "transformer_blocks.0.attn": "its query and key norms are not RMSNorm with a weight and an epsilon",
        "single_transformer_blocks.0": "act_mlp has forward hooks",
        "single_transformer_blocks.0.norm": "another library has replaced its forward",
        "single_transformer_blocks.0.attn": "its norms have several epsilons",
        "norm_out": "Mine overrides forward",
    }


def test_strict_replaces_nothing_when_anything_is_refused() -> None:
    network = model()
    network.transformer_blocks[0].ff.net[0].approximate = "none"
    with pytest.raises(ValueError, match=r"^patch: strict, and some modules cannot be patched\n"):
        patch(network, strict=True)
    assert not any(map(is_patched, network.modules()))


def test_drift_of_diffusers_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def changed(ids: Tensor) -> Tensor:
        return ids

    network = model()
    monkeypatch.setattr(flux, "get_1d_rotary_pos_embed", changed)
    (entry,) = patch(network).refused
    assert entry.name == "pos_embed"
    assert entry.reason.endswith("changed of this diffusers version is not one that was checked")


def test_fingerprints_ignore_what_does_not_change_the_work() -> None:
    def a(x: int) -> int:
        """Text."""
        return x + 1  # why

    first = fingerprint(a)

    def a(x):  # type: ignore[no-untyped-def,no-redef]
        return x + 1

    assert fingerprint(a) == first

    def a(x):  # type: ignore[no-untyped-def,no-redef]
        return x + 2

    assert fingerprint(a) != first


def test_every_installed_function_is_one_that_was_checked() -> None:
    for rule in flux.rules(TRANSFORMER_OPS):
        for function, known in rule.stands_for.items():
            assert fingerprint(function) in known, function.__qualname__


def test_patching_twice_and_removing_out_of_order() -> None:
    network = model()
    handle = patch(network)
    with pytest.raises(ValueError, match=r"^patch: the model is patched already; call remove\(\) of its handle first$"):
        patch(network)
    network.norm_out.forward = lambda *_: None  # as diffusers' hooks do
    with pytest.raises(RuntimeError, match=r"^patch: the forward of norm_out was replaced after it was patched"):
        handle.remove()
    assert is_patched(network)  # nothing is half removed
    del network.norm_out.__dict__["forward"]


def test_a_rule_covers_subclasses_as_fsdp_makes_them() -> None:
    class Base(torch.nn.Module):
        def forward(self) -> int:
            return 1

    def forward(_: Any) -> int:
        return 2

    wrapped = type("FSDPBase", (Base,), {})()
    install(wrapped, [Rule(Base, forward, ("x",), {})], strict=True)
    assert wrapped() == 2


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((object(),), TypeError, "patch: module must be a torch.nn.Module, got object"),
        ((torch.nn.Linear(1, 1),), ValueError, "patch: module holds none of what these ops are for: "),
        ((torch.nn.Linear(1, 1), "gelu_tanh"), TypeError, "patch: ops must be a collection of names, got the string"),
        ((torch.nn.Linear(1, 1), ["gelu"]), ValueError, r"patch: ops must be names of \['.*\], got \['gelu'\]"),
        ((torch.nn.Linear(1, 1), []), ValueError, r"patch: ops must be names of \['.*\], got \[\]"),
    ],
)
def test_bad_arguments(arguments: tuple[Any, ...], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"^{message}"):
        patch(*arguments)


def test_processor_class_is_the_one_checked() -> None:
    assert type(model().transformer_blocks[0].attn.processor) is FluxAttnProcessor
