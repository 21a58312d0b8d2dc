"""What the files of a model are, by content: the same for a copy, another for any other weights."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path

from srpo.sealed import replace_file

__all__ = ["component_digest", "weights_fingerprint"]

_MEMO = "digests.json"
_SAMPLED = 4096  # bytes a tensor


def component_digest(component: Path, memo: Path | None = None) -> str:
    """SHA-256, in hex, of names and contents of the json, safetensors and vocabulary files of a directory.

    `memo`: a directory that remembers digests of files, by path, size and time of change; large files are then read
    once.
    """
    files = [file for file in sorted(component.iterdir()) if file.suffix in (".json", ".safetensors", ".txt", ".model")]
    known = _known(memo)
    digests = {}
    for file in files:
        stat = file.stat()
        name, state = str(file.resolve()), [stat.st_size, stat.st_mtime_ns]
        if name not in known or known[name][0] != state:
            known[name] = [state, _file_digest(file)]
        digests[file.name] = known[name][1]
    if memo is not None and known != _known(memo):
        replace_file(memo / _MEMO, json.dumps(known, indent=1).encode())
    return hashlib.sha256(json.dumps(digests, sort_keys=True).encode()).hexdigest()


def weights_fingerprint(files: Iterable[Path]) -> str:
    """SHA-256, in hex, of name, dtype, shape and first 4 KiB of every tensor in safetensors files, however split.

    Reads a few megabytes of any model: it tells models and fine-tunings of them apart, but not a damaged byte.
    Raises OSError or ValueError for a file that is none.
    """
    entries = {}
    for file in files:
        with file.open("rb") as opened:
            length = int.from_bytes(opened.read(8), "little")
            if length > file.stat().st_size:
                raise ValueError(f"{file} is not a safetensors file")
            for name, entry in json.loads(opened.read(length)).items():
                if name != "__metadata__":
                    first, end = entry["data_offsets"]
                    opened.seek(8 + length + first)
                    content = hashlib.sha256(opened.read(min(_SAMPLED, end - first))).hexdigest()
                    entries[name] = [entry["dtype"], entry["shape"], content]
    return hashlib.sha256(json.dumps(entries, sort_keys=True).encode()).hexdigest()


def _known(memo: Path | None) -> dict[str, list]:
    try:
        return json.loads((memo / _MEMO).read_text(encoding="utf-8")) if memo is not None else {}
    except (OSError, ValueError):
        return {}


def _file_digest(file: Path) -> str:
    digest = hashlib.sha256()
    with file.open("rb") as opened:
        while block := opened.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
