"""MERU: images and texts in one hyperbolic space, the general near the root and the specific near the rim.

Source: Desai et al. 2023, "Hyperbolic Image-Text Representations", and its released code. Parameter names are those of
the release, so that a state_dict fits wherever the towers do.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from mmkern import ops

MAX_LOGIT_SCALE = 100.0


class MeruLoss(NamedTuple):
    """``total = contrastive + entailment_weight · entailment``, three 0-d tensors."""

    total: Tensor
    contrastive: Tensor
    entailment: Tensor


class Meru(nn.Module):
    """Two towers, a linear map from each into the tangent space at the root, and the exponential map.

    ``point = exp0(e^α · W f(input))``, with its own ``W`` and ``α`` for images and texts. Four scalars are learned as
    logarithms and clamped, without effect on their gradients, before each use: ``logit_scale`` (initially 1/0.07, at
    most 100), ``curv`` (the curvature c; at most ten times more or less than initially), ``visual_alpha`` and
    ``textual_alpha`` (initially 1/√D, at most 1). As in the paper, weight decay is not for these four.

    Args:
        visual: images to features ``[B, visual_width]``.
        textual: texts (whatever it takes) to features ``[B, textual_width]``.
        visual_width: width of the image features.
        textual_width: width of the text features.
        embed_dim: D.
        curvature: the initial c; the space has curvature −c.
        learn_curvature: whether c is learned.
        entailment_weight: of the entailment loss beside the contrastive one.
        min_radius: K of the cones' half aperture ``asin(2K/(√c|x|))``.
    Source: Desai et al. 2023, §3; facebookresearch/meru, meru/models.py.
    """

    def __init__(
        self,
        visual: nn.Module,
        textual: nn.Module,
        visual_width: int,
        textual_width: int,
        embed_dim: int = 512,
        *,
        curvature: float = 1.0,
        learn_curvature: bool = True,
        entailment_weight: float = 0.2,
        min_radius: float = 0.1,
    ) -> None:
        super().__init__()
        self.visual = visual
        self.textual = textual
        self.visual_proj = nn.Linear(visual_width, embed_dim, bias=False)
        self.textual_proj = nn.Linear(textual_width, embed_dim, bias=False)
        nn.init.normal_(self.visual_proj.weight, std=visual_width**-0.5)
        nn.init.normal_(self.textual_proj.weight, std=textual_width**-0.5)
        self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))
        self.curv = nn.Parameter(torch.tensor(math.log(curvature)), requires_grad=learn_curvature)
        self.visual_alpha = nn.Parameter(torch.tensor(math.log(embed_dim**-0.5)))
        self.textual_alpha = nn.Parameter(torch.tensor(math.log(embed_dim**-0.5)))
        self.entailment_weight = entailment_weight
        self.min_radius = min_radius
        self._curv_range = (math.log(curvature / 10), math.log(curvature * 10))

    @property
    def scalars(self) -> list[nn.Parameter]:
        """The four scalars, which weight decay is not for."""
        return [self.logit_scale, self.curv, self.visual_alpha, self.textual_alpha]

    @property
    def curvature(self) -> Tensor:
        """c, clamped; 0-d."""
        self.curv.data.clamp_(*self._curv_range)
        return self.curv.exp()

    def embed_image(self, images: Tensor, project: bool = True) -> Tensor:
        """Points of the images, ``[B, D]``; with ``project=False`` the tangent vectors that ``exp0`` takes there."""
        return self._embed(self.visual_proj(self.visual(images)), self.visual_alpha, project)

    def embed_text(self, texts: Tensor, project: bool = True) -> Tensor:
        """Points of the texts, ``[B, D]``; with ``project=False`` the tangent vectors that ``exp0`` takes there.

        Several prompts of one class are averaged in the tangent space, before ``exp0``.
        """
        return self._embed(self.textual_proj(self.textual(texts)), self.textual_alpha, project)

    def _embed(self, features: Tensor, alpha: Tensor, project: bool) -> Tensor:
        alpha.data.clamp_(max=0.0)
        tangent = features.to(alpha.dtype) * alpha.exp()  # under autocast the features have 16 bits
        return ops.lorentz_exp_map0(tangent, self.curvature) if project else tangent

    def loss(self, images: Tensor, texts: Tensor, text_ids: Tensor | None = None) -> MeruLoss:
        """The loss of B pairs of points: row i of ``images`` belongs to row i of ``texts``, which entails it.

        ``logits = −distance · e^logit_scale``; cross-entropy from images to texts and from texts to images, halved;
        plus the mean of ``max(0, exterior_angle(text, image) − half_aperture(text))``. Without ``text_ids`` the logits
        are never a matrix in memory (``ops.lorentz_contrastive_loss``).

        Args:
            images: points ``[B, D]``.
            texts: points ``[B, D]``.
            text_ids: ``[B]`` integers, equal where the texts are. All pairs of an image with a text equal to its own
                are then positives with the same probability. None: every text is another, as in the paper.
        Returns: :class:`MeruLoss`.
        Source: Desai et al. 2023, §3.2; ``text_ids`` as in UniCL (Yang et al. 2022, §3.2).
        """
        curvature = self.curvature
        self.logit_scale.data.clamp_(max=math.log(MAX_LOGIT_SCALE))
        scale = self.logit_scale.exp()
        if text_ids is None:
            contrastive = ops.lorentz_contrastive_loss(images, texts, curvature, scale)
        else:
            logits = -ops.lorentz_pairwise_distance(images, texts, curvature) * scale
            equal = (text_ids[:, None] == text_ids).to(logits.dtype)
            targets = equal / equal.sum(1, keepdim=True)  # symmetric, so it serves both directions
            contrastive = (functional.cross_entropy(logits, targets) + functional.cross_entropy(logits.T, targets)) / 2
        entailment = ops.lorentz_entailment_loss(texts, images, curvature, self.min_radius)
        return MeruLoss(contrastive + self.entailment_weight * entailment, contrastive, entailment)

    def forward(self, images: Tensor, texts: Tensor, text_ids: Tensor | None = None) -> MeruLoss:
        """The loss of B images and their texts; see :meth:`loss`."""
        return self.loss(self.embed_image(images), self.embed_text(texts), text_ids)
