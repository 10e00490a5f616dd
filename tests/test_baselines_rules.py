"""Every baseline against its formula in NumPy, over several steps of SGD and of Adam."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from ebu_optim import EBUOptimizer
from ebu_optim.baselines import (
    ESD,
    SPM,
    EmbeddingOnly,
    EraseDiff,
    FineTune,
    GradientAscent,
    Joint,
    PCGrad,
    RandomMasks,
    Retrain,
    SalUn,
    SelectiveAmnesia,
)

from .numpy_optim import BASES, Tiny, clipped, flat, gradient

STEPS = 5
FISHER = [np.random.default_rng(9).uniform(0, 2, s) for s in ((3, 4), (5,))]


def pcgrad(f, r):
    """Yu et al., Algorithm 1, as printed: each against the other's original."""
    new_f, new_r = f, r
    if new_f @ r < 0:
        new_f = new_f - (new_f @ r) / (r @ r) * r
    if new_r @ f < 0:
        new_r = new_r - (new_r @ f) / (f @ f) * f
    return new_f + new_r


def split(vector, arrays):
    ends = np.cumsum([a.size for a in arrays])[:-1]
    return [v.reshape(a.shape) for v, a in zip(np.split(vector, ends), arrays, strict=True)]


def mask(f, share):
    k = max(1, math.floor(share * flat(f).size + 0.5))
    tau = np.sort(np.abs(flat(f)))[-k]
    return [np.abs(a) >= tau for a in f]


def each(rule):
    """A rule on single arrays as one on lists."""
    return lambda theta, f, r, theta0, m: [rule(*x) for x in zip(theta, f, r, theta0, m)]


def erase(eta):
    def rule(theta, f, r, theta0, m):
        norms = np.linalg.norm(flat(f)) * np.linalg.norm(flat(r))
        cos = flat(f) @ flat(r) / (norms + 1e-8)
        return [b + max(0.0, eta - cos) * a for a, b in zip(f, r, strict=True)]

    return rule


def fisher(opt_params):
    return {p: torch.from_numpy(F) for p, F in zip(opt_params, FISHER, strict=True)}


UNIT = 1 / np.sqrt(flat(FISHER).mean())

# name: (how to build it, G by formula of (theta, g_f, g_r, theta0, mask at theta0))
RULES = {
    "fine_tune": (FineTune, each(lambda t, f, r, t0, m: r)),
    "retrain": (Retrain, each(lambda t, f, r, t0, m: r)),
    "gradient_ascent": (GradientAscent, each(lambda t, f, r, t0, m: -f)),
    "gradient_ascent_and_remember": (
        lambda b: GradientAscent(b, remember_weight=0.3),
        each(lambda t, f, r, t0, m: -f + 0.3 * r),
    ),
    "joint": (lambda b: Joint(b, forget_weight=1.7), each(lambda t, f, r, t0, m: 1.7 * f + r)),
    "esd": (ESD, each(lambda t, f, r, t0, m: f)),
    "spm": (lambda b: SPM(b, anchor_weight=3.0), each(lambda t, f, r, t0, m: f + 3 * r)),
    "embedding_only": (EmbeddingOnly, each(lambda t, f, r, t0, m: f + r)),
    "selective_amnesia": (
        lambda b: SelectiveAmnesia(
            b,
            fisher=fisher(b.param_groups[0]["params"]),
            lam=0.4,
            forget_weight=1.2,
            remember_weight=0.7,
        ),
        lambda t, f, r, t0, m: [
            1.2 * a + 0.7 * b + 2 * 0.4 * F * (p - p0)
            for p, a, b, p0, F in zip(t, f, r, t0, FISHER)
        ],
    ),
    "selective_amnesia_unit": (
        lambda b: SelectiveAmnesia(
            b, fisher=fisher(b.param_groups[0]["params"]), lam=0.4, fisher_scale="unit"
        ),
        lambda t, f, r, t0, m: [
            a + b + 2 * 0.4 * UNIT * F * (p - p0) for p, a, b, p0, F in zip(t, f, r, t0, FISHER)
        ],
    ),
    "salun": (
        lambda b: SalUn(b, delta=0.3, forget_weight=1.5, remember_weight=0.2),
        each(lambda t, f, r, t0, m: m * (1.5 * f + 0.2 * r)),
    ),
    "erasediff": (lambda b: EraseDiff(b, lam=0.3), each(lambda t, f, r, t0, m: r + 0.3 * f)),
    "erasediff_cosine": (lambda b: EraseDiff(b, eta=0.2), erase(0.2)),
    "erasediff_cosine_off": (lambda b: EraseDiff(b, eta=0.0), erase(0.0)),
    "pcgrad": (
        PCGrad,
        lambda t, f, r, t0, m: split(pcgrad(flat(f), flat(r)), f),
    ),
    "pcgrad_weighted": (
        lambda b: PCGrad(b, forget_weight=2.5),
        lambda t, f, r, t0, m: split(pcgrad(2.5 * flat(f), flat(r)), f),
    ),
}


