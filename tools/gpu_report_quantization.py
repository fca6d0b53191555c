"""Calls that the report compiles of the quantization family."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tools.gpu_report_passes import Call
    from tools.gpu_report_triton import Variant

NEAREST = ("nearest_code", "cosine_nearest_code")
LEVELS = ("residual_quantize", "residual_quantize, projections", "residual_quantize, cosine projections")
TABLES = ("codes_embedding", "code_sums")
QUANTIZATION = (*NEAREST, *LEVELS, *TABLES)
_LEVELS = 2
_TYPES = ("float32", "bfloat16")
# Op, type, columns, whether it is the gradient, rows. 123: rows that are not copied by 16 bytes.
QUANTIZATION_VARIANTS = (
    *((op, dtype, depth, False, 512) for op in NEAREST for dtype in _TYPES for depth in (512, 8)),
    *((op, "bfloat16", 123, False, 512) for op in NEAREST),
    *((op, dtype, 8, False, 512) for op in LEVELS for dtype in _TYPES),
    *((op, dtype, 32 if op == LEVELS[0] else 256, False, 128) for op in (*LEVELS, *TABLES) for dtype in _TYPES),
    *((TABLES[0], dtype, 256, True, 128) for dtype in _TYPES),
)


def quantization_call(variant: Variant) -> Call:
    """A launch for ``rows`` rows and as many codes, of 8 channels beside projections, and what it has to move."""
    import torch
    from mmkern.kernels import quantization

    from mmkern.ops._define import OPS

    torch.manual_seed(0)
    n, d, name = variant.rows, variant.depth, variant.op.partition(", ")[0]
    dtype = getattr(torch, variant.dtype)

    def randn(*shape: int) -> Any:
        return torch.randn(*shape).to(dtype)

    args: list[Any] = [randn(n, d), randn(n, d)]
    codes = torch.randint(0, n, (n, _LEVELS))
    if name == "codes_embedding":
        args = [randn(_LEVELS, n, d), codes, True]
    elif name == "code_sums":
        args = [randn(n, d), codes[:, 0].contiguous(), n]
    elif "projections" in variant.op:
        weights = randn(_LEVELS, 8, d), randn(_LEVELS, 8), randn(_LEVELS, d, 8), randn(_LEVELS, d)
        args = [randn(n, d), randn(_LEVELS, n, 8), *weights, "cosine" in variant.op]
    elif name == "residual_quantize":
        args = [randn(n, d), randn(_LEVELS, n, d), *[None] * 4, False]
    outs = OPS[name].empty_outputs(args)
    used = [a for a in (*args, *outs) if isinstance(a, torch.Tensor)]
    if not variant.backward:
        return lambda: getattr(quantization, name)(*args, *outs), used
    gradients = torch.empty_like(args[0])
    launch = getattr(quantization, f"{name}_backward")
    return lambda: launch(outs[0], *args, gradients), [outs[0], codes, gradients]
