"""examples/paper on a toy world: digits, a few steps, two images of a class; one process."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import psutil
import pytest
import torch
from PIL import Image

from ebu_optim.baselines import methods
from ebu_optim.class_conditional.models import load_classifier, load_unet
from ebu_optim.diffusion import sample
from ebu_optim.errors import InputError
from ebu_optim.experiments import options as experiment
from ebu_optim.experiments import rows, runs, settings, tables, worlds
from ebu_optim.experiments.options import OnImages
from ebu_optim.training import data
from ebu_optim.training.command_line import command

from .processes import PATIENCE
from .scripts import script, start

ROOT = Path(__file__).parent.parent
SMALL = {"model": "small", "train_batch_size": 4}
# what a world asks for comes last: every run has two steps, whatever a script says
TOY = worlds.World(
    "toy",
    "toy digits",
    {"digits": True},
    {},
    base={**SMALL, "use_ema": True, "max_train_steps": 4},
    judge={**SMALL, "max_train_steps": 3},
    sets={
        "weights": "ema",
        "replay_per_class": 2,
        "num_inference_steps": 2,
        "guidance_scale": 1.0,
        "fisher_images": 4,
        "fisher_timesteps": 2,
    },
    unlearn={
        "start_from": "ema",
        "train_batch_size": 2,
        "validation_images": 2,
        "validation_inference_steps": 2,
        "max_train_steps": 2,
    },
    evaluate={
        "images_per_class": 2,
        "num_inference_steps": 2,
        "inversion_steps": [1],
        "relearn_max_steps": 1,
        "attack_images": 2,
    },
    seconds=dict.fromkeys(("train", "train_classifier", "prepare", "unlearn", "evaluate"), 1.0),
    basis="no time at all",
)


@pytest.fixture(scope="module", autouse=True)
def paper():
    """Runs are made here, one at a time, in this process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TQDM_DISABLE", "1")
        patch.setitem(OnImages.scales, "small", TOY)
        patch.setattr(runs, "ProcessPoolExecutor", ThreadPoolExecutor)
        patch.setattr(runs, "_start", lambda threads: None)
        patch.setattr(rows, "TUNED", Path("nowhere.json"))
        yield TOY


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("paper")


@pytest.fixture
def made(monkeypatch) -> list[str]:
    """The names of the runs that were made, in order."""
    names, work = [], runs._work
    monkeypatch.setattr(runs, "_work", lambda run: names.append(run.name) or work(run))
    return names


def report(root: Path, name: str, ending: str = "-full-replay") -> dict:
    folder = root / "toy" / f"{name}{ending}"
    assert (folder / "report.html").is_file()
    return json.loads((folder / "results.json").read_text())


def names(found: dict) -> list[str]:
    return [row["name"] for row in found["rows"]]


GROUND = ["toy: base", "toy: judge", "toy: judge who knows noise", "toy: sets, full replay"]
LIMITS = ["base model", "noise"]


def test_a_table_runs_what_is_missing_and_reuses_what_is_there(root, made, capsys):
    options = ["--methods", "ebu_added", "joint", "--seeds", 1, 2, "--sa_steps", 0]
    start("table6", root, *options)
    said = capsys.readouterr().out
    assert "8 runs, 0 of them there already; to do: 8" in said
    assert made[:4] == GROUND
    assert len(made) == 8
    found = report(root, "table6")
    assert names(found)[:4] == [*LIMITS, "EBU added", "plain sum"]
    assert names(found)[4:] == [f"the paper: {m}" for m in ("FT", "GA", "SA", "SalUn", "EBU")]
    assert found["rows"][2]["values"]["ra"]["n"] == found["rows"][2]["values"]["seeds"] == 2
    assert "Curves and images: seed 1 alone" in found["notes"][0]
    told = found["protocol"]["unlearning"]["settings"]["plain sum"]
    assert told["seeds"] == found["protocol"]["seeds"]["unlearning"] == [1, 2]
    assert told["tuning"] == "none: 1e-4 and the method's defaults"
    assert f"see {root / 'toy' / 'table6-full-replay' / 'report.html'}" in said

    made.clear()
    start("table6", root, *options)
    assert "8 runs, 8 of them there already; to do: 0 with 0 training steps" in (
        capsys.readouterr().out
    )
    assert not made
    (model,) = (root / "toy" / "models").glob("joint-*-s2-????????")
    (judged,) = (root / "toy" / "reports").glob("joint-*-s2-????????")
    (judged / "results.json").rename(judged / "results.old")
    start("table6", root, *options, "--dry_run")
    assert "7 of them there already; to do: 1 with 200" in capsys.readouterr().out
    assert not (judged / "results.json").exists()
    (judged / "results.old").rename(judged / "results.json")
    assert not (model / "checkpoints").exists()