def step(opt, model, i):
    for name in ("forget", "remember"):
        if name in opt.needs:
            with getattr(opt, name)():
                model.loss(i, name).backward()
    opt.step()


def by_formula(name, base, steps=STEPS, clip=None):
    """Weights and G step by step."""
    _, rule = RULES[name]
    theta = theta0 = Tiny().arrays()
    optimizer, found = BASES[base][1](), []
    m = mask(gradient(theta0, 0, "forget"), 0.3)
    for i in range(steps):
        f, r = (gradient(theta, i, n) for n in ("forget", "remember"))
        G = rule(theta, f, r, theta0, m)
        G = G if clip is None else clipped(G, clip)
        new = optimizer.step(theta, G)
        # SalUn holds what it masks, weight decay included
        theta = (
            [np.where(k, n, p) for k, n, p in zip(m, new, theta, strict=True)]
            if name == "salun"
            else new
        )
        found.append((theta, G, f, r))
    return found


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("name", RULES)
def test_every_step_is_the_formulas(name, base):
    model = Tiny()
    opt = RULES[name][0](BASES[base][0](model.parameters()))
    opposed = set()
    for i, (theta, G, f, r) in enumerate(by_formula(name, base)):
        before = model.arrays()
        step(opt, model, i)
        np.testing.assert_allclose(flat(model.arrays()), flat(theta), rtol=1e-10, atol=1e-12)
        stats = opt.stats
        dot = flat(f) @ flat(r)
        opposed.add(bool(dot < 0))
        assert stats["total"] == 17
        assert stats["update_norm"] == pytest.approx(np.linalg.norm(flat(G)), rel=1e-9)
        assert ("forget_norm" in stats) == ("forget" in opt.needs)
        assert ("remember_norm" in stats) == ("remember" in opt.needs)
        if "forget" in opt.needs:
            assert stats["forget_norm"] == pytest.approx(np.linalg.norm(flat(f)), rel=1e-9)
        if "remember" in opt.needs:
            assert stats["remember_norm"] == pytest.approx(np.linalg.norm(flat(r)), rel=1e-9)
        if len(opt.needs) == 2:
            norms = np.linalg.norm(flat(f)) * np.linalg.norm(flat(r))
            assert stats["cosine"] == pytest.approx(dot / norms, rel=1e-9)
        if "amnesia" in name:
            moved = np.linalg.norm(flat(before) - flat(Tiny().arrays()))
            assert stats["moved"] == pytest.approx(moved, rel=1e-9, abs=1e-12)
        assert not {"forget_selected", "overlap", "thresholds"} & stats.keys()
    if "pcgrad" in name or "cosine" in name:
        assert opposed == {True, False}  # both branches were taken


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("name", RULES)
def test_clipping_is_of_the_update(name, base):
    model = Tiny()
    opt = RULES[name][0](BASES[base][0](model.parameters()))
    opt.max_grad_norm = 0.5
    for i, (theta, *_) in enumerate(by_formula(name, base, 3, clip=0.5)):
        step(opt, model, i)
        np.testing.assert_allclose(flat(model.arrays()), flat(theta), rtol=1e-6, atol=1e-8)


