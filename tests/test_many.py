"""Many concepts as runs: what each forgets and starts from, and what the table says."""

from __future__ import annotations

import json
from collections import Counter

import pytest

pytest.importorskip("transformers", reason="transformers comes with the extra text_to_image")

from ebu_optim.errors import InputError
from ebu_optim.experiments import many
from ebu_optim.experiments.many import UNLEARN, Many
from ebu_optim.experiments.many_prompts import (
    LISTS,
    PAIRS,
    TRIAL,
    becomes,
    remembered,
    templates,
    wordings,
)
from ebu_optim.text_to_image.prompt_files import read
from ebu_optim.worlds.styled_digits.captions import CONTENTS, STYLES, TRAINED, captions


def finish(todo, workers):
    """Stand-ins of what the runs write: the first pair of a model is always back after 7 steps."""
    for task in (task for run in todo for task in run.tasks):
        task.folder.mkdir(parents=True, exist_ok=True)
        if task.maker is UNLEARN:
            found = {"forget": read(map(str, task.options["forget"]), "--forget"), "seconds": 2.0}
        elif task.maker is many.MEASURE:
            pairs = {f"{c} {s}": {"content": 1.0, "style": 0.9} for c in CONTENTS for s in STYLES}
            pairs["zero outline"] = {"content": 0.25, "style": 1.0}
            pairs["one blue"] = {"content": 0.5, "style": 1.0}
            found = {"measured": {"pair": pairs}}
        else:
            found = {"values": {"relearn_steps": {"reached": True, "steps": 7, "within": 10}}}
        (task.folder / task.maker.last).write_text(json.dumps(found))


@pytest.fixture
def done(monkeypatch) -> list:
    """The runs, which are finished by stand-ins instead of being executed."""
    runs: list = []

    def execute(todo, workers):
        runs.extend(todo)
        finish(todo, workers)

    monkeypatch.setattr(many.runs, "execute", execute)
    return runs


def test_trial_pairs_are_none_of_the_reported_ones():
    assert not set(TRIAL) & {*PAIRS, *map(becomes, PAIRS)}


@pytest.mark.parametrize("pairs", LISTS.values(), ids=LISTS)
def test_pairs_are_apart_and_in_all_wordings(pairs):
    assert len({c for c, _ in pairs}) == 10
    assert {s for _, s in pairs} == set(STYLES) - {"plain"}
    assert not set(pairs) & set(map(becomes, pairs))


def test_pairs_are_forgotten_in_all_wordings():
    texts = wordings(PAIRS)
    assert len(set(texts)) == len(texts) == 90
    of = {c.text: (c.content, c.style) for c in captions(TRAINED)}
    assert [of[t] for t in texts[::9]] == list(PAIRS)
    assert [of[t] for t in wordings(map(becomes, PAIRS))[::9]] == [becomes(p) for p in PAIRS]
    assert [t.format("zero") for t in templates(PAIRS[0])] == wordings(PAIRS[:1])
    for near in (False, True):
        texts = remembered(PAIRS, near)
        assert len(set(texts)) == 100
        assert not {of[t] for t in texts} & set(PAIRS)
    assert set(Counter(of[t] for t in texts).values()) == {2}


def test_each_request_starts_from_the_last_ones_model(stand_ins, done, capsys):
    many.many(
        Many(**stand_ins, methods=["joint"], in_turn=["joint"], varied=[], seeds=[2], workers=1)
    )
    *together, in_turn = done[1:]
    assert [len(run.tasks) for run in together] == [3, 3, 3]
    made = [task for task in in_turn.tasks if task.maker is UNLEARN]
    assert len(made) == 10
    assert made[0] == together[0].tasks[0]  # the same model is made once
    assert together[0].name in in_turn.after
    before = stand_ins["base"]
    for task, pair in zip(made, PAIRS):
        config = task.config
        assert config.pretrained_model_name_or_path == str(before)
        assert read(config.forget, "--forget") == wordings([pair])
        assert read(config.surrogate_concept, "--as") == wordings([becomes(pair)])
        assert config.surrogate_pairing == "each"
        before = task.folder / "pipeline"
    looked = [task.config.pretrained_model_name_or_path for task in in_turn.tasks[10::2]]
    assert looked == [str(made[n - 1].folder / "pipeline") for n in (1, 3, 10)]
    relearned = in_turn.tasks[-1].config
    assert relearned.forget == ["zero"]
    assert relearned.attacks == ["relearn"]
    assert relearned.forget_templates == templates(PAIRS[0])

    (written,) = stand_ins["output_dir"].rglob("results.json")
    rows = json.loads(written.read_text())
    assert [(r["how"], r["pairs"], r.get("seconds")) for r in rows] == [
        ("base model", 10, None),
        *((many.TOGETHER.title, n, 2.0) for n in (1, 3, 10)),
        *((many.IN_TURN, n, 2.0 * n) for n in (1, 3, 10)),
    ]
    last = rows[-1]
    assert last["first"] == 0.25
    assert last["forgotten"] == pytest.approx((0.25 + 9) / 10)
    assert last["content"] == pytest.approx((0.5 + 49) / 50)
    assert (last["worst"], last["worst_pair"]) == (0.5, "one blue")
    assert last["relearn_steps"] == 7
    assert "| plain sum, one after the other | 10 | 1 | 0.925 | 0.250 |" in capsys.readouterr().out


