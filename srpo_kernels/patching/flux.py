"""FLUX of diffusers on this package's operators: a forward for every kind of module that has something to gain.

Each forward keeps the signature and the meaning of the one it stands in for, and hands over to it whatever it does not
cover (ControlNet residuals, IP-Adapter, LoRA scales, fused projections).
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import torch
from diffusers.models.activations import GELU
from diffusers.models.embeddings import apply_rotary_emb, get_1d_rotary_pos_embed
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from diffusers.models.normalization import AdaLayerNormContinuous, AdaLayerNormZero, AdaLayerNormZeroSingle
from diffusers.models.transformers import transformer_flux
from diffusers.models.transformers.transformer_flux import (
    FluxAttention,
    FluxAttnProcessor,
    FluxPosEmbed,
    FluxSingleTransformerBlock,
    FluxTransformer2DModel,
    FluxTransformerBlock,
)
from torch import Tensor, nn

import srpo_kernels as sk
from srpo_kernels.patching.attention import attend
from srpo_kernels.patching.eager import choose
from srpo_kernels.patching.handle import Rule, hooked
from srpo_kernels.patching.identity_cache import IdentityCache
from srpo_kernels.patching.rollout import Modulations, run_blocks

__all__ = ["rules"]

_FP16_MAX = 65504
#: The operators that feed linear layers, in e4m3.
FLOAT8 = SimpleNamespace(
    layer_norm_modulate=sk.layer_norm_modulate_fp8,
    gated_residual_layer_norm_modulate=sk.gated_residual_layer_norm_modulate_fp8,
    gelu_tanh=sk.gelu_tanh_fp8,
    gelu_concat=sk.gelu_concat_fp8,
)


def rules(selected: Collection[str], *, float8: bool = False) -> list[Rule]:
    """Rules for the modules that use any of the `selected` operators.

    With `float8`, what feeds the linear layers of blocks comes in e4m3: see `Float8Rollout`.
    """
    ops = choose(selected)
    feeding = FLOAT8 if float8 else ops
    made = [
        Rule(
            AdaLayerNormZero,
            _ada_layer_norm_zero(feeding),
            ("layer_norm_modulate",),
            {AdaLayerNormZero.forward: {"7dde3fd906"}},
            lambda module: "it embeds class labels" if module.emb is not None else _affine(module.norm),
        ),
        Rule(
            AdaLayerNormZeroSingle,
            _ada_layer_norm_zero_single(feeding),
            ("layer_norm_modulate",),
            {AdaLayerNormZeroSingle.forward: {"3f08086109"}},
            lambda module: _affine(module.norm),
        ),
        Rule(
            AdaLayerNormContinuous,
            _ada_layer_norm_continuous(ops),
            ("layer_norm_modulate",),
            {AdaLayerNormContinuous.forward: {"98e1fd5ac3"}},
            lambda module: _affine(module.norm),
        ),
        Rule(
            GELU,
            _gelu(feeding),
            ("gelu_tanh",),
            {GELU.forward: {"991bb57833"}, GELU.gelu: {"61a22bd046"}},
            lambda module: None if module.approximate == "tanh" else "its GELU is not the tanh approximation",
        ),
        Rule(
            FluxAttention,
            _attention(ops),
            ("qk_norm_rope", "joint_qk_norm_rope"),
            {
                FluxAttention.forward: {"d002b4d99e"},
                FluxAttnProcessor.__call__: {"ac32c8a7ac", "e8f0e55796", "69ad1b9bc4"},
                transformer_flux._get_projections: {"f740c583dc"},
                apply_rotary_emb: {"213e19b8c1"},
            },
            _refuse_attention,
        ),
        Rule(
            FluxTransformerBlock,
            _double_block(ops, feeding),
            ("gated_residual", "gated_residual_layer_norm_modulate"),
            {FluxTransformerBlock.forward: {"85cd7ce98b"}},
            lambda module: _affine(module.norm2) or _affine(module.norm2_context),
        ),
        Rule(
            FluxSingleTransformerBlock,
            _single_block(ops, feeding),
            ("gated_residual", "gelu_concat"),
            {FluxSingleTransformerBlock.forward: {"0b116839d6"}},
            lambda module: hooked(module.act_mlp, "act_mlp"),
        ),
        Rule(
            FluxPosEmbed,
            _position_embedding(),
            ("position_cache",),
            {FluxPosEmbed.forward: {"63a0c7cc5a", "1ba6febb93"}, get_1d_rotary_pos_embed: {"4aa02adaac"}},
        ),
        Rule(
            FluxTransformer2DModel,
            _transformer("position_cache" in selected),
            ("joint_stream",),
            {FluxTransformer2DModel.forward: {"371095cbf5", "0077b1620a"}},
        ),
    ]
    narrowed = (replace(rule, uses=[name for name in rule.uses if name in selected]) for rule in made)
    return [rule for rule in narrowed if rule.uses]


# --- why an instance is left alone ------------------------------------------------------------


def _affine(norm: Any) -> str | None:
    if not isinstance(norm, nn.LayerNorm):
        return f"its norm is a {type(norm).__name__}, not a LayerNorm"
    return "its LayerNorm has weights" if norm.elementwise_affine else hooked(norm, "its LayerNorm")


def _refuse_attention(module: Any) -> str | None:
    norms = [getattr(module, name) for name in _norm_names(module)]
    for norm in norms:
        if not isinstance(norm, nn.RMSNorm) or norm.weight is None or norm.eps is None:
            return "its query and key norms are not RMSNorm with a weight and an epsilon"
        if reason := hooked(norm, "a query or key norm"):
            return reason
    if len({norm.eps for norm in norms}) > 1:
        return "its norms have several epsilons"
    if type(module.processor) is not FluxAttnProcessor:
        return f"its processor is a {type(module.processor).__name__}, not FluxAttnProcessor"
    return None


def _norm_names(module: Any) -> tuple[str, ...]:
    added = ("norm_added_q", "norm_added_k") if module.added_kv_proj_dim is not None else ()
    return ("norm_q", "norm_k", *added)


# --- forwards ---------------------------------------------------------------------------------


def _modulation(module: Any, emb: Tensor | Modulations, dtype: torch.dtype | None = None) -> Tensor:
    """Shift, scale and gate vectors of an adaptive norm, [B, k D]: computed, or looked up in a rollout's."""
    return emb[module] if isinstance(emb, Modulations) else module.linear(module.silu(emb).to(dtype or emb.dtype))


