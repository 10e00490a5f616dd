"""Real autocast passes under GradScaler, real overflows, float32 masters of half weights."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW

from ebu_optim import EBUOptimizer

from .steps import assert_same, net, params, snapshot
from .twin import Twin, assert_near

HALF = torch.float16
START = 2.0**12
BASES = {
    f"{cls.__name__.lower()}_{name}": lambda p, cls=cls, lr=lr, kw=kw: cls(p, lr=lr, **kw)
    for cls, lr in ((SGD, 0.05), (Adam, 0.01), (AdamW, 0.01))
    for name, kw in (
        ("plain", {"foreach": False}),
        ("foreach", {"foreach": True}),
        ("fused", {"fused": True}),
    )
}
BASE = pytest.mark.parametrize("name", BASES)
PHASES = ("forget", "remember")


def autocast(dtype: torch.dtype = HALF) -> torch.autocast:
    return torch.autocast("cpu", dtype=dtype)


def scaler_of(scale: float = START, **options) -> torch.amp.GradScaler:
    return torch.amp.GradScaler("cpu", init_scale=scale, **{"growth_interval": 1000, **options})


def wrapped(name: str = "adam_plain", **options) -> tuple[nn.Module, EBUOptimizer]:
    m = net()
    return m, EBUOptimizer(BASES[name](m.parameters()), **{"gamma": 3.0, **options})


def loss(
    m: Callable[[Tensor], Tensor], i: int, forget: bool, rows: slice = slice(None), by: float = 1
) -> Tensor:
    """As steps.loss, but the input is float32 as a loader gives it, `by` makes it an outlier."""
    x = torch.randn(6, 4, generator=torch.Generator().manual_seed(2 * i + forget))[rows] * by
    return (m(x).float() - (1 if forget else -1)).square().sum() / 6


def half_phase(
    scaler, opt, m, i: int, phase: str, rows: slice = slice(None), how: str = ""
) -> None:
    """One micro-batch in float16. It overflows, by itself, where `how` says so."""
    with getattr(opt, phase)():
        with autocast():
            value = loss(m, i, phase == "forget", rows, by=1e5 if how == "forward" else 1)
        value = value * (2.0**9 if how == "backward" else 1)
        (value if scaler is None else scaler.scale(value)).backward()


def half_step(scaler, opt, m, i: int, bad: tuple[str, ...] = (), how: str = "backward") -> None:
    for phase in PHASES:
        half_phase(scaler, opt, m, i, phase, how=how if phase in bad else "")
    if scaler is None:
        opt.step()
    else:
        scaler.step(opt)
        scaler.update()


# -- without an overflow ------------------------------------------------------------------------


@BASE
@pytest.mark.parametrize(
    "options", [{}, {"max_grad_norm": 0.1, "unrelated": "freeze"}], ids=["", "clip, freeze"]
)
def test_a_scale_that_is_a_power_of_two_leaves_no_trace(name, options):
    """Bit for bit the same passes without a scaler: nothing here is small enough to be lost."""
    m, opt = wrapped(name, **options)
    n, other = wrapped(name, **options)
    scaler, seen = scaler_of(growth_interval=2), []
    opt.base.register_step_pre_hook(
        lambda o, *_: seen.append((getattr(o, "grad_scale", None), getattr(o, "found_inf", None)))
    )
    for i in range(5):
        half_step(scaler, opt, m, i)
        half_step(None, other, n, i)
        assert_same(snapshot(opt, m), snapshot(other, n))
    assert scaler.get_scale() == 4 * START
    # a base with a scaling of its own is given unscaled gradients and nothing to undo
    assert seen == [(None, None)] * 5


@pytest.mark.parametrize("start", [2.0**8, 3.0**5, 1000.0])
@pytest.mark.parametrize("update", ["added", "replaced", "routed"])
def test_masks_thresholds_and_F_are_those_of_the_unscaled_gradients(start, update):
    """With a scale that is no power of two 1 / scale is rounded: equal to float32's rounding."""
    m = net()
    opt = EBUOptimizer(SGD(m.parameters(), lr=0.05), gamma=3.0, update=update)
    twin = Twin(list(m.parameters()), gamma=3.0, update=update)
    scaler = scaler_of(start, growth_factor=3.0, growth_interval=1)
    for i in range(3):
        scale, theta, grads = scaler.get_scale(), params(m), {}
        for phase in PHASES:
            half_phase(scaler, opt, m, i, phase)
            with getattr(opt, phase)():
                grads[phase] = [p.grad.double() / scale for p in m.parameters()]
        scaler.step(opt)
        scaler.update()
        assert scale == start * 3**i
        G, (m_f, m_r), taus = twin.step(theta, grads["forget"], grads["remember"])
        assert_near([p.grad for p in m.parameters()], G, scale=max(abs(g).max() for g in G))
        assert opt.stats["forget_selected"] == sum(f.sum() for f in m_f)
        assert opt.stats["remember_selected"] == sum(r.sum() for r in m_r)
        assert opt.stats["overlap"] == sum((f & r).sum() for f, r in zip(m_f, m_r))
        assert opt.stats["thresholds"] == pytest.approx(
            [t for pair in taus for t in pair], rel=1e-6
        )
        for p, F in zip(m.parameters(), twin.fisher):
            torch.testing.assert_close(
                opt.fisher_of(p).double(), torch.tensor(F), rtol=1e-5, atol=0
            )


