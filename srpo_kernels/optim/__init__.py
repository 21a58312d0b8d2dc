"""Optimizers whose states are small, whose bits do not depend on how the parameters are sharded."""

from srpo_kernels.optim.adamw import AdamW
from srpo_kernels.optim.norm import clip_grad_norm_

__all__ = ["AdamW", "clip_grad_norm_"]
