"""Where points of a space of many dimensions go on the Poincaré disk, and where the labels go."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional

from mmkern import ops

Array = npt.NDArray[np.float64]

RIDGE = 1e-2


@dataclass(frozen=True)
class DiskLayout:
    """Places on the unit disk. The distance to the root is true, times ``stretch``; the angle is a choice.

    No plane shows ten classes apart, so the angle is that of ``direction @ plane``, a linear map fitted to turn the
    images of each class towards an angle of their own. Classes that look alike to the model are neighbours.
    """

    plane: Tensor
    stretch: float
    curvature: Tensor

    @classmethod
    def fit(cls, images: Tensor, labels: Tensor, curvature: Tensor, middle: float) -> DiskLayout:
        """Fitted to points ``[N, D]`` of images; their median goes to the radius ``middle``, in 0..1."""
        directions = functional.normalize(images, dim=1)
        targets = _class_targets(directions, labels)[labels]
        gram = directions.T @ directions / len(images) + RIDGE * torch.eye(images.shape[1])
        plane = torch.linalg.solve(gram, directions.T @ targets / len(images))
        median = ops.lorentz_log_map0(images, curvature).norm(dim=1).median() * curvature.sqrt()
        return cls(plane, 2 * math.atanh(middle) / float(median), curvature)

    def radius(self, distance: float) -> float:
        """Where the points at this distance to the root lie."""
        return math.tanh(self.stretch * distance * math.sqrt(float(self.curvature)) / 2)

    def place(self, points: Tensor) -> Array:
        """``[N, 2]``."""
        stretched = ops.lorentz_exp_map0(self.stretch * ops.lorentz_log_map0(points, self.curvature), self.curvature)
        radius = ops.lorentz_to_poincare(stretched, self.curvature).norm(dim=1, keepdim=True) * self.curvature.sqrt()
        places: Array = (radius * functional.normalize(points @ self.plane, dim=1)).double().numpy()
        return places


def _class_targets(directions: Tensor, labels: Tensor) -> Tensor:
    """A unit vector of the plane for each class: evenly around the circle, in the order of the principal plane."""
    means = torch.stack([directions[labels == label].mean(0) for label in range(int(labels.max()) + 1)])
    centred = means - means.mean(0)
    along, across = (centred @ torch.linalg.svd(centred, full_matrices=False).Vh[:2].T).T
    rank = torch.atan2(across, along).argsort().argsort()
    angle = rank * (2 * math.pi / len(means))
    return torch.stack([angle.cos(), angle.sin()], 1)


def spread_labels(anchors: Array, sizes: Array, inner: float, outer: float, rounds: int = 600) -> Array:
    """Centres for boxes of ``sizes`` ``[N, 2]`` that start on the rays through ``anchors`` and do not overlap.

    Overlapping boxes push each other apart along the axis where less is needed; all stay in the ring from ``inner`` to
    ``outer`` and are drawn towards their rays.
    """
    radius = np.linalg.norm(anchors, axis=1, keepdims=True)
    home = anchors / np.maximum(radius, 1e-9) * (inner + outer) / 2
    centres: Array = home.copy()
    number = np.arange(len(anchors))
    reach = (sizes[:, None] + sizes) / 2 * (number[:, None] != number)[..., None]
    tie = np.sign(number[:, None] - number)[..., None]
    for i in range(rounds):
        centres += 0.05 * (1 - i / rounds) * (home - centres)
        apart = centres[:, None] - centres
        overlap = reach - np.abs(apart)
        overlap[(overlap <= 0).any(2)] = 0
        along_x = overlap[..., :1] < overlap[..., 1:]
        push = np.where(np.concatenate([along_x, ~along_x], 2), overlap, 0) * np.where(apart == 0, tie, np.sign(apart))
        centres = _into_ring(centres + push.sum(1) / 2, sizes, inner, outer)
    return centres


def _into_ring(centres: Array, sizes: Array, inner: float, outer: float) -> Array:
    farthest = np.linalg.norm(np.abs(centres) + sizes / 2, axis=1)
    nearest = np.linalg.norm(np.maximum(np.abs(centres) - sizes / 2, 0), axis=1)
    radius = np.maximum(np.linalg.norm(centres, axis=1), 1e-9)
    shift = np.maximum(inner - nearest, 0) - np.maximum(farthest - outer, 0)
    moved: Array = centres * (1 + shift / radius)[:, None]
    return moved
