"""AdamW as a `torch.optim.Optimizer`: options, clipping, skipped steps, telemetry, states, errors."""

from __future__ import annotations

import copy
import math
import pickle
from collections.abc import Callable

import pytest
import torch
from adamw_cases import LR, MODES, assert_same, everything, parameters, take_steps

from srpo_kernels.optim import AdamW, clip_grad_norm_

SHAPES = ((130, 200), (7,), (), (9, 50, 40), (0, 3))


def _optimizer(weights: str, moments: str, *, seed: int = 0, **options: object) -> AdamW:
    return AdamW(parameters(weights, *SHAPES), LR, weights=weights, moments=moments, seed=seed, **options)  # type: ignore[arg-type]


def test_state_takes_the_bytes_it_should() -> None:
    sizes = {}
    for weights in ("fp32", "split32", "split24", "bf16_sr"):
        for moments in ("fp32", "M4", "M3", "M2"):
            (parameter,) = parameters(weights, (256, 256))
            optimizer = AdamW([parameter], LR, weights=weights, moments=moments)
            take_steps(optimizer, 1)
            tensors = [parameter, *(value for value in optimizer.state[parameter].values() if value.ndim)]
            sizes[weights, moments] = sum(tensor.nbytes for tensor in tensors) / parameter.numel()
    assert sizes["fp32", "fp32"] == 12
    assert sizes["split32", "fp32"] == 12
    assert sizes["split32", "M4"] == 8
    assert sizes["split32", "M3"] == 7 + 4 / 128
    assert sizes["split32", "M2"] == 6 + 8 / 128
    assert sizes["split24", "M2"] == 5 + 8 / 128
    assert sizes["bf16_sr", "M4"] == 6


def test_small_tensors_are_kept_exactly() -> None:
    optimizer = _optimizer("split24", "M2")
    take_steps(optimizer, 1)
    large, vector, scalar, block, _ = (optimizer.state[p] for p in optimizer.param_groups[0]["params"])
    for state in (vector, scalar):
        assert state["remainder"].dtype == torch.int16
        assert state["exp_avg_sq"].dtype == torch.float32
    for state in (large, block):
        assert state["remainder"].dtype == torch.int8
        assert state["exp_avg_sq"].dtype == torch.uint8
    assert block["exp_avg_scale"].shape == (9, math.ceil(2000 / 128))


@pytest.mark.parametrize(("weights", "moments"), MODES)
def test_two_runs_have_the_same_bits_and_other_seeds_others(weights: str, moments: str) -> None:
    runs = [_optimizer(weights, moments, max_grad_norm=0.1, seed=seed) for seed in (0, 0, 1)]
    for optimizer in runs:
        take_steps(optimizer)
    one, two, other = map(everything, runs)
    assert_same(one, two)
    different = any(not torch.equal(a, b) for a, b in zip(one, other, strict=True))
    assert different == ((weights, moments) != ("fp32", "fp32"))


@pytest.mark.parametrize(("weights", "moments"), MODES)
def test_strides_do_not_matter(weights: str, moments: str) -> None:
    shape = (130, 200, 2)
    (plain,) = parameters(weights, shape)
    strided = torch.nn.Parameter(plain.detach().permute(2, 0, 1).contiguous().permute(1, 2, 0))
    assert not strided.is_contiguous()
    both = [AdamW([parameter], LR, weights=weights, moments=moments) for parameter in (plain, strided)]
    for optimizer in both:
        take_steps(optimizer)
    assert_same(everything(both[0]), everything(both[1]))


