"""AdamW on FSDP2's shards, on two gloo processes: the bits of one process, checkpoints that go from two to one."""

from __future__ import annotations

import math
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from adamw_cases import LR, MODES, assert_same, everything
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict

from srpo_kernels.optim import AdamW, clip_grad_norm_, step_in_backward, streaming

ALL_MODES = [(*modes, "none") for modes in [*MODES, ("split32", "M2"), ("split24", "M3")]]
ALL_MODES += [("split32", "M4", "states"), ("split24", "M2", "ema")]


def _network(weights: str) -> nn.Module:
    """131 rows of 130 are 66 and 65 of them on two processes; 1 row is one and none."""
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(130, 131), nn.Linear(131, 129, bias=False), nn.Linear(129, 1))
    network[1].weight.requires_grad_(False)
    return network.to(torch.float32 if weights == "fp32" else torch.bfloat16)


def _optimizer(network: nn.Module, weights: str, moments: str, **options: Any) -> AdamW:
    """Two groups; the second one's step is far larger."""
    first, *rest = (parameter for parameter in network.parameters())
    groups = [{"params": rest}, {"params": [first], "lr": 1e-3}]
    defaults: dict[str, Any] = dict(weights=weights, moments=moments, max_grad_norm=1e-3, ema_decay=0.9, seed=11)
    return AdamW(groups, LR, **{**defaults, **options})


def _backward(network: nn.Module, number: int) -> None:
    dtype = next(network.parameters()).dtype
    x = torch.randn(8, 130, generator=torch.Generator().manual_seed(number)).to(dtype)
    network.zero_grad()
    network(x).float().square().mean().backward()


def _whole(tensor: Tensor) -> Tensor:
    """All of a DTensor, as bytes where gloo has no such dtype."""
    from torch.distributed.tensor import DTensor

    if not isinstance(tensor, DTensor):
        return tensor
    parts: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(parts, tensor.to_local())
    return torch.cat(parts)


def _worker(rank: int, folder: str) -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    try:
        streaming.DEVICE_BYTES = 60_000  # so that a shard takes several slices
        for weights, moments, offload in ALL_MODES:
            _same_bits_as_one_process(folder, weights, moments, offload)
        for clip in ("none", "previous", "two_pass"):
            _in_backward(clip)
        _checks_of_placements()
    finally:
        dist.destroy_process_group()


def _fully_sharded(network: nn.Module) -> nn.Module:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (2,))
    for layer in network:
        fully_shard(layer, mesh=mesh)
    fully_shard(network, mesh=mesh)
    return network


