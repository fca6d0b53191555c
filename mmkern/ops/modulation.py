"""Norms of the last axis and their modulation, in one pass over memory."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from mmkern.reference import modulation as reference

from ._checks import (
    FLOATING,
    LARGEST,
    Arguments,
    accumulation_dtype,
    boolean,
    broadcasts,
    check_number,
    check_tensor,
    floating_beside,
    floating_rows,
    same_shape,
)
from ._define import define
from ._outputs import like

_AFFINE = ("weight", "bias")
_MODULATORS = ("gate", "scale", "shift", "frame_scale")


def _check_modulators(op: str, args: Arguments) -> None:
    """Weights are ``[C]``; the others broadcast to x, and two axes are those of the batch and the channels."""
    x = args["x"]
    floating_beside(*(name for name in (*_AFFINE, *_MODULATORS) if name in args), of="x", is_optional=True)(op, args)
    for name in _AFFINE:
        check_tensor(op, name, args[name], x, FLOATING, x.shape[-1:], "x")
    for name in _MODULATORS:
        given = args.get(name)
        if given is None:
            continue
        full = [*x.shape[:-1], 1 if name == "frame_scale" else x.shape[-1]]
        placed = _of_all_axes(given, x).shape
        fits = len(placed) == x.dim() and placed[-1] == full[-1]
        if not fits or not all(map(broadcasts, placed, full)):
            raise ValueError(f"{op}: {name} has shape {list(given.shape)}, expected to broadcast to {full}")
    check_number(op, "eps", args["eps"], "a number of at least 0", 0.0, LARGEST)


def _of_all_axes(given: Tensor, x: Tensor) -> Tensor:
    """``[C]`` and ``[B, C]`` with the axes of x between."""
    missing = x.dim() - given.dim()
    if missing <= 0 or given.dim() == 0:
        return given
    first = given.shape[:1] if given.dim() == 2 else ()
    return given.reshape(*first, *[1] * missing, *given.shape[len(first) :])


def _shared_inside(given: Tensor, x: Tensor) -> Tensor:
    """Expanded so that rows that share one of it are neighbours: only axes after its last full one have the size 1."""
    full = [axis for axis in range(x.dim() - 1) if given.shape[axis] > 1]
    outer = full[-1] if full else 0
    return given.expand(*x.shape[:outer], *given.shape[outer:])


def _arrange(args: Arguments) -> Arguments:
    x = args["x"]
    wide = accumulation_dtype(x.dtype)
    for name in _AFFINE:
        if args[name] is not None:
            args[name] = args[name].to(wide).contiguous()
    for name in _MODULATORS:
        if args.get(name) is not None:
            args[name] = _shared_inside(_of_all_axes(args[name], x).to(wide), x)
    args["scale"], args["shift"] = _alike(args["scale"], args["shift"])
    return args


def _define(name: str, lead: str, outputs: Any, meaning: Any) -> Any:
    given = ["x", *(["residual"] if "residual" in lead else [])]
    return define(
        f"{name}({lead}, Tensor? weight, Tensor? bias, Tensor? scale, Tensor? shift, Tensor? frame_scale, float eps, "
        f"bool centered) -> {'(Tensor, Tensor)' if len(outputs) == 2 else 'Tensor'}",
        family="modulation",
        reference=meaning,
        output=outputs,
        requires=[floating_rows(*given), same_shape(*given), _check_modulators, boolean("centered")],
        kinds=dict.fromkeys((*given, *_AFFINE, *_MODULATORS), "grid"),
        arrange=_arrange,
        autocast="keep",
    )


_ada_layer_norm = _define("ada_layer_norm", "Tensor x", (like(0),), reference.ada_layer_norm)
_residual_ada_layer_norm = _define(
    "residual_ada_layer_norm",
    "Tensor x, Tensor residual, Tensor? gate",
    (like(0), like(0)),
    reference.residual_ada_layer_norm,
)


def _normalized(x: Tensor, residual: Tensor | None, gate: Tensor | None, *args: Any) -> Any:
    weight, bias, scale, shift, *others = args
    scale, shift = _alike(_placed(scale, x), _placed(shift, x))
    if residual is None:
        return _ada_layer_norm(x, weight, bias, scale, shift, *others)
    return _residual_ada_layer_norm(x, residual, _placed(gate, x), weight, bias, scale, shift, *others)


def _placed(given: Any, x: Any) -> Any:
    """``[B, C]`` with the axes of x, as kernels take it. What does not fit goes on to the op's checks."""
    if not isinstance(given, Tensor) or not isinstance(x, Tensor) or given.dim() != 2 or x.dim() <= 2:
        return given
    fits = broadcasts(given.shape[0], x.shape[0]) and given.shape[1] == x.shape[-1]
    return _of_all_axes(given, x) if fits else given


def _alike(scale: Any, shift: Any) -> tuple[Any, Any]:
    """Of one shape, so that both are shared by the same rows."""
    if not isinstance(scale, Tensor) or not isinstance(shift, Tensor) or scale.shape == shift.shape:
        return scale, shift
    sizes = zip(scale.shape, shift.shape, strict=False)
    fits = scale.dim() == shift.dim() and all(broadcasts(a, b) or b == 1 for a, b in sizes)
    return torch.broadcast_tensors(scale, shift) if fits else (scale, shift)


