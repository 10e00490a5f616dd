"""Bad input: the message names the argument, the value and a remedy, and nothing was changed."""

from __future__ import annotations

import copy
import math
import re

import pytest
import torch
from torch import nn
from torch._subclasses import FakeTensorMode
from torch.optim import LBFGS, SGD, Adam, Optimizer

from ebu_optim import EBUOptimizer

from ..steps import NAMES, assert_same, build, loss, net, params, phases, run, snapshot

NAN, INF = math.nan, math.inf
# argument, value, what the message must hold beside the argument's name
NUMBERS = [
    ("alpha", -0.1, r"\[0, 1\].*-0\.1"),
    ("alpha", 1.5, r"\[0, 1\].*1\.5"),
    ("alpha", NAN, r"\[0, 1\].*nan"),
    ("alpha", "0.5", r"number.*'0\.5'"),
    ("alpha", None, "number.*None"),
    ("alpha", True, "number.*True"),
    ("alpha", torch.tensor([0.1, 0.2]), "number.*tensor"),
    ("delta", 0.0, r"\(0, 1\].*0\.0"),
    ("delta", 1.01, r"\(0, 1\].*1\.01"),
    ("delta", NAN, r"\(0, 1\].*nan"),
    ("delta", "half", "number.*'half'"),
    ("delta", (0.5, 0.0), r"\(0, 1\].*0\.0"),
    ("delta", (-1, 0.5), r"\(0, 1\].*-1"),
    ("delta", [0.5, NAN], r"\(0, 1\].*nan"),
    ("delta", (0.5, "x"), "number.*'x'"),
    ("delta", (0.5,), r"pair.*\(0\.5,\)"),
    ("delta", (0.1, 0.2, 0.3), r"pair.*0\.3"),
    ("delta", (), r"pair.*\(\)"),
    ("gamma", -1, ">= 0.*-1"),
    ("gamma", NAN, "finite.*nan"),
    ("gamma", INF, "finite.*inf"),
    ("gamma", "big", "number.*'big'"),
    ("gamma", None, "number.*None"),
]
OPTIONS = [
    ("max_grad_norm", 0, "> 0 or None.*0"),
    ("max_grad_norm", -1.0, "> 0 or None.*-1"),
    ("max_grad_norm", NAN, "> 0 or None.*nan"),
    ("max_grad_norm", "1", "number.*'1'"),
    ("max_grad_norm", True, "number.*True"),
    ("penalty", "all", "'partial', 'full', 'none'.*'all'"),
    ("penalty", None, "'none'.*None"),
    ("update", "sum", "'added', 'replaced', 'routed'.*'sum'"),
    ("unrelated", True, "'update', 'freeze'.*True"),
    ("granularity", "layer", "'model', 'tensor'.*'layer'"),
    ("nonfinite", "ignore", "'raise', 'skip', 'propagate'.*'ignore'"),
    ("fisher_scale", "log", "'unit', 'raw'.*'log'"),
    ("fisher", "offline", "'online'.*'offline'"),
    ("terms", (), r"at least one.*\(\)"),
    ("terms", ("forget", "forget"), "each once.*'forget', 'forget'"),
    ("terms", ("forget", "all"), "'modulated'.*'all'"),
    ("terms", "both", "'remember'.*'both'"),
    ("terms", None, "'remember'.*None"),
    ("terms", 3, "'remember'.*3"),
]


def ids(table):
    return [f"{name}={value!r}".replace("\n", "") for name, value, _ in table]


def refused(m: nn.Module, error, match: str, **options) -> None:
    """Construction fails with such a message and leaves the base as it was."""
    base = Adam(m.named_parameters() if options.pop("named", False) else m.parameters(), lr=0.01)
    before = copy.deepcopy(base.state_dict())
    with pytest.raises(error) as raised:
        EBUOptimizer(base, **options)
    assert re.search(match, str(raised.value), re.DOTALL), raised.value
    assert_same(base.state_dict(), before)