def _ada_layer_norm_zero(ops: SimpleNamespace) -> Callable:
    def forward(
        self: Any, x: Tensor, timestep: Any = None, class_labels: Any = None, hidden_dtype: Any = None, emb: Any = None
    ) -> tuple[Tensor, ...]:
        shift, scale, gate, shift_mlp, scale_mlp, gate_mlp = _modulation(self, emb).chunk(6, dim=1)
        return ops.layer_norm_modulate(x, scale, shift, self.norm.eps), gate, shift_mlp, scale_mlp, gate_mlp

    return forward


def _ada_layer_norm_zero_single(ops: SimpleNamespace) -> Callable:
    def forward(self: Any, x: Tensor, emb: Any = None) -> tuple[Tensor, Tensor]:
        shift, scale, gate = _modulation(self, emb).chunk(3, dim=1)
        return ops.layer_norm_modulate(x, scale, shift, self.norm.eps), gate

    return forward


def _ada_layer_norm_continuous(ops: SimpleNamespace) -> Callable:
    def forward(self: Any, x: Tensor, conditioning_embedding: Any) -> Tensor:
        scale, shift = _modulation(self, conditioning_embedding, x.dtype).chunk(2, dim=1)
        return ops.layer_norm_modulate(x, scale, shift, self.norm.eps)

    return forward


