"""EgoNCE: clips and texts that share a verb and a noun belong together too."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor
from torch.nn import functional

from ._checks import check_tensor, positive
from ._contrastive import check_pairs, labelled_pairwise_logsumexp, log_sums, losses_of, of_equal_length, reduced
from .hyperbolic import Reduction

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

_WORD = 64
_GATHER = sum(1 << 7 * k for k in range(1, 9))


def pack_labels(multi_hot: Tensor) -> Tensor:
    """Sets of labels as bits: label v is bit ``v mod 64`` of word ``v div 64``.

    Args:
        multi_hot: ``[N, V]`` bool, True where row n has label v.
    Returns: ``[N, ⌈V/64⌉]`` int64.
    Raises: TypeError or ValueError where ``multi_hot`` is none.
    """
    op = "pack_labels"
    if not isinstance(multi_hot, Tensor):
        raise TypeError(f"{op}: multi_hot is {type(multi_hot).__name__}, expected a Tensor")
    check_tensor(op, "multi_hot", multi_hot, multi_hot, (torch.bool,), None)
    if multi_hot.dim() != 2:
        raise ValueError(f"{op}: multi_hot has shape {list(multi_hot.shape)}, expected [N, V]")
    n, labels = multi_hot.shape
    eights = functional.pad(multi_hot, (0, -labels % _WORD)).flatten().view(torch.int64)
    # Each byte is 0 or 1: byte k of eight comes to bit k of the product's last byte, and nothing is carried.
    words = (eights * _GATHER >> 56).to(torch.uint8).view(torch.int64)
    return words.view(n, -(-labels // _WORD))


def _packed(op: str, name: str, labels: Any, x: Tensor) -> Tensor:
    if not isinstance(labels, Tensor):
        raise TypeError(f"{op}: {name} is {type(labels).__name__}, expected a Tensor")
    if labels.dim() != 2 or labels.shape[0] != x.shape[0]:
        raise ValueError(f"{op}: {name} has shape {list(labels.shape)}, expected [{x.shape[0]}, labels or words]")
    check_tensor(op, name, labels, x, (torch.bool, torch.int64), None, "x")
    return pack_labels(labels) if labels.dtype == torch.bool else labels


def ego_nce_loss(
    x: Tensor,
    y: Tensor,
    temperature: float | Tensor,
    verbs: Tensor,
    nouns: Tensor,
    *,
    form: Literal["inside", "outside"] = "inside",
    normalize: bool = False,
    reduction: Reduction = "mean",
    group: ProcessGroup | None = None,
) -> Tensor:
    """EgoNCE: ``½ (−log Σ_{j in P_i} softmax_j s_ij − log Σ_{j in P_i} softmax_j s_ji)``, ``s = x yᵀ / temperature``.

    P_i are i itself and all j with at least one verb and one noun of i. They are found as scores are formed: no mask of
    all pairs is in memory.

    Args:
        x, y: ``[N, D]``, of one dtype; rows of one index belong together.
        temperature: what the scores are divided by, above 0; 0.05 in EgoVLP, 0.07 in HelpingHands. A float or a 0-d
            tensor, which may need a gradient.
        verbs, nouns: of each pair of rows, by dtype: bool is multi-hot, ``[N, V]``, with V of verbs and of nouns each
            its own; int64 is packed, ``[N, W]``, as ``pack_labels`` does.
        form: of several positives, "inside" sums the softmax up inside the logarithm: EgoNCE. "outside" takes the mean
            of log softmax over them, ``−1/|P_i| Σ_{j in P_i} log softmax_j s_ij``: HelpingHands.
        normalize: divide the rows by their length first.
        reduction: "mean", "sum" or "none".
        group: processes that hold the batch together, each some rows of x with those of y, verbs and nouns that belong
            to them. "mean" and "sum" are over all rows, "none" gives the losses of its own. Gradients of x and y are
            whole, that of the temperature is a part: as in ``info_nce_loss``.
    Returns: 0-d, or ``[N]`` with "none"; float32, or float64 for that. Half of each direction, as in CLIP; the release
        of EgoVLP adds them up, which is twice as much. No second derivative.
    Raises: TypeError or ValueError where an argument does not fit, with its name.
    Source: Lin et al. 2022 (EgoVLP), eq. 5; "outside" and "inside" as in Khosla et al. 2020, eqs. 2 and 3.
    """
    op = "ego_nce_loss"
    check_pairs(op, x, y, reduction)
    positive("temperature", beside="x")(op, {"x": x, "temperature": temperature})
    if form not in ("inside", "outside"):
        raise ValueError(f'{op}: form is {form!r}, expected "inside" or "outside"')
    words = [_packed(op, name, given, x) for name, given in (("verbs", verbs), ("nouns", nouns))]
    factor = 1.0
    if normalize:
        x, y, factor = of_equal_length(x, y)
    labels, widths = torch.cat(words, 1), [part.shape[1] for part in words]
    raw, pairs = labelled_pairwise_logsumexp, (labels, labels, widths[0])
    shards, found = log_sums(op, raw, x, y, factor / temperature, pairs=pairs, words=widths, group=group)
    rows, cols, positive_rows, positive_cols, row_sums, col_sums, row_counts, col_counts = found
    losses = losses_of(rows, cols, positive_rows, positive_cols)
    if form == "outside":
        losses = losses + 0.5 * (positive_rows - row_sums / row_counts + positive_cols - col_sums / col_counts)
    return reduced(losses, reduction, shards)
