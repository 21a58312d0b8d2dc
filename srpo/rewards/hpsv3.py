"""HPSv3 (github.com/MizzenAI/HPSv3; code MIT, weights Apache-2.0): Qwen2-VL-7B reads an image and a question about it,
and a small head turns the state of one token into a mean and a deviation. The mean is the score.

Attention is causal. So the sequence ends with the token that is scored, and the two questions of a relative score,
which differ in their prompt only, share all that comes before it: image and instructions are read once.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.linalg import matrix_norm

from srpo.errors import InputError
from srpo.files import has_vocabulary
from srpo.rewards.base import Reward
from srpo.rewards.hpsv3_prompt import IMAGE, REWARD, question
from srpo.rewards.preprocess import CLIP_MEAN, CLIP_STD, stretch
from srpo.rewards.towers import freeze
from srpo.rewards.weights import check_state, fit, read_state
from srpo_kernels import RELATIVE_FORMS

__all__ = ["PIXELS", "HPSv3Reward", "head"]

#: Images are resized to about as many pixels: 448 x 448 when they are square.
PIXELS = 256 * 28 * 28
_HEAD, _EMBEDDING = "rm_head.", "language_model.embed_tokens.weight"


class HPSv3Reward(Reward):
    """Scores around 0 for poor images and above 10 for good ones. The relative forms weigh the scores for two prompts
    as `srpo_kernels` does cosines.

    Images are resized (bicubic, antialiased) to sides that are multiples of 28, near their own proportions, as PIL does
    it in the published scorer. Its own differentiable processor resizes bilinearly without antialiasing, and takes a
    batch of images for frames of one video: neither is done here.

    Args:
        path: ``HPSv3.safetensors``. processor: directory with configuration and tokenizer of Qwen2-VL-7B-Instruct.
        form: "official", "difference" or "cfg". divisor: divide scores by this.
        device, dtype: of Qwen2-VL, both towers; the head is fp32.

    On a GPU, norms and MLPs are liger-kernel's where it is installed. Raises `InputError` when a file is missing or
    does not fit.
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
        state = {_name(key): value for key, value in read_state(path, "reward checkpoint").items()}
        state.pop("lm_head.weight", None)  # it scores no words
        mlp = {key.removeprefix(_HEAD): state.pop(key) for key in list(state) if key.startswith(_HEAD)}
        self.model = _qwen(state, Path(processor), dtype, name)
        self.head = head(self.model.config.text_config.hidden_size)
        fit(self.head, mlp, f"{name}, rm_head")
        self.tokenizer = _tokenizer(Path(processor), self.model.config.text_config.vocab_size)
        self.form, self.device, self.dtype, self.divisor = form, device, dtype, divisor
        freeze(self.model, (), dtype, activation=QuickGELUActivation)  # of `dtype` already, but for rotary frequencies
        freeze(self.head, (self.head,), torch.promote_types(dtype, torch.float32), activation=QuickGELUActivation)
        self.model.to(device)
        self.head.to(device)
        if torch.device(device).type == "cuda":
            _apply_liger(self.model)
        self._tokens = lru_cache(maxsize=65536)(self._tokens)  # type: ignore[method-assign]

    def preprocess(self, images: Tensor) -> Tensor:
        """Images [N, 3, H, W] in [0, 1] to [N, 3, H', W'] of about `PIXELS`; differentiable."""
        from transformers.models.qwen2_vl.image_processing_qwen2_vl import smart_resize

        try:
            size = smart_resize(*images.shape[-2:], factor=28, min_pixels=PIXELS, max_pixels=PIXELS)
        except ValueError as error:
            raise InputError(
                f"an image of {images.shape[-1]} x {images.shape[-2]} px cannot be scored: {error}"
            ) from None
        return stretch(images, size, CLIP_MEAN, CLIP_STD)

    def embed_images(self, images: Tensor) -> Tensor:
        """What the language model sees of images: [N, H' / 28, W' / 28, D], differentiable."""
        pixels = self.preprocess(images).to(self.dtype)
        patches, (height, width) = _patches(pixels, self.model.config.vision_config)
        grid = torch.tensor([[1, height, width]] * len(images), device=pixels.device)
        seen = self.model.get_image_features(patches.flatten(0, 1), grid).pooler_output
        merged = self.model.config.vision_config.spatial_merge_size
        return torch.stack(list(seen)).unflatten(1, (height // merged, width // merged))

    def embed_prompts(self, prompts: Sequence[str]) -> None:
        """Tokens of prompts, kept. Nothing else of a prompt can be: it is read after the image."""
        for prompt in prompts:
            self._tokens(prompt)

    def score(self, images: Tensor, prompts: list[str]) -> Tensor:
        return self._scores(images, prompts)[:, 0]

    def relative(self, images: Tensor, positive: list[str], negative: list[str], kappa: Tensor) -> Tensor:
        """Relative scores [N]: the form's weights of kappa times the scores for both prompts, which one pass gives."""
        scores = self._scores(images, positive, negative)
        weights = RELATIVE_FORMS[self.form](kappa.to(scores.device))
        return sum(weight * score for weight, score in zip(weights, scores.unbind(1), strict=True))

    def limit(self, kappa: float) -> float:
        """From the last norm: before its weight, a state of width D has length sqrt(D), and the head's layers stretch
        by no more than their largest singular values."""
        layers = [layer for layer in self.head if isinstance(layer, nn.Linear)]
        (first, *_), (second, _), (last, _) = weights = [(each.weight.double(), each.bias.double()) for each in layers]
        spread = first * self.model.language_model.norm.weight.double()
        reach = math.sqrt(spread.shape[1]) * matrix_norm(spread, 2) * matrix_norm(second, 2) * last[0].norm()
        middle = torch.zeros_like(spread[0])
        for weight, bias in weights:
            middle = weight @ middle.relu() + bias
        positive, negative = RELATIVE_FORMS[self.form](kappa)
        whole = (abs(positive) + abs(negative)) * reach + abs(positive + negative) * middle[0].abs()
        return whole.item() / abs(self.divisor)

    def _tokens(self, prompt: str) -> tuple[int, ...]:
        """The question's tokens, the last of which is scored."""
        tokens = self.tokenizer(question(prompt), add_special_tokens=False)["input_ids"]
        for special in (IMAGE, REWARD):
            if tokens.count(self.tokenizer.convert_tokens_to_ids(special)) != 1:
                raise InputError(f"a prompt for reward type hpsv3 must not hold {special}: {prompt!r}")
        return tuple(tokens)

    def _scores(self, images: Tensor, *prompts: Sequence[str]) -> Tensor:
        """Scores [N, K] of N images for K prompts each; one pass."""
        seen = self.embed_images(images)
        questions = [[self._tokens(prompt) for prompt in each] for each in zip(*prompts, strict=True)]
        place = questions[0][0].index(self.tokenizer.convert_tokens_to_ids(IMAGE))
        packed = [_pack(each, place, seen.shape[1], seen.shape[2]) for each in questions]
        # Behind the end of a row is nothing that any of its tokens sees.
        ids, branch, ends, positions = (
            nn.utils.rnn.pad_sequence(list(part), batch_first=True).to(seen.device)
            for part in zip(*packed, strict=True)
        )
        embedded = self.model.get_input_embeddings()(ids)
        image = seen.flatten(1, 2)
        embedded = torch.cat([embedded[:, :place], image.to(embedded.dtype), embedded[:, place + image.shape[1] :]], 1)
        states = self.model.language_model(
            inputs_embeds=embedded,
            position_ids=positions.permute(2, 0, 1),
            attention_mask=None if len(prompts) == 1 else {"full_attention": _tree(branch)},
            use_cache=False,
        ).last_hidden_state
        scored = states.take_along_dim(ends[..., None], 1)
        return self.head(scored.to(self.head[0].weight.dtype))[..., 0] / self.divisor


def head(width: int) -> nn.Sequential:
    """RankNet's: mean and deviation of states of `width`."""
    return nn.Sequential(
        nn.Linear(width, 1024), nn.ReLU(), nn.Dropout(0.05), nn.Linear(1024, 16), nn.ReLU(), nn.Linear(16, 2)
    )


def _pack(questions: Sequence[tuple[int, ...]], place: int, height: int, width: int) -> tuple[Tensor, ...]:
    """Questions about one image of height x width tokens as one sequence: their common beginning, and every ending.

    Returns:
        Tokens [L]; branch [L]: 0 in the beginning, otherwise the number of the ending; where each question's last token
        is [K]; positions [L, 3], those of each question alone.
    """
    lines = [_line(torch.tensor(each), place, height, width) for each in questions]
    shortest = min(map(len, questions)) - 1  # each has an ending, even one that is another's beginning
    first = (at for at, tokens in enumerate(zip(*questions, strict=False)) if len(set(tokens)) > 1)
    common = min(next(first, shortest), shortest) + height * width - 1
    ids, positions = (
        torch.cat([parts[0][:common], *(part[common:] for part in parts)]) for parts in zip(*lines, strict=True)
    )
    lengths = torch.tensor([common, *(len(line) - common for line, _ in lines)])
    return ids, torch.arange(len(lengths)).repeat_interleave(lengths), lengths.cumsum(0)[1:] - 1, positions


def _line(tokens: Tensor, place: int, height: int, width: int) -> tuple[Tensor, Tensor]:
    """`tokens` [L] with the one at `place` repeated for every token of an image, and M-RoPE's positions [L', 3]: an
    image's are one time, its rows and its columns, and text goes on behind the largest of them."""
    ids = tokens.repeat_interleave(torch.ones_like(tokens).index_fill(0, torch.tensor(place), height * width))
    image = torch.cartesian_prod(torch.zeros(1, dtype=torch.long), torch.arange(height), torch.arange(width))
    before, behind = torch.arange(place), torch.arange(len(tokens) - place - 1) + max(height, width)
    return ids, place + torch.cat([(before - place)[:, None].expand(-1, 3), image, behind[:, None].expand(-1, 3)])


def _tree(branch: Tensor) -> Tensor:
    """Which tokens see which, [N, 1, L, L]: those before them, in the beginning and in their own branch."""
    same = (branch[:, None, :] == branch[:, :, None]) | (branch[:, None, :] == 0)
    return same.tril()[:, None]


def _patches(pixels: Tensor, config: Any) -> tuple[Tensor, tuple[int, int]]:
    """Patches [N, P, 3 * frames * size * size] of images [N, 3, H, W], each an unmoving film, and rows and columns of
    them. In the order of Qwen2-VL: those that will be merged to one token stand together."""
    size, merged = config.patch_size, config.spatial_merge_size
    height, width = (edge // size for edge in pixels.shape[-2:])
    parts = pixels.unflatten(2, (-1, merged, size)).unflatten(5, (-1, merged, size))  # N C h m s w m s
    parts = parts.permute(0, 2, 5, 3, 6, 1, 4, 7).flatten(1, 4)  # N P C s s
    film = parts[:, :, :, None].expand(-1, -1, -1, config.temporal_patch_size, -1, -1)
    return film.flatten(2), (height, width)


def _name(key: str) -> str:
    """transformers' name of a weight within `Qwen2VLModel`; files have it as transformers before 4.52 had, or after."""
    if key.startswith(("model.visual.", "model.language_model.")):
        return key.removeprefix("model.")
    return f"language_model.{key.removeprefix('model.')}" if key.startswith("model.") else key


def _qwen(state: Mapping[str, Tensor], directory: Path, dtype: torch.dtype, what: str) -> Any:
    from transformers import Qwen2VLConfig, Qwen2VLModel

    if not (directory / "config.json").is_file():
        raise InputError(f"reward.processor {directory} is incomplete: config.json of Qwen2-VL is missing")
    try:
        config = Qwen2VLConfig.from_pretrained(directory, local_files_only=True)
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise InputError(f"reward.processor {directory} does not configure a Qwen2-VL: {error}") from None
    if _EMBEDDING in state:  # one token more than Qwen2-VL has, and no room beyond
        config.text_config.vocab_size = len(state[_EMBEDDING])
    with torch.device("meta"):
        check_state(Qwen2VLModel(config).state_dict(), state, what)
    options: dict[str, Any] = dict(dtype=dtype, attn_implementation="sdpa")
    return Qwen2VLModel.from_pretrained(None, config=config, state_dict=dict(state), **options)


def _tokenizer(directory: Path, words: int) -> Any:
    from transformers import Qwen2Tokenizer

    if not has_vocabulary(directory):
        raise InputError(f"reward.processor {directory} holds no tokenizer: tokenizer.json is missing")
    tokenizer = Qwen2Tokenizer.from_pretrained(directory, local_files_only=True)
    tokenizer.add_tokens([REWARD], special_tokens=True)
    if IMAGE not in tokenizer.get_vocab() or len(tokenizer) != words:
        raise InputError(
            f"reward.processor {directory} is not the tokenizer of the checkpoint: with {REWARD} it has "
            f"{len(tokenizer)} tokens{'' if IMAGE in tokenizer.get_vocab() else f', none of them {IMAGE}'}; "
            f"the checkpoint embeds {words}"
        )
    return tokenizer


def _apply_liger(model: nn.Module) -> None:
    """liger-kernel's norms and MLPs in this model. It would rebind classes in transformers' module, for models made
    later, too: these are put back."""
    try:
        from liger_kernel.transformers import apply_liger_kernel_to_qwen2_vl
    except ImportError:
        return
    from transformers.models.qwen2_vl import modeling_qwen2_vl as module

    before = dict(vars(module))
    try:
        apply_liger_kernel_to_qwen2_vl(rope=False, fused_linear_cross_entropy=False, model=model)
    finally:
        vars(module).update(before)
