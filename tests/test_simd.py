"""csrc/cpu/simd.h at every ISA level this machine runs: operators, storage, and the ulp bounds of simd_math.h."""

from __future__ import annotations

import ctypes
import functools
import math
import mmap
import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from tests import probe

Array = np.ndarray[Any, Any]

SIZE = 48  # a multiple of every vector size with R of 1, 2 and 3
ACCUMULATORS = {"f1": np.float32, "f2": np.float32, "f3": np.float32, "d1": np.float64, "d2": np.float64}
VECTORS = pytest.mark.parametrize("vector", ACCUMULATORS)


def apply(level: str, name: str, vector: str, *arguments: Array) -> Array:
    library = probe.load("simd_probe.cpp", level)
    padding = -len(arguments[0]) % (16 * SIZE)
    a, b, c = (np.ascontiguousarray(np.pad(x, (0, padding), "edge")) for x in (*arguments, *[arguments[0]] * 2)[:3])
    out = np.empty_like(a)
    call = getattr(library, f"{name}_{vector}")
    call(probe.address(a), probe.address(b), probe.address(c), probe.address(out), ctypes.c_int64(len(a)))
    return out[: len(arguments[0])]


def size_of(level: str, vector: str) -> int:
    library = probe.load("simd_probe.cpp", level)
    return int(getattr(library, f"lanes_{vector[0]}")()) * int(vector[1])


# Operators


def operands(vector: str) -> tuple[Array, Array, Array]:
    """Ordinary numbers, ties, both zeros, inf and NaN against each other."""
    rng = np.random.default_rng(0)
    special = np.array([0.0, -0.0, 1.0, -1.0, np.inf, -np.inf, np.nan, 1e-40, 3.0])
    a, b = (x.ravel() for x in np.meshgrid(special, special))
    a = np.concatenate([a, rng.normal(size=207)])
    b = np.concatenate([b, rng.normal(size=207)])
    dtype = ACCUMULATORS[vector]
    return a.astype(dtype), b.astype(dtype), rng.permutation(a).astype(dtype)


OPERATORS: dict[str, Callable[[Array, Array, Array], Array]] = {
    "add": lambda a, b, c: a + b,
    "subtract": lambda a, b, c: a - b,
    "multiply": lambda a, b, c: a * b,
    "divide": lambda a, b, c: a / b,
    "negative": lambda a, b, c: -a,
    "absolute": lambda a, b, c: np.abs(a),
    "square_root": lambda a, b, c: np.sqrt(a),
    "smaller_of": lambda a, b, c: np.where(a < b, a, b),
    "larger_of": lambda a, b, c: np.where(a > b, a, b),
    "scalars": lambda a, b, c: (2 * a + 1) * a.dtype.type(0.5),
    "less": lambda a, b, c: np.where(a < b, a, c),
    "less_equal": lambda a, b, c: np.where(a <= b, a, c),
    "greater": lambda a, b, c: np.where(a > b, a, c),
    "greater_equal": lambda a, b, c: np.where(a >= b, a, c),
    "equal": lambda a, b, c: np.where(a == b, a, c),
    "different": lambda a, b, c: np.where(a != b, a, c),
    "logic": lambda a, b, c: np.where(((a < b) & ~(b < c)) | (a > c), a, b),
    "compound": lambda a, b, c: ((a + b) * c - a) / b,
}


def same_bits(a: Array, b: Array) -> bool:
    """Equal, zeros with their sign; NaN equals NaN."""
    return bool(np.all((np.isnan(a) & np.isnan(b)) | ((a == b) & (np.signbit(a) == np.signbit(b)))))


@probe.over_levels
@VECTORS
@pytest.mark.parametrize("name", OPERATORS)
@np.errstate(all="ignore")
def test_operator(level: str, vector: str, name: str) -> None:
    a, b, c = operands(vector)
    assert same_bits(apply(level, name, vector, a, b, c), OPERATORS[name](a, b, c))


