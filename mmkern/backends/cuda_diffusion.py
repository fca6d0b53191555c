"""Steps of denoising samplers, and the loss that their model is trained by, on CUDA: what kernels are launched with.

These are ``csrc/cuda/denoise_step.cuh``, ``guidance_rescale.cuh`` and ``denoising_loss.cuh``; the structs below mirror
theirs.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mmkern.backends.cuda_launch import launch
from mmkern.backends.cuda_pieces import PIECES, THREADS, Inputs, Pieces, walked
from mmkern.backends.cuda_tensors import DTYPES, GRID, address
from mmkern.reference.diffusion import MAX_HISTORY, MAX_OUTPUTS, StepArguments

_MAX_PARTS = 128  # of a sample, measured by a block each

_NUMBERS = "Pq"  # data; stride from sample to sample
_MASK = f"{GRID} q"  # rows; of_columns
_SAMPLES = f"{PIECES} 3q"  # of_sample
_PARTS = "qq q"  # units, units_a_part; parts
# sizes; outputs, dtypes; mask; weights
_GUIDANCE = f"{_SAMPLES} {GRID * MAX_OUTPUTS} {MAX_OUTPUTS}i0q {_MASK} {_NUMBERS}"
# x, history, noise; normals; keep; known, known_noise; factors, coefficients, limits; next, x0, corrected
_STEP_ARGS = struct.Struct(f"{_GUIDANCE} {GRID * (2 + MAX_HISTORY)} P {_MASK} {GRID * 2} {_NUMBERS * 3} {GRID * 3}")
_MEASURE_ARGS = struct.Struct(f"{_GUIDANCE} P {_PARTS}")  # found; parts
_FACTOR_ARGS = struct.Struct(f"P {_NUMBERS} P qq")  # found; rescale; factors; samples, parts
_MOMENTS = 6  # floats of OutputMoments
_ERROR = f"{_SAMPLES} {GRID * 2} {_MASK} i0q"  # sizes; pred, target; mask; target_dtype
_ERROR_ARGS = struct.Struct(f"{_ERROR} P {_PARTS}")  # sums; parts
_ERROR_BACKWARD_ARGS = struct.Struct(f"{_ERROR} {_NUMBERS} {GRID * 2}")  # grad; pred_to, target_to


# ---- A call ----------------------------------------------------------------------------------------------------------


def _of_sample(shape: Sequence[int], has_numbers: bool) -> tuple[int, ...]:
    """Strides of the number of each sample, if they have any."""
    return (int(has_numbers and len(shape) > 1 and shape[0] > 1), *(0,) * (len(shape) - 1))


def _mask(pieces: Pieces, x: Tensor | None) -> list[int]:
    return [*pieces.grids(x), 0 if x is None else pieces.strides(x)[3]]


def _sample_entries(pieces: Pieces, dtype: torch.dtype, access: str) -> list[int]:
    return [*pieces.entries(dtype, access), *pieces.mark[:3]]


class _Call:
    """A step's tensors on the axes that they share."""

    def __init__(self, args: StepArguments, outs: Sequence[Tensor]) -> None:
        self.args, self.outs = args, outs
        shape = args.x.shape
        self.samples = shape[0] if len(shape) > 1 else 1
        numbers = (args.weights, args.rescale, args.coefficients, args.limits)
        # To rescale is to measure samples one by one.
        by_sample = args.rescale is not None or any(x is not None and x.shape[0] > 1 for x in numbers)
        elements = [args.x, *args.outputs, *args.history, args.noise, args.known, args.known_noise, *outs]
        self.pieces = Pieces(shape, (*elements, args.mask, args.keep), _of_sample(shape, by_sample))
        self.access = self.pieces.access(*elements)

    def guidance(self) -> list[int]:
        a, pieces = self.args, self.pieces
        return [
            *_sample_entries(pieces, a.x.dtype, self.access),
            *pieces.grids(*a.outputs),
            *(0 if x is None else DTYPES[x.dtype] for x in a.outputs),
            *_mask(pieces, a.mask),
            *_numbers(a.weights),
        ]


