"""Every test runs with the threads and the seed that it asks for, whatever ran before it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

import mmkern
from tests.cuda_on_host.fixtures import launcher, on_host  # noqa: F401


@pytest.fixture(autouse=True)
def _same_start(request: pytest.FixtureRequest) -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.manual_seed(0)
    with mmkern.use_backend(request.config.getoption("--backend")):
        yield
    torch.set_num_threads(threads)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--device", default="cpu", help="where the families' suites run: cpu, or cuda on a machine that has it"
    )

    parser.addoption("--backend", default=None, help="which backend runs them, where the device has several")


@pytest.fixture(scope="session")
def device(request: pytest.FixtureRequest) -> str:
    return str(request.config.getoption("--device"))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))
