"""UnlearnCanvas over the world of digits as runs: which there are, and that each can be begun."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

pytest.importorskip("transformers", reason="transformers comes with the extra text_to_image")

from ebu_optim.errors import InputError
from ebu_optim.experiments import canvas
from ebu_optim.protocols.protocol import Protocol


def test_each_target_is_unlearned_by_itself_and_evaluated(stand_ins, monkeypatch, capsys):
    done, compared, of_base = [], [], []
    monkeypatch.setattr(canvas.runs, "execute", lambda todo, workers: done.extend(todo))
    monkeypatch.setattr(canvas, "compare", compared.append)
    monkeypatch.setattr(canvas, "evaluate", of_base.append)
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
            run.folder.mkdir(parents=True, exist_ok=True)
            (run.folder / "attacks.json").write_text('{"values": {"p_f": 0.5}, "protocol": {}}')

    monkeypatch.setattr(canvas.runs, "execute", execute)
    monkeypatch.setattr(canvas, "compare", lambda args: None)
    monkeypatch.setattr(canvas, "evaluate", lambda args: None)
    methods = ["joint", "esd", "spm"]
    args = canvas.Canvas(
        **stand_ins, targets=["red", "two"], methods=methods, seeds=[1, 2], workers=1
    )
    canvas.canvas(args)
    attacked = [run for run in done if run.tasks[-1].maker is canvas.ATTACK]
    assert len(attacked) == 2  # "red", by the plain sum and by ESD
    names = [run.name for run in done]
    for run in attacked:
        made, attack = run.tasks
        assert attack.config.forget == made.config.forget == ["red"]
        assert attack.config.attacks == list(canvas.ATTACKS)
        assert made.config.seed == 1
        (after,) = run.after
        assert names.index(after) < names.index(run.name)
        (evaluated,) = [other for other in done if other.name == after]
        assert evaluated.tasks[0].folder == made.folder
    (written,) = stand_ins["output_dir"].rglob("attacked.json")
    rows = canvas.json.loads(written.read_text())
    assert [(row["target"], row["method"], row["seed"]) for row in rows] == [
        ("red", "joint", 1),
        ("red", "esd", 1),
    ]


def test_what_cannot_be_is_refused(stand_ins):
    with pytest.raises(InputError, match="--attacked plain: there is"):
        canvas.Canvas(**stand_ins, attacked=["plain"])
    with pytest.raises(InputError, match="--methods nothing: no such method"):
        canvas.Canvas(**stand_ins, methods=["nothing"])
    with pytest.raises(InputError, match="--target plain: every prompt without a style asks"):
        canvas.canvas(canvas.Canvas(**stand_ins, targets=["plain"]))
