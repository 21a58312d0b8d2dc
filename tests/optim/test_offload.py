"""States in host memory: the bits of states on the device, whatever the slices, and where everything is.

On a machine without a GPU the host is the device, too; what goes through the buffers is the same.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator

import pytest
import torch
from adamw_cases import LR, MODES, assert_same, everything, parameters, take_steps
from torch import Tensor, nn

from srpo_kernels.optim import AdamW, step_in_backward, streaming
from srpo_kernels.optim.work import every_storage, places

#: One of a row, one of rows longer than a slice, some that share a slice, small ones, and an empty one.
SHAPES = ((130, 200), (7,), (), (9, 50, 40), (0, 3), (1, 20000), (20, 1000), (40, 30), (5, 0))


def _optimizer(weights: str, moments: str, offload: str, **options: object) -> AdamW:
    made = parameters(weights, *SHAPES)
    # Options by group, so that lists of members that are stored alike differ.
    groups = [{"params": made[:5]}, {"params": made[5:], "lr": 1e-3}]
    defaults: dict = dict(ema_decay=0.9, max_grad_norm=0.1, seed=5)
    return AdamW(groups, LR, weights=weights, moments=moments, offload=offload, **{**defaults, **options})


def _assert_alike(one: AdamW, other: AdamW) -> None:
    assert_same(everything(one), everything(other))
    assert_same(list(one.telemetry.values()), list(other.telemetry.values()))


@pytest.fixture
def buffers(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Sizes of all buffers made, which are small enough for many slices."""
    made: list[int] = []
    plain = streaming._Slot.__init__

    def counted(slot: streaming._Slot, size: int, device: torch.device) -> None:
        made.append(size)
        plain(slot, size, device)

    monkeypatch.setattr(streaming._Slot, "__init__", counted)
    monkeypatch.setattr(streaming, "DEVICE_BYTES", 150_000)
    return made


@pytest.mark.parametrize("every", [1, 2])
@pytest.mark.parametrize("offload", ["ema", "states"])
@pytest.mark.parametrize(("weights", "moments"), [*MODES, ("split32", "M2"), ("split24", "M3")])
def test_bits_are_those_of_states_on_the_device(
    weights: str, moments: str, offload: str, every: int, buffers: list[int]
) -> None:
    hosted, plain = (_optimizer(weights, moments, kind, ema_every=every) for kind in (offload, "none"))
    for number in range(4):
        for optimizer in (hosted, plain):
            if number == 2:  # a step that is skipped, so steps and calls differ
                optimizer.param_groups[0]["params"][0].grad[3, 3] = torch.nan
                optimizer.step()
            else:
                take_steps(optimizer, 1, first=number)
        _assert_alike(hosted, plain)
    assert buffers
    longest = 20000 * (16 if weights == "fp32" else 12) + 4 * streaming._ALIGNMENT
    assert max(buffers) <= max(50_000, longest)
    assert_same(hosted.master_weights() + hosted.ema_weights(), plain.master_weights() + plain.ema_weights())


def test_parameters_whose_averages_turn_at_different_steps() -> None:
    hosted, plain = (_optimizer("split32", "M4", kind, ema_every=2) for kind in ("states", "none"))
    for optimizer in (hosted, plain):
        take_steps(optimizer, 1)
        optimizer.param_groups[1]["params"][0].grad = None  # falls behind
        optimizer.step()
        take_steps(optimizer, 2, first=1)
    _assert_alike(hosted, plain)


def test_slices_are_bounded_and_cover_all_rows() -> None:
    optimizer = _optimizer("split32", "M4", "states")
    take_steps(optimizer, 1)
    storages = [storage for _, storage in every_storage(optimizer) if storage is not None and storage.hosted]
    assert [storage.parameter.shape for storage in storages] == [(130, 200), (9, 50, 40), (1, 20000), (20, 1000)]
    whole = [
        streaming._Rows(i, storage, torch.zeros_like(storage.parameter), 0, storage.parameter.shape[0])
        for i, storage in enumerate(storages)
    ]
    names = ["remainder", "exp_avg", "exp_avg_sq", "ema"]
    for capacity in (10, 10_000, 100_000, 10**6):
        slices = list(streaming._slices(whole, names, capacity))
        rows: dict[int, int] = dict.fromkeys(range(4), 0)
        for slice_ in slices:
            assert sum(part.room(names) for part in slice_) <= capacity or sum(part.count for part in slice_) == 1
            for part in slice_:
                assert part.first == rows[part.number]
                rows[part.number] += part.count
        assert list(rows.values()) == [storage.parameter.shape[0] for storage in storages]
        assert len(slices) == {10: 160, 10**6: 1}.get(capacity, len(slices))


def test_small_tensors_stay_on_the_device() -> None:
    optimizer = _optimizer("split32", "M4", "states")
    take_steps(optimizer, 1)
    for parameter, storage in every_storage(optimizer):
        assert storage is not None
        assert bool(storage.hosted) == (parameter.ndim > 1 and parameter.numel() >= 16384)


