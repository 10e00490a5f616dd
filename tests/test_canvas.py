"""UnlearnCanvas over the world of digits as runs: which there are, and that each can be begun."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest

pytest.importorskip("transformers", reason="transformers comes with the extra text_to_image")

from ebu_optim.baselines import methods as known
from ebu_optim.errors import InputError
from ebu_optim.experiments import canvas
from ebu_optim.protocols.protocol import Protocol


def judged(folder: Path, method: str, seed: int, kind: str, target: str) -> None:
    """A stand-in of an evaluation: after "red" was forgotten by ESD, "two" is lost, too."""
    share = {"value": 1.0, "low": 0.9, "high": 1.0, "n": 30}
    lost = 0.25 if (method, target) == ("ESD", "red") else 0.75
    row = {
        "run": {"method": method, "seed": seed} if method else None,
        "kind": kind,
        "forget": [target],
        "label": "unlearncanvas-digits",
        "protocol": {"judges": {"digits-style": "1"}},
        "figures": {
            **dict.fromkeys(("ua", "ira", "cra"), share),
            f"accuracy/{target}": {**share, "value": 0.0},
            "accuracy/nine": {**share, "value": lost},
        },
    }
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "protocols.json"
    there = json.loads(file.read_text()) if file.exists() else []
    file.write_text(json.dumps([*there, row]))


def comparing(args) -> None:
    args.output_dir.mkdir(parents=True, exist_ok=True)
    (args.output_dir / "compared.json").write_text('{"ranks": {"kept": {}}}')


def test_each_target_is_unlearned_by_itself_and_evaluated(stand_ins, monkeypatch, capsys):
    done, compared, of_base = [], [], []
    monkeypatch.setattr(canvas.runs, "execute", lambda todo, workers: done.extend(todo))
    monkeypatch.setattr(canvas, "compare", lambda args: compared.append(args) or comparing(args))
    monkeypatch.setattr(canvas, "evaluate", of_base.append)
    monkeypatch.setattr(canvas.canvas_results, "read", lambda files, base: [])
    assert len(canvas.Canvas(**stand_ins).targets) == 15
    targets = ["halftone", "seven"]
    canvas.canvas(canvas.Canvas(**stand_ins, workers=1, targets=targets, attacked=[]))
    assert len(done) == 2 * (3 * 3 + 3)
    assert len({run.name for run in done}) == len({run.folder for run in done}) == len(done)
    configs = [[task.config for task in run.tasks] for run in done]
    assert Counter(c.method for c, _ in configs) == {
        "ebu_added": 6,
        "joint": 6,
        "salun": 6,
        "selective_amnesia": 2,
        "esd": 2,
        "spm": 2,
    }
    numbers = {(c.method, c.learning_rate, str(c.method_options)) for c, _ in configs}
    assert len(numbers) == 6  # one set for all targets
    for unlearned, evaluated in configs:
        kept = "lora" if unlearned.method == "spm" else "pipeline"
        assert unlearned.save_as == kept
        (model,) = evaluated.pretrained_model_name_or_path
        assert Path(model) == unlearned.output_dir / kept
        assert evaluated.forget == unlearned.forget
        assert evaluated.base == str(stand_ins["base"])
        assert list(evaluated.models()) == [model]
        (protocol,) = evaluated.protocols
        assert isinstance(protocol, Protocol)
        assert protocol.name == "unlearncanvas-digits"
    assert [e.forget for e in of_base] == [[t] for t in targets]
    assert len({e.output_dir for e in of_base}) == 1  # drawn once
    (args,) = compared
    assert len(args.runs) == 1 + len(done)
    assert args.names == [f"{stand_ins['base']}=base model"]
    assert "24 runs" in capsys.readouterr().out


def test_targets_named_beforehand_are_attacked_by_all_attacks(stand_ins, monkeypatch, capsys):
    done: list = []

    def execute(todo, workers):
        done.extend(todo)
        for run in todo:
            made = run.tasks[0].config
            method = getattr(made, "method", "retrain")
            if method != "retrain":
                kind = "style" if made.forget == ["red"] else "object"
                judged(run.folder, known[method].title, made.seed, kind, made.forget[0])
            run.folder.mkdir(parents=True, exist_ok=True)
            steps = {"reached": method == "esd", "steps": 4.5, "within": 50}
            values = {"cce": {"value": 0.5}, "relearn_steps": steps}
            (run.folder / "attacks.json").write_text(json.dumps({"values": values}))

    monkeypatch.setattr(canvas.runs, "execute", execute)
    monkeypatch.setattr(canvas, "compare", comparing)
    monkeypatch.setattr(
        canvas,
        "evaluate",
        lambda args: judged(
            args.output_dir, "", 0, "style" if args.forget == ["red"] else "object", args.forget[0]
        ),
    )
    methods = ["joint", "esd", "spm"]
    args = canvas.Canvas(
        **stand_ins, targets=["red", "two"], methods=methods, seeds=[1, 2], workers=1
    )
    canvas.canvas(args)
    attacked = [run for run in done if run.tasks[-1].maker is canvas.ATTACK]
    assert len(attacked) == 3  # "red", by the plain sum, by ESD, and never seen
    names = [run.name for run in done]
    *unlearned, never_saw = attacked
    assert never_saw.tasks[0].config.without == ["red"]
    assert never_saw.tasks[0].config.max_train_steps == never_saw.steps == 3000
    for run in unlearned:
        made, attack = run.tasks
        assert attack.config.forget == made.config.forget == ["red"]
        assert attack.config.attacks == list(canvas.ATTACKS)
        assert made.config.seed == 1
        (after,) = run.after
        assert names.index(after) < names.index(run.name)
        (evaluated,) = [other for other in done if other.name == after]
        assert evaluated.tasks[0].folder == made.folder
    (written,) = stand_ins["output_dir"].rglob("results.json")
    found = json.loads(written.read_text())
    assert [(row["target"], row["method"], row["seed"]) for row in found["attacked_runs"]] == [
        ("red", "plain sum", 1),
        ("red", "ESD", 1),
        ("red", "Retrain", 0),
    ]
    assert found["attacked"] == [
        {"name": "plain sum", "styles": {"targets": 1, "cce": 0.5, "relearn_steps": 50.0}},
        {"name": "ESD", "styles": {"targets": 1, "cce": 0.5, "relearn_steps": 4.5}},
        {"name": "Retrain", "styles": {"targets": 1, "cce": 0.5, "relearn_steps": 50.0}},
    ]
    assert found["command"] == (
        "python examples/paper/unlearncanvas.py --seeds 1 2 --methods joint esd spm "
        "--targets red two"
    )
    _, joint, esd, _ = found["style"]
    assert [joint["name"], joint["seeds"], joint["targets"], joint["ua"]] == [
        "plain sum",
        2,
        1,
        1.0,
    ]
    assert [esd["name"], esd["seeds"], esd["worst_kept"]] == ["ESD", 1, 0.25]
    assert [row["lowest_kept"] for row in found["both"]] == [0.75, 0.75, 0.25, 0.75]


def test_closed_forms_have_one_seed_and_no_training(stand_ins, monkeypatch, capsys):
    done: list = []
    monkeypatch.setattr(canvas.runs, "execute", lambda todo, workers: done.extend(todo))
    monkeypatch.setattr(canvas, "compare", comparing)
    monkeypatch.setattr(canvas, "evaluate", lambda args: None)
    monkeypatch.setattr(canvas.canvas_results, "read", lambda files, base: [])
    methods = ["uce", "rece", "speed"]
    assert not {*methods} & {*canvas.Canvas(**stand_ins).methods}
    canvas.canvas(
        canvas.Canvas(**stand_ins, methods=methods, targets=["seven"], attacked=[], workers=1)
    )
    made = [run.tasks[0].config.resolved() for run in done]
    assert [config.method for config in made] == methods
    for config in made:
        assert config.forget == ["seven"]
        assert config.forget_templates == ["{}"]
        assert config.surrogate_concept == ["eight"]
        assert (config.seed, config.max_train_steps, config.learning_rate) == (1, 0, None)
        assert config.save_as == "pipeline"


def test_what_cannot_be_is_refused(stand_ins):
    with pytest.raises(InputError, match="--attacked plain: there is"):
        canvas.Canvas(**stand_ins, attacked=["plain"])
    with pytest.raises(InputError, match="--references plain: there is"):
        canvas.Canvas(**stand_ins, references=["plain"])
    with pytest.raises(InputError, match="--methods nothing: no such method"):
        canvas.Canvas(**stand_ins, methods=["nothing"])
    with pytest.raises(InputError, match="--target plain: every prompt without a style asks"):
        canvas.canvas(canvas.Canvas(**stand_ins, targets=["plain"]))
