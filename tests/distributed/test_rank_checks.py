"""Ranks that would part ways: all of them learn of it before a weight has moved."""

from __future__ import annotations

import re

import pytest
import torch

from ..steps import assert_same
from .launch import outcomes
from .training import Net, build, train

RANKS = [2, 4]
CAUGHT = {
    **{f"trap {wrap}": "differ in remember gradient.*inside forget" for wrap in ("plain", "view")},
    "trap tiny": "differ in remember gradient.*inside forget",
    # the NaN is on one rank alone, which would have skipped or raised by itself
    "trap nan raise": "differ in remember gradient.*inside forget",
    "trap nan skip": "differ in remember gradient.*inside forget",
    "trap nan propagate": "differ in remember gradient.*inside forget",
    "late trap": "differ in remember gradient.*inside forget",
    "subset": "differ in remember gradient.*find_unused_parameters=True",
    "static+subset": "differ in remember gradient.*no static_graph",
    "weights": "differ in weights.*same checkpoint",
    "without ddp": "differ in forget gradient, remember gradient.*not wrapped",
    "no_sync": "differ in forget gradient, remember gradient.*no_sync",
    "options": "differ in options.*same alpha",
    "fisher": "differ in Fisher.*same fisher",
    # torch's own refusals, also on every rank
    "static+branches": "static_graph",
    "static accumulate": "expect_autograd_hooks_",
    # gradients are equal on all ranks, so is what is done about them
    "nan raise": "non-finite gradients",
}
PASSED = ["trap off", "weights off", "nan skip"]
REST = ["recovered", "independent", "gathers", "scaler", "scaler overflow", "scaler scales"]


@pytest.fixture(scope="module", params=RANKS, ids=lambda n: f"{n}ranks")
def ranks(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    return outcomes(request.param, "worker", folder, *CAUGHT, *PASSED, *REST)


@pytest.mark.parametrize("scenario", CAUGHT)
def test_every_rank_raises_and_nothing_is_changed(ranks, scenario):
    steps = 2 if scenario == "late trap" else 0
    for results in ranks:
        got = results[scenario]
        assert got["error"] is not None
        assert re.search(CAUGHT[scenario], got["error"])
        assert not got["changed"]
        assert got["own"]["ebu_step"] == steps
        assert got["own"]["ebu_skipped"] == 0
        assert (got["own"]["ebu_fisher_mean"] is None) == (steps == 0)  # no F was updated either
        assert got["checks"] == 3 - steps
    assert len({results[scenario]["error"] for results in ranks}) == 1


def test_a_refused_step_leaves_nothing_behind(ranks):
    for results in ranks:
        torch.testing.assert_close(results["recovered"], train()[-1]["weights"])


def test_the_message_names_the_ranks_and_the_switch(ranks):
    error = ranks[0]["weights"]["error"]
    assert f"of {len(ranks)}, rank {len(ranks) - 1} and rank 0 differ" in error
    assert "opt.rank_checks = 0" in error
    others = ", ".join(map(str, range(1, len(ranks))))
    assert f"rank {others} and rank 0 differ" in ranks[0]["without ddp"]["error"]


@pytest.mark.parametrize("scenario", PASSED)
def test_what_is_switched_off_or_the_same_everywhere_passes(ranks, scenario):
    for results in ranks:
        got = results[scenario]
        assert got["error"] is None
        assert got["changed"] == (scenario != "nan skip")
        assert got["own"]["ebu_skipped"] == (scenario == "nan skip")


@pytest.mark.parametrize("mode", ["raise", "skip"])
def test_after_a_nan_on_one_rank_all_go_on_alike(ranks, mode):
    for results in ranks:
        got = results[f"nan {mode}"]
        assert_same(got["weights"], ranks[0][f"nan {mode}"]["weights"])
        assert all(w.isfinite().all() for w in got["weights"])
        assert not any(map(torch.equal, got["weights"], Net().parameters()))


def test_independent_processes_are_left_alone(ranks):
    last = ranks[0]["independent"]
    for results in ranks[1:]:
        assert not any(map(torch.equal, last, results["independent"]))
        last = results["independent"]


def test_three_accepted_steps_are_compared_and_nothing_is_saved(ranks):
    for results in ranks:
        # the second step is skipped: compared, and not counted
        assert results["gathers"] == [1, 1, 1, 1, 0, 0, 0, 0]


@pytest.mark.parametrize("scenario", ["scaler", "scaler overflow"])
def test_grad_scaler_decides_alike_on_all_ranks(ranks, scenario):
    """Each rank has its own, which looks at gradients that are equal."""
    for results in ranks:
        got = results[scenario]
        assert got["errors"] == []
        assert (got["scale"], got["skipped"]) == ((8.0, 1) if "over" in scenario else (16.0, 0))
        assert_same(got["weights"], ranks[0][scenario]["weights"])


def test_loss_scales_that_differ(ranks):
    for results in ranks:
        assert len(results["scaler scales"]["errors"]) == 4
        assert "differ in loss scale" in results["scaler scales"]["errors"][0]


def test_one_process_compares_nothing(monkeypatch):
    monkeypatch.setattr("torch.distributed.all_gather", None)
    train()
    _, opt = build()
    assert opt.rank_checks == 3
