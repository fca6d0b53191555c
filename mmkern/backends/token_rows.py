"""What both GPU backends launch ``sample_tokens`` with: the rows of its tensors, and the way from one to the next."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from mmkern.reference import decoding as reference


class TokenRows(NamedTuple):
    logits: Tensor
    seed: Tensor
    filters: Tensor
    allowed: Tensor | None

    @classmethod
    def of(
        cls, logits: Tensor, seed: Tensor, filters: Tensor, history: Tensor | None, allowed: Tensor | None
    ) -> TokenRows:
        """The arguments of the op; tokens of the history are penalized here."""
        if history is not None:
            logits = reference.penalized(logits, filters, history)
        return cls(logits, seed.contiguous(), filters.contiguous(), None if allowed is None else allowed.contiguous())

    @property
    def strides(self) -> tuple[int, ...]:
        """Of each tensor from row to row, 0 where there is one row for all."""
        return tuple(0 if x is None or x.shape[0] == 1 else x.stride(0) for x in self)

    @property
    def counters(self) -> int:
        """From row to row, where they draw with one key."""
        return -(-self.logits.shape[1] // 4) if self.seed.shape[0] == 1 else 0
