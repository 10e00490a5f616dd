"""`triton` as a backend of the package: the optimizer, compiled code, and what is refused."""

from __future__ import annotations

import torch

from ebu_optim import EBUOptimizer, kernels
from ebu_optim.kernels import reference
from ebu_optim.kernels import triton as fused


def test_works_inside_compiled_code():
    def f(g):
        keys, _ = fused.select([([g * 2], 10)], torch.float32)
        return keys + 1

    g = torch.randn(50)
    want = reference.select([([g * 2], 10)], torch.float32)[0] + 1
    assert torch.compile(f, backend="eager")(g).equal(want)


def trained(fused):
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(7, 9), torch.nn.ReLU(), torch.nn.Linear(9, 3))
    opt = EBUOptimizer(
        torch.optim.AdamW(model.parameters(), lr=1e-2),
        gamma=0.5,
        max_grad_norm=1.0,
        unrelated="freeze",
        fused=fused,
    )
    x, y = torch.randn(20, 7), torch.randn(20, 7)
    for _ in range(4):
        opt.step(
            forget=lambda: model(x).square().mean().neg().backward(),
            remember=lambda: model(y).square().mean().backward(),
        )
    return [p.detach() for p in model.parameters()]


def test_whole_optimizer_steps_as_with_plain_torch(monkeypatch):
    monkeypatch.setitem(kernels._FUSED, "cpu", "triton")
    kernels._fused.cache_clear()
    try:
        assert kernels.active("cpu") == "triton (fused)"
        torch.testing.assert_close(trained(fused=True), trained(fused=False))
    finally:
        kernels._fused.cache_clear()


def test_parameters_that_are_refused_say_why():
    assert fused.available() is None
    assert fused.takes([torch.ones(1)]) is None
    assert "float64" in fused.takes([torch.ones(1).double()])
    assert "2 devices" in fused.takes([torch.ones(1), torch.ones(1, device="meta")])
    assert "meta" in fused.takes([torch.ones(1, device="meta")])


def test_card_on_which_triton_fails_is_refused_with_the_reason(monkeypatch):
    """As a V100 would be by a Triton that cannot compile for it."""

    def broken(tensors):
        raise ValueError("sm_70 is not supported")

    fused._refuses.cache_clear()
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 0))
    monkeypatch.setattr(torch, "ones", lambda *size, device: None)
    monkeypatch.setattr(fused, "finite_probe", broken)
    assert "sm_70 is not supported" in fused._refuses(torch.device("cuda", 0))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (6, 1))
    assert "cuda:1 has 6.1" in fused._refuses(torch.device("cuda", 1))
    fused._refuses.cache_clear()
