"""The experiment behind the defaults: its runs, what it tunes by, and its report."""

from __future__ import annotations

import json

import pytest
import torch


@pytest.fixture(scope="module")
def evidence():
    with pytest.MonkeyPatch.context() as patch:
        from ebu_optim.experiments import evidence

        patch.setattr(evidence, "STEPS", 2)
        yield evidence


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Of several runs, which share a replay set, as those of the experiment do."""
    folder = tmp_path_factory.mktemp("evidence")
    (folder / "runs").mkdir()
    return folder


def fake(spec, **values):
    """A result whose score is best at gamma 100."""
    off = abs(len(f"{spec['options'].get('gamma', 0):g}") - 3) / 100
    columns = (
        "p_f_reject",
        "acc_kept",
        "acc_replayed",
        "acc_never",
        "relearn_10",
        "ce_f",
        "seconds",
    )
    return {
        "spec": spec,
        **dict.fromkeys(columns, 0.5),
        "inversion_100": 0.1 + off,
        "fisher_mean": 4e-4,
        **values,
    }


@pytest.mark.parametrize("method", ["added", "random", "embedding", "base"])
def test_a_run_measures_three_axes_and_repeats(evidence, folder, method, monkeypatch):
    if method != "base":  # whose pictures have to be good ones
        monkeypatch.setattr(evidence, "SAMPLER_STEPS", 4)
    options = {"gamma": 10.0} if method in ("added", "random") else {}
    spec = evidence.spec("partial", "crossed", method, 1, **options)
    threads = torch.get_num_threads()
    try:
        evidence.run(spec, folder)
    finally:
        torch.set_num_threads(threads)
    (result,) = (r for r in evidence.load(folder) if r["spec"] == spec)
    axes = ("p_f_reject", "acc_kept", "acc_never", "inversion_100", "relearn_10")
    assert all(0 <= result[k] <= 1 for k in axes)
    if method == "base":
        assert result["p_f_reject"] > 0.95
        assert result["acc_kept"] > 0.95
    assert (result["fisher_mean"] is not None) == (method in ("added", "random"))


def test_every_method_gets_the_same_budget_and_reported_seeds_are_not_tuned_on(evidence):
    tuning = evidence.tuning()
    assert {s["seed"] for s in tuning} == {0}
    budget = {}
    for s in tuning:
        if s["options"].get("gamma", 0) > 0:
            budget.setdefault((s["regime"], s["loss"], s["method"]), []).append(s["options"])
    assert len(budget) == 2 * 3 * 5
    assert len({json.dumps(b) for b in budget.values()}) == 1
    reported = evidence.reporting([fake(s) for s in tuning])
    assert {s["seed"] for s in reported} == {1, 2, 3}
    names = [evidence.name(s) for s in tuning + reported]
    assert len(set(names)) == len(names)
    gammas = {s["options"].get("gamma") for s in reported if s["method"] == "routed"}
    assert gammas == {100.0}  # the one with the best score on the tuning seed
    assert {s["options"].get("alpha") for s in reported} == {None, 0.0, 1.0}


def test_score_is_forgotten_kept_and_deep_with_equal_weights(evidence):
    result = {"p_f_reject": 0.1, "acc_never": 0.9, "acc_kept": 0.8, "inversion_100": 0.3}
    partial, full = ({**result, "spec": {"regime": r}} for r in ("partial", "full"))
    assert evidence.report.score(partial) == pytest.approx(0.9 + 0.9 + 0.7)
    assert evidence.report.score(full) == pytest.approx(0.9 + 0.8 + 0.7)


def test_report_has_every_setting_with_mean_and_deviation(evidence, tmp_path):
    tuning = [fake(s) for s in evidence.tuning()]
    reported = evidence.reporting(tuning)
    results = tuning + [fake(s, p_f_reject=0.1 * s["seed"]) for s in reported]
    evidence.report.write(results, tmp_path, {"steps": 2})
    document = json.loads((tmp_path / "evidence.json").read_text())
    assert len(document["runs"]) == len(results)
    three = [r for r in document["rows"] if r["seeds"] == 3]
    assert all(r["p_f_reject"] == pytest.approx(0.2) for r in three)
    assert all(r["p_f_reject_sd"] == pytest.approx(0.1) for r in three)
    text = (tmp_path / "evidence.md").read_text()
    for name in ("plain sum", "full alignment", "random masks", "EBU routed", "0.200 ± 0.100"):
        assert name in text
    assert text.count("###") == 6
    assert (tmp_path / "evidence.png").read_bytes()[:4] == b"\x89PNG"
    best = document["mean_tuning_score_by_gamma"]["added"]
    assert max(best, key=best.get) == "100"
