"""The loop of docs/accelerate.md: accumulation, resuming, trackers; as one process and as two."""

from __future__ import annotations

import types

import pytest
import torch
from accelerate.tracking import GeneralTracker

from ebu_optim import EBUOptimizer

from ..processes import ROOT, python
from ..steps import assert_same
from .accelerated import assert_close, by_hand, loss, make, resumed, snapshot, train

PAGE = ROOT / "docs" / "accelerate.md"
pytestmark = pytest.mark.usefixtures("fresh_accelerate")


# -- the loop -----------------------------------------------------------------------------------


@pytest.mark.parametrize("k", [1, 2, 4])
@pytest.mark.parametrize("orders", ["fr", "rf", "fr rf", "rf fr"])
def test_k_micro_batches_are_one_batch_k_times_as_large(k, orders):
    got = train(make(k, 16 // k), orders=tuple(orders.split()))
    assert_close(got, train(make(1, 16)))


def test_through_accelerate_or_not_it_is_the_same_run():
    got = train(make(1, 16))
    _, ebu, model, _, forget, remember, _ = make(1, 16)
    schedule, want = torch.optim.lr_scheduler.StepLR(ebu, 1, 0.9), []
    for x, y in [*zip(forget, remember)] * 2:
        with ebu.forget():
            loss(model, x, True).backward()
        with ebu.remember():
            loss(model, y, False).backward()
        ebu.step()
        schedule.step()
        want.append(snapshot(ebu, model))
    assert_same(got, want)


@pytest.mark.parametrize("k", [1, 2])
@pytest.mark.parametrize("nonfinite", ["raise", "skip"])
def test_a_run_resumed_through_accelerate_is_the_same_run(k, nonfinite, tmp_path):
    once, again = resumed(make(k, 16 // k, nonfinite=nonfinite), tmp_path)
    assert_same(once, again)
    made = make(k, 16 // k, nonfinite=nonfinite)  # a new script, or another process
    made[0].load_state(str(tmp_path))
    assert_same(train(made, 1), once)


class Tracker(GeneralTracker):
    name, requires_logging_directory = "memory", False

    def __init__(self):
        super().__init__()
        self.logged = []

    @property
    def tracker(self):
        return self.logged

    def store_init_configuration(self, values):
        pass

    def log(self, values, step=None, **kwargs):
        self.logged.append((step, values))


def test_trackers_are_fed_on_the_steps_that_log(tmp_path, monkeypatch):
    """The page's own loop, with the figures of every second step."""
    from ..test_docs import blocks, world

    tracker, reads = Tracker(), []
    real = EBUOptimizer.stats.fget
    monkeypatch.setattr(EBUOptimizer, "stats", property(lambda self: reads.append(1) or real(self)))
    code = blocks(PAGE, "python")[0]
    for old, new in (('"all"', "tracker"), ("log_every, save", "log_every, save")):
        assert old in code
        code = code.replace(old, new)
    code = code.replace("= 0, 10, 100", "= 0, 2, 2")
    namespace = world(tmp_path) | {"tracker": tracker}
    exec(compile(code, PAGE.name, "exec"), namespace)  # noqa: S102
    ((step, values),) = tracker.logged
    assert step == namespace["steps"] == 2
    assert len(reads) == 1
    assert values["overlap"] > 0
    assert values["tau_f"] > 0
    assert all(isinstance(v, (int, float)) for v in values.values())
    assert (tmp_path / "step_2" / "optimizer.bin").exists()


# -- two processes ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """What `accelerated` found on each of two ranks, in one launch."""
    folder = tmp_path_factory.mktemp("two")
    done = python(
        "-m",
        "accelerate.commands.launch",
        "--multi_gpu",
        "--num_processes",
        2,
        "--num_machines",
        1,
        "--mixed_precision",
        "no",
        "--dynamo_backend",
        "no",
        "--main_process_port",
        0,
        "--module",
        "tests.distributed.accelerated",
        folder,
        PAGE,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(2)]


@pytest.mark.parametrize("what", ["train", "mixed", "outside", "by hand"])
def test_two_processes_are_equal_and_one_on_the_joined_batch(two, what):
    assert_same(two[0][what], two[1][what])
    one = make(1, 16)
    schedule = one[-1]
    schedule.step = types.MethodType(  # accelerate steps it once per process
        lambda self: [self.scheduler.step() for _ in range(2)], schedule
    )
    assert_close(two[0][what], train(one, 1 if what == "by hand" else 2))
    assert two[0][what][-1]["lr"] == pytest.approx(0.01 * 0.9 ** (2 * len(two[0][what])))


def test_no_sync_by_hand_in_one_process():
    assert_close(by_hand(make(1, 8)), train(make(1, 16), 1))


def test_two_processes_resume_bit_for_bit(two):
    for results in two:
        once, again = results["resumed"]
        assert_same(once, again)
        assert_same(once, two[0]["resumed"][0])


def test_two_processes_find_losses_before_phases_and_no_sync(two):
    for results in two:
        assert set(results["mistakes"]) == {"forwards_first", "no_sync"}
        assert "differ in remember gradient" in results["mistakes"]["forwards_first"]
        assert "differ in forget gradient, remember" in results["mistakes"]["no_sync"]


def test_the_page_runs_as_two_processes(two):
    assert_same(two[0]["page"], two[1]["page"])
