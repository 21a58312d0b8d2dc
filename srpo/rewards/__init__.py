"""Rewards: differentiable scores of images against prompts.

Every reward has ``relative(images, positive, negative, kappa)`` for training and ``score(images, prompts)`` for
evaluation (`srpo.objective.RelativeReward`), and ``limit(kappa)``, the largest relative score possible.
"""

from srpo.rewards.aesthetic import AestheticReward, SiglipAestheticReward
from srpo.rewards.base import ImageOnlyReward, Reward
from srpo.rewards.config import RewardConfig, RewardPart, check_reward
from srpo.rewards.cosine import CLIPReward, CosineReward, OpenCLIPReward
from srpo.rewards.hpsv3 import HPSv3Reward
from srpo.rewards.image_reward import ImageReward
from srpo.rewards.load import checksums, load_reward
from srpo.rewards.mixture import MixtureReward, Part

__all__ = [
    "AestheticReward",
    "CLIPReward",
    "CosineReward",
    "HPSv3Reward",
    "ImageOnlyReward",
    "ImageReward",
    "MixtureReward",
    "OpenCLIPReward",
    "Part",
    "Reward",
    "RewardConfig",
    "RewardPart",
    "SiglipAestheticReward",
    "check_reward",
    "checksums",
    "load_reward",
]
