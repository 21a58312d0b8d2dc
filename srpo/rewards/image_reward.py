"""ImageReward (github.com/THUDM/ImageReward, Apache-2.0): BLIP-L whose text tower looks at the image, and a head.

``ImageReward.pt`` is read into transformers' BLIP. Its names, on the left, and transformers', on the right:

    blip.visual_encoder.cls_token, pos_embed     embeddings.class_embedding, position_embedding
    blip.visual_encoder.patch_embed.proj         embeddings.patch_embedding
    blip.visual_encoder.blocks.N.norm1, norm2    encoder.layers.N.layer_norm1, layer_norm2
    blip.visual_encoder.blocks.N.attn.qkv, proj  encoder.layers.N.self_attn.qkv, projection
    blip.visual_encoder.blocks.N.mlp             encoder.layers.N.mlp
    blip.visual_encoder.norm                     post_layernorm
    blip.text_encoder.*                          the same
    mlp.layers.*                                 (`affine_head`)

Left out are ``blip.vision_proj`` and ``blip.text_proj``, which the score does not use, and the buffer
``position_ids``. All sizes are the file's; heads are 64 wide, as in both towers of BLIP-L.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from srpo.errors import InputError
from srpo.rewards.aesthetic import LAION_LAYERS, affine_head
from srpo.rewards.base import Reward
from srpo.rewards.preprocess import CLIP_MEAN, CLIP_STD, prepare
from srpo.rewards.towers import freeze
from srpo.rewards.weights import check_state, read_state
from srpo_kernels import RELATIVE_FORMS

__all__ = ["MEAN", "STD", "TOKENS", "ImageReward"]

#: Of the head's output over the training set: a score is (output - MEAN) / STD.
MEAN, STD = 0.16717362830052426, 1.0333394966054072
#: Prompts are cut and padded to this.
TOKENS = 35
_HEAD_WIDTH = 64
_VISION, _TEXT, _MLP = "blip.visual_encoder.", "blip.text_encoder.", "mlp."
_UNUSED = re.compile(r"blip\.(vision|text)_proj\.|.*\.position_ids$")
#: Parts of transformers' names of the vision tower, and what stands for them in the file.
_NAMES = {
    "embeddings.class_embedding": "cls_token",
    "embeddings.position_embedding": "pos_embed",
    "embeddings.patch_embedding": "patch_embed.proj",
    "encoder.layers.": "blocks.",
    "layer_norm": "norm",
    "self_attn.projection": "attn.proj",
    "self_attn.qkv": "attn.qkv",
    "post_layernorm": "norm",
}


class ImageReward(Reward):
    """Scores from about -2 to 2. The relative forms weigh the scores for two prompts as `srpo_kernels` does cosines.

    Images are resized (bicubic, shorter edge) and cropped as torchvision does it and normalised by OpenAI's statistics;
    prompts go through BERT's uncased tokenizer. The text tower runs for every image, so that nothing of a prompt can be
    kept.

    Args:
        path: ``ImageReward.pt``, or what `srpo rewards convert` made of it. processor: directory of the tokenizer
            (bert-base-uncased).
        form: "official", "difference" or "cfg". divisor: divide scores by this.
        device, dtype: of the vision tower; the text tower is fp32.

    Raises `InputError` when a file is missing or does not fit.
    """

    def __init__(
        self,
        path: str | Path,
        processor: str | Path,
        *,
        form: str = "official",
        device: str | torch.device = "cpu",
        dtype: torch.dtype = torch.float32,
        divisor: float = 1.0,
    ) -> None:
        from transformers.activations import QuickGELUActivation

        name = f"reward checkpoint {path}"
        state = {key: value for key, value in read_state(path, "reward checkpoint").items() if not _UNUSED.match(key)}
        heads = {key.removeprefix(_MLP): state.pop(key) for key in sorted(state) if key.startswith(_MLP)}
        self.vision, self.text = _vision_tower(state, name), _text_tower(state, name)
        self.tokenizer = _tokenizer(Path(processor), self.text.config.vocab_size)
        _fit(self.vision, self.text, state, name)
        weight, bias = affine_head(heads, LAION_LAYERS, self.text.config.hidden_size, f"{name}, mlp")
        self.weight, self.bias = (weight / STD / divisor).to(device), ((bias - MEAN) / STD / divisor).to(device)
        self.form, self.device, self.dtype = form, device, dtype
        self.text_dtype = torch.promote_types(dtype, torch.float32)
        for tower, kind in ((self.vision, dtype), (self.text, self.text_dtype)):
            freeze(tower, (tower,), kind, activation=QuickGELUActivation)
            tower.to(device)

    def preprocess(self, images: Tensor) -> Tensor:
        """Images [N, 3, H, W] in [0, 1] to the tower's input [N, 3, S, S]."""
        return prepare(images, self.vision.config.image_size, CLIP_MEAN, CLIP_STD)

    def embed_images(self, images: Tensor) -> Tensor:
        """What the text tower sees of images: [N, 1 + patches, D], differentiable."""
        return self.vision(pixel_values=self.preprocess(images).to(self.dtype)).last_hidden_state.to(self.text_dtype)

    def score(self, images: Tensor, prompts: list[str]) -> Tensor:
        return self._score(self.embed_images(images), prompts)

    def relative(self, images: Tensor, positive: list[str], negative: list[str], kappa: Tensor) -> Tensor:
        """Relative scores [N]: the form's weights of kappa times the scores for both prompts; one vision pass."""
        weights = RELATIVE_FORMS[self.form](kappa.to(self.device))
        seen = self.embed_images(images)
        return sum(w * self._score(seen, texts) for w, texts in zip(weights, (positive, negative), strict=True))

    def _score(self, seen: Tensor, prompts: list[str]) -> Tensor:
        tokens = self.tokenizer(
            list(prompts), padding="max_length", truncation=True, max_length=TOKENS, return_tensors="pt"
        ).to(self.device)
        states = self.text(
            input_ids=tokens["input_ids"], attention_mask=tokens["attention_mask"], encoder_hidden_states=seen
        ).last_hidden_state
        return states[:, 0] @ self.weight.to(states.dtype) + self.bias.to(states.dtype)

    def limit(self, kappa: float) -> float:
        """From the last LayerNorm: before its weight and bias, a state of width D has mean 0 and length sqrt(D)."""
        norm = self.text.encoder.layer[-1].output.LayerNorm
        spread = self.weight * norm.weight.double()
        reach = (spread - spread.mean()).norm().item() * math.sqrt(len(spread))
        middle = (self.weight @ norm.bias.double() + self.bias).item()
        positive, negative = RELATIVE_FORMS[self.form](kappa)
        return (abs(positive) + abs(negative)) * reach + abs(positive + negative) * abs(middle)


