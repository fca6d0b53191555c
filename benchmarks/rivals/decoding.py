"""Sampling as one writes it in PyTorch: a sort, or topk first. Both race with exponential numbers that they are given,
where ``torch.multinomial`` would draw them, so that tokens can be compared."""

from torch import Tensor

TOP_K = 50
TOP_P = 0.9


def sample_top_p(logits: Tensor, noise: Tensor) -> Tensor:
    values, order = logits.sort(dim=-1, descending=True)
    return _race(values.softmax(-1), order, noise)


def sample_top_k(logits: Tensor, noise: Tensor) -> Tensor:
    values, order = logits.topk(min(TOP_K, logits.shape[-1]), dim=-1)
    return _race(values.softmax(-1), order, noise)


def _race(p: Tensor, order: Tensor, noise: Tensor) -> Tensor:
    """Of those of the mass, the largest first."""
    p = p.where(p.cumsum(-1) - p < TOP_P, 0.0)
    winner = (p / noise.gather(-1, order)).argmax(-1, keepdim=True)
    return order.gather(-1, winner).squeeze(-1).float()
