"""Rewards that are a cosine between an image and a text embedding: CLIP, PickScore, HPSv2.1."""

from __future__ import annotations

import json
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

from srpo.errors import InputError
from srpo.files import has_vocabulary
from srpo.rewards.base import Reward
from srpo.rewards.preprocess import clip_normalize, prepare
from srpo.rewards.text_cache import TextCache
from srpo.rewards.towers import freeze, load_open_clip, load_transformers
from srpo.sealed import content_digest
from srpo_kernels import RELATIVE_FORMS, relative_reward

__all__ = ["CLIPReward", "CosineReward", "OpenCLIPReward"]


class CosineReward(Reward):
    """``scale * cos(image, text)``, with the relative forms of `srpo_kernels.relative_reward`.

    Args:
        form: "official", "difference" or "cfg".
        scale: factor of the cosine.
        device: of the towers. dtype: of the vision tower's weights and activations.
        text_cache: keep text embeddings in this directory, too; None: in memory only.

    Raises `InputError` when `text_cache` cannot be made.
    """

    def __init__(
        self,
        *,
        form: str,
        scale: float,
        device: str | torch.device,
        dtype: torch.dtype,
        text_cache: str | Path | None,
    ) -> None:
        self.form, self.scale, self.device, self.dtype = form, scale, device, dtype
        self._text_device = device
        self._files = None
        if text_cache is not None:
            weights, architecture = self._text_tower()
            self._files = TextCache(text_cache, content_digest(weights, architecture))
        # A run's every prompt: 256 MB at an embedding of 1024.
        self._embed_prompt = lru_cache(maxsize=65536)(self._embed_prompt)  # type: ignore[method-assign]

    model: Any
    image_size: int
    image_mean: Sequence[float]
    image_std: Sequence[float]

    @abstractmethod
    def _image_features(self, pixels: Tensor) -> Tensor:
        """Embeddings [N, D] of preprocessed images [N, 3, S, S], all in the vision tower's dtype."""

    @abstractmethod
    def _tokens(self, prompt: str) -> dict[str, Tensor]:
        """All that the text tower takes of one prompt."""

    @abstractmethod
    def _text_features(self, tokens: Mapping[str, Tensor]) -> Tensor:
        """Embedding [1, D] of one prompt's tokens, which are where the text tower is."""

    @abstractmethod
    def _text_tower(self) -> tuple[dict[str, Tensor], str]:
        """The weights that embed tokens, and a description of how."""

    @abstractmethod
    def _reads_text(self, name: str) -> bool:
        """Whether the model's tensor of that name is the text tower's."""

    def preprocess(self, images: Tensor) -> Tensor:
        """Images [N, 3, H, W] in [0, 1] to the tower's input [N, 3, S, S]: antialiased bicubic resize, centre crop,
        normalise."""
        return prepare(images, self.image_size, self.image_mean, self.image_std)

    def embed_images(self, images: Tensor) -> Tensor:
        """Image embeddings [N, D], fp32, not normalised; differentiable."""
        return self._image_features(self.preprocess(images).to(self.dtype)).float()

    def embed_prompts(self, prompts: Sequence[str]) -> Tensor:
        """Text embeddings [N, D], fp32, at unit norm. The tower runs for prompts not seen before only."""
        return torch.cat([self._embed_prompt(prompt) for prompt in prompts])

    @torch.no_grad()
    def _embed_prompt(self, prompt: str) -> Tensor:
        # Alone, so that the embedding never depends on the other prompts of a batch.
        tokens = self._tokens(prompt)

        def embed() -> Tensor:
            placed = {name: tensor.to(self._text_device) for name, tensor in tokens.items()}
            return normalize(self._text_features(placed).float(), dim=-1)

        return (embed() if self._files is None else self._files.embedding(tokens, embed)).to(self.device)

    def release_text_tower(self, device: str | torch.device = "cpu") -> None:
        for prefix, module in self.model.named_modules():
            for held in (module._parameters, module._buffers):
                for name, tensor in held.items():
                    if tensor is not None and self._reads_text(f"{prefix}.{name}".lstrip(".")):
                        moved = tensor.detach().to(device)
                        held[name] = torch.nn.Parameter(moved, False) if held is module._parameters else moved
        self._text_device = device

    def relative(self, images: Tensor, positive: list[str], negative: list[str], kappa: Tensor) -> Tensor:
        """Relative scores [N] of images [N, 3, H, W] in [0, 1]; differentiable in the images."""
        texts = self.embed_prompts(positive), self.embed_prompts(negative)
        return relative_reward(self.embed_images(images), *texts, kappa, scale=self.scale, form=self.form)

    def score(self, images: Tensor, prompts: list[str]) -> Tensor:
        """``scale * cos`` [N] of each image with its prompt; differentiable in the images."""
        return self.scale * (normalize(self.embed_images(images), dim=-1) * self.embed_prompts(prompts)).sum(-1)

    def limit(self, kappa: float) -> float:
        """The largest relative score any image can reach."""
        positive, negative = RELATIVE_FORMS[self.form](kappa)
        return abs(self.scale) * (abs(positive) + abs(negative))


