"""What the retrieval family means, in plain PyTorch: all scores of a row, sorted, and the first k of them.

Ties go to the lower index. NaN counts as the largest number, as in ``torch.topk``: it comes first among scores, last
among distances. ``*_of_pairs`` are the values of pairs that have been chosen, which is what a gradient needs.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from .hyperbolic import lorentz_distance, lorentz_pairwise_distance

Scalar = float | Tensor
Chosen = tuple[Tensor, ...]  # values and indices [N, k]


def pairwise_topk(x: Tensor, y: Tensor, k: int) -> Chosen:
    """Of the products ``x_i·y_j``."""
    return _best(_wide(x) @ _wide(y).T, k, largest=True)


def pairwise_topk_of_pairs(x: Tensor, y: Tensor, k: int, *outs: Tensor) -> Tensor:
    return _product(_wide(x), _wide(y)[outs[1]])


def cosine_pairwise_topk(x: Tensor, y: Tensor, k: int) -> Chosen:
    """Of the products of rows of length 1, and of zeros."""
    x, y = (functional.normalize(_wide(v), dim=-1) for v in (x, y))
    return _best(x @ y.T, k, largest=True)


def cosine_pairwise_topk_of_pairs(x: Tensor, y: Tensor, k: int, *outs: Tensor) -> Tensor:
    x, y = (functional.normalize(_wide(v), dim=-1) for v in (x, y))
    return _product(x, y[outs[1]])


def l2_pairwise_topk(x: Tensor, y: Tensor, k: int) -> Chosen:
    """Of ``|x_i − y_j|``, from the differences themselves."""
    distances = torch.cdist(_wide(x), _wide(y), compute_mode="donot_use_mm_for_euclid_dist")
    return _best(distances, k, largest=False)


def l2_pairwise_topk_of_pairs(x: Tensor, y: Tensor, k: int, *outs: Tensor) -> Tensor:
    distances: Tensor = torch.linalg.vector_norm(_wide(x)[:, None] - _wide(y)[outs[1]], dim=-1)
    return distances


def lorentz_pairwise_topk(x: Tensor, y: Tensor, curvature: Scalar, k: int) -> Chosen:
    """Of the distances of hyperbolic points: see ``lorentz_pairwise_distance``."""
    return _best(lorentz_pairwise_distance(_wide(x), _wide(y), curvature), k, largest=False)


def lorentz_pairwise_topk_of_pairs(x: Tensor, y: Tensor, curvature: Scalar, k: int, *outs: Tensor) -> Tensor:
    chosen = _wide(y)[outs[1]]
    return lorentz_distance(_wide(x)[:, None].expand_as(chosen), chosen, curvature)


def linear_topk(
    h: Tensor, weight: Tensor, linear_bias: Tensor | None, k: int, softcap: float, sums_logs: bool
) -> tuple[Tensor, ...]:
    """Of the logits ``h_i·w_j + b_j``, held within ``±softcap`` by tanh if that is not 0.

    With ``sums_logs``, their log-sum-exp over all j too, [N]; else [0].
    """
    logits = _logits(_wide(h) @ _wide(weight).T, linear_bias, softcap)
    return *_best(logits, k, largest=True), logits.logsumexp(1) if sums_logs else logits.new_empty(0)


def linear_topk_of_pairs(
    h: Tensor, weight: Tensor, linear_bias: Tensor | None, k: int, softcap: float, sums_logs: bool, *outs: Tensor
) -> Tensor:
    bias = None if linear_bias is None else linear_bias[outs[1]]
    return _logits(_product(_wide(h), _wide(weight)[outs[1]]), bias, softcap)


def _logits(products: Tensor, bias: Tensor | None, softcap: float) -> Tensor:
    logits = products if bias is None else products + bias
    return softcap * (logits / softcap).tanh() if softcap else logits


def _best(values: Tensor, k: int, *, largest: bool) -> Chosen:
    values, indices = torch.sort(values, dim=1, descending=largest, stable=True)
    return values[:, :k].contiguous(), indices[:, :k].contiguous()


def _product(x: Tensor, chosen: Tensor) -> Tensor:
    """``x_i · chosen_ij``."""
    return (chosen @ x[:, :, None]).squeeze(-1)


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))
