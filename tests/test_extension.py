"""csrc/: the C++ step and norm equal `srpo_kernels.optim.reference` bit for bit, and the CUDA kernels compile."""

from __future__ import annotations

import re
import runpy
import shutil
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from srpo_kernels.extension import available, extension_status, module
from srpo_kernels.optim import reference
from srpo_kernels.optim.reference import BINS
from srpo_kernels.optim.sharding import matrix
from srpo_kernels.optim.storage import MOMENTS, WEIGHTS, Storage

CSRC = Path(__file__).parents[1] / "csrc"
EXACT = ["-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math", "-fno-tree-loop-distribute-patterns"]
STEP = dict(betas=(0.9, 0.999), eps=1e-8, weight_decay=0.01)
SHAPES = [
    (3, 1000),
    (5, 1024),
    (2, 3072),
    (7, 129),
    (40, 24),
    (9, 3),
    (130, 1),
    (77,),
    (2, 3, 5, 7),
    (0, 6),
    (1, 2500),
    (4, 512),
]

built = pytest.mark.skipif(not available("cpu"), reason=f"srpo_kernels._C: {extension_status()['_C']}")
compiler = pytest.mark.skipif(not shutil.which("g++"), reason="needs g++")


def bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(torch.uint8)


# --- the specification on stored tensors ------------------------------------------------------


def make(shape: tuple[int, ...], weights: str, moments: str, dtype: torch.dtype, seed: int) -> SimpleNamespace:
    """A parameter in the middle of training, as its modes store it, and its gradient."""
    generator = torch.Generator().manual_seed(seed)

    def normal(scale: float, spread: float) -> Tensor:
        values = torch.randn(shape, generator=generator) * scale
        return values * torch.exp(torch.randn(shape, generator=generator) * spread)

    made = SimpleNamespace(
        weight=torch.zeros(shape, dtype=torch.float32 if weights == "fp32" else torch.bfloat16),
        gradient=normal(1e-4, 2).to(dtype),
        average=normal(0.02, 0),
        step=torch.tensor(seed % 50),
    )
    storage = of(made, weights, moments, 0, {})
    values = (normal(0.02, 1), normal(1e-5, 2), normal(1e-5, 2).square())
    flat = [matrix(value) for value in values]
    storage.store(storage.encode(made.step, weight=flat[0], moments=(flat[1], flat[2])))
    made.state = storage.state
    return made


def of(made: SimpleNamespace, weights: str, moments: str, start: int, state: dict[str, Tensor]) -> Storage:
    storage = Storage(made.weight, state, weights, moments, start, 2**40 + 7)
    if not state:
        storage._initialise(False)
    return storage


def clone(made: SimpleNamespace, rows: slice = slice(None)) -> SimpleNamespace:
    """A copy of some rows."""
    copies = {
        name: value if value.ndim == 0 else value[rows].clone() for name, value in vars(made).items() if name != "state"
    }
    state = {name: value if value.ndim == 0 else value[rows].clone() for name, value in made.state.items()}
    return SimpleNamespace(**copies, state=state)


def specified(made: SimpleNamespace, weights: str, moments: str, start: int, numbers: dict, every: int) -> list[Tensor]:
    """One step in Python, in place; returns the telemetry's parts."""
    storage = of(made, weights, moments, start, made.state)
    (scalars,) = reference.scalars(made.step[None], numbers["lr"], **STEP)
    weight, first, second, update = reference.advance(
        matrix(made.gradient), numbers["coefficient"], storage.weight(), storage.first(), storage.second(), scalars
    )
    if made.step % every == 0:
        average = matrix(made.average)
        average.add_((weight - average) * torch.tensor(1 - 0.99))
    values = storage.encode(made.step, weight=weight, moments=(first, second))
    changed = torch.zeros((), dtype=torch.int64)
    if made.weight.dtype == torch.bfloat16:
        changed = (values["weight"].view(torch.int16) != matrix(made.weight).view(torch.int16)).sum()
    storage.store(values)
    return [reference.sums_of_squares(update)[0], reference.sums_of_squares(storage.weight())[0], changed[None]]


