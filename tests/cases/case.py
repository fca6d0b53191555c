"""What a case is.

It is built in float64 from a seeded generator and cast by the test, so every backend and dtype sees the same numbers.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Case:
    """One call: ``build(generator)`` gives the arguments in the order of the schema, floating tensors in float64.

    ``wide`` are arguments which come in the accumulation dtype, as 0-d tensors do.
    """

    op: str
    label: str
    build: Callable[[torch.Generator], list[Any]]
    wide: tuple[int, ...] = ()

    def __str__(self) -> str:
        return f"{self.op}-{self.label}"

    def arguments(self, dtype: torch.dtype, device: str = "cpu") -> list[Any]:
        """The arguments, rounded to ``dtype``."""
        generator = torch.Generator().manual_seed(len(str(self)))
        accumulation = dtype if dtype.itemsize > 2 else torch.float32
        out = []
        for i, value in enumerate(self.build(generator)):
            if not isinstance(value, Tensor):
                out.append(value)
            elif not value.is_floating_point():
                out.append(value.to(device))
            else:
                is_wide = value.dim() == 0 or i in self.wide
                out.append(cast(value, accumulation if is_wide else dtype, device))
        return out


def cast(x: Tensor, dtype: torch.dtype, device: str = "cpu") -> Tensor:
    """``x`` in another dtype with the same strides, zeros (expanded axes) too."""
    storage = torch.as_strided(x, (x.untyped_storage().nbytes() // x.element_size(),), (1,), 0)
    return torch.as_strided(storage.to(dtype).to(device), x.shape, x.stride(), x.storage_offset())
