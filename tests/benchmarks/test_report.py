"""What people read: the summary's totals and order, and a page that needs nothing else."""

from __future__ import annotations

import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
from simulated import measurement, process, run

from benchmarks.__main__ import main
from benchmarks.compare import compare
from benchmarks.report.charts import floor_ms, history, phases, roofline
from benchmarks.report.page import page
from benchmarks.report.quick import quick_table
from benchmarks.report.summary import summary, time
from benchmarks.report.svg import Axis
from benchmarks.report.tables import newest, rendered
from benchmarks.schema import Ceilings, Device, Finding, Run, write

_CEILINGS = Ceilings(copy_gb_s=4000.0, memory_gb_s=4800.0, matmul_tflop_s=800.0)


def sides(slower: int = 1, same: int = 1) -> tuple[Run, Run]:
    names = [f"op{index} [<4>]" for index in range(slower + same)]
    base = run({name: [1.0] * 5 for name in names}, ceilings=_CEILINGS)
    new = run({name: [1.5 if i < slower else 1.0] * 5 for i, name in enumerate(names)}, ceilings=_CEILINGS)
    return base, new


def test_summary_has_regressions_first_and_totals_of_all() -> None:
    base, new = sides(slower=70, same=30)
    new = replace(new, measurements=[*new.measurements, measurement([1.0] * 5, "fresh")])
    lines = summary(compare(base, new)).splitlines()
    assert lines[0].startswith("### 70 regressions, the worst +50.0%: op")
    rows = [line for line in lines if line.startswith("| SLOWER")]
    assert len(rows) == 60
    assert "11 more are not shown; `--out` writes all." in lines
    assert lines[-2] == "70 SLOWER, 1 NEW, 30 SAME; 101 in all."
    assert lines[-1] == "<!-- srpo-benchmarks nvidia-h200 -->"


def test_summary_of_what_may_not_be_compared_says_why_once() -> None:
    base, new = sides()
    text = summary(compare(base, replace(new, device=replace(new.device, name="NVIDIA B200"))))
    assert "Nothing may be compared: another GPU: name NVIDIA H200 against NVIDIA B200." in text
    assert "| INCOMPARABLE" not in text
    assert "2 INCOMPARABLE; 2 in all." in text


@pytest.mark.parametrize(
    ("milliseconds", "said"),
    [(None, ""), (0.0123, "12.3 µs"), (1.5, "1.5 ms"), (940.26, "940.3 ms"), (5239, "5.239 s")],
)
def test_times_are_said_in_the_unit_that_suits(milliseconds: float | None, said: str) -> None:
    assert time(milliseconds) == said


def test_quick_table_holds_ours_against_peers_and_the_copy() -> None:
    rows = [measurement([1.0]), measurement([3.0], form="eager"), measurement([1.5], form="compiled")]
    rows += [
        measurement([], "bad", status="error", error="boom"),
        measurement([], "x", status="skipped", error="no GPU"),
    ]
    lines = quick_table(run(rows, ceilings=_CEILINGS)).splitlines()
    assert lines[2].split() == ["gelu", "[4],", "forward", "1", "ms", "3.00x", "1.50x", "25%"]
    assert lines[3:] == ["error: bad, forward: boom", "1 no GPU", "1 error, 3 ok, 1 skipped"]


_VOID = {"meta", "rect", "line", "polyline", "polygon"}


def test_tables_of_the_newest_clean_run_of_every_gpu(tmp_path: Path) -> None:
    sizes = [measurement([value], f"gelu [{value}]", bytes=value * 1e9, form=form, part="ops")
             for value in (1.0, 2.0) for form in ("ours", "eager")]  # fmt: skip
    sizes[1] = replace(sizes[1], processes=[process(3.0)])
    sizes[3] = replace(sizes[3], processes=[process(9.0)])
    step = [measurement([t], "step", mode=mode, form=form, part="step")
            for form, t in (("ours", 40.0), ("official", 90.0)) for mode in ("step", "rollout")]  # fmt: skip
    good = run([*sizes, *step], tier="gpu", ceilings=_CEILINGS)
    older = replace(good, created="2026-11-01T00:00:00Z", git=replace(good.git, sha="c" * 40))
    changed = replace(good, created="2026-11-30T00:00:00Z", git=replace(good.git, dirty=True, sha="d" * 40))
    for index, each in enumerate((good, older, changed, replace(older, tier="kernels"))):
        write(each, tmp_path / each.device.slug / f"{index}.json")
    write(replace(good, device=Device(name="cpu")), tmp_path / "cpu/0.json")
    runs = newest(tmp_path)
    assert runs == [good]
    lines = rendered("gpu_operators", runs).splitlines()
    assert lines[0] == "NVIDIA H200, `aaaaaaaaaaaa`, 2026-11-21, torch 2.15:"
    assert lines[4:] == ["| gelu [2.0] | forward | 2 ms | 4.50 x |  |  | 25% |"]  # the largest shape
    assert rendered("gpu_step", runs).splitlines()[2:] == [
        "| phase | ours | official |",
        "| --- | --- | --- |",
        "| step | 40 ms | 90 ms |",
        "| rollout | 40 ms | 90 ms |",
    ]
    for name in ("gpu_models", "gpu_optimizers"):
        assert rendered(name, runs).startswith("Not measured yet")


