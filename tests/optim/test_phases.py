"""Whose gradient is whose: closures and phases, accumulation, buffers, non-finite gradients."""

from __future__ import annotations

import math
import weakref

import pytest
import torch
from torch import nn

from ebu_optim import EBUOptimizer

from ..steps import (
    assert_as_if_nothing_had_happened,
    assert_same,
    build,
    closures,
    loss,
    net,
    phases,
    run,
    snapshot,
)

TO_NONE = pytest.mark.parametrize("to_none", [True, False])
ORDERS = ["rf", "frfr", "ffrr", "rrff", "rffr", "fffrrr", "frrffr"]


def pointers(m: nn.Module) -> list[int]:
    return [p.grad.data_ptr() for p in m.parameters()]


# -- two closures, or two phases ----------------------------------------------------------------


def test_closures_and_phases_are_one_step_and_return_their_losses():
    m, opt = build()
    n, other = build()
    for i in range(3):
        got = opt.step(*closures(m, i))
        assert_same(got, tuple(loss(n, i, forget).detach() for forget in (True, False)))
        phases(other, n, i)
        assert other.step() is None
    assert_same(snapshot(opt, m), snapshot(other, n))
    assert opt.step(*(lambda f=f: f() and None for f in closures(m))) == (None, None)


@TO_NONE
@pytest.mark.parametrize("whose", ["optimizer", "model"])
def test_closures_that_call_zero_grad(whose, to_none):
    m, opt = build()
    n, other = build()

    def clearing(closure):
        def run_one():
            (opt if whose == "optimizer" else m).zero_grad(set_to_none=to_none)
            return closure()

        return run_one

    for i in range(3):
        opt.step(*map(clearing, closures(m, i)))
        other.step(*closures(n, i))
    assert_same(snapshot(opt, m), snapshot(other, n))


def test_closures_run_with_gradients_enabled():
    m, opt = build()
    with torch.no_grad():
        opt.step(*closures(m))
    run(opt, m, range(1, 2))
    n, other = build()
    run(other, n, range(2))
    assert_same(snapshot(opt, m), snapshot(other, n))


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("update", ["added", "routed"])
def test_accumulation_in_any_order_is_one_larger_batch(order, update):
    results = {}
    for name in (order, "f" * order.count("f") + "r" * order.count("r"), "fr"):
        m = net(torch.float64)
        opt = EBUOptimizer(torch.optim.SGD(m.parameters(), lr=0.05), gamma=3.0, update=update)
        for i in range(2):
            micro = 6 // name.count("f")
            done = {"f": 0, "r": 0}
            for phase in name:
                with opt.forget() if phase == "f" else opt.remember():
                    rows = slice(done[phase], done[phase] + micro)
                    loss(m, i, phase == "f", rows).backward()
                done[phase] += micro
            opt.step()
        results[name] = snapshot(opt, m)
    grouped, large = list(results.values())[-2:]
    assert_same(results[order], grouped)
    torch.testing.assert_close(results[order]["params"], large["params"], rtol=1e-12, atol=1e-14)
    assert results[order]["stats"]["overlap"] == large["stats"]["overlap"]


@pytest.mark.parametrize("to_none", [True, False, None])
def test_entering_a_phase_discards_the_last_update(to_none):
    m, opt = build()
    n, other = build()
    run(opt, m, range(3))
    for i in range(3):
        run(other, n, range(i, i + 1))
        if to_none is not None:
            other.zero_grad(set_to_none=to_none)
    assert_same(snapshot(opt, m), snapshot(other, n))


def test_zero_grad_frees_the_last_update():
    m, opt = build()
    run(opt, m, range(1))
    held = [weakref.ref(p.grad) for p in m.parameters()]
    opt.zero_grad()
    assert all(grad() is None for grad in held)
    run(opt, m, range(1))


def test_a_gradient_in_one_phase_alone_counts_as_zero_in_the_other():
    m, opt = build("sgd", alpha=0.6, delta=1.0, gamma=0.0)
    with opt.forget():
        m[0].weight.square().sum().backward()
    with opt.remember():
        m[2].weight.square().sum().backward()
    opt.step()
    torch.testing.assert_close(m[0].weight.grad, 2 * 2 * net()[0].weight)
    torch.testing.assert_close(m[2].weight.grad, 2 * net()[2].weight)
    assert m[0].bias.grad is None


# -- buffers ------------------------------------------------------------------------------------


