"""Vector quantizers, with the parameter names of vector-quantize-pytorch and of the Descript Audio Codec."""

from __future__ import annotations

from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from mmkern import ops
from mmkern.ops import Projections
from mmkern.ops._checks import LARGEST, check_number

from .modulation import _check_channels, _check_sizes


class _Codebook(nn.Module):
    """Codes that follow the rows that choose them, or that are learned; a leading axis of 1 as in their models."""

    initted: Tensor
    cluster_size: Tensor
    embed_avg: Tensor
    embed: Tensor

    def __init__(self, size: int, width: int, options: _Options, made: dict[str, Any]) -> None:
        super().__init__()
        embed = torch.empty(1, size, width, **made)
        nn.init.kaiming_uniform_(embed)
        if options.use_cosine_sim:
            embed = functional.normalize(embed, dim=-1)
        if options.kmeans_init:
            embed.zero_()
        self.register_buffer("initted", torch.tensor(not options.kmeans_init, device=made["device"]))
        self.register_buffer("cluster_size", torch.ones(1, size, **made))
        self.register_buffer("embed_avg", embed.clone())
        if options.learnable_codebook:
            self.embed = nn.Parameter(embed)
        else:
            self.register_buffer("embed", embed)
        self.options = options

    @torch.no_grad()
    def start(self, rows: Tensor) -> None:
        """From the first rows, by k-means."""
        if self.initted:
            return
        rows, size = rows.detach().flatten(0, -2), self.embed.shape[1]
        rows = rows[torch.arange(max(len(rows), size), device=rows.device) % len(rows)]  # copies where they are few
        metric: Literal["l2", "cosine"] = "cosine" if self.options.use_cosine_sim else "l2"
        found = ops.kmeans(rows, size, iterations=self.options.kmeans_iters, metric=metric)
        counts = torch.bincount(found.codes, minlength=size).to(self.cluster_size.dtype)
        self.embed.copy_(found.centers[None])
        self.cluster_size.copy_(counts[None])
        self.embed_avg.copy_(self.embed * counts[:, None])
        self.initted.fill_(True)

    @torch.no_grad()
    def update(self, rows: Tensor, codes: Tensor) -> None:
        size, average = self.cluster_size[0], self.embed_avg[0]
        found = ops.ema_codebook_update(rows, codes, size, average, self.options.decay, self.options.eps)
        codebook = functional.normalize(found.codebook, dim=-1) if self.options.use_cosine_sim else found.codebook
        size, average, least = found.cluster_size, found.embed_avg, self.options.threshold_ema_dead_code
        if least > 0:
            flat = rows.detach().flatten(0, -2).to(codebook.dtype)
            order = torch.randperm(len(flat), device=flat.device)
            sampled = flat[order[torch.arange(len(size), device=flat.device) % len(flat)]]
            is_dead = size < least
            codebook = torch.where(is_dead[:, None], sampled, codebook)
            average = torch.where(is_dead[:, None], sampled * least, average)
            size = size.masked_fill(is_dead, least)
        for buffer, value in ((self.embed, codebook), (self.cluster_size, size), (self.embed_avg, average)):
            buffer.copy_(value[None])


class _Options:
    """What quantizers have in common, checked."""

    def __init__(
        self,
        module: str,
        *,
        decay: float = 0.8,
        eps: float = 1e-5,
        kmeans_init: bool = False,
        kmeans_iters: int = 10,
        use_cosine_sim: bool = False,
        threshold_ema_dead_code: float = 0,
        commitment_weight: float = 1.0,
        learnable_codebook: bool = False,
        ema_update: bool | None = None,
    ) -> None:
        check_number(module, "decay", decay, "a number from 0 to 1", 0.0, 1.0)
        for name, value in (("eps", eps), ("threshold_ema_dead_code", threshold_ema_dead_code)):
            check_number(module, name, value, "a number of at least 0", 0.0, LARGEST)
        check_number(module, "commitment_weight", commitment_weight, "a number of at least 0", 0.0, LARGEST)
        _check_sizes(module, kmeans_iters=kmeans_iters)
        if learnable_codebook and ema_update:
            raise ValueError(f"{module}: learnable_codebook and ema_update are both True, expected at most one of them")
        self.decay, self.eps = decay, eps
        self.kmeans_init, self.kmeans_iters = kmeans_init, kmeans_iters
        self.use_cosine_sim, self.threshold_ema_dead_code = use_cosine_sim, threshold_ema_dead_code
        self.commitment_weight, self.learnable_codebook = commitment_weight, learnable_codebook
        self.ema_update = not learnable_codebook if ema_update is None else ema_update