def compiled(
    list_: list[SimpleNamespace],
    weights: str,
    moments: str,
    starts: list[int],
    numbers: dict,
    every: int,
    finite: bool = True,
) -> Tensor:
    """The same step of all of `list_` by the operator."""

    def gather(name: str) -> list[Tensor]:
        return [made.state[name] for made in list_ if name in made.state]

    steps = torch.stack([made.step for made in list_])
    betas, eps, decay = STEP.values()
    rates = torch.ops.srpo.adamw_scalars(steps, torch.tensor(numbers["lr"], dtype=torch.float64), *betas, eps, decay)
    tensors = [
        [made.weight for made in list_],
        *(gather(name) for name in ("remainder", "exp_avg", "exp_avg_scale", "exp_avg_sq", "exp_avg_sq_scale")),
        [made.average for made in list_],
        [made.gradient for made in list_],
        rates,
        steps,
        numbers["coefficient"],
        torch.tensor(finite),
    ]
    return torch.ops.srpo.adamw_step(*tensors, starts, 2**40 + 7, 0.99, every, weights, moments)


def contents(made: SimpleNamespace) -> dict[str, Tensor]:
    found = {"weight": made.weight, "average": made.average, **made.state}
    return {name: bits(value) for name, value in found.items() if value.ndim}


def assert_telemetry(found: Tensor, expected: Tensor) -> None:
    """Sums that add the squares of a chunk in another order: 1023 additions in fp32 are off by at most 1024 ulp / 2."""
    assert found[-1] == expected[-1]
    sums = [reference.total(telemetry[: 2 * BINS].view(2, BINS)) for telemetry in (found, expected)]
    assert torch.allclose(*sums, rtol=2**-14, atol=0)


NUMBERS = {"lr": 3e-4, "coefficient": torch.tensor(0.37)}


# --- tests ------------------------------------------------------------------------------------


@built
@pytest.mark.parametrize("moments", MOMENTS)
@pytest.mark.parametrize("weights", WEIGHTS)
def test_the_step_is_the_specified_one(weights, moments):
    dtypes = [torch.float32, torch.bfloat16, torch.float16]
    made = [make(shape, weights, moments, dtypes[i % 3], 11 + i) for i, shape in enumerate(SHAPES)]
    starts = [16 * (2**32 + 2500 * i) - 16 for i in range(len(SHAPES))]  # counters beyond 32 bits
    mine = [clone(parameter) for parameter in made]
    for every in (1, 2):  # two steps, the second from what the first one stored
        telemetry = [specified(p, weights, moments, s, NUMBERS, every) for p, s in zip(made, starts, strict=True)]
        found = compiled(mine, weights, moments, starts, NUMBERS, every)
        for shape, expected, got in zip(SHAPES, made, mine, strict=True):
            for name, value in contents(expected).items():
                assert torch.equal(contents(got)[name], value), f"{name} of {shape}"
        assert_telemetry(found, torch.cat([sum(part) for part in zip(*telemetry, strict=True)]))
        for parameter in (*made, *mine):
            parameter.step = parameter.step + 1