def _vision_tower(state: Mapping[str, Tensor], what: str) -> Any:
    from transformers import BlipVisionConfig, BlipVisionModel

    _, length, width = _shape(state, f"{_VISION}pos_embed", 3, what)
    patch = _shape(state, f"{_VISION}patch_embed.proj.weight", 4, what)[-1]
    config = BlipVisionConfig(
        hidden_size=width,
        intermediate_size=_shape(state, f"{_VISION}blocks.0.mlp.fc1.weight", 2, what)[0],
        num_hidden_layers=_layers(state, rf"{re.escape(_VISION)}blocks\.(\d+)\."),
        num_attention_heads=max(1, width // _HEAD_WIDTH),
        image_size=math.isqrt(length - 1) * patch,
        patch_size=patch,
        layer_norm_eps=1e-6,
    )
    return BlipVisionModel(config)


def _text_tower(state: Mapping[str, Tensor], what: str) -> Any:
    from transformers import BlipTextConfig, BlipTextModel

    words, width = _shape(state, f"{_TEXT}embeddings.word_embeddings.weight", 2, what)
    layer = f"{_TEXT}encoder.layer.0."
    config = BlipTextConfig(
        vocab_size=words,
        hidden_size=width,
        encoder_hidden_size=_shape(state, f"{layer}crossattention.self.key.weight", 2, what)[1],
        intermediate_size=_shape(state, f"{layer}intermediate.dense.weight", 2, what)[0],
        num_hidden_layers=_layers(state, rf"{re.escape(_TEXT)}encoder\.layer\.(\d+)\."),
        num_attention_heads=max(1, width // _HEAD_WIDTH),
        max_position_embeddings=_shape(state, f"{_TEXT}embeddings.position_embeddings.weight", 2, what)[0],
        bos_token_id=None,
        eos_token_id=None,
        sep_token_id=None,
        is_decoder=True,  # for its cross-attention; the mask is bidirectional
    )
    return BlipTextModel(config, add_pooling_layer=False)


def _shape(state: Mapping[str, Tensor], key: str, dimensions: int, what: str) -> tuple[int, ...]:
    if key not in state:
        raise InputError(f"{what} does not fit: missing {key}")
    if state[key].ndim != dimensions:
        raise InputError(f"{what} does not fit: {key} is {list(state[key].shape)} instead of {dimensions}-dimensional")
    return tuple(state[key].shape)


def _layers(state: Mapping[str, Tensor], pattern: str) -> int:
    return 1 + max(int(found[1]) for key in state if (found := re.match(pattern, key)))


def _fit(vision: nn.Module, text: nn.Module, state: Mapping[str, Tensor], what: str) -> None:
    places = {_vision_name(key): value for key, value in vision.state_dict().items()}
    places |= {f"{_TEXT}{key}": value for key, value in text.state_dict().items()}
    check_state(places, state, what)
    with torch.no_grad():
        for key, place in places.items():
            place.copy_(state[key])


def _vision_name(key: str) -> str:
    for theirs, ours in _NAMES.items():
        key = key.replace(theirs, ours)
    return f"{_VISION}{key}"


def _tokenizer(directory: Path, words: int) -> Any:
    from transformers import BertTokenizer

    if not any((directory / name).is_file() for name in ("tokenizer.json", "vocab.txt")):
        raise InputError(f"reward.processor {directory} holds no BERT tokenizer: vocab.txt is missing")
    tokenizer = BertTokenizer.from_pretrained(directory, local_files_only=True)
    if len(tokenizer) > words:
        raise InputError(f"reward.processor {directory} has {len(tokenizer)} tokens, the checkpoint embeds {words}")
    return tokenizer
