"""From vectors to codes of codebooks, and back: the nearest code without the matrix of distances, level by level."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from mmkern.reference import quantization as reference

from ._checks import Arguments, check_tensor, floating_rows
from ._define import Op, define, named
from ._outputs import indices, like, rows_of, summed

Metric = Literal["l2", "cosine"]
_INTEGERS = (torch.int64, torch.int32, torch.int16, torch.uint8, torch.int8)


class Projections(NamedTuple):
    """The linear layers of each level, to the width of its codes and back."""

    in_weight: Tensor  # [Q, d, D]
    out_weight: Tensor  # [Q, D, d]
    in_bias: Tensor | None = None  # [Q, d]
    out_bias: Tensor | None = None  # [Q, D]


# ---- One level -------------------------------------------------------------------------------------------------------


def _check_codebook(op: str, args: Arguments) -> None:
    got, width = list(args["codebook"].shape), args["x"].shape[-1]
    if len(got) != 2 or got[0] == 0 or got[1] != width:
        raise ValueError(f"{op}: codebook has shape {got}, expected [K, {width}] with K of at least 1")


def _nearest(name: str) -> Op:
    return define(
        f"{name}(Tensor x, Tensor codebook) -> (Tensor, Tensor)",
        family="quantization",
        reference=getattr(reference, name),
        from_indices=getattr(reference, f"{name}_of_indices"),
        output=(summed(rows_of(0)), indices(rows_of(0))),
        requires=[floating_rows("x", "codebook"), _check_codebook],
        kinds=dict.fromkeys(("x", "codebook"), "matrix"),
        differentiable=1,
    )


_NEAREST = {"l2": _nearest("nearest_code"), "cosine": _nearest("cosine_nearest_code")}


def nearest_code(
    x: Tensor, codebook: Tensor, metric: Metric = "l2", *, return_distance: bool = False
) -> Tensor | tuple[Tensor, Tensor]:
    """The nearest row of a codebook: ``argmin_j |x − c_j|``, or ``1 − cos(x, c_j)``, without the N x K matrix.

    The index is that of the distances in float64, whatever the dtype, and the lowest one of equals. NaN counts as the
    largest distance: a code with NaN is chosen only where all have it, and a row of x with NaN gets code 0.

    Args:
        x: ``[..., D]``.
        codebook: ``[K, D]``, of the dtype of x; K of at least 1.
        metric: "l2" or "cosine" (a row of zeros has the cosine 0).
        return_distance: return the distances too.
    Returns: int64 ``[...]``; with ``return_distance`` also ``[...]`` in float32 (float64 beside that), which has a
        gradient for x and codebook.
    Raises: TypeError or ValueError where an argument does not fit, with its name.
    Source: van den Oord et al. 2017, Neural Discrete Representation Learning, eq. 1; cosine: Yu et al. 2022,
        Vector-quantized Image Modeling with Improved VQGAN, §3.2.
    """
    if metric not in _NEAREST:
        raise ValueError(f"nearest_code: metric is {metric!r}, expected {', '.join(map(repr, _NEAREST))}")
    raw = _NEAREST[metric]
    distances, codes = named("nearest_code", raw, raw, x, codebook)
    return (codes, distances) if return_distance else codes


# ---- Levels that quantize what is left -------------------------------------------------------------------------------


def _check_levels(op: str, args: Arguments) -> None:
    x, codebooks = args["x"], args["codebooks"]
    got, width = list(codebooks.shape), x.shape[-1]
    has_projections = args["in_weight"] is not None
    narrow = "d" if has_projections else width
    if len(got) != 3 or 0 in got[:2] or (not has_projections and got[2] != width):
        raise ValueError(f"{op}: codebooks has shape {got}, expected [Q, K, {narrow}] with Q and K of at least 1")
    levels, _, of_codes = got
    shapes = {
        "in_weight": (levels, of_codes, width),
        "in_bias": (levels, of_codes),
        "out_weight": (levels, width, of_codes),
        "out_bias": (levels, width),
    }
    for name, shape in shapes.items():
        check_tensor(op, name, args[name], x, (x.dtype,), shape, "x")


def _of_levels(args: Any) -> tuple[int, ...]:
    return (args[1].shape[0],)


_residual_quantize = define(
    "residual_quantize(Tensor x, Tensor codebooks, Tensor? in_weight, Tensor? in_bias, Tensor? out_weight, "
    "Tensor? out_bias, bool normalize) -> (Tensor, Tensor, Tensor, Tensor)",
    family="quantization",
    reference=reference.residual_quantize,
    from_indices=reference.residual_quantize_of_codes,
    output=(
        like(0),
        summed(_of_levels),
        summed(_of_levels),
        indices(lambda args: (*args[0].shape[:-1], args[1].shape[0])),
    ),
    requires=[floating_rows("x", "codebooks"), _check_levels],
    kinds=dict.fromkeys(("x", "codebooks", "in_weight", "in_bias", "out_weight", "out_bias"), "matrix"),
    differentiable=3,
    is_checked_by_signature=False,
)


def residual_quantize(
    x: Tensor,
    codebooks: Tensor,
    projections: Projections | tuple[Tensor, Tensor] | None = None,
    normalize: bool = False,
    *,
    return_codebook_loss: bool = False,
) -> tuple[Tensor, ...]:
    """Codes of what is left, level by level: ``r ← r − (W_out e + b_out)``, e the code nearest to ``W_in r + b_in``.

    ``r`` begins as x. Without projections it is held against the codes itself: ``r ← r − e``. Which code is nearest is
    told as by ``nearest_code``, of what is left in float32: only products with weights can differ between backends.

    Args:
        x: ``[..., D]``.
        codebooks: ``[Q, K, d]``, of the dtype of x; d is D without projections.
        projections: in_weight ``[Q, d, D]``, out_weight ``[Q, D, d]``, in_bias ``[Q, d]`` or None, out_bias ``[Q, D]``
            or None, of the dtype of x; or None.
        normalize: choose the code of the largest cosine. What is taken from r is the code as it is in any case.
        return_codebook_loss: return the loss that teaches the codes too.
    Returns: codes, int64 ``[..., Q]``; the reconstruction ``Σ_q (W_out e + b_out)``, like x; the commitment loss, the
        mean of ``|z − e|²`` over rows and the d channels, ``[Q]`` in float32 (float64 beside that), which has the
        gradient of ``z = W_in r + b_in``; with ``return_codebook_loss`` the same numbers with the gradient of e. The
        reconstruction has that of z in place of e (straight-through): without projections that of x.
    Raises: TypeError or ValueError where an argument does not fit, with its name.
    Source: Zeghidour et al. 2021, SoundStream, algorithm 1; projections: Kumar et al. 2023, High-Fidelity Audio
        Compression with Improved RVQGAN, §3.2.
    """
    op = "residual_quantize"
    given = _layers(op, projections)
    if not isinstance(normalize, bool):
        raise TypeError(f"{op}: normalize is {type(normalize).__name__}, expected a bool")
    args = (x, codebooks, given.in_weight, given.in_bias, given.out_weight, given.out_bias, normalize)
    reconstruction, commitment, of_codes, codes = named(op, _residual_quantize, _residual_quantize, *args)
    return (
        (codes, reconstruction, commitment, of_codes) if return_codebook_loss else (codes, reconstruction, commitment)
    )


class _Layers(NamedTuple):
    in_weight: Tensor | None
    out_weight: Tensor | None
    in_bias: Tensor | None = None
    out_bias: Tensor | None = None


def _layers(op: str, projections: Any) -> _Layers:
    if projections is None:
        return _Layers(None, None)
    if not isinstance(projections, tuple) or len(projections) not in (2, 4):
        kind = f"{len(projections)} entries" if isinstance(projections, tuple) else type(projections).__name__
        raise TypeError(f"{op}: projections is {kind}, expected (in_weight, out_weight) or Projections")
    for name, weight in zip(("in_weight", "out_weight"), projections, strict=False):
        if not isinstance(weight, Tensor):
            raise TypeError(f"{op}: {name} is {type(weight).__name__}, expected a Tensor")
    return _Layers(*projections)


def residual_dequantize(
    codes: Tensor, codebooks: Tensor, projections: Projections | tuple[Tensor, Tensor] | None = None
) -> Tensor:
    """The vectors that codes stand for: ``Σ_q (W_out e_q + b_out)``, or ``Σ_q e_q`` without projections.

    Args:
        codes: integers ``[..., n]``, of the first n levels, up to Q. A code below 0 or from K on is none: its level
            adds nothing.
        codebooks: ``[Q, K, d]``.
        projections: as in ``residual_quantize``.
    Returns: ``[..., D]`` in the dtype of codebooks, which has a gradient for codebooks and out_weight and out_bias.
    Raises: TypeError or ValueError where an argument does not fit, with its name.
    Source: as ``residual_quantize``.
    """
    op = "residual_dequantize"
    layers = _layers(op, projections)
    floating_rows("codebooks", axes=3)(op, {"codebooks": codebooks})
    if codebooks.dim() != 3 or 0 in codebooks.shape[:2]:
        got = list(codebooks.shape)
        raise ValueError(f"{op}: codebooks has shape {got}, expected [Q, K, d] with Q and K of at least 1")
    levels, count, width = codebooks.shape
    codes = _integers(op, "codes", codes, codebooks, "codebooks")
    if codes.dim() == 0 or not 1 <= codes.shape[-1] <= levels:
        raise ValueError(f"{op}: codes has shape {list(codes.shape)}, expected [..., n] with n from 1 to {levels}")
    used = codes.shape[-1]
    if layers.out_weight is None:
        return _codes_embedding(codebooks[:used], codes, False)
    wide = layers.out_weight.shape[1] if layers.out_weight.dim() == 3 else width
    shapes: dict[str, tuple[int, ...]] = {"out_weight": (levels, wide, width), "out_bias": (levels, wide)}
    for name, shape in shapes.items():
        check_tensor(op, name, getattr(layers, name), codebooks, (codebooks.dtype,), shape, "codebooks")
    is_code = (codes >= 0) & (codes < count)
    places = codes.where(is_code, 0) + count * torch.arange(used, device=codes.device)
    chosen = codebooks.flatten(0, 1)[places].where(is_code[..., None], 0.0)
    out = chosen.flatten(-2) @ layers.out_weight[:used].transpose(1, 2).flatten(0, 1)
    return out if layers.out_bias is None else out + is_code.to(out.dtype) @ layers.out_bias[:used]


# ---- Tables and sums -------------------------------------------------------------------------------------------------


def _check_codes(op: str, args: Arguments) -> None:
    tables, codes = args["tables"], args["codes"]
    if tables.dim() != 3 or tables.shape[0] == 0:
        raise ValueError(f"{op}: tables has shape {list(tables.shape)}, expected [Q, K, C] with Q of at least 1")
    check_tensor(op, "codes", codes, tables, (torch.int64,), None, "tables")
    if codes.dim() == 0 or codes.shape[-1] != tables.shape[0]:
        raise ValueError(f"{op}: codes has shape {list(codes.shape)}, expected [..., {tables.shape[0]}]")


def _dense_codes(args: Arguments) -> Arguments:
    args["codes"] = args["codes"].contiguous()
    return args


_codes_embedding = define(
    "codes_embedding(Tensor tables, Tensor codes, bool averages) -> Tensor",
    family="quantization",
    reference=reference.codes_embedding,
    output=lambda args: (*args[1].shape[:-1], args[0].shape[2]),
    requires=[floating_rows("tables"), _check_codes],
    kinds={"tables": "matrix", "codes": "fixed"},
    arrange=_dense_codes,
    autocast="keep",
)


def codes_embedding_mean(codes: Tensor, tables: Tensor) -> Tensor:
    """The mean of an embedding for each level: ``1/Q Σ_q tables[q, codes[..., q]]``, in one pass.

    Args:
        codes: integers ``[..., Q]``. A code below 0 or from K on adds zeros to the mean.
        tables: ``[Q, K, C]``.
    Returns: ``[..., C]`` in the dtype of tables, which has a gradient for them.
    Raises: TypeError or ValueError where an argument does not fit, with its name.
    Source: the embedding of RVQ tokens as in SoundStorm (Borsos et al. 2023, §3.2), averaged.
    """
    op = "codes_embedding_mean"
    floating_rows("tables")(op, {"tables": tables})
    codes = _integers(op, "codes", codes, tables, "tables")
    found: Tensor = named(op, _codes_embedding, _codes_embedding, tables, codes, True)
    return found


def _integers(op: str, name: str, x: Any, beside: Tensor, of: str) -> Tensor:
    """In int64."""
    if x is None:
        raise TypeError(f"{op}: {name} is NoneType, expected a Tensor")
    check_tensor(op, name, x, beside, _INTEGERS, None, of)
    codes: Tensor = x.long()
    return codes


def _check_code_sums(op: str, args: Arguments) -> None:
    x, codes, count = args["x"], args["codes"], args["count"]
    check_tensor(op, "codes", codes, x, (torch.int64,), tuple(x.shape[:-1]), "x")
    if not isinstance(count, int) or isinstance(count, bool) or count < 1:
        raise ValueError(f"{op}: count is {count}, expected an int of at least 1")


_code_sums = define(
    "code_sums(Tensor x, Tensor codes, int count) -> (Tensor, Tensor)",
    family="quantization",
    reference=reference.code_sums,
    output=(summed(lambda args: (args[2], args[0].shape[-1])), indices(lambda args: (args[2],))),
    requires=[floating_rows("x"), _check_code_sums],
    kinds={"x": "matrix", "codes": "fixed"},
    arrange=_dense_codes,
    differentiable=1,
    autocast="keep",
    is_checked_by_signature=False,
)
