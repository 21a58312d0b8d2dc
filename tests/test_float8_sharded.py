"""`Float8Linear` and the base frozen in e4m3 under FSDP2, on two gloo processes."""

from __future__ import annotations

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
CASES = ("trained", "trained, mixed", "frozen", "frozen, mixed")

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

    from srpo_kernels import patch
    from srpo_kernels.float8_linear import convert_to_float8, freeze_float8
    from srpo_kernels.optim import AdamW

    mixed, frozen = "mixed" in case, "frozen" in case
    network = model(FP32 if mixed else BF16, num_layers=1, num_single_layers=1)
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
    if case == "trained, mixed":
        convert_to_float8(network, backward="fp8")  # after fully_shard
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
    return {
        "steps": steps,
        "trained": {name: _whole(parameter.detach()) for name, parameter in trained.items()},
        "bytes": {
            "rest": sum(nbytes for name, nbytes in held.items() if network.get_parameter(name).is_floating_point()),
            "frozen": sum(nbytes for name, nbytes in held.items() if network.get_parameter(name).dtype == torch.uint8),
            "gathered": gathered.nbytes // 2,
        },
    }


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("sharded")
    with pytest.MonkeyPatch.context() as patched:
        path = f"{Path(__file__).parent}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"
        patched.setenv("PYTHONPATH", path)  # the workers import this file
        torch.multiprocessing.spawn(_worker, (str(folder),), nprocs=2)
    return {case: torch.load(folder / f"{case}.pt") for case in CASES}


@pytest.mark.parametrize("case", CASES)
def test_sharded_is_unsharded(case: str, found: dict[str, dict[str, Any]]) -> None:
    """Both ranks see the same batch, so that their mean is the gradient of one."""
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
    rest = nbytes["rest"] // 2 if "mixed" in case else nbytes["rest"]
    assert (nbytes["frozen"] > 0) == ("frozen" in case)
    assert nbytes["gathered"] == (rest + nbytes["frozen"]) // 2
