"""Prompt files of every format, what is found wrong with them, and control words."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import pytest

from srpo.cli import main
from srpo.config import load_config
from srpo.controls import CONTROL_GROUPS, ControlGroup, ControlPhase, ControlSchedule, control_group, parse_words
from srpo.errors import InputError
from srpo.objective import SRPOConfig
from srpo.prompts import Prompt, read_prompts, scan_prompts
from srpo.tokens import TokenLimits

_PIPELINE = Path(sys.modules["srpo.config"].__file__ or "").parent / "tiny/assets/pipeline"


def _file(tmp_path: Path, content: bytes | str, suffix: str = ".txt") -> Path:
    path = tmp_path / f"prompts{suffix}"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


# --- one prompt a line -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "prompts"),
    [
        (b"a cat\ntwo dogs\n", ["a cat", "two dogs"]),
        (b"a cat\ntwo dogs", ["a cat", "two dogs"]),
        (b"a cat\r\ntwo dogs\r\n", ["a cat", "two dogs"]),
        (b"  a cat \t\n", ["a cat"]),
        (b"\xef\xbb\xbfa cat\ntwo dogs\n", ["a cat", "two dogs"]),
        ("café\nein Bär\n猫\n".encode(), ["café", "ein Bär", "猫"]),
        ("one\u2028line\n".encode(), ["one\u2028line"]),
    ],
    ids=["lines", "no-last-newline", "windows", "spaces", "bom", "utf-8", "unicode-line-separator"],
)
def test_text_is_read_one_prompt_a_line(tmp_path: Path, content: bytes, prompts: list[str]) -> None:
    assert read_prompts(_file(tmp_path, content)) == [Prompt(text) for text in prompts]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "prompt file {path} is empty"),
        (b"\n \n\t\n", "prompt file {path} is empty"),
        (b"\xef\xbb\xbf", "prompt file {path} is empty"),
        (b"a\n\nb\n", "prompt file {path}: no prompt on line 2"),
        (b"\na\n  \nb\n\n", "prompt file {path}: no prompt on lines 1, 3, 5"),
        (
            b"a\n" + b"\n" * 12 + b"b\n",
            "prompt file {path}: no prompt on lines 2, 3, 4, 5, 6, 7, 8, 9, 10, 11 and 2 more",
        ),
        (b"a\ncaf\xe9\nb\n", "prompt file {path} is not UTF-8 on line 2"),
        (b"\xff\na\n\xfe\n", "prompt file {path} is not UTF-8 on lines 1, 3"),
        (b"\xff\na\n\n", "prompt file {path} is not UTF-8 on line 1; prompt file {path}: no prompt on line 3"),
    ],
    ids=["empty", "only-blank", "only-bom", "one-blank", "blanks", "many-blanks", "latin-1", "bytes", "both"],
)
def test_unusable_prompts_are_refused_by_line(tmp_path: Path, content: bytes, message: str) -> None:
    path = _file(tmp_path, content)
    with pytest.raises(InputError, match=f"^{re.escape(message.format(path=path))}$"):
        read_prompts(path)


def test_missing_file_and_other_format_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "none.txt"
    with pytest.raises(InputError, match=f"^prompt file {re.escape(str(path))} cannot be read: No such file"):
        read_prompts(path)
    with pytest.raises(InputError, match=f"^prompt file {re.escape(str(tmp_path))} cannot be read: Is a directory"):
        read_prompts(tmp_path)
    with pytest.raises(InputError, match=r"has no known format '.json'; known are .txt, .jsonl, .csv, .parquet$"):
        read_prompts(_file(tmp_path, "[]", ".json"))


# --- records ---------------------------------------------------------------------------------------------------------

_RECORDS = [
    Prompt("a, cat"),
    Prompt("two\ndogs", ("Real", "Detail"), ("Oil",), 2.0, "7"),
    Prompt("ein Bär", ("bold",), ("thin",)),
    Prompt("x", ("my",), ("words",)),
    Prompt("y", ("Real",), ("thin",)),
]
_GROUPS = {"mine": ControlGroup(("my",), ("words",))}


def test_jsonl_and_csv_hold_the_same(tmp_path: Path) -> None:
    jsonl = (
        '{"prompt": "a, cat", "source": "web"}\n'
        '{"text": " two\\ndogs", "positive": "Real; Detail", "negative": ["Oil"], "weight": 2, "id": 7}\r\n'
        '{"caption": "ein Bär", "control_group": "bold", "weight": 1}\n'
        '{"prompt": "x", "control_group": "mine", "positive": null}\n'
        '{"prompt": "y", "text": "not this", "control_group": "bold", "positive": ["Real"]}'
    )
    csv = (
        "\ufeffprompt, positive,negative,weight,id,control_group,source\r\n"
        '"a, cat",,,,,,web\r\n'
        '"two\ndogs",Real; Detail,Oil,2,7,,\r\n'
        "ein Bär,,,,,bold,\r\n"
        "x,,,,,mine,\r\n"
        "y,Real,,,,bold,\r\n"
    )
    for suffix, content in ((".jsonl", jsonl), (".csv", csv)):
        prompts, report = scan_prompts(_file(tmp_path, content, suffix), _GROUPS)
        assert prompts == _RECORDS
        assert (report.count, report.fatal(), report.ignored) == (5, None, {"source": 1})


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("a cat", 'must be {"prompt": ...}'),
        ('["a cat"]', 'must be {"prompt": ...}'),
        ('{"id": 3}', "has no prompt or text or caption"),
        ('{"prompt": 3}', "must hold text in 'prompt', got 3"),
        ('{"promt": "x"}', "has the unknown key 'promt'; did you mean 'prompt'?"),
        ('{"prompt": "x", "negatives": "y"}', "has the unknown key 'negatives'; did you mean 'negative'?"),
        ('{"prompt": "x", "positive": ["a", " "]}', "positive must be one or more non-empty words, got ['a', ' ']"),
        ('{"prompt": "x", "negative": 3}', "negative must be one or more non-empty words, got 3"),
        ('{"prompt": "x", "weight": "much"}', "weight must be positive and finite, got 'much'"),
        ('{"prompt": "x", "weight": -1}', "weight must be positive and finite, got -1"),
        ('{"prompt": "x", "weight": true}', "weight must be positive and finite, got True"),
        ('{"prompt": "x", "control_group": "bolt"}', "has an unknown control group 'bolt'; known groups: "),
    ],
)
def test_malformed_record_is_refused_by_line(tmp_path: Path, line: str, message: str) -> None:
    path = _file(tmp_path, f'{{"prompt": "fine"}}\n{line}\n', ".jsonl")
    with pytest.raises(InputError, match=f"^{re.escape(f'prompt file {path}: line 2 {message}')}"):
        read_prompts(path)


def test_faults_of_csv_are_told_by_the_line_a_record_starts_on(tmp_path: Path) -> None:
    content = b'prompt,id\n"two\nlines",1\n,\ncaf\xe9,2\n"three\n\nlines",3\nx,4,5\n'
    _, report = scan_prompts(_file(tmp_path, content, ".csv"))
    assert report.faults == {"empty": [4], "undecodable": [5]}
    assert report.malformed == {9: "must have the 2 columns of the first line, has 3"}
    assert report.count == 2
    with pytest.raises(InputError, match="a column name is given twice"):
        scan_prompts(_file(tmp_path, "a,b,a\n1,2,3\n", ".csv"))


def test_parquet_holds_the_same(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    columns = {"prompt": ["a", "b", " ", None], "positive": [["x"], None, None, None], "weight": [2.0, None, 1.0, 1.0]}
    parquet.write_table(pyarrow.table(columns), tmp_path / "p.parquet")
    prompts, report = scan_prompts(tmp_path / "p.parquet")
    assert prompts == [Prompt("a", ("x",), (), 2.0), Prompt("b")]
    assert (report.faults, report.malformed) == ({"empty": [3]}, {4: "has no prompt or text or caption"})


def test_parquet_without_pyarrow_names_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(InputError, match=r"parquet needs pyarrow, which is not installed: pip install pyarrow$"):
        read_prompts(_file(tmp_path, "PAR1", ".parquet"))


# --- warnings --------------------------------------------------------------------------------------------------------


def test_duplicate_and_long_prompts_are_counted_with_their_lines(tmp_path: Path) -> None:
    limits = TokenLimits(_PIPELINE, 12, ["bold"])
    tokens = {"digit one": 2, "digit " * 12: 12, "digit " * 14: 14, "digit " * 15: 15, "abcdefghij": 10}
    path = _file(tmp_path, "\n".join([*tokens, "digit one", " digit one "]))
    prompts, report = scan_prompts(path, measure=limits.measure)
    assert len(prompts) == report.count == 7
    assert report.faults == {
        "duplicate": [6, 7],
        "long_t5": [2, 3, 4],  # 12 words and the end
        "long_clip": [4],  # 15 words, start and end
        "long_controlled": [3],  # 14 words, "bold", "." and both
    }
    assert report.fatal() is None
    assert report.warnings() == [
        "duplicates: 2 (lines 6, 7)",
        "cut off after 12 T5 tokens: 3 (lines 2, 3, 4)",
        "cut off after 16 CLIP tokens: 1 (line 4)",
        "cut off after 16 CLIP tokens once a control word stands before: 1 (line 3)",
    ]
    record = report.record()
    assert (record["count"], record["duplicate"], record["long_t5"], record["empty"]) == (7, 2, 3, 0)
    assert record["lines"]["long_clip"] == [4]
    json.dumps(record)


def test_same_text_with_other_control_words_is_no_duplicate(tmp_path: Path) -> None:
    lines = ['{"prompt": "x"}', '{"prompt": "x", "positive": "a"}', '{"prompt": "x", "positive": "a", "weight": 2}']
    assert scan_prompts(_file(tmp_path, "\n".join(lines), ".jsonl"))[1].faults == {"duplicate": [3]}


def test_data_command_reports_without_training(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = _file(tmp_path, "digit one\ndigit one\n" + "digit " * 20)
    assert main(["data", str(path), "--model", "tiny"]) == 0
    assert capsys.readouterr().out.splitlines() == [
        f"prompt file {path}: 3 usable",
        "  warning: duplicates: 1 (line 2)",
        "  warning: cut off after 16 CLIP tokens: 1 (line 3)",
    ]
    assert main(["data", "tiny", f"data.prompts={path}"]) == 0
    assert "cut off after 16 T5 tokens: 1 (line 3)" in capsys.readouterr().out
    path.write_bytes(b"x\n\n\xff")
    assert main(["data", str(path)]) == 2
    out = capsys.readouterr().out
    assert f"error: prompt file {path} is not UTF-8 on line 3; prompt file {path}: no prompt on line 2" in out
    assert "tokens were not counted: give --model" in out
    assert main(["data", str(path), "run.seed=3"]) == 2
    assert main(["data", "tiny"]) == 0
    assert "10 usable, no faults" in capsys.readouterr().out


# --- control words ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "positive", "negative"),
    [
        ("bold", ("bold",), ("thin",)),
        ("thin", ("thin",), ("bold",)),
        ("blue", ("blue",), ("red",)),
        (
            "realism",
            ("Natural-lighting", "Detail", "Detailed", "Real"),
            ("Concept art", "Painting", "Anime", "Flat", "Oil"),
        ),
    ],
)
def test_control_groups_hold_their_words(name: str, positive: tuple[str, ...], negative: tuple[str, ...]) -> None:
    assert control_group(name) == ControlGroup(positive, negative)


def test_unknown_control_group_is_refused_with_the_known_ones() -> None:
    known = ", ".join(sorted(CONTROL_GROUPS))
    with pytest.raises(InputError, match=f"^unknown control group 'x'; known groups: {known}$"):
        control_group("x")
    with pytest.raises(InputError, match=r"; did you mean 'realism'\?$"):
        control_group("realsm")


def test_words_are_a_list_or_text_with_semicolons() -> None:
    assert parse_words("Concept art; Oil") == parse_words(["Concept art", " Oil"]) == ("Concept art", "Oil")


def test_schedule_changes_groups_at_its_updates() -> None:
    phases = (ControlPhase("bold"), ControlPhase("mine", 3), ControlPhase("realism", 5))
    schedule = ControlSchedule(SRPOConfig(), phases, {"mine": ControlGroup(("a", "b", "c"), ("d",))})
    assert [schedule.pair(step) for step in range(6)] == [
        ("bold", "thin"),
        ("bold", "thin"),
        ("c", "d"),  # lists cycle with the update, whichever phase it is in
        ("a", "d"),
        ("Natural-lighting", "Oil"),
        ("Detail", "Concept art"),
    ]
    assert schedule.pair(3, ("x", "y")) == ("y", "d")
    assert schedule.pair(3, (), ("z",)) == ("a", "z")
    assert set(schedule.words()) >= {"bold", "thin", "a", "b", "c", "d", "Real", "Oil"}


def test_run_without_schedule_uses_the_objective_s_words() -> None:
    config = SRPOConfig()
    for schedule in (ControlSchedule(config), ControlSchedule(config, "realism")):
        assert [schedule.pair(step) for step in range(30)] == [config.controls(step) for step in range(30)]


def test_recipe_s_schedule_and_groups() -> None:
    overrides = [
        "data.control_groups={mine: {positive: Real; Sharp, negative: [Oil]}}",
        "data.control_group=[{group: mine}, {group: bold, start: 3}]",
    ]
    config = load_config("tiny", overrides)
    assert config.data.control_groups == {"mine": ControlGroup(("Real", "Sharp"), ("Oil",))}
    assert config.data.control_group == (ControlPhase("mine", 1), ControlPhase("bold", 3))
    assert config.srpo.positive_controls == ("Real", "Sharp")
    assert load_config("tiny", [overrides[0], "data.control_group=mine"]).srpo.negative_controls == ("Oil",)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("data.control_group=[{group: bolt}]", "unknown control group 'bolt'; known groups: blue"),
        ("data.control_group=[{grup: bold}]", "data.control_group: unknown key 'grup', known are group and start; did"),
        ("data.control_group=[{start: 1}]", "data.control_group: group is missing"),
        ("data.control_group=[{group: bold, start: x}]", "start must be the number of an update, got 'x'"),
        ("data.control_group=[{group: bold, start: 2}]", "phases must start at update 1 and each after the last"),
        ("data.control_group=[{group: bold}, {group: red}]", "phases must start at update 1 and each after the last"),
        ("data.control_groups={m: {positve: a, negative: b}}", "data.control_groups.m: unknown key 'positve'"),
        ("data.control_groups={m: {positive: a}}", "data.control_groups.m: negative is missing"),
        ("data.control_groups={m: {positive: a, negative: []}}", "data.control_groups.m: words must be one or more"),
        ("data.control_groups={m: bold}", "data.control_groups.m must hold positive and negative, got 'bold'"),
        ("data.control_groups=[a]", "data.control_groups must be groups by name, got ['a']"),
        ("data.max_bad_fraction=1", "data.max_bad_fraction must be in [0, 1), got 1.0"),
        ("data.max_upscale=0", "data.max_upscale must be positive, got 0.0"),
    ],
)
def test_bad_control_words_of_a_recipe_are_refused(override: str, message: str) -> None:
    with pytest.raises(InputError, match=re.escape(message)):
        load_config("tiny", [override])
