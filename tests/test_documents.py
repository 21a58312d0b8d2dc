"""What is generated is up to date, and the commands around the operators answer."""

from __future__ import annotations

import importlib.util
import inspect
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

import srpo_kernels
from benchmarks.__main__ import main as benchmarks
from benchmarks.cases import cases
from srpo.experiments.registry import EXPERIMENTS
from srpo_kernels.__main__ import table
from srpo_kernels.ops._register import OPS

ROOT = Path(__file__).parent.parent


def script(name: str) -> Any:
    """A script of docs/ as a module."""
    spec = importlib.util.spec_from_file_location(name, ROOT / f"docs/{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_ops_page_is_what_the_registry_says() -> None:
    assert (ROOT / "docs/ops.md").read_text() == script("ops").document(), "run `make docs`"


def test_tables_are_what_the_result_files_say() -> None:
    tables = script("tables")
    shown = []
    for path in (ROOT / "README.md", *(ROOT / "docs").glob("*.md")):
        page = path.read_text()
        assert page == tables.filled(page), "run `make tables`"
        shown += re.findall(r"<!-- table (\w+) -->", page)
    assert set(shown) == {*tables.TABLES, *tables.GPU_TABLES}


def test_experiments_take_minutes() -> None:
    results = ROOT / "benchmarks/results"
    headers = [json.loads(path.read_text().partition("\n")[0]) for path in (results / "experiments").glob("*.jsonl")]
    quick = [json.loads(line) for line in (results / "experiments_quick.jsonl").read_text().splitlines()]
    for found, limit in ((headers, 15 * 60), (quick, 2 * 60)):
        assert {header["experiment"] for header in found} == set(EXPERIMENTS)
        assert all(header["workers"] == 2 and header["seconds"] < limit for header in found)
    assert all(header["quick"] for header in quick)


def test_every_public_operator_is_described_tested_and_timed() -> None:
    exported = {name for name in srpo_kernels.__all__ if inspect.isfunction(getattr(srpo_kernels, name))}
    others = {"checkpointed_reward", "extension_status", "fake_quantize_fp8", "fp8_unsupported", "patch"}
    others |= {"convert_to_float8", "freeze_float8", "gather_float8", "revert_float8"}
    assert exported - others == set(OPS)
    timed = {case.op.partition(",")[0] for case in cases("cpu", small=True)}
    for name, info in OPS.items():
        assert (ROOT / f"tests/ops/test_{info.function.__module__.rpartition('.')[2]}.py").is_file()
        assert name in timed
        for schema in info.schemas:
            assert hasattr(torch.ops.srpo, schema)


def test_table_names_operators_and_backends() -> None:
    text = table()
    for name, info in OPS.items():
        line = next(line for line in text.splitlines() if line.startswith(f"{name} "))
        assert "CPU/CUDA" in line
        assert info.formula in line
    assert f"torch {torch.__version__}" in text


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_gpu_command_fails_clearly_and_writes_nothing_without_a_gpu(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert benchmarks(["gpu", "--out", str(tmp_path / "results")]) == 4
    assert capsys.readouterr().err.startswith("benchmarks gpu: no NVIDIA GPU visible to torch")
    assert not (tmp_path / "results").exists()
