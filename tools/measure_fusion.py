"""What torch.compile makes of an op between two pointwise ones: left whole, or decomposed into its reference.

    python tools/measure_fusion.py [NAME ...]     # one thread; a line an op

An op that is left whole is a barrier to fusion; one that is decomposed loses its kernel. ``decomposes`` of
mmkern/ops/_define.py says which it is, op by op; here both are forced in turn.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

from benchmarks import bench_diffusion as diffusion  # noqa: E402
from mmkern import ops  # noqa: E402
from mmkern.bench.measure import interleave  # noqa: E402
from mmkern.ops._define import OPS  # noqa: E402

Run = Callable[[Tensor], Any]
SECONDS = 3.0


def cases() -> dict[str, tuple[Run, Tensor]]:
    rows, residual = torch.randn(2, 8, 1024, 1152)
    scale, shift, gate = torch.randn(3, 8, 1152)
    halves, image, sample = torch.randn(4, 1024, 4096), torch.randn(4, 320, 64, 64), torch.randn(8, 16, 128, 128)
    affine, bias, outputs = torch.randn(2, 320), torch.randn(1152), torch.randn(2, 8, 16, 128, 128).unbind()
    norm = {"scale": scale, "shift": shift}

    def steps(name: str, *given: Any, **options: Any) -> Run:
        return lambda x: getattr(ops, name)(*given, 1.5 * x, diffusion.NUMBERS[name], **options) + 1

    return {
        "film": (lambda x: ops.film(1.5 * x, scale, shift) + 1, rows),
        "gated_residual": (lambda x: ops.gated_residual(residual, 1.5 * x, gate) + 1, rows),
        "bias_gelu": (lambda x: ops.bias_gelu(1.5 * x, bias) + 1, rows),
        "geglu": (lambda x: ops.geglu(1.5 * x) + 1, halves),
        "swiglu": (lambda x: ops.swiglu(1.5 * x) + 1, halves),
        "ada_layer_norm": (lambda x: ops.ada_layer_norm(1.5 * x, **norm) + 1, rows),
        "gated residual, ada_layer_norm": (
            lambda x: sum(ops.ada_layer_norm(1.5 * x, **norm, gate=gate, residual=residual)),
            rows,
        ),
        "group_norm_act": (lambda x: ops.group_norm_act(1.5 * x, 32, *affine) + 1, image),
        "ddim_step": (steps("ddim_step", outputs, guidance=diffusion.GUIDANCE), sample),
        "euler_step": (steps("euler_step", outputs[0]), sample),
        "flow_match_euler_step": (steps("flow_match_euler_step", outputs[0]), sample),
        "denoising_loss": (lambda x: ops.denoising_loss(1.5 * x, outputs[0]), sample),
    }


@contextmanager
def decomposed(whether: bool) -> Iterator[None]:
    before = {name: op.decomposes for name, op in OPS.items()}
    for op in OPS.values():
        op.decomposes = lambda args: whether
    torch._dynamo.reset()
    try:
        yield
    finally:
        for name, op in OPS.items():
            op.decomposes = before[name]


def measure(run: Run, x: Tensor) -> dict[str, float]:
    """Medians in milliseconds of both directions, by what the op becomes."""
    found = {}
    for name, whether in (("whole", False), ("decomposed", True)):
        with decomposed(whether):
            compiled, leaf = torch.compile(run, fullgraph=True), x.clone().requires_grad_()

            def backward(compiled: Run = compiled, leaf: Tensor = leaf) -> None:
                torch.autograd.grad(compiled(leaf).sum(), leaf)

            sides = {name: lambda compiled=compiled: compiled(x), f"{name}, backward too": backward}
            found |= {side: 1e3 * statistics.median(t) for side, t in interleave(sides, SECONDS).items()}
    return found


def main(names: list[str]) -> int:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    for name, (run, x) in cases().items():
        if names and name not in names:
            continue
        found = measure(run, x)
        forward, both = (found[f"whole{way}"] / found[f"decomposed{way}"] for way in ("", ", backward too"))
        times = ", ".join(f"{side} {ms:.2f} ms" for side, ms in found.items())
        print(
            f"{name}: decomposed is {forward:.2f}x as fast forward, {both:.2f}x with the backward ({times})", flush=True
        )
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
