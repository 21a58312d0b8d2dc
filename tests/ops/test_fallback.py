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


def test_missing_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    original = _register.importlib.import_module

    def absent(name: str) -> types.ModuleType:
        if name == "triton":
            raise ImportError("No module named 'triton'")
        return original(name)

    monkeypatch.setattr(_register.importlib, "import_module", absent)
    first, second = launcher(), launcher()
    with pytest.warns(UserWarning, match=r"Triton cannot be imported \(No module named 'triton'\): operators run as"):
        assert first(1) == ("reference", 1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # once for all operators
        assert second(2) == first(2) == ("reference", 2)


def test_old_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "triton", types.SimpleNamespace(__version__="3.5.1"))
    with pytest.warns(UserWarning, match=r"Triton 3\.5\.1 is older than 3\.6"):
        assert launcher()(3) == ("reference", 3)


def test_this_triton_is_used() -> None:
    assert _register.triton_problem() is None
    with pytest.raises(AttributeError, match="no_such_launcher"):
        launcher()(torch.zeros(1))