@built
@pytest.mark.parametrize(("weights", "moments"), [("split24", "M2"), ("bf16_sr", "M4"), ("split32", "M3")])
@pytest.mark.parametrize("parts", [2, 4])
def test_neither_shards_nor_threads_change_a_bit(weights, moments, parts):
    shapes, starts = [(65, 257), (7, 2049), (1030, 3)], [0, 16_720, 40_000]
    made = [make(shape, weights, moments, torch.bfloat16, 3 + i) for i, shape in enumerate(shapes)]
    whole = [clone(parameter) for parameter in made]
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        expected = compiled(whole, weights, moments, starts, NUMBERS, 1)
        torch.set_num_threads(3)
        found = torch.zeros_like(expected)
        shards: list[list[SimpleNamespace]] = [[] for _ in made]
        for part in range(parts):
            here, places = [], []
            for parameter, start, kept in zip(made, starts, shards, strict=True):
                rows, columns = matrix(parameter.weight).shape
                share = -(-rows // parts)
                first = min(part * share, rows)
                kept.append(clone(parameter, slice(first, first + share)))
                here.append(kept[-1])
                places.append(start + first * columns)
            found += compiled(here, weights, moments, places, NUMBERS, 1)
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(found, expected)
    for parameter, kept in zip(whole, shards, strict=True):
        for name, value in contents(parameter).items():
            assert torch.equal(torch.cat([contents(shard)[name] for shard in kept]), value), name


@built
@pytest.mark.parametrize("moments", ["M4", "M3"])
def test_moments_that_rounding_would_make_infinite_or_that_are_not_numbers(moments, monkeypatch):
    """Lanes of ordinary moments, which a quicker rounding takes, beside those that it must not."""
    monkeypatch.setitem(STEP, "betas", (0.9, 0.5))  # so that a second moment comes within 2^-8 of the largest number
    made = make((3, 1000), "split32", moments, torch.float32, 4)
    large = torch.tensor([3.3895e38, -3.3895e38, 1.7e38, torch.inf, -torch.inf, torch.nan, 1e-39]).bfloat16()
    made.state["exp_avg_sq"].view(-1)[: 42 * 37 : 37] = large.repeat(6)
    made.gradient.view(-1)[: 7 * 42 * 37 : 7 * 37] = 1.8445e19
    if moments == "M4":
        made.state["exp_avg"].view(-1)[: 42 * 41 : 41] = large.repeat(6)
    mine = clone(made)
    numbers = {"lr": 3e-4, "coefficient": torch.tensor(1.0)}
    specified(made, "split32", moments, 0, numbers, 1)
    compiled([mine], "split32", moments, [0], numbers, 1)
    for name in ("weight", "first", "second"):  # which NaN is torch's business
        values = [getattr(of(parameter, "split32", moments, 0, parameter.state), name)() for parameter in (mine, made)]
        assert torch.allclose(*values, rtol=0, atol=0, equal_nan=True), name
    assert (made.state["exp_avg_sq"].view(-1)[: 7 * 42 * 37 : 7 * 37] == large[0]).any()


@built
def test_a_step_that_is_not_finite_changes_no_byte():
    for weights in WEIGHTS:
        made = make((6, 300), weights, "M2", torch.float32, 5)
        made.gradient[2, 5] = torch.nan
        before = contents(clone(made))
        sums = compiled([made], weights, "M2", [0], NUMBERS, 1, finite=False)
        assert all(torch.equal(value, before[name]) for name, value in contents(made).items())
        stored = of(made, weights, "M2", 0, made.state).weight()
        none = torch.zeros(BINS, dtype=torch.int64)
        assert_telemetry(sums, torch.cat([none, reference.sums_of_squares(stored)[0], none[:1]]))


@built
def test_sums_of_squares():
    generator = torch.Generator().manual_seed(0)
    gradients = [
        (torch.randn(shape, generator=generator) * 10.0 ** (i - 9)).to(
            [torch.float32, torch.bfloat16, torch.float16][i % 3]
        )
        for i, shape in enumerate([*SHAPES, (1100, 2), (3, 4097), (17, 0)])
    ]
    gradients[1][1, 3], gradients[2][0, 2000], gradients[0][0, 0] = (
        torch.inf,
        torch.nan,
        3e38,
    )  # the last one's square is not
    expected = torch.zeros(BINS + 2, dtype=torch.int64)
    for gradient in gradients:
        rows = matrix(gradient) if gradient.numel() else gradient.new_zeros(0, 1)
        sums, lost = reference.sums_of_squares(rows)
        expected += torch.cat([sums, torch.stack([lost, (~rows.isfinite()).sum()])])
    assert expected[BINS] == 3
    assert torch.equal(torch.ops.srpo.sums_of_squares(gradients), expected)


@built
def test_scalars():
    steps = torch.tensor([1, 2, 3, 1000, 123_457, 2**24 - 1])
    lr = torch.tensor(5e-6, dtype=torch.float64)
    expected = reference.scalars(steps, lr, (0.9, 0.995), 1e-8, 0.01)
    rows = torch.stack([torch.stack(list(vars(scalars).values())) for scalars in expected])
    assert torch.equal(torch.ops.srpo.adamw_scalars(steps, lr, 0.9, 0.995, 1e-8, 0.01), rows)


@built
@pytest.mark.parametrize("source", ["every bf16", "random fp32", "near ties"])
def test_e4m3_is_torchs_cast(source):
    """Seen through a step with beta1 = 0: what is stored is the gradient's code at the block's scale."""
    generator = torch.Generator().manual_seed(1)
    if source == "every bf16":
        x = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(torch.bfloat16).float()
    elif source == "random fp32":
        x = torch.randint(-(2**31), 2**31, (2**18,), generator=generator).int().view(torch.float32)
    else:
        codes = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
        middle = (codes[:126] + codes[1:127]) / 2
        x = torch.cat([middle, middle.nextafter(torch.tensor(0.0)), middle.nextafter(torch.tensor(1e9)), -middle])
    x = x[x.isfinite() & (x.abs() < 256)].repeat_interleave(2).view(-1, 2)
    x[:, 1] = 256.0  # sets the scale of its row to 1
    made = SimpleNamespace(
        weight=torch.zeros_like(x), gradient=torch.zeros_like(x), average=torch.zeros_like(x), step=torch.tensor(1)
    )
    made.state = {
        "exp_avg": torch.zeros_like(x, dtype=torch.uint8),
        "exp_avg_scale": torch.ones(x.shape[0], 1),
        "exp_avg_sq": torch.zeros_like(x, dtype=torch.bfloat16),
    }
    made.gradient.copy_(x)  # beta1 = 0: m' = 0 + (g - 0) * 1
    rates = torch.ops.srpo.adamw_scalars(made.step[None], torch.tensor(0.0, dtype=torch.float64), 0.0, 0.9, 1e-8, 0.0)
    tensors = [[made.weight], [], *([value] for value in made.state.values()), [], [], [made.gradient]]
    torch.ops.srpo.adamw_step(
        *tensors, rates, made.step[None], torch.tensor(1.0), torch.tensor(True), [0], 0, 0.0, 1, "fp32", "M3"
    )
    assert torch.equal(made.state["exp_avg_scale"], torch.ones(x.shape[0], 1))
    assert torch.equal(made.state["exp_avg"], (x + 0.0).to(torch.float8_e4m3fn).view(torch.uint8))
    decoded = reference.decode_blocks(made.state["exp_avg"], made.state["exp_avg_scale"])
    assert torch.equal(decoded, x.to(torch.float8_e4m3fn).float())


@built
def test_schemas_and_fakes():
    made = [make(shape, "split32", "M2", torch.bfloat16, i) for i, shape in enumerate([(3, 200), (5,)])]
    steps = torch.stack([parameter.step + 1 for parameter in made])
    rates = torch.ops.srpo.adamw_scalars(steps, torch.tensor(1e-3, dtype=torch.float64), 0.9, 0.99, 1e-8, 0.0)
    names = ("remainder", "exp_avg", "exp_avg_scale", "exp_avg_sq", "exp_avg_sq_scale")
    lists = [[parameter.state[name] for parameter in made] for name in names]
    gradients = [parameter.gradient for parameter in made]
    rest = (rates, steps, torch.tensor(1.0), torch.tensor(True), [0, 600], 3, 0.0, 1, "split32", "M2")
    arguments = ([parameter.weight for parameter in made], *lists, [], gradients, *rest)
    torch.library.opcheck(torch.ops.srpo.adamw_step.default, arguments)
    torch.library.opcheck(torch.ops.srpo.sums_of_squares.default, (gradients,))
    lr = torch.tensor(1e-3, dtype=torch.float64)
    torch.library.opcheck(torch.ops.srpo.adamw_scalars.default, (steps, lr, 0.9, 0.99, 1e-8, 0.0))


def planned(list_: list[SimpleNamespace], weights: str, moments: str, starts: list[int], group: int = 0) -> Tensor:
    """The plan of a step of `list_`, whose steps taken are counted in fp32."""
    names = ("remainder", "exp_avg", "exp_avg_scale", "exp_avg_sq", "exp_avg_sq_scale")
    lists = [[made.state[name] for made in list_ if name in made.state] for name in names]
    for made in list_:
        made.taken = made.step.float() - 1
    rest = [made.gradient for made in list_], [made.taken for made in list_], starts, group, weights, moments
    return torch.ops.srpo.adamw_plan([made.weight for made in list_], *lists, [made.average for made in list_], *rest)


def locate(plan: Tensor, gradients: list[Tensor], weights: list[Tensor]) -> bool:
    """Of parameters that are where `weights` are."""
    parameters = [weight.detach() for weight in weights]
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.grad_dtype = gradient.dtype
        parameter.grad = gradient
    return module(plan.device).locate(parameters, plan)


@built
def test_a_planned_step_is_the_same():
    """Two lists, of which the second has its own options, against a call of adamw_step for each."""
    modes, starts = [("split32", "M4"), ("split24", "M2")], [10_000 * i for i in range(len(SHAPES))]
    rates, options = [3e-4, 1e-3], [0.9, 0.999, 1e-8, 0.01] * 2
    dtypes = [torch.bfloat16, torch.float32]
    lists = [[make(s, *modes[k], dtypes[k], 31 * k + i) for i, s in enumerate(SHAPES)] for k in range(2)]
    mine = [[clone(parameter) for parameter in list_] for list_ in lists]
    plan = torch.cat([planned(mine[k], *modes[k], starts, k) for k in range(2)])
    watched = torch.ops.srpo.adamw_watch([parameter.taken for parameter in (*mine[0], *mine[1])])
    for _ in range(2):  # the second on other gradients, elsewhere
        gradients = [[torch.randn_like(p.gradient) * 1e-3 for p in list_] for list_ in lists]
        both = [*gradients[0], *gradients[1]]
        sums = torch.ops.srpo.sums_of_squares(both)
        coefficient = (0.01 / (reference.total(sums[:BINS]).sqrt() + 1e-6)).float()
        for k, list_ in enumerate(lists):
            for parameter, gradient in zip(list_, gradients[k], strict=True):
                parameter.gradient = gradient
            numbers = {"lr": rates[k], "coefficient": coefficient}
            compiled(list_, *modes[k], starts, numbers, 1)
        lr = [torch.tensor(rate, dtype=torch.float64) for rate in rates]
        assert locate(plan, both, [parameter.weight for list_ in mine for parameter in list_])
        begun = torch.ops.srpo.adamw_begin(both[0], plan, watched, lr, options, 0.01)
        assert torch.equal(begun[: BINS + 2], sums)
        for k in range(2):
            count = len(SHAPES)
            torch.ops.srpo.adamw_advance(plan, begun, k * count, count, 2**40 + 7, 0.99, 1)
            for shape, expected, got in zip(SHAPES, lists[k], mine[k], strict=True):
                assert got.taken == expected.step
                for name, value in contents(expected).items():
                    assert torch.equal(contents(got)[name], value), f"{name} of {shape}"
        for parameter in (*lists[0], *lists[1]):
            parameter.step = parameter.step + 1


@built
def test_only_planned_gradients_are_located():
    made = [make(shape, "split32", "M4", torch.bfloat16, 0) for shape in [(3, 200), (5,), (0, 6)]]
    plan = planned(made, "split32", "M4", [0, 600, 608])
    gradients, weights = [parameter.gradient for parameter in made], [parameter.weight for parameter in made]
    first, planned_words = gradients[0], plan.clone()
    strided = first.T.contiguous().T
    for gradient in [first.float(), first.half(), strided, first.to_sparse(), torch.nn.Parameter(first)]:
        assert not locate(plan, [gradient, *gradients[1:]], weights)
    assert not locate(plan, [first[:2], *gradients[1:]], [weights[0][:2], *weights[1:]])
    assert not locate(plan, gradients, [weights[0].clone(), *weights[1:]])
    assert not module(plan.device).locate(weights, plan)  # which have none
    assert torch.equal(plan, planned_words)
    assert locate(plan, [strided.contiguous(), *gradients[1:]], weights)
    assert (plan != planned_words).sum() == 1
    with pytest.raises(ValueError, match="plan is not that of 2 parameters"):
        module(plan.device).locate(weights[:2], plan)
    with pytest.raises(ValueError, match="plan is not that of 3 parameters"):
        module(plan.device).locate(weights, plan[:, 1:])
    with pytest.raises(TypeError):
        module(plan.device).locate(tuple(weights), plan)


@built
def test_the_same_objects():
    same = module(torch.device("cpu")).same
    one, other, value, note = (torch.zeros(2) for _ in range(4))
    objects, lists, state = [one, other, one, value, note, other], [[one], [], [other]], {one: {"a": value, "b": note}}
    state[other] = {}
    assert same(objects, lists, state)
    for differing in (objects[:-1], [*objects, one], [*objects[:3], value.clone(), *objects[4:]], objects[::-1]):
        assert not same(differing, lists, state)
    assert not same(objects, lists[::-1], state)
    assert not same(objects, [one, other], state), "tensors are in lists"
    assert not same(objects, lists, {other: {}, one: state[one]})
    assert not same(objects, lists, {**state, other: [one]})


@built
@pytest.mark.parametrize("how", ["data", "resize", "set"])
def test_what_moved_is_not_stepped(how: str):
    made = [make(shape, "split32", "M4", torch.bfloat16, 0) for shape in [(3, 200), (5,)]]
    plan = planned(made, "split32", "M4", [0, 600])
    weights, gradients = ([getattr(parameter, name) for parameter in made] for name in ("weight", "gradient"))
    state = made[1].state["exp_avg"]
    watched = torch.ops.srpo.adamw_watch([made[0].state["exp_avg"], state])
    assert locate(plan, gradients, weights)
    old = state.detach()  # keeps the memory, so that it is not found again
    if how == "data":
        state.data = state * 2
    elif how == "resize":
        state.untyped_storage().resize_(2**20)
    else:
        state.set_(torch.zeros_like(old))
    numbers = [torch.tensor(1e-3, dtype=torch.float64)], [0.9, 0.99, 1e-8, 0.0], 1.0
    assert torch.ops.srpo.adamw_begin(gradients[0], plan, watched, *numbers).numel() == 0
    assert all(parameter.taken == parameter.step - 1 for parameter in made)


@built
def test_plans_are_checked():
    made = [make(shape, "split32", "M4", torch.bfloat16, 0) for shape in [(3, 200), (5,)]]
    plan = planned(made, "split32", "M4", [0, 600])
    lr, numbers = [torch.tensor(1e-3, dtype=torch.float64)], [0.9, 0.99, 1e-8, 0.0]
    gradients, wanted = [parameter.gradient for parameter in made], contents(made[0])
    like, watched = gradients[0], torch.ops.srpo.adamw_watch([parameter.taken for parameter in made])
    begun = torch.ops.srpo.adamw_begin(like, plan, watched, lr, numbers, 1.0)
    begin = torch.ops.srpo.adamw_begin
    for call, message in [
        (lambda: begin(like, plan, watched, [], [], 1.0), "no group 0"),
        (lambda: begin(like, plan[:, 1:], watched, lr, numbers, 1.0), "not what adamw_plan returns"),
        (lambda: begin(like, plan, watched[1:], lr, numbers, 1.0), "not what adamw_watch returns"),
        (lambda: torch.ops.srpo.adamw_advance(plan, begun[1:], 0, 2, 0, 0.0, 1), "not what adamw_begin returns"),
        (lambda: torch.ops.srpo.adamw_advance(plan, begun, 1, 2, 0, 0.0, 1), "no parameters 1 to 3"),
        (lambda: torch.ops.srpo.adamw_advance(plan, begun, 0, 2, 0, 0.0, 0), "ema_every must be positive"),
    ]:
        with pytest.raises(RuntimeError, match=message):
            call()
    assert all(torch.equal(value, wanted[name]) for name, value in contents(made[0]).items())


@built
def test_schemas_and_fakes_of_planned_steps():
    """On a gradient that is not finite: a plan's addresses are not arguments, so what is there must not change."""
    made = [make(shape, "split32", "M2", torch.bfloat16, i) for i, shape in enumerate([(3, 200), (5,)])]
    made[0].gradient[0, 0] = torch.nan
    plan = planned(made, "split32", "M2", [0, 600])
    names = ("remainder", "exp_avg", "exp_avg_scale", "exp_avg_sq", "exp_avg_sq_scale")
    lists = [[parameter.state[name] for parameter in made] for name in names]
    gradients = [parameter.gradient for parameter in made]
    torch.library.opcheck(
        torch.ops.srpo.adamw_watch.default, (gradients,), test_utils=("test_schema", "test_faketensor")
    )
    watched = torch.ops.srpo.adamw_watch([parameter.taken for parameter in made])
    begin = gradients[0], plan, watched, [torch.tensor(1e-3, dtype=torch.float64)], [0.9, 0.99, 1e-8, 0.0], 1.0
    torch.library.opcheck(torch.ops.srpo.adamw_begin.default, begin)
    begun = torch.ops.srpo.adamw_begin(*begin)
    torch.library.opcheck(torch.ops.srpo.adamw_advance.default, (plan, begun, 0, 2, 3, 0.0, 1))
    fake = torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True)
    with fake:
        rest = [parameter.taken for parameter in made], [0, 600], 0, "split32", "M2"
        found = torch.ops.srpo.adamw_plan([p.weight for p in made], *lists, [], gradients, *rest)
    assert (found.shape, found.dtype, found.device) == (plan.shape, plan.dtype, plan.device)


