"""The demo keeps its promises, for both things it can steer."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from PIL import Image

from srpo.demo import run_demo

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "docs"))
from update import BEGIN, END, demo_section  # noqa: E402


@pytest.mark.parametrize(("control", "words"), [("stroke", ("bold", "thin")), ("colour", ("red", "blue"))])
def test_demo_steers_both_ways(
    control: str, words: tuple[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_demo(tmp_path / "demo", control) == 0, capsys.readouterr().out
    results = json.loads((tmp_path / "demo/results.json").read_text())
    base = results["base"]
    assert base["accuracy"] >= 0.97
    for word, sign in zip(words, (1, -1), strict=True):
        measured = results["runs"][word]
        assert sign * (measured[control] - base[control]) >= 1.5
        assert measured["accuracy"] >= 0.90
        assert measured["diversity"] >= 0.80 * base["diversity"]
    assert len(results["checks"]) == 8
    assert all(results["checks"].values())

    printed = capsys.readouterr().out
    assert "killed after" in printed
    assert "[ok]" in printed
    assert "FAILED" not in printed
    for name in ("overview", *words):
        picture = Image.open(tmp_path / f"demo/{name}.png")
        assert min(picture.size) > 300
        assert len(picture.getcolors(2**24)) > 1000
    page = (tmp_path / "demo/report.html").read_text()
    assert page.count("<svg") == 4 + 2 * 4
    assert page.count("<img") == 1


def test_readme_numbers_come_from_the_result_file() -> None:
    readme = (ROOT / "README.md").read_text()
    results = json.loads((ROOT / "docs/demo.json").read_text())
    shown = readme.split(BEGIN)[1].split(END)[0].strip()
    assert shown == demo_section(results)
    assert len(readme.splitlines()) < 150
    assert all(results["checks"].values())
