"""The experiment on language models and examples/language_model.py, shortened."""

from __future__ import annotations

import json

import pytest
import torch

pytest.importorskip("transformers", "5", reason="tried with transformers 5")

from ebu_optim.experiments import language
from ebu_optim.experiments.evidence import load
from ebu_optim.worlds import people_judged

from .processes import ROOT
from .scripts import PAPER, run_script

EXAMPLE = ROOT / "examples" / "language_model.py"


@pytest.fixture
def short(monkeypatch):
    threads = torch.get_num_threads()
    monkeypatch.setattr(people_judged, "TRAIN_STEPS", 2)
    monkeypatch.setattr(people_judged, "RELEARN_STEPS", 10)
    monkeypatch.setattr(language, "STEPS", 2)
    monkeypatch.setattr(language, "CHECK", 1)
    yield
    torch.set_num_threads(threads)


def spec(**more):
    return {
        "loss": "npo",
        "rule": "joint",
        "seed": 1,
        "trial": False,
        "learning_rate": 1e-3,
        **more,
    }


def test_a_run_is_made_once_and_told_in_a_table(short, tmp_path):
    (tmp_path / "runs").mkdir()
    of_run = spec(forget_weight=1.0)
    for one in (of_run, {"rule": "base", "seed": 1, "trial": False}):
        language.run(one, tmp_path)
    first = (tmp_path / "base-s1.safetensors").read_bytes()
    found = {r["spec"]["rule"]: r for r in load(tmp_path)}
    assert [at["step"] for at in found["joint"]["trace"]] == [1, 2]
    # of a model that knows nothing little is left from the start
    assert found["joint"]["point"] is not None
    assert set(found["joint"]) >= {*people_judged.PARTS, "relearning", "seconds"}
    # measured where the point is taken
    at = found["joint"]["point"]["never_replayed"]
    assert found["joint"]["never_replayed"][0]["probability"] == pytest.approx(at)
    code, said = run_script(PAPER / "language.py", "--summary", "--output_dir", tmp_path)
    assert code == 0, said
    assert "| plain sum | forget_weight 1, rate 0.001 | 1 of 1 |" in said
    assert "| before |  |  |" in said
    assert (tmp_path / "base-s1.safetensors").read_bytes() == first


def test_strengths_are_chosen_on_a_seed_that_is_not_reported():
    def trial(choice, left, forgotten=0.0):
        trace = [{"step": 10, "forgotten": forgotten, "held_out": left}]
        own = spec(seed=language.TUNE_SEED, trial=True, **choice)
        return {"spec": own, "trace": trace, "point": language.point(trace)}

    grid = language.choices("joint")
    assert len({len(language.choices(rule)) for rule in language.RULES}) == 1
    found = [trial(choice, left=i / 10) for i, choice in enumerate(grid)]
    assert language.chosen(found[:-1], "npo", "joint") is None  # not all are there
    assert language.chosen(found, "npo", "joint") == grid[-1]
    shown = {
        part: [{"probability": 0.5}] * 2 for part in ("forgotten", "replayed", "never_replayed")
    }
    shown["forgotten"][0] |= {"ratio_forgotten": 0.1}
    shown["never_replayed"][0] |= {"accuracy": 0.9}
    runs = [
        {"spec": spec(seed=1, trial=False, **choice), **shown, "relearning": {"back": 0.1}}
        for choice in grid[-2:]
    ]
    said = language.table(language.current([*found, *runs]), "npo")
    assert "| 1 of 1 | 0.500 |" in said  # not the other strength's
    found[-1] = trial(grid[-1], 1.0, forgotten=0.2)  # keeps everything, and forgets nothing
    assert language.chosen(found, "npo", "joint") == grid[-2]
    wanted = language.reported(found, ["npo"], ["joint", "sago"], [1, 2])
    assert [(s["rule"], s["seed"]) for s in wanted] == [
        ("base", 1),
        ("never_saw", 1),
        ("base", 2),
        ("never_saw", 2),
        ("joint", 1),
        ("joint", 2),
    ]
    names = [language.name(s) for s in [*wanted, *language.trials(["npo", "idk"], language.RULES)]]
    assert len(set(names)) == len(names)
    code, said = run_script(PAPER / "language.py", "--seeds", 100)
    assert (code, "which strengths are chosen on" in said) == (2, True)


@pytest.mark.parametrize("loss", list(language.LOSSES))
def test_forget_losses_push_the_answers_away(loss, short, tmp_path):
    people = language.People(1)
    model = language.new_model(people, 0)
    batch = language.forget_batch(people, loss, model)
    model.zero_grad()
    before = people_judged.measure(model, people, people.of("forgotten"))["probability"]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3)
    for _ in range(3):
        optimizer.zero_grad()
        language.forget_loss(model, batch, loss).backward()
        optimizer.step()
    assert people_judged.measure(model, people, people.of("forgotten"))["probability"] < before


def test_the_example_forgets_by_the_trainer_and_does_not_overwrite(short, tmp_path):
    out = tmp_path / "out"
    given = ("--output_dir", out, "--steps", 2, "--loss", "npo")
    code, said = run_script(EXAMPLE, *given)
    assert code == 0, said
    assert "back after relearning the other half" in said
    results = json.loads((out / "results.json").read_text())
    assert results["options"]["rule_options"] == {"gamma": 1000.0}
    assert results["before"] != results["after"]
    assert sorted(p.name for p in out.iterdir()) == ["model", "results.json", "vocabulary.json"]
    assert str(tmp_path) not in (out / "results.json").read_text()
    code, said = run_script(EXAMPLE, *given)
    assert (code, "holds a finished result; give --overwrite" in said) == (2, True)
    code, said = run_script(EXAMPLE, "--rule", "best")
    assert (code, "--rule best: there is" in said) == (2, True)
    code, said = run_script(EXAMPLE, "--rule_options", '{"gamma": -1}')
    assert (code, "gamma must be finite" in said) == (2, True)
