"""How theta0 and F are held: dtypes, bytes, by reference; and what a step allocates."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from ebu_optim import EBUOptimizer
from ebu_optim.baselines import RandomMasks

from ..inputs import constants
from ..steps import assert_same, net, params, run
from ..test_combine import Memory


def adam(m, **options):
    return EBUOptimizer(torch.optim.Adam(m.parameters(), lr=0.01), **options)


def held_bytes(opt):
    """Of theta0 and F, per scalar."""
    slots = [p for g in opt.param_groups for p in g["params"]]
    tensors = [t for p in slots for t in (opt.anchor_of(p), opt.fisher_of(p))]
    return sum(t.untyped_storage().nbytes() for t in tensors) / sum(p.numel() for p in slots)


@pytest.mark.parametrize(
    ("options", "bytes_per_scalar"),
    [
        ({}, 8),
        ({"anchor_dtype": torch.float16}, 6),
        ({"anchor_dtype": torch.bfloat16, "fisher_dtype": torch.bfloat16}, 4),
        ({"anchor_dtype": torch.float16, "fisher_dtype": torch.bfloat16, "held_on": "cpu"}, 4),
    ],
)
def test_bytes_held_beyond_the_base(options, bytes_per_scalar):
    m = net()
    opt = adam(m, **options)
    run(opt, m, range(3))
    assert held_bytes(opt) == bytes_per_scalar
    assert {k for s in opt.state.values() for k in s} == {"step", "exp_avg", "exp_avg_sq"}


@pytest.mark.parametrize("how", ["online", "warm", "given"])
def test_what_16_bits_hold_exactly_changes_nothing(how):
    """theta0 that float16 holds, F that bfloat16 holds: the same steps, bit for bit."""
    weights = []
    for options in ({}, {"anchor_dtype": torch.float16, "fisher_dtype": torch.bfloat16}):
        m = net()
        with torch.no_grad():
            for p in m.parameters():
                p.copy_(p.half())
        anchor = {p: p.detach().clone() for p in m.parameters()}
        fisher = {p: p.detach().square().bfloat16().float() for p in m.parameters()}
        given = {"anchor": anchor, "fisher": fisher} if how == "given" else {}
        opt = adam(m, gamma=3.0, **given, **options)
        if how == "warm":
            # one batch whose squares bfloat16 holds
            opt.warmup_fisher([lambda m=m: sum(2.0 * p.sum() for p in m.parameters()).backward()])
        run(opt, m, range(1 if how == "online" else 5))
        weights.append(params(m))
    assert_same(weights[0], weights[1])


def test_rounded_anchor_and_fisher_are_what_the_penalty_uses():
    m = net()
    opt = adam(m, gamma=3.0, anchor_dtype=torch.bfloat16, fisher_dtype=torch.bfloat16)
    before = params(m)
    run(opt, m, range(4))
    for p, old in zip(m.parameters(), before, strict=True):
        assert opt.anchor_of(p).dtype == opt.fisher_of(p).dtype == torch.bfloat16
        assert torch.equal(opt.anchor_of(p), old.bfloat16())
        assert opt.fisher_of(p).count_nonzero()


@pytest.mark.parametrize("options", [{}, {"held_on": "cpu"}])
def test_sixteen_bits_survive_a_checkpoint(options, tmp_path):
    sixteen = {"anchor_dtype": torch.float16, "fisher_dtype": torch.bfloat16, **options}
    m = net()
    opt = adam(m, **sixteen)
    run(opt, m, range(3))
    torch.save({"m": m.state_dict(), "o": opt.state_dict()}, tmp_path / "c.pt")
    other = net()
    again = adam(other, **sixteen)
    saved = torch.load(tmp_path / "c.pt", weights_only=True)
    other.load_state_dict(saved["m"])
    again.load_state_dict(saved["o"])
    for which in (opt, again):
        run(which, m if which is opt else other, range(3, 6))
    assert_same(opt.state_dict(), again.state_dict())
    assert_same(params(m), params(other))


def test_an_anchor_that_float16_does_not_hold_is_named():
    p = nn.Parameter(torch.tensor([1.0, 7e4]))
    opt = EBUOptimizer(torch.optim.SGD([p], lr=1.0), anchor_dtype=torch.float16)
    with pytest.raises(ValueError, match=r"cannot represent parameter 0.*70000.*bfloat16"):
        opt.forget().__enter__()


@pytest.mark.parametrize(
    ("option", "value", "said"),
    [
        ("anchor_dtype", torch.int8, "anchor_dtype must be torch.float16.*got torch.int8"),
        ("fisher_dtype", torch.float16, "fisher_dtype must be torch.bfloat16.*6e-8.*float16"),
        ("held_on", "disk", "held_on must be \"cpu\" or None.*'disk'"),
        ("anchor_source", 3, "anchor_source must be a string.*got 3"),
    ],
)
def test_bad_options_are_named(option, value, said):
    with pytest.raises((ValueError, TypeError), match=said):
        adam(net(), **{option: value})


# -- when theta0 and F are taken --------------------------------------------------------------


@pytest.mark.parametrize("how", ["between the phases", "inside the phase", "by hand"])
@pytest.mark.parametrize("first", ["forget", "remember"])
@pytest.mark.parametrize("make", [EBUOptimizer, RandomMasks])
def test_what_a_later_phase_alone_trains_has_theta0_and_F(how, first, make):
    """a is trained in the second phase of each step alone, b in both."""
    a, b = (nn.Parameter(torch.arange(4.0) + i) for i in range(2))
    start = a.detach().clone()
    opt = make(torch.optim.SGD([a, b], lr=1e-3))
    second = "remember" if first == "forget" else "forget"
    squares = []
    for _ in range(3):
        a.requires_grad_(False)
        with getattr(opt, first)():
            (a * b).sum().backward()
        a.requires_grad_(how == "between the phases")
        with getattr(opt, second)():
            a.requires_grad_(how != "by hand")
            (a * b).square().sum().backward()
            if how == "by hand":
                a.grad = 2 * a * b.detach() ** 2
            squares.append(a.grad.square() if second == "remember" else torch.zeros(4))
        opt.step()
    assert torch.equal(opt.anchor_of(a), start)
    torch.testing.assert_close(opt.fisher_of(a), torch.stack(squares).mean(0))


def test_warming_up_covers_gradients_given_by_hand():
    a, b = (nn.Parameter(torch.ones(4)) for _ in "ab")
    a.requires_grad_(False)
    opt = EBUOptimizer(torch.optim.SGD([a, b], lr=0.1))

    def batch():
        b.sum().backward()
        a.grad = torch.full((4,), 2.0)

    opt.warmup_fisher([batch, batch])
    assert opt.fisher_of(a).eq(4.0).all()
    assert torch.equal(opt.anchor_of(a), torch.ones(4))


@pytest.mark.parametrize("by_hand", [True, False])
def test_a_later_phase_that_trains_what_a_fixed_fisher_does_not_cover(by_hand):
    a, b = (nn.Parameter(torch.ones(4)) for _ in "ab")
    a.requires_grad_(False)
    opt = EBUOptimizer(torch.optim.SGD([a, b], lr=0.1), fisher={b: torch.ones(4)})
    with opt.forget():
        b.sum().backward()

    def remember():
        a.requires_grad_(not by_hand)
        with opt.remember():
            b.sum().backward()
            a.grad = torch.ones(4)
        opt.step()

    with pytest.raises(ValueError, match=r"fisher has no tensor for parameter 0"):
        remember()
    assert torch.equal(a, torch.ones(4))
    assert torch.equal(b, torch.ones(4))


# -- theta0 by reference ----------------------------------------------------------------------


def by_reference(steps=3, **options):
    m = net()
    opt = adam(m, anchor_source="hub/model", **options)
    run(opt, m, range(steps))
    return m, opt, copy.deepcopy((m.state_dict(), opt.state_dict()))


def test_a_checkpoint_by_reference_holds_no_anchor_and_goes_on_with_the_given_one():
    m, opt, (weights, state) = by_reference()
    assert not any("ebu_anchor" in entry for entry in state["state"].values())
    assert state["param_groups"][0]["ebu_anchor_source"] == "hub/model"
    other, pretrained = net(), params(net())
    given = dict(zip(other.parameters(), pretrained, strict=True))
    again = adam(other, anchor=given, anchor_source="hub/model")
    other.load_state_dict(weights)
    again.load_state_dict(state)
    for which, model in ((opt, m), (again, other)):
        run(which, model, range(3, 6))
    assert_same(params(m), params(other))
    assert_same(opt.state_dict(), again.state_dict())


@pytest.mark.parametrize("given", ["nothing", "another model"])
def test_a_checkpoint_by_reference_wants_its_anchor(given):
    _, _, (_, state) = by_reference()
    other = net()
    anchor = {p: p.detach() + 1e-3 for p in other.parameters()}
    again = adam(
        other, anchor_source="hub/model", **({"anchor": anchor} if given != "nothing" else {})
    )
    before = copy.deepcopy(again.state_dict())
    with pytest.raises(ValueError, match=r"hub/model.*anchor=<the weights of hub/model>"):
        again.load_state_dict(state)
    assert_same(again.state_dict(), before)


# -- what a step allocates --------------------------------------------------------------------


@pytest.mark.parametrize("unrelated", ["update", "freeze"])
@pytest.mark.parametrize("n", [1 << 12, 1 << 14])
def test_a_step_allocates_a_bounded_buffer_whatever_the_number_of_scalars(unrelated, n):
    """Beyond the two gradients, theta0, F and the base's state, which are there before."""
    p = nn.Parameter(torch.randn(n, generator=torch.Generator().manual_seed(0)))
    opt = EBUOptimizer(
        torch.optim.Adam([p], lr=0.01, fused=True),
        unrelated=unrelated,
        max_grad_norm=1.0,
        fused=False,
    )
    small = {"CHUNK_CPU": 100, "CAPACITY": 150, "SAMPLE_MIN": 200, "SAMPLE_MAX": 200}
    opt.rank_checks = 0
    with constants(small):
        for i in range(3):
            g = torch.Generator().manual_seed(i)
            grads = [torch.randn(n, generator=g) for _ in range(2)]
            known = [*grads, p.detach(), *opt.anchors().values()]
            known += [t for s in opt.state.values() for t in s.values()]
            if i:
                known.append(opt.fisher_of(p))
            with opt.forget():
                p.grad = grads[0]
            with opt.remember():
                p.grad = grads[1]
            del grads
            if i == 2:
                with Memory(*known) as memory:
                    opt.step()
                assert memory.largest <= 400
                assert memory.peak <= 4000
            else:
                opt.step()
            opt.zero_grad()