def test_another_class_can_be_forgotten(root, made, paper):
    given = ["--forget", "2", "--regime", "partial", "--methods", "joint", "--sa_steps", 0]
    start("table6", root, *given)
    found = report(root, "table6", "-partial-replay-2")
    assert names(found) == [*LIMITS, "plain sum"]  # the paper's table is of another class
    data = found["protocol"]["data"]
    assert (data["forget"], data["replayed"]) == (["2"], ["1", "3"])
    assert found["title"].startswith("Table 6 on toy digits, 2 forgotten: partial replay")


def test_an_earlier_base_and_its_judges_are_not_trained_again(root, made, tmp_path):
    given = ["--methods", "joint", "--sa_steps", 0]
    start("table6", root, *given)
    made.clear()
    start("table6", tmp_path, *given, "--trained", root)
    assert made[0] == GROUND[3]
    assert len(made) == 2
    assert not set(made) & set(GROUND[:3])
    there = [p.name for p in (tmp_path / "toy").iterdir()]
    assert not [name for name in there if name.startswith(("base", "judge"))]


def test_the_published_base_is_that_of_its_scale(tmp_path):
    trained = ROOT / "examples" / "paper" / "trained"
    setting = settings.Setting(worlds.CIFAR10_16, tmp_path, trained=trained)
    for made in (setting.base, setting.judge, setting.reject):
        assert made.folder.parent == trained / "cifar10-16"
    classes = worlds.CIFAR10_16.classes
    assert load_classifier(setting.judge.folder, classes)[1]["test_accuracy"] > 0.8
    assert load_classifier(setting.reject.folder, classes)[1]["reject"]
    model, scheduler, info = load_unet(str(setting.base.folder), "ema")
    assert tuple(info["classes"]) == classes
    x = sample(
        model,
        scheduler,
        torch.tensor([1, 8]),
        (3, 16, 16),
        num_inference_steps=2,
        generator=torch.Generator().manual_seed(0),
    )
    assert x.isfinite().all()


def test_a_class_that_the_world_lacks_is_refused(root, monkeypatch):
    monkeypatch.setitem(OnImages.scales, "small", TOY._replace(classes=("0", "1")))
    with pytest.raises(
        InputError, match="--forget cat: --scale small has no such class; give one of 0, 1"
    ):
        start("table6", root, "--forget", "cat")


def test_figure_2(root, made, monkeypatch):
    monkeypatch.setattr(script("figure2"), "METHODS", ("ebu_added", "selective_amnesia", "salun"))
    start("figure2", root, "--steps", 2, "--sa_steps", 3)
    found = report(root, "figure2")
    assert len(made) == 4  # other options than the table's runs
    assert names(found)[2:] == ["EBU added", "SA", "SalUn", "SA, published strength"]
    settings = found["protocol"]["unlearning"]["settings"]
    assert settings["SA, published strength"] == {
        "learning_rate": 1e-4,
        "lam": 1e7,
        "steps": 3,
        "seeds": [1],
        "tuning": "none",
    }
    assert len(found["curves"]) == 6
    for curve in found["curves"]:
        assert set(curve["limits"]) == set(LIMITS)
        assert len(curve["series"]) == 4
        assert all(x > 0 for line in curve["series"].values() for x, _ in line)
    ce = {c["title"]: c for c in found["curves"]}["CE_f over step"]
    assert [x for x, _ in ce["series"]["SalUn"]] == [2]
    noise = {row["name"]: row["values"] for row in found["rows"]}["noise"]
    assert ce["limits"]["noise"] == noise["ce_f"]


