"""Training through accelerate, with one process or several.

The tests call `train` themselves; `accelerate launch` runs this file with FOLDER and a page of
the docs.
"""

from __future__ import annotations

import itertools
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from torch import Tensor, nn
from torch.optim.lr_scheduler import StepLR
from torch.utils.data import DataLoader

from ebu_optim import EBUOptimizer

SAMPLES = 48  # three steps an epoch of 16 samples of each kind


def forget_state() -> None:
    """Accelerate keeps its state in the process."""
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


def assert_close(a, b) -> None:
    assert len(a) == len(b) > 1
    for got, want in zip(a, b):
        for what in ("weights", "fisher"):
            torch.testing.assert_close(got[what], want[what], rtol=1e-9, atol=1e-12)
        for what in ("forget_selected", "remember_selected", "overlap", "total"):
            assert got["stats"][what] == want["stats"][what]


def make(k: int, batch: int, sizes: tuple[int, int] = (SAMPLES, SAMPLES), **options: Any):
    """Accelerator, handle, and what was prepared: model, optimizer, loaders, schedule."""
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=k)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2)).double()
        data = torch.randn(2, max(sizes), 4, dtype=torch.float64)
    base = torch.optim.Adam(model.parameters(), lr=0.01)
    ebu = EBUOptimizer(base, **{"gamma": 3.0, "max_grad_norm": 0.5, **options})
    schedule = StepLR(ebu, 1, 0.9)
    loaders = [DataLoader(part[:n], batch_size=batch) for part, n in zip(data, sizes)]
    return accelerator, ebu, *accelerator.prepare(model, ebu, *loaders, schedule)


def loss(model: nn.Module, x: Tensor, forget: bool) -> Tensor:
    return (model(x) - (1 if forget else -1)).square().mean()


def phase(accelerator: Accelerator, ebu: EBUOptimizer, model: nn.Module, x: Tensor, name: str):
    with getattr(ebu, name)():
        accelerator.backward(loss(model, x, name == "forget"))


def snapshot(ebu: EBUOptimizer, model: nn.Module) -> dict[str, Any]:
    weights = [p.detach().clone() for p in model.parameters()]
    groups = ebu.state_dict()["param_groups"]
    fisher = [ebu.fisher_of(p).clone() for p in model.parameters()]
    return {"weights": weights, "fisher": fisher, "stats": ebu.stats, "lr": groups[0]["lr"]}


def train(
    made: Any, epochs: int = 2, orders: tuple[str, ...] = ("fr",), outside: bool = False
) -> list[dict[str, Any]]:
    """A snapshot after every step.

    Args:
        orders: of the phases, one a micro-batch in turn.
        outside: compute the forget loss before accumulate; `orders` is then "r".
    """
    accelerator, ebu, model, optimizer, forget, remember, schedule = made
    turns, history = itertools.cycle(orders), []
    for _ in range(epochs):
        for batch_f, batch_r in zip(forget, remember):
            if outside:
                phase(accelerator, ebu, model, batch_f, "forget")
            with accelerator.accumulate(model):
                for letter in next(turns):
                    name, x = ("forget", batch_f) if letter == "f" else ("remember", batch_r)
                    phase(accelerator, ebu, model, x, name)
                optimizer.step()
                schedule.step()
                optimizer.zero_grad()
            if accelerator.sync_gradients:
                history.append(snapshot(ebu, model))
    return history


def by_hand(made: Any) -> list[dict[str, Any]]:
    """An epoch of two micro-batches a step, the first under accelerator.no_sync."""
    accelerator, ebu, model, optimizer, forget, remember, schedule = made
    history = []
    for i, (batch_f, batch_r) in enumerate(zip(forget, remember)):
        with nullcontext() if i % 2 else accelerator.no_sync(model):
            for x, name in ((batch_f, "forget"), (batch_r, "remember")):
                with getattr(ebu, name)():
                    accelerator.backward(loss(model, x, name == "forget") / 2)
        if i % 2:
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            history.append(snapshot(ebu, model))
    return history


def resumed(made: Any, folder: Path) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The second epoch twice: gone on with, and from what was saved before it."""
    accelerator, *_ = made
    train(made, 1)
    accelerator.save_state(str(folder))
    accelerator.wait_for_everyone()
    once = train(made, 1)
    accelerator.load_state(str(folder))
    return once, train(made, 1)


def mistakes() -> dict[str, str]:
    """What the checks of the first steps say."""

    def forwards_first(accelerator, ebu, model, x, y):
        losses = loss(model, x, True), loss(model, y, False)
        for value, name in zip(losses, ("forget", "remember")):
            with getattr(ebu, name)():
                accelerator.backward(value)

    def no_sync(accelerator, ebu, model, x, y):
        with accelerator.no_sync(model):
            phase(accelerator, ebu, model, x, "forget")
            phase(accelerator, ebu, model, y, "remember")

    errors = {}
    for case in (forwards_first, no_sync):
        accelerator, ebu, model, optimizer, forget, remember, _ = make(1, 8)
        before = [p.detach().clone() for p in model.parameters()]
        case(accelerator, ebu, model, next(iter(forget)), next(iter(remember)))
        try:
            optimizer.step()
        except RuntimeError as e:
            errors[case.__name__] = str(e)
        assert all(map(torch.equal, before, model.parameters()))
    return errors


def run_page(page: Path, folder: Path) -> dict[str, Any]:
    from tests.test_docs import blocks, world

    forget_state()
    namespace: dict[str, Any] = world(folder)
    for code in blocks(page, "python"):
        exec(compile(code, page.name, "exec"), namespace)  # noqa: S102
    assert namespace["accelerator"].num_processes == 2
    return snapshot(namespace["ebu"], namespace["unet"])


def main(folder: Path, page: Path) -> None:
    accelerator = make(2, 4)[0]
    result = {
        "train": train(make(2, 4)),
        "mixed": train(make(2, 4), orders=("fr", "rf")),
        "outside": train(make(2, 4), orders=("r",), outside=True),
        "by hand": by_hand(make(1, 4)),
        "resumed": resumed(make(2, 4), folder / "run"),
        "mistakes": mistakes(),
        "page": run_page(page, folder / "page"),
    }
    assert accelerator.num_processes == 2
    torch.save(result, folder / f"{accelerator.process_index}.pt")
    accelerator.wait_for_everyone()
    accelerator.end_training()


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
