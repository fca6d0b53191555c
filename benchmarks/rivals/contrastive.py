"""Contrastive losses as the field writes them in PyTorch: what mmkern is timed against.

CLIP's and SigLIP's as in open_clip, MERU's as in its release, EgoNCE as EgoVLP's mask and softmax, with the matrix of
all scores in memory. Alignment calibration has no release for two modalities: its terms, written down.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from mmkern.bench.case import Peer

from .hyperbolic import lorentz_pairwise_distance


def _cross_entropy(scores: Tensor) -> Tensor:
    target = torch.arange(len(scores))
    return (functional.cross_entropy(scores, target) + functional.cross_entropy(scores.T, target)) / 2


def info_nce_loss(x: Tensor, y: Tensor, logit_scale: Tensor) -> Tensor:
    return _cross_entropy(logit_scale * x @ y.T)


def siglip_loss(x: Tensor, y: Tensor, logit_scale: Tensor, logit_bias: Tensor) -> Tensor:
    logits = logit_scale * x @ y.T + logit_bias
    labels = 2 * torch.eye(len(x)) - 1
    return -functional.logsigmoid(labels * logits).sum() / len(x)


def lorentz_contrastive_loss(x: Tensor, y: Tensor, curvature: Tensor, logit_scale: Tensor) -> Tensor:
    return _cross_entropy(-logit_scale * lorentz_pairwise_distance(x, y, curvature))


def ego_nce_loss(x: Tensor, y: Tensor, temperature: Tensor, verbs: Tensor, nouns: Tensor) -> Tensor:
    scores, (verbs, nouns) = x @ y.T / temperature, (labels.float() for labels in (verbs, nouns))
    positive = (verbs @ verbs.T) * (nouns @ nouns.T) + torch.eye(len(x)) > 0
    ways = ((s.softmax(1) * mask).sum(1).log().mean() for s, mask in ((scores, positive), (scores.T, positive.T)))
    return -sum(ways) / 2


def _calibrated(scores: Tensor, forget: Tensor, alpha: float, beta: float, gamma: float) -> Tensor:
    own, kept, apart = scores.diagonal(), (~forget).to(scores.dtype), forget.to(scores.dtype)
    rows = scores.masked_fill(forget, -torch.inf).logsumexp(1)
    cols = scores.masked_fill(forget[:, None], -torch.inf).logsumexp(0)
    retain = ((rows + cols) / 2 - own) @ kept / kept.sum()
    negative = -(apart @ scores @ apart - own @ apart) / (apart.sum() * (apart.sum() - 1))
    of_apart = (beta * own + gamma * (rows + cols) / 2) @ apart / apart.sum()
    return retain + alpha * negative + of_apart


def alignment_calibration_loss(x: Tensor, y: Tensor, forget: Tensor, logit_scale: Tensor, **weights: float) -> Tensor:
    scores = logit_scale * functional.normalize(x, dim=-1) @ functional.normalize(y, dim=-1).T
    return _calibrated(scores, forget, **weights)


def lorentz_alignment_calibration_loss(
    x: Tensor, y: Tensor, forget: Tensor, curvature: Tensor, logit_scale: Tensor, **weights: float
) -> Tensor:
    return _calibrated(-logit_scale * lorentz_pairwise_distance(x, y, curvature), forget, **weights)


def metric_learning(op: str, args: Sequence[Any]) -> Peer:
    """NTXentLoss of pytorch-metric-learning on the same pairs, from either side; for rows of length 1."""
    from pytorch_metric_learning.losses import NTXentLoss, SelfSupervisedLoss

    x, y, scale = (a.detach() for a in args)
    loss = SelfSupervisedLoss(NTXentLoss(temperature=1 / float(scale)), symmetric=False)
    leaves = [v.clone().requires_grad_(args[0].requires_grad) for v in (x, y)]
    return Peer(lambda x, y: (loss(x, y) + loss(y, x)) / 2, leaves, leaves, lambda out: out)