@BASE
@pytest.mark.parametrize("scale", [START, 3.0**7])
def test_the_update_is_that_of_float32_within_the_rounding_of_half(name, scale):
    """Everything is selected, so that no rounding can carry a scalar over a threshold."""
    m, opt = wrapped(name, delta=1.0)
    n, other = wrapped(name, delta=1.0)
    half_step(scaler_of(scale), opt, m, 0)
    other.step(*(lambda f=f: loss(n, 0, f).backward() for f in (True, False)))
    eps = torch.finfo(HALF).eps
    for p, q in zip(m.parameters(), n.parameters()):
        assert not torch.equal(p.grad, q.grad)  # there is a rounding
        torch.testing.assert_close(p.grad, q.grad, rtol=0, atol=2 * eps * q.grad.abs().max().item())
        assert torch.equal(opt.anchor_of(p), other.anchor_of(q))


def test_the_scale_saves_what_half_would_lose():
    """Losses 2**-24 times as large under a scale 2**24 times as large are the same run."""
    tiny = 2.0**-24

    def train(m, opt, scaler, by: float):
        for i in range(3):
            for phase in PHASES:
                with getattr(opt, phase)():
                    with autocast():
                        value = loss(m, i, phase == "forget") * by
                    scaler.scale(value).backward()
            scaler.step(opt)
            scaler.update()

    runs = {}
    for by, scale in ((1.0, 1.0), (tiny, 1 / tiny), (tiny, 1.0)):
        m = net()
        opt = EBUOptimizer(SGD(m.parameters(), lr=0.05 / by), gamma=3.0)
        train(m, opt, scaler_of(scale), by)
        runs[by, scale] = params(m), [opt.fisher_of(p) for p in m.parameters()]
    weights, fisher = runs[1.0, 1.0]
    assert_same(runs[tiny, 1 / tiny], (weights, [f * tiny**2 for f in fisher]))
    assert not torch.allclose(runs[tiny, 1.0][0][0], weights[0], rtol=0.01)


# -- overflows ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["sgd_plain", "adam_foreach", "adamw_fused", "sgd_fused"])
@pytest.mark.parametrize("bad", [("forget",), ("remember",), PHASES], ids="+".join)
@pytest.mark.parametrize("how", ["backward", "forward"])
@pytest.mark.parametrize(
    "options", [{}, {"max_grad_norm": 0.1, "unrelated": "freeze", "nonfinite": "skip"}]
)
def test_an_overflow_in_half_leaves_everything_as_it_was(name, bad, how, options):
    m, opt = wrapped(name, **options)
    scaler, stepped = scaler_of(), []
    opt.base.register_step_pre_hook(lambda *_: stepped.append(1))
    half_step(scaler, opt, m, 0)
    before = snapshot(opt, m)
    for phase in PHASES:
        half_phase(scaler, opt, m, 5, phase, how=how if phase in bad else "")
        with getattr(opt, phase)():
            finite = all(p.grad.isfinite().all() for p in m.parameters())
        assert finite == (phase not in bad)
    scaler.step(opt)
    scaler.update()
    assert (opt.skipped_steps, opt.last_step_skipped, stepped) == (1, True, [1])
    opt.skipped_steps = 0
    assert_same(snapshot(opt, m), before)
    assert scaler.get_scale() == START / 2

    n, other = wrapped(name, **options)
    for i in (0, 1, 2):
        half_step(scaler_of(START / 2), other, n, i)
    for i in (1, 2):
        half_step(scaler, opt, m, i)
    assert scaler.get_scale() == START / 2
    assert_same(snapshot(opt, m), snapshot(other, n))


