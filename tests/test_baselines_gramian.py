"""The rules of the two gradients' inner products, against their formulas in NumPy."""

from __future__ import annotations

from importlib import import_module

import numpy as np
import pytest
import torch
from torch import nn

from ebu_optim.baselines import (
    AEGIS,
    GRU,
    GU,
    SAGO,
    JacobianDescent,
    MUNBa,
    PCGrad,
    RestrictedGradient,
    methods,
)

from .numpy_optim import BASES, Tiny, flat, gradient
from .steps import NAMES
from .torchjd import WEIGHTINGS, lacks, runnable

STEPS = 6


def split(vector, arrays):
    ends = np.cumsum([a.size for a in arrays])[:-1]
    return [v.reshape(a.shape) for v, a in zip(np.split(vector, ends), arrays, strict=True)]


def whole(rule):
    """A rule on vectors as one on lists: the model is one vector."""
    return lambda f, r: split(rule(flat(f), flat(r)), f)


def each(rule):
    """The same tensor by tensor."""
    return lambda f, r: [
        rule(a.ravel(), b.ravel()).reshape(a.shape) for a, b in zip(f, r, strict=True)
    ]


def surgery(f, r, w=1.0):
    b = f @ r
    if b >= 0:
        return f + w * r
    return f - b / (r @ r) * r + w * (r - b / (f @ f) * f)


def nash(f, r):
    u, v = f / np.linalg.norm(f), r / np.linalg.norm(r)
    return (u + v) / np.sqrt(1 + u @ v)


def gated(f, r, both=False):
    agreed = 1.5 * f + 0.5 * r if both else 1.5 * f
    return np.where(f * r < 0, 0.5 * r, agreed)


class Rectified:
    """GRU; m is of all steps so far."""

    def __init__(self, s, w):
        self.s, self.w, self.m = s, w, 0.0

    def __call__(self, f, r):
        self.m = self.s * r + (1 - self.s) * self.m
        b = f @ self.m
        return f - min(b, 0.0) / (self.m @ self.m) * self.m + self.w * r


class Orthogonal:
    """GU under Adam with beta2 = 0.999; `seen` is what Adam was given before."""

    def __init__(self, adam, conflicts_only=False):
        self.adam, self.only, self.v, self.t = adam, conflicts_only, 0.0, 0

    def __call__(self, f, r):
        h = np.sqrt(self.v / (1 - 0.999**self.t)) + 1e-8 if self.adam and self.t else 1.0
        k = f @ (r / h) / (r @ (r / h))
        k = min(k, 0.0) if self.only else k
        G = 2.0 * (f - k * r) + 0.7 * r
        self.v, self.t = 0.999 * self.v + 0.001 * G**2, self.t + 1
        return G


# name: (how to build it, from the base's name the formula, which may have a memory)
RULES = {
    "restricted_gradient": (
        lambda b: RestrictedGradient(b, remember_weight=0.6),
        lambda base: whole(lambda f, r: surgery(f, r, 0.6)),
    ),
    "pcgrad by tensor": (lambda b: PCGrad(b, scope="tensor"), lambda base: each(surgery)),
    "munba": (MUNBa, lambda base: whole(nash)),
    "munba by tensor": (lambda b: MUNBa(b, scope="tensor"), lambda base: each(nash)),
    "sago": (
        lambda b: SAGO(b, forget_weight=1.5, remember_weight=0.5),
        lambda base: whole(gated),
    ),
    "sago, both": (
        lambda b: SAGO(b, forget_weight=1.5, remember_weight=0.5, both=True),
        lambda base: whole(lambda f, r: gated(f, r, both=True)),
    ),
    "gru": (GRU, lambda base: whole(Rectified(0.8, 0.0))),
    "gru, and remember": (
        lambda b: GRU(b, smoothing=0.5, remember_weight=0.4),
        lambda base: whole(Rectified(0.5, 0.4)),
    ),
    "gu": (
        lambda b: GU(b, forget_weight=2.0, remember_weight=0.7),
        lambda base: whole(Orthogonal(base == "adam")),
    ),
    "gu, conflicts only": (
        lambda b: GU(b, forget_weight=2.0, remember_weight=0.7, conflicts_only=True),
        lambda base: whole(Orthogonal(base == "adam", conflicts_only=True)),
    ),
}


