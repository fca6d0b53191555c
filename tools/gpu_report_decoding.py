"""Calls that the report compiles of the decoding family."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tools.gpu_report_passes import Call
    from tools.gpu_report_triton import Variant

DECODING = ("sample_tokens", "sample_tokens, allowed")


def decoding_call(variant: Variant) -> Call:
    """A launch for ``rows`` rows of ``depth`` logits, and the tensors that it has to read or to write."""
    import torch
    from mmkern.kernels import decoding

    from mmkern.ops._define import OPS
    from mmkern.reference.decoding import NEUTRAL, Filter

    torch.manual_seed(0)
    n, size = variant.rows, variant.depth
    logits = torch.randn(n, size).to(getattr(torch, variant.dtype))
    asked = {Filter.TOP_K: 50.0, Filter.TEMPERATURE: 0.8, Filter.TOP_P: 0.9, Filter.MIN_P: 0.01, Filter.TYPICAL_P: 0.9}
    filters = torch.tensor([[(NEUTRAL | asked)[column] for column in Filter]])
    allowed = torch.full((n, -(-size // 64)), -1) if "allowed" in variant.op else None
    args = [logits, torch.zeros(1, 2, dtype=torch.int64), filters, None, allowed]
    outs = OPS["sample_tokens"].empty_outputs(args)
    used = [a for a in (*args, *outs) if isinstance(a, torch.Tensor)]
    return lambda: decoding.sample_tokens(*args, *outs), used
