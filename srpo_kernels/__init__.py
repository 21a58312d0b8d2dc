"""Fast operators, with backward, for reward fine-tuning of diffusion transformers.

Importing this package needs torch only.
"""

from srpo_kernels.checkpointing import checkpointed_reward
from srpo_kernels.extension import extension_status
from srpo_kernels.ops.gated_residual import gated_residual, gated_residual_layer_norm_modulate
from srpo_kernels.ops.gelu import gelu_concat, gelu_tanh, quick_gelu
from srpo_kernels.ops.group_norm_silu import group_norm_silu
from srpo_kernels.ops.inject_noise import inject_noise
from srpo_kernels.ops.joint_qk_norm_rope import joint_qk_norm_rope
from srpo_kernels.ops.layer_norm_modulate import layer_norm_modulate
from srpo_kernels.ops.noise_prior import NoisePrior
from srpo_kernels.ops.qk_norm_rope import qk_norm_rope
from srpo_kernels.ops.recover import recover
from srpo_kernels.ops.relative_reward import RELATIVE_FORMS, relative_reward, relative_reward_loss
from srpo_kernels.ops.resize_normalize import resize_normalize
from srpo_kernels.patching import PatchHandle, patch
from srpo_kernels.patching.rollout import FluxRollout

__version__ = "0.1.0"
__all__ = [
    "RELATIVE_FORMS",
    "FluxRollout",
    "NoisePrior",
    "PatchHandle",
    "checkpointed_reward",
    "extension_status",
    "gated_residual",
    "gated_residual_layer_norm_modulate",
    "gelu_concat",
    "gelu_tanh",
    "group_norm_silu",
    "inject_noise",
    "joint_qk_norm_rope",
    "layer_norm_modulate",
    "patch",
    "qk_norm_rope",
    "quick_gelu",
    "recover",
    "relative_reward",
    "relative_reward_loss",
    "resize_normalize",
]