def test_groups_and_parameters_without_gradients() -> None:
    one, two, idle = parameters("split32", (130, 200), (130, 200), (8, 8))
    (whole,) = parameters("fp32", (130, 200), seed=1)
    groups = [
        {"params": [one, idle], "lr": torch.tensor(1e-4)},
        {"params": [two], "moments": "M2", "weights": "split24"},
    ]
    optimizer = AdamW(groups, LR)
    optimizer.add_param_group({"params": [whole], "weights": "fp32", "moments": "fp32", "lr": 0.0})
    before = idle.detach().clone()
    for parameter in (one, two, whole):
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    assert optimizer.state[one]["exp_avg"].dtype == torch.bfloat16
    assert optimizer.state[two]["exp_avg"].dtype == torch.uint8
    assert idle not in optimizer.state
    assert torch.equal(idle, before)
    masters = optimizer.master_weights()
    assert [master.dtype for master in masters] == [torch.float32] * 4
    assert torch.equal(masters[3], whole)
    step = (masters[0] - parameters("split32", (130, 200))[0].float()).abs()
    assert torch.allclose(step, torch.tensor(1e-4), rtol=1e-2)


def test_learning_rate_may_be_a_tensor_and_schedulers_work() -> None:
    fixed, live = _optimizer("split32", "M4"), _optimizer("split32", "M4")
    live.param_groups[0]["lr"] = torch.tensor(LR)
    schedulers = [torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5) for optimizer in (fixed, live)]
    for number in range(3):
        for optimizer, scheduler in zip((fixed, live), schedulers, strict=True):
            take_steps(optimizer, 1, first=number)
            scheduler.step()
    assert live.param_groups[0]["lr"] == pytest.approx(LR / 8)
    assert_same(everything(fixed)[:5], everything(live)[:5])


def test_closure_and_zero_grad() -> None:
    (parameter,) = parameters("split32", (8, 8))
    optimizer = AdamW([parameter], LR)

    def closure() -> float:
        optimizer.zero_grad()
        loss = parameter.float().square().sum()
        loss.backward()
        return loss.item()

    assert optimizer.step(closure) > 0
    assert optimizer.state[parameter]["step"] == 1
    optimizer.zero_grad()
    assert parameter.grad is None
    assert optimizer.step() is None
    assert optimizer.state[parameter]["step"] == 1


def test_fp32_gradients_of_bf16_parameters() -> None:
    one, other = parameters("split32", (130, 200)) + parameters("split32", (130, 200))
    one.grad_dtype = torch.float32
    one.grad = torch.randn(130, 200, generator=torch.Generator().manual_seed(0)).bfloat16().float()
    other.grad = one.grad.bfloat16()
    both = [AdamW([parameter], LR) for parameter in (one, other)]
    for optimizer in both:
        optimizer.step()
    assert_same(everything(both[0]), everything(both[1]))


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, 1e30])
@pytest.mark.parametrize(("weights", "moments"), MODES)
def test_a_gradient_that_is_not_finite_changes_no_byte(weights: str, moments: str, bad: float) -> None:
    optimizer, untroubled = (_optimizer(weights, moments, ema_decay=0.9, max_grad_norm=1.0) for _ in range(2))
    take_steps(untroubled, 3)
    take_steps(optimizer, 2)
    before = everything(optimizer)
    optimizer.param_groups[0]["params"][0].grad[3, 7] = bad
    optimizer.step()
    assert_same(everything(optimizer), before)
    assert optimizer.telemetry["nonfinite"] == (bad != 1e30)
    assert optimizer.telemetry["grad_norm"].isnan()
    assert optimizer.telemetry["update_norm"] == 0
    assert optimizer.telemetry["changed"] == 0
    take_steps(optimizer, 1, first=2)
    assert_same(everything(optimizer), everything(untroubled))


def test_a_bad_gradient_before_the_first_step_changes_no_weight() -> None:
    optimizer, untroubled = (_optimizer("split24", "M2", ema_decay=0.9) for _ in range(2))
    for parameter in optimizer.param_groups[0]["params"]:
        parameter.grad = torch.full_like(parameter, math.nan)
    optimizer.step()
    for each in (optimizer, untroubled):
        take_steps(each)
    assert_same(everything(optimizer), everything(untroubled))


