"""What contrastive losses share: log-sum-exps of all pairs, as ops, alone or over a group of processes.

Which pairs are positive, and which count at all, the ops are told in three ways: by a mask, by labels of the rows, or
by rows that are to be forgotten.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional

from mmkern.reference import contrastive as reference

from ._checks import Arguments, Check, check_tensor, floating_rows, matrices, positive, scalar
from ._define import Kind, Op, define, named, needs_gradient
from ._layouts import dense_rows
from ._outputs import summed
from .hyperbolic import Reduction
from .modulation import rms_norm

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

    from mmkern.distributed.contrastive import Shards

_ROWS = summed(lambda args: (args[0].shape[0],))
_COLS = summed(lambda args: (args[1].shape[0],))
_PRODUCTS = summed(lambda args: (args[0].shape[0], args[1].shape[0]) if args[-1] else (0, 0))

# Up to so many pairs their products are kept from forward to backward, 1 MB of floats: forming them again would be a
# fourth of the work.
_KEPT_PAIRS = 1 << 18
_SHORTEST = 1e-12  # rows, below which they are not made longer


def _check_positive_mask(op: str, args: Arguments) -> None:
    x, y = args["x"], args["y"]
    check_tensor(op, "positive_mask", args["positive_mask"], x, (torch.bool,), (x.shape[0], y.shape[0]), "x")


def _of_each_row(names: tuple[str, str], dtype: torch.dtype, axes: int) -> Check:
    """Of x and of y, a tensor each."""

    def check(op: str, args: Arguments) -> None:
        for name, rows in zip(names, ("x", "y"), strict=True):
            x = args[name]
            if x is None:
                raise TypeError(f"{op}: {name} is NoneType, expected a Tensor")
            check_tensor(op, name, x, args[rows], (dtype,), None, rows)
            if x.dim() != axes or x.shape != (args[rows].shape[0], *args[names[0]].shape[1:]):
                expected = ", ".join([str(args[rows].shape[0]), *("words" for _ in range(axes - 1))])
                raise ValueError(f"{op}: {name} has shape {list(x.shape)}, expected [{expected}]")

    return check


def _check_first_words(op: str, args: Arguments) -> None:
    words = args["x_labels"].shape[1]
    if not 0 <= args["first_words"] <= words:
        raise ValueError(f"{op}: first_words is {args['first_words']}, expected 0 to {words}")


def _logsumexp(
    name: str,
    pairs: str,
    checks: Sequence[Check],
    *,
    curved: bool = False,
    sums: int = 0,
    counts: int = 0,
) -> Op:
    """``pairs``: the arguments that say which pairs are which.

    After log-sum-exps over rows and over columns come so many plain ``sums``, which have a gradient, and ``counts``.
    """
    curvature, curvature_check = ("Tensor curvature, ", [positive("curvature", beside="x")]) if curved else ("", [])
    tensors = [part.split()[-1] for part in pairs.split(", ") if part.startswith("Tensor")]
    outputs = (*(_ROWS, _COLS) * ((4 + sums + counts) // 2), _PRODUCTS)

    def arrange(args: Arguments) -> Arguments:
        return args | {name: dense_rows(args[name]) for name in tensors if args[name] is not None}

    kinds: dict[str, Kind] = {"curvature": "scalar", "logit_scale": "scalar", **dict.fromkeys(tensors, "fixed")}
    return define(
        f"{name}(Tensor x, Tensor y, {curvature}Tensor logit_scale, {pairs}, bool positive_diagonal, "
        f"bool keeps_products) -> ({', '.join(['Tensor'] * len(outputs))})",
        family="contrastive",
        reference=getattr(reference, name),
        output=outputs,
        requires=[
            floating_rows("x", "y", axes=2),
            matrices("x", "y"),
            *curvature_check,
            scalar("logit_scale", beside="x"),
            *checks,
        ],
        kinds=kinds,
        arrange=arrange,
        second_derivative=False,
        backward_reads_outputs=True,
        differentiable=4 + sums,
        is_checked_by_signature=False,
    )


_MASK = "Tensor? positive_mask", [_check_positive_mask]
_LABELS = (
    "Tensor x_labels, Tensor y_labels, int first_words",
    [_of_each_row(("x_labels", "y_labels"), torch.int64, axes=2), _check_first_words],
)
_FORGOTTEN = (
    "Tensor x_forgotten, Tensor y_forgotten",
    [_of_each_row(("x_forgotten", "y_forgotten"), torch.bool, axes=1)],
)
pairwise_logsumexp = _logsumexp("pairwise_logsumexp", *_MASK)
lorentz_pairwise_logsumexp = _logsumexp("lorentz_pairwise_logsumexp", *_MASK, curved=True)
labelled_pairwise_logsumexp = _logsumexp("labelled_pairwise_logsumexp", *_LABELS, sums=2, counts=2)
retained_pairwise_logsumexp = _logsumexp("retained_pairwise_logsumexp", *_FORGOTTEN, sums=2)
lorentz_retained_pairwise_logsumexp = _logsumexp(
    "lorentz_retained_pairwise_logsumexp", *_FORGOTTEN, curved=True, sums=2
)


def log_sums(
    op: str,
    raw: Op,
    x: Tensor,
    y: Tensor,
    *numbers: Any,
    pairs: tuple[Any, ...],
    diagonal: bool = True,
    words: Sequence[int] = (),
    group: ProcessGroup | None,
) -> tuple[Shards | None, Sequence[Tensor]]:
    """What ``raw`` finds over rows and columns of the whole batch: of pairs not positive, of those that are, ...

    Args:
        op: the public function.
        numbers: the curvature, if there is one, and the scale.
        pairs: what tells ``raw`` which pairs are which.
        diagonal: rows of one index belong together.
        words: how many words labels have, of which all processes have as many.
    """
    if group is None:
        keeps = keeps_products(x, y, *numbers)
        return None, named(op, raw, raw, x, y, *numbers, *pairs, diagonal, keeps)[:-1]
    args = named(op, raw, raw._prepare, (x, y, *numbers, *pairs, diagonal, False))
    shards = join(op, group, *args[: 2 + len(numbers)], words=words)
    return shards, shards.log_sums(raw, *args)


def keeps_products(x: Tensor, y: Tensor, *others: Any) -> bool:
    return x.shape[0] * y.shape[0] <= _KEPT_PAIRS and needs_gradient(x, y, *others)


def check_pairs(op: str, x: Any, y: Any, reduction: str) -> None:
    floating_rows("x", "y", axes=2)(op, {"x": x, "y": y})
    if x.shape != y.shape or x.dim() != 2:
        raise ValueError(f"{op}: y has shape {list(y.shape)}, expected [N, D] as x, whose shape is {list(x.shape)}")
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f'{op}: reduction is {reduction!r}, expected "mean", "sum" or "none"')


def join(op: str, group: ProcessGroup, x: Tensor, y: Tensor, *numbers: Any, words: Sequence[int] = ()) -> Shards:
    from mmkern.distributed import contrastive  # with what joins processes, which one alone is spared

    return contrastive.join(op, group, x, y, *numbers, words=words)


def losses_of(rows: Tensor, cols: Tensor, positive_rows: Tensor, positive_cols: Tensor) -> Tensor:
    """Half of ``log(e^others + e^positive) − positive`` of either direction."""
    return -0.5 * (functional.logsigmoid(positive_rows - rows) + functional.logsigmoid(positive_cols - cols))


def reduced(losses: Tensor, reduction: Reduction, shards: Shards | None) -> Tensor:
    if reduction == "none":
        return losses
    if shards is not None:
        total = shards.total(losses.sum())
        return total / shards.rows if reduction == "mean" else total
    return losses.mean() if reduction == "mean" else losses.sum()


def of_equal_length(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor, float]:
    """Rows of length √D, and what makes cosines of their products: one pass over a row, and one over its gradient.

    Rows of 0 stay 0, as of ``functional.normalize``.
    """
    width = max(x.shape[1], 1)
    return *(rms_norm(z, eps=_SHORTEST**2 / width) for z in (x, y)), 1 / width


def wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))
