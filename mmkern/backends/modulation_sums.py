"""Gradients of what rows share in the modulation family: which rows those are, the partial sums that a GPU kernel
leaves, and what these add up to."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Sharing:
    """How many neighbouring rows of x share scale and shift, and how many the gate: all, where there are none."""

    rows: int
    modulated_rows: int
    gate_rows: int
    of_each_row: bool  # there are scale or shift, and each row has its own

    @classmethod
    def of(cls, x: Tensor, gate: Tensor | None, scale: Tensor | None, shift: Tensor | None) -> Sharing:
        rows = x.shape[:-1].numel()
        modulated = scale if scale is not None else shift
        modulated_rows = rows if modulated is None else shared_rows(modulated, x)
        gate_rows = rows if gate is None else shared_rows(gate, x)
        return cls(rows, modulated_rows, gate_rows, modulated is not None and modulated_rows == 1)

    @property
    def modulated_run(self) -> int:
        """Neighbouring rows that share scale and shift, or have them each."""
        return self.rows if self.of_each_row else self.modulated_rows

    @property
    def run(self) -> int:
        """The same, of the gate as well."""
        return min(self.modulated_run, self.gate_rows if self.gate_rows > 1 else self.rows)


def shared_rows(modulator: Tensor, x: Tensor) -> int:
    """How many neighbouring rows of x share one: the innermost axes, which it has once."""
    shared = 1
    for mine, size in zip(reversed(modulator.shape[:-1]), reversed(x.shape[:-1]), strict=True):
        if mine != 1:
            break
        shared *= size
    return shared


@dataclass(frozen=True)
class PartialSums:
    """What a kernel leaves, a run's parts after each other; None where it is not wanted.

    ``columns``: ``[parts, 2, C]``, Σ u and Σ u·n with u the gradient of y times f, and times ``1 + scale`` where each
    row has its own. ``gate``: ``[parts, C]``. ``frames``: one number a row.
    """

    sharing: Sharing
    columns: Tensor | None
    gate: Tensor | None
    frames: Tensor | None

    @classmethod
    def empty(cls, sharing: Sharing, parts: int, x: Tensor, gradients: Sequence[Tensor | None]) -> PartialSums:
        """``gradients``: of gate, weight, bias, scale, shift and frame_scale."""
        gate, weight, bias, scale, shift, frames = (gradient is not None for gradient in gradients)
        wants_columns = weight or bias or (not sharing.of_each_row and (scale or shift))

        def new(wanted: bool, *shape: int) -> Tensor | None:
            return torch.empty(shape, dtype=torch.float32, device=x.device) if wanted else None

        cols = x.shape[-1]
        return cls(
            sharing,
            new(wants_columns, parts, 2, cols),
            new(gate and sharing.gate_rows > 1, parts, cols),
            new(frames, sharing.rows),
        )

    def add_up(self, modulators: Sequence[Tensor | None], gradients: Sequence[Any]) -> None:
        """``modulators``: weight, bias, scale; ``gradients`` as above."""
        gate, *of_columns, frames = gradients
        if self.columns is not None:
            self._add_up_columns(self.columns, modulators, of_columns)
        if self.gate is not None:
            of_runs = self.gate.view(self.sharing.rows // self.sharing.gate_rows, -1, self.gate.shape[-1])
            gate.copy_(of_runs.sum(1).view_as(gate))
        if self.frames is not None:
            frames.copy_(self.frames.view(frames.numel(), -1).sum(1).view_as(frames))

    def _add_up_columns(self, sums: Tensor, modulators: Sequence[Tensor | None], wanted: Sequence[Any]) -> None:
        runs = self.sharing.rows // self.sharing.modulated_run
        u, un = sums.view(runs, -1, *sums.shape[1:]).sum(1).unbind(1)
        if self.sharing.of_each_row:  # the kernel has written those of scale and shift
            modulators, wanted = (*modulators[:2], None), (*wanted[:2], None, None)
        add_up_runs(u, un, modulators, wanted)


def add_up_runs(u: Tensor, un: Tensor, modulators: Sequence[Tensor | None], wanted: Sequence[Tensor | None]) -> None:
    """The gradients of weight, bias, scale and shift, from Σ u and Σ u·n of each run of rows that share the latter."""
    weight, bias, scale = modulators
    dweight, dbias, dscale, dshift = wanted
    if dshift is not None:
        dshift.copy_(u.view_as(dshift))
    if dscale is not None:
        of_scale = un if weight is None else un * weight
        dscale.copy_((of_scale if bias is None else of_scale + u * bias).view_as(dscale))
    factor = None if scale is None else 1 + scale.reshape(u.shape)
    for gradient, found in ((dbias, u), (dweight, un)):
        if gradient is not None:
            torch.sum(found if factor is None else found * factor, 0, out=gradient)