@pytest.mark.parametrize(("name", "value", "match"), NUMBERS, ids=ids(NUMBERS))
def test_numbers_out_of_range(name, value, match):
    match = f"{name}.*{match}"
    refused(net(), ValueError, match, **{name: value})

    m, opt = build()
    phases(opt, m)
    before = snapshot(opt, m)
    with pytest.raises(ValueError) as raised:  # noqa: PT011
        setattr(opt, name, value)
    assert re.search(match, str(raised.value), re.DOTALL), raised.value
    assert_same(snapshot(opt, m), before)

    good = opt.param_groups[0][f"ebu_{name}"]
    opt.param_groups[0][f"ebu_{name}"] = value
    with pytest.raises(ValueError) as raised:  # noqa: PT011
        opt.step()
    assert re.search(match, str(raised.value), re.DOTALL), raised.value
    opt.param_groups[0][f"ebu_{name}"] = good
    assert_same(snapshot(opt, m), before)
    opt.step()  # the gradients are still there
    n, other = build()
    run(other, n, range(1))
    assert_same(snapshot(opt, m), snapshot(other, n))

    group = {"params": [nn.Parameter(torch.ones(2))], f"ebu_{name}": value}
    with pytest.raises(ValueError, match=name):
        opt.add_param_group(group)
    assert_same(snapshot(opt, m), snapshot(other, n))


@pytest.mark.parametrize(("name", "value", "match"), OPTIONS, ids=ids(OPTIONS))
def test_unknown_options(name, value, match):
    error = (ValueError, TypeError) if name == "terms" else ValueError
    refused(net(), error, f"{name}.*{match}", **{name: value})


def test_a_refused_attempt_leaves_no_mark_on_the_next():
    base = Adam(net().double().parameters())
    with pytest.raises(RuntimeError, match="fused"):
        EBUOptimizer(base, alpha=0.9, fused=True)
    assert EBUOptimizer(base, alpha=0.1).alpha == 0.1


def test_routed_needs_all_three_terms():
    match = "terms=.*'forget', 'remember'.*routed.*\"added\""
    refused(net(), ValueError, match, update="routed", terms=("forget", "remember"))


def test_fused_is_not_there_for_this_dtype():
    refused(net().double(), RuntimeError, "fused=True.*(float64|_cpu).*fused=None", fused=True)


@pytest.mark.parametrize("base", [None, 3, [], Adam, "adam", net()], ids=str)
def test_base_is_no_optimizer(base):
    with pytest.raises(TypeError, match=r"base must be a torch.optim.Optimizer, such as.*got <"):
        EBUOptimizer(base)


def test_base_that_needs_a_closure():
    class Needs(Optimizer):
        def __init__(self, p):
            super().__init__(p, {})

        def step(self, closure):
            return closure()

    for base in (LBFGS(net().parameters()), Needs(net().parameters())):
        with pytest.raises(TypeError, match=f"base {type(base).__name__}.*closure.*use an"):
            EBUOptimizer(base)


STRANGE = pytest.mark.parametrize("dtype", [torch.complex64, torch.int32])


def strange(dtype: torch.dtype) -> torch.Tensor:
    return torch.ones(3, dtype=dtype, requires_grad=dtype.is_complex)


@STRANGE
def test_complex_and_integer_parameters(dtype):
    base = SGD([*net().parameters(), strange(dtype)], lr=0.1)
    with pytest.raises(TypeError, match=rf"parameter 4 of group 0.*{dtype}.*must be real floating"):
        EBUOptimizer(base)


@STRANGE
def test_complex_and_integer_parameters_in_a_new_group(dtype):
    m, opt = build()
    run(opt, m, range(1))
    before = snapshot(opt, m)
    with pytest.raises(TypeError, match=rf"{dtype}.*must be real floating"):
        opt.add_param_group({"params": [strange(dtype)]})
    assert_same(snapshot(opt, m), before)
    run(opt, m, range(1, 2))


def test_parameters_on_the_meta_device():
    with torch.device("meta"):
        m = net()
    with pytest.raises(
        TypeError, match=r"parameter 0 of group 0 is on the meta device.*assign=True"
    ):
        EBUOptimizer(SGD(m.parameters(), lr=0.1))
    _, opt = build()
    with pytest.raises(TypeError, match=r"parameter 1 of the new group is on the meta device"):
        opt.add_param_group({"params": [nn.Parameter(torch.ones(2)), m[0].bias]})
    assert len(opt.param_groups) == 1


