"""Tests marked slow run only with ``SRPO_SLOW=1`` in the environment."""

from __future__ import annotations

import os

import pytest


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "slow: takes minutes")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not os.environ.get("SRPO_SLOW"):
        items[:] = [item for item in items if item.get_closest_marker("slow") is None]
