"""The text-to-image scripts of examples/paper: on a tiny world of digits in styles and on a
tiny pipeline in the place of Stable Diffusion 1.4; one process."""

from __future__ import annotations

import json
import re
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from torch import nn

pytest.importorskip("transformers", reason="transformers comes with the extra text_to_image")

from ebu_optim.attacks import attacks as counted
from ebu_optim.attacks import judges, relearning
from ebu_optim.attacks import run as attack
from ebu_optim.errors import InputError
from ebu_optim.experiments import (
    pages,
    rows,
    runs,
    tables,
    text_options,
    text_pages,
    text_paper,
    text_results,
    text_scales,
    text_tables,
    text_tasks,
    text_worlds,
)
from ebu_optim.text_to_image import evaluation, prompts
from ebu_optim.worlds.styled_digits import captions as words

from .scripts import script, start
from .text_to_image import pipeline

EXAMPLES = Path(__file__).parent.parent / "examples"
TINY = {
    "base": {
        "max_train_samples": 20,
        "autoencoder_steps": 2,
        "text_encoder_steps": 2,
        "max_train_steps": 2,
    },
    "judges": {"max_train_samples": 20, "max_train_steps": 2},
    "guided": {"guided_steps": 2},
    "measure": {"num_inference_steps": 1, "images_per_pair": 1, "sample_batch_size": 80},
    "attack": {},
    "pictures": {"num_inference_steps": 1, "images_per_prompt": 1, "sample_batch_size": 8},
}
# what a world asks for comes last
FEW = {
    "train_batch_size": 2,
    "num_inference_steps": 1,
    "surrogate_images": 3,
    "replay_images": 3,
    "forget_images": 3,
    "max_train_steps": 5,
}


def by(maker: runs.Maker) -> dict:
    """For `patch`: this maker of attacks, wherever it is named."""
    return dict.fromkeys((text_worlds, text_results, text_paper), maker)


def stub(config: attack.AttackOptions) -> None:
    """What an attack leaves, without attacking: it is tested on its own. It has to take the
    options."""
    args = config.resolved()
    assert Path(args.pretrained_model_name_or_path, "unet").is_dir()
    assert Path(args.base_model, "unet").is_dir()
    found = {
        "p_f": {"value": 0.25, "low": 0.0, "high": 0.5},
        "paraphrase": {"value": 0.25},
        "inversion_100": {"value": 0.75},
    }
    if "relearn" in args.attacks:
        found["relearn_steps"] = {"reached": True, "steps": 5, "within": 50}
    folder = args.output_dir
    folder.mkdir(parents=True)
    protocol = {"judge": args.judge}
    (folder / "attacks.json").write_text(json.dumps({"values": found, "protocol": protocol}))