@pytest.mark.parametrize("weights", ["fp32", "split32"])
def test_telemetry(weights: str) -> None:
    optimizer = _optimizer(weights, "fp32", max_grad_norm=0.1)
    assert optimizer.telemetry == {}
    take_steps(optimizer, 1)
    before = optimizer.master_weights()
    halves = [weight.bfloat16() for weight in before]
    take_steps(optimizer, 1, first=1)
    after, found = optimizer.master_weights(), optimizer.telemetry
    assert all(value.ndim == 0 for value in found.values())
    gradients = torch.cat([p.grad.double().flatten() for p in optimizer.param_groups[0]["params"]])
    flat = torch.cat([weight.double().flatten() for weight in after])
    moved = flat - torch.cat([weight.double().flatten() for weight in before])
    assert found["grad_norm"].item() == pytest.approx(gradients.norm().item(), rel=1e-6)
    assert found["weight_norm"].item() == pytest.approx(flat.norm().item(), rel=1e-6)
    assert found["update_norm"].item() == pytest.approx(moved.norm().item(), rel=1e-4)
    assert found["nonfinite"] == 0
    changed = torch.cat([(a.bfloat16() != b).flatten() for a, b in zip(after, halves, strict=True)]).float().mean()
    assert found["changed"].item() == pytest.approx(changed.item() if weights == "split32" else 0.0, rel=0.02)


@pytest.mark.parametrize("scale", [0.0, 1e-9, 1e-3, 1.0])
def test_clipping_is_torchs(scale: float) -> None:
    """The norm to 1e-6; a clipped step is a plain one on gradients that torch clipped, to fp32's own rounding."""
    folded, separate = (_optimizer("fp32", "fp32", max_grad_norm=norm) for norm in (0.1, None))
    for number in range(3):
        generator = torch.Generator().manual_seed(number)
        for one, other in zip(folded.param_groups[0]["params"], separate.param_groups[0]["params"], strict=True):
            one.grad = scale * torch.randn(one.shape, generator=generator)
            other.grad = one.grad.clone()
        norm = torch.nn.utils.clip_grad_norm_(separate.param_groups[0]["params"], 0.1, foreach=False)
        folded.step()
        separate.step()
        exact = math.sqrt(sum(p.grad.double().square().sum().item() for p in folded.param_groups[0]["params"]))
        assert folded.telemetry["grad_norm"].item() == pytest.approx(exact, rel=1e-6)
        assert norm.item() == pytest.approx(exact, rel=1e-5)
    for one, other in zip(folded.master_weights(), separate.master_weights(), strict=True):
        assert torch.allclose(one, other, rtol=3e-7, atol=1e-5 * LR)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_clip_grad_norm_is_torchs(dtype: torch.dtype) -> None:
    ours, theirs = ([torch.nn.Parameter(torch.zeros(s, dtype=dtype)) for s in SHAPES] for _ in range(2))
    for one, other in zip(ours, theirs, strict=True):
        one.grad = torch.randn(one.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
        other.grad = one.grad.clone()
    ours.append(torch.nn.Parameter(torch.zeros(3, dtype=dtype)))
    exact = math.sqrt(sum(p.grad.double().square().sum().item() for p in theirs))
    norm = clip_grad_norm_(iter(ours), exact / 2)
    torch.nn.utils.clip_grad_norm_([p.float() if p.grad is None else p for p in theirs], exact / 2)
    assert norm.dtype == torch.float32
    assert norm.item() == pytest.approx(exact, rel=1e-6)
    for one, other in zip(ours, theirs, strict=False):
        assert torch.allclose(one.grad, other.grad, rtol=1e-6 if dtype == torch.float32 else 2.0**-7)
    assert clip_grad_norm_(ours[-1], 1.0) == 0
    assert clip_grad_norm_(ours[0], 1e9, foreach=True).item() == pytest.approx(ours[0].grad.double().norm().item())


def test_clip_grad_norm_errors() -> None:
    (parameter,) = parameters("fp32", (3, 3))
    parameter.grad = torch.full_like(parameter, math.inf)
    with pytest.raises(ValueError, match="norm_type must be 2, got inf"):
        clip_grad_norm_([parameter], 1.0, norm_type=math.inf)
    with pytest.raises(RuntimeError, match="not finite"):
        clip_grad_norm_([parameter], 1.0, error_if_nonfinite=True)
    assert clip_grad_norm_([parameter], 1.0).isnan()


# --- states -----------------------------------------------------------------------------------


def _saved(optimizer: AdamW, way: str) -> dict:
    if way == "file":
        import io

        stream = io.BytesIO()
        torch.save(optimizer.state_dict(), stream)
        stream.seek(0)
        return torch.load(stream, weights_only=True)
    return copy.deepcopy(optimizer.state_dict())


@pytest.mark.parametrize("way", ["file", "copy"])
@pytest.mark.parametrize(("weights", "moments"), [*MODES, ("split24", "M3"), ("split32", "M2")])
def test_a_resumed_run_has_the_same_bits(weights: str, moments: str, way: str) -> None:
    optimizer = _optimizer(weights, moments, ema_decay=0.9, ema_every=2, max_grad_norm=0.1)
    take_steps(optimizer, 3)
    resumed = _optimizer(weights, moments, ema_decay=0.9, ema_every=2, max_grad_norm=0.1)
    if way == "copy":
        take_steps(resumed, 1, first=50)  # states that are there already are overwritten
    with torch.no_grad():
        for mine, other in zip(resumed.param_groups[0]["params"], optimizer.param_groups[0]["params"], strict=True):
            mine.copy_(other)
    saved = _saved(optimizer, way)
    resumed.load_state_dict(saved)
    assert_same(everything(resumed), everything(optimizer))
    for each in (optimizer, resumed):
        take_steps(each, 2, first=3)
    assert_same(everything(resumed), everything(optimizer))
    for one, other in zip(resumed.ema_weights(), optimizer.ema_weights(), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda optimizer: pickle.loads(pickle.dumps(optimizer))])
