"""A judge of digit images that shares nothing with the reward: measurements and a classifier of real digits."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.decomposition import PCA
from sklearn.svm import SVC
from torch import Tensor

from srpo.tiny.digits import SIZE, Stats, ink, load

__all__ = ["Judge"]

LIMIT = 6.0  # standard deviations: a single broken image must not decide a mean


@dataclass(frozen=True)
class Judge:
    """Measures images against the real training digits; deterministic."""

    stats: Stats
    classifier: SVC
    space: PCA

    @classmethod
    def load(cls) -> Judge:
        """Fit the judge to the real digits, in a few seconds.

        The classifier sees each training digit written with four different pens, thin and bold ones included, as
        the images it will judge are.
        """
        data = load(copies=4)
        features = _features(data.images)
        classifier = SVC(C=10.0, gamma="scale").fit(features, data.labels.numpy())
        return cls(data.stats, classifier, PCA(20, random_state=0, svd_solver="randomized").fit(features))

    def measure(self, images: Tensor, labels: Tensor) -> dict[str, float]:
        """Judge `images` [N, 3, 32, 32] in [0, 1] that should show the digits `labels` [N].

        stroke, slant, colour: mean attribute in standard deviations of the real digits of the same class, positive
        for bolder, more slanted and redder; accuracy: the share recognised as their label, whatever their colour;
        diversity: mean distance between two images of the same label in a space of 20 principal components.
        Raises ValueError when the shapes do not fit.
        """
        if images.ndim != 4 or tuple(images.shape[1:]) != (3, SIZE, SIZE) or labels.shape != images.shape[:1]:
            raise ValueError(
                f"images must be [N, 3, {SIZE}, {SIZE}] and labels [N], "
                f"got {list(images.shape)} and {list(labels.shape)}"
            )
        images, labels = images.detach().float().cpu().clamp(0, 1), labels.cpu()
        z = self.stats.z_scores(images, labels)
        means = {key: float(z[key].clamp(-LIMIT, LIMIT).mean()) for key in ("stroke", "slant", "colour")}
        features = _features(images)
        accuracy = float((self.classifier.predict(features) == labels.numpy()).mean())
        points = torch.from_numpy(self.space.transform(features))
        distances = torch.cat([torch.pdist(points[labels == label]) for label in range(10)])
        return {**means, "accuracy": accuracy, "diversity": float(distances.mean()) if len(distances) else 0.0}


def _features(images: Tensor) -> np.ndarray:
    """Ink coverage at 16x16 pixels, [N, 256] fp32: no colour, and small shifts matter less."""
    return np.asarray(F.avg_pool2d(ink(images)[:, None], 2).flatten(1).numpy())
