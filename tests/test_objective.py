"""The SRPO objective against numbers and loops written down independently of the package."""

from __future__ import annotations

import dataclasses
import hashlib
import math
from collections.abc import Sequence
from fractions import Fraction
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.functional import normalize

from srpo.objective import Branch, SRPOConfig, SRPOOutput, branches, draw_timestep, srpo_loss

_HPS = {
    "timesteps": 1000,
    "window": (5, 25),
    "schedule_steps": 50,
    "shift": 3.0,
    "groundtruth_ratio": 0.9,
    "margin": 5,
    "inversion": True,
    "form": "official",
    "discount_denoise": (0.1, 0.25),
    "discount_inversion": (0.3, 0.01),
    "threshold": 0.7,
    "reward_logit_scale": False,
    "reward_divisor": 1.0,
    "twin_noise": 0.05,
    "positive_controls": ("Natural-lighting", "Detail", "Detailed", "Real"),
    "negative_controls": ("Concept art", "Painting", "Anime", "Flat", "Oil"),
    "height": 720,
    "width": 720,
    "rollout_steps": 25,
    "rollout_guidance": 1.0,
    "guidance": 3.5,
    "noise": "shared",
    "batch_size": 32,
    "updates": 20,
    "learning_rate": 5e-6,
    "betas": (0.9, 0.999),
    "eps": 1e-8,
    "weight_decay": 1e-4,
    "max_grad_norm": 0.1,
}
_PRESETS: dict[str, dict[str, Any]] = {
    "hps": _HPS,
    "pickscore": {
        **_HPS,
        "window": (5, 30),
        "discount_denoise": (0.1, 0.5),
        "discount_inversion": (0.6, 0.01),
        "rollout_guidance": 2.0,
        "reward_logit_scale": True,
        "reward_divisor": 20.0,
    },
}
# Ends of the window: S_5, S_25 and S_30 of a 50-step schedule with shift 3, worked out by hand.
_ENDS = {"hps": (Fraction(27, 28), Fraction(3, 4)), "pickscore": (Fraction(27, 28), Fraction(2, 3))}
_KAPPAS = {
    "hps": ((Fraction("0.1"), Fraction("0.25")), (Fraction("0.3"), Fraction("0.01"))),
    "pickscore": ((Fraction("0.1"), Fraction("0.5")), (Fraction("0.6"), Fraction("0.01"))),
}
# sel: (k, level indices of the denoise branch from noisy to clean and its m, the same for the inversion branch)
_INDICES = {
    5: (5, (990, 995, 5), (994, 999, 1)),
    6: (6, (988, 994, 6), (993, 999, 1)),
    99: (99, (802, 901, 99), (900, 999, 1)),
    100: (100, (800, 900, 100), (899, 999, 1)),
    101: (100, (799, 899, 101), (899, 999, 1)),
    500: (100, (400, 500, 500), (500, 600, 400)),
    900: (100, (0, 100, 900), (100, 200, 800)),
    995: (5, (0, 5, 995), (5, 10, 990)),
}


def _line(ends: tuple[Fraction, Fraction], index: int) -> float:
    """Point `index` of 1000 evenly spaced ones."""
    return float(ends[0] + (ends[1] - ends[0]) * Fraction(index, 999))


# --- numbers of the presets ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(_PRESETS))
def test_preset_has_every_published_number(name: str) -> None:
    assert dataclasses.asdict(SRPOConfig.preset(name)) == _PRESETS[name]


def test_default_config_is_the_hps_preset() -> None:
    assert SRPOConfig() == SRPOConfig.preset("hps")


def test_unknown_preset_is_refused_with_the_known_names() -> None:
    with pytest.raises(ValueError, match=r"^preset must be one of \['hps', 'pickscore'\], got 'clip'$"):
        SRPOConfig.preset("clip")


