"""The checks themselves can fail."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from srpo_kernels.testing import assert_within_budget, check_against_reference, poisoned_outputs


def double(x: Tensor) -> Tensor:
    return 2 * x


def test_unwritten_elements_are_nan_and_only_within_the_block() -> None:
    like = torch.zeros(1000)
    with poisoned_outputs():
        made = [torch.empty(1000), torch.empty_like(like), like.new_empty(1000), torch.empty_strided((1000,), (1,))]
    assert all(tensor.isnan().all() for tensor in made)
    assert not torch.are_deterministic_algorithms_enabled()


def test_a_forgotten_element_is_caught() -> None:
    def forgetful(x: Tensor) -> Tensor:
        out = torch.empty_like(x)
        out[:-1] = 2 * x[:-1]
        return out + 0 * x

    with pytest.raises(AssertionError, match="output: non-finite"):
        check_against_reference(forgetful, double, {"x": torch.ones(8)}, differentiable=("x",))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_one_element_off_by_two_ulp_is_caught(dtype: torch.dtype) -> None:
    exact = torch.linspace(1, 2, 100, dtype=torch.float64).to(dtype).double()
    assert_within_budget(exact.to(dtype), exact, exact.float(), name="right")
    wrong = exact.to(dtype)
    wrong[50] *= 1 + 2.5 * torch.finfo(dtype).eps
    with pytest.raises(AssertionError, match=r"wrong: .* x the error budget"):
        assert_within_budget(wrong, exact, exact.float(), name="wrong")


def test_a_wrong_gradient_is_caught() -> None:
    with pytest.raises(AssertionError, match=r"dx: .* x the error budget"):
        check_against_reference(
            lambda x: 2 * x.detach() + 1.001 * (x - x.detach()), double, {"x": torch.ones(8)}, differentiable=("x",)
        )