def backward(opt, model, i, of=None):
    """One step's phases; `of` replaces the two gradients."""
    for name in opt.needs:
        with getattr(opt, name)():
            if of is None:
                model.loss(i, name).backward()
            else:
                at = zip(model.p, of[name], strict=True)
                sum((p * torch.from_numpy(g)).sum() for p, g in at).backward()
    opt.step()


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("name", RULES)
def test_every_step_is_the_formulas(name, base):
    build, formula = RULES[name]
    model, theta = Tiny(), Tiny().arrays()
    opt, rule, optimizer = (
        build(BASES[base][0](model.parameters())),
        formula(base),
        BASES[base][1](),
    )
    opposed = set()
    for i in range(STEPS):
        f, r = (gradient(theta, i, n) for n in ("forget", "remember"))
        opposed.add(bool(flat(f) @ flat(r) < 0))
        G = rule(f, r)
        theta = optimizer.step(theta, G)
        backward(opt, model, i)
        np.testing.assert_allclose(flat(model.arrays()), flat(theta), rtol=1e-9, atol=1e-11)
        assert opt.stats["update_norm"] == pytest.approx(np.linalg.norm(flat(G)), rel=1e-8)
    assert opposed == {True, False}


@pytest.mark.parametrize("base", BASES)
def test_aegis_projects_tensor_by_tensor_with_a_weight_that_learns(base):
    model, theta = Tiny(), Tiny().arrays()
    theta0, optimizer = theta, BASES[base][1]()
    opt = AEGIS(BASES[base][0](model.parameters()), mu=0.4)
    w, last, found = [0.0, 0.0], [np.zeros_like(p) for p in theta], set()
    for i in range(10):
        G = []
        for j, (p, p0, f) in enumerate(
            zip(theta, theta0, gradient(theta, i, "forget"), strict=True)
        ):
            r = 2 * (p - p0)
            square = (r * r).sum()
            projected = (f * r).sum() / square * r if square else np.zeros_like(r)
            w[j] = np.clip(w[j] - 0.4 * np.sign((f * last[j]).sum()), 0, 1e6)
            last[j] = projected
            conflict = (f * r).sum() < 0
            G.append(f - w[j] * projected if conflict else f)
            found.add((bool(conflict), w[j] > 0))
        theta = optimizer.step(theta, G)
        backward(opt, model, i)
        np.testing.assert_allclose(flat(model.arrays()), flat(theta), rtol=1e-9, atol=1e-11)
        assert opt.stats["projection_weight"] == pytest.approx(np.mean(w))
    assert (True, True) in found
    assert (False, False) in found


def test_aegis_does_not_lead_further_away_once_its_weight_is_one():
    w = nn.Parameter(torch.zeros(2, dtype=torch.float64))
    opt = AEGIS(torch.optim.SGD([w], lr=0.1), mu=1.0)
    for slope in ([1.0, 0.0], [-1.0, 0.0], [1.0, 0.2], [1.0, 1.0]):
        with opt.forget():
            (w * torch.tensor(slope, dtype=torch.float64)).sum().backward()
        before, r = w.detach().clone(), w.detach().clone()
        opt.step()
        if opt.stats["projection_weight"] >= 1:
            assert (r * (before - w.detach())).sum() >= -1e-12
    assert opt.anchor_of(w).eq(0).all()


# -- properties -----------------------------------------------------------------------------------


def random(seed):
    draw = np.random.default_rng(seed)
    return [[draw.standard_normal(p.shape) for p in Tiny().arrays()] for _ in range(2)]


def update(build, f, r, lr=1.0):
    model = Tiny()
    before = model.arrays()
    opt = build(torch.optim.SGD(model.parameters(), lr=lr))
    backward(opt, model, 0, {"forget": f, "remember": r})
    return (flat(before) - flat(model.arrays())) / lr, opt


