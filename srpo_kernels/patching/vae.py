"""diffusers' `AutoencoderKL` on this package's operators: channels_last throughout, keeping only what backward needs.

Weights count as constants where they need no gradient, as in `srpo`; where they do, convolutions are PyTorch's own.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from types import SimpleNamespace
from typing import Any

import torch
from diffusers.models.attention_processor import Attention, AttnProcessor2_0
from diffusers.models.autoencoders.vae import Decoder, Encoder
from diffusers.models.resnet import ResnetBlock2D
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from srpo_kernels.patching.eager import choose
from srpo_kernels.patching.frozen_conv import frozen_conv2d
from srpo_kernels.patching.handle import Rule, hooked

__all__ = ["rules"]


def rules(selected: Collection[str]) -> list[Rule]:
    """Rules for the modules that use any of the `selected` operators."""
    ops = choose(selected)
    made = [
        Rule(
            Decoder,
            _decoder(ops),
            ("group_norm_silu",),
            {Decoder.forward: {"910d774b9b"}},
            _refuse_coder,
        ),
        Rule(
            Encoder,
            _encoder(ops),
            ("group_norm_silu",),
            {Encoder.forward: {"8a75c50a49"}},
            _refuse_coder,
        ),
        Rule(
            ResnetBlock2D,
            _resnet(ops),
            ("group_norm_silu",),
            {ResnetBlock2D.forward: {"b1e19b9131", "bf042f9657"}},
            _refuse_resnet,
            within=(Decoder, Encoder),
        ),
        Rule(
            Attention,
            _attention(ops),
            ("group_norm_silu",),
            {AttnProcessor2_0.__call__: {"c93d8cdc60"}},
            _refuse_attention,
            within=(Decoder, Encoder),
        ),
        Rule(
            nn.Conv2d,
            _conv,
            ("frozen_conv",),
            {},
            _refuse_conv,
            within=(Decoder, Encoder),
        ),
    ]
    return [rule for rule in made if set(rule.uses) & set(selected)]


# --- why an instance is left alone ------------------------------------------------------------


def _refuse_norm(norm: Any, name: str) -> str | None:
    if not isinstance(norm, nn.GroupNorm) or not norm.affine:
        return f"{name} is not a GroupNorm with weights"
    return hooked(norm, name)


def _refuse_coder(module: Any) -> str | None:
    if not isinstance(module.conv_act, nn.SiLU):
        return "its activation is not SiLU"
    return _refuse_norm(module.conv_norm_out, "conv_norm_out") or hooked(module.conv_act, "conv_act")


def _refuse_resnet(module: Any) -> str | None:
    if module.upsample is not None or module.downsample is not None or module.time_emb_proj is not None:
        return "it resamples, or takes a time embedding"
    if not isinstance(module.nonlinearity, nn.SiLU) or module.dropout.p:
        return "its activation is not SiLU, or it drops out"
    return _refuse_norm(module.norm1, "norm1") or _refuse_norm(module.norm2, "norm2")


def _refuse_conv(module: Any) -> str | None:
    plain = module.padding_mode == "zeros" and not isinstance(module.padding, str)
    return None if plain else "its padding is not a number of zeros"


def _refuse_attention(module: Any) -> str | None:
    if type(module.processor) is not AttnProcessor2_0:
        return f"its processor is a {type(module.processor).__name__}, not AttnProcessor2_0"
    if module.spatial_norm is not None or module.norm_q is not None or module.norm_k is not None:
        return "it has norms other than a GroupNorm"
    return _refuse_norm(module.group_norm, "group_norm")


# --- forwards ---------------------------------------------------------------------------------


def _norm(ops: SimpleNamespace, norm: Any, x: Tensor, activation: bool = True) -> Tensor:
    return ops.group_norm_silu(x, norm.weight, norm.bias, norm.num_groups, norm.eps, activation)


def _code(ops: SimpleNamespace, self: Any, sample: Tensor, stages: list[Any]) -> Tensor:
    """A whole encoder or decoder, whose middle `stages` are."""
    sample = self.conv_in(sample.contiguous(memory_format=torch.channels_last))
    for stage in stages:
        if self.gradient_checkpointing and torch.is_grad_enabled():
            sample = self._gradient_checkpointing_func(stage, sample)
        else:
            sample = stage(sample)
    return self.conv_out(_norm(ops, self.conv_norm_out, sample))


def _decoder(ops: SimpleNamespace) -> Callable:
    def forward(self: Any, sample: Tensor, latent_embeds: Tensor | None = None) -> Tensor:
        if latent_embeds is not None:
            return Decoder.forward(self, sample, latent_embeds)
        return _code(ops, self, sample, [self.mid_block, *self.up_blocks])

    return forward


def _encoder(ops: SimpleNamespace) -> Callable:
    def forward(self: Any, sample: Tensor) -> Tensor:
        return _code(ops, self, sample, [*self.down_blocks, self.mid_block])

    return forward


def _resnet(ops: SimpleNamespace) -> Callable:
    def forward(self: Any, input_tensor: Tensor, temb: Tensor | None = None, *args: Any, **kwargs: Any) -> Tensor:
        if temb is not None or args or kwargs:
            return ResnetBlock2D.forward(self, input_tensor, temb, *args, **kwargs)
        hidden = self.conv1(_norm(ops, self.norm1, input_tensor))
        hidden = self.conv2(_norm(ops, self.norm2, hidden))
        shortcut = input_tensor if self.conv_shortcut is None else self.conv_shortcut(input_tensor)
        return _rescale(shortcut + hidden, self.output_scale_factor)

    return forward


def _rescale(x: Tensor, factor: float) -> Tensor:
    return x if factor == 1 else x / factor


def _attention(ops: SimpleNamespace) -> Callable:
    def forward(
        self: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor:
        plain = encoder_hidden_states is None and attention_mask is None and temb is None and not kwargs
        if not plain or hidden_states.ndim != 4 or type(self.processor) is not AttnProcessor2_0:
            return Attention.forward(
                self, hidden_states, encoder_hidden_states, attention_mask, temb=temb, **kwargs
            )  # fmt: skip
        normed = _norm(ops, self.group_norm, hidden_states, activation=False).permute(0, 2, 3, 1)
        batch, height, width, channels = normed.shape
        tokens = normed.reshape(batch, height * width, channels)  # a view of a channels_last image
        q, k, v = (
            project(tokens).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for project in (self.to_q, self.to_k, self.to_v)
        )
        out = scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        out = self.to_out[1](self.to_out[0](out)).reshape(batch, height, width, channels).permute(0, 3, 1, 2)
        return _rescale(out + hidden_states if self.residual_connection else out, self.rescale_output_factor)

    return forward


def _conv(self: Any, input: Tensor) -> Tensor:  # noqa: A002
    constant = not self.weight.requires_grad and (self.bias is None or not self.bias.requires_grad)
    kind = input.device.type
    autocast = torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
    if not constant or not torch.is_grad_enabled() or autocast:
        return nn.Conv2d.forward(self, input)
    return frozen_conv2d(input, self.weight, self.bias, self.stride, self.padding, self.dilation, self.groups)


_conv.__name__ = "forward"  # by which a pickle finds the class's own