@pytest.mark.parametrize("name", sorted(_PRESETS))
def test_levels_run_from_the_noisiest_to_the_cleanest(name: str) -> None:
    levels = SRPOConfig.preset(name).sigmas()
    assert levels.shape == (1000,)
    for index in (0, 1, 500, 998, 999):
        assert levels[index] == pytest.approx(_line(_ENDS[name], index), abs=1e-15)


@pytest.mark.parametrize("sel", sorted(_INDICES))
@pytest.mark.parametrize("name", sorted(_PRESETS))
def test_branches_have_the_tabulated_numbers(name: str, sel: int) -> None:
    k, (noisy, clean, m), (inverted_noisy, inverted_clean, inverted_m) = _INDICES[sel]
    assert (clean - noisy, inverted_clean - inverted_noisy) == (k, k)
    denoise, inversion = branches(SRPOConfig.preset(name), sel)
    ends, (discount_denoise, discount_inversion) = _ENDS[name], _KAPPAS[name]

    assert (denoise.name, denoise.swap_prompts) == ("denoise", False)
    assert denoise.sigma_from == pytest.approx(_line(ends, noisy), abs=1e-15)
    assert denoise.sigma_to == pytest.approx(_line(ends, clean), abs=1e-15)
    assert denoise.kappa == pytest.approx(_line(discount_denoise, m), abs=1e-15)

    assert (inversion.name, inversion.swap_prompts) == ("inversion", True)
    assert inversion.sigma_from == pytest.approx(_line(ends, inverted_clean), abs=1e-15)
    assert inversion.sigma_to == pytest.approx(_line(ends, inverted_noisy), abs=1e-15)
    assert inversion.kappa == pytest.approx(_line(discount_inversion, inverted_m), abs=1e-15)


def test_middle_of_the_hps_recipe_in_literal_numbers() -> None:
    denoise, inversion = branches(SRPOConfig.preset("hps"), 500)
    assert (denoise.sigma_from, denoise.sigma_to) == pytest.approx((0.8784856284856285, 0.8570356070356071), abs=1e-15)
    assert (inversion.sigma_from, inversion.sigma_to) == pytest.approx(
        (0.8355855855855856, 0.8570356070356071), abs=1e-15
    )
    assert (denoise.kappa, inversion.kappa) == pytest.approx((0.17507507507507508, 0.18388388388388389), abs=1e-15)


@pytest.mark.parametrize("sel", [-1, 0, 4, 996, 1000])
def test_sel_outside_its_range_is_refused(sel: int) -> None:
    with pytest.raises(ValueError, match=rf"^sel must lie in \[5, 995\], got {sel}$"):
        branches(SRPOConfig(), sel)


def test_without_inversion_the_denoise_branch_is_alone() -> None:
    assert branches(SRPOConfig(inversion=False), 300) == branches(SRPOConfig(), 300)[:1]


@st.composite
def _draws(draw: st.DrawFn) -> tuple[SRPOConfig, int]:
    margin = draw(st.integers(1, 8))
    timesteps = draw(st.integers(2 * margin + 1, 2000))
    first = draw(st.integers(1, 49))
    config = SRPOConfig(
        timesteps=timesteps,
        margin=margin,
        window=(first, draw(st.integers(first + 1, 50))),
        groundtruth_ratio=draw(st.floats(0, 1)),
        shift=draw(st.floats(0.1, 20)),
    )
    return config, draw(st.integers(margin, timesteps - margin))


