"""Norms and their modulation, with the parameter names of torch's and diffusers' modules."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from mmkern import ops
from mmkern.ops._checks import FLOATING, LARGEST, accumulation_dtype, check_number
from mmkern.ops.gated import ActivationName, _activation

NormName = Literal["layer_norm", "fp32_layer_norm", "rms_norm"]


class RMSNorm(nn.RMSNorm):
    """Root-mean-square norm of the last axis; takes the state_dict of ``torch.nn.RMSNorm``.

    Args:
        normalized_shape: C.
        eps: added to the mean square, in units of x²; None for the ε of float32 (float64 for float64), as in torch.
        elementwise_affine: whether it has a weight.
        weight_offset: ``y = n·(weight_offset + weight)``: 1.0 for Gemma, whose weights start at 0.
    Source: Zhang and Sennrich 2019, eq. 4.
    """

    def __init__(
        self,
        normalized_shape: int | tuple[int] | list[int],
        eps: float | None = None,
        elementwise_affine: bool = True,
        *,
        weight_offset: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        is_sequence = isinstance(normalized_shape, (tuple, list)) and len(normalized_shape) == 1
        _check_sizes("RMSNorm", normalized_shape=normalized_shape[0] if is_sequence else normalized_shape)  # type: ignore[index]
        if eps is not None:
            _check_eps("RMSNorm", eps)
        check_number("RMSNorm", "weight_offset", weight_offset, "a finite number", -LARGEST, LARGEST)
        self.weight_offset = weight_offset
        super().__init__(normalized_shape, eps, elementwise_affine, device, dtype)

    def reset_parameters(self) -> None:
        """``weight_offset + weight`` is 1."""
        if self.elementwise_affine:
            nn.init.constant_(self.weight, 1.0 - self.weight_offset)

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Any:
        """``[..., C]`` like x; with a residual of the shape and dtype of x, the norm of ``r = residual + x``, and r."""
        _check_channels("RMSNorm", x, self.normalized_shape[0])
        eps = torch.finfo(accumulation_dtype(x.dtype)).eps if self.eps is None else self.eps
        return ops.rms_norm(x, self.weight, eps=eps, weight_offset=self.weight_offset, residual=residual)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, weight_offset={self.weight_offset}"


class GroupNormAct(nn.GroupNorm):
    """Group norm and the activation behind it; takes the state_dict of ``torch.nn.GroupNorm``.

    Args:
        num_groups: divides ``num_channels``.
        num_channels: C.
        eps: added to the variance, in units of x².
        affine: whether it has a weight and a bias.
        act: "silu", "gelu", "gelu_tanh", "relu", or None for none.
    Source: Wu and He 2018, eq. 7.
    """

    def __init__(
        self,
        num_groups: int,
        num_channels: int,
        eps: float = 1e-5,
        affine: bool = True,
        *,
        act: ActivationName | None = "silu",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        name = "GroupNormAct"
        _check_sizes(name, num_groups=num_groups, num_channels=num_channels)
        if num_channels % num_groups:
            raise ValueError(f"{name}: num_groups is {num_groups}, expected a divisor of num_channels, {num_channels}")
        _check_eps(name, eps)
        _activation(name, act, "act")
        super().__init__(num_groups, num_channels, eps, affine, device, dtype)
        self.act: ActivationName | None = act

    def forward(self, x: Tensor, scale_shift: tuple[Tensor, Tensor] | None = None) -> Tensor:
        """``act((n·weight + bias)·(1 + scale) + shift)``.

        Args:
            x: ``[B, C, ...]``.
            scale_shift: scale and shift, each ``[B, C]`` or with axes of size 1 behind.
        Returns: of the shape and dtype of x.
        Raises: TypeError or ValueError where an argument does not fit, with its name.
        """
        _check_channels("GroupNormAct", x, self.num_channels, axis=1)
        return ops.group_norm_act(x, self.num_groups, self.weight, self.bias, self.eps, self.act, scale_shift)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, act={self.act}"


class FiLM(nn.Module):
    """Feature-wise linear modulation: ``act((gamma_offset + gamma)·x + beta)``, ``gamma, beta = linear(condition)``.

    Args:
        condition_dim: D, the width of the condition.
        num_channels: C.
        gamma_offset: 1.0 where gamma is a difference from no change; 0.0 for gamma itself.
        activation: "silu", "gelu", "gelu_tanh", "relu", or None for none.
        channels_first: x is ``[B, C, ...]``, such as an image.
        bias: whether ``linear`` has one.
    Source: Perez et al. 2018, eq. 1 and 2.
    """

    def __init__(
        self,
        condition_dim: int,
        num_channels: int,
        *,
        gamma_offset: float = 1.0,
        activation: ActivationName | None = None,
        channels_first: bool = False,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        _check_sizes("FiLM", condition_dim=condition_dim, num_channels=num_channels)
        check_number("FiLM", "gamma_offset", gamma_offset, "a finite number", -LARGEST, LARGEST)
        _activation("FiLM", activation)
        self.num_channels, self.gamma_offset, self.channels_first = num_channels, gamma_offset, channels_first
        self.activation: ActivationName | None = activation
        self.linear = nn.Linear(condition_dim, 2 * num_channels, bias, device, dtype)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        """x modulated.

        Args:
            x: ``[B, ..., C]``, or ``[B, C, ...]`` where channels are first.
            condition: ``[B, D]``, or, where channels are last, what has axes of x before D, such as ``[B, L, D]``.
        Returns: of the shape and dtype of x.
        Raises: TypeError or ValueError where an argument does not fit, with its name.
        """
        _check_channels("FiLM", x, self.num_channels, axis=1 if self.channels_first else -1)
        _check_channels("FiLM", condition, self.linear.in_features, name="condition")
        if self.channels_first and condition.dim() != 2:
            expected = f"[{x.shape[0]}, {self.linear.in_features}]"
            raise ValueError(f"FiLM: condition has shape {list(condition.shape)}, expected {expected}")
        modulators = self.linear(condition)
        if self.channels_first:
            modulators = modulators.reshape(*modulators.shape, *[1] * (x.dim() - 2))
        gamma, beta = modulators.chunk(2, 1 if self.channels_first else -1)
        return ops.film(x, gamma, beta, gamma_offset=self.gamma_offset, activation=self.activation)

    def extra_repr(self) -> str:
        return f"gamma_offset={self.gamma_offset}, activation={self.activation}, channels_first={self.channels_first}"


class AdaLayerNormZero(nn.Module):
    """Adaptive layer norm of a DiT block, and the block's other modulators; takes the state_dict of diffusers' module.

    ``shift, scale, gate, shift_mlp, scale_mlp, gate_mlp = linear(silu(emb))``.

    Args:
        embedding_dim: C.
        num_embeddings: classes of an embedding of its own, ``emb``, of timesteps and labels; None for none. In training
            it drops a tenth of the labels.
        norm_type: "layer_norm" or "fp32_layer_norm"; sums are kept in float32 at least by both.
        bias: whether ``linear`` has one.
    Source: Peebles and Xie 2023 (DiT), §3.2.
    """

    def __init__(
        self,
        embedding_dim: int,
        num_embeddings: int | None = None,
        norm_type: NormName = "layer_norm",
        bias: bool = True,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        name = "AdaLayerNormZero"
        _check_sizes(name, embedding_dim=embedding_dim)
        if norm_type not in ("layer_norm", "fp32_layer_norm"):
            raise ValueError(f"{name}: norm_type is {norm_type!r}, expected 'layer_norm' or 'fp32_layer_norm'")
        self.emb = None
        if num_embeddings is not None:
            _check_sizes(name, num_embeddings=num_embeddings)
            self.emb = _TimestepAndLabel(num_embeddings, embedding_dim, device=device, dtype=dtype)
        self.linear = nn.Linear(embedding_dim, 6 * embedding_dim, bias, device, dtype)
        self.norm = nn.LayerNorm(embedding_dim, 1e-6, elementwise_affine=False)

    def forward(
        self,
        x: Tensor,
        timestep: Tensor | None = None,
        class_labels: Tensor | None = None,
        hidden_dtype: torch.dtype | None = None,
        emb: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """x normalized, scaled and shifted, and what the block needs later.

        Args:
            x: ``[B, L, C]``.
            timestep, class_labels: ``[B]``, of the module's own embedding.
            hidden_dtype: of that embedding's products.
            emb: ``[B, C]``, read where the module has no embedding of its own.
        Returns: ``[B, L, C]``; then gate, shift_mlp, scale_mlp and gate_mlp, each ``[B, C]``.
        Raises: TypeError or ValueError where an argument does not fit, with its name.
        """
        name = "AdaLayerNormZero"
        _check_channels(name, x, self.linear.in_features)
        if self.emb is not None:
            for given, what in ((timestep, "timestep"), (class_labels, "class_labels")):
                if not isinstance(given, Tensor):
                    raise TypeError(f"{name}: {what} is {type(given).__name__}, expected a Tensor")
            emb = self.emb(timestep, class_labels, hidden_dtype=hidden_dtype)
        _check_channels(name, emb, self.linear.in_features, name="emb")
        return self.modulated(x, emb)  # type: ignore[arg-type]

    def modulated(self, x: Tensor, emb: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Without checks, for ``mmkern.integrations.diffusers`` too, where ``linear`` may be an adapter."""
        shift, scale, *others = self.linear(functional.silu(emb)).chunk(6, 1)
        return normalize(self.norm, x, scale=scale, shift=shift), *others


