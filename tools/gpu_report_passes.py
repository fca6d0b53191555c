"""Calls that the report compiles of activations beside a scale, a shift or a gate, and of the denoising loss."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

    from tools.gpu_report_triton import Variant

# Of x [rows, D]: the shapes of scale and shift, None where there is none, and the activation.
AFFINE = {
    "film, silu": ((1, -1), (1, -1), "SILU"),
    "film of images, gelu": ((-1, 1), (-1, 1), "GELU"),
    "gated_residual": ((1, -1), (-1, -1), "NONE"),
    "bias_gelu": (None, (1, -1), "GELU_TANH"),
}
HALVES = {"geglu": "GELU", "swiglu": "SILU"}
LOSS = "denoising_loss"
PASSES = (*AFFINE, *HALVES, LOSS)

Call = tuple[Callable[[], None], Sequence["Tensor"]]


def passes_call(variant: Variant) -> Call:
    """A launch, and the tensors that it has to read or to write."""
    import torch

    torch.manual_seed(0)
    of = _affine if variant.op in AFFINE else _loss if variant.op == LOSS else _halves
    return of(variant, getattr(torch, variant.dtype))


def _affine(variant: Variant, dtype: Any) -> Call:
    """A number for each element has the type of x, as a residual has; the others are float32."""
    import torch
    from mmkern.kernels import gated

    from mmkern.reference.activations import Activation

    shape = (variant.rows, variant.depth)
    *shapes, activation = AFFINE[variant.op]

    def modulator(given: Any) -> Tensor | None:
        if given is None:
            return None
        sizes = tuple(n if size < 0 else size for size, n in zip(given, shape, strict=True))
        return torch.randn(sizes, dtype=dtype if sizes == shape else torch.float32)

    x, out = torch.randn(2, *shape).to(dtype).unbind()
    modulators = [modulator(given) for given in shapes]
    arguments, used = [x, *modulators, 0.0, int(Activation[activation])], [x, out, *modulators]
    if not variant.backward:
        return lambda: gated.affine_activation(*arguments, out), _given(used)
    gradients = [torch.empty_like(x), *(None if m is None else torch.empty(m.shape) for m in modulators)]
    launch = gated.affine_activation_backward
    return lambda: launch(out, *arguments, *gradients), _given([*used, *gradients])


def _given(tensors: Sequence[Tensor | None]) -> list[Tensor]:
    return [x for x in tensors if x is not None]


def _halves(variant: Variant, dtype: Any) -> Call:
    import torch
    from mmkern.kernels import gated

    from mmkern.reference.activations import Activation

    activation = int(Activation[HALVES[variant.op]])
    x, out = (torch.randn(variant.rows, halves * variant.depth).to(dtype) for halves in (2, 1))
    dx = torch.empty_like(x)
    if not variant.backward:
        return lambda: gated.gated_activation(x, activation, out), [x, out]
    return lambda: gated.gated_activation_backward(out, x, activation, dx), [out, x, dx]


def _loss(variant: Variant, dtype: Any) -> Call:
    """Two samples with a mask of their rows; the target takes no gradient."""
    import torch
    from mmkern.kernels import denoising_loss

    pred, target, dpred = torch.randn(3, 2, variant.rows // 2, variant.depth).to(dtype).unbind()
    mask, sums = torch.rand(*pred.shape[:2], 1), torch.ones(2)
    used = [pred, target, mask, sums]
    if not variant.backward:
        return lambda: denoising_loss.masked_squared_error(pred, target, mask, sums), used
    launch = denoising_loss.masked_squared_error_backward
    return lambda: launch(sums, pred, target, mask, dpred, None), [*used, dpred]
