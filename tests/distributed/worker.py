"""What every rank runs: `python -m torch.distributed.run ... worker FOLDER SCENARIO...`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel as DDP

from ebu_optim import EBUOptimizer

from .launch import join, leave
from .training import EQUAL, ORDERS, REFUSED, STEPS, Net, backward, build, loss, train, world

# -- mistakes: the error of every rank, and whether anything was changed --------------------------


def attempt(opt: EBUOptimizer, m: nn.Module, order: Any) -> dict[str, Any]:
    """Run `order` and a step: the error, and what it left behind."""
    before = [p.detach().clone() for p in m.parameters()]
    error = None
    try:
        order()
        opt.step()
    except RuntimeError as e:
        error = str(e)
    changed = any(not torch.equal(a, b) for a, b in zip(before, m.parameters(), strict=True))
    own = {k: v for k, v in opt.state_dict()["param_groups"][0].items() if k.startswith("ebu")}
    return {"error": error, "changed": changed, "checks": opt.rank_checks, "own": own}


def both_forwards_first(opt: EBUOptimizer, m: nn.Module, spoil: float | None = None) -> None:
    loss_f, loss_r = loss(m, 0, True), loss(m, 0, False)
    if spoil is not None and world()[0] == 1:
        loss_r = loss_r * spoil
    with opt.forget():
        loss_f.backward()
    with opt.remember():
        loss_r.backward()


def trap(wrap: str = "plain", spoil: float | None = None, **options: Any):
    m, opt = build(wrap, **options)
    return attempt(opt, m, lambda: both_forwards_first(opt, m, spoil))


def good_step(wrap: str, order: str = "fr"):
    m, opt = build(wrap)
    return attempt(opt, m, lambda: backward(opt, m, 0, order))


def recovered():
    """Refused, then trained as it should be, with the same model and optimizer."""
    m, opt = build()
    assert attempt(opt, m, lambda: both_forwards_first(opt, m))["error"]
    assert all(p.grad is None for p in m.parameters())
    for i in range(STEPS):
        backward(opt, m, i)
        opt.step()
    return [p.detach().clone() for p in m.parameters()]


def trap_switched_off():
    m, opt = build()
    opt.rank_checks = 0
    return attempt(opt, m, lambda: both_forwards_first(opt, m))


def late_trap():
    """Two good steps, then the trap."""
    m, opt = build()
    for i in range(2):
        backward(opt, m, i)
        opt.step()
    return attempt(opt, m, lambda: both_forwards_first(opt, m))


def weights_differ(checks: int = 3, wrap: str | None = "plain"):
    m, opt = build(wrap)
    opt.rank_checks = checks
    if world()[0] == world()[1] - 1:
        with torch.no_grad():
            next(m.parameters())[0, 0] += 1e-9
    return attempt(opt, m, lambda: backward(opt, m, 0))


def without_ddp():
    m, opt = build(None)
    return attempt(opt, m, lambda: backward(opt, m, 0))


def everything_under_no_sync():
    m, opt = build()

    def order():
        with m.no_sync():
            backward(opt, m, 0)

    return attempt(opt, m, order)


def options_differ():
    m, opt = build(alpha=0.6 if world()[0] == 0 else 0.7)
    return attempt(opt, m, lambda: backward(opt, m, 0))


def fisher_differs():
    m = DDP(Net())
    fisher = {p: torch.full_like(p, 1.0 + world()[0]) for p in m.parameters()}
    opt = EBUOptimizer(torch.optim.Adam(m.parameters()), fisher=fisher)
    return attempt(opt, m, lambda: backward(opt, m, 0))


def independent():
    """Each rank trains a model of its own in one process group."""
    m, opt = build(None)
    opt.rank_checks = 0
    for i in range(STEPS + world()[0]):  # not even as many steps
        backward(opt, m, i)
        opt.step()
    return [p.detach().clone() for p in m.parameters()]


def gathers() -> list[int]:
    """How many collectives of ours each of six steps does; the second is skipped."""
    m, opt = build(nonfinite="skip")
    counts, calls, real = [], [], dist.all_gather
    dist.all_gather = lambda *a, **k: calls.append(1) or real(*a, **k)
    try:
        for i in range(6):
            backward(opt, m, i, factor=torch.nan if i == 1 and world()[0] == 1 else 1)
            calls.clear()
            opt.step()
            counts.append(len(calls))
    finally:
        dist.all_gather = real
    keys = str(opt.state_dict()["param_groups"])
    return counts + [int("rank_checks" in keys), opt.rank_checks]


# -- NaN, Inf and overflow on one rank's batch alone ----------------------------------------------


def nan_on_one_rank(nonfinite: str):
    m, opt = build(nonfinite=nonfinite)
    factor = torch.nan if world()[0] == 1 else 1
    result = attempt(opt, m, lambda: backward(opt, m, 0, factor=factor))
    backward(opt, m, 1)
    opt.step()
    return result | {
        "skipped": opt.skipped_steps,
        "weights": [p.detach().clone() for p in m.parameters()],
    }


def scaler(where: int | None = None, scales: tuple[float, ...] = (16.0,)):
    """fp16's way of stepping, float32 weights; an overflow on one rank in the second step."""
    m, opt = build(dtype=torch.float32)
    rank = world()[0]
    grad_scaler = torch.amp.GradScaler("cpu", init_scale=scales[rank % len(scales)])
    errors = []
    for i in range(4):
        factor = 1e38 if i == 1 and rank == where else 1
        for forget in (True, False):
            with opt.forget() if forget else opt.remember():
                grad_scaler.scale(loss(m, i, forget) * factor).backward()
        try:
            grad_scaler.step(opt)
        except RuntimeError as e:
            errors.append(str(e))
        grad_scaler.update()
        opt.zero_grad()
    return {
        "errors": errors,
        "scale": grad_scaler.get_scale(),
        "skipped": opt.skipped_steps,
        "weights": [p.detach().clone() for p in m.parameters()],
    }