@built
def test_wrong_arguments_are_refused():
    made = make((3, 200), "split32", "M4", torch.bfloat16, 0)
    with pytest.raises(RuntimeError, match="unknown moments M5"):
        compiled([made], "split32", "M5", [0], NUMBERS, 1)
    with pytest.raises(RuntimeError, match="starts must be 1 numbers, got 2"):
        compiled([made], "split32", "M4", [0, 0], NUMBERS, 1)
    with pytest.raises(RuntimeError, match="remainders must be 0 tensors, got 1"):
        compiled([made], "bf16_sr", "M4", [0], NUMBERS, 1)
    with pytest.raises(RuntimeError, match="first moments have another dtype"):
        compiled([made], "split32", "fp32", [0], NUMBERS, 1)
    made.gradient = torch.zeros(3, 199)
    with pytest.raises(RuntimeError, match="weights must have 597 elements, got 600"):
        compiled([made], "split32", "M4", [0], NUMBERS, 1)


def test_the_status_says_what_is_missing():
    status = extension_status()
    assert set(status) == {"_C", "_C_cuda", "torch"}
    assert all(
        value == "loaded" or value.startswith(("not built", "not loaded")) for value in list(status.values())[:2]
    )
    assert not available("meta")


@pytest.mark.parametrize(
    ("cpp", "cuda", "names"),
    [("0", "0", []), ("auto", "auto", ["srpo_kernels._C"]), ("1", "auto", ["srpo_kernels._C"]), ("0", "auto", [])],
)
@compiler
def test_setup_builds_what_is_wanted_and_possible(cpp, cuda, names, tmp_path, monkeypatch):
    """Where there is no nvcc."""
    assert [module.name for module in _set_up(cpp, cuda, tmp_path, monkeypatch).get("ext_modules", [])] == names