def _gelu(ops: SimpleNamespace) -> Callable:
    def forward(self: Any, hidden_states: Tensor) -> Tensor:
        return ops.gelu_tanh(self.proj(hidden_states))

    return forward


def _attention(ops: SimpleNamespace) -> Callable:
    def forward(
        self: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Any = None,
        attention_mask: Tensor | None = None,
        image_rotary_emb: tuple[Tensor, Tensor] | None = None,
        **kwargs: Any,
    ) -> Tensor | tuple[Tensor, Tensor]:
        joint = self.added_kv_proj_dim is not None
        plain = type(self.processor) is FluxAttnProcessor and not self.fused_projections and not kwargs
        if not plain or image_rotary_emb is None or joint != (encoder_hidden_states is not None):
            return FluxAttention.forward(
                self, hidden_states, encoder_hidden_states, attention_mask, image_rotary_emb, **kwargs
            )

        def heads(*projected: Tensor) -> tuple[Tensor, ...]:
            return tuple(x.unflatten(-1, (-1, self.head_dim)) for x in projected)

        q, k, v = heads(self.to_q(hidden_states), self.to_k(hidden_states), self.to_v(hidden_states))
        weights, eps = (self.norm_q.weight, self.norm_k.weight), self.norm_q.eps
        if not joint:
            make = lambda: (*ops.qk_norm_rope(q, k, *weights, *image_rotary_emb, eps), v)  # noqa: E731
            return attend(self.processor, make, attention_mask).flatten(2, 3)
        text = encoder_hidden_states
        text_qkv = heads(self.add_q_proj(text), self.add_k_proj(text), self.add_v_proj(text))
        text_weights = (self.norm_added_q.weight, self.norm_added_k.weight)
        make = lambda: ops.joint_qk_norm_rope(  # noqa: E731
            *text_qkv, q, k, v, *text_weights, *weights, *image_rotary_emb, eps
        )
        out = attend(self.processor, make, attention_mask).flatten(2, 3)
        text_out, image_out = out.split([text.shape[1], hidden_states.shape[1]], dim=1)
        # Contiguous: a linear layer adds its bias in a pass of its own to rows that are not.
        return self.to_out[1](self.to_out[0](image_out.contiguous())), self.to_add_out(text_out.contiguous())

    return forward


def _double_block(ops: SimpleNamespace, feeding: SimpleNamespace) -> Callable:
    def forward(
        self: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        temb: Any,
        image_rotary_emb: tuple[Tensor, Tensor] | None = None,
        joint_attention_kwargs: dict[str, Any] | None = None,
    ) -> tuple[Tensor, Tensor]:
        image, *image_modulation = self.norm1(hidden_states, emb=temb)
        text, *text_modulation = self.norm1_context(encoder_hidden_states, emb=temb)
        image_branch, text_branch, *ip_adapter = self.attn(
            hidden_states=image,
            encoder_hidden_states=text,
            image_rotary_emb=image_rotary_emb,
            **(joint_attention_kwargs or {}),
        )
        hidden_states = _rest(ops, feeding, hidden_states, image_branch, image_modulation, self.norm2, self.ff)
        for branch in ip_adapter:
            hidden_states = hidden_states + branch
        text = _rest(
            ops, feeding, encoder_hidden_states, text_branch, text_modulation, self.norm2_context, self.ff_context
        )
        if text.dtype == torch.float16:
            text = text.clip(-_FP16_MAX, _FP16_MAX)
        return text, hidden_states

    return forward


def _rest(
    ops: SimpleNamespace,
    feeding: SimpleNamespace,
    residual: Tensor,
    branch: Tensor,
    modulation: list[Tensor],
    norm: nn.Module,
    mlp: nn.Module,
) -> Tensor:
    """A double block's stream from its attention branch on."""
    gate, shift_mlp, scale_mlp, gate_mlp = modulation
    residual, x = feeding.gated_residual_layer_norm_modulate(residual, gate, branch, scale_mlp, shift_mlp, norm.eps)
    return ops.gated_residual(residual, gate_mlp, mlp(x))


