"""Learnt control words: an open question of the paper, where rare words fail."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

from srpo.assets import TINY, resolve_asset
from srpo.config import load_config
from srpo.errors import InputError
from srpo.experiments.arms import Arm, shown, trained
from srpo.experiments.experiment import Conclusion, Experiment, Row, Setting, measured
from srpo.experiments.looks import ends_table, last, surely
from srpo.experiments.words import Examples, learn_words, separated
from srpo.images import panels
from srpo.rewards import CLIPReward, Reward

__all__ = ["Tokens"]

KNOWN, RARE = ("bold", "thin"), ("qzjk", "vxyp")  # the letters of rare words are tokens that no caption has
#: Of each arm its words, and how many images they are learnt from.
ARMS: dict[str, tuple[tuple[str, str], int]] = {
    "known words": (KNOWN, 0),
    "rare words": (RARE, 0),
    "learnt from 20 images": (RARE, 20),
    "learnt from 200 images": (RARE, 200),
}
WORDS, LETTERS, *LEARNT = ARMS


class Tokens(Experiment):
    """SRPO by words that the reward knows, by words that it does not, and by those once learnt from a few images."""

    name = "tokens"
    claim = "rare control words fail; whether control words could be learnt is left open."
    seeds = (5, 2)

    def measure(self, setting: Setting, out: Path, say: Callable[[str], None]) -> Iterator[Row]:
        config = load_config(setting.recipe, setting.overrides)
        if config.model.path != TINY:
            raise InputError("experiment tokens needs the tiny world (--recipe tiny): it learns from labelled digits")
        held_out = Examples.of_digits(None)
        for name, (words, count) in ARMS.items():
            for seed in range(setting.seeds):
                reward = CLIPReward(resolve_asset(config.reward.path, "reward"))
                found = separated(_learnt(reward, words, count, seed), words, held_out)
                yield {"arm": _examined(name), "seed": seed, "separated": found}
        arms = [
            Arm(
                name,
                (f"srpo.positive_controls=[{words[0]}]", f"srpo.negative_controls=[{words[1]}]", "data.control_group="),
                towards=KNOWN[0],
                reward=partial(_trained_on, words=words, count=count),
            )
            for name, (words, count) in ARMS.items()
        ]
        yield from trained(arms, setting, out, say)
        panels(shown(arms, out, 20), 10, stacked=True).save(out / f"{self.name}.png")

    def table(self, rows: Sequence[Row]) -> tuple[list[str], list[list[str]]]:
        header, lines = ends_table(
            rows, list(ARMS), {"moved": "moved (SD)", "kept": "accuracy", "diverse": "diversity"}
        )
        told = [measured(last(rows, _examined(name), "separated")) for name in ARMS]
        return ["", "held-out digits told apart", *header[1:]], [
            [line[0], share, *line[1:]] for line, share in zip(lines, told, strict=True)
        ]

    def curves(self, rows: Sequence[Row]) -> list[str]:
        del rows
        return []

    def conclusions(self, rows: Sequence[Row]) -> list[Conclusion]:
        known, rare = (last(rows, name, "moved") for name in (WORDS, LETTERS))
        found = [
            Conclusion(
                f"Words that the reward was never trained on move strokes by {measured(rare)} SD, known words by "
                f"{measured(known)} SD.",
                surely([a - b for a, b in zip(known, rare, strict=True)]) > 0,
            )
        ]
        for name in LEARNT:
            moved = last(rows, name, "moved")
            told = last(rows, _examined(name), "separated")
            share = measured([100 * a / b for a, b in zip(moved, known, strict=True)], 0)
            text = (
                f"Words {name} tell {measured([100 * one for one in told], 0)} % of held-out digits apart and move "
                f"strokes by {measured(moved)} SD: {share} % of what known words do."
            )
            found.append(Conclusion(text, None))
        return found


def _examined(name: str) -> str:
    return f"{name}, examined"


def _trained_on(reward: Reward, words: tuple[str, str], count: int) -> Reward:
    assert isinstance(reward, CLIPReward)
    return _learnt(reward, words, count, 0)


def _learnt(reward: CLIPReward, words: tuple[str, str], count: int, seed: int) -> CLIPReward:
    """`reward` with `words` learnt from `count` images, or as it is."""
    return learn_words(reward, words, Examples.of_digits(count, seed)) if count else reward
