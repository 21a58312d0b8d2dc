"""``pytest benchmarks``: pytest-benchmark over the GPU's clock; once each, for correctness, without one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import conftest as front
from benchmarks.environment import device

_ROOT = Path(__file__).parents[2]
_CONFTEST = """
import sys
sys.path[:0] = [{tests!r}]
from benchmarks.conftest import *
from benchmarks.conftest import pytest_configure as _configure
from fake_gpu import install

def pytest_configure(config):
    import pytest
    install(pytest.MonkeyPatch())
    _configure(config)
"""
_TEST = """
def test_gelu(gpu_benchmark):
    timed = gpu_benchmark(lambda x: x + 1, [1, 2, 3], nbytes=8.0)
    assert timed.output == timed.input + 1
"""


def run(folder: Path, *options: str) -> subprocess.CompletedProcess[str]:
    (folder / "conftest.py").write_text(_CONFTEST.format(tests=str(Path(__file__).parent)))
    (folder / "test_own.py").write_text(_TEST)
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *options, str(folder)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(_ROOT), os.environ.get("PYTHONPATH", "")])}
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)


def test_without_pytest_benchmark_everything_runs_once_and_says_so(tmp_path: Path) -> None:
    done = run(tmp_path, "-p", "no:benchmark")
    assert done.returncode == 0, done.stdout
    assert "1 ran once for correctness, not measured: pytest-benchmark is not installed" in done.stdout


def test_saved_times_name_the_gpu_and_not_the_host() -> None:
    info = {"node": "host", "cpu": {"hz_actual": [1, 0], "hz_actual_friendly": "1 GHz", "arch": "X86_64"}}
    front.pytest_benchmark_update_machine_info(info)
    assert (info["node"], info["cpu"], info["gpu"]["name"]) == ("", {"arch": "X86_64"}, device().name)
    front.pytest_benchmark_compare_machine_info(info, {"machine_info": info})
    for other in ({"gpu": {"name": "another"}}, {}):
        with pytest.raises(pytest.UsageError, match="not comparable"):
            front.pytest_benchmark_compare_machine_info(info, {"machine_info": other})


def test_the_virtual_clock_shows_the_gpu_s_seconds() -> None:
    clock = front.VirtualClock()
    clock.advance(1500.0)
    assert clock() == 1.5


@pytest.mark.slow
def test_shipped_benchmarks_run_once_without_a_gpu() -> None:
    command = [sys.executable, "-m", "pytest", "benchmarks", "-p", "no:cacheprovider"]
    done = subprocess.run(command, cwd=_ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:]
    assert "ran once for correctness, not measured: no GPU" in done.stdout


@pytest.mark.slow
def test_pytest_benchmark_sees_the_gpu_s_seconds_and_refuses_another_gpu(tmp_path: Path) -> None:
    pytest.importorskip("pytest_benchmark")
    options = ["--benchmark-storage", str(tmp_path / "saved"), "--benchmark-autosave"]
    done = run(tmp_path, *options)
    assert done.returncode == 0, done.stdout + done.stderr
    (saved,) = (tmp_path / "saved").rglob("*.json")
    content = json.loads(saved.read_text())
    (found,) = content["benchmarks"]
    assert found["stats"]["rounds"] == 60
    assert found["stats"]["median"] == pytest.approx(1e-3)
    assert found["extra_info"] == {"bytes": 8.0, "flops": None, "clock": "events"}
    assert content["machine_info"]["gpu"]["name"] == "Fake"
    assert content["machine_info"]["node"] == ""
    compare = f"--benchmark-compare={saved.name[:4]}"
    assert run(tmp_path, *options, compare).returncode == 0
    content["machine_info"]["gpu"]["name"] = "Other"
    saved.write_text(json.dumps(content))
    refused = run(tmp_path, *options, compare)
    assert refused.returncode == 4
    assert "saved on Other, and this is Fake: not comparable" in refused.stderr + refused.stdout
