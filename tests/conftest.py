"""Options and fixtures that test files share."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from . import devices

LONGEST = (
    "quickstart",
    "triton",
    "examples_stable_diffusion",
    "examples_ddpm",
    "shards",
    "paper_sd",
    "examples_paper",
    "world",
    "evidence",
    "examples_any_model",
    "triton_compile",
    "kernels",
)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--device",
        default="cpu",
        help="where tests make the tensors that name no device; kernels are then those of it",
    )


def pytest_configure(config: pytest.Config) -> None:
    if "PYTEST_XDIST_WORKER" in os.environ:  # a core each: more threads would wait for each other
        torch.set_num_threads(1)
        os.environ["OMP_NUM_THREADS"] = "1"
    config.option.loadscopereorder = False  # of xdist: the files with the most tests first
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


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest files first: one that begins last keeps the other workers waiting."""
    place = {f"test_{name}": i for i, name in enumerate(LONGEST)}
    items.sort(key=lambda item: place.get(item.path.stem, len(place)))


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


@pytest.fixture
def stand_ins(tmp_path: Path) -> dict[str, Path]:
    """Stand-ins of the base and the judges of the world of digits in styles, as options."""
    base, judges = tmp_path / "base", tmp_path / "judges"
    for folder, files in (
        (base, ["world.json", "a.safetensors"]),
        (judges, ["style.safetensors", "content.safetensors"]),
    ):
        folder.mkdir()
        for name in files:
            (folder / name).write_text("{}")
    return {"base": base, "judges": judges, "output_dir": tmp_path / "out"}
