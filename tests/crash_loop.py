"""A small run that may be killed at any moment, and the process that forks, kills and restarts it.

    python -m tests.crash_loop FOLDER

torch is imported once here; every life of the run is a fork, made before this process has computed
anything. FOLDER/report.json says what happened.
"""

from __future__ import annotations

import json
import os
import random
import resource
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.optim import AdamW
from torch.optim.lr_scheduler import CosineAnnealingLR

from ebu_optim import EBUOptimizer
from ebu_optim.checkpoint import _files as _checkpoint_files
from ebu_optim.checkpoint import latest_checkpoint, load_checkpoint, save_checkpoint

STEPS, EVERY, KILLS, SEED = 80, 4, 20, 0


def objects() -> dict[str, Any]:
    """A run at its start. The seeds are of the initial weights and of all that is drawn later."""
    torch.manual_seed(1)
    np.random.seed(2)  # noqa: NPY002
    random.seed(3)
    model = nn.Sequential(nn.Linear(6, 24), nn.Tanh(), nn.Dropout(0.3), nn.Linear(24, 3))
    opt = EBUOptimizer(AdamW(model.parameters(), lr=1e-2), max_grad_norm=1.0)
    return {
        "model": model,
        "opt": opt,
        "schedule": CosineAnnealingLR(opt, T_max=STEPS),
        "scaler": torch.amp.GradScaler("cpu", init_scale=64.0, growth_interval=7),
        "generator": torch.Generator().manual_seed(4),
        "progress": {"losses": []},
    }


def train(run: dict[str, Any], step: int) -> None:
    """One step, which draws from every random state there is."""
    model, opt, scaler = run["model"], run["opt"], run["scaler"]
    losses = []
    for phase, sign in ((opt.forget, -1.0), (opt.remember, 1.0)):
        with phase():
            x = torch.randn(8, 6) * random.uniform(0.5, 1.5)
            y = torch.from_numpy(np.random.normal(size=(8, 3))).float()  # noqa: NPY002
            y = y + torch.randn(8, 3, generator=run["generator"])
            loss = (model(x) - sign * y).square().mean()
            scaler.scale(loss).backward()
            losses.append(loss.item())
    scaler.step(opt)
    scaler.update()
    opt.zero_grad()
    run["schedule"].step()
    run["progress"]["losses"].append(losses)


def go_on(folder: Path) -> None:
    """From the last complete checkpoint to the end; everything there is goes into final.pt."""
    run = objects()
    for step in range(load_checkpoint(folder / "run", run), STEPS):
        train(run, step)
        if (step + 1) % EVERY == 0 and step + 1 < STEPS:  # the stats are those of a step
            save_checkpoint(folder / "run", step + 1, run)
    states = {name: getattr(o, "state_dict", lambda o=o: o)() for name, o in run.items()}
    states["generator"] = run["generator"].get_state()
    states["stats"] = {k: v for k, v in run["opt"].stats.items() if isinstance(v, (int, float))}
    states["next draws"] = [torch.rand(1).item(), np.random.rand(), random.random()]  # noqa: NPY002
    torch.save(states, folder / "unfinished.pt")
    os.replace(folder / "unfinished.pt", folder / "final.pt")


def kill_at(moment: int, below: Path, called: str | None = None) -> list[str]:
    """SIGKILL this process at the `moment`-th thing it does to the disk below a folder: before it
    opens, renames or removes a file, in the middle of a write of some length, before and after an
    fsync. The list fills with the moments that went by; exit status 5 where `moment` is not the one
    that is `called` so."""
    passed: list[str] = []

    def now(what: str) -> None:
        if len(passed) == moment:
            if called not in (None, what):
                os._exit(5)
            os.kill(os.getpid(), signal.SIGKILL)
        passed.append(what)

    def heard(event: str, arguments: tuple[Any, ...]) -> None:
        if event not in ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir"):
            return
        name = str(arguments[0])  # inside shutil.rmtree relative to an open folder
        if name.startswith(str(below)) or not name.startswith("/"):
            now(f"before {event} {name}")

    real_sync, real_write = os.fsync, _checkpoint_files._Hashing.write

    def fsync(descriptor: int) -> None:
        now("before fsync")
        real_sync(descriptor)
        now("after fsync")

    def write(self: Any, data: Any) -> int:
        half = len(data) // 2
        # torch writes a hundred small pieces, and random states in now four, now five longer ones
        if half < 32 or self.file.name.endswith("random.pt"):
            return real_write(self, data)
        real_write(self, data[:half])
        self.file.flush()
        now("half written")
        return half + real_write(self, data[half:])

    sys.addaudithook(heard)
    os.fsync, _checkpoint_files._Hashing.write = fsync, write
    return passed


