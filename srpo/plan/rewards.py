"""How large rewards are: from the files they are loaded from where these exist, else from those of the published ones.

Nothing is run; towers are stacks of equal layers, counted by formula.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from srpo.assets import resolve_asset
from srpo.errors import InputError
from srpo.rewards import RewardConfig
from srpo.rewards.config import RewardModel
from srpo.rewards.hpsv3 import PIXELS
from srpo.rewards.image_reward import TOKENS

__all__ = ["VIT_H", "RewardSizes", "Tower", "count", "read_json", "reward_sizes"]

#: PickScore's CLIPModel, OpenAI's CLIP ViT-L/14, SigLIP so400m-patch14-384, ImageReward's BLIP-L and Qwen2-VL-7B.
_PICKSCORE: dict[str, Any] = dict(
    text_config=dict(hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16),
    vision_config=dict(
        hidden_size=1280, intermediate_size=5120, num_hidden_layers=32, num_attention_heads=16, patch_size=14
    ),
    projection_dim=1024,
)
_CLIP_L: dict[str, Any] = dict(
    text_config=dict(hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12),
    vision_config=dict(
        hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16, patch_size=14
    ),
    projection_dim=768,
)
_SIGLIP: dict[str, Any] = dict(
    hidden_size=1152,
    intermediate_size=4304,
    num_hidden_layers=27,
    num_attention_heads=16,
    image_size=384,
    patch_size=14,
)
_BLIP_VISION: dict[str, Any] = dict(
    hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16, image_size=224
)
_BLIP_TEXT: dict[str, Any] = dict(encoder_hidden_size=1024, is_decoder=True)
_QWEN: dict[str, Any] = dict(
    text_config=dict(
        vocab_size=151658,
        hidden_size=3584,
        intermediate_size=18944,
        num_hidden_layers=28,
        num_attention_heads=28,
        num_key_value_heads=4,
    ),
    vision_config=dict(hidden_size=3584),
)
#: Tokens of HPSv3's question before the prompt, and of a prompt and what follows it. Assumed.
_QUESTION, _ENDING = 600, 80


@dataclass(frozen=True)
class Tower:
    """Equal transformer layers that one image goes through, and its gradient back."""

    layers: int
    weights: int  # of a layer, that every token is multiplied by
    kept: int  # elements that a token leaves in a layer for backward, the weights being frozen
    tokens: int
    width: int  # of all heads

    @classmethod
    def of(cls, layers: int, width: int, hidden: int, tokens: int) -> Tower:
        """With plain attention and MLP: kept are inputs of both norms and of the activation, q, k, v, and out."""
        return cls(layers, 4 * width**2 + 2 * width * hidden, 6 * width + hidden, tokens, width)

    @property
    def flops(self) -> float:
        """Of a forward pass; as many again for the gradient of the pixels."""
        return self.layers * (2.0 * self.tokens * self.weights + 4.0 * self.tokens**2 * self.width)

    @property
    def elements(self) -> int:
        """Kept for backward."""
        return self.layers * self.tokens * self.kept


#: The vision tower of HPSv2.1 and PickScore.
VIT_H = Tower.of(32, 1280, 5120, 257)


@dataclass(frozen=True)
class RewardSizes:
    """A reward, or all parts of a mixture. What no gradient passes through is `texts`."""

    parameters: int  # in the run's precision
    wide: int  # in fp32
    towers: tuple[Tower, ...]  # that an image goes through with the prompts of its score
    texts: int  # fp32 parameters that every text goes through once, to be kept
    missing: tuple[str, ...]  # files that stand-ins were taken for

    def __add__(self, other: RewardSizes) -> RewardSizes:
        return RewardSizes(
            self.parameters + other.parameters,
            self.wide + other.wide,
            self.towers + other.towers,
            self.texts + other.texts,
            self.missing + other.missing,
        )

    def bytes(self, item: int) -> int:
        """Of weights, in a precision of `item` bytes."""
        return self.parameters * item + self.wide * 4

    @property
    def flops(self) -> float:
        """Of scoring one image once."""
        return sum(tower.flops for tower in self.towers)

    @property
    def kept(self) -> int:
        """Elements kept for the gradient of one image's score."""
        return sum(tower.elements for tower in self.towers)


def reward_sizes(config: RewardModel, prompts: int) -> RewardSizes:
    """The sizes of a reward when an image is scored for `prompts` prompts at once.

    Raises `InputError` when a file is there but cannot be used, or an architecture is not known.
    """
    parts = config.parts if isinstance(config, RewardConfig) and config.parts else (config,)
    first, *others = (_KINDS[part.type](part, prompts) for part in parts)
    return sum(others, first)


def _clip(config: RewardModel, _prompts: int) -> RewardSizes:
    from transformers import CLIPConfig, CLIPModel

    path = resolve_asset(config.path, "reward")
    shape = CLIPConfig(**(read_json(path / "config.json") if path.is_dir() else _PICKSCORE))
    with torch.device("meta"):
        model = CLIPModel(shape)
    vision = count(model.vision_model) + count(model.visual_projection)
    texts = count(model) - vision
    return RewardSizes(vision, texts, (_vit(shape.vision_config, 1),), texts, _missing(config, path.is_dir()))


