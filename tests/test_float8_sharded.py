"""`Float8Linear`, its all-gather in e4m3, and the base frozen in e4m3 under FSDP2, on two gloo processes."""

from __future__ import annotations

import itertools
import os
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

BF16, FP32 = torch.bfloat16, torch.float32
#: Mixed precision: fp32 weights, gathered and computed with in bf16, but for those that are frozen in e4m3.
#: "gathered": trained, and gathered in e4m3.
CASES = ("trained", "trained, mixed", "gathered", "gathered, mixed", "frozen", "frozen, mixed")

#: Its gradient comes from all blocks, whose bf16 gradients are added up in another order.
EVERYWHERE = "time_text_embed.vector"


class _Gathered(TorchDispatchMode):
    """Within the block, counts the bytes that this process sends to the others."""

    def __init__(self) -> None:
        super().__init__()
        self.nbytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        del types
        if "allgather" in func._schema.name:
            self.nbytes += min(leaf.nbytes for leaf in tree_leaves(args) if isinstance(leaf, Tensor))
        return func(*args, **(kwargs or {}))


def _worker(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    for case in CASES:
        found = _run(case, sharded=True)
        if rank == 0:
            torch.save(found, f"{folder}/{case}.pt")
    for check in (_uneven, _meshes, _replaced, _recomputed, _compiled, _accumulated, _saved, _rollout):
        check(Path(folder))
    dist.destroy_process_group()


def _whole(tensor: Tensor) -> Tensor:
    from torch.distributed.tensor import DTensor

    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def _shard(network: Any, case: str) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    options: dict[str, Any] = {"mesh": init_device_mesh("cpu", (2,))}
    if "mixed" in case:
        # Inputs are bf16, but for the rotary tables.
        options["mp_policy"] = MixedPrecisionPolicy(BF16, FP32, cast_forward_inputs=False)
    for block in [*network.transformer_blocks, *network.single_transformer_blocks]:
        fully_shard(block, **options)
    fully_shard(network, **options)


def _run(case: str, *, sharded: bool) -> dict[str, Any]:
    """Outputs and gradients of training steps, what is trained after them, and bytes held and gathered."""
    from small_flux import inputs, model

    from srpo_kernels import convert_to_float8, freeze_float8, gather_float8, patch
    from srpo_kernels.optim import AdamW

    mixed, frozen = "mixed" in case, "frozen" in case
    # E4m3 is made of the shards, which are not rounded to bf16: as good as whole bf16 weights as long as they are such.
    network = model(BF16, num_layers=1, num_single_layers=1).to(FP32 if mixed else BF16)
    patch(network, strict=True)
    if frozen:
        from peft import LoraConfig

        network.requires_grad_(False)
        freeze_float8(network)
        torch.manual_seed(3)
        network.add_adapter(LoraConfig(r=4, target_modules=["to_q", "net.0.proj", "proj_out"], init_lora_weights=False))
    elif not mixed:
        convert_to_float8(network)
    if sharded:
        _shard(network, case)
        if frozen:
            with pytest.raises(ValueError, match="freeze_float8: module's parameters are sharded; freeze before fully"):
                freeze_float8(network)
    elif mixed:
        network.to(BF16)
    if mixed and not frozen:
        convert_to_float8(network, backward="fp8")  # after fully_shard
    names = gather_float8(network) if sharded and "gathered" in case else []
    trained = {name: parameter for name, parameter in network.named_parameters() if parameter.requires_grad}
    optimizer = AdamW(trained.values(), 1e-3, weights="fp32" if mixed and sharded else "split32")
    steps, gathered = [], _Gathered()
    for _ in range(2):
        with gathered:
            out = network(**inputs(BF16))[0]
        out.float().square().mean().backward()
        steps.append({name: _whole(p.grad).to(BF16) for name, p in trained.items() if p.grad is not None})
        steps[-1]["output"] = out.detach()
        optimizer.step()
        network.zero_grad()
    held = {name: p.nbytes for name, p in network.named_parameters()}
    weights = [network.get_parameter(f"{name}.weight") for name in names]
    return {
        "steps": steps,
        "trained": {name: _whole(parameter.detach()) for name, parameter in trained.items()},
        "bytes": {
            "e4m3": sum(weight.numel() + 4 * len(weight) for weight in weights),
            "instead of": sum(weight.nbytes for weight in weights),
            "rest": sum(nbytes for name, nbytes in held.items() if network.get_parameter(name).is_floating_point()),
            "frozen": sum(nbytes for name, nbytes in held.items() if network.get_parameter(name).dtype == torch.uint8),
            "gathered": gathered.nbytes // 2,
        },
    }


# --- gathered in e4m3; on both processes ------------------------------------------------------


def _small(dtype: torch.dtype = BF16) -> Any:
    """A transformer of two blocks on this package's operators, converted and gathered in e4m3."""
    from small_flux import model

    from srpo_kernels import convert_to_float8, gather_float8, patch

    network = model(dtype, num_layers=1, num_single_layers=1)
    patch(network, strict=True)
    convert_to_float8(network)
    _shard(network, "")
    gather_float8(network)
    return network


def _pass(network: Any) -> dict[str, Tensor]:
    """The output and all gradients of a pass."""
    from small_flux import inputs

    out = network(**inputs(BF16))[0]
    out.float().square().mean().backward()
    grads = {name: _whole(p.grad) for name, p in network.named_parameters() if p.grad is not None}
    network.zero_grad()
    return {"output": out.detach(), **grads}


def _same(got: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert got.keys() == expected.keys()
    differ = [name for name in got if not torch.equal(got[name], expected[name])]
    assert not differ, differ


def _layers(*sizes: int) -> Any:
    from srpo_kernels import Float8Linear

    torch.manual_seed(0)
    shapes = itertools.pairwise(sizes)
    return torch.nn.Sequential(*(Float8Linear(inputs, outputs, dtype=BF16) for inputs, outputs in shapes))


def _uneven(_: Path) -> None:
    """Rows that two processes do not share out evenly, and a row that one of them has none of."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    from srpo_kernels import gather_float8

    network, whole = _layers(6, 5, 1, 3), _layers(6, 5, 1, 3)
    fully_shard(network, mesh=init_device_mesh("cpu", (2,)))
    assert gather_float8(network) == ["0", "1", "2"]
    x = torch.randn(4, 6).to(BF16)
    with pytest.MonkeyPatch.context() as patched:
        _differentiate_e4m3(patched)
        outs = [module(x) for module in (network, whole)]
        for out in outs:
            out.float().square().sum().backward()
    assert torch.equal(*outs)
    _same(*({n: _whole(p.grad) for n, p in each.named_parameters()} for each in (network, whole)))


def _meshes(_: Path) -> None:
    """Replicas that share out parameters; replicas of one process, which gather nothing; and what is refused."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import Shard, distribute_tensor

    from srpo_kernels import gather_float8

    x = torch.randn(4, 6).to(BF16)
    for shape, names in (((1, 2), ["0", "1"]), ((2, 1), [])):
        network = fully_shard(_layers(6, 4, 2), mesh=init_device_mesh("cpu", shape, mesh_dim_names=("copies", "parts")))
        assert gather_float8(network) == names
        assert torch.equal(network(x), _layers(6, 4, 2)(x))

    network, mesh = _layers(6, 4), init_device_mesh("cpu", (2,))
    network[0].weight = torch.nn.Parameter(distribute_tensor(network[0].weight.detach(), mesh, [Shard(1)]))
    with pytest.raises(ValueError, match=r"gather_float8: the weight of 0 has placements .*Shard\(dim=1\)"):
        gather_float8(network)
    network = fully_shard(_layers(6, 4), mesh=mesh)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(type(mesh), "device_type", "cuda")  # where it would be, were it offloaded
        with pytest.raises(ValueError, match="the weight of 0 is held on cpu and gathered on cuda; offloading is not"):
            gather_float8(network)


def _replaced(_: Path) -> None:
    """Parameters that are other tensors than before, twice called, and a weight that only `Float8Linear` may use."""
    from small_flux import inputs

    from srpo_kernels import gather_float8, quantize_fp8, revert_float8

    network = _small()
    expected = _pass(network)
    gather_float8(network)
    network.load_state_dict({name: value.clone() for name, value in network.state_dict().items()}, assign=True)
    _same(_pass(network), expected)
    network.to(FP32).to(BF16)
    _same(_pass(network), expected)
    network.load_state_dict({name: 2 * value for name, value in network.state_dict().items()}, assign=True)
    gather_float8(network)
    block = network.transformer_blocks[0]
    held = _whole(block.attn.to_q.weight)
    block.unshard()
    assert torch.equal(block.attn.to_q.weight.quantized.dequantize(), quantize_fp8(held).dequantize())
    assert "Float8Weight" in repr(block.attn.to_q.weight)
    block.reshard()
    revert_float8(network)
    with pytest.raises(TypeError, match=r"a weight gathered in e4m3 \(gather_float8\) is for Float8Linear only"):
        network(**inputs(BF16))


def _recomputed(_: Path) -> None:
    """Within checkpointing, which gathers in backward a second time."""
    from srpo_kernels.checkpointing import flux_policy

    network = _small()
    expected = _pass(network)
    for mode in ("selective", "block"):
        flux_policy(network, mode, batch=2, tokens=17)
        _same(_pass(network), expected)


def _compiled(_: Path) -> None:
    """Under `torch.compile`, without a break, and with the weights of now."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    from srpo_kernels import gather_float8

    x, found = torch.randn(4, 6).to(BF16), []
    for compiled in (True, False):
        network = _layers(6, 4, 2)
        for layer in network if compiled else ():
            layer.compile(backend="aot_eager", fullgraph=True)
        fully_shard(network, mesh=init_device_mesh("cpu", (2,)))
        gather_float8(network)
        for _step in range(2):
            out = network(x)
            out.float().square().sum().backward()
            found.append({"output": out, **{name: _whole(p.grad) for name, p in network.named_parameters()}})
            for parameter in network.parameters():
                parameter.detach().mul_(0.75)
            network.zero_grad()
    assert not torch.equal(found[0]["output"], found[1]["output"])
    for got, expected in zip(found[:2], found[2:], strict=True):
        _same(got, expected)


def _accumulated(_: Path) -> None:
    """Gradients that stay whole until the last backward, which averages them."""
    network = _small()
    expected = _pass(network)
    network.set_requires_gradient_sync(False)
    _pass(network)
    network.set_requires_gradient_sync(True)
    got = _pass(network)
    twice = got.keys() - {"output", EVERYWHERE}
    _same({name: got[name] / 2 for name in twice}, {name: expected[name] for name in twice})


def _saved(folder: Path) -> None:
    """A distributed checkpoint of model and optimizer resumes bitwise."""
    import torch.distributed.checkpoint as dcp
    from small_flux import inputs
    from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

    from srpo_kernels.optim import AdamW

    def step(network: Any, optimizer: Any) -> None:
        network(**inputs(BF16))[0].float().square().mean().backward()
        optimizer.step()
        network.zero_grad()

    network = _small()
    optimizer = AdamW(network.parameters(), 1e-3)
    step(network, optimizer)
    model, state = get_state_dict(network, optimizer)
    dcp.save({"model": model, "optimizer": state}, checkpoint_id=str(folder / "saved"))
    step(network, optimizer)
    expected = {name: _whole(p.detach()) for name, p in network.named_parameters()}

    network = _small()
    optimizer = AdamW(network.parameters(), 1e-3)
    model, state = get_state_dict(network, optimizer)
    dcp.load({"model": model, "optimizer": state}, checkpoint_id=str(folder / "saved"))
    set_state_dict(network, optimizer, model_state_dict=model, optim_state_dict=state)
    step(network, optimizer)
    _same({name: _whole(p.detach()) for name, p in network.named_parameters()}, expected)


def _rollout(_: Path) -> None:
    """`run.fp8_all_gather`: rollouts use the gathered weights as they are, quantising nothing."""
    from torch.distributed.device_mesh import init_device_mesh

    from srpo.assets import resolve_asset
    from srpo.models import Flux

    path, size = resolve_asset("tiny", "pipeline"), (32, 32)
    options: dict[str, Any] = dict(precision="fp8", max_sequence_length=16, trainable=True, weights="bf16")
    parted, whole = (Flux.load(path, **options) for _flux in range(2))
    for flux in (parted, whole):
        flux.patch("auto")
    parted.shard(init_device_mesh("cpu", (2,)), fp8_all_gather=True)
    weights = {flux: list(flux.transformer.parameters()) for flux in (parted, whole)}  # those an optimizer has
    noise = parted.noise(2, *size, torch.Generator().manual_seed(0))
    conditioning = whole.encode_prompts(["a", "b"])
    for _step in range(2):
        found = []
        for flux, parameters in weights.items():
            with flux.whole():
                assert flux.quantized is not None
                found.append(flux.trajectory([1.0, 0.5], conditioning, 3.5, size, quantized=True)(noise, 1))
                assert flux.quantized.refresh(force=True) == (0 if flux is parted else len(flux.quantized.names))
            found.append(flux.velocity(noise, torch.full((2,), 0.5), conditioning, 3.5, size))
            found[-1].square().mean().backward()
            for parameter in parameters:
                parameter.detach().mul_(0.75)
        assert torch.equal(found[0], found[2])
        assert torch.equal(found[1], found[3])


def _differentiate_e4m3(patched: pytest.MonkeyPatch) -> None:
    """Has whole layers differentiate, by their inputs, as those do that were gathered in e4m3."""
    from srpo_kernels import float8_linear, quantize_fp8

    in_e4m3 = float8_linear._input_gradient_fp8

    def wide(gradient: Tensor, weight: Tensor, scale: Tensor | None) -> Tensor:
        values, scale = quantize_fp8(weight) if scale is None else (weight, scale)
        return gradient @ (values.float() * scale).to(gradient.dtype)

    def narrow(gradient: Tensor, weight: Tensor, scale: Tensor | None) -> Tensor:
        return in_e4m3(gradient, *(quantize_fp8(weight) if scale is None else (weight, scale)))

    patched.setattr(float8_linear, "_input_gradient", wide)
    patched.setattr(float8_linear, "_input_gradient_fp8", narrow)


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("sharded")
    with pytest.MonkeyPatch.context() as patched:
        path = f"{Path(__file__).parent}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"
        patched.setenv("PYTHONPATH", path)  # the workers import this file
        torch.multiprocessing.spawn(_worker, (str(folder),), nprocs=2)
    return {case: torch.load(folder / f"{case}.pt") for case in CASES}


@pytest.mark.parametrize("case", CASES)
def test_sharded_is_unsharded(case: str, found: dict[str, dict[str, Any]], monkeypatch: pytest.MonkeyPatch) -> None:
    """Both ranks see the same batch, so that their mean is the gradient of one."""
    if "gathered" in case:  # inputs' gradients are of what the weight is in e4m3
        _differentiate_e4m3(monkeypatch)
    ours, whole = found[case], _run(case, sharded=False)
    # Fp32 weights differ from bf16 ones once they were stepped.
    for got, expected in zip(ours["steps"][: 1 if "mixed" in case else 2], whole["steps"], strict=False):
        assert got.keys() == expected.keys()
        differ = {name for name in got if not torch.equal(got[name], expected[name])}
        assert differ <= {EVERYWHERE}
        if differ:
            torch.testing.assert_close(got[EVERYWHERE], expected[EVERYWHERE], rtol=0.02, atol=0.1)
    if "mixed" not in case:
        assert all(torch.equal(ours["trained"][name], whole["trained"][name]) for name in whole["trained"])


@pytest.mark.parametrize("case", CASES)
def test_what_is_gathered(case: str, found: dict[str, dict[str, Any]]) -> None:
    """Each of the two ranks sends its half of the bytes: of bf16 weights, and of e4m3 ones with their scales."""
    nbytes = found[case]["bytes"]
    rest = nbytes["rest"] - nbytes["instead of"]
    assert (nbytes["frozen"] > 0) == ("frozen" in case)
    assert (nbytes["e4m3"] > 0) == ("gathered" in case)
    assert nbytes["gathered"] == (rest // (2 if "mixed" in case else 1) + nbytes["frozen"] + nbytes["e4m3"]) // 2
