"""Put a demo's table and picture into the README: ``python docs/update.py DEMO_DIRECTORY``."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
BEGIN, END = "<!-- demo:begin -->", "<!-- demo:end -->"


def demo_section(results: dict) -> str:
    """The README's lines about a demo's results."""
    header, *rows = results["table"]
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    lines += ["| " + " | ".join(row) + " |" for row in rows]
    cost = results["training_seconds"]
    spent = "; ".join(f"{word}, {count} updates in {cost[word]:.0f} s" for word, count in results["updates"].items())
    note = (
        f"Training on one CPU core: {spent}.\n"
        "Measured by `srpo/tiny/judge.py`, not by the reward; SD is the spread of real digits of one class.\n"
        "[All numbers](docs/demo.json)."
    )
    lines += ["", note]
    return "\n".join(lines)


def replace_section(readme: str, text: str) -> str:
    """`readme` with `text` between the two markers."""
    before, rest = readme.split(BEGIN)
    return f"{before}{BEGIN}\n{text}\n{END}{rest.split(END)[1]}"


if __name__ == "__main__":
    demo = Path(sys.argv[1])
    shutil.copyfile(demo / "results.json", ROOT / "docs/demo.json")
    shutil.copyfile(demo / "overview.png", ROOT / "docs/demo.png")
    text = demo_section(json.loads((ROOT / "docs/demo.json").read_text()))
    readme = ROOT / "README.md"
    readme.write_text(replace_section(readme.read_text(), text))
