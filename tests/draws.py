"""Whether what was drawn comes as often as it should."""

from __future__ import annotations

import torch
from torch import Tensor


def chi_square(counts: Tensor, p: Tensor) -> float:
    """The probability of counts as far from p as these; tokens that are expected less than 5 times count as one."""
    expected = counts.sum() * p
    assert counts[expected == 0].sum() == 0
    is_rare = expected < 5
    expected = torch.cat([expected[~is_rare], expected[is_rare].sum()[None]])
    found = torch.cat([counts[~is_rare], counts[is_rare].sum()[None]])
    is_there = expected > 0
    statistic = ((found - expected)[is_there] ** 2 / expected[is_there]).sum()
    freedom = (is_there.sum() - 1).double()
    return float(torch.special.gammaincc(freedom / 2, statistic / 2))
