"""Group norm with its modulation and the activation behind it, in one pass over memory."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from mmkern.reference import group_norm as reference

from ._checks import (
    FLOATING,
    LARGEST,
    Arguments,
    accumulation_dtype,
    check_number,
    check_tensor,
    floating_rows,
)
from ._define import define
from ._outputs import like
from .gated import ActivationName, _activation

_AFFINE = ("weight", "bias")
_MODULATORS = ("scale", "shift")


def _check(op: str, args: Arguments) -> None:
    x = args["x"]
    if x.dim() != 4:
        raise ValueError(f"{op}: x has shape {list(x.shape)}, expected [samples, groups, channels of each, positions]")
    for names, shape in ((_AFFINE, x.shape[1:3]), (_MODULATORS, x.shape[:3])):
        for name in names:
            check_tensor(op, name, args[name], x, FLOATING, shape, "x")
    check_number(op, "eps", args["eps"], "a number of at least 0", 0.0, LARGEST)


def _arrange(args: Arguments) -> Arguments:
    wide = accumulation_dtype(args["x"].dtype)
    for name in (*_AFFINE, *_MODULATORS):
        if args[name] is not None:
            args[name] = args[name].to(wide)
    return args


_group_norm_act = define(
    "group_norm_act(Tensor x, Tensor? weight, Tensor? bias, Tensor? scale, Tensor? shift, float eps, int activation) "
    "-> Tensor",
    family="modulation",
    reference=reference.group_norm_act,
    output=like(0),
    requires=[floating_rows("x"), _check],
    kinds=dict.fromkeys(("x", *_AFFINE, *_MODULATORS), "grid"),
    arrange=_arrange,
    autocast="keep",
)


def group_norm_act(
    x: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    act: ActivationName | None = "silu",
    scale_shift: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """Group norm, then an activation: ``y = act((n·weight + bias)·(1 + scale) + shift)``.

    ``n = (x − mean) / √(var + eps)`` of each sample's each group of ``C / num_groups`` neighbouring channels.

    Args:
        x: ``[B, C, ...]``, such as ``[B, C, H, W]``, any strides. One whose channels lie innermost (channels-last) is
            copied.
        num_groups: divides C.
        weight, bias: ``[C]``, of any floating dtype: computed in float32 (float64 for float64); or None.
        eps: added to the variance, in units of x².
        act: "silu", "gelu", "gelu_tanh", "relu", or None for none.
        scale_shift: scale and shift, each ``[B, C]`` or with axes of size 1 behind, of any floating dtype.
    Returns: of the shape and dtype of x.
    Raises: TypeError or ValueError where an argument does not fit, with its name.
    Source: Wu and He 2018, eq. 7; scale and shift as in Dhariwal and Nichol 2021, eq. 3 (AdaGN).
    """
    op = "group_norm_act"
    activation = _activation(op, act, "act")
    floating_rows("x", axes=2)(op, {"x": x})
    batch, channels = x.shape[:2]
    if not isinstance(num_groups, int) or isinstance(num_groups, bool):
        raise TypeError(f"{op}: num_groups is {type(num_groups).__name__}, expected an int")
    if num_groups < 1 or channels % num_groups:
        raise ValueError(f"{op}: num_groups is {num_groups}, expected a divisor of the {channels} channels of x")
    sizes = num_groups, channels // num_groups
    affine = [_placed(op, name, m, x, (channels,), sizes) for name, m in zip(_AFFINE, (weight, bias), strict=True)]
    scale, shift = _pair(op, scale_shift)
    modulators = [
        _placed(op, name, _without_ones(m), x, (batch, channels), (batch, *sizes))
        for name, m in zip(_MODULATORS, (scale, shift), strict=True)
    ]
    grouped = x.reshape(batch, *sizes, x.shape[2:].numel())
    return _group_norm_act(grouped, *affine, *modulators, eps, int(activation)).reshape(x.shape)


def _placed(
    op: str, name: str, given: Any, x: Tensor, shape: tuple[int, ...], grouped: tuple[int, ...]
) -> Tensor | None:
    check_tensor(op, name, given, x, FLOATING, shape, "x")
    return None if given is None else given.reshape(grouped)


def _pair(op: str, scale_shift: Any) -> tuple[Any, Any]:
    if scale_shift is None:
        return None, None
    if not isinstance(scale_shift, (tuple, list)) or len(scale_shift) != 2:
        raise TypeError(f"{op}: scale_shift is {type(scale_shift).__name__}, expected (scale, shift) or None")
    return scale_shift[0], scale_shift[1]


def _without_ones(given: Any) -> Any:
    """``[B, C]`` of ``[B, C, 1, ...]``."""
    if not isinstance(given, Tensor) or given.dim() <= 2 or any(n != 1 for n in given.shape[2:]):
        return given
    return given.flatten(1)