class _Checker(HTMLParser):
    """Refuses what would be loaded from elsewhere, and tags that do not nest."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.said: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert not {"src", "href"} & {key for key, _ in attrs}
        assert tag not in ("script", "link", "img", "iframe")
        if tag not in _VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert tag in _VOID, attrs

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.said.append(data)


def read_page(text: str) -> str:
    """What a page says; it must be whole, and need nothing else."""
    checker = _Checker()
    checker.feed(text)
    assert checker.open == ["html"]  # which may stay open
    assert "url(" not in text
    assert "@import" not in text
    return " ".join(checker.said)


def test_page_shows_every_part_and_escapes_names() -> None:
    base, new = sides()
    step = [
        measurement([value] * 5, "step", mode=mode, part="step") for mode, value in (("rollout", 9.0), ("decode", 3.0))
    ]
    slowed = measurement([1.0] * 5, "hot", status="contaminated", error="the GPU was slowed down: power_brake")
    base, new = (replace(side, measurements=[*side.measurements, *step, slowed]) for side in (base, new))
    new = replace(new, software=replace(new.software, packages={"diffusers": "0.42"}))
    kept = [replace(base, created=f"2026-11-0{day}T00:00:00Z", regressions=[]) for day in (1, 2, 3)]
    finding = Finding("WORSE", "sm90", "gelu", "spill_st", 0, 8, "none before")
    said = read_page(page(compare(base, new), new, kept, [finding]))
    for part in (
        "1 regression, the worst +50.0%: op0 [<4>], forward",
        "What changed",
        "Share of the roofline",
        "4,000 GB/s by copying, 800 TFLOP/s in bf16 products",
        "The step by phase",
        "ours, before: 12 ms",
        "History",
        "Static figures that differ from their pins",
        "spill_st",
        "software.packages.diffusers",
        "1 contaminated",
        "the GPU was slowed down: power_brake",
        "All 5 times of this run",
    ):
        assert part in said


def test_page_of_one_run_and_of_a_run_without_a_gpu() -> None:
    alone = read_page(page(None, sides()[1]))
    assert "2 measurements" in alone
    assert "What changed" not in alone
    nothing = read_page(page(None, run([measurement([], status="skipped", error="not measured: no GPU")])))
    assert "Nothing was timed." in nothing
    assert "not measured: no GPU" in nothing


def test_floors_are_the_larger_of_bytes_and_operations() -> None:
    assert floor_ms(measurement([1.0], bytes=4e9), _CEILINGS) == pytest.approx(1.0)
    assert floor_ms(measurement([1.0], bytes=4e9, flops=1.6e12), _CEILINGS) == pytest.approx(2.0)
    assert floor_ms(measurement([1.0], bytes=None), _CEILINGS) is None
    assert floor_ms(measurement([1.0]), Ceilings()) is None


def _drawn(base: Run, new: Run) -> str | None:
    return roofline(compare(base, new).differences, _CEILINGS)


def test_roofline_arrows_point_down_where_it_got_slower() -> None:
    base, new = sides(slower=1, same=0)
    drawn = _drawn(base, new)
    assert drawn is not None
    shaft = re.search(r'y1="([\d.]+)" x2="[\d.]+" y2="([\d.]+)" class="shaft v-slower"', drawn)
    assert shaft is not None
    assert float(shaft[1]) < float(shaft[2])
    for before, after, up in ((base, new, False), (new, base, True)):
        head = re.search(r'<polygon points="[\d.]+,([\d.]+) [\d.]+,([\d.]+) ', str(_drawn(before, after)))
        assert head is not None
        assert (float(head[1]) < float(head[2])) == up
    assert roofline(compare(base, new).differences, Ceilings()) is None
    assert phases({"": base}) is None
    assert history([base], base.measurements[0].id) is None


def test_history_marks_other_software_and_regressions() -> None:
    base, _ = sides(1, 0)
    name = base.measurements[0].id
    kept = [base, replace(base, software=replace(base.software, torch="2.16")), replace(base, regressions=[name])]
    drawn = history(kept, name)
    assert drawn is not None
    assert drawn.count('class="changed"') == 2  # there and back
    assert drawn.count("v-slower") == 1


@pytest.mark.parametrize(
    ("axis", "ticks"),
    [(Axis(0, 1, 0, 1), 6), (Axis(0, 37, 0, 1), 4), (Axis(0.003, 40, 0, 1, log=True), 4), (Axis(1, 1, 0, 1), 1)],
)
def test_axes_have_few_round_ticks_within(axis: Axis, ticks: int) -> None:
    found = axis.ticks()
    assert len(found) == ticks
    assert all(axis.low <= tick <= axis.high * 1.0001 for tick in found)


def test_report_command_writes_all_three(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base, new = sides()
    rows = [measurement([0.5]), measurement([1.0], form="eager")]
    new = replace(new, measurements=[*new.measurements, *rows])
    files = [str(write(side, tmp_path / f"{name}.json")) for name, side in (("base", base), ("new", new))]
    static = tmp_path / "static.json"
    write(
        replace(run([]), tier="static", findings=[Finding("WORSE", "sm90", "gelu_kernel", "regs", 40, 48, "first")]),
        static,
    )
    made = {kind: str(tmp_path / kind) for kind in ("html", "md", "png")}
    options = [item for kind, path in made.items() for item in (f"--{kind}", path)]
    assert main(["report", files[1], "--base", files[0], "--static", str(static), *options]) == 0
    assert (tmp_path / "md").read_text().startswith("### 1 regression")
    assert (tmp_path / "md").read_text() in capsys.readouterr().out
    assert "gelu_kernel" in read_page((tmp_path / "html").read_text())
    assert (tmp_path / "png/forward.png").read_bytes().startswith(b"\x89PNG")
    static.write_text("[]")
    assert main(["report", files[1], "--static", str(static), "--html", made["html"]]) == 2
    assert "static.json: the file must be an object" in capsys.readouterr().err
