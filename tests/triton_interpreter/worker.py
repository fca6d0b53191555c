"""Run the Triton kernels in the interpreter: ``python -m tests.triton_interpreter.worker OUT PART PARTS``.

TRITON_INTERPRET=1 must be set before triton is imported, so this is a process of its own, started and reported by
``tests/test_triton_interpreter.py``. OUT becomes JSON: the name of each check, and the message of what failed, or "".
"""

from __future__ import annotations

import json
import math
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import torch
from mmkern.kernels import attention_call, rows
from mmkern.kernels import attention_rows as companions
from mmkern.kernels import modulation as norms
from torch import Tensor

from mmkern import testing
from mmkern.ops._define import Op
from mmkern.reference.attention import kept
from tests.cases.attention import CASES as ATTENTION_CASES
from tests.cases.attention import LONG, Sizes, shares_at_a_word
from tests.cases.attention import case as attention_case
from tests.cases.attention_rows import CASES as ROWS_CASES
from tests.cases.attention_varlen import CASES as PACKED_CASES
from tests.cases.attention_varlen import case as packed_case
from tests.cases.case import Case
from tests.cases.hyperbolic import CASES, OPS, PAIRWISE, ROW_WISE
from tests.cases.modulation import CASES as MODULATION_CASES
from tests.cases.multi_source import CASES as SOURCES_CASES
from tests.contract import gradients_for, op_of

from . import absorbing as masks
from . import contrastive as losses
from . import ctc as paths
from . import decoding as draws
from . import diffusion as steps
from . import faulty_kernels, patches
from . import gated as activations
from . import group_norm as groups
from . import masked_decode as fills
from . import probabilities as shares
from . import quantization as codes
from . import retrieval as best
from . import vocabulary as tokens
from .buffers import Output, guarded
from .calls import backward, forward, gradients, hold_to_contract, outputs_of, prepared
from .names import ATTENTION, CHECKS, PACKED

# Layouts that meet another path of the code in 16 bits too; float32 takes all cases.
_16_BIT = {
    torch.bfloat16: ("9x123", "strided", "near", "5x3x5", "123x129x40"),
    torch.float16: ("3x64", "17x33x64", "near"),
}
_ATTENTION_16_BIT = {
    torch.bfloat16: ("heads inside", "sliced", "all at once", "bias LS and mask", "window"),
    torch.float16: ("softcap", "sliced"),
}
# Their kernels are the CPU's and CUDA's.
_FOR_DECODING = ("few queries", "few queries key mask", "few queries dropout", "few queries wide", "one query bias")
_MANY_TILES = ("bias HLS", "bias BS", "causal", "window", "resample", "dropout", "all at once", "extreme")


def _cases(op: str) -> list[Case]:
    return [case for case in CASES if case.op == op]


def _case(op: str, *labels: str) -> Case:
    return next(case for label in labels for case in _cases(op) if case.label == label)


def contract(op: str) -> None:
    for case in _cases(op):
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            if dtype == torch.float32 or case.label in _16_BIT[dtype]:
                hold_to_contract(case, dtype)


def _attention(wanted: Callable[[str, str], bool]) -> None:
    """The cases whose kind and sizes are wanted."""
    for case in ATTENTION_CASES:
        kind, _, sizes = case.label.rpartition("-")
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            if wanted(kind, sizes) and (dtype == torch.float32 or kind in _ATTENTION_16_BIT[dtype]):
                hold_to_contract(case, dtype)


def attention_shapes() -> None:
    large = ("1x2x1x100x700x32x20", "2x4x1x1x300x64x64")
    _attention(lambda kind, sizes: kind == "plain" and sizes not in large)
    with _tiles(64, 128):
        _attention(lambda kind, sizes: kind == "plain" and sizes in large)


def attention_masks() -> None:
    """Of each kind one tile or less."""
    with _tiles(16, 64):
        _attention(lambda kind, sizes: kind not in ("plain", *_FOR_DECODING) and sizes != str(LONG))


def attention_many_tiles() -> None:
    """What differs from tile to tile; in large tiles, since the interpreter takes 10 ms for one of any size."""
    with _tiles(32, 64):
        _attention(lambda kind, sizes: kind in _MANY_TILES and sizes == str(LONG))
        prefix = attention_case("prefix of many tiles", LONG, right=0, prefix_lengths=torch.tensor([290]))
        hold_to_contract(prefix, torch.float32)


