"""What the suites of CUDA kernels on the host start from; tests/conftest.py makes it known to them."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from mmkern.backends import cuda_launch

from .harness import HostLauncher, every_family


@pytest.fixture(scope="module")
def launcher() -> HostLauncher:
    return every_family()


@pytest.fixture
def on_host(launcher: HostLauncher) -> Iterator[None]:
    with cuda_launch.replaced(launcher):
        yield
