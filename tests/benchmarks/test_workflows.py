"""The CI templates: they parse, their commands exist, and what may write runs nobody else's code."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from benchmarks.__main__ import _ALL

_ROOT = Path(__file__).parents[2]
_FILES = {path.stem: path for path in (_ROOT / ".github/workflows").glob("*.yml")}


def workflow(name: str) -> dict[str, Any]:
    loaded = yaml.safe_load(_FILES[name].read_text())
    return loaded | {"on": loaded[True]}  # YAML 1.1 reads `on` as a truth value


@pytest.mark.parametrize("name", sorted(_FILES))
def test_workflows_are_whole(name: str) -> None:
    loaded = workflow(name)
    assert loaded["name"] == name
    assert loaded["permissions"]
    for job in loaded["jobs"].values():
        assert job["timeout-minutes"] <= 240
        for step in job["steps"]:
            assert ("run" in step) != ("uses" in step)
            assert re.fullmatch(r"actions/[\w-]+@v\d+", step.get("uses", "actions/checkout@v4"))


@pytest.mark.parametrize("name", sorted(_FILES))
def test_every_command_in_them_exists(name: str) -> None:
    text = _FILES[name].read_text()
    assert set(re.findall(r"-m benchmarks (\w+)", text)) <= set(_ALL)
    targets = set(re.findall(r"^(\w[\w-]*):", (_ROOT / "Makefile").read_text(), re.MULTILINE))
    assert set(re.findall(r"\bmake ([\w-]+)", text)) <= targets
    for extras in re.findall(r'"\.\[([\w,]+)\]"', text):
        declared = (_ROOT / "pyproject.toml").read_text()
        assert all(f"\n{extra} = [" in declared for extra in extras.split(","))


def test_pull_requests_run_with_a_token_that_only_reads() -> None:
    tests = workflow("tests")
    assert tests["permissions"] == {"contents": "read"}
    assert "pull_request" in tests["on"]
    assert not any("pull_request_target" in path.read_text() for path in _FILES.values())


def test_what_may_write_runs_nothing_of_a_pull_request() -> None:
    comment = workflow("comment")
    assert list(comment["on"]) == ["workflow_run"]
    assert comment["on"]["workflow_run"]["workflows"] == [workflow("tests")["name"]]
    steps = comment["jobs"]["comment"]["steps"]
    assert not any("checkout" in step.get("uses", "") or "run" in step for step in steps)
    script = steps[-1]["with"]["script"]
    assert "${{" not in script  # nothing is pasted into code
    assert set(workflow("nightly")["on"]) == {"schedule", "workflow_dispatch"}


def test_results_are_read_from_where_they_were_put() -> None:
    upload = [step for step in workflow("tests")["jobs"]["cpu"]["steps"] if "upload-artifact" in step.get("uses", "")]
    download = workflow("comment")["jobs"]["comment"]["steps"][0]
    assert upload[0]["with"]["name"] == download["with"]["name"]
    assert "static.txt" in upload[0]["with"]["path"]
