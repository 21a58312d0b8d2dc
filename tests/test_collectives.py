"""What ranks exchange in an update, counted against closed forms."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from diffusers import FluxTransformer2DModel

from srpo.config import load_config
from srpo.distributed import Ranks
from srpo.errors import InputError
from srpo.hardware import parse_gpu
from srpo.plan import make_plan
from srpo.plan.collectives import Collective, count_collectives, pretended_ranks
from srpo.plan.setting import Setting, Sharding
from srpo.plan.sizes import Sizes

RANKS = 32


def setting(
    recipe: str, sharding: Sharding, *overrides: str, count: int = RANKS, blocks: tuple[int, int] | None = None
) -> Setting:
    config = load_config(recipe, overrides)
    sizes = Sizes.of(config)
    if blocks is not None:
        with torch.device("meta"):
            shape = dict(guidance_embeds=True, num_layers=blocks[0], num_single_layers=blocks[1])
            sizes = replace(sizes, transformer=FluxTransformer2DModel(**shape))
    return Setting(config, parse_gpu("H20"), count, sharding, sizes)


def padded(parameter: torch.Tensor, shards: int) -> int:
    """Elements of a parameter of which every rank has as many rows."""
    rows = parameter.shape[0]
    return -(-rows // shards) * shards * (parameter.numel() // rows)


def counted(of: Setting) -> dict[str, Collective]:
    return {found.kind: found for found in count_collectives(of)}


def check_sharded(of: Setting) -> None:
    """Gathered: whole for each rollout, and for each draw in forward and, if it is freed, backward. Scattered: in each
    backward, or once an update. Summed among replicas: once an update.
    """
    weights = sum(padded(parameter, of.shards) for parameter in of.sizes.transformer.parameters())
    once, passes = of.config.run.reduce == "update", 1 + of.config.run.reshard_after_forward
    found = counted(of)
    assert found["all_gather"].bytes == of.weight_item * weights * (of.batches + passes * of.draws)
    assert found["reduce_scatter"].bytes == of.gradient_item * weights * (1 if once else of.draws)
    assert {found["all_gather"].ranks, found["reduce_scatter"].ranks} == {of.shards}
    units = 1 + sum(of.sizes.blocks)
    assert found["reduce_scatter"].calls == units * (1 if once else of.draws)
    replicas = of.count // of.shards
    assert ("all_reduce" in found) == (replicas > 1)
    if replicas > 1:
        summed = found["all_reduce"]
        assert (summed.ranks, summed.calls, summed.bytes) == (replicas, units, of.gradient_item * weights // of.shards)


@pytest.mark.parametrize(("sharding", "reduce"), [("fsdp", "backward"), ("hsdp", "update")])
def test_bytes_of_sharded_ranks_are_those_of_their_parameters(sharding: Sharding, reduce: str) -> None:
    many = ("srpo.batch_size=128", "run.micro_batch=1", "run.draws_per_rollout=2", f"run.reduce={reduce}")
    check_sharded(setting("tiny", sharding, *many))


def test_weights_that_stay_are_gathered_once_a_draw() -> None:
    check_sharded(setting("tiny", "fsdp", "srpo.batch_size=64", "run.micro_batch=1", "run.reshard_after_forward=false"))


def test_plan_shows_them_and_adapters_reduce_little() -> None:
    config = load_config("tiny", ["run.sharding=fsdp", "run.micro_batch=1", "model.lora.rank=2"])
    made = make_plan("tiny", config, parse_gpu("H20"), 4, collectives=True)
    gathered, scattered = made.collectives or []
    assert 0 < scattered.bytes < gathered.bytes / 100
    lines = str(made).partition("exchanged in an update")[2].splitlines()
    assert [line.split()[:3] for line in lines[2:4]] == [[c.kind, "4", str(c.calls)] for c in made.collectives or []]
    assert made.as_dict()["collectives"][1]["bytes"] == scattered.bytes


def test_flux_wide_ranks() -> None:
    check_sharded(setting("flux-dev-hps", "fsdp", blocks=(1, 1)))


@pytest.mark.slow
def test_flux_dev_on_32_ranks() -> None:
    check_sharded(setting("flux-dev-hps", "fsdp"))


def test_replicas_sum_their_gradients_in_few_calls() -> None:
    of = setting("tiny", "none", "run.micro_batch=1")
    [summed] = count_collectives(of)
    assert (summed.kind, summed.ranks) == ("all_reduce", RANKS)
    assert summed.bytes == of.gradient_item * of.sizes.parameters
    assert summed.calls == math.ceil(summed.bytes / (32 << 20)) == 1
    assert summed.sent == 2 * summed.bytes * (RANKS - 1) / RANKS


def test_one_rank_exchanges_nothing_to_count() -> None:
    with pytest.raises(InputError, match="more than one rank"):
        count_collectives(setting("tiny", "none", count=1))


def test_average_travels_in_buckets_of_one_dtype(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every tensor is summed, once, in few calls; the pretended sum is the rank's own, so a mean is a `RANKS`th."""
    monkeypatch.setattr("srpo.distributed._BUCKET", 64)
    calls = []
    original = torch.distributed.all_reduce
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda tensor: (calls.append(tensor.nbytes), original(tensor)))
    tensors = [torch.full((size,), 32.0, dtype=dtype) for size, dtype in _SIZES]
    with pretended_ranks(RANKS):
        Ranks(0, RANKS, torch.device("cpu")).average(tensors)
    assert all(tensor.eq(1).all() for tensor in tensors)
    assert sorted(calls) == [8, 16, 64, 400]


_SIZES = [(8, torch.float32), (4, torch.bfloat16), (8, torch.float32), (100, torch.float32), (4, torch.float32)]
