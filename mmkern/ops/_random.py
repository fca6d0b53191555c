"""Where an op that draws takes its seed from."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

_SEEDS = 2**62


def seed_tensor(
    op: str, beside: Tensor, generator: torch.Generator | None, seed: int | Tensor | None, offset: int
) -> Tensor:
    """``[seed, offset]`` as int64 on the device of ``beside``; without a seed, one number of the generator.

    A tensor, so that checkpointing, torch.compile and CUDA graphs replay the same draw.
    """
    if not isinstance(beside, Tensor):
        raise TypeError(f"{op}: q is {type(beside).__name__}, expected a Tensor")
    if generator is not None and not isinstance(generator, torch.Generator):
        raise TypeError(f"{op}: generator is {type(generator).__name__}, expected a torch.Generator or None")
    _check_integer(op, "offset", offset, 0)
    device = beside.device
    if seed is None:
        seed = torch.randint(_SEEDS, (), generator=generator, device=device, dtype=torch.int64)
    elif generator is not None:
        raise ValueError(f"{op}: got generator and seed, expected at most one of them")
    if isinstance(seed, Tensor):
        if seed.dim() != 0 or seed.dtype != torch.int64:
            raise ValueError(f"{op}: seed has shape {list(seed.shape)} and dtype {seed.dtype}, expected a 0-d int64")
        return torch.stack([seed.to(device), torch.full_like(seed, offset, device=device)])
    _check_integer(op, "seed", seed, -(2**63))
    return torch.tensor([seed, offset], dtype=torch.int64, device=device)


def _check_integer(op: str, name: str, value: Any, low: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{op}: {name} is {type(value).__name__}, expected an int")
    if not low <= value < 2**63:
        raise ValueError(f"{op}: {name} is {value}, expected a number from {low} to 2**63 - 1")
