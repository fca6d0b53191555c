"""Numbers that an op takes for all samples of a batch, or one for each."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.compiler import is_dynamo_compiling

from ._checks import FLOATING, LARGEST, accumulation_dtype, check_number, check_tensor, is_readable


def of_samples(
    op: str,
    name: str,
    value: float | Tensor,
    beside: tuple[str, Tensor],
    batch: int,
    expected: str = "a number of at least 0",
    low: float = 0,
    high: float = LARGEST,
) -> Tensor:
    """``[batch or 1]``, in the dtype of sums, of a number or a tensor ``[batch]`` or ``[]``.

    ``beside``: the name and the value of the tensor whose dtype and device count.
    """
    if not isinstance(value, Tensor):
        check_number(op, name, value, expected, low, high)
        return tensor_of((value,), beside[1].device, accumulation_dtype(beside[1].dtype))
    check_tensor(op, name, value, beside[1], FLOATING, None, beside[0])
    if value.shape not in ((), (batch,)):
        raise ValueError(f"{op}: {name} has shape {list(value.shape)}, expected {[batch]} or []")
    if is_readable(value):
        outside = ~((value >= low) & (value <= high))
        if outside.any():
            raise ValueError(
                f"{op}: {name} has {value[outside].flatten()[0].item()}, expected {expected} in each sample"
            )
    return value.reshape(-1).to(accumulation_dtype(beside[1].dtype))


def tensor_of(numbers: Sequence[float], device: torch.device, dtype: torch.dtype) -> Tensor:
    if is_dynamo_compiling():  # where torch.tensor would compile once for each value
        return torch.stack([torch.ones((), dtype=dtype, device=device) * number for number in numbers])
    return torch.tensor(numbers, dtype=dtype, device=device)
