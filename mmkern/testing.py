"""The numerics contract: when a kernel's result is right.

The oracle is the reference in float64 on the rounded inputs. A result passes when its error against the oracle is at
most ``factor`` times that of the reference run by PyTorch in the kernel's own dtype, plus one ulp of the result's
scale, the largest magnitude in its row. ``factor`` is 2 forward and 3 backward.

The oracle has no more digits than a float64 result; there the bound is ``16 ε √n`` of the scale, n the length of the
longest sum, or, where the formula itself loses digits, ``factor`` times the error of the reference in float32, scaled
by the ratio of the two ε.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from mmkern.ops._define import Op

FORWARD_FACTOR = 2.0
BACKWARD_FACTOR = 3.0
FEW_DRAWS, MANY_DRAWS = 6, 24  # many where a result misses what few allow


class ContractError(AssertionError):
    """A kernel's result is outside the numerics contract."""


def check_contract(
    what: str,
    actual: Tensor,
    oracle: Tensor,
    eager_error: float,
    *,
    factor: float,
    longest_sum: int,
    scale: Tensor | None = None,
) -> None:
    """Raise :class:`ContractError` where ``actual`` misses the contract.

    Args:
        what: names the result in the error.
        actual: the kernel's result, any floating dtype.
        oracle: the same in float64.
        eager_error: of the reference run in the dtype of ``actual``, relative to ``scale``.
        factor: how many times the error of ``eager`` is allowed.
        longest_sum: n of the float64 bound.
        scale: the largest magnitude that was added up, where the result itself does not show it; by default each
            row's largest result.
    """
    if actual.shape != oracle.shape:
        raise ContractError(f"{what}: shape {list(actual.shape)}, expected {list(oracle.shape)}")
    if actual.numel() == 0:
        return
    if not torch.equal(actual.isnan(), oracle.isnan()):
        raise ContractError(f"{what}: NaN expected elsewhere, first at {_where(actual.isnan() != oracle.isnan())}")
    infinite = oracle.isinf()
    if not torch.equal(actual[infinite].double(), oracle[infinite]):
        raise ContractError(f"{what}: infinity expected, first at {_where(infinite & (actual != oracle))}")
    error = relative_error(actual, oracle, scale)
    allowed = factor * eager_error + torch.finfo(actual.dtype).eps
    if actual.dtype == torch.float64:
        allowed = max(factor * eager_error, 16 * torch.finfo(actual.dtype).eps * longest_sum**0.5)
    if not error.max().item() <= allowed:
        raise ContractError(
            f"{what}: error {error.max().item():.2e} of the scale at {_where(error == error.max())}, "
            f"allowed {allowed:.2e} (PyTorch's own: {eager_error:.2e})"
        )


def relative_error(actual: Tensor, oracle: Tensor, scale: Tensor | None = None) -> Tensor:
    """``|actual − oracle|`` over the scale; 0 where the oracle leaves the range of the dtype or PyTorch gives NaN."""
    limits = torch.finfo(actual.dtype)
    finite = oracle.isfinite() & (oracle.abs() <= limits.max)
    if scale is None:
        magnitude = oracle.abs().where(finite, 0.0)
        scale = magnitude.amax(-1, keepdim=True) if magnitude.dim() > 0 else magnitude
    error = (actual.double() - oracle).abs() / scale.clamp_min(limits.tiny)
    return error.where(finite & ~error.isnan(), 0.0)


def _where(mask: Tensor) -> list[int]:
    return [int(i) for i in mask.nonzero()[0]] if mask.dim() else []


def in_dtype(args: Sequence[Any], dtype: torch.dtype) -> list[Any]:
    return [a.detach().to(dtype) if _is_floating(a) else a for a in args]


def _is_floating(a: Any) -> bool:
    return isinstance(a, Tensor) and a.is_floating_point()


def verify_forward(op: Op, args: Sequence[Any], outs: Sequence[Tensor]) -> None:
    """Hold the results of one call to the contract.

    Indices are right where what they choose has, without a kernel's rounding, the values that are expected; those of an
    op that rounds nothing, where they are the reference's.
    """
    if not any(map(_is_floating, (*args, *outs))):
        _verify_exact(op, args, outs)
        return

    def run(given: Sequence[Any]) -> Sequence[Tensor | None]:
        with torch.no_grad():
            result = op.reference(*given)
        return [out if _is_floating(out) else None for out in (result if isinstance(result, tuple) else [result])]

    names = [f"{op.name}, output {slot}" if slot else op.name for slot in range(len(outs))]
    results: Sequence[Tensor | None] = [out if _is_floating(out) else None for out in outs]
    _verify(op, args, run, names, results, [None] * len(outs), FORWARD_FACTOR)
    if op.from_indices is not None:
        with torch.no_grad():
            chosen = op.from_indices(*in_dtype(args, torch.float64), *outs)
        chosen = chosen if isinstance(chosen, tuple) else (chosen,)
        results = [value.to(out.dtype) for value, out in zip(chosen, outs, strict=False)]
        names = [f"{op.name}, what its indices choose"] * len(results)
        _verify(
            op, args, lambda given: run(given)[: len(results)], names, results, [None] * len(results), FORWARD_FACTOR
        )