def _single_block(ops: SimpleNamespace, feeding: SimpleNamespace) -> Callable:
    def forward(
        self: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        temb: Any,
        image_rotary_emb: tuple[Tensor, Tensor] | None = None,
        joint_attention_kwargs: dict[str, Any] | None = None,
    ) -> tuple[Tensor, Tensor]:
        text = encoder_hidden_states.shape[1]
        if text:
            hidden_states = torch.cat([encoder_hidden_states, hidden_states], dim=1)
        x, gate = self.norm(hidden_states, emb=temb)
        mlp = self.proj_mlp(x)
        attn = self.attn(hidden_states=x, image_rotary_emb=image_rotary_emb, **(joint_attention_kwargs or {}))
        hidden_states = ops.gated_residual(hidden_states, gate, self.proj_out(feeding.gelu_concat(attn, mlp)))
        if hidden_states.dtype == torch.float16:
            hidden_states = hidden_states.clip(-_FP16_MAX, _FP16_MAX)
        if not text:  # the joint stream: see run_blocks
            return encoder_hidden_states, hidden_states
        return tuple(hidden_states.split([text, hidden_states.shape[1] - text], dim=1))

    return forward


def _position_embedding() -> Callable:
    caches: dict[Any, IdentityCache] = {}

    def forward(self: Any, ids: Tensor) -> tuple[Tensor, Tensor]:
        if torch.compiler.is_compiling():
            return FluxPosEmbed.forward(self, ids)
        key = (self.theta, tuple(self.axes_dim))
        if key not in caches:
            caches[key] = IdentityCache(lambda ids: FluxPosEmbed.forward(self, ids))
        return caches[key](ids)

    return forward


def _transformer(cached: bool) -> Callable:
    joined = IdentityCache(lambda *ids: torch.cat(ids, dim=0))

    def forward(
        self: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Any = None,
        pooled_projections: Any = None,
        timestep: Any = None,
        img_ids: Any = None,
        txt_ids: Any = None,
        guidance: Tensor | None = None,
        joint_attention_kwargs: dict[str, Any] | None = None,
        controlnet_block_samples: Any = None,
        controlnet_single_block_samples: Any = None,
        return_dict: bool = True,
        controlnet_blocks_repeat: bool = False,
    ) -> Any:
        controlled = controlnet_block_samples is not None or controlnet_single_block_samples is not None
        if controlled or joint_attention_kwargs or self.is_cache_enabled or txt_ids.ndim != 2 or img_ids.ndim != 2:
            return FluxTransformer2DModel.forward(
                self,
                hidden_states,
                encoder_hidden_states,
                pooled_projections,
                timestep,
                img_ids,
                txt_ids,
                guidance,
                joint_attention_kwargs=joint_attention_kwargs,
                controlnet_block_samples=controlnet_block_samples,
                controlnet_single_block_samples=controlnet_single_block_samples,
                return_dict=return_dict,
                controlnet_blocks_repeat=controlnet_blocks_repeat,
            )
        hidden_states = self.x_embedder(hidden_states)
        levels = [level.to(hidden_states.dtype) * 1000 for level in (timestep, guidance) if level is not None]
        temb = self.time_text_embed(*levels, pooled_projections)
        encoder_hidden_states = self.context_embedder(encoder_hidden_states)
        join = joined if cached and not torch.compiler.is_compiling() else lambda *ids: torch.cat(ids, dim=0)
        rotary = self.pos_embed(join(txt_ids, img_ids))
        hidden_states = run_blocks(self, hidden_states, encoder_hidden_states, temb, rotary)
        output = self.proj_out(self.norm_out(hidden_states, temb))
        return Transformer2DModelOutput(sample=output) if return_dict else (output,)

    return forward