def test_selective_amnesia_is_ebus_full_penalty_on_the_plain_sum():
    models = Tiny(), Tiny()
    ours, theirs = (BASES["adam"][0](m.parameters()) for m in models)
    ours = SelectiveAmnesia(ours, fisher=fisher(models[0].parameters()), lam=0.4)
    theirs = EBUOptimizer(
        theirs,
        terms=("forget", "remember"),
        penalty="full",
        gamma=0.8,
        fisher_scale="raw",
        fisher=fisher(models[1].parameters()),
    )
    for i in range(STEPS):
        for opt, model in zip((ours, theirs), models, strict=True):
            step(opt, model, i)
    np.testing.assert_allclose(*(flat(m.arrays()) for m in models), rtol=1e-10)


def test_selective_amnesia_with_an_online_fisher_averages_squares_after_use():
    model, theta0 = Tiny(), Tiny().arrays()
    opt = SelectiveAmnesia(BASES["sgd"][0](model.parameters()), fisher="online", lam=0.4)
    F, theta, base = [np.zeros(p.shape) for p in theta0], theta0, BASES["sgd"][1]()
    for i in range(4):
        f, r = (gradient(theta, i, n) for n in ("forget", "remember"))
        G = [a + b + 0.8 * S * (p - p0) for a, b, S, p, p0 in zip(f, r, F, theta, theta0)]
        F = [S + (b**2 - S) / (i + 1) for S, b in zip(F, r, strict=True)]
        theta = base.step(theta, G)
        step(opt, model, i)
        np.testing.assert_allclose(flat(model.arrays()), flat(theta), rtol=1e-10)
        held = [opt.fisher_of(p).numpy() for p in model.p]
        np.testing.assert_allclose(flat(held), flat(F), rtol=1e-10)


# -- PCGrad and TorchJD ---------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [1e-10, 1.0, 1e10])
def test_pcgrad_weights_are_torchjds(scale):
    reason = "torchjd is not installed; the formula is tested by NumPy above"
    torchjd = pytest.importorskip("torchjd.aggregation", reason=reason)
    from ebu_optim.baselines.pcgrad import surgery

    torch.manual_seed(0)
    for _ in range(50):
        jacobian = torch.randn(2, 4, dtype=torch.float64) * scale
        gramian = jacobian @ jacobian.T
        torch.testing.assert_close(surgery(gramian), torchjd.PCGradWeighting()(gramian))


def test_pcgrad_takes_another_weighting_of_the_gramian():
    seen = []

    def weighting(gramian):
        seen.append(gramian)
        return torch.tensor([0.25, 4.0], dtype=gramian.dtype)

    model, theta = Tiny(), Tiny().arrays()
    opt = PCGrad(torch.optim.SGD(model.parameters(), lr=1.0), forget_weight=2, weighting=weighting)
    f, r = (flat(gradient(theta, 0, n)) for n in ("forget", "remember"))
    step(opt, model, 0)
    expected = [[4 * f @ f, 2 * f @ r], [2 * f @ r, r @ r]]
    np.testing.assert_allclose(seen[0].numpy(), expected, rtol=1e-12)
    np.testing.assert_allclose(flat(model.arrays()), flat(theta) - (0.5 * f + 4 * r), rtol=1e-12)
    assert (opt.stats["forget_weight"], opt.stats["remember_weight"]) == (0.5, 4.0)