def test_a_device_without_float64():
    # a stand-in for Apple's MPS, which is not here to try
    with FakeTensorMode():
        p = nn.Parameter(torch.zeros(2, device="mps"))
    with pytest.raises(TypeError, match=r"parameter 0 of group 0 is on mps.*float64.*\.cpu\(\)"):
        EBUOptimizer(SGD([p], lr=0.1))
    opt = EBUOptimizer(SGD([nn.Parameter(torch.zeros(2))], lr=0.1))
    with pytest.raises(TypeError, match=r"parameter 0 of the new group is on mps"):
        opt.add_param_group({"params": [p]})
    opt.param_groups[0]["params"] = [p]  # moved after the optimizer was built
    with pytest.raises(TypeError, match=r"parameter 0 .*on mps.*float64"), opt.forget():
        pytest.fail("the phase began")


@pytest.mark.parametrize("phase", ["forget", "remember"])
def test_sparse_gradients(phase):
    def build_embedding():
        with torch.random.fork_rng():
            torch.manual_seed(0)
            m = nn.Embedding(5, 3, sparse=True)
        return m, EBUOptimizer(SGD(m.parameters(), lr=0.1))

    m, opt = build_embedding()
    before = m.weight.detach().clone()
    with pytest.raises(TypeError, match=r"parameter 0.*layout.*sparse.*sparse=False"):  # noqa: PT012
        for name in ("forget", "remember"):
            m.sparse = name == phase
            with getattr(opt, name)():
                m(torch.tensor([1, 3])).square().sum().backward()
    assert torch.equal(m.weight, before)
    n, other = build_embedding()
    for model, o in ((m, opt), (n, other)):
        model.sparse = False
        o.step(*[lambda q=model: q(torch.tensor([1, 3])).square().sum().backward()] * 2)
    assert_same(snapshot(opt, m), snapshot(other, n))


MAPS = pytest.mark.parametrize("argument", ["fisher", "anchor"])


def edited(m: nn.Module, change, named: bool) -> dict:
    tensors = {n if named else p: p.detach().abs() for n, p in m.named_parameters()}
    first = next(iter(tensors))
    if change is None:
        del tensors[first]
    else:
        tensors[first] = change(tensors[first])
    return tensors


@MAPS
@pytest.mark.parametrize("named", [pytest.param(True, marks=NAMES), False])
@pytest.mark.parametrize(
    ("change", "match"),
    [
        (None, "has no tensor for {}"),
        (lambda t: t.t(), r"\[{}.*\].*\(4, 8\).*\(8, 4\).*another model"),
        (lambda t: t.sum(), r"\[{}.*\].*\(\).*\(8, 4\)"),
        (lambda t: t.index_fill(0, torch.tensor(1), NAN), r"\[{}.*\].*NaN.*again"),
        (lambda t: t.index_fill(0, torch.tensor(1), INF), r"\[{}.*\].*Inf.*again"),
        (lambda t: 1.0, r"\[{}.*\].*(float|1\.0)"),
    ],
    ids=["missing", "transposed", "scalar", "nan", "inf", "number"],
)
def test_a_mapping_with_a_wrong_tensor(argument, named, change, match):
    m = net()
    mapping = edited(m, change, named)
    match = argument + ".*" + match.format("0.weight" if named else "parameter 0")
    refused(m, (ValueError, TypeError), match, named=named, **{argument: mapping})


@pytest.mark.parametrize("named", [pytest.param(True, marks=NAMES), False])
def test_a_negative_fisher_and_a_negative_anchor(named):
    m = net()
    mapping = edited(m, lambda t: t - 1, named)
    name = r"0\.weight" if named else "parameter 0"
    match = rf"fisher\[{name}.*negative.*clamp"
    refused(m, ValueError, match, named=named, fisher=mapping)
    base = Adam(m.named_parameters() if named else m.parameters())
    EBUOptimizer(base, anchor=mapping)