def kill_after(seconds: float) -> None:
    """As SIGKILL would, wherever this process is when it has worked so long: on a busy machine it
    is as far by then as on an idle one."""
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    signal.setitimer(signal.ITIMER_PROF, seconds)


def work_of_children() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def life(
    do: Callable[[], None],
    wait: Callable[[], None] | None = None,
    how: signal.Signals = signal.SIGKILL,
) -> int:
    """`do` in a fork, which gets a signal when `wait` returns; its exit status, -9 if killed."""
    pid = os.fork()
    if pid == 0:
        try:
            do()
            os._exit(0)
        except BaseException:
            import traceback

            traceback.print_exc()
            os._exit(1)
    if wait is not None:
        wait()
        os.kill(pid, how)  # a zombie until it is waited for: nobody else's id
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def hidden(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.glob(".*"))


def random_moments(folder: Path) -> dict[str, Any]:
    """KILLS lives that are killed; a run that comes to its end before is compared and begun
    again."""
    draw = random.Random(SEED)
    start = work_of_children()
    assert life(lambda: go_on(folder / "whole")) == 0
    length = work_of_children() - start
    kills: list[Any] = []
    ends = 0
    while len(kills) < KILLS or not (folder / f"killed{ends}" / "final.pt").exists():
        run = folder / f"killed{ends}"
        run.mkdir(exist_ok=True)
        if len(kills) >= KILLS:
            how, status = "to the end", life(lambda run=run: go_on(run))
        elif len(kills) % 2:
            seconds = draw.uniform(0, length / 3)

            def timed(run: Path = run, seconds: float = seconds) -> None:
                kill_after(seconds)
                go_on(run)

            how, status = "by the clock", life(timed)
        else:
            moment = draw.randrange(200)

            def aimed(run: Path = run, moment: int = moment) -> None:
                kill_at(moment, run / "run")
                go_on(run)

            how, status = "in a save", life(aimed)
        assert status in (0, -signal.SIGKILL, -signal.SIGPROF), status
        if status:
            newest = latest_checkpoint(run / "run")
            kills.append((how, newest and newest.name, hidden(run / "run")))
        elif len(kills) < KILLS:
            ends += 1
    return {"length": length, "kills": kills, "runs": ends + 1}


def every_moment(folder: Path) -> dict[str, list[list[Any]]]:
    """A save of step 3 beside steps 1 and 2, which deletes 1, killed at each of its moments in
    turn, and one of step 2, which is replaced, at those from its last write on. For each of the two
    the moments, and what was found there: the new checkpoint (True) or the old (False)."""
    base = folder / "base"

    def state(step: int) -> dict[str, Any]:
        return {"a": {"step": step, "t": torch.full((300,), float(step))}, "b": {"s": [step]}}

    def save(run: Path, step: int, moment: int, called: str | None = None) -> None:
        passed = kill_at(moment, run, called)
        save_checkpoint(run, step, state(20 + step))
        run.with_suffix(".json").write_text(json.dumps(passed))

    for step in (1, 2):
        save_checkpoint(base, step, state(step))
    seen = {}
    for step in (3, 2):
        run = folder / f"save{step}"
        shutil.copytree(base, run)
        assert life(lambda run=run, step=step: save(run, step, 10**6)) == 0
        moments = json.loads(run.with_suffix(".json").read_text())
        last_write = max(i for i, what in enumerate(moments) if what == "half written")
        seen[str(step)] = []
        for i in range(last_write if step == 2 else 0, len(moments)):
            shutil.rmtree(run)
            shutil.copytree(base, run)
            status = life(lambda run=run, step=step, i=i, w=moments[i]: save(run, step, i, w))
            assert status == -signal.SIGKILL, (step, moments[i], status)
            seen[str(step)].append([moments[i], found_new(run, step, state)])
    return seen


def found_new(run: Path, step: int, state: Callable[[int], dict[str, Any]]) -> bool:
    """After a killed save of `step`: the old or the new state is there, whole, and the next save
    leaves nothing lying about."""
    found: dict[str, Any] = {"a": {}, "b": {}}
    at = load_checkpoint(run, found)
    value = found["a"]["step"]
    assert (at, value) in ((2, 2), (step, 20 + step)), (at, value)
    assert found["b"] == {"s": [value]}
    assert found["a"]["t"].eq(value).all()
    save_checkpoint(run, 4, state(4))
    assert hidden(run) == []
    names = sorted(p.name for p in run.iterdir())
    assert names == [f"step_{s:08d}" for s in (at, 4)], names
    return value > 20


if __name__ == "__main__":
    where = Path(sys.argv[1]).resolve()
    AdamW([nn.Parameter(torch.zeros(1))])  # the first one imports a thousand modules
    (where / "whole").mkdir()
    report: dict[str, Any] = {}
    for part in (random_moments, every_moment):
        report[part.__name__] = part(where)
    (where / "report.json").write_text(json.dumps(report))
