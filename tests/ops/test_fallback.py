"""Without a Triton that can be used, operators are the reference, and say so once."""

from __future__ import annotations

import sys
import types
import warnings
from collections.abc import Callable, Iterator

import pytest
import torch

from srpo_kernels.ops import _register


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    cached = _register.triton_problem, _register._warn
    for each in cached:
        each.cache_clear()
    yield
    for each in cached:
        each.cache_clear()


def launcher() -> Callable[..., object]:
    return _register._lazy("srpo_kernels._triton.gelu:no_such_launcher", lambda x: ("reference", x))


def imported_as(triton: types.SimpleNamespace | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """The package of kernels is imported again, with `triton` for Triton."""
    monkeypatch.setitem(sys.modules, "triton", triton)
    monkeypatch.delitem(sys.modules, "srpo_kernels._triton", raising=False)


def test_missing_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    imported_as(None, monkeypatch)
    first, second = launcher(), launcher()
    with pytest.warns(UserWarning, match=r"Triton cannot be used \(.*triton.*\): operators run as plain PyTorch"):
        assert first(1) == ("reference", 1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # once for all operators
        assert second(2) == first(2) == ("reference", 2)


def test_old_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    imported_as(types.SimpleNamespace(__version__="3.5.1"), monkeypatch)
    with pytest.warns(UserWarning, match=r"Triton cannot be used \(Triton 3\.5\.1 is older than 3\.6\)"):
        assert launcher()(3) == ("reference", 3)


def test_this_triton_is_used() -> None:
    assert _register.triton_problem() is None
    with pytest.raises(AttributeError, match="no_such_launcher"):
        launcher()(torch.zeros(1))
