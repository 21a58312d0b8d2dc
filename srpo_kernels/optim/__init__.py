"""Optimizers whose states are small, whose bits do not depend on how the parameters are sharded."""

from srpo_kernels.optim.adamw import AdamW
from srpo_kernels.optim.in_backward import StepInBackward, step_in_backward
from srpo_kernels.optim.norm import clip_grad_norm_

__all__ = ["AdamW", "StepInBackward", "clip_grad_norm_", "step_in_backward"]
