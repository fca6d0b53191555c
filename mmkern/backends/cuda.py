"""The CUDA backend's kernels, as the dispatcher calls them: ``name(*inputs, curvature, *options, out)`` and
``name_backward(grad, *inputs, curvature, *options, *input_grads, curvature_grad)``, the outputs given.

Here a call becomes launches: which kernel, how many threads share a row, where partial sums lie. The kernels are
``csrc/cuda/hyperbolic*.cuh``; the structs below mirror theirs.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mmkern.backends.cuda_launch import launch

_COLUMNS = 8  # of a row in a thread's registers
_MAX_LANES = 512
_MAX_COLUMNS = 1 << 30  # counted in int
_MIN_THREADS = 128
_MAX_BLOCKS = 4096  # of a row kernel, which walks on from there; bounds the partial sums
_TILE = 64
_TILE_THREADS = 128
_DTYPES = {torch.float32: 0, torch.bfloat16: 2, torch.float16: 3}

_Pointer = ctypes.c_void_p
_Offset = ctypes.c_longlong


class _Scalar(ctypes.Structure):
    _fields_ = [("pointer", _Pointer), ("value", ctypes.c_float)]


class _RowArgs(ctypes.Structure):
    _fields_ = [
        ("inputs", _Pointer * 4),
        ("input_strides", _Offset * 4),
        ("out", _Pointer * 3),
        ("row_in", _Pointer),
        ("row_in_stride", _Offset),
        ("row_out", _Pointer),
        ("curvature_partials", _Pointer),
        ("rows", _Offset),
        ("curvature", _Scalar),
        ("option", ctypes.c_float),
        ("cols", ctypes.c_int),
        ("lanes", ctypes.c_int),
        ("dtype", ctypes.c_int),
        ("row_dtype", ctypes.c_int),
        ("vectors", ctypes.c_int),
    ]


class _SumArgs(ctypes.Structure):
    _fields_ = [("partials", _Pointer), ("total", _Pointer), ("count", _Offset)]


class _CentroidArgs(ctypes.Structure):
    _fields_ = [
        ("x", _Pointer),
        ("x_set_stride", _Offset),
        ("x_member_stride", _Offset),
        ("weights", _Pointer),
        ("weight_set_stride", _Offset),
        ("weight_member_stride", _Offset),
        ("grad", _Pointer),
        ("grad_stride", _Offset),
        ("out", _Pointer),
        ("x_to", _Pointer),
        ("weights_to", _Pointer),
        ("curvature_partials", _Pointer),
        ("scratch", _Pointer),
        ("sets", _Offset),
        ("members", _Offset),
        ("curvature", _Scalar),
        ("cols", ctypes.c_int),
        ("lanes", ctypes.c_int),
        ("dtype", ctypes.c_int),
        ("vectors", ctypes.c_int),
    ]


class _Matrix(ctypes.Structure):
    _fields_ = [
        ("data", _Pointer),
        ("rows", _Offset),
        ("cols", _Offset),
        ("stride", _Offset),
        ("dtype", ctypes.c_int),
        ("vectors", ctypes.c_int),
    ]


class _PairwiseArgs(ctypes.Structure):
    _fields_ = [
        ("x", _Matrix),
        ("y", _Matrix),
        ("out", _Pointer),
        ("grad", _Pointer),
        ("grad_row_stride", _Offset),
        ("grad_col_stride", _Offset),
        ("row_partials", _Pointer),
        ("col_partials", _Pointer),
        ("curvature_partials", _Pointer),
        ("curvature", _Scalar),
    ]


class _ProductArgs(ctypes.Structure):
    _fields_ = [
        ("self", _Matrix),
        ("other", _Matrix),
        ("weights", _Pointer),
        ("self_stride", _Offset),
        ("other_stride", _Offset),
        ("partials", _Pointer),
        ("partial_count", _Offset),
        ("out", _Pointer),
    ]


# ---- Tensors as kernels see them -------------------------------------------------------------------------------------


def _address(x: Tensor | None) -> int | None:
    return None if x is None else x.data_ptr()


def _scalar(value: float | Tensor) -> _Scalar:
    return _Scalar(value.data_ptr(), 0) if isinstance(value, Tensor) else _Scalar(None, value)


def _collapsed_stride(x: Tensor, axes: int) -> int | None:
    """The stride of the first ``axes`` axes walked as one, or None where they do not collapse."""
    found, expected = 0, None
    for size, stride in zip(x.shape[:axes][::-1], x.stride()[:axes][::-1], strict=True):
        if size == 1:
            continue
        if expected is None:
            found = stride
        elif stride != expected:
            return None
        expected = stride * size
    return found


def _flat(x: Tensor, kept: int) -> Tensor:
    """``x`` with its leading axes as one and the last ``kept`` as they are, copied only if it must be.

    The last axis is dense after it, but with ``kept == 0`` any stride will do.
    """
    leading = x.dim() - kept
    if kept and x.shape[-1] > 1 and x.stride(-1) != 1:
        x = x.contiguous()
    stride = _collapsed_stride(x, leading)
    if stride is None:
        x, stride = x.contiguous(), _collapsed_stride(x.contiguous(), leading) or 0
    shape = (x.shape[:leading].numel(), *x.shape[leading:])
    return x.as_strided(shape, (stride, *x.stride()[leading:]))


def _in_vectors(*tensors: Tensor | None) -> bool:
    """Whether all rows begin and end at multiples of 16 bytes."""
    for x in tensors:
        if x is None:
            continue
        size = x.element_size()
        if (x.shape[-1] * size | x.data_ptr()) % 16 or any(s * size % 16 for s in x.stride()[:-1]):
            return False
    return True


@dataclass(frozen=True)
class _RowGrid:
    """How a row kernel is laid out: ``lanes`` threads share a row, ``threads`` make a block."""

    lanes: int
    threads: int
    blocks: int

    @classmethod
    def of(cls, rows: int, cols: int) -> _RowGrid:
        if cols > _MAX_COLUMNS:
            raise ValueError(f"rows of {cols} columns; the CUDA kernels take up to {_MAX_COLUMNS}")
        lanes = min(1 << (-(-cols // _COLUMNS) - 1).bit_length(), _MAX_LANES)
        threads = max(lanes, _MIN_THREADS)
        return cls(lanes, threads, min(-(-rows * lanes // threads), _MAX_BLOCKS))


class _CurvatureGradient:
    """Partial sums, one a block, that a last kernel adds up in a fixed order."""

    def __init__(self, total: Tensor | None, blocks: int) -> None:
        self.total = total
        self.partials = None if total is None else total.new_empty(blocks, dtype=torch.float32)

    @property
    def address(self) -> int | None:
        return _address(self.partials)

    def finish(self) -> None:
        if self.total is not None and self.partials is not None:
            arguments = _SumArgs(self.partials.data_ptr(), self.total.data_ptr(), self.partials.numel())
            launch("sum_partials", (1, 1), _MAX_LANES, arguments, self.total.device)


# ---- Row-wise ops ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _RowOp:
    """``flavour`` is the kernel's type in hyperbolic_rows.cuh. ``vectors`` inputs [..., D] come after the row numbers
    ``r`` if there are any; the result is a vector a row or one number."""

    flavour: str
    vectors: int
    gives_vector: bool = True
    takes_rows: bool = False
    has_option: bool = False

    @property
    def inputs(self) -> int:
        return self.vectors + self.takes_rows

    def forward(self, *args: Any) -> None:
        inputs, (curvature, *options, out) = args[: self.inputs], args[self.inputs :]
        self._launch(
            "Forward",
            inputs[self.takes_rows :],
            [out] if self.gives_vector else [],
            row_in=inputs[0] if self.takes_rows else None,
            row_out=None if self.gives_vector else out,
            curvature=curvature,
            options=options,
            curvature_grad=None,
        )

    def backward(self, grad: Tensor, *args: Any) -> None:
        inputs, rest = args[: self.inputs], args[self.inputs :]
        curvature, options, outputs = rest[0], rest[1 : 1 + self.has_option], rest[1 + self.has_option :]
        *input_grads, curvature_grad = outputs
        vectors = inputs[self.takes_rows :]
        self._launch(
            "Backward",
            (grad, *vectors) if self.gives_vector else vectors,
            input_grads[self.takes_rows :],
            row_in=(inputs[0] if self.takes_rows else None) if self.gives_vector else grad,
            row_out=input_grads[0] if self.takes_rows else None,
            curvature=curvature,
            options=options,
            curvature_grad=curvature_grad,
        )

    def _launch(
        self,
        direction: str,
        vectors: Sequence[Tensor],
        outputs: Sequence[Tensor | None],
        *,
        row_in: Tensor | None,
        row_out: Tensor | None,
        curvature: float | Tensor,
        options: Sequence[float],
        curvature_grad: Tensor | None,
    ) -> None:
        inputs = [_flat(x, 1) for x in vectors]
        lead = inputs[0]
        rows, cols = lead.shape
        grid = _RowGrid.of(rows, cols)
        total = _CurvatureGradient(curvature_grad, grid.blocks)
        args = _RowArgs(
            rows=rows,
            cols=cols,
            curvature=_scalar(curvature),
            curvature_partials=total.address,
            option=options[0] if options else 0.0,
            lanes=grid.lanes,
            dtype=_DTYPES[lead.dtype],
            vectors=_in_vectors(*inputs, *outputs),
        )
        for i, x in enumerate(inputs):
            args.inputs[i], args.input_strides[i] = x.data_ptr(), x.stride(0)
        for i, out in enumerate(outputs):
            args.out[i] = _address(out)
        if row_in is not None:
            row_in = _flat(row_in, 0)
            args.row_in, args.row_in_stride, args.row_dtype = row_in.data_ptr(), row_in.stride(0), _DTYPES[row_in.dtype]
        if row_out is not None:
            args.row_out, args.row_dtype = row_out.data_ptr(), _DTYPES[row_out.dtype]
        launch(f"rows<{self.flavour}::{direction}>", (grid.blocks, 1), grid.threads, args, lead.device)
        total.finish()


# ---- Centroid --------------------------------------------------------------------------------------------------------


def _centroid_args(x: Tensor, weights: Tensor, curvature: float | Tensor, *vectors: Tensor | None) -> _CentroidArgs:
    sets, members, cols = x.shape
    return _CentroidArgs(
        x=x.data_ptr(),
        x_set_stride=x.stride(0),
        x_member_stride=x.stride(1),
        weights=weights.data_ptr(),
        weight_set_stride=weights.stride(0),
        weight_member_stride=weights.stride(1),
        sets=sets,
        members=members,
        cols=cols,
        curvature=_scalar(curvature),
        lanes=_RowGrid.of(sets, cols).lanes,
        dtype=_DTYPES[x.dtype],
        vectors=_in_vectors(x, *vectors),
    )


def _lorentz_centroid(x: Tensor, weights: Tensor, curvature: float | Tensor, out: Tensor) -> None:
    x, weights = _flat(x, 2), _flat(weights[..., None], 2)[..., 0]
    args = _centroid_args(x, weights, curvature, out)
    args.out = out.data_ptr()
    grid = _RowGrid.of(x.shape[0], x.shape[2])
    launch("centroid", (grid.blocks, 1), grid.threads, args, x.device)


def _lorentz_centroid_backward(
    grad: Tensor,
    x: Tensor,
    weights: Tensor,
    curvature: float | Tensor,
    x_grad: Tensor | None,
    weights_grad: Tensor | None,
    curvature_grad: Tensor | None,
) -> None:
    x, weights, grad = _flat(x, 2), _flat(weights[..., None], 2)[..., 0], _flat(grad, 1)
    sets, _, cols = x.shape
    grid = _RowGrid.of(sets, cols)
    total = _CurvatureGradient(curvature_grad, grid.blocks)
    args = _centroid_args(x, weights, curvature, grad, x_grad)
    args.grad, args.grad_stride = grad.data_ptr(), grad.stride(0)
    args.x_to, args.weights_to = _address(x_grad), _address(weights_grad)
    args.curvature_partials = total.address
    chunk = grid.lanes * _COLUMNS
    scratch = None
    if cols > chunk:
        scratch = torch.empty(sets * -(-cols // chunk) * chunk, dtype=torch.float32, device=x.device)
        args.scratch = scratch.data_ptr()
    launch("centroid_backward", (grid.blocks, 1), grid.threads, args, x.device)
    total.finish()


# ---- All pairs -------------------------------------------------------------------------------------------------------


def _matrix(x: Tensor) -> _Matrix:
    return _Matrix(x.data_ptr(), *x.shape, x.stride(0), _DTYPES[x.dtype], _in_vectors(x))


def _tiles(n: int) -> int:
    return -(-n // _TILE)


@dataclass(frozen=True)
class _PairwiseOp:
    """``functor`` is the op's type in hyperbolic_pairwise.cuh."""

    functor: str

    def forward(self, x: Tensor, y: Tensor, curvature: float | Tensor, out: Tensor) -> None:
        x, y = _flat(x, 1), _flat(y, 1)
        args = _PairwiseArgs(x=_matrix(x), y=_matrix(y), out=out.data_ptr(), curvature=_scalar(curvature))
        grid = _tiles(y.shape[0]), _tiles(x.shape[0])
        launch(f"pairwise<{self.functor}>", grid, _TILE_THREADS, args, x.device)

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
        x, y = _flat(x, 1), _flat(y, 1)
        rows, cols = x.shape[0], y.shape[0]
        tiles = _tiles(cols), _tiles(rows)

        def workspace(*shape: int) -> Tensor:
            return torch.empty(shape, dtype=torch.float32, device=x.device)

        weights = workspace(rows, cols)
        row_partials, col_partials = workspace(2 * tiles[0], rows), workspace(tiles[1], cols)
        total = _CurvatureGradient(curvature_grad, tiles[0] * tiles[1])
        args = _PairwiseArgs(
            x=_matrix(x),
            y=_matrix(y),
            out=weights.data_ptr(),
            grad=grad.data_ptr(),
            grad_row_stride=grad.stride(0),
            grad_col_stride=grad.stride(1),
            row_partials=row_partials.data_ptr(),
            col_partials=col_partials.data_ptr(),
            curvature_partials=total.address,
            curvature=_scalar(curvature),
        )
        launch(f"pairwise_weights<{self.functor}>", tiles, _TILE_THREADS, args, x.device)
        total.finish()
        if x_grad is not None:
            _product(x, y, weights, row_partials, x_grad)
        if y_grad is not None:
            _product(y, x, weights.T, col_partials, y_grad)