def test_copies_go_on_alike(duplicate: Callable[[AdamW], AdamW]) -> None:
    optimizer = _optimizer("split24", "M2", max_grad_norm=0.1, seed=5)
    take_steps(optimizer)
    twin = duplicate(optimizer)
    assert (twin.seed, twin.max_grad_norm, twin.telemetry.keys()) == (5, 0.1, optimizer.telemetry.keys())
    for each in (optimizer, twin):
        take_steps(each, first=3)
    assert_same(everything(twin), everything(optimizer))


def test_loading_runs_hooks_and_restores_options() -> None:
    optimizer = _optimizer("split32", "M4")
    optimizer.param_groups[0]["lr"] = 1e-3
    take_steps(optimizer, 1)
    resumed = _optimizer("split32", "M4")
    rate = resumed.param_groups[0]["lr"] = torch.tensor(5.0)
    calls = []
    resumed.register_load_state_dict_pre_hook(lambda _, state: calls.append("before") or state)
    resumed.register_load_state_dict_post_hook(lambda _: calls.append("after"))
    resumed.load_state_dict(optimizer.state_dict())
    assert calls == ["before", "after"]
    assert resumed.param_groups[0]["lr"] is rate
    assert rate == 1e-3


@pytest.mark.parametrize(("weights", "moments"), MODES)
def test_states_go_to_torch_and_back(weights: str, moments: str) -> None:
    """Into `torch.optim.AdamW` with fp32 weights, a step there, and back."""
    optimizer = _optimizer(weights, moments, ema_decay=0.9)
    take_steps(optimizer)
    saved = optimizer.canonical_state_dict()
    twins = [torch.nn.Parameter(weight) for weight in optimizer.master_weights()]
    theirs = torch.optim.AdamW(twins, lr=1.0)
    theirs.load_state_dict(saved)
    assert theirs.param_groups[0]["lr"] == LR
    for twin, parameter in zip(twins, optimizer.param_groups[0]["params"], strict=True):
        assert theirs.state[twin]["exp_avg_sq"].dtype == torch.float32
        assert theirs.state[twin]["step"] == 3
        twin.grad = torch.full_like(twin, 1e-4).to(parameter.dtype).float()
        parameter.grad = twin.grad.to(parameter.dtype)
    back = _optimizer(weights, moments, ema_decay=0.9)
    back.load_canonical_state_dict(saved)
    assert_same(back.master_weights() + back.ema_weights(), optimizer.master_weights() + optimizer.ema_weights())
    theirs.step()
    optimizer.step()
    noise = {"bf16_sr": 2.0**-7, "split24": 2.0**-15}.get(weights, 3e-7)
    for weight, twin in zip(optimizer.master_weights(), twins, strict=True):
        assert torch.allclose(weight, twin, rtol=noise, atol=1e-4 * LR)
    back.load_canonical_state_dict({**theirs.state_dict(), "master_weights": [twin.detach() for twin in twins]})
    returned = back.canonical_state_dict()["state"]
    for number, (weight, twin) in enumerate(zip(back.master_weights(), twins, strict=True)):
        assert torch.allclose(weight, twin, rtol=noise, atol=0)
        assert returned[number]["step"] == 4
        assert torch.allclose(returned[number]["exp_avg"], theirs.state[twin]["exp_avg"], rtol=0.07, atol=1e-7)
        assert torch.allclose(returned[number]["exp_avg_sq"], theirs.state[twin]["exp_avg_sq"], rtol=0.2, atol=1e-9)