@probe.over_levels
@VECTORS
def test_fma_rounds_once_where_the_machine_can(level: str, vector: str) -> None:
    eps = np.finfo(ACCUMULATORS[vector]).eps
    a = np.array([1 + eps], ACCUMULATORS[vector])
    once, twice = eps * eps, 0.0  # (1 + eps)(1 - eps) - 1 = -eps^2
    b, c = 1 - a * 0 - eps, -np.ones_like(a)
    assert apply(level, "fused", vector, a, b.astype(a.dtype), c)[0] == -(twice if level == "v2" else once)


@probe.over_levels
@VECTORS
def test_lanes(level: str, vector: str) -> None:
    size = size_of(level, vector)
    a = np.random.default_rng(1).normal(size=size * 6).astype(ACCUMULATORS[vector])
    blocks = a.reshape(-1, size)

    def lanes(name: str, x: Array = a) -> Array:
        return apply(level, name, vector, x).reshape(-1, size)

    assert np.array_equal(lanes("reversed"), blocks[:, ::-1])
    assert np.array_equal(lanes("broadcast"), np.broadcast_to(blocks[:, :1], blocks.shape))
    assert same_bits(lanes("broadcast", -0.0 * np.abs(a)), -0.0 * np.abs(blocks))
    assert np.array_equal(lanes("horizontal_max"), np.broadcast_to(blocks.max(1, keepdims=True), blocks.shape))
    sums = blocks.astype(np.float64).sum(1, keepdims=True)
    assert np.abs(lanes("horizontal_sum") - sums).max() <= size * np.finfo(a.dtype).eps
    for lane in range(size):
        one = np.ones_like(a)
        one[lane] = -1
        assert np.array_equal(lanes("any_negative", one)[:2, 0], [1, 0])
        assert np.array_equal(lanes("all_negative", -one)[:2, 0], [0, 1])


@probe.over_levels
@pytest.mark.parametrize("letter", ["f", "d"])
def test_transpose(level: str, letter: str) -> None:
    library, size = probe.load("simd_probe.cpp", level), size_of(level, letter + "1")
    a = np.arange(size * size, dtype=ACCUMULATORS[letter + "1"]).reshape(size, size)
    out = np.empty_like(a)
    getattr(library, f"transpose_{letter}")(probe.address(a), probe.address(out))
    assert np.array_equal(out, a.T)


# Storage types

STORAGE = {"float": torch.float32, "double": torch.float64, "bf16": torch.bfloat16, "half": torch.float16}
STORED = pytest.mark.parametrize(("kind", "registers"), [(k, r) for k in STORAGE for r in (1, 2)])


def bits_of(values: torch.Tensor) -> Array:
    return values.view(torch.int16).numpy().view(np.uint16)


@probe.over_levels
@pytest.mark.parametrize("kind", ["bf16", "half"])
@pytest.mark.parametrize("registers", [1, 2])
def test_every_16_bit_pattern(level: str, kind: str, registers: int) -> None:
    library = probe.load("simd_probe.cpp", level)
    patterns = np.arange(65536, dtype=np.uint16)
    expected = torch.from_numpy(patterns.view(np.int16)).view(STORAGE[kind]).float().numpy()
    loaded, back = np.empty(65536, np.float32), np.empty_like(patterns)
    n = ctypes.c_int64(65536)
    getattr(library, f"load_{kind}{registers}")(probe.address(patterns), probe.address(loaded), n)
    getattr(library, f"store_{kind}{registers}")(probe.address(loaded), probe.address(back), n)
    assert same_bits(loaded, expected)
    nan = np.isnan(expected)
    assert np.array_equal(back[~nan], patterns[~nan])
    again = torch.from_numpy(back.view(np.int16)).view(STORAGE[kind]).float().numpy()
    assert np.isnan(again[nan]).all()