@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.parametrize("part", [0, 1])
@pytest.mark.parametrize("order", [PHASES, PHASES[::-1]], ids="".join)
@pytest.mark.parametrize("how", ["backward", "forward"])
def test_an_overflow_in_one_of_two_micro_batches(phase, part, order, how):
    halves = slice(0, 3), slice(3, 6)

    def step(scaler, opt, m, i, bad=None):
        for j, rows in enumerate(halves):
            for each in order:
                half_phase(scaler, opt, m, i, each, rows, how if (each, j) == bad else "")
        scaler.step(opt)
        scaler.update()
        opt.zero_grad()

    m, opt = wrapped("adamw_fused")
    n, other = wrapped("adamw_fused")
    scaler = scaler_of()
    step(scaler, opt, m, 0)
    before = snapshot(opt, m)
    step(scaler, opt, m, 5, (phase, part))
    assert (opt.skipped_steps, opt.last_step_skipped) == (1, True)
    opt.skipped_steps = 0
    assert_same(snapshot(opt, m), before)
    assert scaler.get_scale() == START / 2
    step(scaler, opt, m, 1)
    for i in range(2):
        step(scaler_of(START / 2), other, n, i)
    assert_same(snapshot(opt, m), snapshot(other, n))


# -- half weights -------------------------------------------------------------------------------


@pytest.mark.parametrize("update", ["added", "replaced", "routed"])
def test_bfloat16_weights_have_an_F_in_float32(update):
    m = net(torch.bfloat16)
    opt = EBUOptimizer(SGD(m.parameters(), lr=0.05), gamma=3.0, update=update)
    twin = Twin(list(m.parameters()), gamma=3.0, update=update)
    for i in range(3):
        theta, grads = params(m), {}
        for phase in PHASES:
            with getattr(opt, phase)():
                with autocast(torch.bfloat16):
                    loss(m, i, phase == "forget").backward()
                grads[phase] = [p.grad.clone() for p in m.parameters()]
        opt.step()
        G, _, _ = twin.step(theta, grads["forget"], grads["remember"])
        for p, g, F in zip(m.parameters(), G, twin.fisher):
            assert opt.anchor_of(p).dtype == p.dtype == torch.bfloat16
            # one rounding, the last: half a unit of bfloat16
            torch.testing.assert_close(p.grad.double(), torch.tensor(g), rtol=2.0**-8, atol=1e-7)
            torch.testing.assert_close(opt.fisher_of(p), torch.tensor(F).float(), rtol=1e-6, atol=0)


def masters_of(model: nn.Module) -> list[Tensor]:
    return [p.detach().float().requires_grad_() for p in model.parameters()]


def hand_over(model: nn.Module, masters: list[Tensor]) -> None:
    for p, master in zip(model.parameters(), masters):
        grad = p.grad.float()
        master.grad = grad if master.grad is None else master.grad.add_(grad)
        p.grad = None


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", ["sgd_plain", "adamw_foreach", "adamw_fused"])
def test_float32_masters_of_half_weights(name, dtype):
    """docs/loops.md's recipe is the run of float32 weights that are cast in the forward pass."""
    m, twin = net(dtype), net(dtype).float()  # the twin starts from the rounded weights
    masters = masters_of(m)
    opt, other = (
        EBUOptimizer(BASES[name](p), gamma=3.0) for p in (masters, list(twin.parameters()))
    )
    scaler, theirs = (scaler_of(enabled=dtype == torch.float16) for _ in range(2))

    def cast(x):
        weights = {k: p.to(dtype) for k, p in twin.named_parameters()}
        return torch.func.functional_call(twin, weights, x.to(dtype))

    halves = slice(0, 3), slice(3, 6)
    for i, factor in enumerate((1, 1, 2.0**9, 1)):
        for rows in halves:
            for phase in PHASES:
                by = factor if phase == "remember" else 1
                with getattr(opt, phase)():
                    value = loss(lambda x: m(x.to(dtype)), i, phase == "forget", rows)
                    scaler.scale(value * by).backward()
                    hand_over(m, masters)
                with getattr(other, phase)():
                    theirs.scale(loss(cast, i, phase == "forget", rows) * by).backward()
        for s, o in ((scaler, opt), (theirs, other)):
            s.step(o)
            s.update()
            o.zero_grad()
        assert opt.last_step_skipped == (factor > 1 and dtype == torch.float16)
        with torch.no_grad():
            for p, master in zip(m.parameters(), masters):
                p.copy_(master)
        assert_same(masters, params(twin))
        assert_same(params(m), [p.to(dtype) for p in params(twin)])
    a, b = opt.state_dict(), other.state_dict()
    assert_same(a, b)
    assert all(s["ebu_fisher"].count_nonzero() for s in a["state"].values())


