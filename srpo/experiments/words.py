"""Control words whose meaning is learnt from images: vectors of the text tower in the place of a word that it knows."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor
from torch.func import functional_call
from torch.nn.functional import normalize, softplus

from srpo.objective import with_control
from srpo.randomness import generator
from srpo.rewards import CLIPReward
from srpo.tiny.digits import NAMED, caption, load

__all__ = ["Examples", "learn_words", "separated"]

_STEPS, _RATE = 100, 3e-2

_digits = cache(load)


@dataclass(frozen=True)
class Examples:
    """Images [N, 3, H, W] in [0, 1] with N captions, and whether each [N] shows the wanted thing or its opposite."""

    images: Tensor
    captions: list[str]
    wanted: Tensor

    @classmethod
    def of_digits(cls, count: int | None, seed: int = 0) -> Examples:
        """Clearly bold and clearly thin digits: `count` of those to train on, by `seed`, or all that are held out."""
        data = _digits()
        images, labels = data.images, data.labels
        if count is None:
            images, labels = data.held_out_images, data.held_out_labels
        stroke = data.stats.z_scores(images, labels)["stroke"]
        chosen = (stroke.abs() > NAMED).nonzero()[:, 0]
        chosen = chosen[torch.randperm(len(chosen), generator=generator(seed, 0, 0, "examples"))[:count]]
        return cls(images[chosen], [caption(label) for label in labels[chosen].tolist()], stroke[chosen] > 0)


def learn_words(reward: CLIPReward, words: tuple[str, str], examples: Examples) -> CLIPReward:
    """`reward`, in which the vectors of both words' tokens have been learnt from examples of the first and the second.

    They minimise ``log(1 + exp(-s))`` by Adam, s being the model's logit of an image with ``first. caption`` less that
    with ``second. caption``, or the negative of it for an image that shows the second. All else of the model is frozen.
    The words should be of tokens that no caption has: those mean something else from now on.
    """
    model, padding = reward.model, _ids(reward, "")
    ids = torch.tensor(sorted((_ids(reward, words[0]) | _ids(reward, words[1])) - padding))
    table = model.text_model.embeddings.token_embedding.weight.detach()
    texts = list(dict.fromkeys(examples.captions))
    prompts = [reward._tokens(with_control(word, text)) for word in words for text in texts]
    tokens = {name: torch.cat([prompt[name] for prompt in prompts]) for name in prompts[0]}
    shown = torch.tensor([texts.index(text) for text in examples.captions])
    sign = torch.where(examples.wanted, 1.0, -1.0)
    with torch.no_grad():
        images = model.logit_scale.exp() * normalize(reward.embed_images(examples.images), dim=-1)
    vectors = table[ids].clone().requires_grad_()
    optimizer = torch.optim.Adam([vectors], _RATE)
    for _ in range(_STEPS):
        changed = {"embeddings.token_embedding.weight": table.index_put((ids,), vectors)}
        pooled = functional_call(model.text_model, changed, kwargs=tokens).pooler_output
        first, second = normalize(model.text_projection(pooled), dim=-1).unflatten(0, (2, -1))
        loss = softplus(-sign * (images * (first - second)[shown]).sum(-1)).mean()
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        optimizer.step()
    table[ids] = vectors.detach()
    reward._embed_prompt.cache_clear()  # type: ignore[attr-defined]
    return reward


@torch.no_grad()
def separated(reward: CLIPReward, words: tuple[str, str], examples: Examples) -> float:
    """The share of examples that `reward` finds nearer to the word that they show."""
    first, second = (
        reward.score(examples.images, [with_control(word, text) for text in examples.captions]) for word in words
    )
    return ((first > second) == examples.wanted).float().mean().item()


def _ids(reward: CLIPReward, text: str) -> set[int]:
    return set(reward._tokens(text)["input_ids"][0].tolist())
