"""Calls that the report compiles of the decoding family."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tools.gpu_report_passes import Call
    from tools.gpu_report_triton import Variant

SAMPLING = ("sample_tokens", "sample_tokens, allowed")
STEPS, ENTROPY = ("absorbing_step", "absorbing_step, five branches"), "absorbing_score_entropy"
MASKED = "masked_decode_step"
LOG_PROB, RENORMALIZE = "token_log_prob", "renormalize"
GREEDY, BEAM, ALIGN, EDITS = "ctc_greedy_decode", "ctc_beam_decode", "ctc_forced_align", "edit_distance"
DECODING = (*SAMPLING, *STEPS, ENTROPY, MASKED, LOG_PROB, RENORMALIZE, GREEDY, BEAM, ALIGN, EDITS)
_TYPES = ("float32", "bfloat16")
# Op, type, columns, whether it is the gradient. 1025: the codes of an RVQ and MASK; 5000: several tiles.
DECODING_VARIANTS = (
    *((op, dtype, 32000, False) for op in (*SAMPLING, LOG_PROB, RENORMALIZE, GREEDY) for dtype in _TYPES),
    *((op, dtype, 1025, False) for op in (*STEPS, ENTROPY) for dtype in _TYPES),
    *((MASKED, dtype, depth, False) for dtype in _TYPES for depth in (1024, 5000)),
    *((ENTROPY, dtype, 1025, True) for dtype in _TYPES),
    *((LOG_PROB, dtype, 32000, True) for dtype in _TYPES),
    *((op, dtype, 32, False) for op in (BEAM, ALIGN) for dtype in _TYPES),
    (STEPS[1], "float32", 5000, False),
    (EDITS, "float32", 100, False),
)


def decoding_call(variant: Variant) -> Call:
    """A launch for ``rows`` rows of ``depth`` columns, and the tensors that it has to read or to write."""
    families = {
        _ctc_call: (GREEDY, BEAM, ALIGN, EDITS),
        _sampling_call: SAMPLING,
        _masked_call: (MASKED,),
        _probabilities_call: (LOG_PROB, RENORMALIZE),
    }
    return next((call for call, ops in families.items() if variant.op in ops), _absorbing_call)(variant)


def _sampling_call(variant: Variant) -> Call:
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


def _absorbing_call(variant: Variant) -> Call:
    """Two samples, all of whose rows are masked."""
    import torch
    from mmkern.kernels import absorbing

    from mmkern.ops._define import OPS

    torch.manual_seed(0)
    rows, size, dtype = (2, variant.rows // 2), variant.depth, getattr(torch, variant.dtype)
    tokens, rates = torch.full(rows, size - 1), torch.full((2,), 0.5 / size)
    if variant.op == ENTROPY:
        log_scores = torch.randn(*rows, size).to(dtype)
        args = [log_scores, tokens - 1, tokens > 0, rates]
        outs = OPS[ENTROPY].empty_outputs(args)
        if variant.backward:
            gradient = torch.empty_like(log_scores)
            launch = absorbing.absorbing_score_entropy_backward
            return lambda: launch(*outs, *args, gradient), [*outs, *args, gradient]
        return lambda: absorbing.absorbing_score_entropy(*args, *outs), [*args, *outs]
    branches = 5 if "five" in variant.op else 1
    log_scores = torch.randn(branches, *rows, size).to(dtype).movedim(0, -2)
    weights = torch.tensor([[-4.5, 1.9, 1.0, 1.0, 1.6]]) if branches > 1 else None
    args = [log_scores, tokens, torch.zeros(2, dtype=torch.int64), rates, weights]
    outs = OPS["absorbing_step"].empty_outputs(args)
    used = [a for a in (*args, *outs) if isinstance(a, torch.Tensor)]
    return lambda: absorbing.absorbing_step(*args, *outs), used


def _masked_call(variant: Variant) -> Call:
    """Two samples, all of whose positions are masked."""
    import torch
    from mmkern.kernels import masked_decode

    from mmkern.ops._define import OPS

    torch.manual_seed(0)
    positions, dtype = (2, variant.rows // 2), getattr(torch, variant.dtype)
    tokens = torch.full(positions, variant.depth)
    args = [
        torch.randn(*positions, variant.depth).to(dtype),
        tokens,
        tokens > 0,
        torch.zeros(2, dtype=torch.int64),
        torch.tensor([[21.0, 0.8, 0.5]]),
        torch.tensor([variant.rows // 4]),
    ]
    outs = OPS[MASKED].empty_outputs(args)
    return lambda: masked_decode.masked_decode_step(*args, *outs), [*args, *outs]


def _probabilities_call(variant: Variant) -> Call:
    import torch
    from mmkern.kernels import probabilities

    from mmkern.ops._define import OPS

    torch.manual_seed(0)
    n, size = variant.rows, variant.depth
    logits = torch.randn(n, size).to(getattr(torch, variant.dtype))
    if variant.op == RENORMALIZE:
        args = [logits.softmax(-1), torch.tensor([[50.0, 0.9]])]
        out = torch.empty_like(logits)
        return lambda: probabilities.renormalize(*args, out), [*args, out]
    args = [logits, torch.randint(size, (n,))]
    outs = OPS[LOG_PROB].empty_outputs(args)
    if variant.backward:
        gradient = torch.empty_like(logits)
        given = [outs[0], *args, *outs]
        return lambda: probabilities.token_log_prob_backward(*given, gradient), [*args, *outs, gradient]
    return lambda: probabilities.token_log_prob(*args, *outs), [*args, *outs]


def _ctc_call(variant: Variant) -> Call:
    """The rows are frames of two sequences; of edit distance pairs, of as many tokens as there are columns."""
    import torch
    from mmkern.kernels import ctc, ctc_align, ctc_beam, edit_distance

    from mmkern.ops._define import OPS

    torch.manual_seed(0)
    kernels = {GREEDY: ctc, BEAM: ctc_beam, ALIGN: ctc_align, EDITS: edit_distance}
    if variant.op == EDITS:
        lengths = torch.full((variant.rows,), variant.depth)
        args = [*torch.randint(20, (2, variant.rows, variant.depth)), lengths, lengths]
    else:
        frames = variant.rows // 2
        log_probs = torch.randn(2, frames, variant.depth).to(getattr(torch, variant.dtype))
        lengths = torch.full((2,), frames)
        args = {
            GREEDY: [log_probs, lengths, 0],
            BEAM: [log_probs, lengths, 100, 0, 4, -torch.inf],
            ALIGN: [log_probs, torch.randint(1, variant.depth, (2, frames // 2)), lengths, None, 0],
        }[variant.op]
    launch = getattr(kernels[variant.op], variant.op)
    outs = OPS[variant.op].empty_outputs(args)
    return lambda: launch(*args, *outs), [a for a in (*args, *outs) if isinstance(a, torch.Tensor)]
