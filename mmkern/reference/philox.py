"""Philox4x32-10: random numbers by position, the same on every backend (Salmon et al. 2011, "Parallel random numbers:
as easy as 1, 2, 3")."""

from __future__ import annotations

import math

import torch
from torch import Tensor

_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10
_LOW = 0xFFFFFFFF
UNIFORM_BITS = 24


def philox(seed: Tensor, counter: Tensor) -> Tensor:
    """Four 32-bit integers for each counter.

    Args:
        seed: 0-d int64, the key (low, high).
        counter: int64 ``[...]``, read as (low, high, 0, 0).
    Returns: int64 ``[..., 4]``, each in [0, 2³²).
    """
    key = [seed & _LOW, (seed >> 32) & _LOW]
    a, b = counter & _LOW, (counter >> 32) & _LOW
    c = d = torch.zeros_like(counter)
    for _ in range(_ROUNDS):
        (high0, low0), (high1, low1) = _product(a, _MULTIPLIERS[0]), _product(c, _MULTIPLIERS[1])
        a, b, c, d = high1 ^ b ^ key[0], low1, high0 ^ d ^ key[1], low0
        key = [(k + w) & _LOW for k, w in zip(key, _WEYL, strict=True)]
    return torch.stack([a, b, c, d], dim=-1)


def _product(a: Tensor, b: int) -> tuple[Tensor, Tensor]:
    """The high and the low word of a 64-bit product, by halves of b: int64 has no room for the whole."""
    low, high = a * (b & 0xFFFF), a * (b >> 16)
    middle = high + (low >> 16)
    return middle >> 16, ((middle & 0xFFFF) << 16) | (low & 0xFFFF)


def threshold(probability: float) -> int:
    """The least word whose uniform number ``⌊w / 2⁸⌋ 2⁻²⁴`` is at least ``probability``; 2³² where there is none."""
    steps: int = math.ceil(probability * 2**UNIFORM_BITS)
    return steps << (32 - UNIFORM_BITS)


def normal(seed: Tensor, count: int, dtype: torch.dtype) -> Tensor:
    """``[count]`` standard normal numbers; number i is of counter ``offset + ⌊i/4⌋``.

    Two by two from the words (a, b) of a counter, by the transform of Box and Muller (1958): ``√(−2 ln u)·cos 2πv`` and
    ``√(−2 ln u)·sin 2πv`` with ``u = (a + 1)·2⁻³²``, rounded to float32, and ``v = ⌊b / 2⁸⌋·2⁻²⁴``.

    Args:
        seed: int64 ``[2]``: the key, and the offset.
    """
    counters = torch.arange(-(-count // 4), device=seed.device) + seed[1]
    a, b = philox(seed[0], counters).unflatten(-1, (2, 2)).unbind(-1)
    u = (a.float() * 2.0**-32 + 2.0**-32).to(dtype)
    angle = (b >> (32 - UNIFORM_BITS)).to(dtype) * (2 * math.pi / 2**UNIFORM_BITS)
    radius = torch.sqrt(-2 * torch.log(u))
    return torch.stack([radius * torch.cos(angle), radius * torch.sin(angle)], -1).flatten()[:count]