def attention_in_one_pass() -> None:
    """Gradients where one tile has all keys; those of keys and values from several parts of the queries."""
    with _parts_of(rows=40):
        for case in (*ATTENTION_CASES, *PACKED_CASES):
            kind = case.label.rpartition("-")[0]
            if "bias" in kind or kind in _FOR_DECODING or case.label in _MET_ELSEWHERE:
                continue
            queries, keys = (x.shape[-2 if case.op == ATTENTION else 0] for x in case.arguments(torch.bfloat16)[:2])
            if queries <= 128 and keys <= 128:  # tiles of which many would only take time
                hold_to_contract(case, torch.bfloat16)
        for sizes in (Sizes(2, 4, 2, 70, 77, 40, 64), Sizes(1, 2, 2, 130, 50, 72, 128)):
            hold_to_contract(attention_case("plain", sizes), torch.float16)


@contextmanager
def _replaced(**methods: Any) -> Iterator[None]:
    """Other methods of Call."""
    before = {name: getattr(attention_call.Call, name) for name in methods}
    for name, method in methods.items():
        setattr(attention_call.Call, name, method)
    try:
        yield
    finally:
        for name, method in before.items():
            setattr(attention_call.Call, name, method)


def _tiles(queries: int, keys: int) -> AbstractContextManager[None]:
    """One after the other along the keys."""
    return _replaced(
        blocks=lambda self, table: attention_call.Blocks(queries, keys, 4), one_pass_blocks=lambda self: None
    )


