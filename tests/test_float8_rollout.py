"""`Float8Rollout`: e4m3 where it should be, always of the weights of now, and nothing of the model changed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import LoraConfig
from small_flux import inputs, model

from benchmarks.precision import compare
from srpo_kernels import Float8Rollout, FluxRollout, fake_quantize_fp8, patch

WITHIN_BLOCKS = ("transformer_blocks.", "single_transformer_blocks.")


def emulated(network: Any) -> Any:
    """The model with weights, and what comes to them, rounded where that should be to e4m3."""
    for name, layer in network.named_modules():
        if isinstance(layer, torch.nn.Linear) and name.startswith(WITHIN_BLOCKS) and ".norm" not in name:
            layer.weight.data = fake_quantize_fp8(layer.weight.data)
            layer.register_forward_pre_hook(lambda _, arguments: (fake_quantize_fp8(arguments[0]),))
    return network


def test_every_linear_layer_of_a_block_is_e4m3_and_nothing_else() -> None:
    """Against diffusers' own forward with the rounding put in by hooks; a code may round the other way."""
    network, given = model(), inputs()
    rollout = Float8Rollout(network)
    linear = [name for name, layer in network.named_modules() if isinstance(layer, torch.nn.Linear)]
    left = {name for name in linear if name not in rollout.names}
    assert all(name.startswith(WITHIN_BLOCKS) for name in rollout.names)
    assert all(".norm" in name for name in left if name.startswith(WITHIN_BLOCKS))
    ours = rollout(**given)[0]
    expected = emulated(model())(**given)[0]
    plain = network(**given)[0]
    assert not ours.requires_grad
    near, far = compare(ours, expected)["error"], compare(ours, plain)["error"]
    assert near < 0.3 * far
    assert 1e-3 < far < 0.05


def test_bf16_loses_no_more_than_fp32() -> None:
    exact = model()(**inputs())[0]
    of_fp32 = compare(Float8Rollout(model())(**inputs())[0], exact)["error"]
    of_bf16 = Float8Rollout(model(torch.bfloat16))(**inputs(torch.bfloat16))[0]
    assert of_bf16.dtype == torch.bfloat16
    assert compare(of_bf16, exact)["error"] < 1.5 * of_fp32


def test_the_weights_are_those_of_now() -> None:
    network, given = model(), inputs()
    rollout = Float8Rollout(network)
    before = rollout(**given)[0]
    assert rollout.refresh() == 0
    assert torch.equal(rollout(**given)[0], before)
    with torch.no_grad():
        network.single_transformer_blocks[0].proj_mlp.weight.mul_(2)
    assert not torch.equal(rollout(**given)[0], before)
    assert rollout.refresh() == 0
    assert rollout.refresh(force=True) == len(rollout.names)
    # What is not quantised is the model's own.
    after = rollout(**given)[0]
    with torch.no_grad():
        network.proj_out.weight.zero_()
        network.proj_out.bias.fill_(3)
    assert torch.equal(rollout(**given)[0], torch.full_like(after, 3))


def test_an_optimizer_step_and_load_state_dict_are_seen() -> None:
    from srpo_kernels.optim import AdamW

    network, given = model(torch.bfloat16), inputs(torch.bfloat16)
    rollout = Float8Rollout(network)
    rollout(**given)
    optimizer = AdamW(network.parameters(), lr=1e-2)
    network(**given)[0].square().mean().backward()
    optimizer.step()
    assert rollout.refresh() == len(rollout.names)
    assert torch.equal(rollout(**given)[0], Float8Rollout(network)(**given)[0])
    network.load_state_dict(model(torch.bfloat16).state_dict())
    assert rollout.refresh() == len(rollout.names)


def test_the_model_and_its_names_stay_as_they_are() -> None:
    network, given = model(), inputs()
    patch(network)
    names = list(network.state_dict())
    before = network(**given)[0]
    rollout = Float8Rollout(network)
    rollout(**given)
    assert torch.equal(network(**given)[0], before)
    assert list(network.state_dict()) == names
    shared = dict(network.named_parameters())
    assert all(shared[name] is parameter for name, parameter in rollout.transformer.named_parameters())
    network(**given)[0].sum().backward()  # and it still trains
    assert all(parameter.grad is not None for parameter in network.parameters())


