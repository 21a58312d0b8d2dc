"""relative_reward and its loss: kernels (interpreted or real) and reference against float64, and the contract."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

import srpo_kernels.ops.relative_reward as module
from srpo_kernels.ops.relative_reward import relative_reward, relative_reward_loss
from srpo_kernels.testing import check_against_reference
from srpo_kernels.testing.compile_only import ARCHITECTURES, compile_for

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
FLOATING = "a float32, float16 or bfloat16 tensor"
BOTH = [relative_reward, partial(relative_reward_loss, threshold=0.1)]


def tensors(
    batch: int,
    width: int,
    *,
    pairs: tuple[int, ...] = (),
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    projected: int = 0,
    kappa: bool = True,
) -> dict[str, Tensor]:
    """Arguments of both functions; `projected` is the image's width before the projection."""
    generator = torch.Generator().manual_seed(width + batch)

    def drawn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    made = {
        "image": 3 * drawn(batch, projected or width).to(dtype),
        "positive": normalize(drawn(batch, *pairs, width), dim=-1).to(dtype),
        "negative": normalize(drawn(batch, *pairs, width), dim=-1).to(dtype),
    }
    if kappa:
        made["kappa"] = torch.rand(batch, generator=generator)
    if projected:
        made["projection"] = drawn(width, projected).to(dtype)
    return {name: tensor.to(device) for name, tensor in made.items()}


def composed(
    image: Tensor,
    positive: Tensor,
    negative: Tensor,
    kappa: float | Tensor,
    projection: Tensor | None = None,
    scale: float = 1.0,
    form: str = "official",
) -> Tensor:
    """The formula in the inputs' dtype."""
    unit = normalize(image if projection is None else image @ projection.T, dim=-1)
    liked, disliked = (torch.einsum("bd,b...d->b...", unit, text) for text in (positive, negative))
    if isinstance(kappa, Tensor):
        kappa = kappa.reshape(-1, *[1] * (liked.ndim - 1))
    weights = {"official": (1 + kappa, -1), "difference": (1, -1), "cfg": (kappa, 1 - kappa)}[form]
    return scale * (weights[0] * liked + weights[1] * disliked)


def composed_loss(threshold: float | None, **arguments: Any) -> Tensor:
    scores = composed(**arguments)
    return -scores if threshold is None else torch.relu(threshold - scores)


def loss(threshold: float | None, **arguments: Any) -> Tensor:
    return relative_reward_loss(threshold=threshold, **arguments)[0]


def check(function: Callable, plain: Callable, inputs: dict[str, Tensor]) -> Tensor:
    """Output and gradients within budget; returns the output.

    The upstream gradient is large, as loss scaling makes it, to keep fp16 gradients out of the subnormal range.
    """
    generator = torch.Generator().manual_seed(1)
    upstream = 1024 * torch.randn(inputs["positive"].shape[:-1], generator=generator).to(inputs["image"].device)
    wanted = tuple(name for name in ("image", "projection") if name in inputs)
    return check_against_reference(function, plain, inputs, differentiable=wanted, upstream=upstream)["output"]


# --- accuracy -----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", [33, 129, 1024, 3000])
@pytest.mark.parametrize("pairs", [(), (3,)], ids=["pair", "pairs"])
def test_within_budget(width: int, pairs: tuple[int, ...], dtype: torch.dtype, device: str) -> None:
    inputs = tensors(5, width, pairs=pairs, dtype=dtype, device=device)
    scores = check(relative_reward, composed, inputs)
    assert (scores.dtype, tuple(scores.shape)) == (torch.float32, (5, *pairs))
    check(partial(loss, 0.1), partial(composed_loss, 0.1), inputs)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", [33, 129])
@pytest.mark.parametrize("pairs", [(), (3,)], ids=["pair", "pairs"])
def test_projection_within_budget(width: int, pairs: tuple[int, ...], dtype: torch.dtype, device: str) -> None:
    inputs = tensors(4, width, pairs=pairs, dtype=dtype, device=device, projected=48)
    for ours, plain in ((relative_reward, composed), (partial(loss, 0.1), partial(composed_loss, 0.1))):
        check(ours, plain, inputs)


@pytest.mark.parametrize("form", sorted(module.RELATIVE_FORMS))
@pytest.mark.parametrize("kappa", [0.3, None], ids=["float", "tensor"])
@pytest.mark.parametrize("threshold", [0.7, None], ids=["hinge", "linear"])
def test_forms(form: str, kappa: float | None, threshold: float | None, device: str) -> None:
    inputs = tensors(6, 65, pairs=(2,), device=device, kappa=kappa is None)
    options = dict(form=form, scale=5.0) | ({} if kappa is None else {"kappa": kappa})
    score, penalty = (partial(f, **options) for f in (relative_reward, partial(loss, threshold)))
    check(score, partial(composed, **options), inputs)
    plain = partial(composed_loss, threshold, **options)
    check(penalty, plain, inputs)


