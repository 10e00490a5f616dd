"""Bases from torchao, bitsandbytes and schedulefree, where they are installed."""

from __future__ import annotations

import importlib
import os
import warnings
from contextlib import nullcontext
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, Optimizer
from torch.optim.lr_scheduler import CosineAnnealingLR

from ebu_optim import EBUOptimizer

from .processes import python
from .steps import assert_same, params

BF16, FP32 = torch.bfloat16, torch.float32
#: torchao compiles its step, which takes ten seconds for each kind of state: here it runs as it is
#: written, and one test asks for the compiled one, in a process of its own.
COMPILED = "TORCHAO_COMPILED" in os.environ
# id: (module, class, options, dtype of the weights, bytes of the narrowest tensor in the state)
CASES: dict[str, tuple[str, str, dict[str, Any], torch.dtype, int]] = {
    "torchao 8 bit": ("torchao.optim", "AdamW8bit", {}, FP32, 1),
    "torchao 4 bit": ("torchao.optim", "Adam4bit", {}, FP32, 1),
    "torchao fp8": ("torchao.optim", "AdamWFp8", {}, FP32, 1),
    "torchao 8 bit, bf16 weights rounded at random": (
        "torchao.optim",
        "AdamW8bit",
        {"bf16_stochastic_round": True},
        BF16,
        1,
    ),
    "bitsandbytes Adam, bf16 weights": ("bitsandbytes.optim", "Adam", {}, BF16, 4),
    "bitsandbytes Adam8bit": ("bitsandbytes.optim", "Adam8bit", {}, FP32, 1),
    "bitsandbytes Adam8bit, bf16 weights": ("bitsandbytes.optim", "Adam8bit", {}, BF16, 1),
    "bitsandbytes AdamW8bit": ("bitsandbytes.optim", "AdamW8bit", {}, FP32, 1),
    "bitsandbytes Lion8bit": ("bitsandbytes.optim", "Lion8bit", {}, FP32, 1),
    "bitsandbytes PagedAdamW8bit": ("bitsandbytes.optim", "PagedAdamW8bit", {}, FP32, 1),
    "bitsandbytes SGD8bit": ("bitsandbytes.optim", "SGD8bit", {"momentum": 0.9}, FP32, 1),
    "schedulefree AdamW": ("schedulefree", "AdamWScheduleFree", {}, FP32, 4),
    "schedulefree AdamW, bf16 weights": ("schedulefree", "AdamWScheduleFree", {}, BF16, 2),
    "schedulefree SGD": ("schedulefree", "SGDScheduleFree", {}, FP32, 4),
    "schedulefree RAdam": (
        "schedulefree",
        "RAdamScheduleFree",
        {"silent_sgd_phase": False},
        FP32,
        4,
    ),
}


def module(name: str) -> Any:
    """The package, or a skip that says what is amiss: torchao's wheels need a recent torch."""
    try:
        return importlib.import_module(name)
    except Exception as error:
        pytest.skip(f"no {name} with torch {torch.__version__}: {type(error).__name__}: {error}")


@pytest.fixture(params=CASES)
def case(request):
    """Builds networks with the base; 64 x 64 weights: smaller ones are given no 8-bit state."""
    package, cls, options, dtype, width = CASES[request.param]
    optimizer = getattr(module(package), cls)

    def build() -> tuple[nn.Module, Optimizer]:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            m = nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 64)).to(dtype)
        base = optimizer(m.parameters(), lr=1e-2, **options)
        if hasattr(base, "train"):
            base.train()
        return m, base

    build.width = width
    as_written = mock.patch.object(torch, "compile", lambda step, **_: step)
    with nullcontext() if COMPILED else as_written, warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Paged optimizers are not supported on CPU")
        warnings.filterwarnings("ignore", message=".*_stable_hash_for_caching")
        yield build


def wrap(build, **options) -> tuple[nn.Module, EBUOptimizer]:
    m, base = build()
    return m, EBUOptimizer(base, **{"gamma": 3.0, **options})


def step(opt: EBUOptimizer, m: nn.Module, i: int, scaler=None, by: float = 1) -> None:
    """Half the networks draw random numbers in their step: the same ones at the same step."""
    for name, target in (("forget", 1), ("remember", -1)):
        x = torch.randn(6, 64, generator=torch.Generator().manual_seed(2 * i + target))
        with getattr(opt, name)():
            value = (m(x.to(next(m.parameters()).dtype)) - target).float().square().sum() * by
            (value if scaler is None else scaler.scale(value)).backward()
    torch.manual_seed(i)
    if scaler is None:
        opt.step()
    else:
        scaler.step(opt)
        scaler.update()
    opt.zero_grad()


def plain(state: Any) -> Any:
    """Tensor subclasses in full, as the tensors that they are made of."""
    if isinstance(state, dict):
        return {k: plain(v) for k, v in state.items()}
    if isinstance(state, (list, tuple)):
        return [plain(v) for v in state]
    if isinstance(state, Tensor) and hasattr(state, "__tensor_flatten__"):
        names, context = state.__tensor_flatten__()
        return {"type": type(state).__name__, "context": str(context)} | {
            name: plain(getattr(state, name).clone()) for name in names
        }
    return state.clone() if isinstance(state, Tensor) else state


