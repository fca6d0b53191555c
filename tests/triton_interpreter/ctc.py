"""What is checked of CTC and of edit distance."""

from __future__ import annotations

import torch
from mmkern.kernels import ctc as ctc_kernels
from mmkern.kernels import ctc_align as align_kernels
from mmkern.kernels import ctc_beam as beam_kernels
from mmkern.kernels import edit_distance as edit_kernels

from mmkern.ops._define import OPS
from tests.cases import ctc, ctc_align, edit_distance
from tests.cases.case import Case

from .buffers import guarded
from .calls import hold_to_contract, outputs_of, prepared

_SMALL = ("3x9x2", "3x21x64", "equal", "mixed", "strided", "4x33x5, blank, lengths", "2x40x17, blank, lengths")
# Short enough for a scan that the interpreter does one entry at a time.
_EDITS = ("3x0, 4", "3x4, 0", "2x1, 1", "20x7, 9, lengths", "large")


def ctc_paths() -> None:
    """Each case in float32, some in 16 bits too; tokens and times are those of the reference."""
    for each in ctc.CASES:
        _check(each, torch.float32)
        if each.op == "ctc_greedy_decode" and each.label in _SMALL:
            for dtype in (torch.bfloat16, torch.float16):
                _check(each, dtype)
    for beyond in (*ctc.BEYOND, edit_distance.BEYOND):
        _check_unread(beyond)


def ctc_paths_in_small_tiles() -> None:
    """Frames and paths in several tiles."""
    before, ctc_kernels._BLOCK = ctc_kernels._BLOCK, 16
    try:
        for each in ctc.CASES:
            if each.label in _SMALL:
                _check(each, torch.float32)
    finally:
        ctc_kernels._BLOCK = before


def beams() -> None:
    """Each case in float32, some in 16 bits too; labellings are those of the reference."""
    for each in ctc.BEAMS:
        _check(each, torch.float32)
        if each.label in ("some", "mixed"):
            _check(each, torch.bfloat16)


def beams_in_small_tiles() -> None:
    """What a frame makes of the beam in several tiles."""
    before, beam_kernels._BLOCK = beam_kernels._BLOCK, 64
    try:
        for each in ctc.BEAMS:
            if each.label in ("strided", "far", "mixed"):
                _check(each, torch.float32)
    finally:
        beam_kernels._BLOCK = before


def alignments() -> None:
    """Each case in float32, some in 16 bits too, and frames in several tiles; paths are those of the reference."""
    for each in ctc_align.CASES:
        _check(each, torch.float32)
        if each.label in ("some", "mixed"):
            _check(each, torch.bfloat16)
    before, align_kernels._BLOCK = align_kernels._BLOCK, 16
    try:
        for each in ctc_align.CASES:
            if each.label in ("wide", "mixed"):
                _check(each, torch.float32)
    finally:
        align_kernels._BLOCK = before


def edits() -> None:
    """In one tile, and in several."""
    before = edit_kernels._BLOCK
    try:
        for edit_kernels._BLOCK in (before, 16):
            for each in edit_distance.CASES:
                if each.label in _EDITS:
                    _check(each, torch.float32)
    finally:
        edit_kernels._BLOCK = before


def _check(each: Case, dtype: torch.dtype) -> None:
    hold_to_contract(each, dtype)
    op = OPS[each.op]
    args = prepared(op, each.arguments(dtype))
    _compare(each, outputs_of(op, args), op.reference(*args))


def _check_unread(each: Case) -> None:
    """Lengths beyond the rows, which the op would refuse on a CPU."""
    op = OPS[each.op]
    args = [guarded(a) if isinstance(a, torch.Tensor) else a for a in each.arguments(torch.float32)]
    _compare(each, outputs_of(op, args), op.reference(*args))


def _compare(each: Case, outs: list[torch.Tensor], expected: torch.Tensor | tuple[torch.Tensor, ...]) -> None:
    wanted = expected if isinstance(expected, tuple) else (expected,)
    for out, right in zip(outs, wanted, strict=True):
        assert out.is_floating_point() or torch.equal(out, right), each