def test_one_row(device: str) -> None:
    inputs = tensors(1, 129, pairs=(4,), device=device)
    check(relative_reward, composed, inputs)


def test_mixed_dtypes(device: str) -> None:
    inputs = tensors(4, 33, dtype=torch.bfloat16, device=device, projected=20)
    for mixed in ("image", "projection"):
        given = {**inputs, mixed: inputs[mixed].float()}
        check(relative_reward, composed, given)


def test_float64_is_computed_in_float64(device: str) -> None:
    inputs = tensors(3, 33, dtype=torch.float64, device=device, projected=20) | {"kappa": 0.25}
    scores = relative_reward(**inputs)
    assert scores.dtype == torch.float64
    torch.testing.assert_close(scores, composed(**inputs), rtol=1e-13, atol=1e-15)


@pytest.mark.parametrize("projected", [0, 3])
def test_gradcheck(projected: int, device: str) -> None:
    inputs = tensors(2, 4, pairs=(2,), dtype=torch.float64, device=device, projected=projected)
    wanted = [name for name in ("image", "projection") if name in inputs]
    for function in (relative_reward, partial(loss, 0.1), partial(loss, None)):

        def run(*leaves: Tensor, function: Callable = function) -> Tensor:
            return function(**inputs | dict(zip(wanted, leaves, strict=True)), scale=2.0, form="cfg")

        assert torch.autograd.gradcheck(run, [inputs[name].clone().requires_grad_() for name in wanted])


# --- edges --------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_short_embeddings_are_treated_as_normalize_treats_them(dtype: torch.dtype, device: str) -> None:
    inputs = tensors(4, 33, dtype=dtype, device=device)
    inputs["image"] *= torch.tensor([0.0, 1e-14, 1e-11, 1.0], device=device)[:, None]
    inputs["image"].requires_grad_()
    for ours, plain in ((relative_reward, composed), (partial(loss, 0.1), partial(composed_loss, 0.1))):
        scores = ours(**inputs)
        wide = {name: tensor.double() for name, tensor in inputs.items()}
        expected = plain(**wide)
        torch.testing.assert_close(scores.double(), expected, rtol=1e-5, atol=1e-6)
        (gradient,), (exact,) = (torch.autograd.grad(out.sum(), inputs["image"]) for out in (scores, expected))
        assert gradient.isfinite().all()
        torch.testing.assert_close(gradient, exact, rtol=2e-2 if dtype == torch.bfloat16 else 1e-4, atol=1e-3)


def test_hinge_is_relu(device: str) -> None:
    """Score equal to the threshold, above it, below it, and NaN."""
    image = torch.eye(4, device=device)
    image[3, 3] = float("nan")
    image.requires_grad_()
    positive = torch.full((4, 4), 0.25, device=device) * torch.tensor([2.0, 3.0, 1.0, 1.0], device=device)[:, None]
    out, scores = relative_reward_loss(image, positive, torch.zeros_like(positive), 0.0, 0.5)
    torch.testing.assert_close(scores, torch.tensor([0.5, 0.75, 0.25, float("nan")], device=device), equal_nan=True)
    torch.testing.assert_close(out, torch.relu(0.5 - scores), rtol=0, atol=0, equal_nan=True)
    (gradient,) = torch.autograd.grad(out.sum(), image)
    assert not gradient[:2].any()
    assert gradient[2].any()


@pytest.mark.parametrize("function", BOTH, ids=["reward", "loss"])
def test_awkward_layouts(function: Callable, device: str) -> None:
    first = (lambda out: out) if function is relative_reward else (lambda out: out[0])  # the differentiable output
    inputs = tensors(4, 12, pairs=(3,), device=device, projected=8)
    expected = first(function(**inputs))
    for name, tensor in inputs.items():
        strange = torch.stack([tensor, tensor], -1)[..., 0]
        assert not strange.is_contiguous()
        assert torch.equal(first(function(**{**inputs, name: strange})), expected)
    row = {name: inputs[name][:1] for name in ("image", "positive", "negative", "kappa")}
    for_all = {name: tensor.expand(4, *tensor.shape[1:]) for name, tensor in row.items()}
    repeated = {name: tensor.contiguous() for name, tensor in for_all.items()}
    projection = inputs["projection"]
    gradients = []
    for given in (for_all, repeated):
        image = given["image"].detach().requires_grad_()
        out = first(function(**{**given, "image": image}, projection=projection))
        upstream = torch.ones_like(out) if given is repeated else torch.ones((), device=device).expand_as(out)
        gradients += torch.autograd.grad(out, image, upstream)
    assert torch.equal(*gradients)