def test_states_are_saved_and_loaded_across_kinds() -> None:
    """Native and canonical, from and to states on the device."""
    optimizers = {kind: _optimizer("split24", "M2", kind) for kind in ("none", "ema", "states")}
    for optimizer in optimizers.values():
        take_steps(optimizer, 2)
    for saver in optimizers.values():
        for kind in optimizers:
            loaded, converted = _optimizer("split24", "M2", kind), _optimizer("split24", "M2", kind)
            for mine, other in zip(places(loaded), places(saver), strict=True):
                mine.data.copy_(other.data)
            loaded.load_state_dict(copy.deepcopy(saver.state_dict()))
            assert loaded.offload == kind
            assert_same(everything(loaded), everything(saver))
            converted.load_canonical_state_dict(saver.canonical_state_dict())
            assert_same(converted.master_weights(), saver.master_weights())
            take_steps(loaded, 1, first=2)
    for optimizer in optimizers.values():
        take_steps(optimizer, 1, first=2)
        twin = copy.deepcopy(optimizer)
        take_steps(optimizer, 1, first=3)
        take_steps(twin, 1, first=3)
        _assert_alike(optimizer, twin)


def test_steps_in_backward(buffers: list[int]) -> None:
    def train(offload: str, release: bool) -> AdamW:
        torch.manual_seed(0)
        network = nn.Sequential(nn.Linear(130, 140), nn.GELU(), nn.Linear(140, 130)).bfloat16()
        optimizer = AdamW(network.parameters(), LR, offload=offload, ema_decay=0.9, ema_every=2)
        handle = step_in_backward(optimizer, blocks=[network]) if release else None
        for number in range(3):
            x = torch.randn(4, 130, generator=torch.Generator().manual_seed(number)).bfloat16()
            network(x).float().square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        if handle is not None:
            handle.remove()
        return optimizer

    _assert_alike(train("states", True), train("none", False))
    assert buffers


def test_strides() -> None:
    def strided() -> Tensor:
        return nn.Parameter(parameters("split32", (200, 130))[0].detach().T)

    both = [AdamW([strided()], LR, offload=kind) for kind in ("states", "none")]
    for optimizer in both:
        take_steps(optimizer)
    _assert_alike(*both)


def test_offload_is_checked() -> None:
    with pytest.raises(ValueError, match="AdamW: offload must be one of none, ema, states, got 'disk'"):
        AdamW(parameters("split32", (3, 3)), LR, offload="disk")


class _Clock:
    """What happened before, by queue: as much as a CUDA stream or event promises."""

    now: dict[str, int]


class _Event(_Clock):
    def __init__(self) -> None:
        self.now = {}

    def record(self, stream: _Stream) -> None:
        self.now = dict(stream.now)


class _Stream(_Clock):
    def __init__(self, name: str) -> None:
        self.name, self.now = name, {}

    def wait_event(self, other: _Clock) -> None:
        for name, count in other.now.items():
            self.now[name] = max(self.now.get(name, 0), count)

    wait_stream = wait_event


def test_queues_promise_the_order_that_buffers_need(monkeypatch: pytest.MonkeyPatch) -> None:
    """On made-up streams: every use of a buffer comes after its last use, and the caller waits for all of them."""
    caller, made, current = _Stream("step"), iter([_Stream("fill"), _Stream("empty")]), []
    uses: dict[int, list[tuple[str, dict[str, int]]]] = {}

    @contextlib.contextmanager
    def on(stream: _Stream) -> Iterator[None]:
        current.append(stream)
        yield
        current.pop()

    def use(slot: streaming._Slot, kind: str) -> None:
        stream = current[-1]
        assert stream.name == kind
        for name, before in uses.get(id(slot), [])[-1:]:
            assert stream.now.get(name, 0) >= before[name], f"{kind} may overtake {name}"
        stream.now[stream.name] = stream.now.get(stream.name, 0) + 1
        uses.setdefault(id(slot), []).append((kind, dict(stream.now)))

    lanes, after, slots = streaming._lanes, streaming._Lane.after, []
    slot_made = streaming._Slot.__init__

    def slot_with_events(slot: streaming._Slot, size: int, device: torch.device) -> None:
        slot_made(slot, size, device)
        slot.filled, slot.stepped, slot.emptied = _Event(), _Event(), _Event()  # type: ignore[assignment]
        slots.append(slot)

    @contextlib.contextmanager
    def used_after(lane: streaming._Lane, before: _Event, done: _Event) -> Iterator[None]:
        with after(lane, before, done):  # type: ignore[arg-type]
            yield
            use(next(slot for slot in slots if done in (slot.filled, slot.stepped, slot.emptied)), current[-1].name)

    monkeypatch.setattr(streaming, "_lanes", lambda _: lanes(torch.device("cuda")))
    monkeypatch.setattr(streaming._Lane, "after", used_after)
    monkeypatch.setattr(streaming._Slot, "__init__", slot_with_events)
    monkeypatch.setattr(streaming, "DEVICE_BYTES", 150_000)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _: caller)
    monkeypatch.setattr(torch.cuda, "Stream", lambda _: next(made))
    monkeypatch.setattr(torch.cuda, "stream", on)
    hosted, plain = (AdamW(parameters("split32", (1000, 200)), LR, offload=kind) for kind in ("states", "none"))
    take_steps(hosted, 1)
    take_steps(plain, 1)
    _assert_alike(hosted, plain)
    assert len(slots) == 3
    for slot in slots:
        kinds = [kind for kind, _ in uses[id(slot)]]
        assert len(kinds) > 9
        assert kinds == ["fill", "step", "empty"] * (len(kinds) // 3)
        assert caller.now["empty"] >= uses[id(slot)][-1][1]["empty"]
