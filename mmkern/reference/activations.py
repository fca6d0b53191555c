"""Activations by name."""

from __future__ import annotations

from collections.abc import Callable
from enum import IntEnum

import torch
from torch import Tensor
from torch.nn import functional


class Activation(IntEnum):
    """As kernels are told of them."""

    NONE = 0
    SILU = 1  # u / (1 + e⁻ᵘ)
    GELU = 2  # u·Φ(u), with the distribution function of a normal number
    GELU_TANH = 3  # 0.5·u·(1 + tanh(√(2/π)·(u + 0.044715·u³)))
    RELU = 4


FUNCTIONS: dict[Activation, Callable[[Tensor], Tensor]] = {
    Activation.NONE: lambda u: u,
    Activation.SILU: functional.silu,
    Activation.GELU: functional.gelu,
    Activation.GELU_TANH: lambda u: functional.gelu(u, approximate="tanh"),
    Activation.RELU: torch.relu,
}
