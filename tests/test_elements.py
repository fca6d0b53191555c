"""How the Triton kernels that go element by element cut a call into tiles."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from mmkern.kernels.elements import Layout


@pytest.mark.parametrize(
    ("shape", "block"),
    [
        ((64, 4096), (1, 1024)),
        ((64, 1152), (4, 256)),  # of 1024 or 512 columns many would lie outside
        ((64, 1088), (8, 128)),
        ((64, 1000), (1, 1024)),
        ((64, 20), (32, 32)),
        ((3, 20), (4, 32)),
        ((64, 123), (4, 128)),  # one by one: half as many
        ((64, 1153), (2, 256)),
    ],
)
def test_few_elements_of_a_tile_lie_outside(shape: tuple[int, int], block: tuple[int, int]) -> None:
    x = torch.empty(shape[0], 2 * shape[1])[:, : shape[1]]
    assert Layout.of(x, []).block(1024) == block


def test_a_tile_has_rows_of_one_run() -> None:
    assert Layout.of(torch.empty(64, 40)[:, :20], []).block(1024, rows=5) == (8, 32)