@pytest.mark.parametrize("gone", ["forget", "remember"])
@pytest.mark.parametrize("cls", [PCGrad, lambda b: EraseDiff(b, eta=0.5)])
def test_a_gradient_of_zeros_is_no_conflict_and_no_nan(cls, gone):
    model, theta = Tiny(), Tiny().arrays()
    opt = cls(torch.optim.SGD(model.parameters(), lr=1.0))
    for name in ("forget", "remember"):
        with getattr(opt, name)():
            (model.loss(0, name) * (name != gone)).backward()
    opt.step()
    f, r = (flat(gradient(theta, 0, n)) for n in ("forget", "remember"))
    lam = 1.0 if isinstance(opt, PCGrad) else 0.5
    expected = r if gone == "forget" else lam * f
    np.testing.assert_allclose(flat(theta) - flat(model.arrays()), expected, rtol=1e-12)


# -- EraseDiff's inner steps ----------------------------------------------------------------------


def test_inner_steps_leave_the_weights_and_keep_the_moments():
    model = Tiny()
    opt = EraseDiff(BASES["adam"][0](model.parameters()), lam=0.3, compat="paper")
    theta = inner = Tiny().arrays()
    adam = BASES["adam"][1]()
    for i in range(2):

        def closure(i=10 + i):
            loss = model.loss(i, "forget")
            loss.backward()
            return loss.item()

        before = model.arrays()
        losses = opt.inner_steps([closure, closure])
        np.testing.assert_array_equal(flat(model.arrays()), flat(before))
        assert losses[0] > losses[1]
        inner = theta
        for _ in range(2):
            inner = adam.step(inner, gradient(inner, 10 + i, "forget"))
        f, r = (gradient(theta, i, n) for n in ("forget", "remember"))
        theta = adam.step(theta, [b + 0.3 * a for a, b in zip(f, r, strict=True)])
        step(opt, model, i)
        np.testing.assert_allclose(flat(model.arrays()), flat(theta), rtol=1e-10)


def test_inner_steps_are_refused_where_they_change_nothing_or_break_a_step():
    model = Tiny()
    with pytest.raises(RuntimeError, match="compat"):
        EraseDiff(BASES["adam"][0](model.parameters())).inner_steps([])
    opt = EraseDiff(BASES["adam"][0](model.parameters()), compat="paper")
    with opt.forget():
        model.loss(0, "forget").backward()
    with pytest.raises(RuntimeError, match="between steps"):
        opt.inner_steps([])


def test_a_failing_inner_step_leaves_the_weights():
    model = Tiny()
    opt = EraseDiff(BASES["adam"][0](model.parameters()), compat="paper")

    def good():
        model.loss(0, "forget").backward()

    def bad():
        raise ValueError("a batch that cannot be read")

    with pytest.raises(ValueError, match="cannot be read"):
        opt.inner_steps([good, bad])
    np.testing.assert_array_equal(flat(model.arrays()), flat(Tiny().arrays()))
    step(opt, model, 0)


# -- SalUn ----------------------------------------------------------------------------------------


def closures(model, steps, scale=1.0):
    return [lambda i=i: (scale * model.loss(i, "forget")).backward() for i in steps]


def test_the_mask_is_of_the_sum_over_the_forget_set():
    model, theta = Tiny(), Tiny().arrays()
    opt = SalUn(BASES["sgd"][0](model.parameters()), delta=0.4)
    opt.make_mask(closures(model, range(3)))
    total = split(sum(flat(gradient(theta, i, "forget")) for i in range(3)), theta)
    for p, expected in zip(model.p, mask(total, 0.4), strict=True):
        np.testing.assert_array_equal(opt.mask_of(p).numpy(), expected)
    step(opt, model, 0)
    assert opt.stats["selected"] == 7  # floor(0.4 * 17 + 0.5)
    unlike_first = mask(gradient(theta, 0, "forget"), 0.4)
    assert not np.array_equal(flat(unlike_first), flat([opt.mask_of(p).numpy() for p in model.p]))