@probe.over_levels
@pytest.mark.parametrize("kind", ["bf16", "half"])
def test_stores_round_to_nearest_even(level: str, kind: str) -> None:
    library = probe.load("simd_probe.cpp", level)
    every = np.arange(0, 2**32, 2039, dtype=np.uint64).astype(np.uint32)
    middle = np.arange(65536, dtype=np.uint32) << 16 | 0x8000  # halfway between bf16 neighbours
    exact = torch.arange(65536, dtype=torch.int32).to(torch.int16).view(torch.float16).float()
    between = ((exact[1:] + exact[:-1]) / 2).numpy().view(np.uint32)  # halfway between half neighbours
    values = np.concatenate([every, middle, middle + 1, middle - 1, between, between + 1, between - 1]).view(np.float32)
    values = np.pad(values, (0, -len(values) % SIZE))
    out = np.empty(len(values), np.uint16)
    getattr(library, f"store_{kind}1")(probe.address(values), probe.address(out), ctypes.c_int64(len(values)))
    expected = bits_of(torch.from_numpy(values).to(STORAGE[kind]))
    number = ~np.isnan(values)
    assert np.array_equal(out[number], expected[number])
    nan = torch.from_numpy(out[~number].view(np.int16)).view(STORAGE[kind]).float()
    assert nan.isnan().all()


@probe.over_levels
@STORED
def test_partial_loads_and_stores_stay_inside(level: str, kind: str, registers: int) -> None:
    library = probe.load("simd_probe.cpp", level)
    itemsize = STORAGE[kind].itemsize
    size = size_of(level, f"{'d' if kind == 'double' else 'f'}{registers}")
    wide = torch.float64 if kind == "double" else torch.float32
    values = torch.arange(1, size + 1, dtype=STORAGE[kind])
    raw = values.view(torch.uint8).numpy()
    accumulated = values.to(wide).numpy()
    load, store = (getattr(library, f"{verb}_first_{kind}{registers}") for verb in ("load", "store"))
    page = probe.GuardedMemory(mmap.PAGESIZE)

    def at_the_end_of_the_page() -> None:
        scratch = np.empty(size, accumulated.dtype)
        for n in range(size + 1):
            load(page.before_end(n * itemsize), probe.address(scratch), n)
            store(probe.address(accumulated), page.before_end(n * itemsize), n)

    assert probe.survives(at_the_end_of_the_page)
    for n in range(size + 2):  # more than there are lanes means all of them
        out = np.full(size, 7, accumulated.dtype)
        load(probe.address(raw), probe.address(out), n)
        kept = np.arange(size) < n
        assert np.array_equal(out, np.where(kept, accumulated, 0))
        stored = np.full((size + 1) * itemsize, 0xAB, np.uint8)
        store(probe.address(accumulated), probe.address(stored), n)
        n = min(n, size)
        assert np.array_equal(stored[: n * itemsize], raw[: n * itemsize])
        assert (stored[n * itemsize :] == 0xAB).all()


# Elementary functions


def acosh1p(t: Array) -> Array:
    return np.where(t < 0, np.nan, np.log1p(t + np.sqrt(t * (t + 2))))


ORACLES: dict[str, Callable[..., Array]] = {
    "exp": np.exp,
    "expm1": np.expm1,
    "log": np.log,
    "log1p": np.log1p,
    "sinh": np.sinh,
    "cosh": np.cosh,
    "tanh": np.tanh,
    "asinh": np.arcsinh,
    "acosh": np.arccosh,
    "acosh1p": acosh1p,
    "atanh": np.arctanh,
    "erf": lambda x: torch.special.erf(torch.from_numpy(x)).numpy(),
    "acos": np.arccos,
    "atan2": np.arctan2,
}
# Where the function bends; the sweep over all bit patterns is thin there.
DENSE = {
    "exp": (-104, 90),
    "expm1": (-20, 89),
    "log": (0, 4),
    "log1p": (-1, 4),
    "sinh": (-90, 90),
    "cosh": (-90, 90),
    "tanh": (-10, 10),
    "asinh": (-8, 8),
    "acosh": (1, 4),
    "acosh1p": (0, 5),
    "atanh": (-1, 1),
    "erf": (-4, 4),
    "acos": (-1, 1),
}
SPECIAL = np.array([0.0, 1.0, 0.5, 2.0, np.inf, np.nan, 1e-45, 1.1754942e-38, 1.17549435e-38, 3.4028235e38], np.float32)
OVERFLOW = np.array([88.72284, 89.41599], np.float32)  # of exp, and of sinh and cosh
SPECIAL = np.concatenate([SPECIAL, -SPECIAL, OVERFLOW, -OVERFLOW, np.nextafter(np.float32(1), np.float32([0, 2]))])