class VectorQuantizer(nn.Module):
    """Each row replaced by its nearest code; takes the state_dict of vector-quantize-pytorch's ``VectorQuantize``.

    Args:
        dim: D, the width of rows.
        codebook_size: K.
        codebook_dim: the width of codes, D by default; else rows go through ``project_in`` and ``project_out``.
        decay, eps: of the codes' moving average (see ``mmkern.ops.ema_codebook_update``).
        kmeans_init, kmeans_iters: begin with the centres of the first batch.
        use_cosine_sim: rows and codes have the length 1.
        threshold_ema_dead_code: in training, codes with a smaller moving average of rows become rows of the batch.
        commitment_weight: of the loss.
        learnable_codebook: codes are a parameter that the loss teaches, in place of a moving average.
        ema_update: whether codes follow their rows in training; by default where they are not learned.
    Source: van den Oord et al. 2017, eq. 1 to 3; cosines: Yu et al. 2022, §3.2; dead codes: Zeghidour et al. 2021.
    """

    def __init__(
        self,
        dim: int,
        codebook_size: int,
        codebook_dim: int | None = None,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **options: Any,
    ) -> None:
        super().__init__()
        name = "VectorQuantizer"
        narrow = dim if codebook_dim is None else codebook_dim
        _check_sizes(name, dim=dim, codebook_size=codebook_size, codebook_dim=narrow)
        made: dict[str, Any] = {"device": device, "dtype": dtype}
        self.dim, self.options = dim, _Options(name, **options)
        self.project_in, self.project_out = _projections(dim, narrow, made)
        self._codebook = _Codebook(codebook_size, narrow, self.options, made)

    def forward(self, x: Tensor, freeze_codebook: bool = False) -> tuple[Tensor, Tensor, Tensor]:
        """The codes of rows.

        Args:
            x: ``[..., D]``.
            freeze_codebook: leave the codes as they are, in training too.
        Returns: like x, with the gradient of x (straight-through); codes, int64 ``[...]``; the loss,
            ``commitment_weight`` times the mean of ``|z − e|²``, which teaches the codes too where they are learned;
            0 outside of training.
        Raises: TypeError or ValueError where an argument does not fit, with its name.
        """
        _check_channels("VectorQuantizer", x, self.dim)
        quantized, codes, loss = self.quantize(self.project_in(x), freeze_codebook)
        return self.project_out(quantized), codes, loss

    def quantize(self, z: Tensor, freeze_codebook: bool = False) -> tuple[Tensor, Tensor, Tensor]:
        """The same between the projections."""
        book, options = self._codebook, self.options
        if options.use_cosine_sim:
            z = functional.normalize(z, dim=-1)
        if self.training:
            book.start(z)
        learns = self.training and not freeze_codebook
        # A copy, since the moving average is written before the gradient is taken.
        embed = book.embed if options.learnable_codebook else book.embed.clone() if learns else book.embed
        if options.learnable_codebook and freeze_codebook:
            embed = embed.detach()
        found = ops.residual_quantize(z, embed.to(z.dtype), None, options.use_cosine_sim, return_codebook_loss=True)
        codes, quantized = found[0].squeeze(-1), found[1]
        if learns and options.ema_update:
            book.update(z, codes)
        return quantized, codes, _loss(self, found[2], found[3])[0]

    def get_output_from_indices(self, indices: Tensor) -> Tensor:
        """Rows ``[..., D]`` of codes ``[...]``; a code below 0 or from K on stands for zeros."""
        out: Tensor = self.project_out(ops.residual_dequantize(indices[..., None], self._codebook.embed))
        return out