def test_figure_4(root, made, monkeypatch):
    monkeypatch.setattr(script("figure4"), "VALUES", (0.2, 0.8))
    start("figure4", root)
    found = report(root, "figure4")
    assert len(made) == 4
    assert names(found)[2:] == [f"alpha {a}, delta {d}" for a in (0.2, 0.8) for d in (0.2, 0.8)]
    told = found["protocol"]["unlearning"]["settings"]["alpha 0.2, delta 0.8"]
    assert (told["alpha"], told["delta"]) == (0.2, 0.8)
    titles = [c["title"] for c in found["curves"]]
    assert titles == [
        "P_f over alpha",
        "CE_f over alpha",
        "RA over alpha",
        "P_f after 1 steps of inversion over alpha",
    ]
    for curve in found["curves"]:
        assert list(curve["series"]) == ["delta 0.2", "delta 0.8"]
        assert [x for x, _ in curve["series"]["delta 0.2"]] == [0.2, 0.8]
    pictures = root / "toy" / "figure4-full-replay" / "pictures"
    assert sorted(p.name for p in pictures.iterdir()) == [
        f"{i}_{title}_delta_0_{d}.png"
        for i, title in enumerate(("0_forgotten", "1_kept"))
        for d in (2, 8)
    ]


def test_figure_6_shows_the_way(paper, root, made):
    start("figure6", root, "--every", 1)
    assert len(made) == 3
    figure6 = script("figure6")
    assert names(report(root, "figure6"))[2:] == ["EBU added", "SA", "FT"]
    setting = settings.Setting(paper, root)
    seen = figure6.along(figure6.table(setting, 1, paper=None, steps=200, every=1))["EBU added"]
    assert list(seen) == [0, 1, 2]
    assert seen[0].shape == (10, figure6.EACH, 1, 8, 8)
    assert not torch.equal(seen[0], seen[2])
    grid = figure6.grid({"EBU": {t: seen[0] + t for t in (0, 5, 10, 15, 20)}}, 3, "x")
    assert grid["rows"] == ["t = 0", "t = 10", "t = 20"]
    assert torch.equal(grid["columns"]["EBU"][1], seen[0][3] + 10)
    with Image.open(root / "toy" / "figure6-full-replay" / "along.gif") as opened:
        assert opened.n_frames == 3
        assert opened.size == (110 + 2 * (6 * 34 + 8 - 2), 24 + 3 * (32 + 8))


def test_figure_7_is_table_6_in_pictures(root, made):
    start("figure7", root, "--methods", "ebu_added", "joint", "--sa_steps", 0)
    assert not made
    found = report(root, "figure7")
    assert found["title"] == "Figure 7 on toy digits: full replay, remembered by replay"
    pictures = root / "toy" / "figure7-full-replay" / "pictures"
    assert len(list(pictures.iterdir())) == 10
    with Image.open(next(pictures.glob("*_0_forgotten.png"))) as opened:
        assert opened.height == 3 * 32  # before, EBU, plain sum


def test_table_4_under_partial_replay(root, made, monkeypatch):
    monkeypatch.setattr(rows, "ABLATIONS", ("ebu_without_alignment",))
    start("table4", root, "--seeds", 1, "--regime", "partial", "--loss", "crossed")
    assert len(made) == 3
    assert made[0] == "toy: sets, partial replay"
    found = report(root, "table4", "-partial-crossed")
    assert names(found)[2:4] == ["EBU added", "EBU w/o PA"]
    assert found["protocol"]["data"]["replayed"] == ["1", "2", "3"]
    assert all("ra_never_replayed" in row["values"] for row in found["rows"][2:4])


def test_table_1(paper, root, made, monkeypatch):
    both = {"cifar100": paper._replace(smoke="Of no use."), "stl10": paper}
    monkeypatch.setitem(script("table1").Table1.scales, "small", both)
    start("table1", root, "--dataset", "cifar100", "--methods", "ebu_added")
    assert not made  # it is Table 6's run
    assert report(root, "table1", "")["notes"][0] == "Of no use."


