"""How kernels see the axes of tensors."""

from __future__ import annotations

import torch

from mmkern.backends.grid_rows import step_along, with_fewest_axes


def test_fewest_axes() -> None:
    """Axes that all tensors walk over as one are one; from ``first`` on."""
    x = torch.empty(2, 3, 5, 16)
    rows, planes = torch.empty(2, 3, 5, 1), torch.empty(2, 1, 5, 16)
    assert with_fewest_axes([x, torch.empty_like(x)]) == ([480], [3])
    assert with_fewest_axes([x], 1) == ([240], [3])
    assert with_fewest_axes([x, rows]) == ([30, 16], [2, 3])
    assert with_fewest_axes([x, planes]) == ([2, 3, 80], [0, 1, 3])
    assert with_fewest_axes([x, planes, rows]) == ([2, 3, 5, 16], [0, 1, 2, 3])
    assert with_fewest_axes([x[:, :, 1:]]) == ([6, 64], [1, 3])
    assert with_fewest_axes([x.transpose(1, 2)]) == ([2, 5, 3, 16], [0, 1, 2, 3])
    assert with_fewest_axes([torch.empty(4, 1, 7, 1)]) == ([28], [3])


def test_steps() -> None:
    shape = (2, 3, 5, 16)
    planes = torch.empty(2, 1, 5, 16)
    assert [step_along(planes, axis, shape) for axis in range(4)] == [80, 0, 16, 1]
    assert step_along(torch.empty(2, 3, 5, 1), 3, shape) == 0
