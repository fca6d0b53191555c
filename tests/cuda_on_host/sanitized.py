"""Every kernel under AddressSanitizer and UndefinedBehaviorSanitizer, in a process that has preloaded them.

Run by test_cuda_on_host.py; an error ends the process with a report.
"""

from __future__ import annotations

import torch

from mmkern.backends import cuda_launch
from tests.cases.hyperbolic import CASES
from tests.cuda_on_host.calls import both, widened
from tests.cuda_on_host.harness import HostLauncher, build

LABELS = ("9x123", "2x3x40", "sliced", "5x33", "17x33x64", "5x3x5", "near")


def main() -> None:
    launcher = HostLauncher(build("hyperbolic.cpp", sanitize=True))
    chosen = [case for case in CASES if case.label in LABELS]
    with cuda_launch.replaced(launcher):
        for case in chosen:
            both(case, torch.float32)
            both(case, torch.bfloat16)
        for case in chosen:
            if case.label in ("9x123", "5x33", "5x3x5"):
                both(widened(case, 40), torch.float16)  # more than a warp to a row, and more than one chunk
    missed = set(launcher.kernels) - launcher.launched
    assert not missed, f"never launched: {missed}"
    print("clean")


if __name__ == "__main__":
    main()
