"""Codes as one writes them in PyTorch: all distances as a matrix, and its argmin; and what codes are for."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from mmkern.bench.case import Peer


def nearest_code(x: Tensor, codebook: Tensor) -> Tensor:
    """The distances."""
    distances = torch.cdist(x, codebook)
    return distances.gather(1, distances.argmin(1)[:, None]).squeeze(1)


def cosine_nearest_code(x: Tensor, codebook: Tensor) -> Tensor:
    cosines = functional.normalize(x, dim=-1) @ functional.normalize(codebook, dim=-1).T
    return 1 - cosines.gather(1, cosines.argmax(1)[:, None]).squeeze(1)


def vector_quantize_pytorch(task: str, args: Sequence[Any]) -> Peer:
    """Its VectorQuantize of the same codebook, in evaluation; which gives the codes themselves."""
    from vector_quantize_pytorch import VectorQuantize

    x, codebook = (a.detach() for a in args)
    module = VectorQuantize(codebook.shape[1], codebook.shape[0]).eval()
    module._codebook.embed.copy_(codebook)

    def quantize(rows: Tensor) -> Tensor:
        out: Tensor = module(rows)[0]
        return out

    return Peer(torch.no_grad()(quantize), [x[None]], [], lambda out: (x - out[0]).norm(dim=-1))


def residual_quantize(
    x: Tensor, codebooks: Tensor, in_weight: Tensor, in_bias: Tensor, out_weight: Tensor, out_bias: Tensor
) -> tuple[Tensor, Tensor]:
    """As DAC has it: the losses of each level, and the mean square of the reconstruction."""
    left, total, losses = x, torch.zeros_like(x), []
    for q in range(codebooks.shape[0]):
        z = functional.linear(left, in_weight[q], in_bias[q])
        rows, table = functional.normalize(z, dim=-1), functional.normalize(codebooks[q], dim=-1)
        distances = rows.square().sum(1, keepdim=True) - 2 * rows @ table.T + table.square().sum(1)
        e = functional.embedding(distances.argmin(1), codebooks[q])
        losses.append(functional.mse_loss(z, e.detach()) + functional.mse_loss(e, z.detach()))
        step = functional.linear(z + (e - z).detach(), out_weight[q], out_bias[q])
        left, total = left - step, total + step
    return torch.stack(losses), total.square().mean()


def residual_dequantize(codebooks: Tensor, out_weight: Tensor, out_bias: Tensor, codes: Tensor) -> Tensor:
    levels = enumerate(codes.unbind(-1))
    return sum(  # type: ignore[return-value]
        functional.linear(functional.embedding(code, codebooks[q]), out_weight[q], out_bias[q]) for q, code in levels
    )


def codes_embedding_mean(tables: Tensor, codes: Tensor) -> Tensor:
    total: Any = sum(functional.embedding(code, tables[q]) for q, code in enumerate(codes.unbind(-1)))
    mean: Tensor = total / len(tables)
    return mean


def ema_codebook_update(x: Tensor, codes: Tensor, cluster_size: Tensor, embed_avg: Tensor) -> tuple[Tensor, ...]:
    counts = torch.bincount(codes, minlength=len(cluster_size)).to(x.dtype)
    sums = torch.zeros_like(embed_avg).index_add(0, codes, x)
    cluster_size, embed_avg = cluster_size.lerp(counts, 0.2), embed_avg.lerp(sums, 0.2)
    total = cluster_size.sum()
    smoothed = (cluster_size + 1e-5) / (total + len(cluster_size) * 1e-5) * total
    return embed_avg / smoothed[:, None], cluster_size, embed_avg


def kmeans(x: Tensor, centers: Tensor, iterations: int) -> Tensor:
    """What is left between rows and centres after so many steps."""
    distances = torch.cdist(x, centers)
    for _ in range(iterations):
        codes = distances.argmin(1)
        counts = torch.bincount(codes, minlength=len(centers)).clamp_min(1).to(x.dtype)
        centers = torch.zeros_like(centers).index_add(0, codes, x) / counts[:, None]
        distances = torch.cdist(x, centers)
    return distances.amin(1).square().sum()