def test_ways_to_forget_all_pairs_differ_in_steps_and_prompts(stand_ins, done):
    args = {"methods": ["joint"], "counts": [10], "in_turn": [], "varied": ["joint"], "seeds": [1]}
    many.many(Many(**stand_ins, **args, workers=1))
    configs = [run.tasks[0].config for run in done[1:]]
    said = [(c.max_train_steps, c.remember_prompts[0].split("/")[-1]) for c in configs]
    usual, near = (name for _, name in said[1:3])
    assert said == [(100, usual), (300, usual), (100, near), (300, near)]
    assert usual != near
    (written,) = stand_ins["output_dir"].rglob("results.json")
    rows = json.loads(written.read_text())[1:]
    assert [row["how"] for row in rows] == ["together", *(way.title for way in many.VARIANTS)]


def test_closed_forms_run_with_the_first_seed(stand_ins, monkeypatch):
    done: list = []

    def execute(todo, workers):
        done.extend(todo)
        raise SystemExit

    monkeypatch.setattr(many.runs, "execute", execute)
    args = many.Many(
        **stand_ins,
        methods=["uce", "speed"],
        counts=[1, 3],
        seeds=[1, 2],
        in_turn=["rece"],
        varied=[],
        workers=1,
    )
    with pytest.raises(SystemExit):
        many.many(args)
    made = [t.config.resolved() for run in done for t in run.tasks if t.maker is many.UNLEARN]
    assert [config.method for config in made] == ["uce", "speed"] * 2 + ["rece"] * 3
    assert {(config.seed, config.max_train_steps) for config in made} == {(1, 0)}
    assert {config.surrogate_pairing for config in made} == {"each"}
    with pytest.raises(InputError, match="--methods uce: no such method"):
        many.Many(**stand_ins, varied=["uce"])


def test_numbers_of_closed_forms_are_chosen_on_other_pairs(stand_ins, done):
    given = {"methods": ["uce", "speed"], "counts": [3], "in_turn": [], "varied": []}
    numbers = {"speed": {"ridge": 0.01}}
    many.many(
        Many(**stand_ins, **given, pairs="trial", closed_form_options=numbers, seeds=[1], workers=1)
    )
    uce, speed = [run.tasks[0].config for run in done[1:]]
    assert read(uce.forget, "--forget") == read(speed.forget, "--forget") == wordings(TRIAL[:3])
    assert (uce.method_options, speed.method_options) == ({}, {"ridge": 0.01})
    (written,) = stand_ins["output_dir"].rglob("results.json")
    found = json.loads(written.read_text())[1:]
    assert [(row["how"], row["pairs"]) for row in found] == [
        ("together", 3),
        ("together, ridge 0.01", 3),
    ]
    assert [row["forgotten"] for row in found] == [1.0, 1.0]
    with pytest.raises(InputError, match="--closed_form_options joint: give objects for uce"):
        Many(**stand_ins, closed_form_options={"joint": {}})


def test_numbers_that_cannot_be_are_refused(stand_ins):
    with pytest.raises(InputError, match="--counts 11: give numbers from 1 to 10"):
        Many(**stand_ins, counts=[1, 11])
    with pytest.raises(InputError, match="--methods nothing: no such method"):
        Many(**stand_ins, in_turn=["nothing"])
