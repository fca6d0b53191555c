"""All pairs of points on CUDA, a tile of pairs to a block. The kernels are ``csrc/cuda/hyperbolic_pairwise.cuh`` and
``pairwise_product.cuh``; the structs below mirror theirs."""

from __future__ import annotations

import struct
from dataclasses import dataclass

import torch
from torch import Tensor

from mmkern.backends.cuda_launch import launch
from mmkern.backends.cuda_sums import Total
from mmkern.backends.cuda_tensors import DTYPES, SCALAR, dense_rows, fits_vectors, scalar

_TILE = 64
TILE_THREADS = 128

MATRIX = "Pqqqii0q"  # data, rows, cols, stride, dtype, vectors
WEIGHTS_TO = "4P"  # weights, row_partials, col_partials, curvature_partials
_PAIRWISE_ARGS = struct.Struct(f"{MATRIX} {MATRIX} {SCALAR} PPqq {WEIGHTS_TO}")  # out; grad, row and column stride
# self, other; weights, strides; partials, count; out, dtype, adds
_PRODUCT_ARGS = struct.Struct(f"{MATRIX} {MATRIX} Pqq Pq Pii")

Matrix = tuple[int, int, int, int, int, bool]


def matrix(x: Tensor) -> Matrix:
    """Of a tensor whose rows are dense."""
    (rows, cols), stride = x.shape, x.stride(0)
    in_vectors = fits_vectors(x.element_size(), cols, (stride,), (x.data_ptr(),))
    return x.data_ptr(), rows, cols, stride, DTYPES[x.dtype], in_vectors


def tiles_of(n: int) -> int:
    return -(-n // _TILE)


def grid_of(x: Tensor, y: Tensor) -> tuple[int, int]:
    return tiles_of(y.shape[0]), tiles_of(x.shape[0])


class PairWeights:
    """Room for what one pass over the pairs of x and y leaves for the gradients of both."""

    def __init__(self, x: Tensor, y: Tensor) -> None:
        tiles = grid_of(x, y)

        def room(*shape: int) -> Tensor:
            return torch.empty(shape, dtype=torch.float32, device=x.device)

        self._points = x, y
        self._weights = room(x.shape[0], y.shape[0])
        self._partials = room(tiles[0], x.shape[0]), room(tiles[1], y.shape[0])

    @property
    def addresses(self) -> tuple[int, int, int]:
        return self._weights.data_ptr(), self._partials[0].data_ptr(), self._partials[1].data_ptr()

    def differentiate(self, gradients: tuple[Tensor | None, Tensor | None], adds: tuple[bool, bool]) -> None:
        """The gradients of x and of y, which may be float32 beside points of 16 bits; or what is added to them."""
        for side, (weights, out) in enumerate(zip((self._weights, self._weights.T), gradients, strict=True)):
            if out is None:
                continue
            arguments = _PRODUCT_ARGS.pack(
                *matrix(self._points[side]),
                *matrix(self._points[1 - side]),
                weights.data_ptr(),
                *weights.stride(),
                self._partials[side].data_ptr(),
                self._partials[side].shape[0],
                out.data_ptr(),
                DTYPES[out.dtype],
                adds[side],
            )
            rows, cols = out.shape
            launch("pairwise_product", (tiles_of(cols), tiles_of(rows)), TILE_THREADS, arguments, out.device)


@dataclass(frozen=True)
class _PairwiseOp:
    """``functor`` is the op's type in hyperbolic_pairwise.cuh."""

    functor: str

    def forward(self, x: Tensor, y: Tensor, curvature: float | Tensor, out: Tensor) -> None:
        x, y = dense_rows(x)[0], dense_rows(y)[0]
        backward = (0,) * 7
        arguments = _PAIRWISE_ARGS.pack(*matrix(x), *matrix(y), *scalar(curvature), out.data_ptr(), *backward)
        launch(f"pairwise<{self.functor}>", grid_of(x, y), TILE_THREADS, arguments, x.device)

    def backward(
        self,
        grad: Tensor,
        x: Tensor,
        y: Tensor,
        curvature: float | Tensor,
        x_grad: Tensor | None,
        y_grad: Tensor | None,
        curvature_grad: Tensor | None,
    ) -> None:
        x, y = dense_rows(x)[0], dense_rows(y)[0]
        grid = grid_of(x, y)
        weights, total = PairWeights(x, y), Total(curvature_grad, grid[0] * grid[1])
        arguments = _PAIRWISE_ARGS.pack(
            *matrix(x),
            *matrix(y),
            *scalar(curvature),
            0,
            grad.data_ptr(),
            *grad.stride(),
            *weights.addresses,
            total.take(grid[0] * grid[1]),
        )
        launch(f"pairwise_weights<{self.functor}>", grid, TILE_THREADS, arguments, x.device)
        total.finish()
        weights.differentiate((x_grad, y_grad), (False, False))


PAIRWISE_OPS = {
    "lorentz_pairwise_inner": _PairwiseOp("LorentzPairwiseInner"),
    "lorentz_pairwise_distance": _PairwiseOp("LorentzPairwiseDistance"),
    "poincare_pairwise_distance": _PairwiseOp("PoincarePairwiseDistance"),
}
