"""Steps from logits to tokens as one writes them in PyTorch: MaskGCT's step, speculative sampling, and probabilities of
the largest by a sort."""

import math

import torch
from torch import Tensor

KEEP, TEMPERATURE, RATIO = 21, 0.8, 0.4
TOP_K, TOP_P, THRESHOLD = 50, 0.9, 0.5


def masked_decode_step(logits: Tensor, tokens: Tensor, masked: Tensor) -> Tensor:
    values, indices = logits.topk(min(KEEP, logits.shape[-1]), dim=-1)
    kept = torch.full_like(logits, -math.inf).scatter(-1, indices, values)
    gumbel = -(-torch.rand_like(kept).log()).log()
    drawn = (kept / TEMPERATURE + gumbel).argmax(-1)
    p = kept.softmax(-1).gather(-1, drawn[..., None]).squeeze(-1).where(masked, 2.0)
    again = p.argsort(dim=-1, stable=True)[:, : math.floor(RATIO * p.shape[1])]
    stays = torch.zeros_like(masked).scatter(-1, again, True) & masked
    return drawn.where(masked & ~stays, tokens).float()


def token_log_prob(logits: Tensor, tokens: Tensor) -> Tensor:
    return logits.log_softmax(-1).gather(-1, tokens[:, None]).squeeze(-1)


def renormalize_top_k(probs: Tensor) -> Tensor:
    values, indices = probs.topk(min(TOP_K, probs.shape[-1]), dim=-1)
    return torch.zeros_like(probs).scatter(-1, indices, values / values.sum(-1, keepdim=True))


def renormalize_top_p(probs: Tensor) -> Tensor:
    values, indices = probs.sort(dim=-1, descending=True)
    values = values.where(values.cumsum(-1) - values < TOP_P * values.sum(-1, keepdim=True), 0.0)
    return torch.zeros_like(probs).scatter(-1, indices, values / values.sum(-1, keepdim=True))


def verify_draft_tokens(target: Tensor, draft: Tensor, tokens: Tensor) -> Tensor:
    p, q = (x[:, : tokens.shape[1]].gather(-1, tokens[..., None]).squeeze(-1) for x in (target, draft))
    taken = (torch.rand_like(p) * q < p).long().cumprod(1).sum(1)
    padded = torch.nn.functional.pad(draft, (0, 0, 0, 1))
    rest = (target - padded).clamp_min(0).gather(1, taken[:, None, None].expand(-1, 1, target.shape[-1]))[:, 0]
    own = torch.multinomial(rest, 1)
    place = torch.arange(tokens.shape[1] + 1)
    found = torch.nn.functional.pad(tokens, (0, 1)).where(place < taken[:, None], -1)
    return found.scatter(1, taken[:, None], own).float()


def error_gate(token_log_probs: Tensor, error_logits: Tensor) -> Tensor:
    return (1 - token_log_probs.exp() * (1 - error_logits.sigmoid()) > THRESHOLD).float()