def test_buffers_change_owner_and_nothing_is_copied():
    m, opt = build()
    with opt.forget():
        loss(m, 0, True).backward()
        forget = pointers(m)
    with opt.remember():
        loss(m, 0, False).backward()
        remember = pointers(m)
    assert pointers(m) == remember
    with opt.forget():
        assert pointers(m) == forget
    assert pointers(m) == remember
    opt.step()
    assert pointers(m) == remember


@pytest.mark.parametrize("buckets", ["one for all", "one for each parameter"])
@pytest.mark.parametrize("order", ["fr", "rf", "rfr"])
def test_views_into_buckets_that_are_written_again_are_copied(buckets, order):
    """As DDP with gradient_as_bucket_view leaves them; a large parameter has its own bucket."""
    m, opt = build()
    sizes = [p.numel() for p in m.parameters()]
    flat = torch.empty(sum(sizes)).split(sizes) if buckets == "one for all" else None
    flat = flat or [torch.empty(n) for n in sizes]
    for i in range(2):
        for j, phase in enumerate(order):
            with opt.forget() if phase == "f" else opt.remember():
                if phase not in order[:j]:
                    loss(m, i, phase == "f").backward()
                for p, bucket in zip(m.parameters(), flat, strict=True):
                    view = bucket.view_as(p)
                    view.copy_(p.grad)
                    p.grad = view
        opt.step()
    n, other = build()
    run(other, n, range(2))
    assert_same(snapshot(opt, m), snapshot(other, n))


@pytest.mark.parametrize("order", ["fr", "rf", "ffr", "frf", "rfr"])
@pytest.mark.parametrize("how", ["tensor", "numpy", "written, then cloned"])
def test_one_buffer_for_both_gradients_is_refused(order, how):
    m, opt = build()
    buffers = [torch.zeros_like(p) for p in m.parameters()]
    values = {
        phase: torch.autograd.grad(loss(m, 0, phase == "forget"), list(m.parameters()))
        for phase in ("forget", "remember")
    }

    def hand_over(phase, clones):
        for p, buffer, g in zip(m.parameters(), buffers, values[phase], strict=True):
            if how == "numpy":
                buffer.numpy()[...] = g.numpy()
                p.grad = torch.from_numpy(buffer.numpy())
            else:
                buffer.copy_(g)
                p.grad = buffer.clone() if how != "tensor" and clones else buffer

    def step():
        for letter in order:
            phase = "forget" if letter == "f" else "remember"
            with getattr(opt, phase)():
                hand_over(phase, letter != order[0])
        opt.step()

    with pytest.raises(
        RuntimeError, match=r"gradient of parameter 0 .*inside .*its own.*clone\(\)"
    ):
        step()
    assert_as_if_nothing_had_happened(opt, m)


def test_a_buffer_of_one_parameter_in_one_phase_and_of_another_in_the_other_is_refused():
    a, b = (nn.Parameter(torch.ones(3)) for _ in "ab")
    opt = EBUOptimizer(torch.optim.SGD([a, b], lr=0.1))
    buffer = torch.ones(3)
    with opt.forget():
        a.grad, b.grad = buffer, torch.ones(3)
    said = r"gradient of parameter 0 .*inside remember.*clone\(\)"
    with pytest.raises(RuntimeError, match=said), opt.remember():
        a.grad, b.grad = torch.ones(3), buffer
    assert_same([a.detach(), b.detach()], [torch.ones(3)] * 2)


def test_a_buffer_that_is_cloned_serves_both_phases():
    m, opt = build()
    buffers = [torch.zeros_like(p) for p in m.parameters()]
    for i in range(2):
        for forget, phase in ((True, opt.forget), (False, opt.remember)):
            grads = torch.autograd.grad(loss(m, i, forget), list(m.parameters()))
            with phase():
                for p, buffer, g in zip(m.parameters(), buffers, grads, strict=True):
                    p.grad = buffer.copy_(g).clone()
        opt.step()
    n, other = build()
    run(other, n, range(2))
    assert_same(snapshot(opt, m), snapshot(other, n))


@pytest.mark.parametrize("fused", [None, False])
@pytest.mark.parametrize("order", ["fr", "rf", "frfr"])
def test_gradients_whose_elements_are_one_place_in_memory(order, fused):
    """As torch.autograd.grad gives them for a sum; G needs a place for every element."""
    results = []
    for copies in (False, True):
        m, opt = build(fused=fused)
        for _ in range(2):
            for phase in order:
                with opt.forget() if phase == "f" else opt.remember():
                    for p in m.parameters():
                        value = torch.tensor(1.0 if phase == "f" else -2.0).expand(p.shape)
                        p.grad = value.clone() if copies else value
            opt.step()
        results.append(snapshot(opt, m))
    assert_same(*results)


