"""Aesthetic predictors: an affine map of a normalised image embedding. They read no prompt.

* LAION improved aesthetic predictor v2 (``sac+logos+ava1-l14-linearMSE.pth``, Apache-2.0;
  github.com/christophschuhmann/improved-aesthetic-predictor): five linear layers, no activation, on CLIP ViT-L/14.
* Aesthetic predictor v2.5 (``aesthetic_predictor_v2_5.pth``; github.com/discus0434/aesthetic-predictor-v2-5): five
  linear layers on SigLIP so400m-patch14-384. Its published weights and code are under the AGPL-3.0; nothing of either
  is part of this package, which only knows the layers' names and sizes.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

from srpo.errors import InputError
from srpo.rewards.base import ImageOnlyReward
from srpo.rewards.preprocess import CLIP_MEAN, CLIP_STD, prepare
from srpo.rewards.towers import freeze, load_open_clip, load_transformers
from srpo.rewards.weights import check_state, read_state

__all__ = ["LAION_LAYERS", "SIGLIP_LAYERS", "AestheticReward", "SiglipAestheticReward", "affine_head"]

#: Names of the linear layers; the places between them are dropout.
LAION_LAYERS = tuple(f"layers.{place}" for place in (0, 2, 4, 6, 7))
SIGLIP_LAYERS = tuple(f"scoring_head.{place}" for place in (0, 2, 4, 6, 8))
#: What the linear layers put out.
_WIDTHS = (1024, 128, 64, 16, 1)


def affine_head(state: Mapping[str, Tensor], layers: Sequence[str], width: int, what: str) -> tuple[Tensor, Tensor]:
    """The one affine map that a stack of linear layers is: weight [width] and bias [], float64.

    Args:
        state: ``LAYER.weight`` and ``LAYER.bias`` of all `layers` and nothing else, of widths
            width-1024-128-64-16-1.

    Raises `InputError`, starting with `what`, when names or shapes differ.
    """
    expected: dict[str, Tensor] = {}
    inputs = (width, *_WIDTHS)
    for layer, size, out in zip(layers, inputs, _WIDTHS, strict=False):
        expected[f"{layer}.weight"] = torch.empty(out, size, device="meta")
        expected[f"{layer}.bias"] = torch.empty(out, device="meta")
    check_state(expected, state, f"{what}, on embeddings of {width},")
    weight, bias = torch.eye(width, dtype=torch.float64), torch.zeros(width, dtype=torch.float64)
    for layer in layers:
        matrix = state[f"{layer}.weight"].double()
        weight, bias = matrix @ weight, matrix @ bias + state[f"{layer}.bias"].double()
    return weight[0], bias[0]


class _AestheticReward(ImageOnlyReward):
    """``(weight . embedding / |embedding| + bias) / divisor``.

    Args:
        head: weights of `affine_head`. divisor: divide the score by this.
        device: of the tower. dtype: of its weights and activations.
    """

    image_size: int
    layers: Sequence[str]

    def __init__(self, head: Path, width: int, device: str | torch.device, dtype: torch.dtype, divisor: float) -> None:
        name = "reward head"
        weight, bias = affine_head(read_state(head, name), self.layers, width, f"{name} {head}")
        self.weight, self.bias = (part.to(device) / divisor for part in (weight, bias))
        self.device, self.dtype = device, dtype

    @abstractmethod
    def preprocess(self, images: Tensor) -> Tensor:
        """Images [N, 3, H, W] in [0, 1] to the tower's input [N, 3, S, S]."""

    @abstractmethod
    def _image_features(self, pixels: Tensor) -> Tensor:
        """Embeddings [N, D] of preprocessed images, all in the tower's dtype."""

    def score(self, images: Tensor, prompts: list[str]) -> Tensor:
        del prompts
        features = self._image_features(self.preprocess(images).to(self.dtype))
        features = normalize(features.to(torch.promote_types(features.dtype, torch.float32)), dim=-1)
        return features @ self.weight.to(features.dtype) + self.bias.to(features.dtype)

    def limit(self, kappa: float) -> float:
        """Of the difference between two images' scores: embeddings have length 1."""
        del kappa
        return 2 * self.weight.norm().item()


