"""Calls that the report compiles of the vocabulary family."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tools.gpu_report_passes import Call
    from tools.gpu_report_triton import Variant

# The op, then what is not as usual. "everything": a bias, a soft-cap, sums of weighted logits.
VOCABULARY = (
    "linear_logsumexp",
    "linear_logsumexp, everything",
    "linear_logsumexp, few rows",
    "linear_logsumexp, few tokens",
    "linear_logsumexp, odd tokens",
    "linear_logsumexp, everything and odd tokens",
)


def vocabulary_call(variant: Variant) -> Call:
    """A launch for ``rows`` rows and about as many tokens, or 16, and the tensors that it has to read or to write."""
    import torch
    from mmkern.kernels import vocabulary

    from mmkern.ops._define import OPS

    torch.manual_seed(0)
    name, _, special = variant.op.partition(", ")
    n = 16 if special == "few rows" else variant.rows
    m = 16 if special == "few tokens" else variant.rows - 15 * special.endswith("odd tokens")
    op, d, has_all, dtype = OPS[name], variant.depth, "everything" in special, getattr(torch, variant.dtype)
    given: dict[str, Any] = {
        "input": torch.randn(n, d).to(dtype),
        "linear_weight": (torch.randn(m, d) / d**0.5).to(dtype),
        "linear_bias": torch.randn(m).to(dtype) if has_all else None,
        "weight": torch.rand(m) if has_all else None,
        "target": torch.randint(m, (n,)),
        "softcap": 30.0 if has_all else 0.0,
        "inverse_temperature": 1.0,
        "ignore_index": -100,
        "sums_logits": has_all,
    }
    args = [given[argument] for argument in op.names]
    outs = op.empty_outputs(args)
    used = [a for a in (*args, *outs) if isinstance(a, torch.Tensor)]
    if not variant.backward:
        launch = getattr(vocabulary, name)
        return lambda: launch(*args, *outs), used
    grads = [torch.ones_like(out) for out in outs]
    gradients = [None if args[i] is None else torch.empty_like(args[i]) for i in op.tensors]
    launch = getattr(vocabulary, f"{name}_backward")
    return lambda: launch(*grads, *args, *outs, *gradients), [*used, *grads, *(g for g in gradients if g is not None)]