def test_the_mask_never_holds_what_the_forget_loss_does_not_feel():
    p = torch.nn.Parameter(torch.ones(10))
    opt = SalUn(torch.optim.SGD([p], lr=0.1), delta=0.8)
    opt.step(lambda: p[:3].sum().backward(), lambda: p.sum().backward())
    assert opt.mask_of(p).tolist() == [True] * 3 + [False] * 7
    assert opt.stats["selected"] == 3
    torch.testing.assert_close(p.detach(), torch.tensor([0.8] * 3 + [1.0] * 7))


def test_paper_clips_the_batches_of_the_mask():
    model, theta = Tiny(), Tiny().arrays()
    made = []
    for compat in (None, "paper"):
        opt = SalUn(BASES["sgd"][0](model.parameters()), delta=0.4, compat=compat)
        batches = closures(model, [0]) + closures(model, [1], scale=100.0)
        opt.make_mask(batches)
        made.append(flat([opt.mask_of(p).numpy() for p in model.p]))
    a, b = gradient(theta, 0, "forget"), [100 * g for g in gradient(theta, 1, "forget")]
    ours = mask(split(flat(a) + flat(b), theta), 0.4)
    theirs = mask(split(flat(clipped(a, 1.0)) + flat(clipped(b, 1.0)), theta), 0.4)
    np.testing.assert_array_equal(made[0], flat(ours))
    np.testing.assert_array_equal(made[1], flat(theirs))
    assert not np.array_equal(made[0], made[1])


@pytest.mark.parametrize("base", BASES)
def test_paper_clips_before_the_mask_and_lets_weight_decay_move_the_rest(base):
    model = Tiny()
    opt = SalUn(BASES[base][0](model.parameters()), delta=0.3, compat="paper", max_grad_norm=0.5)
    theta, optimizer = Tiny().arrays(), BASES[base][1]()
    m = mask(gradient(theta, 0, "forget"), 0.3)
    for i in range(3):
        f, r = (gradient(theta, i, n) for n in ("forget", "remember"))
        G = clipped([a + b for a, b in zip(f, r, strict=True)], 0.5)
        theta = optimizer.step(theta, [k * g for k, g in zip(m, G, strict=True)])
        step(opt, model, i)
        np.testing.assert_allclose(flat(model.arrays()), flat(theta), rtol=1e-6, atol=1e-8)
    outside = ~flat(m)
    moved = flat(theta)[outside] != flat(Tiny().arrays())[outside]
    assert moved.all() == (base == "sgd")  # the one with weight decay


def test_outside_the_mask_nothing_moves_by_a_bit():
    model = Tiny()
    opt = SalUn(BASES["sgd"][0](model.parameters()), delta=0.3)
    for i in range(4):
        step(opt, model, i)
    for p, old in zip(model.p, Tiny().p, strict=True):
        assert torch.equal(p == old, ~opt.mask_of(p))


# -- random masks ---------------------------------------------------------------------------------


class Wide(Tiny):
    """Enough scalars for shares to mean something."""

    def __init__(self):
        super().__init__()
        draw = np.random.default_rng(1)
        self.p = torch.nn.ParameterList(
            torch.nn.Parameter(torch.from_numpy(draw.standard_normal(s)))
            for s in ((40, 30), (900,))
        )

    def loss(self, i, name):
        g = np.random.default_rng([i, name == "forget"])
        shared = np.random.default_rng(i)  # makes the two selections overlap more than by chance
        return sum(
            (
                p * torch.from_numpy(g.standard_normal(p.shape) * shared.exponential(size=p.shape))
            ).sum()
            for p in self.p
        )


def test_random_masks_have_ebus_sizes_exactly_and_other_places():
    models = Wide(), Wide()
    ebu = EBUOptimizer(torch.optim.SGD(models[0].parameters(), lr=0.0), delta=(0.3, 0.6))
    control = RandomMasks(torch.optim.SGD(models[1].parameters(), lr=0.0), delta=(0.3, 0.6))
    for i in range(4):
        for opt, model in zip((ebu, control), models, strict=True):
            step(opt, model, i)
        for name in ("forget_selected", "remember_selected", "overlap", "overlap_lift"):
            assert control.stats[name] == pytest.approx(ebu.stats[name], rel=1e-12), name
    assert control.stats["overlap_lift"] > 1.1
    assert "thresholds" not in control.stats