@pytest.mark.parametrize(
    ("cpp", "cuda", "message"),
    [("0", "1", "SRPO_BUILD_CUDA=1 needs nvcc"), ("yes", "0", "SRPO_BUILD_CPP must be auto, 0 or 1, got 'yes'")],
)
def test_setup_refuses_what_is_impossible(cpp, cuda, message, tmp_path, monkeypatch):
    with pytest.raises(SystemExit, match=message):
        _set_up(cpp, cuda, tmp_path, monkeypatch)


def _set_up(cpp: str, cuda: str, cuda_home: Path, monkeypatch: pytest.MonkeyPatch) -> dict:
    """What setup.py passes to `setup`."""
    found: dict = {}
    monkeypatch.setenv("SRPO_BUILD_CPP", cpp)
    monkeypatch.setenv("SRPO_BUILD_CUDA", cuda)
    monkeypatch.setattr("torch.utils.cpp_extension.CUDA_HOME", str(cuda_home))
    monkeypatch.setattr("setuptools.setup", found.update)
    monkeypatch.chdir(CSRC.parent)
    runpy.run_path("setup.py")
    return found


@compiler
@pytest.mark.parametrize(("program", "level"), [("planner", "-O3"), ("split", "-O3"), ("sets", "-O1")])
def test_cpp_programs(program, level, tmp_path):
    """The planner, all 2^32 patterns through the split weights, and that instruction sets agree."""
    source, binary = CSRC / "tests" / f"{program}.cpp", tmp_path / program
    flags = ["-Wall", "-Wextra", "-Werror", "-Wno-psabi", "-Wno-maybe-uninitialized"]
    subprocess.run(["g++", "-std=c++17", level, *flags, *EXACT, source, "-o", binary], check=True)
    run = subprocess.run([binary], capture_output=True, text=True)
    assert run.returncode == 0, run.stdout