def test_tuning_chooses_the_best_score_and_the_others_read_it(paper, tmp_path, monkeypatch):
    Setting = settings.Setting
    monkeypatch.setattr(rows, "TUNED", tmp_path / "published.json")
    setting = Setting(paper, tmp_path)
    assert rows.tuned(setting, "joint") == rows.Choice(1e-4, {})

    def work(run):  # the second of six is the best: by inversion alone
        trial = "forget_weight0.5" in run.name and "lr0.0003" in run.name
        values = {
            "p_f_reject": {"value": 0.25},
            "ra_never_replayed": 0.75,
            "inversion_100": 0.5 if trial else 0.625,
        }
        for t in run.tasks:
            t.folder.mkdir(parents=True)
            last = json.dumps({"rows": [{"name": "joint", "values": values}]})
            (t.folder / t.maker.last).write_text(last)

    monkeypatch.setattr(runs, "_work", work)
    start("tune", tmp_path, "--methods", "joint")
    assert rows.tuned(setting, "joint") == rows.Choice(3e-4, {"forget_weight": 0.5})
    # with losses that were not tuned, that of the others; of a method that was not, the defaults
    crossed = Setting(paper, tmp_path, loss="crossed")
    assert rows.tuned(crossed, "joint") == rows.tuned(setting, "joint")
    assert rows.tuned(setting, "pcgrad") == rows.Choice(1e-4, {})
    (told,) = json.loads((tmp_path / "tuned.json").read_text()).values()
    assert not rows.TUNED.exists()  # what is published stays
    assert told["joint"]["score"] == 2.0
    assert sorted(t["score"] for t in told["joint"]["trials"]) == [1.875] * 5 + [2.0]
    assert rows.tuning(crossed, "joint") == "6 trials (toy, remembered by replay)"
    # worse rates that are tried later are trials too, and take nothing back
    published = {"pcgrad": {"learning_rate": 1.0, "options": {}, "score": 1.0, "trials": []}}
    rows.TUNED.write_text(json.dumps({"toy, remembered by replay": published}))
    start("tune", tmp_path, "--methods", "joint", "--learning_rates", 1e-3)
    assert rows.tuned(setting, "joint") == rows.Choice(3e-4, {"forget_weight": 0.5})
    assert rows.tuning(setting, "joint").startswith("9 trials")
    assert rows.tuned(setting, "pcgrad") == rows.Choice(1.0, {})
    (told,) = json.loads((tmp_path / "tuned.json").read_text()).values()
    assert told.keys() == {"joint"}  # nothing of what is published is copied
    other = Setting(paper._replace(base={**paper.base, "seed": 1}), tmp_path)
    assert other.base.folder.name != told["joint"]["base"] == setting.base.folder.name


def options(row, *names: str) -> list:
    return [row.runs[0].tasks[0].options[n] for n in names]


def test_at_paper_scale_steps_and_both_rates_are_the_papers(tmp_path):
    steps = {
        "CIFAR10": [2000, 2000, 20000, 4000, 200],
        "CIFAR100": [2000, 2000, 20000, 2000, 200],
        "STL10": [2000, 2000, 30000, 4000, 200],
    }
    for name, expected in steps.items():
        setting = settings.Setting(getattr(worlds, name), tmp_path)
        found = tables.class_wise(setting, [*rows.PAPER, "joint"], [1], paper=True)
        assert [r.steps for r in found[::2]] == [r.steps for r in found[1::2]] == [*expected, 200]
        assert [options(r, "max_train_steps") for r in found] == [[r.steps] for r in found]
        rates = [options(r, "learning_rate")[0] for r in found]
        assert rates == [1e-4, 1e-5] * 6
    assert {r.name: r.choice.options for r in found}["SA, learning rate 1e-05"] == {"lam": 1e7}
    setting = settings.Setting(worlds.CIFAR10, tmp_path)
    grid = script("figure4").table(setting, "ebu_added", 1, 200, 1e-5)
    assert options(grid[0.2, 0.8], "learning_rate", "method_options") == [
        1e-5,
        {"alpha": 0.2, "delta": 0.8},
    ]


def test_options_that_would_be_taken_for_others_are_refused(tmp_path):
    for name, given, message in (
        ("table6", ("--seeds", 1, 1), "--seeds 1 1: give each seed once"),
        ("table1", ("--seeds", 0), "--seeds 0: .* not 0, on which tune.py"),
        ("figure2", ("--seed", 0), "--seed 0: give"),
        ("table6", ("--methods", "spm"), "--methods spm: no such method; give one of fine_tune"),
        ("figure6", ("--learning_rate", 1e-5), "--learning_rate 1e-05 needs --scale paper"),
    ):
        with pytest.raises(InputError, match=message):
            start(name, tmp_path, *given, "--dry_run")
    assert rows.check_methods(["joint", "joint"]) == ["joint"]