class AestheticReward(_AestheticReward):
    """LAION's improved aesthetic predictor v2, on a CLIP ViT-L/14 image tower; scores from 1 to 10.

    Images are resized and cropped as torchvision does it and normalised by OpenAI's statistics, whatever the tower's
    files say: this is what the predictor was trained on.

    Args:
        tower: a transformers `CLIPModel` directory, or an open_clip checkpoint file of `architecture` (OpenAI's
            weights: ViT-L-14-quickgelu). head: file of the predictor.
        device, dtype, divisor: of the tower, and what divides scores.

    Raises `InputError` when a file is missing or does not fit.
    """

    layers = LAION_LAYERS

    def __init__(
        self,
        tower: str | Path,
        head: str | Path,
        *,
        architecture: str = "ViT-L-14-quickgelu",
        device: str | torch.device = "cpu",
        dtype: torch.dtype = torch.float32,
        divisor: float = 1.0,
    ) -> None:
        tower = Path(tower)
        if not tower.exists():
            raise InputError(f"reward.path {tower} does not exist: neither a CLIPModel directory nor a checkpoint file")
        width = self._load_directory(tower, dtype) if tower.is_dir() else self._load_file(tower, architecture, dtype)
        self.model.to(device)
        super().__init__(Path(head), width, device, dtype, divisor)

    def _load_directory(self, tower: Path, dtype: torch.dtype) -> int:
        from transformers import CLIPModel
        from transformers.activations import QuickGELUActivation

        whole: Any = load_transformers(CLIPModel, tower)
        del whole.text_model, whole.text_projection
        freeze(whole, (whole,), dtype, activation=QuickGELUActivation)
        self.model, self.image_size = whole, whole.config.vision_config.image_size
        return whole.config.projection_dim

    def _load_file(self, tower: Path, architecture: str, dtype: torch.dtype) -> int:
        import open_clip
        from open_clip.transformer import QuickGELU

        self.model = load_open_clip(tower, architecture, "cpu").visual
        freeze(self.model, (self.model,), dtype, activation=QuickGELU)
        size = self.model.image_size
        self.image_size = size if isinstance(size, int) else size[0]
        return open_clip.get_model_config(architecture)["embed_dim"]

    def preprocess(self, images: Tensor) -> Tensor:
        return prepare(images, self.image_size, CLIP_MEAN, CLIP_STD)

    def _image_features(self, pixels: Tensor) -> Tensor:
        from transformers import CLIPModel

        if isinstance(self.model, CLIPModel):
            return self.model.get_image_features(pixel_values=pixels).pooler_output
        return self.model(pixels)


class SiglipAestheticReward(_AestheticReward):
    """Aesthetic predictor v2.5, on the pooled output of a SigLIP image tower; scores from 1 to 10, above 5.5 is good.

    Images are squashed to the tower's size, bicubic, and normalised by mean and standard deviation 0.5, as SigLIP's
    own processor does it.

    Args:
        tower: a transformers `SiglipModel` or `SiglipVisionModel` directory. head: file of the predictor (AGPL-3.0).
        device, dtype, divisor: as for `AestheticReward`.

    Raises `InputError` when a file is missing or does not fit.
    """

    layers = SIGLIP_LAYERS

    def __init__(
        self,
        tower: str | Path,
        head: str | Path,
        *,
        device: str | torch.device = "cpu",
        dtype: torch.dtype = torch.float32,
        divisor: float = 1.0,
    ) -> None:
        from transformers import SiglipVisionModel
        from transformers.activations import QuickGELUActivation

        others = ("text_model.", "logit_scale", "logit_bias")
        self.model: Any = load_transformers(SiglipVisionModel, Path(tower), others)
        freeze(self.model, (self.model,), dtype, activation=QuickGELUActivation)
        self.model.to(device)
        self.image_size = self.model.config.image_size
        super().__init__(Path(head), self.model.config.hidden_size, device, dtype, divisor)

    def preprocess(self, images: Tensor) -> Tensor:
        return prepare(images, self.image_size, (0.5,) * 3, (0.5,) * 3, squash=True)

    def _image_features(self, pixels: Tensor) -> Tensor:
        return self.model(pixel_values=pixels).pooler_output
