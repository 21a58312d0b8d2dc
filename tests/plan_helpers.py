"""What tests of `srpo plan` share."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from srpo.config import TrainConfig
from srpo.plan.sizes import Sizes

__all__ = ["each_size_once"]

_known: dict[Any, Sizes] = {}


@pytest.fixture(scope="module", autouse=True)
def each_size_once() -> Iterator[None]:
    """Models are built once for all plans of them."""
    build = Sizes.of

    def of(config: TrainConfig) -> Sizes:
        objective, model, looking = config.srpo, config.model, config.validation
        shape = (objective.height, objective.width, model.max_sequence_length, model.path, model.text_cache is None)
        key = (*shape, config.reward, objective.form, looking.held_out, looking.alignment)
        if key not in _known:
            _known[key] = build(config)
        return _known[key]

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(Sizes, "of", of)
        yield
