"""The row-wise companions of attention, forward and backward: merging of partial results, rotary embeddings."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mmkern.reference import attention_rows as reference

from ._checks import (
    Arguments,
    Check,
    accumulation_dtype,
    boolean,
    broadcasts,
    floating_beside,
    floating_rows,
    non_negative_number,
    same_shape,
    trailing,
)
from ._define import define
from ._layouts import dense_last_axis
from ._outputs import like, rows_of


def _parts(outs: Sequence[str], lses: Sequence[str]) -> list[Check]:
    """Outs of one shape and dtype, and for each the log-sum-exp of its rows."""
    of_each = (
        (floating_beside(lse, of=out, accumulates=True), trailing(lse, of=out, drop=1))
        for out, lse in zip(outs, lses, strict=True)
    )
    return [floating_rows(*outs), same_shape(*outs), *(check for checks in of_each for check in checks)]


_merge_attention = define(
    "merge_attention(Tensor out, Tensor lse, Tensor other, Tensor other_lse) -> (Tensor, Tensor)",
    family="attention_rows",
    reference=reference.merge_attention,
    output=(like(0), rows_of(0)),
    requires=_parts(("out", "other"), ("lse", "other_lse")),
    kinds={"out": "grid", "other": "grid", "lse": "row_scalar", "other_lse": "row_scalar"},
    autocast="keep",
)


def merge_attention(outs: Sequence[Tensor], lses: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Attention over all keys from its results over a part of them each: ``out = Σ exp(lse_i − lse) out_i``.

    ``lse = log Σ exp(lse_i)``. A part whose lse is −∞ saw no key: it adds nothing, whatever its out holds. A row that
    no part saw a key for gives 0 and −∞, and no gradient. Of more than two parts each is merged with the result of
    those before it, in the dtype of ``outs``.

    Args:
        outs: one or more of shape ``[..., Dv]``, any strides.
        lses: as many of shape ``[...]``, float32 (float64 beside float64): natural logarithms, as
            ``cross_attention(..., return_lse=True)`` gives them.
    Returns: out ``[..., Dv]`` in the dtype of ``outs`` and lse ``[...]``; both have gradients with respect to all
        ``outs`` and ``lses``.
    Raises: TypeError or ValueError where the parts are not alike, with the name of the one that differs.
    Source: Milakov and Gimelshein 2018, algorithm 3; Dao et al. 2022 (FlashAttention), §3.1.
    """
    name = "merge_attention"
    for argument, parts in (("outs", outs), ("lses", lses)):
        if not isinstance(parts, (tuple, list)):
            raise TypeError(f"{name}: {argument} is {type(parts).__name__}, expected a sequence of Tensors")
    if not outs or len(outs) != len(lses):
        raise ValueError(f"{name}: got {len(outs)} outs and {len(lses)} lses, expected one or more, as many of each")
    named_outs = {f"outs[{i}]": out for i, out in enumerate(outs)}
    named_lses = {f"lses[{i}]": lse for i, lse in enumerate(lses)}
    for check in _parts(tuple(named_outs), tuple(named_lses)):
        check(name, named_outs | named_lses)
    merged, merged_lse = outs[0], lses[0]
    for out, lse in zip(outs[1:], lses[1:], strict=True):
        merged, merged_lse = _merge_attention(merged, merged_lse, out, lse)
    return merged, merged_lse


# ---- Rotary embeddings -----------------------------------------------------------------------------------------------


def _angles(x: str) -> Check:
    """cos and sin of one shape, which broadcasts to the rows of ``x``, for at most all of its channels."""

    def check(op: str, args: Arguments) -> None:
        given, cos = args[x].shape, args["cos"].shape
        if not cos or 2 * cos[-1] > given[-1]:
            raise ValueError(
                f"{op}: cos has shape {list(cos)}, expected a last axis of at most {given[-1] // 2}, one a pair"
            )
        expected = [*given[:-1], cos[-1]]
        if len(cos) > len(given) or not all(map(broadcasts, cos[::-1], expected[::-1])):
            raise ValueError(f"{op}: cos has shape {list(cos)}, expected to broadcast to {expected}")

    return check


def _weight(weight: str, x: str) -> Check:
    def check(op: str, args: Arguments) -> None:
        if args[weight] is not None and args[weight].shape != args[x].shape[-1:]:
            raise ValueError(
                f"{op}: {weight} has shape {list(args[weight].shape)}, expected {list(args[x].shape[-1:])}"
            )

    return check


