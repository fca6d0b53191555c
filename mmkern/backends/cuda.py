"""The CUDA backend's kernels, as the dispatcher calls them: ``name(*inputs, curvature, *options, out)`` and
``name_backward(grad, *inputs, curvature, *options, *input_grads, curvature_grad)``, the outputs given.

Here a call becomes launches: which kernel, how many threads share a row, where partial sums lie. The kernels are
``csrc/cuda/hyperbolic*.cuh``; the structs below mirror theirs. All pairs of points, contrastive losses, attention, its
companions, modulation and diffusion have files of their own, cuda_*.py.
"""

from __future__ import annotations

import functools
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mmkern.backends import (
    cuda_absorbing,
    cuda_attention,
    cuda_attention_rows,
    cuda_ctc,
    cuda_decoding,
    cuda_diffusion,
    cuda_gated,
    cuda_group_norm,
    cuda_masked_decode,
    cuda_modulation,
)
from mmkern.backends.cuda_contrastive import LOG_SUM_OPS
from mmkern.backends.cuda_launch import launch
from mmkern.backends.cuda_pairs import PAIRWISE_OPS
from mmkern.backends.cuda_sums import Total
from mmkern.backends.cuda_tensors import (
    COLUMNS,
    DTYPES,
    SCALAR,
    address,
    collapsed_stride,
    dense_rows,
    fits_vectors,
    lanes_of,
    scalar,
)

_MIN_THREADS = 128
_MAX_BLOCKS = 4096  # of a row kernel, which walks on from there; bounds the partial sums

# The kernels' structs, in C's layout: P a pointer, q a 64-bit offset, i an int, f a float; 0q ends a struct.
_ROW_ARGS = struct.Struct(
    "4P 4q 3P"  # in, in_stride, out
    "PqP P q"  # row_in, row_in_stride, row_out; curvature_partials; rows
    f"{SCALAR} f"  # curvature, option
    "iiiii 0q"  # cols, lanes, dtype, row_dtype, vectors
)
_CENTROID_ARGS = struct.Struct(
    "Pqq Pqq"  # x, set and member stride; weights, set and member stride
    "Pq PPP PP"  # grad, grad_stride; out, x_to, weights_to; curvature_partials, scratch
    f"qq {SCALAR} iiii 0q"  # sets, members; curvature; cols, lanes, dtype, vectors
)


# ---- Tensors as kernels see them -------------------------------------------------------------------------------------


def _numbers(x: Tensor) -> tuple[Tensor, int]:
    """``x``, one number a row, with one stride between them."""
    stride = 1 if x.is_contiguous() else collapsed_stride(x, x.dim())
    return (x.contiguous(), 1) if stride is None else (x, stride)


def _sets(x: Tensor, kept: int) -> tuple[Tensor, int, int]:
    """``x`` as sets of members, and the strides of both; ``kept`` axes follow the leading ones."""
    leading = x.dim() - kept
    stride = collapsed_stride(x, leading)
    if stride is None or (kept == 2 and x.shape[-1] != 1 and x.stride(-1) != 1):
        x = x.contiguous()
        stride = collapsed_stride(x, leading) or 0
    return x, stride, x.stride(leading)