def _product(to: Tensor, other: Tensor, weights: Tensor, partials: Tensor, out: Tensor) -> None:
    args = _ProductArgs(
        self=_matrix(to),
        other=_matrix(other),
        weights=weights.data_ptr(),
        self_stride=weights.stride(0),
        other_stride=weights.stride(1),
        partials=partials.data_ptr(),
        partial_count=partials.shape[0],
        out=out.data_ptr(),
    )
    launch("pairwise_product", (_tiles(to.shape[1]), _tiles(to.shape[0])), _TILE_THREADS, args, to.device)


# ---- The table -------------------------------------------------------------------------------------------------------

ROW_OPS = {
    "lorentz_exp_map0": _RowOp("Radial<LorentzExpMap0>", 1),
    "lorentz_log_map0": _RowOp("Radial<LorentzLogMap0>", 1),
    "poincare_exp_map0": _RowOp("Radial<PoincareExpMap0>", 1),
    "poincare_log_map0": _RowOp("Radial<PoincareLogMap0>", 1),
    "lorentz_to_poincare": _RowOp("Radial<LorentzToPoincare>", 1),
    "poincare_to_lorentz": _RowOp("Radial<PoincareToLorentz>", 1),
    "mobius_scalar_mul": _RowOp("Radial<MobiusScalarMul>", 1, takes_rows=True),
    "lorentz_half_aperture": _RowOp("PointScalar<LorentzHalfAperture>", 1, gives_vector=False, has_option=True),
    "lorentz_exp_map": _RowOp("PairMap<LorentzExpMap, Combined>", 2),
    "lorentz_log_map": _RowOp("PairMap<LorentzLogMap, Compared>", 2),
    "mobius_add": _RowOp("PairMap<MobiusAdd, Combined>", 2),
    "poincare_exp_map": _RowOp("PairMap<PoincareExpMap, Combined>", 2),
    "poincare_log_map": _RowOp("PairMap<PoincareLogMap, Compared>", 2),
    "lorentz_distance": _RowOp("PairScalar<LorentzDistance>", 2, gives_vector=False),
    "poincare_distance": _RowOp("PairScalar<PoincareDistance>", 2, gives_vector=False),
    "lorentz_exterior_angle": _RowOp("PairScalar<LorentzExteriorAngle>", 2, gives_vector=False),
    "lorentz_entailment_loss": _RowOp("PairScalar<LorentzEntailmentLoss>", 2, gives_vector=False, has_option=True),
    "lorentz_parallel_transport": _RowOp("Transport<LorentzParallelTransport>", 3),
}
PAIRWISE_OPS = {
    "lorentz_pairwise_inner": _PairwiseOp("LorentzPairwiseInner"),
    "lorentz_pairwise_distance": _PairwiseOp("LorentzPairwiseDistance"),
    "poincare_pairwise_distance": _PairwiseOp("PoincarePairwiseDistance"),
}

KERNELS: dict[str, Callable[..., None]] = {
    **{name: op.forward for name, op in (ROW_OPS | PAIRWISE_OPS).items()},
    **{f"{name}_backward": op.backward for name, op in (ROW_OPS | PAIRWISE_OPS).items()},
    "lorentz_centroid": _lorentz_centroid,
    "lorentz_centroid_backward": _lorentz_centroid_backward,
}


def __getattr__(name: str) -> Callable[..., None]:
    try:
        return KERNELS[name]
    except KeyError:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}") from None