def _same_bits_as_one_process(folder: str, weights: str, moments: str, offload: str) -> None:
    name = f"{folder}/{weights}-{moments}-{offload}"
    network, alone = _fully_sharded(_network(weights)), _network(weights)
    sharded = _optimizer(network, weights, moments, offload=offload)
    single = _optimizer(alone, weights, moments)
    for number in range(3):
        _backward(network, number)
        for one, other in zip(network.parameters(), alone.parameters(), strict=True):
            other.grad = None if one.grad is None else _whole(one.grad)
        if number == 1:  # not finite on one process only
            saved = next(network.parameters()).grad.to_local().clone()
            if dist.get_rank() == 0:
                next(network.parameters()).grad.to_local()[3, 3] = math.nan
            before = everything(sharded)
            sharded.step()
            assert_same([_local(x) for x in everything(sharded)], [_local(x) for x in before])
            assert sharded.telemetry["nonfinite"] == 1
            next(network.parameters()).grad.to_local().copy_(saved)
        sharded.step()
        single.step()
    assert_same([_whole(x) for x in everything(sharded)], everything(single))
    assert_same([_whole(x) for x in sharded.master_weights()], single.master_weights())
    assert_same([_whole(x) for x in sharded.ema_weights()], single.ema_weights())
    assert_same([x for _, x in sorted(sharded.telemetry.items())], [x for _, x in sorted(single.telemetry.items())])
    trained = next(network.parameters())
    state = sharded.state[trained]
    assert all(state[name].placements == trained.placements for name in state if name != "step")

    with sharded.average_parameters(), single.average_parameters():
        assert_same(*([_whole(p.detach()) for p in each.parameters()] for each in (network, alone)))
    assert_same([_whole(x) for x in sharded.master_weights()], single.master_weights())

    # Native and canonical states, given whole and sharded.
    for saved in (single.state_dict(), sharded.state_dict()):
        again = _optimizer(network, weights, moments, offload=offload)
        again.load_state_dict(saved)
        assert_same([_local(x) for x in everything(again)], [_local(x) for x in everything(sharded)])
    canonical = sharded.canonical_state_dict()
    wanted = single.canonical_state_dict()
    for number, entry in wanted["state"].items():
        assert_same(
            [_whole(canonical["state"][number][name]) for name in sorted(entry)], [entry[n] for n in sorted(entry)]
        )
    for saved in (canonical, wanted):
        again = _optimizer(network, weights, moments)
        again.load_canonical_state_dict(saved)
        assert_same([_whole(x) for x in again.master_weights()], single.master_weights())

    # What the parent process loads, and what it must find after one more step.
    _backward(network, 3)
    gradients = [None if p.grad is None else _whole(p.grad) for p in network.parameters()]
    network.zero_grad()
    for flat in (False, True):
        model, state = get_state_dict(network, sharded, options=StateDictOptions(flatten_optimizer_state_dict=flat))
        dcp.save({"model": model, "optimizer": state}, checkpoint_id=f"{name}-{flat}")
    for one, other, gradient in zip(network.parameters(), alone.parameters(), gradients, strict=True):
        if gradient is not None:
            other.grad = gradient.clone()
            one.grad = _sharded(gradient, one)
    norm = clip_grad_norm_(network.parameters(), 1e9)
    assert torch.equal(norm, clip_grad_norm_(alone.parameters(), 1e9))
    sharded.step()
    single.step()
    assert_same([_whole(x) for x in everything(sharded)], everything(single))
    clip_grad_norm_(network.parameters(), norm.item() / 2)
    clip_grad_norm_(alone.parameters(), norm.item() / 2)
    for one, other in zip(network.parameters(), alone.parameters(), strict=True):
        assert other.grad is None or torch.equal(_whole(one.grad), other.grad)
    if dist.get_rank() == 0:
        torch.save({"gradients": gradients, "after": everything(single)}, f"{name}.pt")


def _in_backward(clip: str) -> None:
    """Gradients of one layer at a time, when they have been reduced: the bits of a step after backward."""
    options: dict[str, Any] = {} if clip == "two_pass" else dict(max_grad_norm=None)
    network, plain = _fully_sharded(_network("split32")), _fully_sharded(_network("split32"))
    optimizer, after = (_optimizer(each, "split32", "M4", **options) for each in (network, plain))
    if clip == "previous":
        optimizer.max_grad_norm = 1e9
    counts: list[int] = []
    trained = [parameter for parameter in network.parameters() if parameter.requires_grad]
    for parameter in trained:
        parameter.register_post_accumulate_grad_hook(
            lambda _: counts.append(sum(each.grad is not None for each in trained))
        )
    with step_in_backward(optimizer, clip, blocks=network) as handle:  # type: ignore[arg-type]
        for number in range(3):
            x = torch.randn(8, 130, generator=torch.Generator().manual_seed(2 * number + dist.get_rank())).bfloat16()

            def loss(network: nn.Module, x: Tensor = x) -> Tensor:
                return network(x).float().square().mean()

            if clip == "two_pass":
                handle.backward(lambda loss=loss: loss(network))
            else:
                loss(network).backward()
            optimizer.step()
            loss(plain).backward()
            after.step()
            after.zero_grad()
            assert_same([_local(x) for x in everything(optimizer)], [_local(x) for x in everything(after)])
            assert_same(list(optimizer.telemetry.values()), list(after.telemetry.values()))
    assert 0 < max(counts) <= 2  # a layer's weight and bias
    with pytest.raises(ValueError, match="parameter 0 of group 0 is not sharded by FSDP2: its gradient would be used"):
        step_in_backward(AdamW([nn.Parameter(torch.ones(3, dtype=torch.bfloat16))], LR))


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def _sharded(whole: Tensor, like: Any) -> Tensor:
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(whole, like.device_mesh, like.placements)