@settings(max_examples=200, deadline=None)
@given(_draws())
def test_branches_cross_k_levels_inside_the_window(drawn: tuple[SRPOConfig, int]) -> None:
    config, sel = drawn
    total, ratio = config.timesteps, config.groundtruth_ratio
    k = min(total - sel, int((1 - ratio) * total) + 1, sel)
    noisiest, cleanest = (
        config.shift * t / (1 + (config.shift - 1) * t) for t in (1 - j / config.schedule_steps for j in config.window)
    )
    spacing = (noisiest - cleanest) / (total - 1)

    denoise, inversion = branches(config, sel)
    assert (denoise.name, inversion.name) == ("denoise", "inversion")
    assert denoise.sigma_from > denoise.sigma_to, "the denoise branch lowers sigma"
    assert inversion.sigma_from < inversion.sigma_to, "the inversion branch raises sigma"
    for branch in (denoise, inversion):
        low, high = sorted((branch.sigma_from, branch.sigma_to))
        assert cleanest - 1e-12 <= low < high <= noisiest + 1e-12
        assert low >= 0
        assert branch.sigma_to < 1, "recovery divides by 1 - sigma_to"
        assert high - low == pytest.approx(k * spacing, abs=1e-12)
    assert 0.1 <= denoise.kappa <= 0.25
    assert 0.01 <= inversion.kappa <= 0.3

    for outside in (config.margin - 1, total - config.margin + 1):
        with pytest.raises(ValueError, match="sel must lie in"):
            branches(config, outside)


# --- draws and control words -----------------------------------------------------------------------------------------


def test_draw_timestep_is_uniform_over_its_whole_range() -> None:
    config = SRPOConfig(timesteps=20, margin=5)
    generator = torch.Generator().manual_seed(0)
    count = 4400
    drawn = [draw_timestep(config, generator) for _ in range(count)]
    assert all(isinstance(sel, int) for sel in drawn)
    assert set(drawn) == set(range(5, 16)), "both ends are drawn, nothing outside"
    expected = count / 11
    chi_squared = sum((drawn.count(sel) - expected) ** 2 / expected for sel in range(5, 16))
    assert chi_squared < 29.6, "0.1 % point of chi-squared with 10 degrees of freedom"


def test_draw_timestep_depends_on_the_generator_alone() -> None:
    def draws(seed: int) -> list[int]:
        generator = torch.Generator().manual_seed(seed)
        return [draw_timestep(SRPOConfig(), generator) for _ in range(20)]

    assert draws(1) == draws(1) != draws(2)


def test_control_words_cycle_with_the_step() -> None:
    config = SRPOConfig()
    assert [config.controls(step) for step in (0, 1, 3, 4, 5, 19, 20)] == [
        ("Natural-lighting", "Concept art"),
        ("Detail", "Painting"),
        ("Real", "Flat"),
        ("Natural-lighting", "Oil"),
        ("Detail", "Concept art"),
        ("Real", "Oil"),
        ("Natural-lighting", "Concept art"),
    ]


# --- values out of range ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("window", (0, 25)),
        ("window", (25, 25)),
        ("window", (25, 5)),
        ("window", (5, 51)),
        ("margin", 0),
        ("timesteps", 10),
        ("groundtruth_ratio", -0.1),
        ("groundtruth_ratio", 1.1),
        ("groundtruth_ratio", math.nan),
        ("shift", 0.0),
        ("shift", math.inf),
        ("form", "paper"),
        ("discount_denoise", (-0.1, 0.2)),
        ("discount_denoise", (0.1, 1.5)),
        ("discount_inversion", (1.5, 0.1)),
        ("discount_inversion", (math.nan, 0.1)),
        ("discount_inversion", (0.1, math.nan)),
        ("threshold", math.nan),
        ("threshold", math.inf),
        ("reward_divisor", 0.0),
        ("twin_noise", -0.1),
        ("positive_controls", ()),
        ("positive_controls", ("Real", " ")),
        ("negative_controls", ("",)),
        ("height", 0),
        ("width", -16),
        ("rollout_steps", 0),
        ("rollout_guidance", -1.0),
        ("guidance", math.nan),
        ("noise", "same"),
        ("batch_size", 0),
        ("updates", 0),
        ("learning_rate", 0.0),
        ("learning_rate", math.nan),
        ("betas", (0.9, 1.0)),
        ("betas", (-0.1, 0.9)),
        ("eps", 0.0),
        ("weight_decay", -1e-4),
        ("max_grad_norm", 0.0),
    ],
)
def test_value_out_of_range_is_refused_by_name(field: str, value: Any) -> None:
    with pytest.raises(ValueError, match=rf"^{field} must be "):
        SRPOConfig(**{field: value})