@NAMES
@MAPS
def test_a_mapping_with_other_names(argument):
    m = net()
    mapping = {f"model.{n}": p.detach().abs() for n, p in m.named_parameters()}
    match = rf"{argument} has no tensor for 0\.weight.*1 more.*4 entries: model\.0\.weight"
    refused(m, ValueError, match, named=True, **{argument: mapping})
    match = rf"{argument} has names as keys.*named_parameters\(\).*use parameters as keys"
    refused(m, ValueError, match, **{argument: mapping})
    refused(m, ValueError, rf"{argument} has no tensor for parameter 0", **{argument: {}})


@MAPS
@pytest.mark.parametrize("value", [3, [torch.ones(2)], torch.ones(2)], ids=["3", "list", "tensor"])
def test_no_mapping_at_all(argument, value):
    match = rf"{argument} must be a mapping.*{type(value).__name__}"
    refused(net(), TypeError, match, **{argument: value})


def test_a_parameter_that_changed_its_shape():
    m, opt = build("sgd")
    run(opt, m, range(2))
    before, old = snapshot(opt, m), m[2].bias.data
    for phase in (opt.forget, opt.remember):
        opt.zero_grad()
        m[2].bias.data = torch.zeros(3)
        with pytest.raises(ValueError, match=r"parameter 3 .*\(3,\).*\(2,\).*build a new"):
            phase().__enter__()
        m[2].bias.data = old
        assert_same(snapshot(opt, m), before)
    run(opt, m, range(2, 4))
    n, other = build("sgd")
    run(other, n, range(4))
    assert_same(snapshot(opt, m), snapshot(other, n))


def other_model(what: str) -> nn.Module:
    if what == "shapes":
        return nn.Sequential(nn.Linear(4, 9), nn.Tanh(), nn.Linear(9, 2))
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2, bias=what != "parameters"))


@pytest.mark.parametrize("what", ["groups", "parameters", "shapes"])
@pytest.mark.parametrize("steps", [0, 2])
def test_a_checkpoint_of_another_model(what, steps):
    n = other_model(what)
    groups = [{"params": list(layer.parameters())} for layer in (n[0], n[2])]
    other = EBUOptimizer(Adam(groups if what == "groups" else n.parameters(), lr=0.5), alpha=0.1)
    run(other, n, range(steps))
    m, opt = build()
    run(opt, m, range(2))
    phases(opt, m, 2)
    before = snapshot(opt, m)
    with pytest.raises(ValueError, match=r"has .*\d.* has .*\d.*checkpoint of another model"):
        opt.load_state_dict(other.state_dict())
    assert_same(snapshot(opt, m), before)
    opt.step()  # the gradients are still there too
    twin, fresh = build()
    run(fresh, twin, range(3))
    assert_same(snapshot(opt, m), snapshot(fresh, twin))


def test_a_new_group_with_a_fixed_fisher():
    m, opt = build(fisher="fixed")
    run(opt, m, range(1))
    before = snapshot(opt, m)
    with pytest.raises(ValueError, match=r"add_param_group: fisher.*build a new EBUOptimizer"):
        opt.add_param_group({"params": [nn.Parameter(torch.ones(2))]})
    assert_same(snapshot(opt, m), before)
    run(opt, m, range(1, 2))


def test_asking_for_tensors_that_are_not_held():
    m, opt = build(fisher="none")
    run(opt, m, range(1))
    with pytest.raises(KeyError, match="fisher_of: no Fisher is held"):
        opt.fisher_of(m[0].weight)
    with pytest.raises(KeyError, match="anchor_of: no anchor is held"):
        opt.anchor_of(nn.Parameter(torch.ones(1)))


def test_warming_up_too_late():
    m, opt = build()
    run(opt, m, range(1))
    before = snapshot(opt, m)
    with pytest.raises(RuntimeError, match=r"warmup_fisher.*before the first.*steps: 1"):
        opt.warmup_fisher([lambda: loss(m, 0, False).backward()])
    assert_same(snapshot(opt, m), before)
    m, opt = build(fisher="none")
    with pytest.raises(RuntimeError, match=r"warmup_fisher.*\"online\".*none"):
        opt.warmup_fisher([lambda: loss(m, 0, False).backward()])
    assert_same(params(m), params(net()))