def stated_bounds() -> dict[str, float]:
    text = (probe.CPU_SOURCES / "simd_math.h").read_text()
    found = re.findall(r"// ([\d.]+) ulp\ntemplate <int R>\nMMKERN_FN Vec<float, R> (\w+)\(", text)
    return {name: float(bound) for bound, name in found}


@functools.lru_cache(maxsize=1)
@np.errstate(all="ignore")
def sweep(name: str) -> tuple[tuple[Array, ...], Array]:
    """Float32 inputs over every exponent, and the function of them in float64."""
    rng = np.random.default_rng(2)
    if name == "atan2":
        around = (rng.normal(size=(2, 1_000_000)) * np.exp2(rng.integers(-3, 4, (2, 1_000_000)))).astype(np.float32)
        anywhere = rng.integers(0, 2**32, (2, 3_000_000), dtype=np.uint32).view(np.float32)
        corners = np.stack([x.ravel() for x in np.meshgrid(SPECIAL, SPECIAL)])
        x = tuple(np.concatenate([around, anywhere, corners], axis=1))
    else:
        patterns = np.arange(0, 2**32, 1021, dtype=np.uint64).astype(np.uint32).view(np.float32)
        x = (np.concatenate([patterns, rng.uniform(*DENSE[name], 1_000_000).astype(np.float32), SPECIAL]),)
    return x, ORACLES[name](*(v.astype(np.float64) for v in x))


@np.errstate(all="ignore")
def ulp_error(result: Array, truth: Array) -> Array:
    """In units of float32's last place at ``truth``; inf counts as 2^128, the first number that is not finite."""
    top = 2.0**128
    exponent = np.clip(np.frexp(np.abs(truth))[1] - 1, -126, 127)
    distance = np.abs(np.clip(result.astype(np.float64), -top, top) - np.clip(truth, -top, top))
    return np.where(np.isnan(truth), 0, distance / np.exp2(exponent - 23))


def test_every_function_states_its_bound() -> None:
    assert stated_bounds().keys() == ORACLES.keys()
    assert max(stated_bounds().values()) <= 4


@probe.over_levels
@pytest.mark.parametrize("vector", ["f1", "f2"])
@pytest.mark.parametrize("name", ORACLES)
def test_ulp(level: str, vector: str, name: str) -> None:
    x, truth = sweep(name)
    result = apply(level, name, vector, *x)
    assert np.array_equal(np.isnan(result), np.isnan(truth))
    zero = (result == 0) & (truth == 0)
    assert np.array_equal(np.signbit(result[zero]), np.signbit(truth[zero]))
    error = ulp_error(result, truth)
    worst = int(error.argmax())
    assert error[worst] <= stated_bounds()[name], f"{error[worst]:.3f} ulp at {[float(v[worst]) for v in x]}"


@probe.over_levels
@pytest.mark.parametrize("vector", ["f1", "f2"])
def test_weights(level: str, vector: str) -> None:
    """exp_flushed: the bound that it states, down to where it flushes, and 0 from there on."""
    x = np.concatenate([-np.geomspace(1e-8, 87.3, 1_000_001), np.linspace(0, 88, 100_001)]).astype(np.float32)
    error = ulp_error(apply(level, "exp_flushed", vector, x), np.exp(x.astype(np.float64)))
    bound = 2 + np.abs(x) * (1.25 if level == "v2" else 0.5)
    assert (error <= bound).all(), f"{(error - bound).max()} ulp too much at {x[(error - bound).argmax()]}"
    below = np.array([-88, -104, -1e4, -1e38, -np.inf], np.float32)
    assert (apply(level, "exp_flushed", vector, below) == 0).all()
    assert np.isnan(apply(level, "exp_flushed", vector, np.array([np.nan, -np.nan], np.float32))).all()