def test_refusal_says_what_is_accepted_and_what_was_given() -> None:
    with pytest.raises(ValueError, match=r"^window must be 0 < a < b <= 50, got \(5, 51\)$"):
        SRPOConfig(window=(5, 51))


# --- the loss --------------------------------------------------------------------------------------------------------

_WIDTH = 12
_CAPTIONS = ("a cat", "two dogs", "a red car")
_CONTROLS = ("Real", "Oil")


class _Model(nn.Module):
    """A velocity that depends on the image and the noise level; counts its calls."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(3)
        self.first = nn.Parameter(torch.randn(_WIDTH, 16, generator=generator, dtype=torch.float64) / 3)
        self.second = nn.Parameter(torch.randn(16, _WIDTH, generator=generator, dtype=torch.float64) / 3)
        self.levels = nn.Parameter(torch.randn(16, generator=generator, dtype=torch.float64))
        self.calls = 0

    def forward(self, x_t: Tensor, sigma: Tensor) -> Tensor:
        self.calls += 1
        assert sigma.shape == x_t.shape[:1]
        return torch.tanh(x_t @ self.first + sigma[:, None] * self.levels) @ self.second


class _Reward:
    """Cosine against an embedding made from the prompt's characters; records what it was asked."""

    def __init__(self) -> None:
        self.asked: list[tuple[Any, ...]] = []

    def embed(self, prompt: str) -> Tensor:
        seed = int.from_bytes(hashlib.blake2b(prompt.encode(), digest_size=6).digest(), "little")
        drawn = torch.randn(_WIDTH, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        return normalize(drawn, dim=-1)

    def cosine(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        texts = torch.stack([self.embed(prompt) for prompt in prompts])
        return (normalize(images.flatten(1) - 0.5, dim=-1) * texts).sum(-1)

    def relative(self, images: Tensor, positive: list[str], negative: list[str], kappa: Tensor) -> Tensor:
        self.asked.append(("relative", tuple(images.shape), list(positive), list(negative), kappa.tolist()))
        return (1 + kappa) * self.cosine(images, positive) - self.cosine(images, negative)

    def score(self, images: Tensor, prompts: list[str]) -> Tensor:
        self.asked.append(("score", images.detach().clone(), list(prompts)))
        return self.cosine(images, prompts)


def _decode(latents: Tensor) -> Tensor:
    return torch.sigmoid(latents).reshape(-1, 3, 2, 2)


def _batch(count: int, shared: bool = False) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(11)
    x0 = torch.randn(count, _WIDTH, generator=generator, dtype=torch.float64)
    return x0, torch.randn(1 if shared else count, _WIDTH, generator=generator, dtype=torch.float64)


def _some_branches(count: int) -> tuple[Branch, ...]:
    config = SRPOConfig.preset("pickscore")
    return (*branches(config, 300), *branches(config, 720))[:count]


def _by_hand(
    model: _Model,
    x0: Tensor,
    noise: Tensor,
    captions: Sequence[str],
    steps: Sequence[Branch],
    threshold: float | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss, scores and recovered images, one image of one branch at a time."""
    reward = _Reward()
    loss, scores, recovered = torch.zeros((), dtype=torch.float64), [], []
    for step in steps:
        for i, caption in enumerate(captions):
            image, e = x0[i : i + 1], noise[i % len(noise)][None]
            sigma = torch.tensor([step.sigma_from], dtype=torch.float64)
            x_t = (1 - step.sigma_from) * image + step.sigma_from * e
            v = model(x_t, sigma)
            x0_hat = (x_t + (step.sigma_to - step.sigma_from) * v - step.sigma_to * e) / (1 - step.sigma_to)
            wanted, unwanted = (f"Oil. {caption}", f"Real. {caption}")
            if not step.swap_prompts:
                wanted, unwanted = unwanted, wanted
            pixels = _decode(x0_hat)
            score = (1 + step.kappa) * reward.cosine(pixels, [wanted]) - reward.cosine(pixels, [unwanted])
            penalty = -score if threshold is None else torch.clamp(threshold - score, min=0)
            loss = loss + penalty.sum() / len(captions) / len(steps)
            scores.append(score.detach())
            recovered.append(x0_hat.detach())
    return loss, torch.cat(scores), torch.cat(recovered)


def _loss(model: _Model, x0: Tensor, noise: Tensor, steps: Sequence[Branch], **options: Any) -> SRPOOutput:
    options = dict(decode=_decode, reward=_Reward(), controls=_CONTROLS, captions=_CAPTIONS[: len(x0)]) | options
    captions = options.pop("captions")
    return srpo_loss(x0, noise, captions, branches=steps, velocity=model, **options)


@pytest.mark.parametrize("threshold", [0.7, 0.05, None])
@pytest.mark.parametrize("shared", [False, True], ids=["own-noise", "shared-noise"])
@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize("batch", [1, 3])
def test_loss_and_gradient_equal_the_branches_run_one_by_one(
    batch: int, count: int, shared: bool, threshold: float | None
) -> None:
    x0, noise = _batch(batch, shared)
    steps = _some_branches(count)
    assert len(steps) == count

    model = _Model()
    out = _loss(model, x0, noise, steps, threshold=threshold)
    out.loss.backward()
    expected_model = _Model()
    loss, scores, recovered = _by_hand(expected_model, x0, noise, _CAPTIONS[:batch], steps, threshold)
    loss.backward()

    torch.testing.assert_close(out.loss, loss, rtol=0, atol=1e-10)
    torch.testing.assert_close(out.branch_losses.sum(), out.loss.detach(), rtol=0, atol=1e-12)
    torch.testing.assert_close(out.scores, scores, rtol=0, atol=1e-10)
    torch.testing.assert_close(out.x0_hat, recovered, rtol=0, atol=1e-10)
    assert out.branch_losses.shape == (count,)
    for got, expected in zip(model.parameters(), expected_model.parameters(), strict=True):
        assert got.grad is not None
        assert expected.grad is not None
        torch.testing.assert_close(got.grad, expected.grad, rtol=1e-10, atol=1e-10)
    if threshold != 0.05:
        assert model.first.grad is not None
        assert model.first.grad.abs().max() > 1e-4, "the comparison above is of real gradients"


def test_threshold_of_this_batch_clips_some_scores_and_not_others() -> None:
    """Keeps the comparison above honest: 0.05 lies among its scores."""
    scores = _loss(_Model(), *_batch(3), _some_branches(3)).scores
    assert scores.min() < 0.05 < scores.max()


def test_score_above_the_threshold_costs_nothing() -> None:
    model = _Model()
    out = _loss(model, *_batch(3), _some_branches(2), threshold=-10.0)
    out.loss.backward()
    assert out.loss.item() == 0
    assert all(p.grad is not None and not p.grad.any() for p in model.parameters())


def test_model_decoder_and_reward_are_called_once_with_both_branches_in_order() -> None:
    model, reward, decoded = _Model(), _Reward(), []

    def decode(latents: Tensor) -> Tensor:
        decoded.append(tuple(latents.shape))
        return _decode(latents)

    steps = branches(SRPOConfig.preset("hps"), 500)
    _loss(model, *_batch(2), steps, captions=["a cat", "two dogs"], reward=reward, decode=decode)
    assert model.calls == 1
    assert decoded == [(4, _WIDTH)]
    (asked,) = reward.asked
    name, shape, positive, negative, kappa = asked
    assert (name, shape) == ("relative", (4, 3, 2, 2))
    assert positive == ["Real. a cat", "Real. two dogs", "Oil. a cat", "Oil. two dogs"]
    assert negative == ["Oil. a cat", "Oil. two dogs", "Real. a cat", "Real. two dogs"]
    assert kappa == [steps[0].kappa] * 2 + [steps[1].kappa] * 2


def test_model_sees_each_branch_at_its_own_noise_level() -> None:
    seen: list[tuple[Tensor, Tensor]] = []

    def velocity(x_t: Tensor, sigma: Tensor) -> Tensor:
        seen.append((x_t, sigma))
        return torch.zeros_like(x_t)

    x0, noise = _batch(2)
    first, second = steps = branches(SRPOConfig(), 200)
    srpo_loss(
        x0, noise, _CAPTIONS[:2], controls=_CONTROLS, branches=steps, velocity=velocity, decode=_decode,
        reward=_Reward(),
    )  # fmt: skip
    ((x_t, sigma),) = seen
    assert sigma.tolist() == [first.sigma_from] * 2 + [second.sigma_from] * 2
    expected = torch.cat([(1 - s) * x0 + s * noise for s in (first.sigma_from, second.sigma_from)])
    torch.testing.assert_close(x_t, expected, rtol=0, atol=1e-14)


def test_only_the_loss_carries_a_gradient() -> None:
    out = _loss(_Model(), *_batch(1), _some_branches(2))
    assert out.loss.requires_grad
    assert not any(tensor.requires_grad for tensor in (out.scores, out.x0_hat, out.branch_losses))


def test_low_precision_latents_keep_the_noise_levels_in_fp32() -> None:
    seen: list[Tensor] = []

    def velocity(x_t: Tensor, sigma: Tensor) -> Tensor:
        seen.append(sigma)
        return torch.zeros_like(x_t)

    x0, noise = (tensor.bfloat16() for tensor in _batch(1))
    steps = branches(SRPOConfig(), 500)
    srpo_loss(
        x0, noise, ["a cat"], controls=_CONTROLS, branches=steps, velocity=velocity,
        decode=lambda latents: _decode(latents.double()), reward=_Reward(),
    )  # fmt: skip
    torch.testing.assert_close(seen[0], torch.tensor([step.sigma_from for step in steps]), rtol=0, atol=0)


@pytest.mark.parametrize("threshold", [0.7, None])
def test_image_only_form_scores_image_against_its_noised_twin(threshold: float | None) -> None:
    """reward(image) - reward(image + noise, kept in [0, 1]); the sign turns in the swapped branch."""
    x0, noise = _batch(2)
    steps = branches(SRPOConfig(), 500)
    twin_noise = torch.randn(4, 3, 2, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    model, reward = _Model(), _Reward()
    out = _loss(model, x0, noise, steps, reward=reward, twin_noise=twin_noise, threshold=threshold)
    out.loss.backward()

    expected_model, by_hand = _Model(), []
    for row in range(4):
        step, i = steps[row // 2], row % 2
        x_t = (1 - step.sigma_from) * x0[i : i + 1] + step.sigma_from * noise[i : i + 1]
        v = expected_model(x_t, torch.tensor([step.sigma_from], dtype=torch.float64))
        image = _decode(x0[i : i + 1] + (step.sigma_from - step.sigma_to) / (1 - step.sigma_to) * (
            noise[i : i + 1] - x0[i : i + 1] - v
        ))  # fmt: skip
        twin = torch.clamp(image + twin_noise[row], 0, 1)
        difference = reward.cosine(image, [_CAPTIONS[i]]) - reward.cosine(twin, [_CAPTIONS[i]])
        by_hand.append(-difference if step.name == "inversion" else difference)
    scores = torch.cat(by_hand)
    penalties = -scores if threshold is None else torch.relu(threshold - scores)
    (penalties.sum() / 4).backward()

    torch.testing.assert_close(out.scores, scores.detach(), rtol=0, atol=1e-10)
    torch.testing.assert_close(out.loss.detach(), penalties.detach().sum() / 4, rtol=0, atol=1e-10)
    for got, expected in zip(model.parameters(), expected_model.parameters(), strict=True):
        torch.testing.assert_close(got.grad, expected.grad, rtol=1e-10, atol=1e-10)
    assert [asked[0] for asked in reward.asked] == ["score", "score"]
    assert all(asked[2] == ["a cat", "two dogs"] * 2 for asked in reward.asked)
    assert any((asked[1] == 1).any() for asked in reward.asked), "the twin is clamped"


@pytest.mark.parametrize("which", [0, 1], ids=["denoise", "inversion"])
@pytest.mark.parametrize("sel", [5, 500, 995])
def test_closed_form_and_its_gradient(sel: int, which: int) -> None:
    """x0_hat = x0 + w (v* - v) and d x0_hat / d v = -w, with w = (s_from - s_to) / (1 - s_to)."""
    step = branches(SRPOConfig(), sel)[which]
    x0, noise = _batch(2)
    v = torch.randn(2, _WIDTH, generator=torch.Generator().manual_seed(1), dtype=torch.float64, requires_grad=True)
    kept: list[Tensor] = []

    def decode(latents: Tensor) -> Tensor:
        kept.append(latents)
        return _decode(latents)

    srpo_loss(
        x0, noise, _CAPTIONS[:2], controls=_CONTROLS, branches=[step], velocity=lambda _x, _s: v, decode=decode,
        reward=_Reward(),
    )  # fmt: skip
    (x0_hat,) = kept
    w = (step.sigma_from - step.sigma_to) / (1 - step.sigma_to)
    assert (w > 0) == (step.name == "denoise"), "the gradient on v changes sign between the branches"
    torch.testing.assert_close(x0_hat, x0 + w * ((noise - x0) - v), rtol=0, atol=1e-12)
    weights = torch.randn(2, _WIDTH, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    (gradient,) = torch.autograd.grad((x0_hat * weights).sum(), v)
    torch.testing.assert_close(gradient, -w * weights, rtol=0, atol=1e-12)


def test_no_branches_are_refused() -> None:
    with pytest.raises(ValueError, match=r"^srpo_loss: branches must name at least one branch$"):
        _loss(_Model(), *_batch(1), [])


@pytest.mark.parametrize("captions", [[], ["a cat"], ["a cat"] * 4])
def test_wrong_number_of_captions_is_refused(captions: list[str]) -> None:
    message = rf"^srpo_loss: captions must have one entry per image \(3\), got {len(captions)}$"
    with pytest.raises(ValueError, match=message):
        _loss(_Model(), *_batch(3), _some_branches(2), captions=captions)


def test_noise_of_another_shape_is_refused() -> None:
    x0, _ = _batch(3)
    with pytest.raises(ValueError, match="noise must have shape"):
        _loss(_Model(), x0, torch.zeros(2, _WIDTH, dtype=torch.float64), _some_branches(2))


@pytest.mark.parametrize("checkpoint", [False, True])
def test_control_words_of_each_caption_equal_running_the_captions_one_by_one(checkpoint: bool) -> None:
    x0, noise = _batch(3, False)
    steps, words = _some_branches(2), [("Real", "Painting"), ("Detail", "Oil"), ("Real", "Anime")]
    model, alone = _Model(), _Model()
    together = _loss(model, x0, noise, steps, controls=words, checkpoint=checkpoint)
    together.loss.backward()
    single = []
    for row, pair in enumerate(words):
        rows = slice(row, row + 1)
        single.append(_loss(alone, x0[rows], noise[rows], steps, controls=pair, captions=_CAPTIONS[rows]))
        (single[-1].loss / 3).backward()
    expected = torch.stack([out.scores for out in single], 1).flatten()
    torch.testing.assert_close(together.scores, expected, rtol=0, atol=1e-10)
    for ours, theirs in zip(model.parameters(), alone.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-9, atol=1e-12)
    assert not torch.equal(together.scores, _loss(_Model(), x0, noise, steps, controls=words[0]).scores)
    with pytest.raises(ValueError, match=r"controls must be one pair, or one per image \(3\), got 2"):
        _loss(_Model(), x0, noise, steps, controls=words[:2])