@pytest.mark.parametrize("seed", range(6))
def test_what_is_kept_is_not_lost_to_first_order(seed):
    f, r = random(seed)
    for build in (
        lambda b: PCGrad(b),
        lambda b: RestrictedGradient(b),
        lambda b: GRU(b, smoothing=1.0),
        lambda b: MUNBa(b),
        lambda b: SAGO(b),
        lambda b: GU(b, conflicts_only=True),
    ):
        G, _ = update(build, f, r)
        # SAGO promises it scalar by scalar where signs differ
        assert G @ flat(r) >= -1e-9
        if build(torch.optim.SGD(Tiny().parameters())).__class__ in (PCGrad, MUNBa):
            assert G @ flat(f) >= -1e-9
    G, _ = update(lambda b: GU(b, remember_weight=0.0), f, r)
    assert abs(G @ flat(r)) < 1e-9  # orthogonal, in both directions
    G, _ = update(MUNBa, f, [1e6 * x for x in r])
    assert np.linalg.norm(G) == pytest.approx(np.sqrt(2))


def test_the_restricted_gradient_is_pcgrad_times_its_weight():
    f, r = random(1)
    f = [a - b for a, b in zip(f, r, strict=True)]
    ours, _ = update(lambda b: RestrictedGradient(b, remember_weight=4.0), f, r)
    theirs, _ = update(lambda b: PCGrad(b, forget_weight=0.25), f, r)
    np.testing.assert_allclose(ours, 4 * theirs, rtol=1e-12)


def zero(arrays):
    return [np.zeros_like(a) for a in arrays]


# name: what is left of the other where one gradient is zero, (forget alone, remember alone)
ALONE = {
    "pcgrad": (1.0, 1.0),
    "restricted_gradient": (1.0, 1.5),
    "sago": (1.0, 0.0),
    "gru": (1.0, 0.0),
    "gu": (1.0, 1.0),
    "upgrad": (0.5, 0.5),
    "mgda": (0.0, 0.0),
    "imtl_g": (1.0, 1.0),
    "aligned_mtl": (0.5, 0.5),
    "fairgrad": (1.0, 1.0),
}


@pytest.mark.parametrize("name", runnable(ALONE))
def test_gradients_of_zeros(name):
    f, r = random(2)
    build = methods[name].build
    for pair, expected in (
        ((f, zero(r)), ALONE[name][0] * flat(f)),
        ((zero(f), r), ALONE[name][1] * flat(r)),
        ((zero(f), zero(r)), 0 * flat(f)),
    ):
        G, _ = update(build, *pair)
        np.testing.assert_allclose(G, expected, rtol=1e-6, atol=1e-9)


def test_munba_of_a_gradient_of_zeros_is_the_others_direction():
    f, r = random(2)
    for pair, alone in (((f, zero(r)), f), ((zero(f), r), r)):
        G, _ = update(MUNBa, *pair)
        np.testing.assert_allclose(G, flat(alone) / np.linalg.norm(flat(alone)), rtol=1e-12)
    G, _ = update(MUNBa, zero(f), zero(r))
    assert not G.any()


# name: G of equal gradients as a multiple of one; FairGrad's is by the trace
EQUAL = {
    "pcgrad": 2.0,
    "restricted_gradient": 2.5,
    "sago": 1.0,
    "gru": 1.0,
    "gu": 1.0,
    "upgrad": 1.0,
    "mgda": 1.0,
    "imtl_g": 1.0,
    "aligned_mtl": 1.0,
    "fairgrad": 2.0,
}


@pytest.mark.parametrize("name", runnable(EQUAL))
def test_equal_and_opposite_gradients(name):
    f, _ = random(3)
    G, _ = update(methods[name].build, f, f)
    np.testing.assert_allclose(G, EQUAL[name] * flat(f), rtol=1e-6)
    G, _ = update(methods[name].build, f, [-x for x in f])
    # what is left: the kept gradient of SAGO and GU, else nothing
    left = {"sago": -1.0, "gu": -1.0}.get(name, 0.0)
    np.testing.assert_allclose(G, left * flat(f), atol=1e-6)


def test_munba_shrinks_to_zero_towards_opposite_gradients():
    f, r = random(3)
    norms = []
    for distance in (1e-1, 1e-2, 1e-3, 1e-4, 0.0):
        G, _ = update(MUNBa, f, [distance * b - a for a, b in zip(f, r, strict=True)])
        norms.append(np.linalg.norm(G))
    assert norms[0] == pytest.approx(np.sqrt(2))
    assert norms[2] > norms[3] > norms[4]
    assert norms[4] < 1e-9