@pytest.mark.parametrize("fused", [None, False])
@pytest.mark.parametrize("unrelated", ["update", "freeze"])
@pytest.mark.parametrize("order", ["fr", "rf", "frfr"])
def test_parameters_that_are_added_may_be_given_one_gradient(order, unrelated, fused):
    """torch.autograd.grad returns one tensor for all terms of a sum, of a transposed one a view of
    it; torch's optimizers never write into it, a step here does."""
    results = []
    for copies in (False, True):
        torch.manual_seed(0)
        rows = [nn.Parameter(torch.randn(shape)) for shape in ((3, 4), (3, 4), (4, 3), (3, 4))]
        a, b, c, alone = rows
        opt = EBUOptimizer(torch.optim.SGD(rows, lr=0.1), unrelated=unrelated, fused=fused)
        for _ in range(2):
            for phase in order:
                together = a + b + c.T
                value = together.sin() if phase == "f" else together.square() * alone
                grads = torch.autograd.grad(value.sum(), rows, allow_unused=True)
                if phase == "r":
                    assert grads[0].data_ptr() == grads[1].data_ptr() == grads[2].data_ptr()
                with opt.forget() if phase == "f" else opt.remember():
                    for p, g in zip(rows, grads, strict=True):
                        p.grad = g.clone() if copies and g is not None else g
            opt.step()
        results.append([p.detach().clone() for p in rows])
    assert_same(*results)


# -- NaN and Inf --------------------------------------------------------------------------------


def spoiled(opt: EBUOptimizer, m: nn.Module, value: float, f: int, r: int) -> None:
    """Both phases, with so many elements of the gradients of m[2].weight set to a value."""
    for forget, count in ((True, f), (False, r)):
        with opt.forget() if forget else opt.remember():
            loss(m, 0, forget).backward()
            m[2].weight.grad.view(-1)[:count] = value


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize(("f", "r"), [(3, 0), (0, 2), (1, 4)])
def test_nonfinite_raise_says_which_and_how_many(value, f, r):
    m, opt = build()
    spoiled(opt, m, value, f, r)
    with pytest.raises(RuntimeError, match=rf"{f} .*forget gradient, {r} .*remember.*\"skip\""):
        opt.step()
    assert_as_if_nothing_had_happened(opt, m)


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize(("f", "r"), [(1, 0), (0, 1)])
def test_nonfinite_skip_counts_and_goes_on(value, f, r):
    m, opt = build(nonfinite="skip")
    run(opt, m, range(1))
    spoiled(opt, m, value, f, r)
    opt.step()
    assert (opt.skipped_steps, opt.last_step_skipped) == (1, True)
    run(opt, m, range(1, 3))
    assert (opt.skipped_steps, opt.last_step_skipped) == (1, False)
    n, other = build(nonfinite="skip")
    run(other, n, range(3))
    other.skipped_steps = 1
    assert_same(snapshot(opt, m), snapshot(other, n))


@pytest.mark.parametrize(("f", "r"), [(2, 0), (0, 2), (2, 2)])
def test_nonfinite_propagate_reaches_the_weights_and_no_others(f, r):
    m, opt = build("sgd", nonfinite="propagate")
    spoiled(opt, m, math.nan, f, r)
    opt.step()
    spoilt = torch.zeros(16, dtype=torch.bool).index_fill(0, torch.arange(2), True)
    assert torch.equal(m[2].weight.isnan().view(-1), spoilt)
    assert all(p.isfinite().all() for p in (m[0].weight, m[0].bias, m[2].bias))
    assert (opt.skipped_steps, opt.last_step_skipped) == (0, False)


@pytest.mark.parametrize("late", [False, True])
def test_a_base_that_ascends_would_turn_the_penalty_round(late):
    p = torch.nn.Parameter(torch.ones(3))
    base = torch.optim.SGD([p], lr=0.1, maximize=not late)
    if not late:
        with pytest.raises(ValueError, match=r"maximize=True.*fisher=None"):
            EBUOptimizer(base)
        EBUOptimizer(base, fisher=None)
        return
    opt = EBUOptimizer(base)
    base.param_groups[0]["maximize"] = True
    for phase in (opt.forget, opt.remember):
        with phase():
            p.grad = torch.ones(3)
    with pytest.raises(ValueError, match="maximize=True"):
        opt.step()
    torch.testing.assert_close(p.detach(), torch.ones(3))
