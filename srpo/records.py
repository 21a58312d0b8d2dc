"""Rows of prompt files: txt, jsonl, csv and parquet, each row with its line number and whatever is wrong with it."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from srpo.errors import InputError

__all__ = ["FORMATS", "Row", "read_rows"]


@dataclass(frozen=True)
class Row:
    """One row of a file: its values by column, or why it has none."""

    line: int  # 1-based; of a record over several lines the first, of a parquet file the row
    values: dict[str, Any] | None
    fault: str = ""  # "undecodable", "empty" or, for a malformed row, what it must be


def read_rows(path: str | Path, what: str, shape: str = '{"prompt": ...}') -> list[Row]:
    """All rows of a file, by its suffix; a line of text is ``{"prompt": line}``.

    `what` names the file in errors, `shape` says what a record must look like.

    Raises `InputError` when the file cannot be read, is empty or of no known format.
    """
    path = Path(path)
    if path.suffix.lower() not in FORMATS:
        known = ", ".join(suffix for suffix in FORMATS if suffix)
        raise InputError(f"{what} {path} has no known format {path.suffix!r}; known are {known}")
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise InputError(f"{what} {path} cannot be read: {error.strerror}") from None
    raw = raw.removeprefix(b"\xef\xbb\xbf")
    rows = list(FORMATS[path.suffix.lower()](raw, f"{what} {path}", shape)) if raw.strip() else []
    if all(row.fault == "empty" for row in rows):
        raise InputError(f"{what} {path} is empty")
    return rows


def _text(raw: bytes, _name: str, _shape: str) -> Iterator[Row]:
    for number, line in enumerate(raw.splitlines(), 1):  # of bytes: a Unicode line separator is no new line
        text = _decoded(line)
        if text is None:
            yield Row(number, None, "undecodable")
        else:
            yield Row(number, {"prompt": text}) if text.strip() else Row(number, None, "empty")


def _jsonl(raw: bytes, name: str, shape: str) -> Iterator[Row]:
    for row in _text(raw, name, shape):
        if row.values is None:
            yield row
            continue
        try:
            record = json.loads(row.values["prompt"])
        except json.JSONDecodeError:
            record = None
        yield Row(row.line, record) if isinstance(record, dict) else Row(row.line, None, f"must be {shape}")


def _csv(raw: bytes, name: str, _shape: str) -> Iterator[Row]:
    # What is not UTF-8 becomes lone surrogates, found again once rows are parsed.
    reader = csv.reader(io.StringIO(raw.decode("utf-8", "surrogateescape"), newline=""), strict=True)
    header: list[str] | None = None
    while True:
        line = reader.line_num + 1
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            yield Row(line, None, f"is not CSV ({error})")
            continue
        if header is None:
            header = [cell.strip() for cell in cells]
            if len(set(header)) < len(header):
                raise InputError(f"{name}: a column name is given twice in {header}")
        elif _decoded("".join(cells).encode("utf-8", "surrogateescape")) is None:
            yield Row(line, None, "undecodable")
        elif not any(cell.strip() for cell in cells):
            yield Row(line, None, "empty")
        elif len(cells) != len(header):
            yield Row(line, None, f"must have the {len(header)} columns of the first line, has {len(cells)}")
        else:
            yield Row(line, {key: cell for key, cell in zip(header, cells, strict=True) if cell.strip()})


def _parquet(raw: bytes, name: str, _shape: str) -> Iterator[Row]:
    try:
        pyarrow, parquet = import_module("pyarrow"), import_module("pyarrow.parquet")
    except ImportError:
        raise InputError(f"{name}: parquet needs pyarrow, which is not installed: pip install pyarrow") from None
    try:
        table = parquet.read_table(pyarrow.BufferReader(raw))
    except pyarrow.ArrowException as error:
        raise InputError(f"{name} is not a parquet file: {error}") from None
    for number in range(table.num_rows):
        try:
            (record,) = table.slice(number, 1).to_pylist()
        except UnicodeDecodeError:
            yield Row(number + 1, None, "undecodable")
        else:
            yield Row(number + 1, {key: value for key, value in record.items() if value is not None})


def _decoded(line: bytes) -> str | None:
    try:
        return line.decode("utf-8")
    except UnicodeDecodeError:
        return None


#: How each format is read, by suffix.
FORMATS = {".txt": _text, "": _text, ".jsonl": _jsonl, ".csv": _csv, ".parquet": _parquet}