# -- parts of the model ---------------------------------------------------------------------------


def two_layers():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)).double()


def of_module(names, grads, rule):
    """G by parameter, the rule on the vector of each module."""
    made = {}
    for module in sorted({n.rpartition(".")[0] for n in names}):
        mine = [n for n in names if n.rpartition(".")[0] == module]
        f, r = ([grads[k][n] for n in mine] for k in (0, 1))
        made |= dict(zip(mine, split(rule(flat(f), flat(r)), f), strict=True))
    return made


@NAMES
def test_a_module_is_one_vector():
    model = two_layers()
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    grads = [
        {
            n: np.random.default_rng([k, i]).standard_normal(tuple(p.shape))
            for i, (n, p) in enumerate(before.items())
        }
        for k in (0, 1)
    ]
    opt = PCGrad(torch.optim.SGD(model.named_parameters(), lr=1.0), scope="module")
    for phase, g in zip(("forget", "remember"), grads, strict=True):
        with getattr(opt, phase)():
            at = model.named_parameters()
            sum((p * torch.from_numpy(g[n])).sum() for n, p in at).backward()
    opt.step()
    expected = of_module(list(before), grads, surgery)
    for n, p in model.named_parameters():
        np.testing.assert_allclose((before[n] - p.detach()).numpy(), expected[n], rtol=1e-10)
    dots = [sum((grads[0][n] * grads[1][n]).sum() for n in before if n.startswith(m)) for m in "01"]
    assert (opt.stats["parts"], opt.stats["conflicts"]) == (2, sum(d < 0 for d in dots))


def test_modules_need_names_and_scopes_are_known():
    base = torch.optim.SGD(two_layers().parameters(), lr=1.0)
    for build in (PCGrad, RestrictedGradient, MUNBa, GRU, GU):
        with pytest.raises(ValueError, match=r'scope="module" needs .*named_parameters\(\)'):
            build(base, scope="module")
        with pytest.raises(ValueError, match="scope must be one of"):
            build(base, scope="layer")


@pytest.mark.parametrize(
    ("build", "named"),
    [
        (lambda b: SAGO(b, forget_weight=-1), "forget_weight must be finite"),
        (lambda b: GRU(b, smoothing=0.0), r"smoothing must be in \(0, 1\]; got 0.0"),
        (lambda b: GRU(b, remember_weight=float("nan")), "remember_weight must be finite"),
        (lambda b: GU(b, remember_weight=-1), "remember_weight must be finite"),
        (lambda b: AEGIS(b, mu=-1), "mu must be finite"),
        (lambda b: GU(torch.optim.Adam(b.param_groups[0]["params"], amsgrad=True)), "amsgrad"),
    ],
)
def test_numbers_out_of_range(build, named):
    with pytest.raises(ValueError, match=named):
        build(torch.optim.SGD(two_layers().parameters(), lr=1.0))


def test_a_skipped_step_leaves_the_running_mean():
    model, other = Tiny(), Tiny()
    opts = [GRU(torch.optim.SGD(m.parameters(), lr=0.1), nonfinite="skip") for m in (model, other)]
    backward(opts[0], model, 0)
    f, r = random(5)
    backward(opts[0], model, 0, {"forget": [np.inf * x for x in f], "remember": r})
    assert opts[0].skipped_steps == 1
    backward(opts[0], model, 1)
    for i in (0, 1):
        backward(opts[1], other, i)
    np.testing.assert_array_equal(flat(model.arrays()), flat(other.arrays()))


# -- TorchJD --------------------------------------------------------------------------------------


def upgrad(f, r):
    return surgery(f, r) / 2


def mgda(f, r):
    w = np.clip((r @ r - f @ r) / ((f - r) @ (f - r)), 0, 1)
    return w * f + (1 - w) * r


def imtl_g(f, r):
    u, v = 1 / np.linalg.norm(f), 1 / np.linalg.norm(r)
    return (u * f + v * r) / (u + v)


def aligned(f, r):
    J = np.stack([f, r])
    values, vectors = np.linalg.eigh(J @ J.T)
    root = vectors @ np.diag(values**-0.5) @ vectors.T
    return np.sqrt(values[0]) * root @ np.full(2, 0.5) @ J