def _rotary(x: str, weight: str) -> list[Check]:
    return [
        floating_rows(x, axes=2),
        floating_beside(weight, of=x, is_optional=True),
        floating_beside("cos", "sin", of=x),
        _weight(weight, x),
        same_shape("cos", "sin"),
        _angles(x),
        non_negative_number("eps"),
        boolean("interleaved"),
    ]


def _arrange(args: Arguments) -> Arguments:
    """cos and sin for every row of x, expanded; they and the weight in the dtype of the sums."""
    x = args["x"]
    wide = accumulation_dtype(x.dtype)
    for name in ("cos", "sin"):
        given = args[name]
        args[name] = dense_last_axis(given.to(wide)).expand(*x.shape[:-1], given.shape[-1])
    if args["weight"] is not None:
        args["weight"] = args["weight"].to(wide)
    return args


_rotary_embedding = define(
    "rotary_embedding(Tensor x, Tensor? weight, Tensor cos, Tensor sin, float eps, bool normalize, bool interleaved) "
    "-> Tensor",
    family="attention_rows",
    reference=reference.rotary_embedding,
    output=like(0),
    requires=_rotary("x", "weight"),
    kinds={"x": "grid", "weight": "grid", "cos": "fixed", "sin": "fixed"},
    arrange=_arrange,
    autocast="keep",
    is_checked_by_signature=False,
)


def _rotated(x: Tensor, weight: Tensor | None, cos: Tensor, sin: Tensor, *options: Any) -> Tensor:
    args = (x, weight, cos, sin, *options)
    if torch.is_grad_enabled() and any(isinstance(angle, Tensor) and angle.requires_grad for angle in (cos, sin)):
        found: Tensor = reference.rotary_embedding(*_rotary_embedding._prepare(args))
        return found
    return _rotary_embedding(*args)


def rotary_embedding(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool = False) -> Tensor:
    """Rotate pairs of channels by the angle of their row: ``(a, b) → (a cos − b sin, a sin + b cos)``.

    Args:
        x: ``[..., L, D]``, such as ``[B, H, L, D]``, any strides.
        cos, sin: ``[L, R/2]``, or what broadcasts to ``[..., L, R/2]`` (positions of each of a batch:
            ``[B, 1, L, R/2]``), one angle a pair, of any floating dtype: computed in float32 (float64 for float64).
            Channels from R on pass through. Where one of them needs a gradient, the call runs in PyTorch.
        interleaved: pairs are the channels (2i, 2i + 1), as in GPT-J; else (i, i + R/2), as in GPT-NeoX and Llama.
    Returns: ``[..., L, D]`` in the dtype of ``x``.
    Raises: TypeError or ValueError where an argument does not fit, with its name.
    Source: Su et al. 2021 (RoFormer), eq. 34.
    """
    return _rotated(x, None, cos, sin, 0.0, False, interleaved)


def qk_norm_rotary(
    q: Tensor,
    k: Tensor,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    eps: float = 1e-6,
    interleaved: bool = False,
) -> tuple[Tensor, Tensor]:
    """Root-mean-square norm of each head of queries and keys, then :func:`rotary_embedding`; each in one pass.

    ``rotate(q / √(mean(q²) + eps) · q_weight)`` with the mean over the last axis, and the same of k.

    Args:
        q: ``[..., L, D]``, such as ``[B, Hq, L, D]``, any strides.
        k: ``[..., L, D]``; its heads may be others than those of q.
        q_weight, k_weight: ``[D]`` of any floating dtype, or None for ones.
        cos, sin: as in :func:`rotary_embedding`; they broadcast to the rows of q and to those of k.
        eps: added to the mean square, in units of q².
        interleaved: as in :func:`rotary_embedding`.
    Returns: the new q and k, in the dtypes that they came in.
    Raises: TypeError or ValueError where an argument does not fit, with its name.
    Source: Zhang and Sennrich 2019, eq. 4; Su et al. 2021 (RoFormer), eq. 34.
    """
    name = "qk_norm_rotary"
    given = {"q": q, "k": k, "q_weight": q_weight, "k_weight": k_weight, "cos": cos, "sin": sin}
    for check in (*_rotary("q", "q_weight"), *_rotary("k", "k_weight")):
        check(name, given | {"eps": eps, "interleaved": interleaved})
    return (
        _rotated(q, q_weight, cos, sin, eps, True, interleaved),
        _rotated(k, k_weight, cos, sin, eps, True, interleaved),
    )