def _checks_of_placements() -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    mesh = init_device_mesh("cpu", (2,))
    whole = torch.randn(5, 4, generator=torch.Generator().manual_seed(0)).bfloat16()
    columns = nn.Parameter(distribute_tensor(whole, mesh, [Shard(1)]))
    with pytest.raises(ValueError, match=r"AdamW: group 0: parameter 0 has placements .*only Shard\(0\) and Replicate"):
        AdamW([columns], LR)
    columns.grad = distribute_tensor(whole, mesh, [Shard(1)])
    with pytest.raises(ValueError, match=r"clip_grad_norm_: gradient 0 has placements"):
        clip_grad_norm_([columns], 1.0)

    rows = nn.Parameter(distribute_tensor(whole, mesh, [Shard(0)]))
    optimizer = AdamW([rows], LR)
    rows.grad = distribute_tensor(whole, mesh, [Replicate()])
    with pytest.raises(ValueError, match=r"the gradient of parameter 0 has placements .*, its parameter"):
        optimizer.step()
    rows.grad = distribute_tensor(whole, mesh, [Shard(0)])
    optimizer.step()

    # Copies count once; plain tensors and several placements may be mixed.
    mixed = [nn.Parameter(distribute_tensor(whole, mesh, [Replicate()])), rows, nn.Parameter(whole.clone())]
    for parameter, placement in zip(mixed, ([Replicate()], [Shard(0)], None), strict=True):
        parameter.grad = whole.clone() if placement is None else distribute_tensor(whole, mesh, placement)
    optimizer = AdamW(mixed, LR)
    optimizer.step()
    norm = optimizer.telemetry["grad_norm"].item()
    assert norm == pytest.approx(math.sqrt(3) * whole.double().norm().item(), rel=1e-6)
    # Replicated over one dimension of the mesh and sharded over the other (HSDP).
    square = init_device_mesh("cpu", (2, 1))
    large = torch.randn(131, 130, generator=torch.Generator().manual_seed(0)).bfloat16()
    both = [nn.Parameter(distribute_tensor(large, square, [Replicate(), Shard(0)])), nn.Parameter(large.clone())]
    stepped = [AdamW([parameter], LR, weights="split24", moments="M2", max_grad_norm=0.1) for parameter in both]
    both[0].grad, both[1].grad = distribute_tensor(large, square, [Replicate(), Shard(0)]), large
    for each in stepped:
        each.step()
    assert_same([_local(x) for x in everything(stepped[0])], everything(stepped[1]))

    with pytest.raises(ValueError, match="is not sharded as its parameter is"):
        AdamW([nn.Parameter(whole.clone())], LR).load_state_dict(_state_of(rows))


def _state_of(parameter: nn.Parameter) -> dict[str, Any]:
    optimizer = AdamW([parameter], LR)
    optimizer.step()
    return optimizer.state_dict()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two processes left after their own checks."""
    path = tmp_path_factory.mktemp("sharded")
    torch.multiprocessing.spawn(_worker, (str(path),), nprocs=2)
    return path


@pytest.mark.parametrize("flat", [False, True])
@pytest.mark.parametrize(("weights", "moments", "offload"), ALL_MODES)
def test_a_checkpoint_of_two_processes_goes_on_in_one(
    folder: Path, weights: str, moments: str, offload: str, flat: bool
) -> None:
    name = f"{weights}-{moments}-{offload}"
    network = _network(weights)
    optimizer = _optimizer(network, weights, moments, offload=offload)
    options = StateDictOptions(flatten_optimizer_state_dict=flat)
    before = [parameter.detach().clone() for parameter in network.parameters()]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model, state = get_state_dict(network, optimizer, options=options)  # takes a step with a learning rate of 0
        assert_same([parameter.detach() for parameter in network.parameters()], before)
        dcp.load({"model": model, "optimizer": state}, checkpoint_id=str(folder / f"{name}-{flat}"))
        set_state_dict(network, optimizer, model_state_dict=model, optim_state_dict=state, options=options)
    wanted = torch.load(folder / f"{name}.pt")
    for parameter, gradient in zip(network.parameters(), wanted["gradients"], strict=True):
        parameter.grad = gradient
    optimizer.step()
    assert_same(everything(optimizer), wanted["after"])