@pytest.mark.parametrize("penalty", ["partial", "full", "none"])
@pytest.mark.parametrize("update", ["added", "replaced", "routed"])
def test_random_masks_follow_ebus_update(update, penalty, monkeypatch):
    """With EBU's own masks in place of the drawn ones it is EBU."""
    models = Wide(), Wide()
    options = {"update": update, "penalty": penalty, "gamma": 3.0, "max_grad_norm": 5.0}
    ebu = EBUOptimizer(BASES["adam"][0](models[0].parameters()), **options)
    control = RandomMasks(BASES["adam"][0](models[1].parameters()), **options)

    def selected(step):
        grads = [[g.numpy() for g in gs] for gs in (step.g_f, step.g_r)]
        for slot, f, r in zip(step.slots, *(mask(g, 0.5) for g in grads), strict=True):
            yield slot.key, (torch.from_numpy(f), torch.from_numpy(r))

    monkeypatch.setattr(control.rule, "_counted", selected)
    for i in range(4):
        for opt, model in zip((ebu, control), models, strict=True):
            step(opt, model, i)
    np.testing.assert_allclose(*(flat(m.arrays()) for m in models), rtol=1e-6, atol=1e-9)


def test_random_masks_draw_anew_every_step_by_their_seed_and_leave_the_users_stream(monkeypatch):
    drawn = {}
    torch.manual_seed(5)
    before = torch.get_rng_state()
    for seed in (0, 0, 1):
        model = Wide()
        opt = RandomMasks(torch.optim.SGD(model.parameters(), lr=0.1), seed=seed)
        original, kept = opt.rule._counted, []

        def counted(step, original=original, kept=kept):
            masks = dict(original(step))
            kept.append(torch.cat([f.flatten() for f, _ in masks.values()]))
            return masks

        monkeypatch.setattr(opt.rule, "_counted", counted)
        for i in range(3):
            step(opt, model, i)
        drawn.setdefault(seed, []).append(kept)
    assert all(torch.equal(a, b) for a, b in zip(*drawn[0], strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(drawn[0][0], drawn[1][0], strict=True))
    first, second, _ = drawn[0][0]
    # two draws of half agree on half of the places, give or take five standard deviations
    assert abs((first == second).double().mean() - 0.5) < 2.5 / len(first) ** 0.5
    assert torch.equal(torch.get_rng_state(), before)


def test_independent_random_masks_overlap_by_chance():
    model = Wide()
    opt = RandomMasks(torch.optim.SGD(model.parameters(), lr=0.1), delta=0.5, independent=True)
    step(opt, model, 0)
    n = opt.stats["total"]
    assert abs(opt.stats["forget_selected"] / n - 0.5) < 2.5 / n**0.5
    assert abs(opt.stats["remember_selected"] / n - 0.5) < 2.5 / n**0.5
    assert opt.stats["overlap_lift"] == pytest.approx(1.0, abs=0.1)


def test_equal_shapes_draw_unequal_masks():
    p = [torch.nn.Parameter(torch.zeros(500)) for _ in range(2)]
    opt = RandomMasks(torch.optim.SGD(p, lr=1.0), alpha=1.0, update="routed", penalty="none")
    slope = torch.randn(500, generator=torch.Generator().manual_seed(0))
    for phase in (opt.forget, opt.remember):
        with phase():
            sum((q * slope).sum() for q in p).backward()
    opt.step()  # both selections are one, so a parameter moves where it was drawn
    assert opt.stats["forget_selected"] == opt.stats["overlap"] == 500
    agree = ((p[0] != 0) == (p[1] != 0)).double().mean().item()
    assert agree == pytest.approx(0.5, abs=0.12)  # five standard deviations