def test_retrain_learns_as_the_base_did_and_nothing_of_it(tmp_path):
    setting = settings.Setting(worlds.DIGITS, tmp_path, loss="crossed")
    (row,) = tables.class_wise(setting, ["retrain"], [1, 2], paper=False, sa_steps=0)
    assert row.seeds == [1]
    names = ("max_train_steps", "learning_rate", "lr_scheduler", "train_batch_size")
    assert options(row, *names) == [2000, 0.002, "cosine", 64]
    assert options(row, "remember") == ["replay"]


def test_relabelling_is_for_methods_without_a_forget_loss_of_their_own(tmp_path):
    setting = settings.Setting(worlds.DIGITS, tmp_path, loss="relabel")
    for method in rows.ALL:
        config = setting.run("x", method, seed=1).tasks[0].config
        found = config.forget_loss  # it refuses what a method does not take
        own = method in ("fine_tune", "gradient_ascent", "erasediff", "retrain")
        assert found == (None if own else "relabel"), method


def test_every_rule_of_two_gradients_has_trials_of_its_strength():
    for method, (tuned, values) in rows.GRIDS.items():
        assert tuned in (methods[method].strength, "learning_rate"), method
        assert len(rows.trials(method)) == 6, method
        assert list(values) == sorted(set(values)), method
    two = [m for m, r in methods.items() if r.forgets == "surrogate" and not m.startswith("ebu_")]
    assert set(two) - set(rows.GRIDS) == {"aegis"}  # it replays nothing


def test_the_first_run_draws_the_base_alone_when_the_base_is_another(paper, tmp_path):
    setting = settings.Setting(paper, tmp_path)
    drawn = experiment.base_drawn
    (setting.root / "samples").mkdir(parents=True)
    attack, made = setting.root / "samples" / "0.json", setting.base.folder / "README.md"
    attack.write_text("{}")
    assert not drawn(setting)
    made.parent.mkdir()
    made.write_text("")
    os.utime(attack, (1, 1))
    assert not drawn(setting)
    os.utime(made, (0, 0))
    assert drawn(setting)


def test_what_is_published_is_a_report_of_a_fair_size(tmp_path, capsys):
    def publish(*reports: Path) -> None:
        given = script("publish").Publish(reports=list(reports), to=tmp_path / "docs")
        script("publish").main(given)

    (tmp_path / "r" / "plots").mkdir(parents=True)
    for name in ("results.json", "along.gif", "plots/0.svg", "report.html"):
        (tmp_path / "r" / name).write_text("{}")
    publish(tmp_path / "r")
    copied = {p.name for p in (tmp_path / "docs" / "r").rglob("*.*")}
    assert copied == {"results.json", "along.gif", "0.svg"}
    with pytest.raises(InputError, match="several reports are called r"):
        publish(tmp_path / "r", tmp_path / "cifar" / "r")
    with pytest.raises(InputError, match="has no report"):
        publish(tmp_path)
    (tmp_path / "r" / "along.gif").write_bytes(bytes(5_000_001))
    with pytest.raises(InputError, match=r"has 5\.0 MB"):
        publish(tmp_path / "r")


def test_a_folder_is_of_its_options_and_of_nothing_else(paper, tmp_path):
    Setting = settings.Setting

    def folders(root: Path, *, given: dict | None = None, **options) -> list[str]:
        setting = Setting(options.pop("world", paper), root, **options)
        run = setting.run("x", "joint", seed=1, options=given)
        made = [t for r in (*setting.ground, run) for t in r.tasks]
        return [str(t.folder.relative_to(root)) for t in made]

    here = folders(tmp_path / "a")
    assert len(set(here)) == len(here) == 6
    assert here == folders(tmp_path / "b" / "c", data={"parquet": [Path("elsewhere")]})
    changed = {
        "method": folders(tmp_path, given={"method_options": {"forget_weight": 0.5}}),
        "loss": folders(tmp_path, loss="crossed"),
        "regime": folders(tmp_path, regime="partial"),
        "base": folders(tmp_path, world=paper._replace(base={**paper.base, "seed": 1})),
    }
    others = {
        name: [a != b for a, b in zip(here, found, strict=True)] for name, found in changed.items()
    }
    #                                          base   judge  reject sets   unlearn evaluate
    assert others == {
        "method": [False, False, False, False, True, True],
        "loss": [False, False, False, False, True, True],
        "regime": [False, False, False, True, True, True],
        "base": [True, False, False, True, True, True],
    }