def _verify_exact(op: Op, args: Sequence[Any], outs: Sequence[Tensor]) -> None:
    expected = op.reference(*args)
    for slot, (out, right) in enumerate(
        zip(outs, expected if isinstance(expected, tuple) else [expected], strict=True)
    ):
        if not torch.equal(out, right):
            raise ContractError(f"{op.name}, output {slot}: {_where(out != right)} is not that of the reference")


def verify_backward(op: Op, grads: Sequence[Tensor], args: Sequence[Any], gradients: Sequence[Tensor | None]) -> None:
    """Hold the gradients of one call to the contract; None stands for one that was not asked for."""
    wanted = [g is not None for g in gradients]
    wide = in_dtype(args, torch.float64)

    def run(given: Sequence[Any]) -> list[Tensor | None]:
        to = _lead_dtype(op, given)
        first, *others = grads
        kept = [first.to(to), *(g.to(torch.promote_types(to, torch.float32)) for g in others)]
        return op.reference_gradients(kept, wanted, given, create_graph=False)

    scales = [
        _largest_term(op, i, [g.double() for g in grads], wide) if i in op.scalars and want else None
        for i, want in zip(op.tensors, wanted, strict=True)
    ]
    names = [f"{op.name}, gradient of {op.names[i]}" for i in op.tensors]
    _verify(op, args, run, names, gradients, scales, BACKWARD_FACTOR)


def _verify(
    op: Op,
    args: Sequence[Any],
    run: Callable[[Sequence[Any]], Sequence[Tensor | None]],
    names: Sequence[str],
    results: Sequence[Tensor | None],
    scales: Sequence[Tensor | None],
    factor: float,
) -> None:
    oracles = run(in_dtype(args, torch.float64))
    n = _longest_sum(op, args)
    for draws in (FEW_DRAWS, MANY_DRAWS):
        eager_errors = _eager_error(op, args, run, scales, draws)
        try:
            for slot, (result, oracle) in enumerate(zip(results, oracles, strict=True)):
                if result is not None and oracle is not None:
                    check_contract(
                        names[slot],
                        result,
                        oracle,
                        eager_errors[slot],
                        factor=factor,
                        longest_sum=n,
                        scale=scales[slot],
                    )
            return
        except ContractError:
            if draws == MANY_DRAWS:
                raise


def _eager_error(
    op: Op,
    args: Sequence[Any],
    run: Callable[[Sequence[Any]], Sequence[Tensor | None]],
    scales: Sequence[Tensor | None],
    draws: int,
) -> list[float]:
    """The largest error of PyTorch's own over some problems an ulp apart: that of a single one is a matter of luck.

    For float64 the errors are those of float32, scaled by the ratio of the two ε.
    """
    dtype = _lead_dtype(op, args)
    eager_dtype = torch.float32 if dtype == torch.float64 else dtype
    worst = [0.0] * len(scales)
    generator = torch.Generator().manual_seed(0)
    for draw in range(draws):
        near = in_dtype(args, eager_dtype) if dtype != eager_dtype else list(args)
        if draw > 0:
            near = [_nudged(a, generator) if _is_floating(a) and a.dim() > 0 else a for a in near]
        oracles = run(in_dtype(near, torch.float64))
        for slot, (actual, oracle) in enumerate(zip(run(near), oracles, strict=True)):
            if actual is not None and oracle is not None and actual.numel():
                error = relative_error(actual.detach(), oracle.detach(), scales[slot]).max().item()
                worst[slot] = max(worst[slot], error)
    ratio = torch.finfo(dtype).eps / torch.finfo(eager_dtype).eps
    return [error * ratio for error in worst]


def _nudged(x: Tensor, generator: torch.Generator) -> Tensor:
    """Each element moved by up to one ulp."""
    step = torch.randint(-1, 2, x.shape, generator=generator).to(x.device)
    return (x.double() * (1 + step * torch.finfo(x.dtype).eps)).to(x.dtype)


def _lead_dtype(op: Op, args: Sequence[Any]) -> torch.dtype:
    dtype: torch.dtype = args[op.lead].dtype
    return dtype


def _largest_term(op: Op, index: int, grads: Sequence[Tensor], args: Sequence[Any]) -> Tensor:
    """A scalar's gradient is a sum over rows of ``g·∂out/∂scalar``: the largest ``|g||∂out/∂scalar|`` of a row."""

    def of_scalar(value: Tensor) -> tuple[Tensor, ...]:
        out = op.reference(*args[:index], value, *args[index + 1 :])
        return out[: op.differentiable] if isinstance(out, tuple) else (out,)

    slopes: tuple[Tensor, ...] = torch.func.jvp(of_scalar, (args[index],), (torch.ones_like(args[index]),))[1]
    largest = grads[0].new_zeros(())
    for slope, grad in zip(slopes, grads, strict=True):
        if grad.numel() == 0:
            continue
        lengths = [x.reshape(-1, x.shape[-1] if x.dim() else 1).norm(dim=-1) for x in (slope.nan_to_num(), grad)]
        largest = torch.maximum(largest, (lengths[0] * lengths[1]).max())
    return largest


def _longest_sum(op: Op, args: Sequence[Any]) -> int:
    return max(int(args[i].numel()) for i in op.vectors if args[i] is not None)