def test_a_byte_a_weight_is_held_and_a_scale_a_row() -> None:
    network, given = model(torch.bfloat16), inputs(torch.bfloat16)
    rollout = Float8Rollout(network)
    rollout(**given)
    weights = [network.get_submodule(name).weight for name in rollout.names]
    held = [layer._quantized for layer in rollout._weights.values()]
    assert sum(q.values.nbytes + q.scale.nbytes for q in held) == sum(w.numel() + 4 * w.shape[0] for w in weights)


def test_a_rollout_is_the_plain_loop() -> None:
    network, given = model(torch.bfloat16), inputs(torch.bfloat16)
    view = Float8Rollout(network)
    loop, positions = (
        (given["encoder_hidden_states"], given["pooled_projections"], [0.5, 0.25]),
        {name: given[name] for name in ("txt_ids", "img_ids")},
    )
    rollout = FluxRollout(view, *loop, guidance=3.5, **positions)
    for step, level in enumerate(loop[-1]):
        plain = view(**{**given, "timestep": torch.full((2,), level)})[0]
        assert compare(rollout.velocity(given["hidden_states"], step), plain)["error"] < 1e-2
    before = rollout.velocity(given["hidden_states"], 0)
    with torch.no_grad():
        network.transformer_blocks[0].ff.net[2].weight.mul_(3)
    again = FluxRollout(view, *loop, guidance=3.5, **positions)
    assert compare(again.velocity(given["hidden_states"], 0), before)["error"] > 1e-2


def test_layers_can_be_kept() -> None:
    network, given = model(), inputs()
    blocks = ["transformer_blocks.0", "single_transformer_blocks.1.proj_out"]
    rollout = Float8Rollout(network, keep=blocks)
    assert rollout.names
    assert not [name for name in rollout.names if name.startswith(tuple(blocks))]
    assert compare(rollout(**given)[0], network(**given)[0])["error"] < 0.05
    everything = [name.rpartition(".")[0] for name, _ in network.named_parameters() if name.startswith(WITHIN_BLOCKS)]
    kept = Float8Rollout(network, keep=[name for name in everything if name in Float8Rollout(network).names])
    assert kept.names == ()


def test_adapters_are_added_to_the_weights() -> None:
    """PEFT's LoRA: e4m3 of the sum is near the adapted model, and follows the adapters."""
    network, given = model(), inputs()
    base = Float8Rollout(network)(**given)[0]
    network.add_adapter(
        LoraConfig(r=4, target_modules=["to_q", "to_k", "proj_mlp", "ff.net.2"], init_lora_weights=False)
    )
    rollout = Float8Rollout(network)
    adapted, exact = rollout(**given)[0], network(**given)[0]
    assert compare(adapted, exact)["error"] < 0.05 < compare(base, exact)["error"]
    adapters = [parameter for name, parameter in network.named_parameters() if "lora_B" in name]
    with torch.no_grad():
        adapters[0].mul_(2)
    assert rollout.refresh() == 1
    network.disable_adapters()
    rollout.refresh(force=True)
    assert compare(rollout(**given)[0], base)["error"] < 1e-5


def test_compiles_whole() -> None:
    network, given = model(torch.bfloat16), inputs(torch.bfloat16)
    rollout = Float8Rollout(network)
    expected = rollout(**given)[0]
    compiled = torch.compile(rollout.transformer, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        assert torch.equal(compiled(**given)[0], expected)


def test_bad_arguments_are_named() -> None:
    with pytest.raises(TypeError, match="transformer must be a FluxTransformer2DModel, got Linear"):
        Float8Rollout(torch.nn.Linear(2, 2))
    with pytest.raises(ValueError, match=r"keep names no linear layer of a block: transformer_blocks\.7"):
        Float8Rollout(model(), keep=["transformer_blocks.0", "transformer_blocks.7"])