def ada_layer_norm(
    x: Tensor,
    *,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    gate: Tensor | None = None,
    residual: Tensor | None = None,
    eps: float = 1e-6,
    norm: Literal["layer", "rms"] = "layer",
    weight: Tensor | None = None,
    bias: Tensor | None = None,
) -> Any:
    """Adaptive layer norm: ``y = (n·weight + bias)·(1 + scale) + shift`` with ``n = (x − mean) / √(var + eps)``.

    With ``residual`` first ``r = residual + gate·x``, whose norm y is then: what stands between two halves of a block
    of a diffusion transformer, in one pass. All have gradients; those of scale, shift, gate, weight and bias are summed
    over the rows that share them.

    Args:
        x: ``[..., C]``, such as ``[B, L, C]``, any strides.
        scale, shift, gate: ``[B, C]``, or what broadcasts to x, of any floating dtype: computed in float32 (float64
            for float64), and never expanded in memory.
        residual: of the shape and dtype of x.
        eps: added to the variance, in units of x².
        norm: "rms" takes no mean off: ``n = x / √(mean(x²) + eps)``.
        weight, bias: ``[C]``.
    Returns: y in the dtype of x; with ``residual`` y and r.
    Raises: TypeError or ValueError where an argument does not fit, with its name.
    Source: Peebles and Xie 2023 (DiT), §3.2.
    """
    name = "ada_layer_norm"
    if norm not in ("layer", "rms"):
        raise ValueError(f"{name}: norm is {norm!r}, expected 'layer' or 'rms'")
    if gate is not None and residual is None:
        raise ValueError(f"{name}: gate came without residual, expected both")
    return _normalized(x, residual, gate, weight, bias, scale, shift, None, eps, norm == "layer")


def dual_ada_layer_norm(
    x: Tensor,
    channel_scale: Tensor,
    channel_shift: Tensor,
    frame_scale: Tensor,
    frames_per_scale: int,
    *,
    eps: float = 1e-6,
) -> Tensor:
    """Adaptive layer norm along channels and time: ``y = f·(n·(1 + channel_scale) + channel_shift)``.

    Row t of x has ``f = frame_scale[t // frames_per_scale]``.

    Args:
        x: ``[B, L, C]``, any strides.
        channel_scale, channel_shift: ``[B, C]``, or what broadcasts to x.
        frame_scale: ``[B, T]`` with ``T = ⌈L / frames_per_scale⌉``.
        frames_per_scale: rows that share a number of ``frame_scale``.
        eps: added to the variance, in units of x².
    Returns: ``[B, L, C]`` in the dtype of x.
    Raises: TypeError or ValueError where an argument does not fit, with its name.
    Source: the dual-scale AdaLN of HiCoDiT, the successor of Ye and Shan 2025 (ImaginTalk), after a reader's notes: our
        reconstruction.
    """
    name = "dual_ada_layer_norm"
    floating_rows("x", axes=3)(name, {"x": x})
    floating_beside("frame_scale", of="x")(name, {"x": x, "frame_scale": frame_scale})
    if not isinstance(frames_per_scale, int) or isinstance(frames_per_scale, bool) or frames_per_scale < 1:
        raise ValueError(f"{name}: frames_per_scale is {frames_per_scale}, expected an int of at least 1")
    batch, length = x.shape[0], x.shape[-2]
    expected = [batch, -(-length // frames_per_scale)]
    if x.dim() != 3 or list(frame_scale.shape) != expected:
        raise ValueError(f"{name}: frame_scale has shape {list(frame_scale.shape)}, expected {expected}")
    of_rows = frame_scale.repeat_interleave(frames_per_scale, 1)[:, :length, None]
    out: Tensor = _normalized(x, None, None, None, None, channel_scale, channel_shift, of_rows, eps, True)
    return out


def layer_norm(
    x: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    eps: float = 1e-5,
    residual: Tensor | None = None,
) -> Any:
    """Layer norm of the last axis: ``y = (r − mean(r)) / √(var(r) + eps)·weight + bias``, ``r = residual + x`` or x.

    Args:
        x: ``[..., C]``, any strides.
        weight, bias: ``[C]``, of any floating dtype; None for ones and zeros.
        eps: added to the variance, in units of x².
        residual: of the shape and dtype of x.
    Returns: y in the dtype of x; with ``residual`` y and r.
    Raises: TypeError or ValueError where an argument does not fit, with its name.
    Source: Ba et al. 2016, eq. 4.
    """
    return _normalized(x, residual, None, weight, bias, None, None, None, eps, True)


def rms_norm(
    x: Tensor,
    weight: Tensor | None = None,
    *,
    eps: float = 1e-6,
    weight_offset: float = 0.0,
    residual: Tensor | None = None,
) -> Any:
    """Root-mean-square norm of the last axis: ``y = r / √(mean(r²) + eps)·(weight_offset + weight)``.

    ``r = residual + x``, or x.

    Args:
        x: ``[..., C]``, any strides.
        weight: ``[C]``, of any floating dtype; None for ones.
        eps: added to the mean square, in units of x².
        weight_offset: 1.0 for the weights of Gemma.
        residual: of the shape and dtype of x.
    Returns: y in the dtype of x; with ``residual`` y and r.
    Raises: TypeError or ValueError where an argument does not fit, with its name.
    Source: Zhang and Sennrich 2019, eq. 4.
    """
    check_number("rms_norm", "weight_offset", weight_offset, "a finite number", -LARGEST, LARGEST)
    if isinstance(weight, Tensor) and weight_offset:
        weight = weight.to(torch.promote_types(weight.dtype, torch.float32)) + weight_offset
    return _normalized(x, residual, None, weight, None, None, None, None, eps, False)