@compiler
def test_every_instruction_set_is_vectorised_and_without_fma(tmp_path):
    if not shutil.which("objdump"):
        pytest.skip("needs objdump")
    binary = tmp_path / "adamw.o"
    subprocess.run(["g++", "-std=c++17", "-O3", *EXACT, "-c", CSRC / "cpu/adamw.cpp", "-o", binary], check=True)
    code = subprocess.run(
        ["objdump", "-d", "--no-show-raw-insn", binary], capture_output=True, text=True, check=True
    ).stdout
    assert not re.search(r"\bvfn?m(add|sub)", code)
    if "x86" in subprocess.run(["g++", "-dumpmachine"], capture_output=True, text=True).stdout:
        for instruction in (
            r"vdivps .*%zmm",
            r"vdivps .*%ymm",
            r"\bdivps .*%xmm",
            r"vsqrtps .*%zmm",
            r"vsqrtps .*%ymm",
        ):
            assert re.search(instruction, code), instruction


# --- CUDA, without a GPU ----------------------------------------------------------------------


@pytest.mark.compile_only
@pytest.mark.skipif(not shutil.which("nvcc"), reason="needs nvcc")
@pytest.mark.parametrize("architecture", ["sm_90a", "sm_100a"])
def test_the_cuda_kernels_do_not_spill(architecture, tmp_path):
    command = ["nvcc", "-std=c++17", "-O3", "-fmad=false", "-cubin", f"-arch={architecture}", "-Xptxas=-v"]
    run = subprocess.run(
        [*command, CSRC / "cuda/adamw.cu", "-o", tmp_path / "adamw.cubin"], capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    steps = re.findall(r"Compiling entry function '\S*step_kernel\S*ELb([01])E(?s:.*?)Used (\d+) registers", run.stderr)
    assert len(steps) == 2 * len(WEIGHTS) * len(MOMENTS)  # aligned tensors, and others
    spills = [int(count) for count in re.findall(r"(\d+) bytes spill", run.stderr)]
    assert spills
    assert not any(spills), run.stderr
    assert max(int(count) for vector, count in steps if vector == "1") <= 80  # three blocks a multiprocessor