def fair(f, r):
    return nash(f, r) * np.sqrt(f @ f + r @ r)


THEIRS = {
    "upgrad": upgrad,
    "mgda": mgda,
    "imtl_g": imtl_g,
    "aligned_mtl": aligned,
    "fairgrad": fair,
}


@pytest.mark.parametrize("scale", [1e-7, 1.0, 1e4])
@pytest.mark.parametrize("name", runnable(THEIRS))
def test_a_weighting_of_torchjds_is_its_formula_at_any_scale(name, scale):
    conflicts = set()
    for seed in range(5):
        f, r = ([scale * x for x in g] for g in random(seed))
        r = [x - y for x, y in zip(r, f, strict=True)] if seed % 2 else r
        r = [7 * x for x in r]
        conflicts.add(bool(flat(f) @ flat(r) < 0))
        G, _ = update(methods[name].build, f, r)
        np.testing.assert_allclose(G, THEIRS[name](flat(f), flat(r)), rtol=2e-5, atol=2e-6 * scale)
        by_tensor, _ = update(lambda b: methods[name].build(b, scope="tensor"), f, r)
        expected = flat(each(THEIRS[name])(f, r))
        np.testing.assert_allclose(by_tensor, expected, rtol=2e-5, atol=2e-6 * scale)
    assert conflicts == {True, False}


@pytest.mark.parametrize("name", runnable(["upgrad"]))
@pytest.mark.parametrize("seed", range(8))
def test_upgrad_opposes_neither(name, seed):
    f, r = random(seed)
    r = [(50 * (x - 2 * y)) for x, y in zip(r, f, strict=True)]
    G, _ = update(methods[name].build, f, r)
    norm = np.linalg.norm(G)
    assert G @ flat(f) >= -1e-6 * norm * np.linalg.norm(flat(f))
    assert G @ flat(r) >= -1e-6 * norm * np.linalg.norm(flat(r))


@pytest.mark.parametrize("scope", ["model", "tensor"])
def test_a_weighting_gets_gramians_in_float64_on_the_cpu_and_nothing_else(scope):
    """The same without TorchJD: anything of the form of its classes."""
    seen = []

    class Mine(nn.Module):
        def forward(self, gramian):
            seen.append(gramian)
            return torch.tensor([0.25, 4.0])

    f, r = random(0)
    build = lambda b: JacobianDescent(  # noqa: E731
        b, weighting=Mine(), forget_weight=2.0, normalise=scope == "model", scope=scope
    )
    G, opt = update(build, f, r)
    np.testing.assert_allclose(G, 0.5 * flat(f) + 4 * flat(r), rtol=1e-12)
    parts = (
        [(flat(f), flat(r))]
        if scope == "model"
        else [(a.ravel(), b.ravel()) for a, b in zip(f, r, strict=True)]
    )
    assert len(seen) == len(parts)
    for gramian, (a, b) in zip(seen, parts, strict=True):
        J = np.stack([2 * a, b])
        expected = J @ J.T / (np.trace(J @ J.T) if scope == "model" else 1)
        assert gramian.dtype == torch.float64
        np.testing.assert_allclose(gramian.numpy(), expected, rtol=1e-12)
    assert "weighting='Mine'" in repr(opt)


def test_a_weighting_that_is_not_there():
    base = torch.optim.SGD(two_layers().parameters(), lr=1.0)
    if lacks("mgda"):
        with pytest.raises(ImportError, match=r'pip install "ebu_optim\[torchjd\]"'):
            JacobianDescent(base, weighting="MGDA")
        pytest.skip(f"not installed: {lacks('mgda')}")
    with pytest.raises(ValueError, match=r"weighting='MGD' is not in torchjd; use .*MGDA"):
        JacobianDescent(base, weighting="MGD")
    with pytest.raises(ValueError, match="has options without a default"):
        JacobianDescent(base, weighting="CAGrad")
    given = import_module("torchjd.aggregation").IMTLGWeighting()
    f, r = random(0)
    G, _ = update(lambda b: JacobianDescent(b, weighting=given), f, r)
    np.testing.assert_allclose(G, imtl_g(flat(f), flat(r)), rtol=1e-9)


def test_every_weighting_of_the_table_is_tested():
    assert THEIRS.keys() == WEIGHTINGS.keys()