def _open_clip(config: RewardModel, _prompts: int) -> RewardSizes:
    import open_clip

    if config.architecture not in open_clip.list_models():
        raise InputError(f"reward architecture {config.architecture!r} is not an open_clip model name")
    shape = open_clip.get_model_config(config.architecture) or {}
    v = shape["vision_cfg"]
    if not isinstance(v.get("layers"), int):
        raise InputError(f"srpo plan knows ViT rewards only, and {config.architecture} is none")
    kind = open_clip.CustomTextCLIP if shape.pop("custom_text", False) else open_clip.CLIP
    with torch.device("meta"):
        model = kind(**shape)
    vision = count(model.visual)
    tokens = (v["image_size"] // v["patch_size"]) ** 2 + 1
    tower = Tower.of(v["layers"], v["width"], int(v["width"] * v.get("mlp_ratio", 4)), tokens)
    texts = count(model) - vision
    return RewardSizes(vision, texts, (tower,), texts, _missing(config, Path(config.path).is_file()))


def _aesthetic(config: RewardModel, prompts: int) -> RewardSizes:
    from transformers import CLIPConfig, CLIPModel

    path = Path(config.path)
    if path.is_file():
        found = _open_clip(config, prompts)
        return RewardSizes(found.parameters, 0, found.towers, 0, found.missing)
    shape = CLIPConfig(**(read_json(path / "config.json") if path.is_dir() else _CLIP_L))
    with torch.device("meta"):
        model = CLIPModel(shape)
    vision = count(model.vision_model) + count(model.visual_projection)
    return RewardSizes(vision, 0, (_vit(shape.vision_config, 1),), 0, _missing(config, path.is_dir()))


def _siglip(config: RewardModel, _prompts: int) -> RewardSizes:
    from transformers import SiglipVisionConfig, SiglipVisionModel

    path = Path(config.path)
    found = read_json(path / "config.json") if path.is_dir() else _SIGLIP
    shape = SiglipVisionConfig(**found.get("vision_config", found))
    with torch.device("meta"):
        model = SiglipVisionModel(shape)
    return RewardSizes(count(model), 0, (_vit(shape, 0),), 0, _missing(config, path.is_dir()))


def _image_reward(config: RewardModel, prompts: int) -> RewardSizes:
    from transformers import BlipTextConfig, BlipTextModel, BlipVisionConfig, BlipVisionModel

    vision, text = BlipVisionConfig(**_BLIP_VISION), BlipTextConfig(**_BLIP_TEXT)
    with torch.device("meta"):
        models = BlipVisionModel(vision), BlipTextModel(text, add_pooling_layer=False)
    seen = _vit(vision, 1)
    width = text.hidden_size
    read = Tower(
        text.num_hidden_layers,
        # Cross-attention's keys and values are of the image's tokens: so many more for each of the text's.
        6 * width**2 + 2 * width * text.intermediate_size + 2 * width * seen.width * seen.tokens // TOKENS,
        10 * width + text.intermediate_size + 2 * width * seen.tokens // TOKENS,
        TOKENS,
        width,
    )
    low, wide = map(count, models)
    return RewardSizes(low, wide, (seen, *[read] * prompts), 0, _missing(config, Path(config.path).is_file()))


def _hpsv3(config: RewardModel, prompts: int) -> RewardSizes:
    from transformers import Qwen2VLConfig, Qwen2VLModel

    directory = Path(str(config.processor))
    shape = Qwen2VLConfig(**(read_json(directory / "config.json") if directory.is_dir() else _QWEN))
    with torch.device("meta"):
        model = Qwen2VLModel(shape)
    text, vision = shape.text_config, shape.vision_config
    patches = PIXELS // vision.patch_size**2
    tokens = patches // vision.spatial_merge_size**2 + _QUESTION + prompts * _ENDING
    width, hidden = text.hidden_size, text.intermediate_size
    keys = 2 * width // text.num_attention_heads * text.num_key_value_heads
    read = Tower(
        text.num_hidden_layers,
        2 * width**2 + keys * width + 3 * width * hidden,
        6 * width + keys + 3 * hidden,  # inputs of norms in fp32, q, out; k and v; gate, its activation and up
        tokens,
        width,
    )
    seen = Tower.of(vision.depth, vision.embed_dim, vision.mlp_ratio * vision.embed_dim, patches)
    seen = replace(seen, kept=seen.kept + 2 * seen.width)  # rotations are out of place
    return RewardSizes(count(model), 0, (seen, read), 0, _missing(config, Path(config.path).is_file()))


_KINDS: dict[str, Callable[[RewardModel, int], RewardSizes]] = {
    "clip": _clip,
    "open_clip": _open_clip,
    "aesthetic": _aesthetic,
    "siglip_aesthetic": _siglip,
    "image_reward": _image_reward,
    "hpsv3": _hpsv3,
}


def _vit(config: Any, extra: int) -> Tower:
    """`extra`: tokens beside those of the image."""
    tokens = (config.image_size // config.patch_size) ** 2 + extra
    return Tower.of(config.num_hidden_layers, config.hidden_size, config.intermediate_size, tokens)


def _missing(config: RewardModel, found: bool) -> tuple[str, ...]:
    return () if found else (f"reward {config.path} does not exist: reckoned with the published {config.type}",)


def count(module: nn.Module) -> int:
    """Parameters."""
    return sum(parameter.numel() for parameter in module.parameters())


def read_json(file: Path) -> dict[str, Any]:
    """Raises `InputError` when it is missing or no JSON."""
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{file} is missing") from None
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise InputError(f"{file} is not valid JSON ({error})") from None