def test_canonical_states_change_modes() -> None:
    old, new = _optimizer("split32", "M4"), _optimizer("split24", "M2")
    take_steps(old)
    new.load_canonical_state_dict(old.canonical_state_dict())
    for one, other in zip(old.master_weights(), new.master_weights(), strict=True):
        assert torch.allclose(one, other, rtol=2.0**-15, atol=0)
    assert new.param_groups[0]["moments"] == "M2"


def test_canonical_states_without_weights_leave_them() -> None:
    optimizer = _optimizer("split32", "M4")
    before = [p.detach().clone() for p in optimizer.param_groups[0]["params"]]
    other = _optimizer("split32", "M4")
    take_steps(other)
    saved = other.canonical_state_dict()
    del saved["master_weights"]
    optimizer.load_canonical_state_dict(saved)
    assert_same([p.detach() for p in optimizer.param_groups[0]["params"]], before)
    assert optimizer.master_weights()[0].equal(before[0].float())


def test_before_the_first_step() -> None:
    optimizer = _optimizer("split32", "M4", ema_decay=0.5)
    assert optimizer.state_dict()["state"] == {}
    assert optimizer.canonical_state_dict()["state"] == {}
    for one, other, parameter in zip(
        optimizer.master_weights(), optimizer.ema_weights(), optimizer.param_groups[0]["params"], strict=True
    ):
        assert torch.equal(one, parameter.float())
        assert torch.equal(other, parameter.float())


# --- errors -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(lr=-1.0), "group 0: lr must be finite and not negative, got -1.0"),
        (dict(lr=math.nan), "group 0: lr must be finite"),
        (dict(lr=torch.zeros(2)), r"group 0: lr must have one element, got shape \[2\]"),
        (dict(betas=(0.9, 1.0)), r"group 0: betas must be two numbers in \[0, 1\)"),
        (dict(betas=(0.9,)), "group 0: betas"),
        (dict(eps=-1e-8), "group 0: eps must be"),
        (dict(weight_decay=math.inf), "group 0: weight_decay must be"),
        (dict(weights="split16"), "group 0: weights must be one of fp32, split32, split24, bf16_sr, got 'split16'"),
        (dict(moments="M5"), "group 0: moments must be one of fp32, M4, M3, M2, got 'M5'"),
        (dict(ema_decay=1.0), r"group 0: ema_decay must lie in \[0, 1\)"),
        (dict(ema_every=0), "group 0: ema_every must be a positive integer, got 0"),
        (dict(max_grad_norm=0.0), "max_grad_norm must be positive or None, got 0.0"),
        (dict(seed=-1), "seed must be an integer"),
    ],
)
def test_options_are_checked(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match="AdamW: .*" + message):
        AdamW(parameters("split32", (3, 3)), **{"lr": LR, **options})