def test_dry_run_makes_nothing(tmp_path, made, capsys):
    start("figure4", tmp_path / "o", "--dry_run")
    assert "20 runs, 0 of them there already; to do: 20" in capsys.readouterr().out
    assert not made
    assert not (tmp_path / "o").exists()


def test_a_run_that_fails_is_named_and_the_others_are_done(
    paper, tmp_path, made, capsys, monkeypatch
):
    # the judges know nothing of it; the sets are asked for a class that there is not
    world = paper._replace(name="broken", forget="12")
    monkeypatch.setitem(OnImages.scales, "broken", world)
    given = (
        "--workers",
        1,
        "--output_dir",
        tmp_path,
        "--scale",
        "broken",
        "--methods",
        "joint",
        "--sa_steps",
        0,
    )
    table6 = script("table6")
    with pytest.raises(SystemExit) as end:
        command(table6.main, table6.Table6, None, [str(g) for g in given])
    said = capsys.readouterr().err
    assert end.value.code == 2
    assert made == [name.replace("toy", "broken") for name in GROUND]
    assert "broken: sets, full replay: InputError: --forget 12: there is no such class" in said
    assert "seed 1: needs broken: sets, full replay" in said
    (log,) = (tmp_path / "broken").glob("sets-*.log")
    assert str(log) in said
    assert "Traceback" in log.read_text()


def test_what_needs_a_failed_run_is_told_so_down_to_the_last(monkeypatch, tmp_path):
    def run(name: str, *after: str):
        return runs.Run(name, (runs.Task(settings.TRAIN, {}, tmp_path / name),), 1, 1, after)

    chain = [run("a"), run("b", "a"), run("c", "b")]
    monkeypatch.setattr(runs, "_work", lambda run: f"no {run.name}")
    with pytest.raises(runs.Failed, match=r"^a: no a\nb: needs a\nc: needs b$"):
        runs.execute(chain, 1)
    with pytest.raises(RuntimeError, match="wait for each other: b, d"):
        runs.execute([run("b", "d"), run("d", "b")], 1)

    def killed(run):
        raise BrokenProcessPool

    monkeypatch.setattr(runs, "_work", killed)
    with pytest.raises(runs.Failed, match=r"was killed \(out of memory\?\) while these ran: a;"):
        runs.execute(chain, 1)


def test_a_worker_keeps_nothing_of_the_run_before(tmp_path):
    from accelerate import Accelerator

    seen = []

    def make(config):
        seen.append(Accelerator(cpu=True, mixed_precision=config.mixed_precision).mixed_precision)

    for options in ({"mixed_precision": "bf16"}, {}):
        t = runs.task(settings.TRAIN._replace(make=make), options, tmp_path, "x")
        assert runs._work(runs.Run("a", (t,), 1, 1)) is None
    assert seen == ["bf16", "no"]


def test_options_that_a_task_does_not_take_are_told(tmp_path):
    def run(**options) -> runs.Run:
        return runs.Run("a", (runs.task(settings.TRAIN, options, tmp_path, "x"),), 1, 1)

    for given, said in (
        ({"bogus": 1, "odd": 1}, "train takes no option bogus, odd; see the fields of Train"),
        ({"model": "huge"}, "--model must be one of paper, small"),
        ({"cond_dropout": 2.0}, "--cond_dropout must be in"),
    ):
        with pytest.raises(runs.Failed, match=rf"^a: InputError: {said}.* \(see .*log\)$"):
            runs.execute([run(digits=True, **given)], 1)
        assert said in next(tmp_path.glob("*.log")).read_text()
        next(tmp_path.glob("*.log")).unlink()
    with pytest.raises(ValueError, match="two different runs have the same name: a"):
        runs.execute([run(digits=True), run()], 1)


