"""One shape for all: every method runs in EBU's loop, with closures, scaler and checkpoints."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from torch import nn
from torch.optim import SGD, Adam
from torch.optim.lr_scheduler import StepLR

from ebu_optim import EBUOptimizer
from ebu_optim.baselines import (
    AEGIS,
    ESD,
    GRU,
    GU,
    SAGO,
    SPM,
    EmbeddingOnly,
    EraseDiff,
    FineTune,
    GradientAscent,
    JacobianDescent,
    Joint,
    MUNBa,
    PCGrad,
    RandomMasks,
    RestrictedGradient,
    Retrain,
    SalUn,
    SelectiveAmnesia,
    methods,
)

from .steps import assert_same, closures, loss, net, params
from .torchjd import WEIGHTINGS, lacks, runnable

NEEDED = {"selective_amnesia": {"fisher": "online"}}
BASELINES = {
    "fine_tune": FineTune,
    "gradient_ascent": GradientAscent,
    "retrain": Retrain,
    "joint": Joint,
    "selective_amnesia": SelectiveAmnesia,
    "salun": SalUn,
    "erasediff": EraseDiff,
    "pcgrad": PCGrad,
    "random_masks": RandomMasks,
    "embedding_only": EmbeddingOnly,
    "esd": ESD,
    "spm": SPM,
    "sago": SAGO,
    "gru": GRU,
    "gu": GU,
    "munba": MUNBa,
    "restricted_gradient": RestrictedGradient,
    "aegis": AEGIS,
    "advunlearn": Joint,
    **dict.fromkeys(WEIGHTINGS, JacobianDescent),
}
EVERY = pytest.mark.parametrize("name", runnable(methods))
BASELINE = pytest.mark.parametrize("name", runnable(BASELINES))


def build(name, base=lambda p: Adam(p, lr=0.01), **options):
    m = net()
    opt = methods[name].build(base(m.parameters()), **NEEDED.get(name, {}), **options)
    return m, opt


def backward(opt, m, i, name, times=1.0, rows=slice(None)):
    with getattr(opt, name)():
        (times * loss(m, i, name == "forget", rows)).backward()


def run(opt, m, steps):
    for i in steps:
        for name in opt.needs:
            backward(opt, m, i, name)
        opt.step()


def snapshot(opt, m):
    return copy.deepcopy({"params": params(m), "state": opt.state_dict(), "stats": opt.stats})


# -- the table ------------------------------------------------------------------------------------


def test_the_table_names_every_method_with_what_it_takes():
    ebu = {n for n in methods if n.startswith("ebu_")}
    assert methods.keys() - ebu == BASELINES.keys()
    assert {"ebu_added", "ebu_replaced", "ebu_routed"} <= ebu
    assert len(ebu) == 3 + 2 * 4
    assert len({m.title for m in methods.values()}) == len(methods)
    for name, method in methods.items():
        assert method.build.func is BASELINES.get(name, EBUOptimizer)
        if lacks(name):
            continue
        _, opt = build(name)
        assert opt.needs == method.build.func.needs
        assert (method.forgets is None) == ("forget" not in opt.needs)
        assert method.forgets in (None, "surrogate", "own", "relabel", "guidance", "adapter")
        if method.strength is not None:  # it is an option, and 2 is a strength
            _, opt = build(name, **{method.strength: 2.0})
            assert opt.param_groups[0][f"ebu_{method.strength}"] == 2.0


def test_table_4_twice():
    """What each ablation leaves of (1 + alpha) g_f + (2 - alpha) g_r on the overlap."""
    left = {
        "ebu_added": (1.6, 1.4),
        "ebu_without_alignment": (1.6, 1.4),
        "ebu_without_forget": (0.6, 1.4),
        "ebu_without_remember": (1.6, 0.4),
        "ebu_without_mitigation": (1.0, 1.0),
        "ebu_full_alignment": (1.6, 1.4),
        "ebu_blend_remember": (1.0, 2.0),
        "ebu_blend_forget": (2.0, 1.0),
        "ebu_blend_equal": (1.5, 1.5),
    }
    assert left.keys() == {n for n in methods if n.startswith("ebu_")} - {
        "ebu_replaced",
        "ebu_routed",
    }
    for name, (a, b) in left.items():
        w = nn.Parameter(torch.zeros(1))
        opt = methods[name].build(SGD([w], lr=1.0))
        forget, remember = (lambda w=w, g=g: (g * w).sum().backward() for g in (2, 5))
        opt.step(forget, remember)
        assert -w.item() == pytest.approx(2 * a + 5 * b, rel=1e-6), name
    for name, kind in {"ebu_without_alignment": "none", "ebu_full_alignment": "full"}.items():
        assert build(name)[1].penalty == kind


# -- one loop -------------------------------------------------------------------------------------


@EVERY
def test_closures_phases_and_a_loop_that_ignores_needs_are_one(name):
    found = []
    for way in ("needs", "both", "swapped", "closures", "one closure"):
        m, opt = build(name)
        for i in range(3):
            forget, remember = closures(m, i)
            if way == "closures":
                losses = opt.step(forget=forget, remember=remember)
                assert [x is not None for x in losses] == [
                    n in opt.needs for n in ("forget", "remember")
                ]
                continue
            if way == "one closure":
                both = {"forget": forget, "remember": remember}
                opt.step(**{n: both[n] for n in opt.needs})
                continue
            order = {"both": ("forget", "remember"), "swapped": ("remember", "forget")}
            for phase in order.get(way, opt.needs):
                backward(opt, m, i, phase)
            opt.step()
            opt.zero_grad()
        found.append(snapshot(opt, m))
    for other in found[1:]:
        assert_same(found[0], other)
    assert not all(map(torch.equal, found[0]["params"], params(net())))


@BASELINE
def test_micro_batches_add_up(name):
    whole, split = build(name), build(name)
    for i in range(3):
        for phase in ("forget", "remember"):
            backward(whole[1], whole[0], i, phase)
        for rows in (slice(0, 2), slice(2, 6)):
            for phase in ("forget", "remember"):
                backward(split[1], split[0], i, phase, rows=rows)
        whole[1].step()
        split[1].step()
    for a, b in zip(params(whole[0]), params(split[0]), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("name", ["fine_tune", "gradient_ascent"])
def test_the_phase_that_is_not_needed_leaves_no_trace(name):
    m, opt = build(name)
    (needed,) = opt.needs
    other = "forget" if needed == "remember" else "remember"
    backward(opt, m, 0, needed)
    grads = [p.grad.clone() for p in m.parameters()]
    with getattr(opt, other)():
        assert all(p.grad is None for p in m.parameters())
        loss(m, 0, True).backward()
        with pytest.raises(RuntimeError, match="cannot be nested"), opt.remember():
            pass
        opt.zero_grad()  # clears this phase alone
    assert_same([p.grad for p in m.parameters()], grads)
    with pytest.raises(ZeroDivisionError), getattr(opt, other)():
        1 / 0  # noqa: B018
    opt.step()
    assert opt.stats["total"] == 58


@pytest.mark.parametrize("name", ["fine_tune", "gradient_ascent"])
def test_a_step_without_the_phase_that_is_needed(name):
    m, opt = build(name)
    (needed,) = opt.needs
    other = "forget" if needed == "remember" else "remember"
    backward(opt, m, 0, other)
    with pytest.raises(RuntimeError, match=rf"the {needed} phase is missing .*inside {needed}\(\)"):
        opt.step()
    with pytest.raises(TypeError, match=rf"one closure, step\({needed}=...\).*another"):
        opt.step(**{other: lambda: None})
    backward(opt, m, 0, needed)
    m[0].weight.grad.mul_(2)
    with pytest.raises(RuntimeError, match="changed outside the phases"):
        opt.step()
    backward(opt, m, 0, needed)
    m[0].weight.grad = torch.zeros_like(m[0].weight)
    with pytest.raises(RuntimeError, match="changed outside the phases"):
        backward(opt, m, 0, other)
    run(opt, m, range(2))


def test_gradient_ascent_with_a_remember_loss_needs_both():
    m, opt = build("gradient_ascent", remember_weight=0.1)
    assert opt.needs == ("forget", "remember")
    assert GradientAscent.needs == ("forget",)
    backward(opt, m, 0, "forget")
    with pytest.raises(RuntimeError, match="remember phase is missing"):
        opt.step()


@BASELINE
def test_a_parameter_that_only_one_loss_reaches(name):
    """None counts as zero; with none at all the base never sees it."""
    found = []
    for fill in (False, True):
        torch.manual_seed(0)
        w = nn.ParameterList(nn.Parameter(torch.randn(7)) for _ in range(4))
        opt = methods[name].build(SGD(w, lr=0.1, weight_decay=0.1), **NEEDED.get(name, {}))

        def zero(w=w, fill=fill):
            return sum((p * 0).sum() for p in w[:3]) if fill else 0.0

        for _ in range(3):
            with opt.forget():
                (w[0].square().sum() + w[1].sin().sum() + zero()).backward()
            with opt.remember():
                (w[0].exp().sum() + w[2].cos().sum() + zero()).backward()
            opt.step()
        found.append([p.detach().clone() for p in w])
        assert w[3].grad is None
    shared = 3 if len(opt.needs) == 2 else 1
    for a, b in list(zip(*found, strict=True))[:shared]:
        torch.testing.assert_close(a, b)
    torch.manual_seed(0)
    assert torch.equal(found[0][3], [torch.randn(7) for _ in range(4)][3])


# -- what goes wrong ------------------------------------------------------------------------------


@BASELINE
@pytest.mark.parametrize("bad", ["forget", "remember"])
def test_non_finite_gradients_raise_or_are_skipped_and_change_nothing(name, bad):
    m, opt = build(name)
    if bad not in opt.needs:  # it is dropped, whatever it holds
        backward(opt, m, 0, bad, times=float("nan"))
        run(opt, m, range(1))
        n, other = build(name)
        run(other, n, range(1))
        assert_same(snapshot(opt, m), snapshot(other, n))
        return
    run(opt, m, range(2))
    before = snapshot(opt, m)
    for phase in opt.needs:
        backward(opt, m, 2, phase, times=float("inf") if phase == bad else 1.0)
    with pytest.raises(RuntimeError, match=rf"58 (elements )?of the {bad} gradient.*nothing was"):
        opt.step()
    assert_same(snapshot(opt, m), before)
    opt.nonfinite = "skip"
    for phase in opt.needs:
        backward(opt, m, 2, phase, times=float("nan") if phase == bad else 1.0)
    opt.step()
    assert opt.last_step_skipped
    assert opt.skipped_steps == 1
    opt.skipped_steps = 0
    assert_same(snapshot(opt, m), before)
    run(opt, m, range(2, 4))
    n, other = build(name, nonfinite="skip")
    run(other, n, range(4))
    assert_same(snapshot(opt, m), snapshot(other, n))


def test_propagate_lets_them_through():
    m, opt = build("joint", nonfinite="propagate")
    backward(opt, m, 0, "forget", times=float("nan"))
    backward(opt, m, 0, "remember")
    opt.step()
    assert all(p.isnan().all() for p in params(m))


@pytest.mark.parametrize("nonfinite", ["raise", "skip"])
def test_an_update_that_its_dtype_does_not_hold(nonfinite):
    w = nn.Parameter(torch.ones(3, dtype=torch.float16))
    opt = SelectiveAmnesia(
        SGD([w], lr=0.1), fisher="online", forget_weight=1e4, nonfinite=nonfinite
    )
    calls = (lambda: (w * 100).sum().backward(),) * 2
    if nonfinite == "raise":
        with pytest.raises(RuntimeError, match=r"SelectiveAmnesia makes from them, .* exceeds"):
            opt.step(*calls)
    else:
        opt.step(*calls)
        assert opt.last_step_skipped
    assert torch.equal(w, torch.ones(3, dtype=torch.float16))
    assert not opt.fisher_of(w).any()  # F is of accepted steps


@BASELINE
def test_a_scaler_changes_nothing_and_skips_what_overflows(name):
    plain, scaled = build(name), build(name)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=100)
    run(plain[1], plain[0], range(3))
    m, opt = scaled
    for i in range(3):
        for phase in opt.needs:
            with getattr(opt, phase)():
                scaler.scale(loss(m, i, phase == "forget")).backward()
        scaler.step(opt)
        scaler.update()
        assert not opt.last_step_skipped
    for a, b in zip(params(plain[0]), params(m), strict=True):
        torch.testing.assert_close(a, b)
    for key, value in plain[1].stats.items():
        assert opt.stats[key] == pytest.approx(value, rel=1e-5), key
    before = params(m)
    for bad in opt.needs:
        scale = scaler.get_scale()
        for phase in opt.needs:
            times = float("inf") if phase == bad else 1.0
            with getattr(opt, phase)():
                (times * scaler.scale(loss(m, 5, phase == "forget"))).backward()
        scaler.step(opt)
        scaler.update()
        assert opt.last_step_skipped
        assert scaler.get_scale() == scale / 2
    assert_same(params(m), before)


@BASELINE
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_weights_step_as_float32_ones_to_rounding(name, dtype):
    results = []
    for kind in (torch.float32, dtype):
        torch.manual_seed(0)
        w = nn.Parameter(torch.randn(50).to(dtype).to(kind))
        opt = methods[name].build(SGD([w], lr=0.1), **NEEDED.get(name, {}))
        slope = torch.randn(2, 50).to(dtype).to(kind)
        opt.step(*(lambda w=w, s=s: (s * w).sum().backward() for s in slope))
        results.append(w.detach().float())
    torch.testing.assert_close(*results, rtol=3 * torch.finfo(dtype).eps, atol=1e-3)


# -- state ----------------------------------------------------------------------------------------


@EVERY
@pytest.mark.parametrize("at", [0, 3])
def test_a_run_resumed_from_a_file_is_the_same_run(name, at):
    m, opt = build(name)
    run(opt, m, range(at))
    file = io.BytesIO()
    torch.save([m.state_dict(), opt.state_dict()], file)
    file.seek(0)
    run(opt, m, range(at, at + 3))
    n, other = build(name)
    model_state, state = torch.load(file, weights_only=True)
    n.load_state_dict(model_state)
    other.load_state_dict(state)
    run(other, n, range(at, at + 3))
    assert_same(snapshot(opt, m), snapshot(other, n))


@EVERY
def test_loading_into_a_used_optimizer_rewinds_it(name):
    m, opt = build(name)
    state = copy.deepcopy([m.state_dict(), opt.state_dict()])
    run(opt, m, range(7, 10))
    m.load_state_dict(state[0])
    opt.load_state_dict(state[1])
    n, other = build(name)
    for o, model in ((opt, m), (other, n)):
        run(o, model, range(2))
    assert_same(snapshot(opt, m), snapshot(other, n))


@BASELINE
def test_copies_and_pickles_go_on_alike(name):
    m, opt = build(name)
    run(opt, m, range(2))
    pairs = [copy.deepcopy((m, opt)), pickle.loads(pickle.dumps((m, opt)))]  # noqa: S301
    run(opt, m, range(2, 4))
    for n, other in pairs:
        assert other.needs == opt.needs
        run(other, n, range(2, 4))
        assert_same(snapshot(opt, m), snapshot(other, n))


def test_random_masks_take_the_seed_of_the_checkpoint():
    m, opt = build("random_masks", seed=3)
    run(opt, m, range(2))
    n, other = build("random_masks", seed=4)
    n.load_state_dict(m.state_dict())
    other.load_state_dict(copy.deepcopy(opt.state_dict()))  # torch's own load does not copy
    for o, model in ((opt, m), (other, n)):
        run(o, model, range(2, 4))
    assert_same(snapshot(opt, m), snapshot(other, n))


def test_a_mask_made_before_the_first_step_is_saved():
    m, opt = build("salun")
    opt.make_mask([lambda: loss(m, 50, True).backward()])
    n, other = build("salun")
    other.load_state_dict(opt.state_dict())
    for p, q in zip(m.parameters(), n.parameters(), strict=True):
        assert torch.equal(opt.mask_of(p), other.mask_of(q))
    with pytest.raises(ValueError, match="the mask is already made"):
        opt.add_param_group({"params": [nn.Parameter(torch.ones(2))]})
    run(opt, m, range(1))
    with pytest.raises(RuntimeError, match="before the first phase"):
        opt.make_mask([])


@pytest.mark.parametrize("times", [float("nan"), None])
def test_a_mask_from_no_gradient_or_from_nan_is_refused(times):
    m, opt = build("salun")
    calls = [] if times is None else [lambda: (times * loss(m, 0, True)).backward()]
    with pytest.raises(RuntimeError, match=r"NaN or Inf|no gradient"):
        opt.make_mask(calls)
    run(opt, m, range(2))


@BASELINE
def test_a_scheduler_drives_the_base_and_the_groups_hold_what_is_told(name):
    m, opt = build(name, base=lambda p: SGD(p, lr=0.1))
    schedule = StepLR(opt, 1, gamma=0.5)
    run(opt, m, range(1))
    schedule.step()
    assert opt.base.param_groups[0]["lr"] == 0.05
    assert opt.param_groups is opt.base.param_groups
    own = {k for k in opt.param_groups[0] if k.startswith("ebu_")}
    assert own == set(opt._defaults)
    for option in ("alpha", "gamma"):
        assert hasattr(opt, option) == (f"ebu_{option}" in own)
        if f"ebu_{option}" not in own:
            with pytest.raises(AttributeError, match=f"has no {option}"):
                setattr(opt, option, 0.5)
    assert repr(opt).startswith(f"{type(opt).__name__}(")
    for option in own:
        assert f"{option.removeprefix('ebu_')}=" in repr(opt)


def test_a_weight_of_its_own_for_a_group_and_a_new_group():
    m = net()
    base = SGD(
        [{"params": m[0].parameters(), "ebu_forget_weight": 3.0}, {"params": m[2].parameters()}],
        lr=1.0,
    )
    opt = Joint(base, forget_weight=0.5)
    assert [g["ebu_forget_weight"] for g in opt.param_groups] == [3.0, 0.5]
    w = nn.Parameter(torch.ones(2))
    opt.add_param_group({"params": [w]})
    assert opt.param_groups[2]["ebu_forget_weight"] == 0.5
    with opt.forget():
        (sum(p.sum() for p in m.parameters()) + w.sum()).backward()
    with opt.remember():
        sum(p.sum() for p in m.parameters()).backward()
    before = params(m)
    opt.step()
    moved = [a - b for a, b in zip(before, params(m), strict=True)]
    for d, expected in zip(moved, (4.0, 4.0, 1.5, 1.5), strict=True):
        torch.testing.assert_close(d, torch.full_like(d, expected))
    assert torch.equal(w.detach(), torch.full((2,), 0.5))
    with pytest.raises(ValueError, match="one forget_weight"):
        PCGrad(
            SGD(
                [
                    {"params": m[0].parameters(), "ebu_forget_weight": 3.0},
                    {"params": m[2].parameters()},
                ],
                lr=1.0,
            )
        )


@pytest.mark.parametrize(
    ("cls", "options", "named"),
    [
        (Joint, {"forget_weight": -1.0}, "forget_weight must be finite"),
        (Joint, {"forget_weight": "much"}, "forget_weight must be a number"),
        (GradientAscent, {"remember_weight": float("nan")}, "remember_weight"),
        (SelectiveAmnesia, {"fisher": None}, "plain sum"),
        (SelectiveAmnesia, {"fisher": "online", "lam": float("inf")}, "lam"),
        (SalUn, {"delta": 0.0}, "delta must be in"),
        (SalUn, {"compat": "papers"}, "compat"),
        (EraseDiff, {"eta": -0.1}, "eta"),
        (EraseDiff, {"compat": 1}, "compat"),
        (PCGrad, {"forget_weight": -0.1}, "forget_weight"),
        (RandomMasks, {"update": "sum"}, "update"),
        (RandomMasks, {"alpha": 2.0}, "alpha"),
    ],
)
def test_options_out_of_range(cls, options, named):
    with pytest.raises(ValueError, match=named):
        cls(SGD(net().parameters(), lr=0.1), **options)


@BASELINE
def test_an_option_of_another_method_is_refused(name):
    with pytest.raises(TypeError, match="unexpected keyword"):
        build(name, granularity="tensor")


def test_embedding_only_refuses_a_base_over_more():
    m = net()
    EmbeddingOnly(SGD(m[2].parameters(), lr=0.1), embedding=m[2])
    with pytest.raises(ValueError, match=r"parameter 0 \(group 0\) of shape \(8, 4\)"):
        EmbeddingOnly(SGD(m.parameters(), lr=0.1), embedding=m[2].parameters())


def test_ebu_refuses_a_baseline_as_its_base():
    with pytest.raises(TypeError, match="is already a Joint"):
        EBUOptimizer(Joint(SGD(net().parameters(), lr=0.1)))
