"""How several outputs of a denoising model become one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor
from torch.compiler import is_dynamo_compiling

from mmkern.reference.diffusion import MAX_OUTPUTS

from ._checks import LARGEST, NUMBER, accumulation_dtype, check_number

Mode = Literal["cfg", "multi", "mask_cfg", "cfg_rescale"]
_SCALES = {"cfg": (1, 1), "multi": (1, MAX_OUTPUTS - 1), "mask_cfg": (2, 2), "cfg_rescale": (2, 2)}  # least and most


@dataclass(frozen=True, eq=False)
class Guidance:
    """How the outputs of a model become one, inside the step; outputs are given in the order named here.

    * "cfg": ``g₀ + s·(g₁ − g₀)`` of an unconditional output and a conditional one;
    * "cfg_rescale": the same, scaled so that its standard deviation goes the fraction φ of the way to that of g₁;
    * "multi": ``g₀ + Σᵢ sᵢ·(gᵢ − g₀)``, up to four conditions;
    * "mask_cfg": ``g₀ + a·(g₁ − g₀) + b·Z⊙(g₂ − g₀)`` of the outputs without conditions, with audio and coarse
      conditions, and with fine ones too; ``nested``: the last bracket is ``g₂ − g₁``.

    Args:
        mode: one of these.
        scales: s; (s, φ); s₁, s₂, ...; (a, b). Numbers, or a tensor whose last axis they are: ``[n]``, or ``[B, n]``
            for each sample. They take no gradient.
        mask: Z, broadcastable to the sample, such as ``[B, T, 1]``.
        nested: of "mask_cfg".
    Source: Ho and Salimans 2022, eq. 6; Lin et al. 2024, eq. 15 and 16 (rescale); Liu et al. 2022, eq. 11 (multi); Chen
        et al. 2025 (CAFE-Talk), eq. 9 (mask).
    """

    mode: Mode = "cfg"
    scales: float | Sequence[float] | Tensor = 7.5
    mask: Tensor | None = None
    nested: bool = False
    outputs: int = field(init=False, repr=False)  # how many of the model it takes
    _on: dict[Any, tuple[Tensor | None, ...]] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        def refuse(message: str) -> None:
            raise ValueError(f"Guidance: {message}")

        if self.mode not in _SCALES:
            refuse(f"mode is {self.mode!r}, expected {', '.join(map(repr, _SCALES))}")
        if (self.mask is not None) != (self.mode == "mask_cfg"):
            refuse(f"mask goes with mode 'mask_cfg' and no other, got mode {self.mode!r}")
        if self.nested and self.mode != "mask_cfg":
            refuse(f"nested goes with mode 'mask_cfg', got mode {self.mode!r}")
        if self.mask is not None and not isinstance(self.mask, Tensor):
            raise TypeError(f"Guidance: mask is {type(self.mask).__name__}, expected a Tensor")
        if isinstance(self.scales, Tensor):
            if self.scales.dim() > 2 or not self.scales.is_floating_point():
                shape = f"shape {list(self.scales.shape)} and dtype {self.scales.dtype}"
                refuse(f"scales has {shape}, expected floating [n] or [B, n]")
        else:
            for scale in (self.scales,) if isinstance(self.scales, NUMBER) else self.scales:
                check_number("Guidance", "scales", scale, "finite numbers", -LARGEST, LARGEST)
        least, most = _SCALES[self.mode]
        if not least <= self._count <= most:
            expected = least if least == most else f"{least} to {most}"
            refuse(f"got {self._count} scales, expected {expected} for mode {self.mode!r}")
        outputs = {"cfg": 2, "cfg_rescale": 2, "mask_cfg": 3, "multi": 1 + self._count}[self.mode]
        object.__setattr__(self, "outputs", outputs)

    @property
    def _count(self) -> int:
        if isinstance(self.scales, Tensor):
            return self.scales.shape[-1] if self.scales.dim() else 1
        return 1 if isinstance(self.scales, NUMBER) else len(self.scales)

    def beside(self, x: Tensor) -> tuple[Tensor | None, ...]:
        """The mask with the axes of x; the weights, ``[1 or B, 2·MAX_OUTPUTS]``: of each output one, and one that the
        mask is multiplied by; and φ, ``[1 or B, 1]``."""
        if is_dynamo_compiling():
            return self._beside(x)
        key = x.device, accumulation_dtype(x.dtype), x.dim()
        if key not in self._on:
            with torch.inference_mode(False):  # autograd may save what later calls are given
                self._on[key] = self._beside(x)
        return self._on[key]

    def _beside(self, x: Tensor) -> tuple[Tensor | None, ...]:
        wide = accumulation_dtype(x.dtype)
        given = self.scales.detach() if isinstance(self.scales, Tensor) else self.scales
        scales = torch.as_tensor(given, dtype=wide, device=x.device).reshape(-1, self._count)
        rescale = None
        if self.mode == "cfg_rescale":
            scales, rescale = scales[:, :1], scales[:, 1:].contiguous()
        plain = scales.new_zeros(len(scales), MAX_OUTPUTS)
        masked = torch.zeros_like(plain)
        if self.mode == "mask_cfg":
            plain[:, 1], masked[:, 2] = scales.unbind(1)
            masked[:, 1 if self.nested else 0] = -masked[:, 2]
        else:
            plain[:, 1 : self.outputs] = scales
        plain[:, 0] = 1 - plain.sum(1)
        mask = None
        if self.mask is not None:
            mask = self.mask.to(wide)
            mask = mask.reshape(*[1] * (x.dim() - mask.dim()), *mask.shape)
        return mask, torch.stack([plain, masked], 2).flatten(1), rescale
