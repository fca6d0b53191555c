"""Calls that the report compiles of the retrieval family."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tools.gpu_report_passes import Call
    from tools.gpu_report_triton import Variant

# The op, then k where that is not 10.
RETRIEVAL = (
    "pairwise_topk",
    "cosine_pairwise_topk",
    "l2_pairwise_topk",
    "lorentz_pairwise_topk",
    "linear_topk",
    "linear_topk, 50",
    "linear_topk, 64",
)


def retrieval_call(variant: Variant) -> Call:
    """A launch for ``rows`` rows and as many to choose from, and the tensors that it has to read or to write."""
    import torch
    from mmkern.kernels import retrieval

    from mmkern.ops._define import OPS

    torch.manual_seed(0)
    n, d = variant.rows, variant.depth
    name, _, k = variant.op.partition(", ")
    op = OPS[name]
    x, y = (torch.randn(2, n, d) / d**0.5).to(getattr(torch, variant.dtype)).unbind()
    given: dict[str, Any] = {
        **dict.fromkeys(("x", "h"), x),
        **dict.fromkeys(("y", "weight"), y),
        "curvature": torch.ones(()),
        "linear_bias": torch.randn(n),
        "k": int(k or 10),
        "softcap": 30.0,
        "sums_logs": True,
    }
    args = [given[argument] for argument in op.names]
    outs = op.empty_outputs(args)
    used = [a for a in (*args, *outs) if isinstance(a, torch.Tensor)]
    launch = getattr(retrieval, name)
    return lambda: launch(*args, *outs), used
