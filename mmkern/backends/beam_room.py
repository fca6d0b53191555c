"""The room that both GPU backends give a row of ``ctc_beam_decode`` to search in."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class BeamRoom(NamedTuple):
    """Of each row: floats, 7 a prefix and one for all that a frame may make of the beam; hashes, 4 a prefix; ints, 5 a
    prefix, and 3 a node of the tree, of which there is one for each prefix of each frame, and one."""

    floats: Tensor
    hashes: Tensor
    ints: Tensor

    @classmethod
    def of(cls, log_probs: Tensor, beam: int) -> BeamRoom:
        rows, width, labels = log_probs.shape
        device = log_probs.device
        return cls(
            torch.empty(rows, 7 * beam + beam * (labels + 1), dtype=torch.float32, device=device),
            torch.empty(rows, 4 * beam, dtype=torch.int64, device=device),
            torch.empty(rows, 5 * beam + 3 * (beam * width + 1), dtype=torch.int32, device=device),
        )