def test_other_images_in_the_same_place_are_refused(paper, tmp_path):
    """Where they lie is in no hash, so that they may be moved; what they are is looked at."""
    given = {"output_dir": tmp_path / "o", "train_data_dir": tmp_path / "images"}
    (tmp_path / "images" / "cat").mkdir(parents=True)
    (tmp_path / "images" / "cat" / "0.png").write_bytes(b"one")
    args = OnImages(**given)
    setting = args.setting()
    args._same_images(setting.root)
    args._same_images(setting.root)
    (tmp_path / "images" / "cat" / "0.png").write_bytes(b"another")
    with pytest.raises(InputError, match="was begun with another images"):
        args._same_images(setting.root)


INTERRUPTED = """
import sys
from pathlib import Path
from tests.test_examples_paper import TOY, slower
from ebu_optim.experiments.options import OnImages
from ebu_optim.training import exit_on_input_errors
if __name__ == "__main__":
    OnImages.scales["small"] = slower(TOY)
    args = OnImages(workers=1, output_dir=Path(sys.argv[1]))
    setting = args.setting()
    from ebu_optim.experiments import runs
    exit_on_input_errors(lambda: runs.execute(setting.ground[:1], 1))
"""


def slower(world):
    steps = {"max_train_steps": 160, "checkpointing_steps": 10}
    return world._replace(base={**world.base, **steps})


def test_ctrl_c_ends_the_workers_and_the_same_command_goes_on(paper, tmp_path, made):
    script = tmp_path / "script.py"
    script.write_text(INTERRUPTED)
    (base, *_) = settings.Setting(slower(paper), tmp_path).ground
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(
        [sys.executable, script, tmp_path],
        text=True,
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
        # a process that pytest-xdist or nohup started ignores it, and so would its children
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    ) as process:
        try:
            until = time.monotonic() + PATIENCE
            while not list(base.folder.glob("checkpoints/step_*")) and process.poll() is None:
                assert time.monotonic() < until, "no checkpoint yet"
                time.sleep(0.02)
            os.killpg(process.pid, signal.SIGINT)  # as a terminal does it: to all of the group
            _, said = process.communicate(timeout=PATIENCE)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == 130, said
    assert "interrupted; the same command continues" in said
    assert not base.done
    runs.execute([base], 1)
    assert made == [base.name]
    assert base.done
    assert "resuming after step" in base.folder.with_name(f"{base.folder.name}.log").read_text()
    rows = (base.folder / "log.jsonl").read_text().splitlines()
    assert [json.loads(row)["step"] for row in rows] == list(range(10, 161, 10))


KILLED = """
import multiprocessing, os, sys, time
from concurrent.futures import ProcessPoolExecutor
from ebu_optim.experiments import runs
if __name__ == "__main__":
    pool = ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), runs._start, (1,))
    print(pool.submit(os.getpid).result(), flush=True)
    pool.submit(time.sleep, 600)
    time.sleep(600)
"""


def test_workers_end_when_their_parent_is_killed(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(KILLED)
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(
        [sys.executable, script], text=True, env=env, stdout=subprocess.PIPE, start_new_session=True
    ) as process:
        try:
            worker = int(process.stdout.readline())
            process.kill()
            until = time.monotonic() + PATIENCE
            while alive(worker):
                assert time.monotonic() < until, "the worker is still there"
                time.sleep(0.02)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)


def alive(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def test_the_smoke_world_generates_its_images_and_says_so(monkeypatch, tmp_path):
    world = worlds.STL10_SMOKE
    setting = settings.Setting(world, tmp_path)
    images, base, *_ = setting.ground
    assert base.after == (images.name,)
    assert "mean nothing" in world.smoke
    assert "generated" in world.title
    assert runs._work(images) is None
    assert images.done
    found = data.load(base.tasks[0].config, "all")
    assert found.images.shape == (500, 3, 16, 16)
    assert len(found.classes) == 10
    assert found.labels.bincount().tolist() == [50] * 10
    others = settings.Setting(world._replace(generated={"seed": 1}), tmp_path)
    assert others.base.folder != setting.base.folder
    given = settings.Setting(world, tmp_path, data={"parquet": [Path("x")]})
    assert [r.name for r in given.ground] == [r.name for r in setting.ground[1:]]
    assert given.base.options["parquet"] == [Path("x")]
