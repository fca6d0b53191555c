"""The Triton half of the report: what each kernel asks of a GPU, compiled for four of them with none present.

The real launchers run on small CPU tensors with ``JITFunction.run`` replaced by a recorder, so what is compiled is what
a launch would compile, with the same constants, warps and divisibility attributes.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from tools.gpu_report_contrastive import CHOICES, LOG_SUMS, SEVERAL_BLOCKS, SIGMOID, contrastive_call
from tools.gpu_report_decoding import DECODING, DECODING_VARIANTS, decoding_call
from tools.gpu_report_passes import AFFINE, LOSS, PASSES, passes_call
from tools.gpu_report_quantization import QUANTIZATION, QUANTIZATION_VARIANTS, quantization_call
from tools.gpu_report_retrieval import RETRIEVAL, retrieval_call
from tools.gpu_report_rows import MULTIPROCESSORS, KernelRow, cache_folder, occupancy, write_atomically
from tools.gpu_report_vocabulary import VOCABULARY, vocabulary_call

ROOT = Path(__file__).resolve().parents[1]
TARGETS = ("sm_80", "sm_90", "sm_100", "gfx942")
_MATRIX = ("HGMMA", "UTCHMMA", "HMMA")
# Loads from global memory and stores to it; their names end in what a thread moves.
_ACCESS = re.compile(r"\s(?:LDG|STG)\.E\S*")
_AMD_ACCESS = re.compile(r"^\s*(?:global|buffer)_(?:load|store)_\S+", re.MULTILINE)


@dataclass(frozen=True)
class Variant:
    """One call of a launcher: ``op``, or its gradient, on ``[rows, depth]`` inputs; attention also with masks.

    ``keys``: of attention, where they are not ``rows``; then it has no bias.
    """

    op: str
    dtype: str
    depth: int = 512
    backward: bool = False
    rows: int = 64
    masked: bool = False
    keys: int = 0

    def __str__(self) -> str:
        keys, masks = f", S = {self.keys}" if self.keys else "", ", masked" if self.masked else ""
        return f"{self.op}{' backward' if self.backward else ''}, {self.dtype}, D = {self.depth}{keys}{masks}"


_RADIAL = (
    "lorentz_exp_map0", "lorentz_log_map0", "poincare_exp_map0", "poincare_log_map0", "lorentz_to_poincare",
    "poincare_to_lorentz", "mobius_scalar_mul",
)  # fmt: skip
_PAIR = ("lorentz_exp_map", "lorentz_log_map", "mobius_add", "poincare_exp_map", "poincare_log_map")
_VALUE = ("lorentz_distance", "poincare_distance", "lorentz_exterior_angle", "lorentz_entailment_loss")
ROW_WISE = (*_RADIAL, *_PAIR, *_VALUE, "lorentz_half_aperture", "lorentz_parallel_transport", "lorentz_centroid")
PAIRWISE = ("lorentz_pairwise_inner", "lorentz_pairwise_distance", "poincare_pairwise_distance")
ATTENTION, PACKED, SOURCES = "cross_attention", "cross_attention_varlen", "multi_source_attention"
MERGE = "merge_attention"
NORM, GATED_NORM, GROUP_NORM = "ada_layer_norm", "residual_ada_layer_norm", "group_norm_act"
OF_TILES = (*LOG_SUMS, *CHOICES, *SIGMOID, *QUANTIZATION, *RETRIEVAL, *VOCABULARY)
# How a variant of one of these is launched, and what it reads and writes: written beside their names.
CALLS = {
    **dict.fromkeys(PASSES, passes_call),
    **dict.fromkeys((*LOG_SUMS, *CHOICES, *SIGMOID), contrastive_call),
    **dict.fromkeys(DECODING, decoding_call),
    **dict.fromkeys(QUANTIZATION, quantization_call),
    **dict.fromkeys(RETRIEVAL, retrieval_call),
    **dict.fromkeys(VOCABULARY, vocabulary_call),
}
# Of steps: the op, and what it is given beside the sample, an output and coefficients; "narrow": outputs in bfloat16.
STEPS = {
    "denoise_step, two outputs": ("denoise_step", "output1 weights"),
    "denoise_step, narrow outputs": ("denoise_step", "output1 weights narrow"),
    "denoise_step, drawn noise": ("denoise_step", "seed"),
    "denoise_step, rescaled": ("denoise_step", "output1 weights rescale"),
    "multistep, history": ("multistep", "output1 weights limits history0 history1"),
    "corrected_step, everything": (
        "corrected_step",
        "output1 output2 output3 output4 mask history0 history1 history2 history3 seed keep known known_noise weights "
        "limits each",
    ),
}
# Whether they normalize, and interleave; those leave half a head as it is.
ROTATIONS = {
    "rotary_embedding": (False, False),
    "rotary_embedding, interleaved": (False, True),
    "qk_norm_rotary": (True, False),
    "qk_norm_rotary, interleaved": (True, True),
}


def variants(everything: bool = False) -> list[Variant]:
    """Each op forward and backward in one type; the other types, and odd and long rows, where the code is another."""
    found = []
    for backward in (False, True):
        found += [Variant(op, "float32", backward=backward) for op in ROW_WISE]
        found += [Variant(op, "bfloat16", backward=backward) for op in ("lorentz_exp_map0", "lorentz_distance")]
        pairwise = zip(PAIRWISE, ("bfloat16", "bfloat16", "float32"), strict=True)
        found += [Variant(op, dtype, backward=backward, rows=512) for op, dtype in pairwise]
        found += [Variant(op, "float32", 128, backward) for op in (MERGE, *ROTATIONS)]
    for op, backward in ((op, backward) for op in (NORM, GATED_NORM) for backward in (False, True)):
        found += [Variant(op, "float32", depth, backward) for depth in (123, 1152, 4096)]
        found += [Variant(op, "bfloat16", 1152, backward)]
    for backward in (False, True):
        found += [Variant(GROUP_NORM, "float32", depth, backward) for depth in (49, 64, 4096, 4099)]
        found += [Variant(GROUP_NORM, "bfloat16", 4096, backward)]
    found += [Variant(op, dtype) for op in STEPS for dtype in ("float32", "bfloat16")]
    found += [Variant("corrected_step, everything", "float32", 123)]
    for backward in (False, True):
        found += [Variant(op, t, 1152, backward, 128) for op in PASSES for t in ("float32", "bfloat16")]
        found += [Variant(op, "float32", 123, backward) for op in ("film, silu", "film of images, gelu", "geglu", LOSS)]
    found += [Variant("lorentz_parallel_transport", "float32", depth, True) for depth in (5, 123, 4096, 10000)]
    found += [Variant("lorentz_pairwise_distance", "float16", rows=512)]
    for dtype in ("bfloat16", "float32"):
        found += [Variant(op, dtype, rows=512) for op in (*LOG_SUMS, *CHOICES, *SIGMOID)]
        found += [Variant(op, dtype, backward=True, rows=512) for op in (*LOG_SUMS, *CHOICES)]
        found += [Variant(op, dtype, rows=512) for op in RETRIEVAL]
    found += [Variant(op, "float16", backward=True, rows=512) for op in (LOG_SUMS[-1], *CHOICES)]
    found += [Variant(op, "float16", rows=512) for op in SIGMOID]
    found += [Variant(LOG_SUMS[0], "bfloat16", depth=256, backward=True, rows=SEVERAL_BLOCKS)]
    found += [Variant(op, "bfloat16", 256, True) for op in (MERGE, *ROTATIONS)]
    found += [Variant(*each) for each in (*DECODING_VARIANTS, *QUANTIZATION_VARIANTS)]
    # Rows that are not copied by 16 bytes.
    found += [Variant(op, "bfloat16", 123, rows=512) for op in (LOG_SUMS[0], SIGMOID[0], *RETRIEVAL)]
    found += [Variant(op, "bfloat16", 123, True, 512) for op in (PAIRWISE[0], LOG_SUMS[-1], CHOICES[0])]
    for dtype in ("float16", "bfloat16", "float32"):
        found += [Variant(op, dtype, backward=backward, rows=512) for op in VOCABULARY for backward in (False, True)]
        found += [Variant(op, dtype, 123, backward, 512) for op in VOCABULARY[:2] for backward in (False, True)]
        for depth in (64, 128):
            calls = [(backward, masked) for backward in (False, True) for masked in (False, True)]
            for op in (ATTENTION, PACKED):
                found += [Variant(op, dtype, depth, backward, 512, masked) for backward, masked in calls]
        found += [Variant(ATTENTION, dtype, depth, rows=512) for depth in (40, 72, 80, 96, 160, 256)]
        if dtype != "float32":  # all keys in one tile
            for depth, keys in ((40, 50), (40, 77), (64, 64), (64, 77), (72, 50), (80, 50), (96, 50), (128, 50)):
                short = Variant(ATTENTION, dtype, depth, True, 512, keys=keys)
                found += [short, replace(short, masked=True), replace(short, op=PACKED, masked=True)]
        found += [Variant(ATTENTION, dtype, depth, True, 512, masked=True) for depth in (40, 72, 80, 96)]
        found += [Variant(PACKED, dtype, 80, backward, 512) for backward in (False, True)]
        for depth in (64, 80, 96, 128, 256):
            found += [Variant(SOURCES, dtype, depth, rows=512, masked=masked) for masked in (False, True)]
    if everything:
        dtypes = ("float32", "bfloat16", "float16")
        found += [Variant(op, t, backward=b) for op in ROW_WISE for t in dtypes for b in (False, True)]
        found += [Variant(op, t, backward=b, rows=512) for op in PAIRWISE for t in dtypes for b in (False, True)]
    return list(dict.fromkeys(found))


def call(variant: Variant) -> tuple[Callable[[], None], int]:
    """A launch of the variant, and the bytes of its inputs and outputs: the least that it can move."""
    import torch
    from mmkern.kernels import hyperbolic

    if variant.op == ATTENTION:
        return _attention_call(variant)
    if variant.op == PACKED:
        return _packed_call(variant)
    if variant.op == SOURCES:
        return _sources_call(variant)
    if variant.op == MERGE or variant.op in ROTATIONS:
        return _attention_rows_call(variant)
    if variant.op in (NORM, GATED_NORM):
        return _norm_call(variant)
    if variant.op == GROUP_NORM:
        return _group_norm_call(variant)
    if variant.op in STEPS:
        return _step_call(variant)
    if variant.op in CALLS:
        launch, used = CALLS[variant.op](variant)
        return launch, _bytes(used)
    torch.manual_seed(0)
    dtype = getattr(torch, variant.dtype)
    n, d = variant.rows, variant.depth

    def point(*shape: int) -> Any:
        return (0.5 * torch.randn(*shape) / shape[-1] ** 0.5).to(dtype)

    inputs, out = [point(n, d)], torch.empty(n, d, dtype=dtype)
    if variant.op == "lorentz_centroid":
        inputs, out = [point(4, n, d), torch.rand(4, n).to(dtype)], torch.empty(4, d, dtype=dtype)
    elif variant.op in PAIRWISE:
        inputs, out = [point(n, d), point(n, d)], torch.empty(n, n, dtype=dtype)
    elif variant.op == "mobius_scalar_mul":
        inputs = [torch.randn(n), *inputs]
    elif variant.op == "lorentz_parallel_transport":
        inputs = [point(n, d) for _ in range(3)]
    elif variant.op in (*_PAIR, *_VALUE):
        inputs = [*inputs, point(n, d)]
    if variant.op in (*_VALUE, "lorentz_half_aperture"):
        out = torch.empty(n, dtype=dtype)
    options = [0.1] if variant.op in ("lorentz_half_aperture", "lorentz_entailment_loss") else []
    curvature = torch.ones(())
    used = [*inputs, curvature, out]
    arguments = [*inputs, curvature, *options]
    if variant.backward:
        gradients = [torch.empty_like(x) for x in (*inputs, curvature)]
        used += gradients
        arguments = [torch.ones_like(out), *arguments, *gradients]
    else:
        arguments.append(out)
    launch = getattr(hyperbolic, variant.op + ("_backward" if variant.backward else ""))
    return lambda: launch(*arguments), _bytes(used)


def _attention_call(variant: Variant) -> tuple[Callable[[], None], int]:
    """Two heads of each; masked: a key mask, causal, and a bias for each head."""
    import torch
    from mmkern.kernels import attention

    torch.manual_seed(0)
    dtype = getattr(torch, variant.dtype)
    n, d, keys = variant.rows, variant.depth, variant.keys or variant.rows
    q, k, v = (torch.randn(1, 2, rows, d).to(dtype) for rows in (n, keys, keys))
    masks: list[Any] = [None] * 6
    if variant.masked:
        masks[0] = torch.rand(1, keys) < 0.9
        masks[3] = None if variant.keys else torch.randn(1, 2, n, n).to(dtype)
    arguments = [q, k, v, *masks, d**-0.5, 0.0, -1, 0 if variant.masked else -1, 1, 0.0]
    outs = [torch.empty_like(q), torch.empty(1, 2, n)]
    used = [x for x in (*arguments, *outs) if isinstance(x, torch.Tensor)]
    if not variant.backward:
        return lambda: attention.cross_attention(*arguments, *outs), _bytes(used)
    attention_gradients = [torch.empty_like(x) for x in (q, k, v)]
    bias_gradients = [None, None if masks[3] is None else torch.empty(1, 2, n, n)]
    given = [torch.ones_like(out) for out in outs]
    used += [x for x in (*given, *attention_gradients, *bias_gradients) if x is not None]
    if variant.keys:  # in one tile: what `out` says of them is found there
        used = [x for x in used if x is not outs[0]]

    def launch() -> None:
        attention.cross_attention_backward(*given, *arguments, *outs, *attention_gradients, *bias_gradients)

    return launch, _bytes(used)


def _packed_call(variant: Variant) -> tuple[Callable[[], None], int]:
    """Two segments of two heads; masked: causal, with a prefix for each."""
    import torch
    from mmkern.kernels import attention

    torch.manual_seed(0)
    dtype = getattr(torch, variant.dtype)
    lengths, d = (variant.rows, variant.keys or variant.rows), variant.depth
    q, k, v = (torch.randn(n, 2, d).to(dtype) for n in (*lengths, lengths[1]))
    begins, longest = [torch.tensor([0, n // 4, n]) for n in lengths], [n - n // 4 for n in lengths]
    prefixes, right = (torch.tensor([1, lengths[1] // 8]), 0) if variant.masked else (None, -1)
    arguments = [q, k, v, *begins, prefixes, None, *longest, d**-0.5, 0.0, -1, right, 1, 0.0]
    outs = [torch.empty_like(q), torch.empty(2, len(q))]
    used = [x for x in (*arguments, *outs) if isinstance(x, torch.Tensor)]
    if not variant.backward:
        return lambda: attention.cross_attention_varlen(*arguments, *outs), _bytes(used)
    given, gradients = [torch.ones_like(out) for out in outs], [torch.empty_like(x) for x in (q, k, v)]

    def launch() -> None:
        attention.cross_attention_varlen_backward(*given, *arguments, *outs, *gradients)

    return launch, _bytes([*used, *given, *gradients])


def _sources_call(variant: Variant) -> tuple[Callable[[], None], int]:
    """Two sources of two heads, the second gated; masked: a softmax over both, of which the first has a key mask."""
    import torch
    from mmkern.kernels import attention

    from mmkern.reference.attention import MAX_SOURCES, Source

    torch.manual_seed(0)
    dtype = getattr(torch, variant.dtype)
    n, d = variant.rows, variant.depth
    q, *heads, out = (torch.randn(1, 2, n, d).to(dtype) for _ in range(6))
    mask = torch.ones(1, n, dtype=torch.bool) if variant.masked else None
    places = [*heads[:2], None, mask, None, *heads[2:], torch.ones(1, 2, n, 1).to(dtype), None, None]
    absent = [None] * (MAX_SOURCES * len(Source._fields) - len(places))
    arguments = [q, *places, *absent, None, d**-0.5, 0.0, variant.masked, 0.0]
    used = [x for x in (*arguments, out) if isinstance(x, torch.Tensor)]
    return lambda: attention.multi_source_attention(*arguments, out), _bytes(used)


def _attention_rows_call(variant: Variant) -> tuple[Callable[[], None], int]:
    """Two heads whose rows lie between each other's, as a projection leaves them."""
    import torch
    from mmkern.kernels import attention_rows

    torch.manual_seed(0)
    n, d = variant.rows // 2, variant.depth
    dtype = getattr(torch, variant.dtype)

    def heads() -> Any:
        return torch.randn(1, n, 2, d).to(dtype).transpose(1, 2)

    normalize, interleaved = ROTATIONS.get(variant.op, (False, False))
    if variant.op == MERGE:
        arguments = [heads(), torch.randn(1, 2, n), heads(), torch.randn(1, 2, n)]
        outs, options, differentiable = [heads(), torch.empty(1, 2, n)], [], arguments
    else:
        angles = torch.randn(2, n, d // 4 if interleaved else d // 2)
        weight = torch.randn(d) if normalize else None
        differentiable = [heads(), weight]
        arguments = [*differentiable, *(angle.expand(1, 2, -1, -1) for angle in angles)]
        outs, options = [heads()], [1e-6, normalize, interleaved]
    kernel = MERGE if variant.op == MERGE else "rotary_embedding"
    used = [x for x in (*arguments, *outs) if x is not None]
    if not variant.backward:
        launch = getattr(attention_rows, kernel)
        return lambda: launch(*arguments, *options, *outs), _bytes(used)
    gradients = [None if x is None else torch.empty_like(x) for x in differentiable]
    read = used if variant.op == MERGE or normalize else used[1:]  # a rotation's gradient needs no x
    used = [*read, *(x for x in gradients if x is not None)]
    launch = getattr(attention_rows, f"{kernel}_backward")
    return lambda: launch(*outs, *arguments, *options, *gradients), _bytes(used)


def _norm_call(variant: Variant) -> tuple[Callable[[], None], int]:
    """Rows that share weight, bias, scale and shift, and with a residual the gate."""
    import torch
    from mmkern.kernels import modulation

    torch.manual_seed(0)
    n, d, dtype = variant.rows, variant.depth, getattr(torch, variant.dtype)
    inputs = [torch.randn(1, n, d).to(dtype) for _ in range(2 if variant.op == GATED_NORM else 1)]
    gate = [torch.randn(1, 1, d)] if variant.op == GATED_NORM else []
    modulators = [*torch.randn(2, d), *torch.randn(2, 1, 1, d)]
    tensors = [*inputs, *gate, *modulators]
    arguments, outs = [*tensors, None, 1e-6, True], [torch.empty_like(x) for x in inputs]
    launch = getattr(modulation, variant.op + ("_backward" if variant.backward else ""))
    if not variant.backward:
        return lambda: launch(*arguments, *outs), _bytes([*tensors, *outs])
    gradients = [torch.empty_like(x) for x in tensors]
    grads = [torch.ones_like(out) for out in outs]
    return lambda: launch(*grads, *arguments, *gradients, None), _bytes([*tensors, *grads, *gradients])


def _group_norm_call(variant: Variant) -> tuple[Callable[[], None], int]:
    """A sample of two groups, whose channels are the rows; silu."""
    import torch
    from mmkern.kernels import modulation

    from mmkern.reference.activations import Activation

    torch.manual_seed(0)
    channels = variant.rows // 2
    x, out, grad = torch.randn(3, 1, 2, channels, variant.depth).to(getattr(torch, variant.dtype)).unbind()
    tensors, options = [x, *torch.randn(2, 2, channels), *torch.randn(2, 1, 2, channels)], [1e-5, int(Activation.SILU)]
    if not variant.backward:
        return lambda: modulation.group_norm_act(*tensors, *options, out), _bytes([*tensors, out])
    gradients = [torch.empty_like(given) for given in tensors]
    launch = modulation.group_norm_act_backward
    return lambda: launch(grad, *tensors, *options, *gradients), _bytes([grad, *tensors, *gradients])


def _step_call(variant: Variant) -> tuple[Callable[[], None], int]:
    """Two samples; each with numbers of its own, or not. To be rescaled, outputs are read twice: by all of a sample."""
    import torch
    from mmkern.kernels import diffusion

    from mmkern.ops._define import OPS
    from mmkern.reference.diffusion import MAX_OUTPUTS, Column

    torch.manual_seed(0)
    op, given = OPS[STEPS[variant.op][0]], STEPS[variant.op][1].split()
    dtype, shape = getattr(torch, variant.dtype), (2, variant.rows // 2, variant.depth)
    rows = 2 if "each" in given else 1
    special = {
        "mask": torch.rand(*shape[:2], 1),
        "keep": torch.rand(*shape[:2], 1),
        "seed": torch.tensor([1, 2]),
        "weights": torch.randn(rows, 2 * MAX_OUTPUTS),
        "rescale": torch.rand(rows, 1),
        "coefficients": torch.randn(rows, len(Column)),
        "limits": torch.rand(rows, 2),
    }

    def made(name: str) -> torch.Tensor:
        is_narrow = name.startswith("output") and "narrow" in given
        return special.get(name, torch.randn(shape).to(torch.bfloat16 if is_narrow else dtype))

    wanted = ("x", "output0", "coefficients", *given)
    arguments = {name: made(name) if name in wanted else None for name in op.names}
    outs = [torch.empty(shape, dtype=dtype) for _ in op.outputs]
    used = [x for x in (*arguments.values(), *outs) if x is not None]
    if "rescale" in given:
        used += [x for name, x in arguments.items() if name.startswith("output") and x is not None]
    launch = getattr(diffusion, op.name)
    return lambda: launch(*arguments.values(), *outs), _bytes(used)


def _bytes(tensors: Sequence[Any]) -> int:
    return sum(x.numel() * x.element_size() for x in tensors)


@contextmanager
def recorded() -> Iterator[list[tuple[Any, tuple[Any, ...], dict[str, Any]]]]:
    """Kernel launches inside are noted, not made."""
    from triton.runtime.jit import JITFunction

    launches: list[tuple[Any, tuple[Any, ...], dict[str, Any]]] = []

    def note(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        launches.append((self, args, kwargs))

    original = JITFunction.run
    JITFunction.run = note
    try:
        yield launches
    finally:
        JITFunction.run = original


def compile_launch(kernel: Any, args: Sequence[Any], kwargs: dict[str, Any], target: str) -> Any:
    """What ``kernel[grid](*args, **kwargs)`` would compile on ``target``."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, make_backend
    from triton.runtime.jit import create_function_from_signature

    nvidia = target.startswith("sm_")
    gpu = GPUTarget("cuda", int(target[3:]), 32) if nvidia else GPUTarget("hip", target, 64)
    backend = make_backend(gpu)
    if not nvidia:
        kwargs = {key: value for key, value in kwargs.items() if key != "maxnreg"}  # as a launcher does on ROCm
    bind = create_function_from_signature(kernel.signature, kernel.params, backend)
    bound, specialization, options = bind(*args, **kwargs)
    options, signature, constants, attributes = kernel._pack_args(backend, kwargs, bound, specialization, options)
    source = ASTSource(kernel, signature, constants, attributes)
    return triton.compile(source, target=gpu, options=options.__dict__)


def read_machine_code(name: str, variant: str, target: str, compiled: Any) -> KernelRow:
    if target.startswith("sm_"):
        return _read_cubin(name, variant, target, compiled)
    return _read_amdgcn(name, variant, target, compiled)


def _read_cubin(name: str, variant: str, target: str, compiled: Any) -> KernelRow:
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage, sass = (
            subprocess.run([str(tool), option, file.name], capture_output=True, text=True, check=True).stdout
            for option in ("--dump-resource-usage", "-sass")
        )
    found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    if found is None:
        raise ValueError(f"cuobjdump names no registers: {usage}")
    opcodes = re.findall(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9]*)", sass)
    registers, threads = int(found[1]), 32 * compiled.metadata.num_warps
    accesses = _ACCESS.findall(sass)
    return KernelRow(
        backend="triton",
        kernel=name,
        variant=variant,
        target=target,
        registers=registers,
        stack_bytes=int(found[2]),
        spills=sum(opcode in ("STL", "LDL") for opcode in opcodes),
        shared_bytes=compiled.metadata.shared,
        threads=threads,
        occupancy=occupancy(MULTIPROCESSORS[target], registers, compiled.metadata.shared, threads),
        matrix={opcode: opcodes.count(opcode) for opcode in _MATRIX if opcode in opcodes},
        accesses=len(accesses),
        wide_accesses=sum(".128" in access or ".256" in access for access in accesses),
    )


def _read_amdgcn(name: str, variant: str, target: str, compiled: Any) -> KernelRow:
    text = compiled.asm["amdgcn"]

    def metadata(key: str) -> int:
        found = re.search(rf"\.{key}:\s+(\d+)", text)
        if found is None:
            raise ValueError(f"the AMD assembly has no .{key}")
        return int(found[1])

    registers, warps = metadata("vgpr_count"), compiled.metadata.num_warps
    # A compute unit: 4 SIMDs of 8 waves, 512 vector registers a lane, 64 KB of LDS.
    by_registers = 4 * min(8, 512 // (-(-max(registers, 1) // 8) * 8))
    by_shared = (65536 // compiled.metadata.shared if compiled.metadata.shared else 32) * warps
    matrix = len(re.findall(r"^\s*v_mfma", text, re.MULTILINE))
    accesses = _AMD_ACCESS.findall(text)
    return KernelRow(
        backend="triton",
        kernel=name,
        variant=variant,
        target=target,
        registers=registers,
        stack_bytes=metadata("private_segment_fixed_size"),
        spills=metadata("vgpr_spill_count"),
        shared_bytes=compiled.metadata.shared,
        threads=64 * warps,
        occupancy=min(32, by_registers, by_shared) / 32,
        matrix={"MFMA": matrix} if matrix else {},
        accesses=len(accesses),
        wide_accesses=sum(access.endswith("dwordx4") for access in accesses),
        note="compiled only",
    )


def compile_variant(variant: Variant, target: str) -> list[KernelRow]:
    """The kernels of one call on one target; kept until a source changes."""
    kept = cache_folder() / f"{_key(variant, target)}.json"
    if kept.exists():
        return [KernelRow(**row) for row in json.loads(kept.read_text())]
    with recorded() as launches:
        call(variant)[0]()
    found: dict[str, KernelRow] = {}
    for kernel, args, kwargs in launches:
        compiled = compile_launch(kernel, args, kwargs, target)
        name = kernel.__name__ + (", near tiles" if kwargs.get("DIFFERENCES") else "")
        found.setdefault(compiled.hash, read_machine_code(name, str(variant), target, compiled))
    write_atomically(kept, json.dumps([asdict(row) for row in found.values()]))
    return list(found.values())


def _key(variant: Variant, target: str) -> str:
    from importlib.metadata import version

    key = hashlib.sha256(f"{variant!r} {target} {version('triton')}".encode())
    sources = [
        *(ROOT / "kernels").glob("*.py"),
        *(ROOT / "mmkern" / "reference").glob("*.py"),
        Path(__file__),
        *{Path(inspect.getfile(each)) for each in CALLS.values()},
    ]
    for path in sorted(sources):
        key.update(path.read_bytes())
    return key.hexdigest()[:32]


def _small(variant: Variant) -> Variant:
    """Of attention one tile of queries, but as many tiles of keys as take the same kernels; of others that walk down
    rows, several walks."""
    of_tiles = dict.fromkeys((*PAIRWISE, *OF_TILES, *AFFINE, LOSS), 128)
    rows = {**of_tiles, ATTENTION: 16, PACKED: 16}.get(variant.op, 8)
    has_bias = variant.op == ATTENTION and variant.masked and not variant.keys
    several = 0 if variant.op not in (ATTENTION, PACKED) or has_bias else 176
    return replace(variant, rows=min(variant.rows, rows), keys=variant.keys or several)


def traffic(wanted: Sequence[Variant]) -> dict[str, tuple[int, int]]:
    """Bytes moved, and the least possible, of each variant: counted by the interpreter in a process of its own."""
    small = [_small(v) for v in wanted]
    key = hashlib.sha256("".join(_key(v, "") for v in small).encode()).hexdigest()[:32]
    kept = cache_folder() / f"traffic-{key}.json"
    if not kept.exists():
        command = [sys.executable, "-m", "tools.gpu_report_traffic"]
        environment = {k: v for k, v in os.environ.items() if k != "PYTHONSAFEPATH"} | {"TRITON_INTERPRET": "1"}
        question = json.dumps([asdict(v) for v in small])
        done = subprocess.run(
            command, cwd=ROOT, env=environment, input=question, capture_output=True, text=True, check=False
        )
        if done.returncode:
            raise RuntimeError(done.stderr)
        write_atomically(kept, done.stdout)
    return {str(v): (moved, least) for v, (moved, least) in zip(wanted, json.loads(kept.read_text()), strict=True)}


def triton_rows(everything: bool = False, workers: int | None = None) -> list[KernelRow]:
    """All variants on all targets, compiled by ``workers`` processes."""
    wanted = variants(everything)
    jobs = [(variant, target) for variant in wanted for target in TARGETS]
    workers = workers or len(os.sched_getaffinity(0))
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        slow = (*PAIRWISE, *OF_TILES, ATTENTION, PACKED)
        # Longest first: the kernels of tiles take ten times as long as the others.
        order = sorted(range(len(jobs)), key=lambda i: jobs[i][0].op not in slow)
        running = {i: pool.submit(compile_variant, *jobs[i]) for i in order}
        bytes_of = traffic(wanted)
        rows = []
        for i in range(len(jobs)):
            moved, least = bytes_of[str(jobs[i][0])]
            rows += [replace(row, moved_bytes=moved, least_bytes=least) for row in running[i].result()]
    return rows
