"""A call of a Triton kernel under the interpreter, held to the numerics contract."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from mmkern.kernels import (
    attention,
    attention_rows,
    contrastive,
    ctc,
    ctc_align,
    ctc_beam,
    decoding,
    diffusion,
    edit_distance,
    hyperbolic,
    modulation,
    quantization,
    retrieval,
    vocabulary,
)
from torch import Tensor

from mmkern import testing
from mmkern.ops._define import Op
from tests.cases.case import Case
from tests.contract import gradients_for, op_of

from .buffers import Output, guarded

_KERNELS = {
    "hyperbolic": hyperbolic,
    "attention": attention,
    "attention_rows": attention_rows,
    "modulation": modulation,
    "ctc": ctc,
    "ctc_align": ctc_align,
    "ctc_beam": ctc_beam,
    "decoding": decoding,
    "edit_distance": edit_distance,
    "diffusion": diffusion,
    "contrastive": contrastive,
    "quantization": quantization,
    "retrieval": retrieval,
    "vocabulary": vocabulary,
}


def prepared(op: Op, args: Sequence[Any]) -> list[Any]:
    """Arguments as the dispatcher hands them to a kernel, in guarded buffers."""
    return [guarded(a) if isinstance(a, Tensor) and a.dim() else a for a in op._prepare(args)]


def outputs_of(op: Op, args: Sequence[Any]) -> list[Tensor]:
    outs = [Output(out) for out in op.empty_outputs(args)]
    getattr(_KERNELS[op.family], op.name)(*args, *(out.tensor for out in outs))
    for slot, out in enumerate(outs):
        out.check(f"{op.name}, output {slot}")
    return [out.tensor for out in outs]


def forward(op: Op, args: Sequence[Any]) -> Tensor:
    return outputs_of(op, args)[0]


def gradients(
    op: Op, grads: Sequence[Tensor], args: Sequence[Any], outs: Sequence[Tensor], wanted: Sequence[bool] | None = None
) -> list[Tensor | None]:
    tensors = [args[i] for i in op.tensors]
    if wanted is None:
        wanted = [isinstance(t, Tensor) for t in tensors]
    found = []
    for i, tensor, want in zip(op.tensors, tensors, wanted, strict=True):
        found.append(Output(op._empty_gradient(i, tensor, args[op.lead])) if want else None)
    saved = outs if op.backward_reads_outputs else ()
    kernel = getattr(_KERNELS[op.family], f"{op.name}_backward")
    kernel(*grads, *args, *saved, *(output and output.tensor for output in found))
    for output, index in zip(found, op.tensors, strict=True):
        if output is not None:
            output.check(f"{op.name}, gradient of {op.names[index]}")
    return [output and output.tensor for output in found]


def backward(op: Op, grad: Tensor, args: Sequence[Any], wanted: Sequence[bool] | None = None) -> list[Tensor | None]:
    return gradients(op, [grad], args, [], wanted)


def hold_to_contract(case: Case, dtype: torch.dtype) -> None:
    try:
        _hold_to_contract(case, dtype)
    except Exception as error:
        raise AssertionError(f"{case}, {dtype}: {error}") from error


def _hold_to_contract(case: Case, dtype: torch.dtype) -> None:
    op = op_of(case.op)
    args = case.arguments(dtype)
    if op.family == "hyperbolic" and any(isinstance(a, Tensor) and a.numel() == 0 for a in args):
        return  # the dispatcher answers these
    args = prepared(op, args)
    outs = outputs_of(op, args)
    testing.verify_forward(op, args, outs)
    if not hasattr(_KERNELS[op.family], f"{op.name}_backward"):
        return
    grads = [guarded(g) for g in gradients_for(case, outs)]
    saved = [guarded(out) for out in outs]
    testing.verify_backward(op, grads, args, gradients(op, grads, args, saved))