@pytest.mark.parametrize("function", BOTH, ids=["reward", "loss"])
@pytest.mark.parametrize(("batch", "pairs", "projected"), [(0, (), 0), (0, (2,), 7), (2, (0,), 0), (2, (0,), 7)])
def test_nothing_to_score(function: Callable, batch: int, pairs: tuple[int, ...], projected: int, device: str) -> None:
    inputs = tensors(batch, 5, pairs=pairs, device=device, projected=projected)
    out = function(**{**inputs, "image": inputs["image"].requires_grad_()})
    out = out if isinstance(out, Tensor) else out[0]
    assert tuple(out.shape) == (batch, *pairs)
    (gradient,) = torch.autograd.grad(out.sum(), inputs["image"])
    assert torch.equal(gradient, torch.zeros_like(inputs["image"]))


# --- contract -----------------------------------------------------------------------------------


@pytest.mark.parametrize("function", BOTH, ids=["reward", "loss"])
def test_gradient_goes_to_image_and_projection_only(function: Callable, device: str) -> None:
    inputs = tensors(3, 6, device=device, projected=4)
    for leaf in inputs.values():
        leaf.requires_grad_()
    out = function(**inputs)
    if isinstance(out, tuple):
        out, scores = out
        assert not scores.requires_grad
        assert torch.equal(scores, relative_reward(**inputs))
    out.sum().backward()
    assert {name for name, leaf in inputs.items() if leaf.grad is not None} == {"image", "projection"}
    image, projection = (inputs[name].grad.clone() for name in ("image", "projection"))
    for name, expected in (("image", image), ("projection", projection)):  # each without the other
        leaf = inputs[name].detach().requires_grad_()
        alone = {key: tensor.detach() for key, tensor in inputs.items()} | {name: leaf}
        out = function(**alone)
        (gradient,) = torch.autograd.grad((out if isinstance(out, Tensor) else out[0]).sum(), leaf)
        assert torch.equal(gradient, expected)


@pytest.mark.parametrize("projected", [0, 7])
@pytest.mark.parametrize("kappa", [False, True])
def test_saved_for_backward(projected: int, kappa: bool, device: str) -> None:
    inputs = tensors(4, 5, pairs=(3,), device=device, projected=projected, kappa=kappa)
    inputs["image"].requires_grad_()
    options = {} if kappa else {"kappa": 0.2}
    own = {tensor.untyped_storage().data_ptr() for tensor in inputs.values()}

    def kept(function: Callable) -> list[tuple[int, ...]]:
        """Shapes of what is saved beyond the caller's tensors."""
        shapes = []

        def pack(tensor: Tensor) -> Tensor:
            if tensor.untyped_storage().data_ptr() not in own:
                shapes.append(tuple(tensor.shape))
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            function(**inputs, **options)
        return shapes

    assert kept(relative_reward) == [(4,)]  # the norms
    assert kept(partial(loss, 0.1)) == [(3, 4, 5)]  # the gradients


@pytest.mark.parametrize("function", [relative_reward, partial(loss, 0.1)], ids=["reward", "loss"])
def test_deterministic(function: Callable, device: str) -> None:
    inputs = tensors(5, 300, pairs=(3,), dtype=torch.bfloat16, device=device, projected=40)

    def run() -> list[Tensor]:
        leaves = [inputs[name].clone().requires_grad_() for name in ("image", "projection")]
        out = function(**inputs | {"image": leaves[0], "projection": leaves[1]})
        return [out, *torch.autograd.grad(out.square().sum(), leaves)]

    assert all(torch.equal(a, b) for a, b in zip(run(), run(), strict=True))


