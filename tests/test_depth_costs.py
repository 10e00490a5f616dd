"""The experiment on what depth costs: its runs, its two attackers, its table."""

from __future__ import annotations

import json

import pytest
import torch

from ebu_optim.experiments import depth
from ebu_optim.experiments.evidence import execute

from .scripts import PAPER, load, run_script


@pytest.fixture
def short(monkeypatch):
    threads = torch.get_num_threads()
    for name, value in (
        ("STEPS", 2),
        ("INVERSION_STEPS", 1),
        ("RELEARN_MAX", 1),
        ("RATES", (0.1,)),
    ):
        monkeypatch.setattr(depth, name, value)
    monkeypatch.setattr(depth, "PER_CLASS", 4)
    yield
    torch.set_num_threads(threads)


def test_runs_are_made_once_and_told_in_a_table(short, tmp_path):
    (tmp_path / "runs").mkdir()
    depth.prepare(tmp_path)
    (spec,) = depth.specs(["salun"], ["both"], [3])
    depth.run(spec, tmp_path)
    found = json.loads((tmp_path / "runs" / "salun-both-s3.json").read_text())
    assert found["spec"] == spec
    assert found["passes"] == 10
    assert all(0 <= found[k] <= 1 for k in ("p_f", "ra", "inversion", "worst"))
    execute([spec], tmp_path, 1, "again", run=None, name=depth.name)  # nothing is left to run
    script = load(PAPER / "depth.py")
    assert script.Depth().rules == ["joint", "ebu_added", "salun"]
    code, said = run_script(PAPER / "depth.py", "--summary", "--output_dir", tmp_path)
    assert code == 0, said
    assert "| SalUn | adversary and relearner | 1 | 1.000 |" in said
    code, said = run_script(PAPER / "depth.py", "--rules", "esd", "--output_dir", tmp_path)
    assert (code, "this is not a method that can forget by relabelling" in said) == (2, True)


def test_depths_are_compared_seed_by_seed():
    def result(depth_, seed, ra, steps):
        spec = {"rule": "joint", "depth": depth_, "seed": seed}
        return {"spec": spec, "ra": ra, "inversion": 0.5, "worst": 0.5, "relearn_steps": steps}

    found = [
        *(result("none", *at) for at in ((1, 0.8, 10.0), (2, 0.9, None), (3, 0.1, 1.0))),
        *(result("adversary-tenth", *at) for at in ((1, 0.9, 20.0), (2, 1.0, None))),
    ]
    assert depth.differences(found) == (
        "- plain sum, adversary at a tenth of the weight minus as it is (2 seeds): "
        "RA +0.100 [+0.100, +0.100], inversion 200 +0.000 [+0.000, +0.000], worst of 3 rates "
        "+0.000 [+0.000, +0.000], relearn_steps +5.000 [-58.531, +68.531]\n"
    )


def test_a_cell_is_a_mean_with_its_interval():
    assert depth.cell("ra", [0.9]) == "0.900"
    assert depth.cell("ra", [0.9, 0.9, 0.9]) == "0.900 ± 0.000"
    assert depth.cell("relearn_steps", [30.0, None]) == "> 65.0 ± 444.7"
    assert depth.cell("passes", [6, 6]) == "6"
    assert [depth.passes(d) for d in ("none", "adversary", "adversary-1", "both")] == [2, 6, 4, 10]
