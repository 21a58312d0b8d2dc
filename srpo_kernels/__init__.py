"""Fast operators, with backward, for reward fine-tuning of diffusion transformers.

Importing this package needs torch only.
"""

from srpo_kernels.checkpointing import checkpointed_reward
from srpo_kernels.extension import extension_status
from srpo_kernels.float8_gather import gather_float8
from srpo_kernels.float8_linear import (
    Float8Linear,
    FrozenFloat8Linear,
    convert_to_float8,
    freeze_float8,
    revert_float8,
)
from srpo_kernels.ops._register import triton_problem
from srpo_kernels.ops.fp8_linear import fp8_linear, fp8_unsupported
from srpo_kernels.ops.fp8_producers import (
    gated_residual_layer_norm_modulate_fp8,
    gelu_concat_fp8,
    gelu_tanh_fp8,
    layer_norm_modulate_fp8,
)
from srpo_kernels.ops.gated_residual import gated_residual, gated_residual_layer_norm_modulate
from srpo_kernels.ops.gelu import gelu_concat, gelu_tanh, quick_gelu
from srpo_kernels.ops.group_norm_silu import group_norm_silu
from srpo_kernels.ops.inject_noise import inject_noise
from srpo_kernels.ops.joint_qk_norm_rope import joint_qk_norm_rope
from srpo_kernels.ops.layer_norm_modulate import layer_norm_modulate
from srpo_kernels.ops.noise_prior import NoisePrior
from srpo_kernels.ops.qk_norm_rope import qk_norm_rope
from srpo_kernels.ops.quantize_fp8 import Float8, fake_quantize_fp8, quantize_fp8
from srpo_kernels.ops.recover import recover
from srpo_kernels.ops.relative_reward import RELATIVE_FORMS, relative_reward, relative_reward_loss
from srpo_kernels.ops.resize_normalize import resize_normalize
from srpo_kernels.patching import PatchHandle, patch
from srpo_kernels.patching.float8_rollout import Float8Rollout
from srpo_kernels.patching.rollout import FluxRollout

__version__ = "0.1.0"
__all__ = [
    "RELATIVE_FORMS",
    "Float8",
    "Float8Linear",
    "Float8Rollout",
    "FluxRollout",
    "FrozenFloat8Linear",
    "NoisePrior",
    "PatchHandle",
    "checkpointed_reward",
    "convert_to_float8",
    "extension_status",
    "fake_quantize_fp8",
    "fp8_linear",
    "fp8_unsupported",
    "freeze_float8",
    "gated_residual",
    "gated_residual_layer_norm_modulate",
    "gated_residual_layer_norm_modulate_fp8",
    "gather_float8",
    "gelu_concat",
    "gelu_concat_fp8",
    "gelu_tanh",
    "gelu_tanh_fp8",
    "group_norm_silu",
    "inject_noise",
    "joint_qk_norm_rope",
    "layer_norm_modulate",
    "layer_norm_modulate_fp8",
    "patch",
    "qk_norm_rope",
    "quantize_fp8",
    "quick_gelu",
    "recover",
    "relative_reward",
    "relative_reward_loss",
    "resize_normalize",
    "revert_float8",
    "triton_problem",
]
