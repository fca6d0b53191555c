"""What the trained model knows: the class of images it never saw, and the way from an image to the root."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from mmkern import ops
from mmkern.models import Meru

from .data import DIGITS, PROMPTS, Digits

ROOT = "[ROOT]"
TRAVERSAL_STEPS = 50


def class_points(model: Meru) -> Tensor:
    """One point a digit, ``[10, D]``: its prompts averaged in the tangent space."""
    tangents = []
    for digit in sorted(DIGITS):
        ids = [i for i, prompt in enumerate(PROMPTS) if prompt.digits == {digit}]
        tangents.append(model.embed_text(torch.tensor(ids), project=False).mean(0))
    return ops.lorentz_exp_map0(torch.stack(tangents), model.curvature)


@torch.no_grad()
def zero_shot_accuracy(model: Meru, digits: Digits) -> float:
    """The part of the images whose class has the largest Lorentz inner product with them."""
    scores = ops.lorentz_pairwise_inner(model.embed_image(digits.images), class_points(model), model.curvature)
    return float((scores.argmax(1) == digits.labels).float().mean())


@dataclass(frozen=True)
class Stop:
    """A text met on the way to the root, first at ``point`` ``[D]``; ``prompt`` is None for the root itself."""

    text: str
    prompt: int | None
    point: Tensor


@dataclass(frozen=True)
class Journey:
    """An image ``[1, 8, 8]``, its label, and the texts on its way to the root."""

    image: Tensor
    label: int
    stops: Sequence[Stop]


def most_typical(points: Tensor) -> int:
    """The row of ``[N, D]`` whose direction is nearest to the mean direction."""
    directions = functional.normalize(points, dim=1)
    return int((directions @ directions.mean(0)).argmax())


@torch.no_grad()
def traverse(model: Meru, images: Tensor) -> list[list[Stop]]:
    """The texts met from each image ``[B, 1, 8, 8]`` to the root, in steps of equal length in the tangent space.

    At each step it is the text of the largest Lorentz inner product among those that entail the step, that is, whose
    cone holds it; the root entails all. Source: Desai et al. 2023, §4.3.
    """
    curvature = model.curvature
    prompts = model.embed_text(torch.arange(len(PROMPTS)))
    texts = torch.cat([prompts, torch.zeros_like(prompts[:1])])
    aperture = ops.lorentz_half_aperture(prompts, curvature, model.min_radius)
    paths = []
    for tangent in model.embed_image(images, project=False):
        points = ops.lorentz_exp_map0(torch.linspace(1, 0, TRAVERSAL_STEPS)[:, None] * tangent, curvature)
        scores = ops.lorentz_pairwise_inner(points, texts, curvature)
        outside = ops.lorentz_exterior_angle(prompts, points[:, None], curvature) > aperture
        scores[:, :-1].masked_fill_(outside, -torch.inf)
        paths.append(_stops(points, scores.argmax(1).tolist()))
    return paths


def _stops(points: Tensor, nearest: Sequence[int]) -> list[Stop]:
    stops = []
    for step, text in enumerate(nearest):
        if step and text == nearest[step - 1]:
            continue
        is_root = text == len(PROMPTS)
        stops.append(Stop(ROOT if is_root else PROMPTS[text].text, None if is_root else text, points[step]))
    return stops