class ResidualVQ(nn.Module):
    """Quantizers of what those before have left; takes the state_dict of vector-quantize-pytorch's ``ResidualVQ``.

    All levels are one pass over the rows. The reconstruction has the gradient of x once; there it has it once a level.

    Args:
        dim: D, the width of rows.
        num_quantizers: Q.
        codebook_size: K, of each.
        codebook_dim: as in ``VectorQuantizer``, of all levels.
        quantize_dropout: in training, leave out the levels behind one that is drawn.
        quantize_dropout_cutoff_index: that one is this or a later one.
        others: those of ``VectorQuantizer``.
    Source: Zeghidour et al. 2021, SoundStream, algorithm 1.
    """

    def __init__(
        self,
        dim: int,
        num_quantizers: int,
        codebook_size: int,
        codebook_dim: int | None = None,
        *,
        quantize_dropout: bool = False,
        quantize_dropout_cutoff_index: int = 0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **options: Any,
    ) -> None:
        super().__init__()
        name = "ResidualVQ"
        narrow = dim if codebook_dim is None else codebook_dim
        _check_sizes(name, dim=dim, num_quantizers=num_quantizers, codebook_size=codebook_size, codebook_dim=narrow)
        expected = f"an int from 0 to {num_quantizers - 1}"
        check_number(
            name, "quantize_dropout_cutoff_index", quantize_dropout_cutoff_index, expected, 0, num_quantizers - 1
        )
        self.dim, self.options = dim, _Options(name, **options)
        self.quantize_dropout, self.cutoff = quantize_dropout, quantize_dropout_cutoff_index
        made: dict[str, Any] = {"device": device, "dtype": dtype}
        self.project_in, self.project_out = _projections(dim, narrow, made)
        self.layers = nn.ModuleList(
            VectorQuantizer(narrow, codebook_size, **made, **options) for _ in range(num_quantizers)
        )

    @property
    def codebooks(self) -> Tensor:
        """``[Q, K, d]``."""
        return torch.cat([layer._codebook.embed for layer in self._quantizers()])

    def _quantizers(self) -> list[VectorQuantizer]:
        return [cast(VectorQuantizer, layer) for layer in self.layers]

    def forward(self, x: Tensor, freeze_codebook: bool = False) -> tuple[Tensor, Tensor, Tensor]:
        """The codes of rows, level by level.

        Args:
            x: ``[..., D]``.
            freeze_codebook: leave the codes as they are, in training too.
        Returns: the reconstruction, like x; codes, int64 ``[..., Q]``, -1 where a level was left out; the loss of each
            level, ``[Q]``, as in ``VectorQuantizer``.
        Raises: TypeError or ValueError where an argument does not fit, with its name.
        """
        _check_channels("ResidualVQ", x, self.dim)
        z = self.project_in(x)
        layers = self._quantizers()
        if self.training and self.quantize_dropout:
            last = int(torch.randint(self.cutoff, len(layers), ()))
            layers = layers[: last + 1]
        one_by_one = self.options.use_cosine_sim or (self.training and not all(a._codebook.initted for a in layers))
        run = self._one_by_one if one_by_one else self._at_once
        out, codes, losses = run(layers, z, freeze_codebook)
        left_out = len(self.layers) - len(layers)
        if left_out:
            codes, losses = functional.pad(codes, (0, left_out), value=-1), functional.pad(losses, (0, left_out))
        return self.project_out(out), codes, losses

    def _at_once(
        self, layers: list[VectorQuantizer], z: Tensor, freeze_codebook: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        embed = torch.cat([layer._codebook.embed for layer in layers]).to(z.dtype)
        if freeze_codebook:
            embed = embed.detach()
        codes, out, *losses = ops.residual_quantize(z, embed, return_codebook_loss=True)
        if self.training and self.options.ema_update and not freeze_codebook:
            left = z.detach()
            for layer, book, of_level in zip(layers, embed, codes.unbind(-1), strict=True):
                layer._codebook.update(left, of_level)
                left = left - book[of_level]
        return out, codes, _loss(self, *losses)

    def _one_by_one(
        self, layers: list[VectorQuantizer], z: Tensor, freeze_codebook: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        left, total, codes, losses = z, torch.zeros_like(z), [], []
        for layer in layers:
            quantized, of_level, loss = layer.quantize(left, freeze_codebook)
            left, total = left - quantized.detach(), total + quantized.detach()
            codes.append(of_level)
            losses.append(loss)
        return total + (z - z.detach()), torch.stack(codes, -1), torch.stack(losses)

    def get_output_from_indices(self, indices: Tensor) -> Tensor:
        """Rows ``[..., D]`` of codes ``[..., n]`` of the first n levels; a code below 0 is none."""
        out: Tensor = self.project_out(ops.residual_dequantize(indices, self.codebooks))
        return out


class FactorizedResidualVQ(nn.Module):
    """Levels whose codes are narrow, with linear layers of their own; takes the state_dict of DAC's quantizer.

    Parameters are ``quantizers.0.in_proj.weight_g``, ``.weight_v`` and ``.bias``, those of ``out_proj``, and
    ``quantizers.0.codebook.weight``. Codes are chosen by their cosine.

    Args:
        input_dim: D, the channels.
        n_codebooks: Q.
        codebook_size: K.
        codebook_dim: d, the width of codes.
    Source: Kumar et al. 2023, High-Fidelity Audio Compression with Improved RVQGAN, §3.2.
    """

    def __init__(
        self,
        input_dim: int = 512,
        n_codebooks: int = 9,
        codebook_size: int = 1024,
        codebook_dim: int = 8,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        sizes = {"input_dim": input_dim, "n_codebooks": n_codebooks}
        _check_sizes("FactorizedResidualVQ", **sizes, codebook_size=codebook_size, codebook_dim=codebook_dim)
        made: dict[str, Any] = {"device": device, "dtype": dtype}
        self.input_dim = input_dim
        self.quantizers = nn.ModuleList(
            _Factorized(input_dim, codebook_size, codebook_dim, made) for _ in range(n_codebooks)
        )

    def forward(self, z: Tensor, n_quantizers: int | None = None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The codes of channels, level by level.

        Args:
            z: ``[B, D, T]``.
            n_quantizers: the first so many levels, from 1 to Q; all by default.
        Returns: the reconstruction, like z; codes, int64 ``[B, n, T]``; the commitment loss and the codebook loss, 0-d,
            each summed over the levels.
        Raises: TypeError or ValueError where an argument does not fit, with its name.
        """
        _check_channels("FactorizedResidualVQ", z, self.input_dim, axis=1)
        codebooks, projections = self._levels(n_quantizers)
        rows = z.transpose(1, 2)
        codes, out, commitment, of_codes = ops.residual_quantize(
            rows, codebooks, projections, normalize=True, return_codebook_loss=True
        )
        return out.transpose(1, 2), codes.transpose(1, 2), commitment.sum(), of_codes.sum()

    def from_codes(self, codes: Tensor) -> Tensor:
        """``[B, D, T]`` of codes ``[B, n, T]``."""
        codebooks, projections = self._levels(None)
        return ops.residual_dequantize(codes.transpose(1, 2), codebooks, projections).transpose(1, 2)

    def _levels(self, count: int | None) -> tuple[Tensor, Projections]:
        most = len(self.quantizers)
        if count is not None and (not isinstance(count, int) or not 1 <= count <= most):
            raise ValueError(f"FactorizedResidualVQ: n_quantizers is {count}, expected an int from 1 to {most}")
        levels = [cast(_Factorized, level) for level in self.quantizers][:count]
        into, back = [level.in_proj for level in levels], [level.out_proj for level in levels]
        return torch.stack([level.codebook.weight for level in levels]), Projections(
            torch.stack([layer.weight for layer in into]),
            torch.stack([layer.weight for layer in back]),
            torch.stack([layer.bias for layer in into]),
            torch.stack([layer.bias for layer in back]),
        )


class _Factorized(nn.Module):
    def __init__(self, wide: int, size: int, narrow: int, made: dict[str, Any]) -> None:
        super().__init__()
        self.in_proj, self.out_proj = _WeightNormed(wide, narrow, made), _WeightNormed(narrow, wide, made)
        self.codebook = nn.Embedding(size, narrow, **made)


class _WeightNormed(nn.Module):
    """A convolution of kernel 1 whose rows have lengths of their own: ``w = g·v / |v|`` (Salimans and Kingma 2016)."""

    def __init__(self, wide: int, narrow: int, made: dict[str, Any]) -> None:
        super().__init__()
        first = nn.Conv1d(wide, narrow, 1, **made)
        self.bias = cast(nn.Parameter, first.bias)
        self.weight_g = nn.Parameter(first.weight.detach().norm(dim=(1, 2), keepdim=True))
        self.weight_v = nn.Parameter(first.weight.detach().clone())

    @property
    def weight(self) -> Tensor:
        """``[narrow, wide]``."""
        w: Tensor = self.weight_v * (self.weight_g / self.weight_v.norm(dim=(1, 2), keepdim=True))
        return w.squeeze(-1)


def _projections(wide: int, narrow: int, made: dict[str, Any]) -> tuple[nn.Module, nn.Module]:
    if wide == narrow:
        return nn.Identity(), nn.Identity()
    return nn.Linear(wide, narrow, **made), nn.Linear(narrow, wide, **made)


def _loss(module: VectorQuantizer | ResidualVQ, commitment: Tensor, of_codes: Tensor) -> Tensor:
    """Of each level."""
    if not module.training:
        return torch.zeros_like(commitment)
    if module.options.learnable_codebook:
        commitment = commitment + (of_codes - of_codes.detach())  # the number once, the gradient of both
    return module.options.commitment_weight * commitment