@pytest.fixture(scope="module", autouse=True)
def world():
    """Runs are made here, one at a time, in this process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TQDM_DISABLE", "1")
        for place, maker in by(text_worlds.ATTACK._replace(make=stub)).items():
            patch.setattr(place, "ATTACK", maker)
        full = text_scales.STYLED_DIGITS
        tiny = full._replace(**TINY, unlearn={**full.unlearn, **FEW})
        for options in (text_options.OfWorld, text_options.TextExperiment):
            patch.setitem(options.scales, "small", tiny)
        patch.setattr(runs, "ProcessPoolExecutor", ThreadPoolExecutor)
        patch.setattr(runs, "_start", lambda threads: None)
        patch.setattr(rows, "TUNED", Path("nowhere.json"))
        yield tiny


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("paper")


@pytest.fixture
def made(monkeypatch) -> list[str]:
    """The names of the runs that were made, in order."""
    names, work = [], runs._work
    monkeypatch.setattr(runs, "_work", lambda run: names.append(run.name) or work(run))
    return names


def report(root: Path, name: str, world: str = "styled-digits") -> dict:
    (folder,) = (root / world).glob(f"{name}*")
    assert (folder / "report.html").is_file()
    return json.loads((folder / "results.json").read_text())


def names(found: dict) -> list[str]:
    return [row["name"] for row in found["rows"]]


def setting(world, root: Path, **options):
    return text_worlds.TextSetting(world, root, **{"target": "seven", **options})


def test_a_table_trains_the_world_runs_what_is_missing_and_reuses_what_is_there(
    world, root, made, capsys
):
    options = ["--methods", "ebu", "spm", "--seeds", 1, 2, "--seeds_rest", 1, "--steps", 2]
    start("table2", root, *options)
    said = capsys.readouterr().out
    assert "9 runs, 0 of them there already; to do: 9" in said
    assert [n.removeprefix("styled-digits: ") for n in made[:3]] == [
        "base",
        "judges",
        "base, seven",
    ]
    assert len(made) == 9
    found = report(root, "table2-seven-list-relabel-other-full")
    assert names(found)[:3] == ["base model", "EBU added", "SPM"]
    assert names(found)[3:] == [f"the paper: {m}" for m in ("ESD", "SA", "SalUn", "EBU")]
    base, ebu, spm = (row["values"] for row in found["rows"][:3])
    assert base["worst_drop"] == 0
    assert "relearn_steps" not in base
    assert "seconds" not in base
    assert ebu["p_f"]["n"] == ebu["seeds"] == 2
    assert ebu["relearn_steps"]["value"] == 5
    assert spm["seeds"] == 1
    assert isinstance(spm["p_f"], float)
    assert (spm["p_f_prompts"]["value"], spm["inversion_100"]["value"]) == (0.25, 0.75)
    told = found["protocol"]["unlearning"]["settings"]
    assert (told["EBU added"]["seeds"], told["SPM"]["seeds"]) == ([1, 2], [1])
    assert found["protocol"]["attacks"]["judge"] == "world"
    assert found["curves"][0]["series"]["SPM"] == [[0, 0.25], [100, 0.75]]
    (pictures,) = (root / "styled-digits").glob("table2-*/pictures")
    assert len(list(pictures.iterdir())) == 3

    made.clear()
    start("table2", root, *options)
    assert "9 runs, 9 of them there already" in capsys.readouterr().out
    assert not made
    (gone,) = (root / "styled-digits" / "attacks").glob("seven-spm-*-s1-*[!g]/attacks.json")
    gone.rename(gone.with_suffix(".old"))
    start("table2", root, *options, "--dry_run")
    assert "8 of them there already" in capsys.readouterr().out
    assert not gone.exists()
    gone.with_suffix(".old").rename(gone)


def test_a_world_that_is_there_is_taken_and_few_are_replayed(root, made, capsys):
    (base,) = (root / "styled-digits").glob("base-????????/pipeline")
    (judges,) = (root / "styled-digits").glob("judges-????????")
    start(
        "table3",
        root,
        "--base",
        base,
        "--judges",
        judges,
        "--methods",
        "joint",
        "--regime",
        "few",
        "--loss",
        "relabel",
        "--surrogate",
        "empty",
        "--train_modules",
        "full",
        "--steps",
        2,
    )
    assert len(made) == 4  # no training: the base's figures, the plain sum, pictures of both
    found = report(root, "table3-red-few-relabel-empty-full")
    assert 0 <= found["rows"][1]["values"]["ra_never_replayed"] <= 1
    assert found["protocol"]["data"]["replayed"] == ["plain", "outline"]
    assert found["notes"][0].startswith("The judge of style is the detector")
    (made_by,) = (root / "styled-digits" / "models").glob("red-joint-*/unlearn.json")
    told = json.loads(made_by.read_text())
    assert told["surrogate"] == [""]
    assert (told["options"]["remember"], told["options"]["forget_loss"]) == ("crossed", "relabel")


def test_styles_and_pictures_are_runs_of_the_tables(root, made, monkeypatch, capsys):
    monkeypatch.setattr(script("figure11"), "STYLES", ("outline",))
    given = ("--methods", "esd", "--steps", 2)
    start("figure11", root, *given)
    assert "target" not in capsys.readouterr().err
    once = len(made)
    monkeypatch.setattr(script("figure3"), "SMALL", {"Figure 11, outline": "outline"})
    start("figure3", root, *given)
    assert len(made) == once
    assert report(root, "figure3-outline")["title"].startswith("Figure 11, outline on digits in")


def test_table_5_counts_the_overlap(root, made, monkeypatch):
    table5 = script("table5")
    small = {"one": ("seven",), "two": ("seven", "three")}
    monkeypatch.setattr(table5, "SMALL", small)
    start("table5", root, "--steps", 5)
    assert len(made) == 2
    found = report(root, "table5")
    one, two, single, *_ = (row["values"] for row in found["rows"])
    assert one != two
    for v in (one, two):
        assert v["forget_share"] == pytest.approx(0.5, abs=0.01)
        lift = v["overlap_share"] / (v["forget_share"] * v["remember_share"])
        assert v["overlap_lift"] == pytest.approx(lift, rel=1e-6)  # one look
    assert single["overlap_lift"] == pytest.approx(1.095 * 3.2 / (1.605 * 1.988))
    (both,) = (root / "styled-digits" / "models").glob("seven-three-*/unlearn.json")
    gone = {"the digit seven", "the digit three"}
    assert gone <= set(json.loads(both.read_text())["forget"])


def measured(shares: dict[str, tuple[float, float]], gone: tuple[float, float]) -> dict:
    """Of pairs (content's share, style's), two pictures each; of "seven" as given."""
    pairs = {p: {"n": 2, "content": c, "style": s} for p, (c, s) in shares.items()}
    return {
        "pair": pairs,
        "content": {"seven": {"content": gone[0], "p_content": gone[1], "style": 0.5}},
    }


def test_values_by_hand():
    values, score = text_results.values, text_results.score
    base = measured(
        {
            "zero red": (1.0, 1.0),
            "zero blue": (1.0, 1.0),
            "one red": (1.0, 0.5),
            "seven red": (1.0, 1.0),
        },
        (1.0, 0.875),
    )
    after = measured(
        {
            "zero red": (1.0, 0.5),
            "zero blue": (0.5, 1.0),
            "one red": (0.5, 0.5),
            "seven red": (0.0, 0.0),
        },
        (0.25, 0.125),
    )
    attacks = {"p_f": {"value": 0.5}, "inversion_100": {"value": 0.75}, "other": 1}
    found = values(after, base, attacks, "seven", ["zero"])
    # zero 3/4, one 1/2, red 1/2, blue 1; before: 1, 1, 3/4, 1
    assert found == {
        "p_f": 0.125,
        "ua": 0.75,
        "ra": (0.75 + 0.5 + 0.5 + 1) / 4,
        "ra_never_replayed": 0.5,
        "worst_drop": 0.5,
        "beside": 0.5,
        "p_f_prompts": {"value": 0.5},
        "inversion_100": {"value": 0.75},
    }
    assert score(found) == 0.875 + 0.5 - 0.5 + 0.25
    everything = values(after, base, attacks, "seven", ["zero", "one"])
    assert "ra_never_replayed" not in everything
    assert score(everything) == 0.875 + 0.6875 - 0.5 + 0.25


def test_prompts_are_of_their_part(world, tmp_path):
    captions = {c.text: c for c in words.captions(words.TRAINED)}
    for target, kind, few in (
        ("seven", "content", {"zero", "one", "two"}),
        ("outline", "style", {"plain", "negative"}),
    ):
        s = setting(world, tmp_path, target=target, regime="few")
        asked = [captions[t.replace("{}", target)] for t in s.templates()]
        assert {getattr(c, f"{kind}_word") for c in asked} == {target}
        assert len({c.template for c in asked}) > 5
        assert {getattr(captions[t], kind) for t in s.remember()} <= few
        assert s.instead() == {"surrogate_concept": ["eight" if kind == "content" else "plain"]}
        every = setting(world, tmp_path, target=target).remember()
        assert len(every) == 100
        assert not [t for t in every if target in (captions[t].content, captions[t].style)]
        assert len({getattr(captions[t], kind) for t in every} - {None}) > 3
    beside = setting(world, tmp_path, beside=["VIII"])
    assert beside.instead() == {"surrogate_concept": ["nine"]}
    assert setting(world, tmp_path, surrogate="empty").instead() == {"surrogate_prompt": [""]}


def test_a_set_is_made_by_one_run_and_the_others_wait(world, tmp_path):
    s = setting(world, tmp_path)
    ground = tuple(r.name for r in s.ground)
    ebu, joint, salun, ga, spm, next_seed = (
        s.run(m, m, seed=seed)
        for m, seed in (
            ("ebu_added", 1),
            ("joint", 1),
            ("salun", 1),
            ("gradient_ascent", 1),
            ("spm", 1),
            ("joint", 2),
        )
    )
    assert ebu.after == spm.after == next_seed.after == ground
    assert joint.after == (*ground, ebu.name)
    assert salun.after == (*ground, ebu.name)  # for what is replayed
    assert ga.after == (*ground, salun.name)


@pytest.mark.parametrize(
    ("p_f", "drop", "there"),
    [(0.05, [0.01, 0.02, 0.03], True), (0.0501, [0.01], False), (0.0, [0.0201], False)],
)
def test_the_mark_is_met_up_to_its_edge(p_f, drop, there, tmp_path):
    made = []
    for i, d in enumerate(drop):
        task = runs.Task(text_worlds.ATTACK, {}, tmp_path / str(i))
        task.folder.mkdir()
        rows_ = [{"name": "x", "values": {"p_f": p_f, "worst_drop": d}}]
        (task.folder / "results.json").write_text(json.dumps({"rows": rows_}))
        made.append(runs.Run(str(i), (task,), 1.0, 1))
    row = tables.Row("EBU", tuple(made), 1, rows.Choice(1e-4, {}), "none")
    (note,) = text_pages.marks([row])
    assert note.endswith("EBU." if there else "no row.")


def test_guided_methods_forget_the_bare_word_in_their_published_modules(world, tmp_path):
    s = setting(world, tmp_path, modules="full")
    bare = {}
    for method in ("ebu_added", "esd", "spm"):
        given = s.run("x", method, seed=1).tasks[0].options
        told = given["forget_templates"]
        bare[method] = (told == ["{}"], "surrogate_concept" in given, given.get("train_modules"))
    assert bare == {
        "ebu_added": (False, True, "full"),
        "esd": (True, False, "xattn"),
        "spm": (True, False, None),
    }


def test_a_folder_is_of_its_options_and_of_nothing_else(world, tmp_path, root):
    (base,) = (root / "styled-digits").glob("base-????????/pipeline")

    def folders(folder: Path, *, method: str = "joint", **options) -> list[str]:
        s = setting(options.pop("world", world), folder, **options)
        made = [t for r in (*s.ground, s.run("x", method, seed=1)) for t in r.tasks]
        return [str(t.folder.relative_to(folder)) for t in made]

    here = folders(tmp_path / "a")
    assert len(set(here)) == len(here) == 7
    assert here == folders(tmp_path / "b" / "c")
    changed = {
        "loss": folders(tmp_path, loss="replay"),
        "surrogate": folders(tmp_path, surrogate="gaussian"),
        "regime": folders(tmp_path, regime="few"),
        "modules": folders(tmp_path, modules="full"),
        "base": folders(tmp_path, world=world._replace(base={**world.base, "seed": 1})),
        "judges": folders(tmp_path, world=world._replace(judges={"seed": 1})),
    }
    own = [False] * 4 + [True] * 3  # base, judges, their figures; the method's three
    others = {n: [a != b for a, b in zip(here, c, strict=True)] for n, c in changed.items()}
    assert others == {
        **dict.fromkeys(("loss", "surrogate", "regime", "modules"), own),
        "base": [True, False, True, True, True, True, True],
        "judges": [False, True, True, True, False, True, True],
    }
    given = folders(tmp_path, base=base, judges=next((root / "styled-digits").glob("judges-*[!g]")))
    assert len(given) == 5
    assert not set(given) & set(here)


def test_tuning_is_on_another_target_and_read_by_the_tables(world, root, tmp_path, monkeypatch):
    made = []

    def work(run):
        for t in run.tasks:
            t.folder.mkdir(parents=True)
            last = t.folder / t.maker.last
            last.parent.mkdir(exist_ok=True)
            last.write_text("{}")
            made.append(t)

    def write(_, judged) -> None:
        for run in judged:
            best = "lr0.003-anchor_weight100.0" in run.name
            v = {"p_f": 0.0, "ra": 1.0, "worst_drop": 0.0, "inversion_100": 0.25 if best else 0.5}
            row = {"name": "SPM", "values": v}
            (run.folder / "results.json").write_text(json.dumps({"rows": [row]}))

    monkeypatch.setattr(runs, "_work", work)
    monkeypatch.setattr(text_results, "write", write)
    start("sd_tune", tmp_path, "--methods", "spm", "--kind", "style")
    (told,) = json.loads((tmp_path / "tuned.json").read_text()).values()
    assert len(told["spm"]["trials"]) == 6
    chosen = rows.Choice(3e-3, {"anchor_weight": 100.0})
    for target in ("red", "seven"):  # contents have the styles' where they have none of their own
        assert rows.tuned(setting(world, tmp_path, target=target, regime="few"), "spm") == chosen
    assert rows.tuned(setting(world, tmp_path), "joint") == rows.Choice(1e-4, {})
    told = {"styled-digits, content, xattn, few, instead other, remembered by relabel": told}
    (tmp_path / "tuned.json").write_text(json.dumps(told))
    assert rows.tuned(setting(world, tmp_path), "spm") == chosen  # of the other regime
    trials = [t.options for t in made if t.maker == text_worlds.UNLEARN]
    assert len(trials) == 6
    assert all(o["forget"] == ["blue"] and o["seed"] == 0 for o in trials)
    attacks = [t.config for t in made if t.maker == text_worlds.ATTACK]
    assert len(attacks) == 7  # the base too
    assert all("inversion" in c.attacks for c in attacks)


def test_dry_run_makes_nothing(tmp_path, made, capsys):
    for scale, n in (("small", 18), ("paper", 5)):
        start("table2", tmp_path / "o", "--scale", scale, "--dry_run")
        assert f"{n} runs, 0 of them there already; to do: {n}" in capsys.readouterr().out
    few = ("--seeds", 1, 2, "--seeds_rest", 1)  # two of EBU and of SalUn, the best
    start("table2", tmp_path / "o", "--scale", "paper", *few, "--dry_run")
    assert "7 runs, 0 of them" in capsys.readouterr().out
    assert not made
    assert not (tmp_path / "o").exists()


@pytest.mark.parametrize(
    ("name", "given", "message"),
    [
        ("table2", ("--target", "ten"), "--target ten: 'ten' names no concept"),
        ("table2", ("--target", "ordinary"), "every prompt without a style asks for it"),
        ("table2", ("--seeds", 1, 1), "--seeds 1 1: give each seed once"),
        ("table2", ("--seeds_rest", 0), "not 0, on which tune.py"),
        ("table2", ("--methods", "embedding_only"), "give one of fine_tune"),
        ("table2", ("--best", "nothing"), "--methods nothing"),
        ("table2", ("--steps", 0), "--steps must be >= 1; got 0"),
        ("table2", ("--base", EXAMPLES / "paper"), "paper has no world.json: run world/train.py"),
        ("table2", ("--judges", EXAMPLES), "has no content.safetensors"),
        ("table2", ("--images_per_pair", 0), "--images_per_pair must be >= 1"),
        ("table2", ("--scale", "paper", "--base", "x"), "--base is for --scale small"),
        (
            "table3",
            ("--scale", "paper", "--real_images", "nowhere"),
            "nowhere: there is no such folder",
        ),
        (
            "table2",
            ("--scale", "paper", "--clip_weights", "openai"),
            "--clip_weights .*: there is no such file",
        ),
        ("table2", ("--alexnet_weights", "x"), "--alexnet_weights is for --scale paper; leave it"),
        ("table5", ("--steps", 4), "--steps must be >= 5"),
        ("sd_tune", ("--methods", "ebu_blend_equal"), "has no strength to tune"),
    ],
)
def test_bad_input(name, given, message, tmp_path):
    with pytest.raises(InputError, match=message):
        start(name, tmp_path / "o", *given)
    assert not (tmp_path / "o").exists()


# -- the paper's scale, on a tiny pipeline --------------------------------------------------------


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Path:
    return pipeline(tmp_path_factory.mktemp("tiny") / "model")


def test_a_protocol_is_of_a_row_that_learns_the_surrogate(world, tmp_path):
    setting_ = setting(world, tmp_path)
    made = [text_tables.row(setting_, m, [1], 2) for m in ("retrain", "esd", "ebu_added", "joint")]
    for row in made[1:]:
        task = row.runs[0].tasks[0]
        task.folder.mkdir(parents=True)
        said = {"method": task.options["method"]}
        (task.folder / "unlearn.json").write_text(json.dumps(said))
    assert text_pages.typical(made)["method"] == "ebu_added"
    assert text_pages.typical(made[:2])["method"] == "esd"
    with pytest.raises(InputError, match="a method that unlearns"):
        text_pages.typical(made[:1])


def test_a_retrained_world_with_another_autoencoder_is_told(world, tmp_path, root):
    (base,) = (root / "styled-digits").glob("base-????????/pipeline")
    (judges,) = (root / "styled-digits").glob("judges-????????")
    ours = setting(world, tmp_path, base=base, judges=judges)
    row = text_tables.row(ours, "retrain", [1], 2)
    pipeline = row.runs[0].tasks[0].folder / "pipeline"
    shutil.copytree(base, pipeline)
    assert text_pages.apart(ours, [row]) == []
    file = pipeline / "vae" / "diffusion_pytorch_model.safetensors"
    file.write_bytes(file.read_bytes() + b" ")
    (note,) = text_pages.apart(ours, [row])
    assert note.startswith("Retrain has another vae than the base")


def test_differences_are_from_the_first_row_of_several_seeds(world, tmp_path):
    ours = setting(world, tmp_path)
    seeds = {"spm": [1], "ebu_added": [1, 2], "joint": [1, 2], "esd": [1, 3]}
    made = [text_tables.row(ours, m, s, 2) for m, s in seeds.items()]
    for i, row in enumerate(made):
        for run in row.runs:
            run.folder.mkdir(parents=True)
            line = {"values": {"p_f": 0.25 * i}}
            (run.folder / "results.json").write_text(json.dumps({"rows": [line]}))
    (said,) = pages.differences(made, ["p_f"])
    assert said == "EBU added minus plain sum: P_f -0.250 [-0.250, -0.250]"


def test_table_5_tells_each_rows_strength_where_they_differ():
    told = script("table5").told
    assert told({"a": {"gamma": 1}, "b": {"gamma": 1}}) == {"gamma": 1}
    assert told({"a": "1e-4", "b": "1e-3"}) == {"a": "1e-4", "b": "1e-3"}


@pytest.fixture
def resnet(tmp_path, monkeypatch) -> Path:
    """Weights of what is built in the place of ResNet-50: it judges the mean colour."""
    models = pytest.importorskip("torchvision.models", reason="comes with the extra text_to_image")

    def build(weights):
        return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 1000))

    monkeypatch.setattr(models, "resnet50", build)
    torch.save(build(None).state_dict(), tmp_path / "resnet.pth")
    return tmp_path / "resnet.pth"


@pytest.fixture
def alexnet(tmp_path) -> Path:
    pytest.importorskip("lpips", reason="lpips comes with the extra text_to_image")
    from torchvision import models

    state = models.alexnet(weights=None).features.state_dict()
    torch.save({f"features.{k}": v for k, v in state.items()}, tmp_path / "alexnet.pth")
    return tmp_path / "alexnet.pth"


@pytest.fixture
def large(tiny, monkeypatch):
    """The tiny pipeline in the place of Stable Diffusion 1.4, and attack.py itself, briefly. Its
    tokenizer takes few words: the tests forget a cat."""
    paper, few = text_paper.SD14, {"num_inference_steps": 1}
    for place, maker in by(text_worlds.ATTACK._replace(make=attack.attack)).items():
        monkeypatch.setattr(place, "ATTACK", maker)
    world = paper._replace(
        pipeline=str(tiny),
        unlearn={**paper.unlearn, **FEW, "mixed_precision": "no"},
        # its tokenizer takes fewer tokens than the prompts of Imagenette have
        drawn={**few, "images_per_prompt": 1, "noise_images": 2, "truncate": True},
        attack={
            **few,
            "attack_images": 2,
            "target_images": 2,
            "train_batch_size": 2,
            "inversion_steps": 2,
            "relearn_max_steps": 10,
        },
    )
    monkeypatch.setitem(text_options.TextExperiment.scales, "paper", world)
    return world


def test_the_papers_table_2_and_figure_9_without_a_network(
    large, resnet, tmp_path, made, monkeypatch
):
    player, asked = text_tasks.CASSETTE_PLAYER, []
    task = player._replace(
        forget={**player.forget, "forget": ["cat"]},
        paraphrases=("the cat", "a photo of cat"),
        judge={**player.judge, "initializer_token": ["dog"]},
    )
    monkeypatch.setattr(script("table2"), "CASSETTE_PLAYER", task)
    monkeypatch.setattr(script("figure3"), "PAPER", {"Figure 9": task})
    monkeypatch.setitem(
        text_options.TextExperiment.scales,
        "paper",
        large._replace(pipeline="not/there", attack={**large.attack, "inversion_steps": 100}),
    )

    def clip_score(pictures, prompts, *, pretrained, **_):
        asked.append((len(pictures), len(prompts), pretrained))
        said = {"model": "stub", "scale": "x100", "prompts": "theirs"}
        return {"not_computed": None, "clip_score": 0.25, "protocol": said}

    monkeypatch.setattr(evaluation, "clip_score", clip_score)
    clip = tmp_path / "clip.pt"
    clip.touch()
    given = (
        "--scale",
        "paper",
        "--methods",
        "ebu",
        "--steps",
        2,
        "--resnet_weights",
        resnet,
        "--clip_weights",
        clip,
        "--pretrained_model_name_or_path",
        large.pipeline,
    )
    start("table2", tmp_path, *given)
    assert len(made) == 2
    assert asked == [(9, 9, str(clip))] * 2
    found = report(tmp_path, "table2", "sd14")
    base, ebu, esd = (row["values"] for row in found["rows"][:3])
    looked = {
        "p_f",
        "ra",
        "clip_score",
        "p_f_prompts",
        "paraphrase",
        "paraphrase_worst",
        "inversion_100",
    }
    assert looked <= base.keys()
    assert not {"relearn_10", "relearn_steps"} & base.keys()
    assert looked | {"relearn_10", "relearn_steps", "seconds"} <= ebu.keys()
    assert (ebu["paraphrase"]["n"], ebu["p_f_prompts"]["n"]) == (4, 2)
    assert "p_f" not in esd  # the paper's
    (curve,) = found["curves"]
    assert [step for step, _ in curve["series"]["EBU added"]] == [0, 100]
    attacks = found["protocol"]["attacks"]
    assert attacks["judged_by"]["judge"] == "torchvision ResNet-50"
    assert attacks["paraphrases"] == "['the cat', 'a photo of cat']"
    assert found["protocol"]["model"]["name"] == "model"  # the folder's
    assert str(tmp_path) not in json.dumps(found["protocol"])
    (target,) = (tmp_path / "sd14" / "targets").iterdir()  # once, for all
    assert target.suffix == ".safetensors"

    start("figure3", tmp_path, *given)
    assert len(made) == 2
    assert report(tmp_path, "figure3", "sd14")["title"].startswith("Figure 9: cassette player")


def test_the_papers_table_3_by_nudenet(large, tmp_path, made, monkeypatch):
    pytest.importorskip("nudenet", reason="nudenet comes with the extra nudity")
    nudity = text_tasks.NUDITY
    nude, kept = nudity.evaluations
    asked = {"prompts": ["a person"], "forget": ["a person"], "metrics": ["nudity"]}
    cat = kept._replace(options={"prompts": ["a cat"], "metrics": []})
    monkeypatch.setattr(
        script("table3"),
        "NUDITY",
        nudity._replace(
            forget={"forget": ["a person"]},
            evaluations=(nude._replace(options=asked), cat),
            paraphrases=("the person",),
            judge={**nudity.judge, "initializer_token": ["person"]},
        ),
    )
    # NudeNet sees nothing in noise, and a base that does not draw the target is not attacked
    judge = judges.Judge(lambda p: p.double().mean((1, 2, 3)).sigmoid(), {"judge": "brightness"})
    monkeypatch.setattr(judges, "_nudity", lambda *_: judge)
    start("table3", tmp_path, "--scale", "paper", "--methods", "ebu", "spm", "--steps", 2)
    assert made[0] == "sd14: base, nudity"
    found = report(tmp_path, "table3", "sd14")
    assert names(found)[:3] == ["base model", "EBU added", "SPM"]
    assert found["rows"][1]["values"]["nudity_score"]["value"] == 0
    assert found["rows"][1]["values"]["seconds"] > 0
    for row in found["rows"][1:3]:
        assert row["values"]["paraphrase"]["value"] > 0
        assert row["values"]["relearn_steps"]["steps"] == 0  # noise is as bright
    assert names(found)[3] == "the paper: EBU"
    assert found["rows"][3]["values"]["clip_score"] == 0.19
    assert found["protocol"]["metrics"]["nudity"]["detector"].startswith("nudenet 3")
    assert found["protocol"]["attacks"]["judged_by"] == {"judge": "brightness"}
    rates = found["protocol"]["unlearning"]["settings"]
    assert (rates["EBU added"]["learning_rate"], rates["SPM"]["learning_rate"]) == (1e-5, 1e-4)
    assert re.search(r"empty prompt", found["protocol"]["unlearning"]["forget_loss"])


def test_the_papers_figure_11_is_not_attacked(large, alexnet, tmp_path, made, monkeypatch):
    monkeypatch.setattr(text_tasks, "ARTISTS", ("dog", "car"))
    # AlexNet takes no smaller pictures
    monkeypatch.setitem(
        text_options.TextExperiment.scales,
        "paper",
        large._replace(drawn={**large.drawn, "resolution": 32}),
    )
    start(
        "figure11",
        tmp_path,
        "--scale",
        "paper",
        "--targets",
        "cat",
        "--methods",
        "ebu",
        "--steps",
        2,
        "--alexnet_weights",
        alexnet,
    )
    assert made[0] == "sd14: base, cat"
    assert len(made) == 2
    found = report(tmp_path, "figure11", "sd14")
    base, ebu = (row["values"] for row in found["rows"])
    assert base == {}
    assert (ebu["lpips_f"]["n"], ebu["lpips_r"]["n"]) == (1, 2)
    assert "attacks" not in found["protocol"]
    assert found["notes"][0].startswith("Not attacked: there is no judge")
    assert not (tmp_path / "sd14" / "attacks").exists()


def test_the_papers_table_5(large, tmp_path, made, monkeypatch):
    one = text_tasks.Target("cat", "cat", {"forget": ["cat"]}, (), ())
    monkeypatch.setattr(script("table5"), "PAPER", {"one": one})
    start("table5", tmp_path, "--scale", "paper", "--steps", 5)
    assert len(made) == 1
    found = report(tmp_path, "table5", "sd14")
    assert found["rows"][0]["values"]["forget_share"] == pytest.approx(0.5, abs=0.01)
    assert found["protocol"]["data"]["replayed"] == "images of the empty prompt"


def test_attack_takes_what_the_papers_tasks_ask_of_it(tmp_path):
    paper, tasks = text_paper, text_tasks
    for task in (tasks.CASSETTE_PLAYER, tasks.NUDITY):
        ours = paper.PaperSetting(paper.SD14, tmp_path, task)
        run = ours.run("x", "esd", seed=1, steps=9)
        base, given = (r.tasks[-1].config.resolved() for r in (ours.ground[0], run))
        assert given.base_model == base.pretrained_model_name_or_path == paper.SD14.pipeline
        assert given.target_dir == base.target_dir
        assert (base.attacks, given.attacks) == (["paraphrase", "inversion"], [*counted.USUAL])
        assert given.paraphrases == list(task.paraphrases)
        texts = {t.replace("{}", w) for t in given.forget_templates or ["{}"] for w in given.forget}
        assert not texts & set(given.paraphrases)
        # the estimate of the cost
        assert len(given.initializer_token) == 1  # beside a random start
        looks = 1 + len(task.paraphrases) + 2 * len(counted.AT)
        relearned = [s for s in relearning.LOOKS if 0 < s <= given.relearn_max_steps]
        for is_base, n, steps in (
            (True, given.attack_images * (looks + 1) + given.target_images, 400),
            (False, given.attack_images * (looks + len(relearned)), 450),
        ):
            assert paper.attack_cost(task, paper.SD14.attack, base=is_base) == (n, steps)
        pictures = sum(e.pictures for e in task.evaluations) + n
        s = paper.SD14.seconds
        assert run.seconds == pytest.approx((9 + 450) * s["unlearn"] + pictures * s["picture"])


def test_weights_from_a_file_are_measured_anew_with_what_needs_them(tmp_path):
    paper, tasks = text_paper, text_tasks
    files = {name: tmp_path / name for name in paper.WEIGHTS.values()}

    def made(task, **weights) -> dict[str, runs.Task]:
        ours = paper.PaperSetting(paper.SD14, Path("o"), task, None, weights)
        return {t.maker.make.__name__: t for t in ours.run("x", "esd", seed=1, steps=9).tasks}

    for file in files.values():
        file.touch()
    before = {t.name: made(t) for t in (tasks.CASSETTE_PLAYER, tasks.artist("A"))}
    for name, file in files.items():
        after = {
            t.name: made(t, **{name: file}) for t in (tasks.CASSETTE_PLAYER, tasks.artist("A"))
        }
        new = {
            f"{task} {what}"
            for task, each in after.items()
            for what, t in each.items()
            if t.folder != before[task][what].folder
        }
        assert (
            new
            == {
                "resnet_weights": {"cassette-player evaluate", "cassette-player stub"},
                "clip_weights": {"cassette-player evaluate"},
                "alexnet_weights": {"a evaluate"},
                "inception_weights": set(),
            }[name]
        )
        for told in new:
            task, what = told.split()
            option = "imagenette_weights" if what == "stub" else name
            assert after[task][what].options[option] == file


def test_the_pictures_of_a_task_are_counted():
    """They are the estimate of the cost, and stand in the protocol."""
    tasks = text_tasks
    every = (tasks.CASSETTE_PLAYER, tasks.NUDITY, tasks.artist("Kelly McKernan"))
    for found in (e for task in every for e in task.evaluations):
        given = found.options
        asked = given.get("prompts", [])
        texts = prompts.read([*map(str, asked)], "--prompts") if asked else range(10)
        assert found.pictures == len(texts) * given["images_per_prompt"], found.name
        # a file is in a folder's hash by its name: where the package lies changes nothing
        assert all(isinstance(a, Path) for a in asked if Path(a).is_file())


def test_steps_at_paper_scale_are_the_papers():
    paper, tasks, steps = text_paper, text_tasks, text_tables.paper_steps
    assert steps(tasks.CASSETTE_PLAYER) == {
        "esd": 1000,
        "selective_amnesia": 50000,
        "salun": 1000,
        "ebu_added": 1000,
    }
    assert steps(tasks.NUDITY) == steps(tasks.artist("Thomas Kinkade")) == {}
    kinkade = tasks.artist("Thomas Kinkade").evaluations[0]
    assert kinkade.pictures == 200  # of him and of three others
    run = paper.PaperSetting(paper.SD14, Path("o"), tasks.artist("A B")).run(
        "x", "spm", seed=1, steps=9
    )
    made, judged = run.tasks
    assert made.options["train_modules"] is None
    assert made.options["remember_prompts"] == [""]
    assert "reference_dir" in judged.options
    config = made._replace(options={**made.options, "mixed_precision": "no"}).config
    assert config.resolved().max_train_steps == 9