def test_it_is_the_base_stepped_by_hand_on_G_with_a_schedule(case):
    m, opt = wrap(case)
    twin, base = case()
    schedules = CosineAnnealingLR(opt, 4), CosineAnnealingLR(base, 4)

    def hand_over(*_) -> None:
        for p, q in zip(m.parameters(), twin.parameters()):
            q.grad = p.grad.clone()

    opt.base.register_step_pre_hook(hand_over)
    start = params(m)
    for i in range(4):
        step(opt, m, i)
        torch.manual_seed(i)
        base.step()
        for schedule in schedules:
            schedule.step()
        assert_same(params(m), params(twin))
    assert_same(plain(opt.base.state_dict()["state"]), plain(base.state_dict()["state"]))
    assert not any(map(torch.equal, params(m), start))
    assert opt.stats["overlap"] > 0
    for p, theta0 in zip(m.parameters(), start):
        assert torch.equal(opt.anchor_of(p), theta0)
        assert opt.fisher_of(p).dtype == FP32
    values = plain(opt.state[m[0].weight]).values()
    leaves = [t for v in values for t in (v.values() if isinstance(v, dict) else [v])]
    assert min(t.element_size() for t in leaves if isinstance(t, Tensor)) == case.width


def test_a_checkpoint_goes_on_bit_for_bit(case, tmp_path):
    m, opt = wrap(case)
    for i in range(2):
        step(opt, m, i)
    torch.save({"model": m.state_dict(), "opt": opt.state_dict()}, tmp_path / "run.pt")
    saved = torch.load(tmp_path / "run.pt", weights_only=True)
    n, other = wrap(case)
    n.load_state_dict(saved["model"])
    other.load_state_dict(saved["opt"])
    before = plain(opt.state_dict()), plain(other.state_dict())
    assert_same(*before)
    for i in range(2, 5):
        step(opt, m, i)
        step(other, n, i)
    assert_same(params(m), params(n))
    assert_same(plain(opt.state_dict()), plain(other.state_dict()))


def test_an_overflow_reaches_neither_weights_nor_state(case):
    m, opt = wrap(case, unrelated="freeze", max_grad_norm=1.0)
    scaler = torch.amp.GradScaler("cpu", init_scale=16.0, growth_interval=1000)
    step(opt, m, 0, scaler)
    before = params(m), plain(opt.state_dict())
    step(opt, m, 1, scaler, by=3e38)
    assert opt.last_step_skipped
    assert scaler.get_scale() == 8.0
    opt.skipped_steps = 0
    assert_same((params(m), plain(opt.state_dict())), before)
    step(opt, m, 2, scaler)
    assert not any(map(torch.equal, params(m), before[0]))

    n, other = wrap(case, unrelated="freeze", max_grad_norm=1.0)
    for i in (0, 2):
        step(other, n, i)
    assert_same(params(m), params(n))


def test_a_compiled_step_is_the_same():
    """In a process of its own: a crash of a compiler is told by its signal and takes no other test
    with it."""
    module("torchao.optim")
    name = "test_it_is_the_base_stepped_by_hand_on_G_with_a_schedule[torchao 8 bit]"
    done = python("-m", "pytest", "-q", f"{__file__}::{name}", TORCHAO_COMPILED="1")
    if "Failed to find C compiler" in done.stdout or "InvalidCxxCompiler" in done.stdout:
        pytest.skip("torchao compiles its step, and this machine has no compiler")
    assert done.returncode == 0, f"{done.returncode}\n{done.stdout}\n{done.stderr}"
    assert "1 passed" in done.stdout


# -- offloaded ----------------------------------------------------------------------------------


class Offloads(Optimizer):
    """As torchao's: the hooks of backward() hold the gradients that step() uses."""

    def __init__(self, params: Any) -> None:
        self.inner = SGD(params, lr=0.1)

    @property
    def param_groups(self) -> Any:
        return self.inner.param_groups

    def step(self, closure: Any = None) -> None:
        self.inner.step()


def test_a_base_that_takes_gradients_during_backward_is_refused():
    m = nn.Linear(4, 2)
    with pytest.raises(TypeError, match=r"Offloads .* keep master copies on the CPU"):
        EBUOptimizer(Offloads(m.parameters()))


def test_torchaos_offload_is_refused():
    """It wants a GPU to be built at all, or a world that says there is one."""
    offload = importlib.import_module(module("torchao.optim").__name__ + ".cpu_offload")
    m = nn.Linear(4, 2)
    with (
        mock.patch.object(offload, "get_available_devices", return_value=["cpu", "cuda"]),
        mock.patch.object(torch.cuda, "Stream", mock.Mock()),
    ):
        base = offload.CPUOffloadOptimizer(m.parameters(), SGD, lr=0.1)
    with pytest.raises(TypeError, match=r"CPUOffloadOptimizer .* keep master copies on the CPU"):
        EBUOptimizer(base)