def test_parameters_are_checked() -> None:
    (half,), (whole,) = parameters("split32", (3, 3)), parameters("fp32", (3, 3))
    with pytest.raises(
        TypeError, match=r'group 0: parameter 1 is torch\.float32, but weights="split32" needs torch\.bfloat16'
    ):
        AdamW([half, whole], LR)
    optimizer = AdamW([half], LR)
    with pytest.raises(TypeError, match=r'group 1: parameter 0 is torch\.float32, but weights="bf16_sr"'):
        optimizer.add_param_group({"params": [whole], "weights": "bf16_sr"})
    assert len(optimizer.param_groups) == 1
    with pytest.raises(TypeError, match=r'weights="fp32" needs torch\.float32'):
        AdamW([half], LR, weights="fp32")
    with pytest.raises(ValueError, match="group 1: parameter 0 is on meta, but the first parameter on cpu"):
        optimizer.add_param_group({"params": [torch.nn.Parameter(torch.zeros(3, device="meta").bfloat16())]})


def test_gradients_are_checked() -> None:
    one, two = parameters("split32", (3, 3), (3, 3))
    optimizer = AdamW([one, two], LR)
    two.grad_dtype = None
    two.grad = torch.zeros(3, 3, dtype=torch.float64)
    with pytest.raises(TypeError, match=r"group 0: the gradient of parameter 1 is torch\.float64"):
        optimizer.step()
    two.grad = torch.zeros(3, 3, dtype=torch.bfloat16).to_sparse()
    with pytest.raises(TypeError, match=r"parameter 1 is torch\.sparse_coo; only dense"):
        optimizer.step()


def test_averages_need_a_decay() -> None:
    with pytest.raises(ValueError, match="ema_weights needs ema_decay, which group 0"):
        _optimizer("split32", "M4").ema_weights()


def test_states_that_do_not_fit_are_refused_and_change_nothing() -> None:
    optimizer = _optimizer("split32", "M4")
    take_steps(optimizer)
    before = everything(optimizer)
    saved = optimizer.state_dict()

    def refused(message: str, state: dict, load: Callable[[dict], None] = optimizer.load_state_dict) -> None:
        with pytest.raises(ValueError, match=message):
            load(state)
        assert_same(everything(optimizer), before)

    def altered(**change: object) -> dict:
        return {**saved, "state": {**saved["state"], 0: {**saved["state"][0], **change}}}

    refused("the state has 0 parameter groups, the optimizer 1", {"state": {}, "param_groups": []})
    refused(
        "group 0 of the state has 1 parameters, the optimizer's 5",
        AdamW(parameters("split32", (2, 2)), LR).state_dict(),
    )
    refused(
        "group 0 of the state has moments='M3', the optimizer 'M4'; use canonical",
        _optimizer("split32", "M3").state_dict(),
    )
    refused("the state of parameter 0 holds .*'more'", altered(more=torch.zeros(3)))
    refused(
        "remainder in the state of parameter 0 is torch.bfloat16", altered(remainder=torch.zeros(130, 200).bfloat16())
    )
    refused(r"exp_avg in the state of parameter 0 has shape \[3\]", altered(exp_avg=torch.zeros(3).bfloat16()))
    canonical = optimizer.load_canonical_state_dict
    theirs = torch.optim.AdamW(parameters("fp32", *SHAPES), lr=1.0, amsgrad=True)
    refused("group 0 of the state has amsgrad=True, which is not supported", theirs.state_dict(), canonical)
    shaped = optimizer.canonical_state_dict()
    shaped["master_weights"][3] = torch.zeros(4)
    refused(r"master_weights of parameter 3 has shape \[4\], expected \[9, 50, 40\]", shaped, canonical)