def test_autocast_takes_no_part(device: str) -> None:
    inputs = tensors(3, 33, device=device, projected=20)
    leaves = [inputs[name].requires_grad_() for name in ("image", "projection")]

    def run(function: Callable) -> list[Tensor]:
        out = function(**inputs)
        return [out, *torch.autograd.grad(out.sum(), leaves)]

    for function in (relative_reward, partial(loss, 0.1)):
        expected = run(function)
        with torch.autocast(device, torch.bfloat16):
            assert all(torch.equal(a, b) for a, b in zip(run(function), expected, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("projected", [0, 7])
@pytest.mark.parametrize("kappa", [False, True])
def test_opcheck(projected: int, kappa: bool, dtype: torch.dtype, device: str) -> None:
    made = tensors(3, 5, pairs=(2,), dtype=dtype, device=device, projected=projected, kappa=kappa)
    given = [made.get(name) for name in ("image", "positive", "negative", "kappa", "projection")]
    weights = [1.0, 1.0, -1.0, 0.0]
    scores, norm = module._forward(*given, weights)
    torch.library.opcheck(module._forward, (*given, weights))
    torch.library.opcheck(module._backward, (torch.ones_like(scores), *given, norm, weights))
    for threshold in (None, 0.1):
        torch.library.opcheck(module._loss_forward, (*given, weights, threshold))


@pytest.mark.parametrize("projected", [0, 7])
def test_compiles_without_graph_breaks(projected: int, device: str) -> None:
    inputs = tensors(4, 9, pairs=(2,), device=device, projected=projected)
    for ours, plain in ((relative_reward, composed), (partial(loss, 0.1), partial(composed_loss, 0.1))):
        torch.compiler.reset()
        compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
        check(compiled, plain, inputs)
        del (floats := dict(inputs))["kappa"]
        for kappa in (0.1, 0.3):  # the second becomes a symbol
            given = partial(compiled, kappa=kappa), partial(plain, kappa=kappa)
            check(*given, floats)


@pytest.mark.parametrize("function", BOTH, ids=["relative_reward", "relative_reward_loss"])
@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"image": torch.zeros(2, 4).int()}, TypeError, f"image must be {FLOATING}, got torch.int32"),
        ({"positive": [1.0]}, TypeError, f"positive must be {FLOATING}, got list"),
        ({"projection": torch.zeros(2, 4).int()}, TypeError, f"projection must be {FLOATING}, got torch.int32"),
        ({"negative": torch.zeros(2, 4, device="meta")}, ValueError, "image is on cpu but negative is on meta"),
        ({"form": "paper"}, ValueError, "form must be one of ['cfg', 'difference', 'official'], got 'paper'"),
        ({"image": torch.zeros(2, 1, 4)}, ValueError, "image must be [B, D], got [2, 1, 4]"),
        ({"positive": torch.zeros(3, 4)}, ValueError, "positive must be [2, 4] or [2, P, 4], got [3, 4]"),
        ({"negative": torch.zeros(2, 5)}, ValueError, "negative must be [2, 4] or [2, P, 4], got [2, 5]"),
        (
            {"positive": torch.zeros(2, 3, 4)},
            ValueError,
            "positive and negative must have one shape, got [2, 3, 4] and [2, 4]",
        ),
        ({"kappa": torch.zeros(3)}, ValueError, "kappa must be a float or [2], got [3]"),
        ({"projection": torch.zeros(4, 3)}, ValueError, "projection must be [D, 4], got [4, 3]"),
        ({"projection": torch.zeros(5, 4)}, ValueError, "positive must be [2, 5] or [2, P, 5], got [2, 4]"),
    ],
)  # fmt: skip
def test_errors_name_the_argument(
    function: Callable, change: dict[str, Any], error: type[Exception], message: str
) -> None:
    name = "relative_reward" if function is relative_reward else "relative_reward_loss"
    zeros = torch.zeros(2, 4)
    arguments: dict[str, Any] = dict(image=zeros, positive=zeros, negative=zeros, kappa=0.1)
    with pytest.raises(error, match=f"^{name}: {re.escape(message)}$"):
        function(**arguments | change)


def test_threshold_must_be_a_number() -> None:
    """A tensor would have to be read, which synchronises the device."""
    zeros = torch.zeros(2, 4)
    message = "relative_reward_loss: threshold must be a float or None, got Tensor"
    with pytest.raises(TypeError, match=f"^{re.escape(message)}$"):
        relative_reward_loss(zeros, zeros, zeros, 0.1, torch.tensor(0.7))


# --- compiled for GPUs that are not there -------------------------------------------------------

_TYPES = dict.fromkeys(
    ("positive_constant", "positive_slope", "negative_constant", "negative_slope", "threshold"), "fp64"
) | dict(width="i32", pairs="i32")


@pytest.mark.compile_only
@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("kind", ["*bf16", "*fp32"])
@pytest.mark.parametrize("width", [1024, 1280])
@pytest.mark.parametrize("output", ["scores", "hinge", "backward"])
def test_resources(architecture: int, kind: str, width: int, output: str) -> None:
    import triton.language as tl

    from srpo_kernels._triton import relative_reward as kernels

    name = "relative_reward_backward_kernel" if output == "backward" else "relative_reward_kernel"
    kernel = getattr(kernels, name)
    block, warps = kernels._row(width)
    known = _TYPES | dict(
        embedding_ptr=kind,
        positive_ptr=kind,
        negative_ptr=kind,
        out_ptr=kind,
        LOSS=None if output == "scores" else output,
        ACC=tl.float32,
        BLOCK=block,
    )
    arguments = {name: known.get(name, "*fp32") for name in kernel.arg_names}
    compiled = compile_for(kernel, arguments, architecture=architecture, num_warps=warps)
    assert compiled.stack == 0
    assert compiled.widest_load() == 16
