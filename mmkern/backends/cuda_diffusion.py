"""Steps of denoising samplers on CUDA: which axes tensors are walked over, which threads take which elements. The
kernels are ``csrc/cuda/denoise_step.cuh`` and ``guidance_rescale.cuh``; the structs below mirror theirs."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor

from mmkern.backends.cuda_launch import launch
from mmkern.backends.cuda_tensors import (
    ACCESS,
    COLUMNS,
    DTYPES,
    GRID,
    MAX_COLUMNS,
    SIZES,
    address,
    fits_vectors,
    lanes_of,
)
from mmkern.reference.diffusion import MAX_HISTORY, MAX_OUTPUTS, StepArguments

_THREADS = 128
_MAX_PARTS = 128  # of a sample, measured by a block each

_NUMBERS = "Pq"  # data; stride from sample to sample
_MASK = f"{GRID} q"  # rows; of_columns
# sizes; pieces, of_sample; outputs, dtypes; mask; weights
_GUIDANCE = f"{SIZES} q3q {GRID * MAX_OUTPUTS} {MAX_OUTPUTS}i0q {_MASK} {_NUMBERS}"
# x, history, noise; normals; keep; known, known_noise; factors, coefficients, limits; next, x0, corrected
_STEP_ARGS = struct.Struct(f"{_GUIDANCE} {GRID * (2 + MAX_HISTORY)} P {_MASK} {GRID * 2} {_NUMBERS * 3} {GRID * 3}")
_MEASURE_ARGS = struct.Struct(f"{_GUIDANCE} P qq q")  # found; units, units_a_part; parts
_FACTOR_ARGS = struct.Struct(f"P {_NUMBERS} P qq")  # found; rescale; factors; samples, parts
_MOMENTS = 6  # floats of OutputMoments


# ---- Axes ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Axes:
    """Those of the sample, as few as may be: neighbours that all tensors walk over as one are one."""

    sizes: tuple[int, ...]
    strides: tuple[tuple[int, ...], ...]  # of each tensor

    @classmethod
    def of(cls, shape: Sequence[int], strides: Sequence[Sequence[int]]) -> Axes:
        sizes, kept = [shape[-1]], [[stride[-1]] for stride in strides]
        for axis in range(len(shape) - 2, -1, -1):
            n = shape[axis]
            if n == 1:
                continue
            fits = len(sizes) > 1 or n * sizes[0] <= MAX_COLUMNS
            if fits and all(given[axis] == mine[0] * sizes[0] for given, mine in zip(strides, kept, strict=True)):
                sizes[0] *= n
            else:
                sizes.insert(0, n)
                for given, mine in zip(strides, kept, strict=True):
                    mine.insert(0, given[axis])
        room = max(4 - len(sizes), 0)
        return cls((1,) * room + tuple(sizes), tuple((0,) * room + tuple(mine) for mine in kept))


def _strides(x: Tensor, shape: Sequence[int]) -> tuple[int, ...]:
    """Of a tensor that is expanded to a shape; a row of one number is dense."""
    strides = [0 if n == 1 else stride for n, stride in zip(x.shape, x.stride(), strict=True)]
    return (*strides[:-1], 1 if shape[-1] == 1 else strides[-1])


# ---- A call ----------------------------------------------------------------------------------------------------------


class _Call:
    """A step's tensors on the axes that they share."""

    def __init__(self, args: StepArguments, outs: Sequence[Tensor]) -> None:
        self.args, self.outs = args, outs
        shape = args.x.shape
        self.samples = shape[0] if len(shape) > 1 else 1
        self.tensors = [x for x in (*self._of_elements(), args.mask, args.keep) if x is not None]
        numbers = (args.weights, args.rescale, args.coefficients, args.limits)
        # To rescale is to measure samples one by one.
        by_sample = args.rescale is not None or any(x is not None and x.shape[0] > 1 for x in numbers)
        of_sample = (int(by_sample and self.samples > 1), *(0,) * (len(shape) - 1))[: len(shape)]
        axes = Axes.of(shape, [*(_strides(x, shape) for x in self.tensors), of_sample])
        self.sizes = axes.sizes
        self.is_walkable = len(axes.sizes) == 4
        self.strides = dict(zip(map(id, self.tensors), axes.strides, strict=False))
        self.of_sample = axes.strides[-1][:3]
        self.access = self._access()
        self.lanes = min(lanes_of(self.sizes[-1]), _THREADS)
        self.pieces = -(-self.sizes[-1] // (self.lanes * COLUMNS))

    def _of_elements(self) -> list[Tensor | None]:
        """The tensors of the sample's shape."""
        a = self.args
        return [a.x, *a.outputs, *a.history, a.noise, a.known, a.known_noise, *self.outs]

    def _access(self) -> str:
        """How a thread reads its elements: see csrc/cuda/access.cuh."""
        cols = self.sizes[-1]
        for x in self.tensors:
            *leading, last = self.strides[id(x)]
            if last and not fits_vectors(x.element_size(), cols, leading, (x.data_ptr(),)):
                return "OneByOne"
        dtypes = {x.dtype for x in self._of_elements() if x is not None}
        return ACCESS[self.args.x.dtype] if len(dtypes) == 1 else "EightNeighbours"

    @property
    def units(self) -> int:
        return prod(self.sizes[:3]) * self.pieces

    # ---- Entries of structs ----------------------------------------------------------------------------------------

    def grids(self, *tensors: Tensor | None) -> list[int]:
        return [entry for x in tensors for entry in ((0,) * 4 if x is None else self._grid(x))]

    def _grid(self, x: Tensor) -> tuple[int, ...]:
        return (x.data_ptr(), *self.strides[id(x)][:3])

    def mask(self, x: Tensor | None) -> list[int]:
        return [*self.grids(x), 0 if x is None else self.strides[id(x)][3]]

    def guidance(self) -> list[int]:
        a, (_, heads, length, cols) = self.args, self.sizes
        return [
            *(prod(self.sizes[:3]), heads, length, cols, self.lanes, DTYPES[a.x.dtype], self.access != "OneByOne"),
            *(self.pieces, *self.of_sample),
            *self.grids(*a.outputs),
            *(0 if x is None else DTYPES[x.dtype] for x in a.outputs),
            *self.mask(a.mask),
            *_numbers(a.weights),
        ]


def _numbers(x: Tensor | None) -> tuple[int, int]:
    """Rows of them, as many as there are samples or one for all."""
    return (0, 0) if x is None else (x.data_ptr(), int(x.shape[0] > 1))


# ---- Launches --------------------------------------------------------------------------------------------------------


def _factors(call: _Call) -> Tensor | None:
    """What guidance multiplies the outputs of each sample by, if it does."""
    rescale, x = call.args.rescale, call.args.x
    if rescale is None or call.args.outputs[1] is None:
        return None
    units = call.units // call.samples
    units_a_part = max(-(-units // _MAX_PARTS), _THREADS // call.lanes)
    parts = -(-units // units_a_part)
    found = torch.empty(call.samples * parts * _MOMENTS, dtype=torch.float32, device=x.device)
    factors = torch.empty(call.samples, dtype=torch.float32, device=x.device)
    measured = _MEASURE_ARGS.pack(*call.guidance(), found.data_ptr(), units, units_a_part, parts)
    launch(f"measure_outputs<{call.access}>", (call.samples * parts, 1), _THREADS, measured, x.device)
    combined = found.data_ptr(), *_numbers(rescale), factors.data_ptr(), call.samples, parts
    launch("find_factors", (-(-call.samples // _THREADS), 1), _THREADS, _FACTOR_ARGS.pack(*combined), x.device)
    return factors


def _take(call: _Call) -> None:
    a = call.args
    factors = _factors(call)
    arguments = _STEP_ARGS.pack(
        *call.guidance(),
        *call.grids(a.x, *a.history, a.noise),
        address(a.seed),
        *call.mask(a.keep),
        *call.grids(a.known, a.known_noise),
        *_numbers(factors),
        *_numbers(a.coefficients),
        *_numbers(a.limits),
        *call.grids(*call.outs, *[None] * (3 - len(call.outs))),
    )
    blocks = -(-call.units * call.lanes // _THREADS)
    launch(f"denoise_step<{call.access}>", (blocks, 1), _THREADS, arguments, a.x.device)


def _step(given: Sequence[Any], outs: Sequence[Tensor]) -> None:
    args = StepArguments.of(given)
    if args.x.numel() == 0:
        return
    args = args._replace(seed=None if args.seed is None else args.seed.contiguous())
    call = _Call(args, outs)
    if not call.is_walkable:
        call = _Call(_dense(args), [out.new_empty(out.shape) for out in outs])
    _take(call)
    for out, filled in zip(outs, call.outs, strict=True):
        if filled is not out:
            out.copy_(filled)


def _dense(args: StepArguments) -> StepArguments:
    """Copies of what lies on more axes than kernels walk over."""

    def copied(x: Tensor | None) -> Tensor | None:
        return None if x is None else x.expand(args.x.shape).contiguous()

    return args._replace(
        x=args.x.contiguous(),
        outputs=[*map(copied, args.outputs)],
        mask=copied(args.mask),
        history=[*map(copied, args.history)],
        noise=copied(args.noise),
        keep=copied(args.keep),
        known=copied(args.known),
        known_noise=copied(args.known_noise),
    )


def denoise_step(*given: Any) -> None:
    """The arguments of the op, and the next sample."""
    _step(given[:-1], given[-1:])


def multistep(*given: Any) -> None:
    """The arguments of the op; the next sample, and x₀."""
    _step(given[:-2], given[-2:])


def corrected_step(*given: Any) -> None:
    """The arguments of the op; the next sample, x₀, and the corrected sample."""
    _step(given[:-3], given[-3:])
