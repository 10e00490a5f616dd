"""Comparison over seeds: a mean is of all seeds or it is none, differences go seed by seed."""

from __future__ import annotations

import math
import statistics

import pytest

from ebu_optim.report.comparison import difference, over_seeds, rows_over_seeds, value

T95 = {2: 12.706204736, 3: 4.302652730}  # Student's t, two-sided 95 %, n - 1 degrees of freedom


def test_one_seed_keeps_its_cell():
    cell = {"value": 0.5, "low": 0.4, "high": 0.6}
    assert over_seeds([cell], "ra") is cell


@pytest.mark.parametrize("cells", [[0.1, 0.2, 0.6], [{"value": v} for v in (0.1, 0.2, 0.6)]])
def test_the_mean_and_students_interval(cells):
    found = over_seeds(cells, "ra")
    half = T95[3] * statistics.stdev([0.1, 0.2, 0.6]) / math.sqrt(3)
    assert found["value"] == pytest.approx(0.3)
    assert (found["low"], found["high"]) == (pytest.approx(0.3 - half), pytest.approx(0.3 + half))
    assert found["n"] == 3


def test_a_seed_without_a_value_leaves_no_mean():
    lacking = {"not_computed": "no weights"}
    assert over_seeds([0.1, lacking, 0.2], "fid") == {"not_computed": "in 1 of 3 seeds: no weights"}
    assert "no such value" in over_seeds([0.1, None], "fid")["not_computed"]
    assert over_seeds([lacking, lacking], "fid") is lacking


def test_what_some_runs_did_not_reach_is_said():
    reached = {"reached": True, "steps": 10, "seconds": 2.0, "within": 50, "within_seconds": 9.0}
    never = {**reached, "reached": False}
    assert over_seeds([reached, never], "relearn_steps") == "> 50 in 1 of 2"
    assert over_seeds([reached, never], "ut") == "> 9 in 1 of 2"
    assert over_seeds([reached, reached], "ut")["value"] == 2.0
    assert over_seeds([reached, reached], "relearn_steps")["value"] == 10


def test_rows_have_every_measure_of_any_seed():
    rows = [{"ra": 0.1, "p_f": 0.0}, {"ra": 0.3}]
    found = rows_over_seeds(rows)
    assert found["ra"]["value"] == pytest.approx(0.2)
    assert "not_computed" in found["p_f"]


def test_a_difference_is_taken_seed_by_seed():
    first = [{"ra": {"value": 0.9}}, {"ra": 0.7}]
    second = [{"ra": 0.8}, {"ra": 0.5}]
    half = T95[2] * statistics.stdev([0.1, 0.2]) / math.sqrt(2)
    said = difference(first, second, ["ra", "p_f"])
    assert said.endswith(f"+0.150 [{0.15 - half:+.3f}, {0.15 + half:+.3f}]")
    assert ";" not in said  # what a seed lacks is left out


def test_a_cell_as_a_number():
    assert value({"value": 2}) == 2.0
    assert value(3) == 3.0
    assert value("> 50 in 1 of 2") is None
    assert value({"not_computed": "why"}) is None


def test_a_mean_over_seeds_is_over_all_of_them():
    mean = over_seeds
    reached = {"reached": True, "steps": 10.0, "seconds": 1.0, "within": 200, "within_seconds": 9.0}
    never = reached | {"reached": False, "steps": None, "seconds": None}
    why = {"not_computed": "no weights"}
    assert mean([reached, reached | {"steps": 20.0}], "unlearn_steps")["value"] == 15
    assert mean([reached, reached | {"seconds": 3.0}], "ut")["value"] == 2
    assert mean([reached, never, never], "ut") == "> 9 in 2 of 3"
    assert mean([why, why], "fid") == why
    assert mean([3.0, why], "fid") == {"not_computed": "in 1 of 2 seeds: no weights"}
    assert mean([{"value": 1.0}, None], "ra") == {
        "not_computed": "in 1 of 2 seeds: it has no such value"
    }
    # by hand: mean 2, deviation 1, t(0.975, 2) = 4.3027, 4.3027 / sqrt(3) = 2.4842
    found = mean([1.0, {"value": 2.0}, 3.0], "ra")
    assert (found["low"], found["high"]) == pytest.approx((2 - 2.4842, 2 + 2.4842), abs=1e-4)