@dataclass(frozen=True)
class _Parts:
    """Of a sample, for a block each."""

    units: int  # of a sample
    units_a_part: int
    count: int

    @classmethod
    def of(cls, pieces: Pieces, samples: int) -> _Parts:
        units = pieces.units // samples
        units_a_part = max(-(-units // _MAX_PARTS), pieces.threads // pieces.lanes)
        return cls(units, units_a_part, -(-units // units_a_part))

    @property
    def entries(self) -> tuple[int, int, int]:
        return self.units, self.units_a_part, self.count


def _numbers(x: Tensor | None) -> tuple[int, int]:
    """Rows of them, as many as there are samples or one for all."""
    return (0, 0) if x is None else (x.data_ptr(), int(x.shape[0] > 1))


# ---- Launches --------------------------------------------------------------------------------------------------------


def _factors(call: _Call) -> Tensor | None:
    """What guidance multiplies the outputs of each sample by, if it does."""
    rescale, x = call.args.rescale, call.args.x
    if rescale is None or call.args.outputs[1] is None:
        return None
    parts = _Parts.of(call.pieces, call.samples)
    found = torch.empty(call.samples * parts.count * _MOMENTS, dtype=torch.float32, device=x.device)
    factors = torch.empty(call.samples, dtype=torch.float32, device=x.device)
    measured = _MEASURE_ARGS.pack(*call.guidance(), found.data_ptr(), *parts.entries)
    launch(f"measure_outputs<{call.access}>", (call.samples * parts.count, 1), call.pieces.threads, measured, x.device)
    combined = found.data_ptr(), *_numbers(rescale), factors.data_ptr(), call.samples, parts.count
    launch("find_factors", (-(-call.samples // THREADS), 1), THREADS, _FACTOR_ARGS.pack(*combined), x.device)
    return factors


def _take(call: _Call) -> None:
    a, pieces = call.args, call.pieces
    factors = _factors(call)
    arguments = _STEP_ARGS.pack(
        *call.guidance(),
        *pieces.grids(a.x, *a.history, a.noise),
        address(a.seed),
        *_mask(pieces, a.keep),
        *pieces.grids(a.known, a.known_noise),
        *_numbers(factors),
        *_numbers(a.coefficients),
        *_numbers(a.limits),
        *pieces.grids(*call.outs, *[None] * (3 - len(call.outs))),
    )
    launch(f"denoise_step<{call.access}>", (pieces.blocks, 1), pieces.threads, arguments, a.x.device)


def _step(given: Sequence[Any], outs: Sequence[Tensor]) -> None:
    args = StepArguments.of(given)
    if args.x.numel() == 0:
        return
    args = args._replace(seed=None if args.seed is None else args.seed.contiguous())
    call = _Call(args, outs)
    if not call.pieces.is_walkable:
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


# ---- The loss --------------------------------------------------------------------------------------------------------


def _error_walked(args: Inputs, outputs: Inputs, launched: Callable[[Pieces, str, list[int], Inputs], None]) -> None:
    """``launched(pieces, access, entries, outputs)``, of the call's ``(pred, target, mask)``."""
    pred = args[0]
    assert pred is not None

    def run(pieces: Pieces, args: Inputs, outputs: Inputs) -> None:
        pred, target, mask = args
        assert pred is not None
        assert target is not None
        access = pieces.access(pred, target)
        entries = _sample_entries(pieces, pred.dtype, access)
        entries += [*pieces.grids(pred, target), *_mask(pieces, mask), DTYPES[target.dtype]]
        launched(pieces, access, entries, outputs)

    walked(args, outputs, _of_sample(pred.shape, True), run, lambda x: x.expand(pred.shape).contiguous())


def masked_squared_error(pred: Tensor, target: Tensor, mask: Tensor | None, out: Tensor) -> None:
    """``(pred, target, mask, the sum of each sample)``."""
    if pred.numel() == 0:
        out.zero_()
        return

    def launched(pieces: Pieces, access: str, entries: list[int], _: Inputs) -> None:
        samples = out.shape[0]
        parts = _Parts.of(pieces, samples)
        sums = torch.empty(samples, parts.count, dtype=torch.float32, device=pred.device)
        arguments = _ERROR_ARGS.pack(*entries, sums.data_ptr(), *parts.entries)
        launch(f"masked_squared_error<{access}>", (sums.numel(), 1), pieces.threads, arguments, pred.device)
        torch.sum(sums, 1, out=out)

    _error_walked((pred, target, mask), (), launched)


def masked_squared_error_backward(
    grad: Tensor, pred: Tensor, target: Tensor, mask: Tensor | None, dpred: Tensor | None, dtarget: Tensor | None
) -> None:
    """``(grad of the sums, pred, target, mask, dpred, dtarget)``; None is not wanted."""
    if pred.numel() == 0:
        return

    def launched(pieces: Pieces, access: str, entries: list[int], outputs: Inputs) -> None:
        arguments = _ERROR_BACKWARD_ARGS.pack(*entries, grad.data_ptr(), grad.stride(0), *pieces.grids(*outputs))
        launch(f"masked_squared_error_backward<{access}>", (pieces.blocks, 1), pieces.threads, arguments, pred.device)

    _error_walked((pred, target, mask), (dpred, dtarget), launched)
