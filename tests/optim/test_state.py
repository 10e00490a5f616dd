"""A resumed run is the same run, bit for bit, whatever carried its state."""

from __future__ import annotations

import copy
import io

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import (
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.optim import SGD, Adam

from ebu_optim import EBUOptimizer

from ..steps import BASES, NAMES, assert_same, build, net, params, run, snapshot


def saved(*objects: object) -> list:
    """Their state_dicts, through a file that holds nothing but tensors and plain values."""
    file = io.BytesIO()
    torch.save([o.state_dict() for o in objects], file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def resumed(name: str, fisher: str, at: int) -> None:
    m, opt = build(name, fisher)
    run(opt, m, range(at))
    model_state, state = saved(m, opt)
    run(opt, m, range(at, at + 3))

    n, other = build(name, fisher, fresh=True)
    n.load_state_dict(model_state)
    other.load_state_dict(state)
    assert all(other.state.values())  # an empty entry would count as a state
    run(other, n, range(at, at + 3))
    assert_same(snapshot(opt, m), snapshot(other, n))


@pytest.mark.parametrize("name", BASES)
@pytest.mark.parametrize("at", [0, 3])
def test_a_run_resumed_from_a_file_is_the_same_run(name, at):
    resumed(name, "online", at)


@pytest.mark.parametrize("fisher", ["none", "fixed", "online", "warm", "warming"])
@pytest.mark.parametrize("at", [0, 1, 4])
def test_a_run_resumed_from_a_file_is_the_same_run_for_every_fisher(fisher, at):
    resumed("adam", fisher, at)


@pytest.mark.parametrize("how", ["argument", "attribute", "group"])
def test_numbers_of_numpy_are_saved_as_plain_ones(how):
    """As np.linspace gives them to a sweep; no file without pickle holds them."""
    numbers = {
        "alpha": np.float64(0.25),
        "delta": (np.float32(0.5), np.float64(0.25)),
        "gamma": np.int64(3),
    }
    m = net()
    opt = EBUOptimizer(Adam(m.parameters()), **(numbers if how == "argument" else {}))
    for name, value in numbers.items():
        if how == "attribute":
            setattr(opt, name, value)
        elif how == "group":
            opt.param_groups[0][f"ebu_{name}"] = value
    run(opt, m, range(1))
    (state,) = saved(opt)
    (group,) = state["param_groups"]
    assert [group[f"ebu_{name}"] for name in numbers] == [0.25, (0.5, 0.25), 3]
    assert type(group["ebu_alpha"]) is float


@pytest.mark.parametrize("used", ["online", "warm"])
@pytest.mark.parametrize("at", [0, 2])
def test_loading_into_a_used_optimizer_rewinds_it(used, at):
    m, opt = build()
    run(opt, m, range(at))
    model_state, state = saved(m, opt)
    run(opt, m, range(at, at + 3))

    n, other = build(fisher=used)
    run(other, n, range(50, 53))
    n.load_state_dict(model_state)
    other.load_state_dict(state)
    run(other, n, range(at, at + 3))
    assert_same(snapshot(opt, m), snapshot(other, n))


def test_a_state_of_the_base_alone_loads_and_keeps_anchor_and_fisher():
    m, opt = build()
    run(opt, m, range(2))
    held = [opt.anchor_of(p).clone() for p in m.parameters()]
    run(opt, m, range(2, 3))
    other = Adam(net().parameters(), lr=0.5)
    opt.load_state_dict(other.state_dict())
    assert opt.param_groups[0]["lr"] == 0.5
    assert opt.alpha == 0.6
    assert not opt.state
    run(opt, m, range(3, 4))
    assert_same([opt.anchor_of(p) for p in m.parameters()], held)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_loading_keeps_the_dtypes_of_anchor_and_fisher(dtype):
    m, n = net(dtype), net(dtype)
    opt = EBUOptimizer(
        SGD(m.parameters(), lr=0.01),
        fisher={p: torch.full_like(p, 1e-9, dtype=torch.float32) for p in m.parameters()},
    )
    run(opt, m, range(1))
    other = EBUOptimizer(
        SGD(n.parameters(), lr=0.01), fisher={p: torch.ones_like(p) for p in n.parameters()}
    )
    other.load_state_dict(saved(opt)[0])
    for p, q in zip(m.parameters(), n.parameters(), strict=True):
        assert_same(other.anchor_of(q), opt.anchor_of(p))
        assert other.anchor_of(q).dtype == dtype
        assert other.fisher_of(q).dtype == torch.float32
        assert other.fisher_of(q).eq(1e-9).all()


def test_states_are_matched_by_position_where_their_ids_are_names():
    m, opt = build()
    run(opt, m, range(2))
    state = saved(opt)[0]
    names = [f"0.{n}" for n, _ in m.named_parameters()]
    state["state"] = {names[i]: state["state"][i] for i in reversed(range(4))}
    state["param_groups"][0]["params"] = names
    n, other = build(fresh=True)
    n.load_state_dict(m.state_dict())
    other.load_state_dict(state_dict=state)
    run(opt, m, range(2, 4))
    run(other, n, range(2, 4))
    assert_same(snapshot(opt, m), snapshot(other, n))


# -- names ------------------------------------------------------------------------------------


def named(order=(0, 1, 2, 3), groups=(4,), names=None, **options):
    """A network and its wrapper over named parameters in that order, in groups of those sizes."""
    m = net()
    pairs = [list(m.named_parameters())[i] for i in order]
    pairs = [(n if names is None else names(n), p) for n, p in pairs]
    cuts = [pairs[sum(groups[:g]) : sum(groups[: g + 1])] for g in range(len(groups))]
    made = [{"params": cut, "lr": 0.01 * (1 + int(cut[0][0][0]))} for cut in cuts]
    return m, EBUOptimizer(Adam(made), gamma=3.0, **options)


def by_name(opt):
    """Everything that is kept for a parameter, and the options of its group."""
    state, found = opt.state_dict(), {}
    for group in state["param_groups"]:
        rest = {k: v for k, v in group.items() if k not in ("params", "param_names")}
        for name, i in zip(group["param_names"], group["params"], strict=True):
            found[name] = (state["state"].get(i), rest)
    return found


@NAMES
@pytest.mark.parametrize("base_alone", [False, True])
@pytest.mark.parametrize(
    ("order", "groups", "was"),
    [((3, 1, 0, 2), (4,), (4,)), ((2, 3, 0, 1), (2, 2), (2, 2)), ((3, 1, 2, 0), (3, 1), (1, 3))],
    ids=["reordered", "groups swapped", "both"],
)
def test_a_state_of_another_order_is_matched_by_name(order, groups, was, base_alone):
    m, opt = named(groups=was)
    run(opt, m, range(3))
    n, other = named(order, groups)
    n.load_state_dict(m.state_dict())
    other.load_state_dict(saved(opt.base if base_alone else opt)[0])
    for p, q in zip(m.parameters(), n.parameters(), strict=True):
        assert_same(opt.state[p], other.state[q])
    if base_alone:
        return
    assert_same(by_name(opt), by_name(other))
    for p, q in zip(m.parameters(), n.parameters(), strict=True):
        assert_same(opt.anchor_of(p), other.anchor_of(q))
    for which, model in ((opt, m), (other, n)):
        run(which, model, range(3, 6))
    for a, b in zip(params(m), params(n), strict=True):
        torch.testing.assert_close(a, b)


@NAMES
def test_theta0_by_reference_is_known_in_another_order():
    m, opt = named(anchor_source="hub/model", anchor=dict(net().named_parameters()))
    run(opt, m, range(2))
    n, other = named((3, 1, 0, 2), anchor_source="hub/model", anchor=dict(net().named_parameters()))
    n.load_state_dict(m.state_dict())
    other.load_state_dict(saved(opt)[0])
    for p, q in zip(m.parameters(), n.parameters(), strict=True):
        assert_same(opt.fisher_of(p), other.fisher_of(q))


@NAMES
@pytest.mark.parametrize(
    ("order", "groups", "names"),
    [((1, 0, 2, 3), (4,), lambda n: n.replace("2.", "3.")), ((2, 1, 0, 3), (2, 2), None)],
    ids=["other names", "other groups"],
)
def test_names_in_other_places_among_others_are_refused(order, groups, names):
    m, opt = named(groups=groups)
    run(opt, m, range(2))
    n, other = named(order, groups, names)
    run(other, n, range(1))
    before = snapshot(other, n)
    with pytest.raises(
        ValueError, match=r"is parameter \d of group \d, but in the checkpoint it is"
    ):
        other.load_state_dict(saved(opt)[0])
    assert_same(snapshot(other, n), before)


@NAMES
def test_names_that_are_spelled_otherwise_are_matched_by_position_and_stay():
    m, opt = named()
    run(opt, m, range(2))
    n, other = named(names=lambda name: f"{name}.module")
    n.load_state_dict(m.state_dict())
    other.load_state_dict(saved(opt)[0])
    assert [s.name for s in other._slots()] == [f"{n}.module" for n, _ in m.named_parameters()]
    for which, model in ((opt, m), (other, n)):
        run(which, model, range(2, 4))
    assert_same(params(m), params(n))


@NAMES
@pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")
def test_distributed_checkpoint_restores_a_run_into_another_order(tmp_path):
    m, opt = named()
    run(opt, m, range(3))
    opt.zero_grad()
    dcp.save({"o": get_optimizer_state_dict(m, opt)}, checkpoint_id=tmp_path)
    n, other = named((3, 1, 0, 2))
    state = {"o": get_optimizer_state_dict(n, other)}
    dcp.load(state, checkpoint_id=tmp_path)
    set_optimizer_state_dict(n, other, state["o"])
    assert [s.name for s in other._slots()] == ["2.bias", "0.bias", "0.weight", "2.weight"]
    for p, q in zip(m.parameters(), n.parameters(), strict=True):
        assert_same(opt.fisher_of(p), other.fisher_of(q))
        assert_same(opt.state[p]["exp_avg"], other.state[q]["exp_avg"])


@pytest.mark.filterwarnings(
    "ignore:optimizer contains a parameter group with duplicate:UserWarning"
)
def test_the_state_of_a_tied_parameter_is_saved():
    made = []
    for _ in range(2):
        m = net()
        tied = [*m.parameters(), m[0].weight]
        made.append((m, EBUOptimizer(SGD(tied, lr=0.05), gamma=3.0)))
    (m, opt), (n, other) = made
    run(opt, m, range(2))
    n.load_state_dict(m.state_dict())
    other.load_state_dict(saved(opt)[0])
    for which, model in ((opt, m), (other, n)):
        run(which, model, range(2, 4))
    assert_same(snapshot(opt, m), snapshot(other, n))
    assert torch.equal(other.anchor_of(n[0].weight), net()[0].weight)


@pytest.mark.parametrize("name", ["sgd", "momentum", "adam", "adamw_fused"])
def test_a_keyword_closure_of_none_at_lr_0_initialises_the_base_alone(name):
    m, opt = build(name)
    ours = copy.deepcopy(opt.state_dict())
    rate, opt.param_groups[0]["lr"] = opt.param_groups[0]["lr"], 0.0
    for p in m.parameters():
        p.grad = torch.zeros_like(p)
    assert opt.step(closure=None) is None
    assert bool(opt.state) == (name != "sgd")
    assert_same(params(m), params(net()))
    opt.param_groups[0]["lr"] = rate
    now = opt.state_dict()
    assert_same(now["param_groups"], ours["param_groups"])
    for i, entry in now["state"].items():
        assert_same({k: v for k, v in entry.items() if k.startswith("ebu_")}, ours["state"][i])
    assert opt.stats == {}
    with pytest.raises(KeyError, match="anchor_of"):
        opt.anchor_of(m[0].weight)


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")
@pytest.mark.parametrize("name", ["sgd", "momentum", "adam", "amsgrad", "adamw_foreach"])
@pytest.mark.parametrize("fisher", ["none", "online", "warm"])
def test_distributed_checkpoint_restores_a_run(name, fisher, tmp_path):
    m, opt = build(name, fisher)
    run(opt, m, range(3))
    opt.zero_grad()
    dcp.save({"m": m.state_dict(), "o": get_optimizer_state_dict(m, opt)}, checkpoint_id=tmp_path)
    run(opt, m, range(3, 6))

    n, other = build(name, fisher, fresh=True)
    state = {"m": n.state_dict(), "o": get_optimizer_state_dict(n, other)}
    dcp.load(state, checkpoint_id=tmp_path)
    n.load_state_dict(state["m"])
    set_optimizer_state_dict(n, other, state["o"])
    run(other, n, range(3, 6))
    assert_same(snapshot(opt, m), snapshot(other, n))


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")
def test_distributed_checkpoint_keeps_a_small_fisher(tmp_path):
    pairs = []
    for _ in range(2):
        m = net(torch.float16)
        pairs.append((m, EBUOptimizer(SGD(m.parameters(), lr=0.01))))
    (m, opt), (n, other) = pairs
    for phase in (opt.forget, opt.remember):
        with phase():
            for p in m.parameters():
                p.grad = torch.full_like(p, 3e-5)
    opt.step()
    opt.zero_grad()  # torch 2.4 refuses where a base without a state has gradients
    dcp.save({"o": get_optimizer_state_dict(m, opt)}, checkpoint_id=tmp_path)
    state = {"o": get_optimizer_state_dict(n, other)}
    dcp.load(state, checkpoint_id=tmp_path)
    set_optimizer_state_dict(n, other, state["o"])
    for p, q in zip(m.parameters(), n.parameters(), strict=True):
        assert_same(other.fisher_of(q), opt.fisher_of(p))
        assert float(other.fisher_of(q).mean()) == pytest.approx(9e-10, rel=0.01)


def test_a_load_hook_may_replace_the_state():
    m, opt = build()
    run(opt, m, range(2))
    state = opt.state_dict()
    _, other = build(fresh=True)
    other.register_load_state_dict_pre_hook(lambda o, s: state)
    other.load_state_dict({})
    assert_same(other.state_dict(), state)