def test_small_updates_reach_masters_but_not_half_weights():
    """What the masters are for: a step below half a unit of the weight's format is rounded away."""
    m = net(torch.bfloat16)
    masters = masters_of(m)
    small = 1e-6
    for target in (list(m.parameters()), masters):
        opt = EBUOptimizer(SGD(target, lr=small), gamma=0.0)
        before = copy.deepcopy(target)
        for phase in PHASES:
            with getattr(opt, phase)():
                for p in target:
                    p.grad = torch.ones_like(p)
        opt.step()
        moved = sum(int((p != q).sum()) for p, q in zip(target, before))
        large = sum(int((p.abs() > 0.01).sum()) for p in target)
        assert moved < large if target[0].dtype == torch.bfloat16 else moved >= large


def test_masters_that_require_no_gradient_are_refused():
    """They would get no theta0 and no F: the penalty would be missing without a word."""
    opt = EBUOptimizer(SGD([torch.ones(3), torch.ones(2)], lr=0.1))
    with pytest.raises(RuntimeError, match="requires_grad_"), opt.forget():
        pass


def leaves_half_weights(name: str) -> bool:
    """True of torch 2.4's fused SGD on a CPU, which writes no full vector of half weights."""
    p = nn.Parameter(torch.ones(64, dtype=HALF))
    p.grad = torch.ones_like(p)
    BASES[name]([p]).step()
    return bool((p == 1).any())


@pytest.mark.parametrize("name", ["sgd_plain", "sgd_fused", "adamw_fused"])
def test_float16_weights_without_masters(name):
    """torch refuses to unscale their gradients; through the wrapper they are, so the docs warn."""
    if leaves_half_weights(name):
        pytest.skip("the base itself does not move half weights on a CPU in this torch")
    half = lambda m: lambda x: m(x.to(HALF))  # noqa: E731
    m, n = net(HALF), net(HALF)
    plain, opt = SGD(m.parameters(), lr=0.05), EBUOptimizer(BASES[name](n.parameters()), gamma=3.0)
    scaler = scaler_of(16.0)
    scaler.scale(loss(half(m), 0, False)).backward()
    with pytest.raises(ValueError, match="Attempting to unscale FP16"):
        scaler.step(plain)
    scaler = scaler_of(16.0)
    for phase in PHASES:
        with getattr(opt, phase)():
            scaler.scale(loss(half(n), 0, phase == "forget")).backward()
    with pytest.raises(ValueError, match="Attempting to unscale FP16"):
        scaler.unscale_(opt)
    scaler = scaler_of(16.0)
    scaler.scale(torch.ones(()))
    scaler.step(opt)
    scaler.update()
    other = net(HALF).float()
    reference = EBUOptimizer(BASES[name](other.parameters()), gamma=3.0)
    reference.step(*(lambda f=f: loss(other, 0, f).backward() for f in (True, False)))
    for p, q in zip(n.parameters(), other.parameters()):
        atol = 4 * torch.finfo(HALF).eps * q.grad.abs().max().item()
        torch.testing.assert_close(p.grad.float(), q.grad, rtol=0, atol=atol)
    assert not any(map(torch.equal, params(n), params(net(HALF))))


def test_float16_gradients_are_selected_and_squared_before_they_are_rounded_again():
    """Unscaled they are 1e-8, which float16 cannot hold: masks, thresholds and F do not care."""
    seen = []
    for by in (1.0, 2.0**-24):
        m = net(HALF)
        opt = EBUOptimizer(SGD(m.parameters(), lr=0.05), gamma=3.0)
        scaler = scaler_of(1 / by)
        for phase in PHASES:
            with getattr(opt, phase)():
                value = loss(lambda x, m=m: m(x.to(HALF)), 0, phase == "forget")
                scaler.scale(value * by).backward()
        scaler.step(opt)
        stats = opt.stats
        counts = [stats[key] for key in ("forget_selected", "remember_selected", "overlap")]
        sizes = [x / by for x in (stats["update_norm"], *stats["thresholds"])]
        seen.append((counts, sizes, [opt.fisher_of(p) / by**2 for p in m.parameters()]))
        lost = [p.grad[abs(p.grad) < 1e-7].numel() for p in m.parameters()]
    assert_same(*seen)
    assert sum(lost) > 0