@probe.over_levels
@pytest.mark.parametrize("vector", ["f1", "f2"])
def test_sigmoid(level: str, vector: str) -> None:
    """The bound that it states, and its ends."""
    x = np.concatenate([np.linspace(-87, 100, 1_000_001), np.geomspace(1e-40, 1e38, 10_001)]).astype(np.float32)
    truth = 1 / (1 + np.exp(-x.astype(np.float64)))
    error = ulp_error(apply(level, "sigmoid", vector, x), truth)
    bound = np.where(x >= 0, 2.5, 3 + np.abs(x) * (1.25 if level == "v2" else 0.5))
    assert (error <= bound).all(), f"{(error - bound).max()} ulp too much at {x[(error - bound).argmax()]}"
    assert (apply(level, "sigmoid", vector, np.array([-88.5, -89, -104, -1e38, -np.inf], np.float32)) == 0).all()
    between = apply(level, "sigmoid", vector, np.linspace(-88.5, -87, 1001, dtype=np.float32))
    assert ((between >= 0) & (between < 1.7e-38)).all()
    assert np.isnan(apply(level, "sigmoid", vector, np.array([np.nan, -np.nan], np.float32))).all()


def normal_cdf(x: Array) -> Array:
    return np.array([math.erfc(-v / math.sqrt(2)) / 2 for v in x.tolist()])


@probe.over_levels
@pytest.mark.parametrize("vector", ["f1", "f2"])
def test_normal_cdf(level: str, vector: str) -> None:
    """The bound that it states, and its ends exactly."""
    x = np.concatenate([np.linspace(-6, 6, 300_001), np.geomspace(1e-40, 1e38, 10_001), SPECIAL]).astype(np.float32)
    x = np.concatenate([x, -x])
    truth = normal_cdf(x)
    result = apply(level, "normal_cdf", vector, x)
    error = np.abs(result - truth)
    assert np.array_equal(np.isnan(result), np.isnan(truth))
    assert np.nanmax(error) <= 1.3e-7, f"{np.nanmax(error)} at {x[np.nanargmax(error)]}"
    assert (result[x <= -5.6] == 0).all()
    assert (result[x >= 5.6] == 1).all()
    line = np.linspace(-12, 12, 1001)
    assert np.allclose(apply(level, "normal_cdf", "d1", line), normal_cdf(line), rtol=1e-13, atol=0)


@probe.over_levels
@pytest.mark.parametrize("vector", ["f1", "f2"])
def test_turns(level: str, vector: str) -> None:
    """sin_cos_of_turns: the bound that it states, and exact at quarters."""
    v = (np.arange(1, 2**24, 61) / 2**24).astype(np.float32)
    quarters = np.arange(5, dtype=np.float32) / 4
    for name, function in (("sin_of_turns", np.sin), ("cos_of_turns", np.cos)):
        assert ulp_error(apply(level, name, vector, v), function(2 * np.pi * v.astype(np.float64))).max() <= 1.7
        assert np.array_equal(apply(level, name, vector, quarters), np.round(function(2 * np.pi * quarters)))


@probe.over_levels
@pytest.mark.parametrize("name", ORACLES)
@np.errstate(all="ignore")
def test_double(level: str, name: str) -> None:
    line = np.linspace(*DENSE.get(name, (-3, 3)), 1001)
    x = (line, line[::-1]) if name == "atan2" else (line,)
    result, truth = apply(level, name, "d1", *x), ORACLES[name](*x)
    assert np.array_equal(np.isnan(result), np.isnan(truth))
    assert np.allclose(result, truth, rtol=1e-15, atol=0, equal_nan=True)


# What the linker sees


@probe.over_levels
def test_no_symbol_escapes_its_level(level: str) -> None:
    assert not probe.foreign_symbols("simd_probe.cpp", level)
