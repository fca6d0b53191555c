"""Calls that the report compiles of the contrastive family."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tools.gpu_report_passes import Call
    from tools.gpu_report_triton import Variant

# The op, then what is not as usual: that positive pairs are many, that no gradient is made.
LOG_SUMS = tuple(
    f"{op}{positives}"
    for op in ("pairwise_logsumexp", "lorentz_pairwise_logsumexp")
    for positives in ("", ", positives")
)
# Told by labels, or by rows to be forgotten, which pairs are positive and which count.
CHOICES = ("labelled_pairwise_logsumexp", "retained_pairwise_logsumexp", "lorentz_retained_pairwise_logsumexp")
SIGMOID = ("sigmoid_loss", "sigmoid_loss, loss alone")
# More pairs than a backward has weights of at a time.
SEVERAL_BLOCKS = 4096 + 128


def contrastive_call(variant: Variant) -> Call:
    """A launch for two sets of ``rows`` points, and the tensors that it has to read or to write."""
    import torch
    from mmkern.kernels import contrastive

    from mmkern.ops._define import OPS

    torch.manual_seed(0)
    n, d = variant.rows, variant.depth
    name, _, special = variant.op.partition(", ")
    op = OPS[name]
    x, y = (torch.randn(2, n, d) / d**0.5).to(getattr(torch, variant.dtype)).unbind()
    given: dict[str, Any] = {
        "x": x,
        "y": y,
        "curvature": torch.ones(()),
        "logit_scale": torch.ones(()),
        "logit_bias": torch.zeros(()),
        "positive_mask": torch.rand(n, n) < 0.1 if special == "positives" else None,
        "factor": 1 / n,
        "positive_diagonal": special != "positives",
        "keeps_products": False,
        **dict.fromkeys(("x_labels", "y_labels"), torch.randint(0, 8, (n, 12))),
        "first_words": 2,
        **dict.fromkeys(("x_forgotten", "y_forgotten"), torch.rand(n) < 0.5),
        "makes_gradients": special != "loss alone",
    }
    args = [given[argument] for argument in op.names]
    outs = op.empty_outputs(args)
    used = [a for a in (*args, *outs) if isinstance(a, torch.Tensor)]
    if not variant.backward:
        launch = getattr(contrastive, name)
        return lambda: launch(*args, *outs), used
    grads = [torch.ones_like(out) for out in outs[: op.differentiable]]
    gradients = [torch.empty_like(args[i]) for i in op.tensors]
    launch = getattr(contrastive, f"{name}_backward")
    return lambda: launch(*grads, *args, *outs, *gradients), [*used, *grads, *gradients]