def _row_grid(rows: int, lanes: int) -> tuple[int, int]:
    """Blocks, and threads of a block."""
    threads = max(lanes, _MIN_THREADS)
    return min(-(-rows * lanes // threads), _MAX_BLOCKS), threads


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

    @functools.cached_property
    def _forward_kernel(self) -> str:
        return f"rows<{self.flavour}::Forward>"

    @functools.cached_property
    def _backward_kernel(self) -> str:
        return f"rows<{self.flavour}::Backward>"

    def forward(self, *args: Any) -> None:
        first = int(self.takes_rows)
        after = first + self.vectors
        out = args[-1]
        self._launch(
            self._forward_kernel,
            args[first:after],
            (out,) if self.gives_vector else (),
            row_in=args[0] if self.takes_rows else None,
            row_out=None if self.gives_vector else out,
            curvature=args[after],
            option=args[after + 1] if self.has_option else 0.0,
            curvature_grad=None,
        )

    def backward(self, grad: Tensor, *args: Any) -> None:
        first = int(self.takes_rows)
        after = first + self.vectors
        outputs = args[after + 1 + self.has_option :]
        self._launch(
            self._backward_kernel,
            (grad, *args[first:after]) if self.gives_vector else args[first:after],
            outputs[first:-1],
            row_in=(args[0] if self.takes_rows else None) if self.gives_vector else grad,
            row_out=outputs[0] if self.takes_rows else None,
            curvature=args[after],
            option=args[after + 1] if self.has_option else 0.0,
            curvature_grad=outputs[-1],
        )

    @staticmethod
    def _launch(
        kernel: str,
        vectors: Sequence[Tensor],
        outputs: Sequence[Tensor | None],
        *,
        row_in: Tensor | None,
        row_out: Tensor | None,
        curvature: float | Tensor,
        option: float,
        curvature_grad: Tensor | None,
    ) -> None:
        lead = vectors[0]
        cols, device, dtype = lead.shape[-1], lead.device, lead.dtype
        rows, lanes = lead.numel() // cols, lanes_of(cols)
        blocks, threads = _row_grid(rows, lanes)
        inputs, strides = zip(*map(dense_rows, vectors), strict=True)  # the copies live until the launch
        pointers = [x.data_ptr() for x in inputs]
        targets = [address(out) for out in outputs]
        in_vectors = fits_vectors(dtype.itemsize, cols, strides, (*pointers, *targets))
        numbers, numbers_stride = (None, 0) if row_in is None else _numbers(row_in)
        row_dtype = dtype if row_in is None else row_in.dtype
        total = Total(curvature_grad, blocks)
        arguments = _ROW_ARGS.pack(
            *pointers,
            *(0,) * (4 - len(pointers)),
            *strides,
            *(0,) * (4 - len(pointers)),
            *targets,
            *(0,) * (3 - len(targets)),
            address(numbers),
            numbers_stride,
            address(row_out),
            total.take(blocks),
            rows,
            *scalar(curvature),
            option,
            cols,
            lanes,
            DTYPES[dtype],
            DTYPES[row_dtype],
            in_vectors,
        )
        launch(kernel, (blocks, 1), threads, arguments, device)
        total.finish()


# ---- Centroid --------------------------------------------------------------------------------------------------------


def _centroid(
    kernel: str,
    x: Tensor,
    weights: Tensor,
    curvature: float | Tensor,
    *,
    grad: Tensor | None = None,
    out: Tensor | None = None,
    x_grad: Tensor | None = None,
    weights_grad: Tensor | None = None,
    curvature_grad: Tensor | None = None,
) -> None:
    members, cols = x.shape[-2:]
    sets, lanes = x.numel() // (members * cols), lanes_of(cols)
    blocks, threads = _row_grid(sets, lanes)
    x, x_set_stride, x_member_stride = _sets(x, 2)
    weights, weight_set_stride, weight_member_stride = _sets(weights, 1)
    grads, grad_stride = (None, 0) if grad is None else dense_rows(grad)
    chunk = lanes * COLUMNS
    scratch = None
    if grad is not None and cols > chunk:
        scratch = torch.empty(sets * -(-cols // chunk) * chunk, dtype=torch.float32, device=x.device)
    total = Total(curvature_grad, blocks)
    addresses = (x.data_ptr(), address(grads), address(out), address(x_grad))
    arguments = _CENTROID_ARGS.pack(
        x.data_ptr(),
        x_set_stride,
        x_member_stride,
        weights.data_ptr(),
        weight_set_stride,
        weight_member_stride,
        address(grads),
        grad_stride,
        address(out),
        address(x_grad),
        address(weights_grad),
        total.take(blocks),
        address(scratch),
        sets,
        members,
        *scalar(curvature),
        cols,
        lanes,
        DTYPES[x.dtype],
        fits_vectors(x.dtype.itemsize, cols, (x_set_stride, x_member_stride, grad_stride), addresses),
    )
    launch(kernel, (blocks, 1), threads, arguments, x.device)
    total.finish()


def _lorentz_centroid(x: Tensor, weights: Tensor, curvature: float | Tensor, out: Tensor) -> None:
    _centroid("centroid", x, weights, curvature, out=out)


def _lorentz_centroid_backward(
    grad: Tensor,
    x: Tensor,
    weights: Tensor,
    curvature: float | Tensor,
    x_grad: Tensor | None,
    weights_grad: Tensor | None,
    curvature_grad: Tensor | None,
) -> None:
    _centroid(
        "centroid_backward",
        x,
        weights,
        curvature,
        grad=grad,
        x_grad=x_grad,
        weights_grad=weights_grad,
        curvature_grad=curvature_grad,
    )


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

KERNELS: dict[str, Callable[..., None]] = {
    **{name: op.forward for name, op in (ROW_OPS | PAIRWISE_OPS | LOG_SUM_OPS).items()},
    **{f"{name}_backward": op.backward for name, op in (ROW_OPS | PAIRWISE_OPS | LOG_SUM_OPS).items()},
    "lorentz_centroid": _lorentz_centroid,
    "lorentz_centroid_backward": _lorentz_centroid_backward,
    "cross_attention": cuda_attention.cross_attention,
    "merge_attention": cuda_attention_rows.merge_attention,
    "merge_attention_backward": cuda_attention_rows.merge_attention_backward,
    "rotary_embedding": cuda_attention_rows.rotary_embedding,
    "rotary_embedding_backward": cuda_attention_rows.rotary_embedding_backward,
    "ada_layer_norm": cuda_modulation.ada_layer_norm,
    "ada_layer_norm_backward": cuda_modulation.ada_layer_norm_backward,
    "residual_ada_layer_norm": cuda_modulation.residual_ada_layer_norm,
    "residual_ada_layer_norm_backward": cuda_modulation.residual_ada_layer_norm_backward,
    "affine_activation": cuda_gated.affine_activation,
    "affine_activation_backward": cuda_gated.affine_activation_backward,
    "gated_activation": cuda_gated.gated_activation,
    "gated_activation_backward": cuda_gated.gated_activation_backward,
    "group_norm_act": cuda_group_norm.group_norm_act,
    "group_norm_act_backward": cuda_group_norm.group_norm_act_backward,
    "collapse_repeats": cuda_ctc.collapse_repeats,
    "ctc_beam_decode": cuda_ctc.ctc_beam_decode,
    "ctc_greedy_decode": cuda_ctc.ctc_greedy_decode,
    "masked_decode_step": cuda_masked_decode.masked_decode_step,
    "sample_tokens": cuda_decoding.sample_tokens,
    "absorbing_step": cuda_absorbing.absorbing_step,
    "denoise_step": cuda_diffusion.denoise_step,
    "multistep": cuda_diffusion.multistep,
    "corrected_step": cuda_diffusion.corrected_step,
    "masked_squared_error": cuda_diffusion.masked_squared_error,
    "masked_squared_error_backward": cuda_diffusion.masked_squared_error_backward,
}

# Of a kernel that does not take every call: why not this one, from its first arguments or all.
LIMITS: dict[str, Callable[..., list[str]]] = {
    "cross_attention": cuda_attention.limits,
    "rotary_embedding": cuda_attention_rows.limits,
    "rotary_embedding_backward": cuda_attention_rows.limits,
}


def __getattr__(name: str) -> Callable[..., None]:
    try:
        return KERNELS[name]
    except KeyError:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}") from None
