"""`pytest --device`: what a test makes is there, what the package makes is not moved."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from ebu_optim.diffusion import surrogate_noise

from . import conftest, devices


def test_tensors_of_tests_are_made_there_with_the_cpus_random_numbers(device):
    if device.type == "meta":
        pytest.skip("its tensors have no values")
    drawn = lambda: torch.randn(3, generator=torch.Generator().manual_seed(0))  # noqa: E731
    with devices.OnDevice(torch.device("cpu")):
        want = drawn()
    assert torch.equal(drawn().cpu(), want.cpu())
    assert np.array_equal(drawn().numpy(), want.cpu().numpy())


def test_only_what_names_no_device_and_is_not_the_packages():
    with devices.OnDevice(torch.device("meta")):
        made = [
            torch.ones(2),
            torch.tensor([1.0]),
            torch.as_tensor(np.ones(2)),
            torch.randperm(3),
            torch.nn.Linear(2, 2).weight,
            torch.zeros(2, requires_grad=True),
            torch.rand(2, generator=torch.Generator(), requires_grad=True),
        ]
        assert {t.device.type for t in made} == {"meta"}
        assert [t.requires_grad for t in made[-3:]] == [True, True, True]
        assert torch.ones(2, device="cpu").device.type == "cpu"
        assert surrogate_noise("uniform", (2, 1, 4, 4)).device.type == "cpu"


@pytest.mark.parametrize("name", ["nowhere", "cuda:99"])
def test_a_device_that_is_not_there_is_named(name):
    asked = SimpleNamespace(getoption=lambda _: name, option=SimpleNamespace())
    with pytest.raises(pytest.UsageError, match=f"--device {name} cannot be used here: "):
        conftest.pytest_configure(asked)
