"""Parameters that are shards, in real processes: the thresholds and steps of one process."""

from __future__ import annotations

import math

import pytest
import torch

from ..steps import assert_same
from .launch import outcomes
from .shards import (
    EVERY,
    STEPS,
    VARIANTS,
    WIDTHS,
    backward,
    build,
    given,
    threshold,
    train,
)

TORCH = tuple(map(int, torch.__version__.split(".")[:2]))
pytestmark = pytest.mark.skipif(TORCH < (2, 6), reason="fully_shard came with torch 2.6")

TRAINS = [*EVERY, *VARIANTS]
OTHERS = ["fsdp, bf16", "unsynced", "given", "two meshes", "save"]
OTHERS += [f"collectives {kind}" for kind in ("7", "700", "hybrid", "float64")]
OTHERS += ["nan raise", "nan skip", "scaler forget", "scaler remember", "scaler nobody"]
EXACT = {"rtol": 0, "atol": 0}


@pytest.fixture(scope="module", params=[2, 4], ids=lambda n: f"{n}ranks")
def folder(request, tmp_path_factory):
    return request.param, tmp_path_factory.mktemp("shards")


@pytest.fixture(scope="module")
def ranks(folder):
    """Every scenario in one launch."""
    ranks, path = folder
    return outcomes(ranks, "shards", path, *TRAINS, *OTHERS)


@pytest.mark.parametrize("scenario", TRAINS)
def test_shards_take_the_steps_of_one_process(ranks, scenario):
    first, *others = (results[scenario] for results in ranks)
    assert len(first) == STEPS
    for other in others:
        assert_same(first, other)
    options = {k: v for k, v in VARIANTS.get(scenario, {}).items() if k != "order"}
    one = train("", width=WIDTHS.get(scenario, 7), **options)
    rtol, atol = (1e-3, 1e-6) if scenario == "float32" else (1e-9, 1e-12)
    for got, want in zip(first, one, strict=True):
        for what in ("weights", "fisher"):
            torch.testing.assert_close(got[what], want[what], rtol=rtol, atol=atol)
        for name, value in want["stats"].items():
            expected = pytest.approx(value, rel=1e3 * rtol, abs=1e3 * atol)
            assert got["stats"][name] == expected or math.isnan(value), name
    assert not torch.equal(one[0]["weights"][0], one[-1]["weights"][0])


@pytest.mark.parametrize("scenario", [*EVERY, "float32", "fsdp, bf16"])
def test_threshold_is_that_of_the_whole_gradients_bit_for_bit(ranks, scenario):
    for step in ranks[0][scenario]:
        for grads, tau in zip(step["grads"], step["stats"]["thresholds"], strict=True):
            n = sum(g.numel() for g in grads)
            assert tau == threshold(grads, math.floor(n * 0.5 + 0.5))
            selected = sum(int(((g.abs() >= tau) & (g != 0)).sum()) for g in grads)
            name = "forget_selected" if grads is step["grads"][0] else "remember_selected"
            assert step["stats"][name] == selected
    assert step["stats"]["total"] == n


def test_mixed_precision_keeps_float32_shards(ranks):
    """The forward pass ran in bf16: the gradients are near those of float32, not on them."""
    got, want = (h[0]["grads"] for h in (ranks[0]["fsdp, bf16"], train("", dtype=torch.float32)))
    for a, b in zip(got, want, strict=True):
        assert all(g.dtype == torch.float32 for g in a)
        a, b = (torch.cat([g.flatten() for g in grads]) for grads in (a, b))
        assert 1e-4 < (a - b).norm() / b.norm() < 0.05


def test_collectives_of_a_step_are_as_many_and_as_large_for_any_model(ranks, folder):
    """Three digits of float32 keys, five of float64; and the figures."""
    (small, *few), (large, *many) = (ranks[0][f"collectives {n}"] for n in (7, 700))
    assert 60 * small < large
    assert few == many
    own = [call for call in few if call[1] >= 0]
    both = 2 * 8  # thresholds, bytes of a count
    sizes = [2**11 * both, 2**10 * both, 2**10 * both, 14 * 8]
    assert own == [("all_reduce", size) for size in sizes]
    assert len(few) == 2 * len(own)  # CommDebugMode sees these and no others
    assert len(ranks[0]["collectives hybrid"]) == 1 + 2 * len(few)  # once a mesh dimension
    assert len(ranks[0]["collectives float64"]) == 1 + len(few) + 4


@pytest.mark.parametrize("how", ["raise", "skip"])
def test_nan_in_one_ranks_part_stops_all_of_them(ranks, how):
    for results in ranks:
        result = results[f"nan {how}"]
        assert result["skipped"] == (how == "skip")
        if how == "raise":
            assert "1 elements of the forget gradient, 0 of the remember" in result["error"]
        assert_same(result, ranks[0][f"nan {how}"])
        assert all(w.isfinite().all() for w in result["weights"])


@pytest.mark.parametrize("bad", ["forget", "remember"])
def test_overflow_in_one_ranks_part_skips_the_step_on_all_and_shrinks_the_scale_once(ranks, bad):
    for results in ranks:
        result, good = results[f"scaler {bad}"], results["scaler nobody"]
        assert result["scales"] == [16.0, 8.0, 8.0]
        assert result["skipped"] == 1
        assert good["scales"] == [16.0] * 3
        assert_same(result, ranks[0][f"scaler {bad}"])
    m, opt = build("", dtype=torch.float32)
    for i in (0, 2):
        backward(opt, m, i, "")
        opt.step()
    for got, want in zip(result["weights"], m.parameters(), strict=True):
        torch.testing.assert_close(got, want.detach(), rtol=1e-3, atol=1e-5)


def test_gradients_that_fsdp_keeps_to_itself_are_an_error(ranks):
    for results in ranks:
        assert "sync_each_batch=True" in results["unsynced"]
        assert "one mesh" in results["two meshes"]


def test_anchor_and_fisher_may_be_given_as_whole_tensors(ranks):
    want = given("")
    for results in ranks:
        torch.testing.assert_close(results["given"], want, rtol=1e-9, atol=1e-12)


def test_distributed_checkpoint_goes_on_with_as_many_two_and_one_ranks(ranks, folder):
    saved_on, path = folder
    want = [results["save"] for results in ranks]
    for other in want[1:]:
        assert_same(other, want[0])
    for n in {saved_on, 2, 1}:
        for got in outcomes(n, "shards", path, "load"):
            result = got["load"]
            loaded = result.pop("loaded anchors")
            torch.testing.assert_close(loaded, want[0]["anchors"], **EXACT)
            if n == saved_on:
                assert_same(result, want[0])
            assert result["steps"] == want[0]["steps"]
            assert result["count"] == want[0]["count"] == 4
            for what in ("weights", "moments", "fisher"):
                torch.testing.assert_close(result[what], want[0][what], rtol=1e-9, atol=1e-12)


def test_accelerates_fsdp2_prepares_accumulates_saves_and_loads(folder):
    ranks, path = folder
    if ranks != 2:
        pytest.skip("one number of ranks is enough: accelerate's code does not depend on it")
    pytest.importorskip("accelerate")
    for results in outcomes(2, "shards", path, "accelerate"):
        result = results["accelerate"]
        assert result["sharded"]
        assert_same(result["straight"], result["loaded"])
        want = train("")[-1]["weights"]
        torch.testing.assert_close(result["straight"], want, rtol=1e-9, atol=1e-12)
