"""Fast operators, with backward, for reward fine-tuning of diffusion transformers.

Importing this package needs torch only.
"""

from srpo_kernels.checkpointing import checkpointed_reward
from srpo_kernels.ops.inject_noise import inject_noise
from srpo_kernels.ops.noise_prior import NoisePrior
from srpo_kernels.ops.recover import recover
from srpo_kernels.ops.relative_reward import RELATIVE_FORMS, relative_reward, relative_reward_loss
from srpo_kernels.ops.resize_normalize import resize_normalize

__version__ = "0.1.0"
__all__ = [
    "RELATIVE_FORMS",
    "NoisePrior",
    "checkpointed_reward",
    "inject_noise",
    "recover",
    "relative_reward",
    "relative_reward_loss",
    "resize_normalize",
]
