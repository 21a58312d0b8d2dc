"""Rewards: differentiable scores of images against prompts.

Every reward has ``relative(images, positive, negative, kappa)`` for training and ``score(images, prompts)`` for
evaluation (`srpo.objective.RelativeReward`), and ``limit(kappa)``, the largest relative score possible.
"""

from srpo.rewards.cosine import CLIPReward, CosineReward, OpenCLIPReward
from srpo.rewards.load import RewardConfig, load_reward

__all__ = ["CLIPReward", "CosineReward", "OpenCLIPReward", "RewardConfig", "load_reward"]
