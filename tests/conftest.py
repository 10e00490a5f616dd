"""Options and fixtures that test files share."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch

from . import devices


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--device", default="cpu",
        help="where tests make the tensors that name no device; kernels are then those of it",
    )  # fmt: skip


def pytest_configure(config: pytest.Config) -> None:
    if "PYTEST_XDIST_WORKER" in os.environ:  # a core each: more threads would wait for each other
        torch.set_num_threads(1)
        os.environ["OMP_NUM_THREADS"] = "1"
    name = config.getoption("--device")
    try:
        devices.chosen = torch.empty(1, device=name).device
    except (RuntimeError, AssertionError) as error:  # torch without CUDA asserts
        reason = str(error).splitlines()[0]
        raise pytest.UsageError(f"--device {name} cannot be used here: {reason}") from error
    if name != "cpu":
        mode = devices.OnDevice(devices.chosen)
        mode.__enter__()
        config.add_cleanup(lambda: mode.__exit__(None, None, None))


@pytest.fixture(scope="session")
def device() -> torch.device:
    """That of --device."""
    return devices.chosen


@pytest.fixture
def fresh_accelerate() -> Iterator[None]:
    """No test finds what accelerate kept in the process from another one."""
    from .distributed.accelerated import forget_state

    yield
    forget_state()