SCENARIOS: dict[str, Any] = {
    **{f"train {wrap}": lambda wrap=wrap: train(wrap) for wrap in EQUAL},
    **{
        f"accumulate {wrap} {order}": lambda wrap=wrap, order=order: train(wrap, order)
        for wrap in ("plain", "view", "view+tiny")
        for order in ORDERS
    },
    "float32": lambda: train("view", dtype=torch.float32),
    "freeze": lambda: train("plain", unrelated="freeze"),
    "warmup": lambda: train("plain", warmup=True),
    **{f"trap {wrap}": lambda wrap=wrap: trap(wrap) for wrap in ("plain", "view", "tiny")},
    **{
        f"trap nan {mode}": lambda mode=mode: trap(spoil=torch.nan, nonfinite=mode)
        for mode in ("raise", "skip", "propagate")
    },
    **{w: lambda w=w: good_step(w) for w in REFUSED},
    "static accumulate": lambda: good_step("static", "ffrr"),
    "trap off": trap_switched_off,
    "late trap": late_trap,
    "recovered": recovered,
    "weights": weights_differ,
    "weights off": lambda: weights_differ(0),
    "without ddp": without_ddp,
    "no_sync": everything_under_no_sync,
    "options": options_differ,
    "fisher": fisher_differs,
    "independent": independent,
    "gathers": gathers,
    **{f"nan {mode}": lambda mode=mode: nan_on_one_rank(mode) for mode in ("raise", "skip")},
    "scaler": scaler,
    "scaler overflow": lambda: scaler(1),
    "scaler scales": lambda: scaler(None, (16.0, 32.0)),
}


def main(folder: str, names: list[str]) -> None:
    join()
    results = {}
    for name in names:
        print(f"{name} on rank {dist.get_rank()}", flush=True)
        results[name] = SCENARIOS[name]()
        dist.barrier()
    torch.save(results, Path(folder) / f"{dist.get_rank()}.pt")
    leave()


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
