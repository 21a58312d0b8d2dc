"""How many tokens the pipeline's two text encoders see in a text. Needs the tokenizers, no weights."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from srpo.errors import InputError
from srpo.files import has_vocabulary
from srpo.objective import with_control
from srpo.prompts import FileReport

__all__ = ["TokenLimits"]


class TokenLimits:
    """Finds texts that T5 or CLIP would cut off.

    Args:
        model: pipeline directory. max_sequence_length: T5 tokens that the model reads.
        words: control words that may stand before a text when it is scored.

    Raises `InputError` when a tokenizer is missing.
    """

    def __init__(self, model: Path, max_sequence_length: int, words: Sequence[str] = ()) -> None:
        from transformers import AutoTokenizer

        for name in ("tokenizer", "tokenizer_2"):
            if not has_vocabulary(model / name):
                raise InputError(f"model directory {model} has no {name}/")
        self._clip = AutoTokenizer.from_pretrained(model / "tokenizer", local_files_only=True)
        self._t5 = AutoTokenizer.from_pretrained(model / "tokenizer_2", local_files_only=True)
        self.limits = {"long_t5": max_sequence_length, "long_clip": self._clip.model_max_length}
        self._word = max(words, key=lambda word: _count(self._clip, word), default=None)
        if self._word is not None:
            self.limits["long_controlled"] = self._clip.model_max_length

    def measure(self, report: FileReport, texts: Sequence[tuple[int, str]]) -> None:
        """Add to `report` the lines of `texts`, (line, text), that are too long."""
        report.limits.update(self.limits)
        for line, text in texts:
            if _over(self._t5, text, self.limits["long_t5"]):
                report.add("long_t5", line)
            if _over(self._clip, text, self.limits["long_clip"]):
                report.add("long_clip", line)
            elif self._word is not None and _over(
                self._clip, with_control(self._word, text), self.limits["long_controlled"]
            ):
                report.add("long_controlled", line)


def _over(tokenizer: Any, text: str, limit: int) -> bool:
    # ASCII never makes more tokens than characters; two more open and close the text.
    return not (text.isascii() and len(text) + 2 <= limit) and _count(tokenizer, text) > limit


def _count(tokenizer: Any, text: str) -> int:
    return len(tokenizer(text, truncation=False, verbose=False).input_ids)