def _parts_of(rows: int) -> AbstractContextManager[None]:
    return _replaced(part_queries=lambda self, blocks: -(-rows // blocks.queries) * blocks.queries)


def attention_dropout() -> None:
    """The mask is the reference's, bit by bit: v of ones on a diagonal shows the weights."""
    op = op_of(ATTENTION)
    q, k, v = torch.zeros(2, 2, 20, 4), torch.zeros(2, 2, 70, 4), torch.eye(70).expand(2, 2, 70, 70)
    seed = torch.tensor([2**63 - 9, 2**32 - 601])  # that word ends in a byte of 0: the least one that is kept
    for share in shares_at_a_word(seed):
        args = prepared(op, [q, k, v, *[None] * 5, seed, 1.0, 0.0, -1, -1, 0, share])
        assert torch.equal(forward(op, args) != 0, kept(torch.Size([2, 2, 20, 70]), seed, share))


def attention_beyond_the_last_query() -> None:
    """A bias of the keys that would overflow where a row has no log-sum-exp to take off."""
    op = op_of(ATTENTION)
    q, k, v = torch.randn(3, 1, 1, 9, 8, generator=torch.Generator().manual_seed(0)).unbind()
    args = prepared(
        op, [q, k, v, None, None, None, torch.full((1, 1, 1, 9), 300.0), None, None, 1.0, 0.0, -1, -1, 0, 0.0]
    )
    outs = outputs_of(op, args)
    grads = [torch.ones_like(out) for out in outs]
    testing.verify_backward(op, grads, args, gradients(op, grads, args, outs))


def attention_same_bits() -> None:
    """Run after run, whatever gradients are wanted."""
    op = op_of(ATTENTION)
    case = next(case for case in ATTENTION_CASES if case.label.startswith("bias LS and mask"))
    args = prepared(op, case.arguments(torch.float32))
    outs = outputs_of(op, args)
    assert all(torch.equal(a, b) for a, b in zip(outs, outputs_of(op, args), strict=True))
    grads = gradients_for(case, outs)
    before = gradients(op, grads, args, outs)
    for slot in range(len(before)):
        wanted = [i == slot for i in range(len(before))]
        alone, together = gradients(op, grads, args, outs, wanted)[slot], before[slot]
        assert alone is not None
        assert together is not None
        assert torch.equal(alone, together), f"gradient {slot} alone differs"


def attention_expanded_gradient() -> None:
    """What ``out.sum().backward()`` sends: one element, all strides 0."""
    op = op_of(ATTENTION)
    args = prepared(op, ATTENTION_CASES[3].arguments(torch.float32))
    outs = outputs_of(op, args)
    expanded = [torch.ones(()).expand(out.shape) for out in outs]
    ones = [torch.ones(out.shape) for out in outs]
    for a, b in zip(gradients(op, expanded, args, outs), gradients(op, ones, args, outs), strict=True):
        assert a is b is None or (a is not None and b is not None and torch.equal(a, b))


def _packed(wanted: Callable[[str], bool]) -> None:
    for case in PACKED_CASES:
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            if wanted(case.label) and (dtype == torch.float32 or case.label.startswith("in one-three")):
                hold_to_contract(case, dtype)


# More of the same, or what has nothing to do with segments.
_MET_ELSEWHERE = ("plain-eight", "softcap-three", "dropout-decode", "dropout-no query", "in one-decode")


def packed_attention() -> None:
    """Segments of a tile or two, and of none; dropout keeps what the reference keeps."""
    with _tiles(16, 32):
        _packed(lambda label: not label.endswith("long") and label not in _MET_ELSEWHERE)


def packed_attention_many_tiles() -> None:
    with _tiles(32, 64):
        _packed(lambda label: label in ("causal-long", "resample-long"))


def packed_attention_out_of_bounds() -> None:
    """Where segments begin is not checked on a GPU: wrong numbers must not lead out of the tensors.

    The first segment holds every row, so that each is written; what lies outside is NaN.
    """
    op = op_of(PACKED)
    args = prepared(op, packed_case("plain", "three").arguments(torch.float32))
    args[3], args[7] = guarded(torch.tensor([-7, 40, 12, 2**40])), 64
    args[4], args[8] = guarded(torch.tensor([-3, 2**40, 20, 2**62])), 64
    with _tiles(16, 64):
        outs = outputs_of(op, args)
        ones = [guarded(torch.ones(out.shape)) for out in outs]
        found = [*outs, *gradients(op, ones, args, [guarded(out) for out in outs])]
    assert all(x is None or x.isfinite().all() for x in found)


def sources_in_one_launch() -> None:
    with _tiles(16, 64):
        for case in SOURCES_CASES:
            if not case.label.startswith(("one", "four-2x4", "groups-2x4x2", "all hidden-2x4")):
                hold_to_contract(case, torch.float32)
                if case.label.startswith(("gates-2x2", "inside-2x2")):
                    hold_to_contract(case, torch.bfloat16)


_ROWS_DTYPES = (
    (torch.float32, ""),
    (torch.bfloat16, ("heads inside-some", "odd", "heads inside-weight")),
    (torch.float16, ("part-plain", "9x123-near")),
)


def attention_rows() -> None:
    """Every case in float32, those of another layout in 16 bits too."""
    for case in ROWS_CASES:
        for dtype, kinds in _ROWS_DTYPES:
            if case.label.startswith(kinds):
                hold_to_contract(case, dtype)


def _rows_case(op: str, label: str) -> tuple[Op, Case]:
    return op_of(op), next(case for case in ROWS_CASES if case.op == op and case.label == label)


_ROWS = (("merge_attention", "heads inside-some empty"), ("rotary_embedding", "heads inside-weight-interleaved"))


def attention_rows_of_any_layout() -> None:
    """Outputs that lie as the inputs do, gradients of stride 0, more axes than four."""
    for name, label in (*_ROWS, ("merge_attention", "five axes-near"), ("rotary_embedding", "five axes-weight")):
        op, case = _rows_case(name, label)
        args = prepared(op, case.arguments(torch.float32))
        kernel = getattr(companions, name)
        outs, expected = op.empty_outputs(args), outputs_of(op, args)
        kernel(*args, *outs)
        assert not outs[0].is_contiguous()
        assert all(torch.equal(a, b) for a, b in zip(outs, expected, strict=True)), name
        ones, expanded = (
            [torch.ones(shape) for shape in (out.shape for out in outs)],
            [torch.ones(()).expand(out.shape) for out in outs],
        )
        for a, b in zip(gradients(op, expanded, args, outs), gradients(op, ones, args, outs), strict=True):
            assert a is b is None or (a is not None and b is not None and torch.equal(a, b)), name
        wanted = [isinstance(args[i], Tensor) for i in op.tensors]
        lying = [
            op._empty_gradient(i, args[i], args[0]) if want else None
            for i, want in zip(op.tensors, wanted, strict=True)
        ]
        getattr(companions, f"{name}_backward")(*ones, *args, *lying)
        for a, b in zip(lying, gradients(op, ones, args, outs), strict=True):
            assert a is b is None or (a is not None and b is not None and torch.equal(a, b)), name


def attention_rows_same_bits() -> None:
    """Run after run, whatever gradients are wanted; several programs and steps of the weight's gradient."""
    programs, companions._PROGRAMS = companions._PROGRAMS, 3
    try:
        hold_to_contract(_rows_case("rotary_embedding", "many rows-weight")[1], torch.float32)
        for name, label in _ROWS:
            op, case = _rows_case(name, label)
            args = prepared(op, case.arguments(torch.float32))
            outs = outputs_of(op, args)
            assert all(torch.equal(a, b) for a, b in zip(outs, outputs_of(op, args), strict=True))
            grads = gradients_for(case, outs)
            before = gradients(op, grads, args, outs)
            for slot in range(len(before)):
                alone = gradients(op, grads, args, outs, [i == slot for i in range(len(before))])[slot]
                together = before[slot]
                assert alone is not None
                assert together is not None
                assert torch.equal(alone, together), f"{name}: gradient {slot} alone differs"
    finally:
        companions._PROGRAMS = programs


def modulation() -> None:
    """Every case in float32, some layouts in 16 bits too; few programs, so that one takes several tiles of rows."""
    programs, norms._PROGRAMS = norms._PROGRAMS, 3
    try:
        for case in MODULATION_CASES:
            hold_to_contract(case, torch.float32)
            if case.label.startswith("rows inside"):
                hold_to_contract(case, torch.bfloat16)
        hold_to_contract(MODULATION_CASES[0], torch.float16)
    finally:
        norms._PROGRAMS = programs


def chunked() -> None:
    """Rows longer than a block: two passes."""
    largest = rows.MAX_BLOCK
    rows.MAX_BLOCK = 32
    try:
        for op in (*ROW_WISE, "lorentz_centroid"):
            hold_to_contract(_case(op, "9x123", "5x33"), torch.float32)
            hold_to_contract(_case(op, "strided", "2x3x7x24"), torch.bfloat16)
    finally:
        rows.MAX_BLOCK = largest


def rounding_of_a_device() -> None:
    """With quotients and ``rsqrt`` as wrong as a GPU's."""
    with patches.approximate():
        for op in OPS:
            hold_to_contract(_case(op, "9x123", "5x33", "17x33x64"), torch.float32)


def nan_stays_in_its_row() -> None:
    for name in (*ROW_WISE, *PAIRWISE):
        op = op_of(name)
        args = prepared(op, _case(name, "9x123", "17x33x64").arguments(torch.float32))
        clean = forward(op, args)
        grad = torch.ones_like(clean)
        clean_grads = backward(op, grad, args)
        args[op.lead][3, 2] = math.nan
        out, grads = forward(op, args), backward(op, grad, args)
        others = torch.arange(clean.shape[0]) != 3
        assert out[3].isnan().all(), f"{name}: NaN went in, {out[3]} came out"
        assert torch.equal(out[others], clean[others]), f"{name}: NaN spread to other rows"
        lead = op.tensors.index(op.lead)
        mine, was = grads[lead], clean_grads[lead]
        assert mine is not None
        assert was is not None
        assert mine[3].isnan().all(), f"{name}: a row with NaN has a gradient"
        assert torch.equal(mine[others], was[others]), f"{name}: NaN spread to the gradients of other rows"


def same_bits() -> None:
    """Run after run, whatever gradients are wanted, and for a curvature by value or by pointer."""
    for name in OPS:
        op = op_of(name)
        args = prepared(op, _case(name, "3x64", "5x33", "17x33x64").arguments(torch.float32))
        grad = gradients_for(_cases(name)[0], [forward(op, args)])[0]
        before = backward(op, grad, args)
        assert torch.equal(forward(op, args), forward(op, args))
        for slot in range(len(before)):
            wanted = [i == slot for i in range(len(before))]
            alone = backward(op, grad, args, wanted)[slot]
            assert alone is not None
            assert torch.equal(alone, before[slot]), f"{name}: gradient {slot} alone differs"
        curvature = op.names.index("curvature")
        by_value = [float(a) if i == curvature else a for i, a in enumerate(args)]
        assert torch.equal(forward(op, by_value), forward(op, args)), f"{name}: curvature by value"


def coinciding_points() -> None:
    x = torch.randn(6, 40, generator=torch.Generator().manual_seed(0)) * 0.05
    x[4] = 0
    c = torch.tensor(0.7)
    log_maps, values = ("lorentz_log_map", "poincare_log_map"), ("lorentz_distance", "poincare_distance")
    for name in (*log_maps, *values, "lorentz_exterior_angle"):
        op = op_of(name)
        out = forward(op, [x, x, c])
        assert (out == 0).all(), f"{name} of coinciding points: {out}"
        for g in backward(op, torch.ones_like(out), [x, x, c]):
            assert g is not None
            assert g.isfinite().all(), name
            assert out.dim() == 2 or (g == 0).all(), f"{name}: gradient {g}"
    for name in ("lorentz_pairwise_distance", "poincare_pairwise_distance"):
        op = op_of(name)
        out = forward(op, [x, x.clone(), c])
        assert (out.diagonal() == 0).all(), f"{name}: {out.diagonal()}"
        for g in backward(op, torch.eye(6), [x, x.clone(), c]):
            assert g is not None
            assert (g == 0).all(), f"{name}: gradient {g}"


def expanded_gradient() -> None:
    """What ``out.sum().backward()`` sends: one element, all strides 0."""
    for name in OPS:
        op = op_of(name)
        args = prepared(op, _case(name, "3x64", "5x33", "17x33x64").arguments(torch.float32))
        ones = torch.ones_like(forward(op, args))
        expanded = guarded(torch.ones(()).expand(ones.shape))
        for a, b in zip(backward(op, expanded, args), backward(op, ones, args), strict=True):
            assert a is not None
            assert b is not None
            assert torch.equal(a, b), name


def _raises(what: str, run: Callable[[], Any]) -> None:
    message = "nothing was raised"
    try:
        run()
    except Exception as error:
        message = str(error)
    if what not in message:
        raise AssertionError(f"{message} where an error about {what!r} was expected")


def harness() -> None:
    """The interpreter's repairs work, and mistakes in kernels are seen."""
    x = guarded(torch.randn(100, generator=torch.Generator().manual_seed(0)))
    for dtype in (torch.bfloat16, torch.float16):
        given, out = x.to(dtype), Output(torch.empty(100, dtype=dtype))
        faulty_kernels.double[(1,)](given, out.tensor, 100, BLOCK=128)
        assert torch.equal(out.tensor, 2 * given)
        faulty_kernels.double[(1,)](x / 3, out.tensor, 100, BLOCK=128)
        assert torch.equal(out.tensor, (2 * (x / 3)).to(dtype)), f"float32 to {dtype} is not to nearest even"
    out = Output(torch.empty(100, dtype=torch.float32))
    faulty_kernels.reads_beyond[(1,)](x, out.tensor, 100, BLOCK=128)
    assert out.tensor.isnan().all(), "a read out of bounds went unseen"
    faulty_kernels.writes_beyond[(1,)](x, out.tensor, 100, BLOCK=128)
    out.buffer[-100:] = 0
    _raises("out of bounds", lambda: out.check("it"))
    half = x.to(torch.bfloat16)
    _raises("arithmetic on bfloat16", lambda: faulty_kernels.adds_bfloat16[(1,)](half, half.clone(), 100, BLOCK=128))
    a, b = torch.randn(2, 16, 16, generator=torch.Generator().manual_seed(1)).unbind()
    z = torch.empty(16, 16)
    faulty_kernels.product[(1,)](a.bfloat16(), b.bfloat16(), z, SIDE=16, PRECISION="ieee")
    torch.testing.assert_close(z, a.bfloat16().float() @ b.bfloat16().float())
    _raises("TF32", lambda: faulty_kernels.product[(1,)](a, b, z, SIDE=16, PRECISION="tf32"))
    _raises("grid", lambda: faulty_kernels.double[(1000,)](x, x, 1, BLOCK=1))


def main() -> None:
    out, part, parts = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    torch.set_num_threads(1)
    patches.install()
    families = (steps, activations, groups, losses, draws, masks, fills, shares, codes, paths, best, tokens)
    results, checks = {}, {name: check for family in families for name, check in vars(family).items()} | globals()
    for name in CHECKS[part::parts]:
        try:
            if name in OPS:
                contract(name)
            else:
                checks[name]()
            results[name] = ""
        except Exception as error:
            results[name] = f"{error}\n{traceback.format_exc()}"
    out.write_text(json.dumps(results))


if __name__ == "__main__":
    main()