class CLIPReward(CosineReward):
    """A transformers `CLIPModel` directory: CLIP, PickScore, the tiny reward.

    Args:
        path: directory with the model. processor: directory with tokenizer and image processor, if not `path`.
        logit_scale: multiply the cosine by the model's exp(logit_scale).
        divisor: divide it by this.
        device, dtype, form, text_cache: as for `CosineReward`. The text tower is fp32.

    Raises `InputError` when files are missing.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        processor: str | Path | None = None,
        device: str | torch.device = "cpu",
        logit_scale: bool = False,
        divisor: float = 1.0,
        form: str = "official",
        dtype: torch.dtype = torch.float32,
        text_cache: str | Path | None = None,
    ) -> None:
        from transformers import CLIPImageProcessor, CLIPModel, CLIPTokenizer
        from transformers.activations import QuickGELUActivation

        path, processor = Path(path), Path(processor or path)
        for file in (path / "config.json", processor / "preprocessor_config.json", processor / "tokenizer_config.json"):
            if not file.is_file():
                raise InputError(f"reward directory {path} is incomplete: {file} is missing")
        if not has_vocabulary(processor):
            raise InputError(f"reward directory {path} is incomplete: {processor / 'tokenizer.json'} is missing")
        self.model = load_transformers(CLIPModel, path)
        vision = (self.model.vision_model, self.model.visual_projection)
        freeze(self.model, vision, dtype, activation=QuickGELUActivation)
        self.model.to(device)
        self.tokenizer = CLIPTokenizer.from_pretrained(processor, local_files_only=True)
        images = CLIPImageProcessor.from_pretrained(processor, local_files_only=True)
        self.image_size = images.size["shortest_edge"]
        self.image_mean, self.image_std = images.image_mean, images.image_std
        scale = self.model.logit_scale.exp().item() if logit_scale else 1.0
        super().__init__(form=form, scale=scale / divisor, device=device, dtype=dtype, text_cache=text_cache)

    def preprocess(self, images: Tensor) -> Tensor:
        return clip_normalize(images, self.image_size, self.image_mean, self.image_std)

    def _image_features(self, pixels: Tensor) -> Tensor:
        return self.model.get_image_features(pixel_values=pixels).pooler_output

    def _tokens(self, prompt: str) -> dict[str, Tensor]:
        return dict(self.tokenizer(prompt, padding="max_length", truncation=True, return_tensors="pt"))

    def _text_features(self, tokens: Mapping[str, Tensor]) -> Tensor:
        return self.model.get_text_features(**tokens).pooler_output

    def _text_tower(self) -> tuple[dict[str, Tensor], str]:
        weights = {name: tensor for name, tensor in self.model.state_dict().items() if self._reads_text(name)}
        return weights, self.model.config.text_config.to_json_string()

    def _reads_text(self, name: str) -> bool:
        return name.startswith("text_")


class OpenCLIPReward(CosineReward):
    """Any open_clip model, from a checkpoint file: HPSv2.1 (``HPS_v2.1_compressed.pt``, ViT-H-14), SigLIP, and so on.

    Args:
        path: checkpoint file, loaded strictly and without unpickling code. architecture: open_clip model name.
        processor: directory of the tokenizer; for models whose tokenizer does not come with open_clip.
        tag: open_clip's name of the weights that the checkpoint is or was trained from, which decides about
            preprocessing. None: that of all registered weights of the architecture if they agree (SigLIP squashes and
            has statistics of its own), and otherwise OpenAI's.
        logit_scale, divisor and all others: as for `CLIPReward`.

    Raises `InputError` when a file is missing or does not fit the architecture.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        architecture: str = "ViT-H-14",
        processor: str | Path | None = None,
        tag: str | None = None,
        device: str | torch.device = "cpu",
        logit_scale: bool = False,
        divisor: float = 1.0,
        form: str = "official",
        dtype: torch.dtype = torch.float32,
        text_cache: str | Path | None = None,
    ) -> None:
        import open_clip
        from open_clip.transformer import QuickGELU

        self.model = load_open_clip(path, architecture, device)
        freeze(self.model, (self.model.visual,), dtype, activation=QuickGELU)
        self.architecture: dict[str, Any] = open_clip.get_model_config(architecture)
        self.tokenizer = _open_clip_tokenizer(architecture, self.architecture["text_cfg"], processor)
        size = self.model.visual.image_size
        self.image_size = size if isinstance(size, int) else size[0]
        registered = _preprocessing(architecture, tag)
        self.image_mean = registered.get("mean", self.model.visual.image_mean)
        self.image_std = registered.get("std", self.model.visual.image_std)
        self.resize: dict[str, Any] = dict(
            squash=registered.get("resize_mode", "shortest") == "squash",
            interpolation=registered.get("interpolation", "bicubic"),
        )
        scale = self.model.logit_scale.exp().item() if logit_scale else 1.0
        super().__init__(form=form, scale=scale / divisor, device=device, dtype=dtype, text_cache=text_cache)

    def preprocess(self, images: Tensor) -> Tensor:
        return prepare(images, self.image_size, self.image_mean, self.image_std, **self.resize)

    def _image_features(self, pixels: Tensor) -> Tensor:
        return self.model.encode_image(pixels)

    def _tokens(self, prompt: str) -> dict[str, Tensor]:
        return {"text": self.tokenizer([prompt])}

    def _text_features(self, tokens: Mapping[str, Tensor]) -> Tensor:
        return self.model.encode_text(tokens["text"])

    def _text_tower(self) -> tuple[dict[str, Tensor], str]:
        weights = {name: tensor for name, tensor in self.model.state_dict().items() if self._reads_text(name)}
        return weights, json.dumps(self.architecture, sort_keys=True)

    def _reads_text(self, name: str) -> bool:
        return not name.startswith("visual.")