class AdaLayerNormContinuous(nn.Module):
    """A norm whose scale and shift come from a condition; takes the state_dict of diffusers' module.

    ``norm(x)·(1 + scale) + shift`` with ``scale, shift = linear(silu(condition))``.

    Args:
        embedding_dim: C.
        conditioning_embedding_dim: D.
        elementwise_affine: whether the norm has weights of its own.
        eps: added to the variance, in units of x².
        bias: whether ``linear`` and a layer norm with weights have one.
        norm_type: "layer_norm" or "rms_norm".
    Source: Peebles and Xie 2023 (DiT), §3.2.
    """

    def __init__(
        self,
        embedding_dim: int,
        conditioning_embedding_dim: int,
        elementwise_affine: bool = True,
        eps: float = 1e-5,
        bias: bool = True,
        norm_type: NormName = "layer_norm",
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        name = "AdaLayerNormContinuous"
        _check_sizes(name, embedding_dim=embedding_dim, conditioning_embedding_dim=conditioning_embedding_dim)
        _check_eps(name, eps)
        if norm_type not in ("layer_norm", "rms_norm"):
            raise ValueError(f"{name}: norm_type is {norm_type!r}, expected 'layer_norm' or 'rms_norm'")
        self.linear = nn.Linear(conditioning_embedding_dim, 2 * embedding_dim, bias, device, dtype)
        self.norm: nn.Module
        if norm_type == "layer_norm":
            self.norm = nn.LayerNorm(embedding_dim, eps, elementwise_affine, bias, device, dtype)
        else:
            self.norm = RMSNorm(embedding_dim, eps, elementwise_affine, device=device, dtype=dtype)

    def forward(self, x: Tensor, conditioning_embedding: Tensor) -> Tensor:
        """x modulated.

        Args:
            x: ``[B, L, C]``.
            conditioning_embedding: ``[B, D]``.
        Returns: of the shape and dtype of x.
        Raises: TypeError or ValueError where an argument does not fit, with its name.
        """
        name = "AdaLayerNormContinuous"
        _check_channels(name, x, self.linear.out_features // 2)
        _check_channels(name, conditioning_embedding, self.linear.in_features, name="conditioning_embedding")
        return self.modulated(x, conditioning_embedding)

    def modulated(self, x: Tensor, condition: Tensor) -> Tensor:
        """Without checks, for ``mmkern.integrations.diffusers`` too, where ``linear`` may be an adapter."""
        scale, shift = self.linear(functional.silu(condition).to(x.dtype)).chunk(2, 1)
        out: Tensor = normalize(self.norm, x, scale=scale, shift=shift)
        return out


def normalize(norm: nn.Module, x: Tensor, **modulators: Any) -> Any:
    """``mmkern.ops.ada_layer_norm`` with the numbers of a layer norm, or else of an RMS norm that has an eps."""
    return ops.ada_layer_norm(
        x,
        eps=norm.eps,  # type: ignore[arg-type]
        norm="layer" if isinstance(norm, nn.LayerNorm) else "rms",
        weight=norm.weight,  # type: ignore[arg-type]
        bias=getattr(norm, "bias", None),
        **modulators,
    )


class _TimestepAndLabel(nn.Module):
    """The sum of both embeddings."""

    WAVES = 256
    DROPPED = 0.1  # of the labels, in training

    def __init__(self, num_classes: int, width: int, **made: Any) -> None:
        super().__init__()
        layers = {
            "linear_1": nn.Linear(self.WAVES, width, **made),
            "act": nn.SiLU(),
            "linear_2": nn.Linear(width, width, **made),
        }
        self.num_classes = num_classes
        self.timestep_embedder = nn.Sequential(OrderedDict(layers))
        self.class_embedder = nn.ModuleDict({"embedding_table": nn.Embedding(num_classes + 1, width, **made)})

    def forward(self, timestep: Tensor, class_labels: Tensor, hidden_dtype: torch.dtype | None = None) -> Tensor:
        waves = ops.timestep_embedding(timestep, self.WAVES, flip_sin_to_cos=True, downscale_freq_shift=1)
        if self.training:
            is_dropped = torch.rand(len(class_labels), device=class_labels.device) < self.DROPPED
            class_labels = class_labels.masked_fill(is_dropped, self.num_classes)
        table = self.class_embedder["embedding_table"]
        waves = waves.to(hidden_dtype or cast(Tensor, table.weight).dtype)
        out: Tensor = self.timestep_embedder(waves) + table(class_labels)
        return out


def _check_sizes(module: str, **sizes: Any) -> None:
    for name, size in sizes.items():
        if not isinstance(size, int) or isinstance(size, bool) or size < 1:
            raise ValueError(f"{module}: {name} is {size}, expected an int of at least 1")


def _check_eps(module: str, eps: Any) -> None:
    check_number(module, "eps", eps, "a number of at least 0", 0.0, LARGEST)


def _check_channels(module: str, x: Any, channels: int, *, axis: int = -1, name: str = "x") -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"{module}: {name} is {type(x).__name__}, expected a Tensor")
    if x.dtype not in FLOATING:
        raise TypeError(f"{module}: {name} has dtype {x.dtype}, expected a floating dtype")
    if x.dim() <= max(axis, 0) or x.shape[axis] != channels:
        expected = f"[batch, {channels}, ...]" if axis == 1 else f"[..., {channels}]"
        raise ValueError(f"{module}: {name} has shape {list(x.shape)}, expected {expected}")
