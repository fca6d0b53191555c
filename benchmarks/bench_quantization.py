"""Why the quantization family is worth having: codes without the matrix of distances, beside that matrix."""

import importlib.util
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.rivals import quantization as rivals
from mmkern import ops
from mmkern.bench.case import Case, Family, Shape, load_shapes

SHAPES = load_shapes(Path(__file__).with_name("shapes.yaml"))
HAS_PEER = importlib.util.find_spec("vector_quantize_pytorch") is not None
LATENT = 256  # channels beside the 8 of a code
STEPS = 5


def arguments(task: str, shape: Shape, generator: torch.Generator) -> list[Any]:
    assert shape.others is not None

    def randn(*sizes: int) -> Tensor:
        return torch.randn(*sizes, generator=generator)

    n, k, d, levels = shape.rows, shape.others, shape.width, shape.batch or 3
    codes = torch.randint(0, k, (n, levels), generator=generator)
    tables = randn(levels, k, d)
    out = randn(levels, LATENT, d) / d, 0.1 * randn(levels, LATENT)
    if task == "residual_quantize":
        return [randn(n, LATENT), tables, randn(levels, d, LATENT) / 16, 0.1 * randn(levels, d), *out]
    if task == "residual_dequantize":
        return [tables, *out, codes]
    if task == "codes_embedding_mean":
        return [tables, codes]
    if task == "ema_codebook_update":
        return [randn(n, d), codes[:, 0].contiguous(), torch.ones(k), randn(k, d)]
    if task == "kmeans":
        x = randn(n, d)
        return [x, x[:k].clone(), STEPS]
    return [randn(n, d), randn(k, d)]


def residual_quantize(x: Tensor, codebooks: Tensor, *given: Tensor) -> tuple[Tensor, Tensor]:
    in_weight, in_bias, out_weight, out_bias = given
    projections = ops.Projections(in_weight, out_weight, in_bias, out_bias)
    _, reconstruction, *losses = ops.residual_quantize(
        x, codebooks, projections, normalize=True, return_codebook_loss=True
    )
    return losses[0] + losses[1], reconstruction.square().mean()


def residual_dequantize(codebooks: Tensor, out_weight: Tensor, out_bias: Tensor, codes: Tensor) -> Tensor:
    in_weight = out_weight.transpose(1, 2)  # which is not read
    return ops.residual_dequantize(codes, codebooks, ops.Projections(in_weight, out_weight, None, out_bias))


def kmeans(x: Tensor, centers: Tensor, iterations: int) -> Tensor:
    found = ops.kmeans(x, len(centers), init=centers, iterations=iterations, tol=0.0)
    return found.inertia[-1].to(x.dtype)


def product(args: Any) -> tuple[Tensor, Tensor]:
    """Of rows with all codes."""
    x, codes = args[0], args[1].flatten(0, -2)
    return x[:, : codes.shape[1]].contiguous(), codes


QUANTIZATION = Family(
    name="quantization",
    arguments=arguments,
    rivals={
        "nearest_code": rivals.nearest_code,
        "nearest_code, cosine": rivals.cosine_nearest_code,
        "residual_quantize": rivals.residual_quantize,
        "residual_dequantize": rivals.residual_dequantize,
        "codes_embedding_mean": rivals.codes_embedding_mean,
        "ema_codebook_update": rivals.ema_codebook_update,
        "kmeans": rivals.kmeans,
    },
    ours={
        "nearest_code": lambda x, codebook: ops.nearest_code(x, codebook, return_distance=True)[1],
        "nearest_code, cosine": lambda x, codebook: ops.nearest_code(x, codebook, "cosine", return_distance=True)[1],
        "residual_quantize": residual_quantize,
        "residual_dequantize": residual_dequantize,
        "codes_embedding_mean": lambda tables, codes: ops.codes_embedding_mean(codes, tables),
        "ema_codebook_update": lambda *args: tuple(ops.ema_codebook_update(*args)),
        "kmeans": kmeans,
    },
    flops=lambda op, backward: {"kmeans": 2.0 * (STEPS + 1)}.get(op, 2.0),
    yardstick=lambda op: "sgemm" if op in ("nearest_code", "residual_quantize", "kmeans") else "copy",
    product=product,
    peer_name="vector-quantize-pytorch",
    peer=rivals.vector_quantize_pytorch,
    made_of={
        "residual_dequantize": "codes_embedding",
        "codes_embedding_mean": "codes_embedding",
        "ema_codebook_update": "code_sums",
        "kmeans": "nearest_code",
    },
)

CASES = [
    Case(QUANTIZATION, "nearest_code", SHAPES["latents_of_vq_vae"], with_peer=HAS_PEER),
    Case(QUANTIZATION, "nearest_code", SHAPES["latents_of_vqgan"], with_peer=HAS_PEER),
    Case(QUANTIZATION, "residual_quantize", SHAPES["codec_frames"]),
    Case(QUANTIZATION, "codes_embedding_mean", SHAPES["codec_tokens"]),
    Case(QUANTIZATION, "residual_quantize", SHAPES["codec_frames"], mode="forward+backward", level="full"),
    Case(QUANTIZATION, "residual_quantize", SHAPES["codec_frames"], threads=2, level="full"),
    Case(QUANTIZATION, "residual_dequantize", SHAPES["codec_frames"], level="full"),
    Case(QUANTIZATION, "codes_embedding_mean", SHAPES["codec_tokens"], mode="forward+backward", level="full"),
    Case(QUANTIZATION, "ema_codebook_update", SHAPES["latents_of_vq_vae"], level="full"),
    Case(QUANTIZATION, "kmeans", SHAPES["latents_of_vq_vae"], level="full"),
    Case(QUANTIZATION, "nearest_code", SHAPES["latents_of_vq_vae"], variant="cosine", level="full"),
    Case(QUANTIZATION, "nearest_code", SHAPES["latents_of_vq_vae"], threads=2, level="full"),
]


def test_quantization(case: Case, side: str, timed: Any) -> None:
    """Times one side of a case; fails only where a result is wrong (see conftest.py)."""
    timed(case, side)