def _open_clip_tokenizer(architecture: str, text: Mapping[str, Any], processor: str | Path | None) -> Any:
    import open_clip

    hub = text.get("hf_tokenizer_name")
    if not hub:
        return open_clip.get_tokenizer(architecture)
    if processor is None:
        raise InputError(
            f"reward.processor is needed for architecture {architecture}: the directory of its tokenizer ({hub})"
        )
    if not has_vocabulary(Path(processor)):
        raise InputError(f"reward.processor {processor} holds no tokenizer (of {hub}): tokenizer.json is missing")
    length = text.get("context_length", open_clip.tokenizer.DEFAULT_CONTEXT_LENGTH)
    options = dict(text.get("tokenizer_kwargs", {}))
    return open_clip.tokenizer.HFTokenizer(str(processor), context_length=length, **options)


def _preprocessing(architecture: str, tag: str | None) -> dict[str, Any]:
    """What open_clip registers of the preprocessing: mean, std, interpolation and resize_mode, where known."""
    import open_clip

    tags = open_clip.list_pretrained_tags_by_model(architecture)
    if tag is not None and tag not in tags:
        raise InputError(f"reward.tag {tag!r} is no open_clip weights of {architecture}; there are {', '.join(tags)}")
    keys = ("mean", "std", "interpolation", "resize_mode")
    found: list[dict[str, Any]] = []
    for name in tags if tag is None else [tag]:
        registered = open_clip.get_pretrained_cfg(architecture, name)
        entry = {key: registered[key] for key in keys if registered.get(key)}
        if entry not in found:
            found.append(entry)
    return found[0] if len(found) == 1 else {}
