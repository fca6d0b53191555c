"""Activations beside a scale, a shift or a gate, in one pass over memory."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from mmkern.reference import gated as reference
from mmkern.reference.activations import Activation

from ._checks import (
    FLOATING,
    LARGEST,
    Arguments,
    accumulation_dtype,
    check_broadcast,
    check_number,
    floating_rows,
    same_shape,
)
from ._define import define
from ._outputs import like
from .modulation import _alike, _of_all_axes

Approximate = Literal["none", "tanh"]
ActivationName = Literal["silu", "gelu", "gelu_tanh", "relu"]
_MODULATORS = ("scale", "shift")


def _check_affine(op: str, args: Arguments) -> None:
    x = args["x"]
    for name in _MODULATORS:
        check_broadcast(op, name, args[name], x, FLOATING, tuple(x.shape), "x")
    check_number(op, "offset", args["offset"], "a finite number", -LARGEST, LARGEST)


def _arrange_affine(args: Arguments) -> Arguments:
    x = args["x"]
    for name in _MODULATORS:
        given = args[name]
        if given is None:
            continue
        if (given.dtype == torch.float64) != (x.dtype == torch.float64):
            given = given.to(accumulation_dtype(x.dtype))
        args[name] = given.reshape(*[1] * (x.dim() - given.dim()), *given.shape)
    args["scale"], args["shift"] = _shared_alike(x, args["scale"], args["shift"])
    return args


def _shared_alike(x: Tensor, scale: Any, shift: Any) -> tuple[Any, Any]:
    """Of one shape, unless one of them has its own number for each element."""
    is_whole = any(isinstance(m, Tensor) and m.shape == x.shape for m in (scale, shift))
    return (scale, shift) if is_whole else _alike(scale, shift)


_affine_activation = define(
    "affine_activation(Tensor x, Tensor? scale, Tensor? shift, float offset, int activation) -> Tensor",
    family="modulation",
    reference=reference.affine_activation,
    output=like(0),
    requires=[floating_rows("x"), _check_affine],
    kinds=dict.fromkeys(("x", *_MODULATORS), "grid"),
    arrange=_arrange_affine,
    autocast="keep",
    decomposes=lambda args: args[-1] == Activation.NONE,
)


def _check_halves(op: str, args: Arguments) -> None:
    width = args["x"].shape[-1]
    if width % 2:
        raise ValueError(f"{op}: x has {width} channels, expected an even number: hidden ones, then the gate's")


_gated_activation = define(
    "gated_activation(Tensor x, int activation) -> Tensor",
    family="modulation",
    reference=reference.gated_activation,
    output=lambda args: (*args[0].shape[:-1], args[0].shape[-1] // 2),
    requires=[floating_rows("x"), _check_halves],
    kinds={"x": "grid"},
    autocast="keep",
)


# ---- The public ops --------------------------------------------------------------------------------------------------


def _affine(
    op: str, x: Any, scale: Any, shift: Any, offset: float, activation: Activation, names: dict[str, str]
) -> Tensor:
    """On behalf of ``op``, which calls the arguments by other names."""
    try:
        if isinstance(x, Tensor):
            placed = (_of_all_axes(m, x) if _is_of_channels(m, x) else m for m in (scale, shift))
            scale, shift = _shared_alike(x, *placed)
        return _affine_activation(x, scale, shift, offset, int(activation))
    except (TypeError, ValueError) as error:
        words = str(error).removeprefix("affine_activation: ").split(" ", 1)
        raise type(error)(f"{op}: {names.get(words[0], words[0])} {words[1]}") from error


def _is_of_channels(given: Any, x: Tensor) -> bool:
    """``[B, C]`` beside ``[B, ..., C]``."""
    return isinstance(given, Tensor) and given.dim() == 2 < x.dim() and given.shape == (x.shape[0], x.shape[-1])


def film(
    x: Tensor,
    gamma: Tensor,
    beta: Tensor,
    *,
    gamma_offset: float = 0.0,
    activation: ActivationName | None = None,
) -> Tensor:
    """Feature-wise linear modulation: ``y = act((gamma_offset + gamma)·x + beta)``.

    Args:
        x: ``[..., C]`` or ``[B, C, H, W]``, any strides.
        gamma, beta: what broadcasts to x, such as ``[B, C, 1, 1]``, or ``[B, C]`` beside ``[B, ..., C]``; of any
            floating dtype, and never expanded in memory. Their gradients are summed over what shares them.
        gamma_offset: 1.0 where gamma is a difference from no change.
        activation: "silu", "gelu", "gelu_tanh", "relu", or None for none.
    Returns: of the shape and dtype of x.
    Raises: TypeError or ValueError where an argument does not fit, with its name.
    Source: Perez et al. 2018, eq. 2.
    """
    names = {"scale": "gamma", "shift": "beta", "offset": "gamma_offset"}
    return _affine("film", x, gamma, beta, gamma_offset, _activation("film", activation), names)


def gated_residual(residual: Tensor, x: Tensor, gate: Tensor) -> Tensor:
    """``residual + gate·x``, the end of a block of a diffusion transformer.

    Args:
        residual, x: of one shape and dtype, ``[B, ..., C]``.
        gate: ``[B, C]``, or what broadcasts to x; of any floating dtype.
    Returns: of their shape and dtype.
    Raises: TypeError or ValueError where an argument does not fit, with its name.
    Source: Peebles and Xie 2023 (DiT), §3.2.
    """
    for check in (floating_rows("x", "residual"), same_shape("x", "residual")):
        check("gated_residual", {"x": x, "residual": residual})
    names = {"scale": "gate", "shift": "residual"}
    return _affine("gated_residual", x, gate, residual, 0.0, Activation.NONE, names)


def bias_gelu(x: Tensor, bias: Tensor, *, approximate: Approximate = "none") -> Tensor:
    """``gelu(x + bias)``.

    Args:
        x: ``[..., C]``, any strides.
        bias: ``[C]``, or what broadcasts to x; of any floating dtype.
        approximate: "tanh" for the approximation by one.
    Returns: of the shape and dtype of x.
    Raises: TypeError or ValueError where an argument does not fit, with its name.
    Source: Hendrycks and Gimpel 2016.
    """
    return _affine("bias_gelu", x, None, bias, 1.0, _gelu("bias_gelu", approximate), {"shift": "bias"})


def geglu(x: Tensor, *, approximate: Approximate = "none") -> Tensor:
    """``hidden·gelu(gate)`` with ``hidden, gate = x.chunk(2, -1)``, without the copies.

    Args:
        x: ``[..., 2C]``, any strides.
        approximate: "tanh" for the approximation by one.
    Returns: ``[..., C]`` in the dtype of x.
    Raises: TypeError or ValueError where an argument does not fit, with its name.
    Source: Shazeer 2020, eq. 6.
    """
    return _halves("geglu", x, _gelu("geglu", approximate))


def swiglu(x: Tensor) -> Tensor:
    """``hidden·silu(gate)`` with ``hidden, gate = x.chunk(2, -1)``, without the copies.

    Args:
        x: ``[..., 2C]``, any strides.
    Returns: ``[..., C]`` in the dtype of x.
    Raises: TypeError or ValueError where an argument does not fit, with its name.
    Source: Shazeer 2020, eq. 6.
    """
    return _halves("swiglu", x, Activation.SILU)


def _halves(op: str, x: Tensor, activation: Activation) -> Tensor:
    try:
        return _gated_activation(x, int(activation))
    except (TypeError, ValueError) as error:
        raise type(error)(f"{op}: {str(error).removeprefix('gated_activation: ')}") from error


def _activation(op: str, name: Any, argument: str = "activation") -> Activation:
    found = {
        "silu": Activation.SILU,
        "gelu": Activation.GELU,
        "gelu_tanh": Activation.GELU_TANH,
        "relu": Activation.RELU,
    }
    if name is not None and name not in found:
        raise ValueError(f"{op}: {argument} is {name!r}, expected None, {', '.join(map(repr, found))}")
    return Activation.NONE if name is None else found[name]


def _gelu(op: str, approximate: Any) -> Activation:
    if approximate not in ("none", "tanh"):
        raise ValueError(f"{op}: approximate is {approximate!r}, expected 'none' or 'tanh'")
    return Activation.GELU if approximate == "none" else Activation.GELU_TANH
