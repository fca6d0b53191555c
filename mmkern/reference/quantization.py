"""What the quantization family means, in plain PyTorch: the code that is nearest to a row, level by level.

Which one that is, is told in float64 whatever the dtype: float32 rounds distances of different codes to one number. Of
equal ones it is the first. NaN counts as the largest distance.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

SHORTEST = 1e-12  # what is shorter is not brought to the length 1, as in torch.nn.functional.normalize
_AT_ONCE = 1 << 24  # numbers

Chosen = tuple[Tensor, ...]  # distances and indices, one a row


def nearest_code(x: Tensor, codebook: Tensor) -> Chosen:
    """The least ``|x − c_j|`` over j, and its j, of each row of x."""
    indices = _first_of_least(_squared_distances, x, codebook)
    return nearest_code_of_indices(x, codebook, indices, indices), indices


def nearest_code_of_indices(x: Tensor, codebook: Tensor, *outs: Tensor) -> Tensor:
    distances: Tensor = torch.linalg.vector_norm(_wide(x) - _wide(codebook)[outs[1]], dim=-1)
    return distances


def cosine_nearest_code(x: Tensor, codebook: Tensor) -> Chosen:
    """The least ``1 − cos(x, c_j)`` over j, and its j, of each row of x. A row of zeros has the cosine 0."""
    indices = _first_of_least(_turned_cosines, x, codebook)
    return cosine_nearest_code_of_indices(x, codebook, indices, indices), indices


def cosine_nearest_code_of_indices(x: Tensor, codebook: Tensor, *outs: Tensor) -> Tensor:
    x, chosen = (functional.normalize(_wide(v), dim=-1, eps=SHORTEST) for v in (x, codebook[outs[1]]))
    return 1 - (x * chosen).sum(-1)


def residual_quantize(
    x: Tensor,
    codebooks: Tensor,
    in_weight: Tensor | None,
    in_bias: Tensor | None,
    out_weight: Tensor | None,
    out_bias: Tensor | None,
    normalize: bool,
) -> tuple[Tensor, ...]:
    """``r ← r − W_out e + b_out``, ``e`` the code nearest to ``z = W_in r + b_in``, for each of Q levels, from x on.

    Without weights z is r. With ``normalize`` the nearest code is that of the largest cosine. ``e`` has the gradient of
    z (straight-through), so that the reconstruction, what has been taken from x, has one for x and the weights.

    Returns: the reconstruction; the mean of ``|z − e|²`` over rows and channels for each level, with the gradient of z,
        and once more with that of e; codes ``[..., Q]``.
    """
    args = (x, codebooks, in_weight, in_bias, out_weight, out_bias, normalize)
    left, codes = _wide(x.detach()), []
    for q in range(codebooks.shape[0]):
        z = _projected(left, q, in_weight, in_bias)
        codes.append(_first_of_least(_turned_cosines if normalize else _squared_distances, z, codebooks[q]))
        left = left - _projected(_wide(codebooks[q])[codes[-1]] + (z - z), q, out_weight, out_bias)
    found = torch.stack(codes, -1)
    return *residual_quantize_of_codes(*args, found, found, found, found), found


def residual_quantize_of_codes(
    x: Tensor,
    codebooks: Tensor,
    in_weight: Tensor | None,
    in_bias: Tensor | None,
    out_weight: Tensor | None,
    out_bias: Tensor | None,
    normalize: bool,
    *outs: Tensor,
) -> tuple[Tensor, ...]:
    """All but the codes, from the codes."""
    left, reconstruction, commitment, of_codes = _wide(x), torch.zeros_like(_wide(x)), [], []
    for q, codes in enumerate(outs[3].unbind(-1)):
        z, e = _projected(left, q, in_weight, in_bias), _wide(codebooks[q])[codes]
        commitment.append((z - e.detach()).square().mean())
        of_codes.append((z.detach() - e).square().mean())
        step = _projected(e.detach() + (z - z.detach()), q, out_weight, out_bias)
        left, reconstruction = left - step, reconstruction + step
    return reconstruction.to(x.dtype), torch.stack(commitment), torch.stack(of_codes)


def codes_embedding(tables: Tensor, codes: Tensor, averages: bool) -> Tensor:
    """``Σ_q tables[q, codes[..., q]]``, over Q with ``averages``; codes below 0 or from K on add nothing."""
    levels, count, _ = tables.shape
    is_code = (codes >= 0) & (codes < count)
    rows = _wide(tables).flatten(0, 1)[codes.where(is_code, 0) + count * torch.arange(levels, device=codes.device)]
    total = rows.where(is_code[..., None], 0.0).sum(-2)
    return (total / levels if averages else total).to(tables.dtype)


def code_sums(x: Tensor, codes: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """For each of ``count`` codes the sum of the rows of x that have it, ``[count, D]``, and how many these are."""
    rows, flat = x.reshape(codes.numel(), x.shape[-1]), codes.flatten()
    places = flat.where((flat >= 0) & (flat < count), count)  # what has no code is added up where nobody looks
    sums = torch.zeros(count + 1, rows.shape[1], dtype=torch.float64, device=x.device).index_add(
        0, places, rows.double()
    )
    counts = torch.zeros(count + 1, dtype=torch.int64, device=x.device).index_add(0, places, torch.ones_like(places))
    return sums[:count].to(_wide(x).dtype), counts[:count]


def _projected(rows: Tensor, q: int, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    if weight is None:
        return rows
    return functional.linear(rows, _wide(weight[q]), None if bias is None else _wide(bias[q]))


def _squared_distances(x: Tensor, codebook: Tensor) -> Tensor:
    return (x[:, None] - codebook).square().sum(-1)


def _turned_cosines(x: Tensor, codebook: Tensor) -> Tensor:
    """By their squares times |x|², which of whole numbers have no rounding: equal cosines are then equal."""
    products = (x[:, None] * codebook).sum(-1)
    return -products * products.abs() / codebook.square().sum(-1).clamp_min(SHORTEST * SHORTEST)


def _first_of_least(ranks_of: Callable[[Tensor, Tensor], Tensor], x: Tensor, codebook: Tensor) -> Tensor:
    """So many rows at a time that what is formed of all pairs fits into memory."""
    x, codes = x.detach().double(), codebook.detach().double()
    parts = x.reshape(x.shape[:-1].numel(), x.shape[-1]).split(max(_AT_ONCE // max(codes.numel(), 1), 1))
    found = []
    for part in parts:
        ranks = ranks_of(part, codes)
        least = ranks.masked_fill(ranks.isnan(), torch.inf).amin(1, keepdim=True)
        found.append((ranks == least).int().argmax(1))  # the first of equals; NaN equals nothing
    return torch.cat(found).reshape(x.shape[:-1])


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))
