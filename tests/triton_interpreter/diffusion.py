"""What is checked of the steps of denoising samplers."""

from __future__ import annotations

from typing import Any

import torch
from mmkern.kernels import denoising_loss as loss
from mmkern.kernels import diffusion as steps

from mmkern import testing
from mmkern.reference.diffusion import Column
from mmkern.reference.philox import normal
from tests.cases.diffusion import CASES, STEPS
from tests.contract import op_of

from .calls import forward, gradients, hold_to_contract, outputs_of, prepared

_OF_16_BITS = ("sliced", "2x70x20-all", "2x70x20-two outputs", "2x7x64")


def diffusion() -> None:
    """Every case in float32, some layouts in 16 bits too."""
    for case in (case for case in CASES if case.op in STEPS):
        hold_to_contract(case, torch.float32)
        if case.label.startswith(_OF_16_BITS):
            hold_to_contract(case, torch.bfloat16)
    hold_to_contract(CASES[0], torch.float16)


_LOSS = "masked_squared_error"


def denoising_loss() -> None:
    """The same of the loss; programs of a sample that take a tile each, and some, the last of them fewer."""
    for case in (case for case in CASES if case.op == _LOSS):
        hold_to_contract(case, torch.float32)
        if case.label.startswith(("sliced", "2x7x64")):
            hold_to_contract(case, torch.bfloat16)
    before = loss._TILE, loss._PROGRAMS
    loss._TILE, loss._PROGRAMS = 128, 8
    try:
        for case in CASES:
            if case.op == _LOSS and case.label.startswith(("2x70x20-", "sliced", "vector")):
                hold_to_contract(case, torch.float32)
    finally:
        loss._TILE, loss._PROGRAMS = before


def loss_of_any_target() -> None:
    """Of another dtype, with or without its gradient; the same bits run after run.

    NaN and an infinite mask stay in their sample.
    """
    op = op_of(_LOSS)
    case = next(case for case in CASES if (case.op, case.label) == (_LOSS, "sliced-frames"))
    pred, target, mask = case.arguments(torch.float32)
    for given in ([pred, target.bfloat16(), mask], [pred.bfloat16(), target, mask]):
        args = prepared(op, given)
        outs = outputs_of(op, args)
        testing.verify_forward(op, args, outs)
        assert torch.equal(outs[0], forward(op, args))
        grad = torch.tensor([0.5, -3.0])
        testing.verify_backward(op, [grad], args, gradients(op, [grad], args, []))
        for wanted in ([True, False], [False, True]):
            testing.verify_backward(op, [grad], args, gradients(op, [grad], args, [], wanted))
    pred[0, 1, 2], mask[1, 0, 0] = torch.nan, torch.inf
    assert forward(op, prepared(op, [pred, target, mask])).isnan().tolist() == [True, False]
    assert forward(op, prepared(op, [pred, target, mask]))[1] == torch.inf


def _given(label: str) -> dict[str, Any]:
    case = next(case for case in CASES if case.label == label)
    return dict(zip(op_of(case.op).names, case.arguments(torch.float32), strict=True))


def narrow_outputs() -> None:
    """Of 16 bits, beside a sample of float32; the same bits run after run."""
    op = op_of("denoise_step")
    for label in ("2x70x20-rescale", "sliced-five outputs"):
        given = _given(label)
        given |= {name: a.bfloat16() for name, a in given.items() if name.startswith("output") and a is not None}
        args = prepared(op, list(given.values()))
        found = outputs_of(op, args)
        testing.verify_forward(op, args, found)
        assert torch.equal(found[0], forward(op, args)), f"{label}: not the same bits"


def nan_stays_in_its_place() -> None:
    """In both results; limits let it through."""
    op = op_of("multistep")
    given = _given("2x7x64-limits")
    given["output0"][1, 2, 33] = torch.nan
    for found in outputs_of(op, prepared(op, list(given.values()))):
        assert found.isnan().nonzero().tolist() == [[1, 2, 33]]


_IN_SMALL_TILES = (
    "2x70x20-rescale each",
    "2x70x20-all",
    "5x123-all",
    "3x63-all",
    "rows inside-two outputs",
    "sliced-known places",
)


def diffusion_in_small_tiles() -> None:
    """Many along a row, in the last of which some elements lie outside, and more than are added up at a time."""
    before = steps._TILE, steps._PARTS
    steps._TILE, steps._PARTS = 64, 8
    try:
        for case in CASES:
            if case.label in _IN_SMALL_TILES:
                hold_to_contract(case, torch.float32)
    finally:
        steps._TILE, steps._PARTS = before


def normal_numbers() -> None:
    """Within 2 ulp of the largest of the reference, whatever the shape; rows may begin between counters.

    The second seed has a word of 51 soon, of which the last digit matters.
    """
    op = op_of("denoise_step")
    numbers = torch.zeros(1, len(Column))
    numbers[0, Column.NOISE] = 1
    for seed in (torch.tensor([2**63 - 5, 2**32 - 40]), torch.tensor([12345, 53078880])):
        expected = normal(seed, 4800, torch.float64)
        for shape in ((4800,), (2, 60, 40), (64, 75)):
            x = torch.zeros(shape)
            given: dict[str, Any] = {"x": x, "seed": seed, "coefficients": numbers}
            if shape == (64, 75):
                given |= {"keep": torch.zeros(64, 1), "known": x, "known_noise": x}
            found = forward(op, prepared(op, [given.get(name) for name in op.names]))
            torch.testing.assert_close(found.flatten().double(), expected, rtol=0, atol=2 * 4.8e-7)
