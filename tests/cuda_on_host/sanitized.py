"""Every kernel under AddressSanitizer and UndefinedBehaviorSanitizer, in a process that has preloaded them.

Run by test_cuda_on_host.py; an error ends the process with a report.
"""

from __future__ import annotations

import torch

from mmkern.backends import cuda_launch
from tests.cases import (
    absorbing,
    attention,
    attention_rows,
    contrastive,
    ctc,
    decoding,
    diffusion,
    gated,
    group_norm,
    masked_decode,
    modulation,
)
from tests.cases.hyperbolic import CASES
from tests.cuda_on_host.calls import both, widened
from tests.cuda_on_host.harness import Build, every_family

ODD = ("9x123", "5x33", "5x3x5")
IN_VECTORS = ("2x3x40", "17x33x64", "2x8")
LONG = ("lorentz_log_map", "lorentz_distance", "lorentz_parallel_transport", "lorentz_centroid")
# Rows of queries and keys that do not fill a tile, split keys, aligned layouts and not; every type and width of values.
ATTENTION = {
    torch.float32: ("all at once", "bias LS", "one query bias", "sliced", "x128x128", "x256x256"),
    torch.bfloat16: ("all at once", "right padded", "x64x64", "x128x128", "x256x256"),
    torch.float16: ("one query bias", "sliced", "2x2x2x3x0", "x64x64", "x128x128", "x256x256"),
}


def main() -> None:
    launcher = every_family(Build.sanitized)
    with cuda_launch.replaced(launcher):
        for case in CASES:
            if case.label in ODD:
                both(case, torch.float32)
            if case.label in IN_VECTORS:
                both(case, torch.bfloat16)
            if case.label in ODD and case.op in LONG:
                both(widened(case, 6), torch.float16)  # several warps to a row
                both(widened(case, 130), torch.float32)  # more columns than registers hold
        for case in attention.CASES:
            for dtype, labels in ATTENTION.items():
                if any(label in case.label for label in labels):
                    both(case, dtype)
        for case in (*decoding.CASES[:12], *absorbing.STEPS, *masked_decode.CASES[:16], *ctc.CASES, *ctc.BEAMS):
            both(case, torch.float32)
        for case in (*attention_rows.CASES, *modulation.CASES, *gated.CASES, *group_norm.CASES, *diffusion.CASES):
            both(case, torch.float32)
        for case in (
            case for family in (modulation, gated, group_norm, diffusion) for case in family.of_every_kernel()
        ):
            both(case, torch.float32)
            both(case, torch.bfloat16)
            both(case, torch.float16)
        for case in contrastive.CASES:
            if (case.op, case.label) in contrastive.OF_EVERY_CUDA_KERNEL:
                both(case, torch.float32)
    missed = set(launcher.kernels) - launcher.launched
    assert not missed, f"never launched: {missed}"
    print("clean")


if __name__ == "__main__":
    main()
