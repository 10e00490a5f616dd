"""examples/ddpm as a user runs it, on digits with a few steps: what the scripts leave on the disk,
that a resumed run is the unbroken one, two processes, and what bad input is told."""

from __future__ import annotations

import importlib
import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from diffusers import DDPMScheduler, UNet2DModel
from PIL import Image

from ebu_optim.class_conditional import unlearn as package
from ebu_optim.class_conditional.options import Unlearn
from ebu_optim.files import load_tensors, locked, need_disk
from ebu_optim.training.command_line import parse
from ebu_optim.training.sources import DataOptions

from .processes import PATIENCE
from .scripts import by_both

ROOT = Path(__file__).parent.parent
SCRIPTS = ROOT / "examples" / "ddpm"
ENV = {
    **os.environ,
    "PYTHONPATH": f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}",
    "OMP_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
}

# several commands in one interpreter, which has imported diffusers once
SEVERAL = """
import json, runpy, sys, traceback
from accelerate.state import AcceleratorState, GradientState
sys.stdout = sys.stderr  # one stream, in order
folder, commands = sys.argv[1], json.loads(sys.argv[2])
for script, *args in commands:
    AcceleratorState._reset_state(True)
    GradientState._reset_state()
    sys.argv = [script, *args]
    try:
        runpy.run_path(f"{folder}/{script}", run_name="__main__")
        code = 0
    except SystemExit as end:
        code = end.code
    except BaseException:
        traceback.print_exc()
        code = 1
    print(f"<<{script} {code}>>", file=sys.stderr, flush=True)
"""


def several(*commands: list) -> list[tuple[int, str]]:
    """Exit status of each, and what it said."""
    given = json.dumps([[str(a) for a in c] for c in commands])
    done = subprocess.run(
        [sys.executable, "-c", SEVERAL, str(SCRIPTS), given],
        capture_output=True,
        text=True,
        env=ENV,
        timeout=PATIENCE,
    )
    found, rest = [], done.stderr
    for script, *_ in commands:
        said, _, rest = rest.partition(f"<<{script} ")
        code, _, rest = rest.partition(">>")
        assert code, rest + said
        found.append((int(code), said))
    return found


def succeed(*commands: list) -> list[str]:
    found = several(*commands)
    for (code, said), command in zip(found, commands, strict=True):
        assert code == 0, (command, said)
    return [said for _, said in found]


SMALL = ["--digits", "--model", "small", "--train_batch_size", "8"]
UNET = [*SMALL, "--use_ema", "--random_flip", "--checkpointing_steps", "2", "--logging_steps", "1"]


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """A base model, both classifiers and a prepared folder."""
    out = tmp_path_factory.mktemp("ddpm")
    base = ["--pretrained_model_name_or_path", out / "base"]
    succeed(
        ["train.py", *UNET, "--max_train_steps", 4, "--output_dir", out / "base"],
        ["train_classifier.py", *SMALL, "--max_train_steps", 4, "--output_dir", out / "judge"],
        [
            "train_classifier.py",
            *SMALL,
            "--reject",
            "--max_train_steps",
            4,
            "--output_dir",
            out / "reject",
        ],
        [
            "prepare.py",
            *base,
            "--forget",
            "3",
            "--digits",
            "--replay_per_class",
            4,
            "--num_inference_steps",
            2,
            "--fisher_images",
            8,
            "--fisher_timesteps",
            2,
            "--surrogate_images",
            4,
            "--output_dir",
            out / "sets",
        ],
    )
    return out


def unlearn(made: Path, out: str | Path, *more) -> list:
    return [
        "unlearn.py",
        "--pretrained_model_name_or_path",
        made / "base",
        "--prepared_dir",
        made / "sets",
        "--train_batch_size",
        4,
        "--output_dir",
        out,
        *more,
    ]


CURVE = [
    "--validation_steps",
    2,
    "--validation_images",
    2,
    "--validation_inference_steps",
    2,
    "--checkpointing_steps",
    1,
    "--use_ema",
]


@pytest.fixture(scope="module")
def forgotten(made) -> Path:
    """Unlearned in four steps, once without a break and once resumed after two; and with an
    average, by two classes."""
    measured = [
        *CURVE,
        "--classifier",
        made / "judge",
        "--validation_pictures",
        1,
        "--entropy_classifier",
        made / "reject",
    ]
    said = succeed(
        unlearn(made, made / "whole", "--max_train_steps", 4, *measured),
        unlearn(made, made / "parts", "--max_train_steps", 2, *measured),
        unlearn(
            made,
            made / "parts",
            "--max_train_steps",
            4,
            *measured,
            "--resume_from_checkpoint",
            "latest",
        ),
        unlearn(
            made,
            made / "two_classes",
            "--max_train_steps",
            2,
            "--use_ema",
            "--forget",
            3,
            5,
            "--replay_classes",
            1,
            2,
            "--alpha",
            0.5,
            "--delta",
            0.25,
            "--gamma",
            10,
        ),
    )
    assert "2/4" in said[2]  # the bar starts where the first part ended
    (made / "two_classes.txt").write_text(said[3])
    return made / "whole"


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return UNet2DModel.from_pretrained(folder).state_dict()


def same(a: Path, b: Path) -> bool:
    a, b = weights(a), weights(b)
    return all(torch.equal(a[k], b[k]) for k in b)


def test_a_trained_model_loads_with_diffusers(made):
    folder = made / "base"
    model = UNet2DModel.from_pretrained(folder, subfolder="unet")
    assert model.config.num_class_embeds == 11
    assert not same(folder / "unet", folder / "unet_ema")
    assert DDPMScheduler.from_pretrained(folder, subfolder="scheduler").config.clip_sample is False
    info = json.loads((folder / "classes.json").read_text())
    assert info["classes"] == [str(i) for i in range(10)]
    assert info["null_class"] == 10
    assert "scikit-learn digits" in (folder / "README.md").read_text()
    steps = [json.loads(line)["step"] for line in (folder / "log.jsonl").read_text().splitlines()]
    assert steps == [1, 2, 3, 4]


def test_a_classifier_says_what_it_is(made):
    plain, reject = (
        json.loads((made / name / "classifier.json").read_text()) for name in ("judge", "reject")
    )
    assert 0 <= plain["test_accuracy"] <= 1
    assert "noise_rejected" not in plain
    assert reject["reject"]
    assert 0 <= reject["noise_rejected"] <= 1


def test_a_resumed_training_is_the_unbroken_one(made, tmp_path):
    run = ["train.py", *UNET, "--output_dir", tmp_path / "parts", "--max_train_steps"]
    other = [
        "train.py",
        *UNET,
        "--seed",
        1,
        "--output_dir",
        tmp_path / "parts",
        "--max_train_steps",
        4,
        "--resume_from_checkpoint",
        "latest",
    ]
    (first, _), (again, held), (changed, seed), (resumed, said), (classifier, _) = several(
        [*run, 2],
        [*run, 4],
        other,
        [*run, 4, "--resume_from_checkpoint", "latest"],
        ["train_classifier.py", *SMALL, "--output_dir", tmp_path / "parts"],
    )
    assert (first, again, changed, resumed, classifier) == (0, 2, 2, 0, 2), said
    assert "holds a run: resume it with --resume_from_checkpoint" in held
    assert "seed 0, this one 1" in seed
    for part in ("unet", "unet_ema"):
        assert same(tmp_path / "parts" / part, made / "base" / part)


@pytest.mark.parametrize(
    "more",
    [
        ("--use_ema", "--gradient_accumulation_steps", 2),
        ("--method", "salun"),
        ("--method", "gradient_ascent"),
    ],
)
def test_the_loop_in_sight_is_the_packages(more, made, tmp_path):
    argv = unlearn(made, tmp_path, "--max_train_steps", 3, "--logging_steps", 1, *more)[1:]
    script, ours = by_both(
        SCRIPTS / "unlearn.py", package.unlearn, parse(Unlearn, list(map(str, argv)))
    )
    for part in ("unet", "unet_ema")[: 2 if "--use_ema" in more else 1]:
        assert same(script / part, ours / part)
        assert not same(script / part, made / "base" / part)
    assert (script / "log.jsonl").read_text() == (ours / "log.jsonl").read_text()


def test_two_processes_accumulate_and_agree(made, tmp_path):
    command = unlearn(
        made,
        tmp_path / "o",
        "--cpu",
        "--gradient_accumulation_steps",
        2,
        "--max_train_steps",
        2,
        "--mixed_precision",
        "bf16",
        "--use_ema",
        *CURVE,
        "--classifier",
        made / "judge",
        "--adversary_steps",
        1,
        "--relearner_steps",
        1,
    )
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            "--nproc-per-node",
            "2",
            str(SCRIPTS / command[0]),
            *map(str, command[1:]),
        ],
        capture_output=True,
        text=True,
        env=ENV,
        timeout=PATIENCE,
    )
    assert done.returncode == 0, done.stderr
    assert "2 process(es)" in done.stdout
    assert not same(tmp_path / "o" / "unet", made / "base" / "unet")
    curve = json.loads((tmp_path / "o" / "unlearn.json").read_text())["curve"]
    assert [row["step"] for row in curve] == [0, 2]
    states = torch.load(
        next((tmp_path / "o" / "checkpoints" / "step_00000002").glob("random*")), weights_only=True
    )
    assert not torch.equal(states[0]["torch"], states[1]["torch"])  # each draws its own noise


def test_batches_of_two_processes_are_those_of_one(monkeypatch):
    data = module(monkeypatch, "data")
    x, y = torch.arange(10, dtype=torch.uint8).view(10, 1, 1, 1), torch.arange(10)
    one = data.Batches(x, y, 4, seed=5, flip=True)
    two = [data.Batches(x, y, 2, seed=5, flip=True, process=p, processes=2) for p in (0, 1)]
    for i in (7, 0, 2):
        assert one[i][1].tolist() == [c for b in two for c in b[i][1].tolist()]
    first = torch.cat([one[i][1] for i in range(5)])
    assert sorted(first.tolist()) == sorted([*range(10)] * 2)  # two epochs, every image in each


def test_sets_are_of_the_kept_classes_and_are_not_made_again(made):
    data = {p.name: p.stat().st_mtime_ns for p in (made / "sets").glob("*.safetensors")}
    assert set(data) == {
        "fisher.safetensors",
        "forget.safetensors",
        "replay.safetensors",
        "surrogate.safetensors",
    }
    labels = load_tensors(made / "sets" / "replay.safetensors")[0]["labels"]
    assert sorted(set(labels.tolist())) == [0, 1, 2, 4, 5, 6, 7, 8, 9]
    assert set(load_tensors(made / "sets" / "forget.safetensors")[0]["labels"].tolist()) == {3}


def test_a_resumed_unlearning_is_the_unbroken_one(forgotten, made):
    for part in ("unet", "unet_ema"):
        assert same(made / "parts" / part, forgotten / part)
        assert not same(made / "base" / part, forgotten / part)
    ours, theirs = (
        json.loads((made / name / "unlearn.json").read_text()) for name in ("whole", "parts")
    )
    for report in (ours, theirs):
        for row in report["curve"]:
            del row["seconds"]
    assert [row["step"] for row in ours["curve"]] == [0, 2, 4]
    assert ours["curve"] == theirs["curve"]
    (ours_seen, about), (theirs_seen, _) = (
        load_tensors(made / name / "pictures.safetensors") for name in ("whole", "parts")
    )
    assert about["classes"] == [str(c) for c in range(10)]
    assert list(ours_seen) == list(theirs_seen) == [f"step_{i:08d}" for i in (0, 2, 4)]
    for step, images in ours_seen.items():
        assert images.shape == (10, 1, 1, 8, 8)
        assert torch.equal(images, theirs_seen[step])
    assert not torch.equal(ours_seen["step_00000000"], ours_seen["step_00000004"])
    assert ours["ema_share_of_start"] == pytest.approx(0.9999**4)
    assert ours["forget"] == [3]


def test_a_resumed_run_with_attackers_is_the_unbroken_one(made, tmp_path):
    more = [
        "--adversary_steps",
        2,
        "--adversary_restart",
        3,
        "--adversaries",
        2,
        "--forget_loss",
        "relabel",
        "--checkpointing_steps",
        2,
        "--relearner_steps",
        2,
    ]
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    *_, (code, said) = several(
        unlearn(made, tmp_path / "unmoved", *more[:-2], "--max_train_steps", 4),
        unlearn(made, whole, *more, "--max_train_steps", 4),
        unlearn(made, tmp_path / "without", *more[6:], "--max_train_steps", 4),
        unlearn(made, parts, *more, "--max_train_steps", 2),
        unlearn(made, parts, *more, "--max_train_steps", 4, "--resume_from_checkpoint", "latest"),
        unlearn(
            made,
            parts,
            *more[:1],
            3,
            *more[2:],
            "--max_train_steps",
            4,
            "--resume_from_checkpoint",
            "latest",
        ),
    )
    assert same(parts / "unet", whole / "unet")
    assert not same(tmp_path / "without" / "unet", whole / "unet")
    assert not same(tmp_path / "unmoved" / "unet", whole / "unet")
    assert code == 2
    assert "has adversary_steps 2, this one 3" in said


@pytest.mark.parametrize("option", ["--adversary_steps", "--relearner_steps"])
def test_attackers_want_pictures_of_what_is_forgotten(option, made, tmp_path):
    shutil.copytree(made / "sets", tmp_path / "sets")
    (tmp_path / "sets" / "forget.safetensors").unlink()
    command = unlearn(made, tmp_path / "o", option, 1)
    command[command.index("--prepared_dir") + 1] = tmp_path / "sets"
    ((code, said),) = several(command)
    assert code == 2
    assert f"{option} needs real images of every class to forget; run prepare.py" in said


def test_an_average_that_hides_forgetting_is_told(forgotten, made):
    said = (made / "two_classes.txt").read_text()
    assert "forgets 3, 5, replays 1, 2" in said
    assert "still holds 100% of the weights before unlearning" in said
    report = json.loads((made / "two_classes" / "unlearn.json").read_text())
    assert report["settings"]["ebu_alpha"] == 0.5
    assert report["settings"]["ebu_delta"] == 0.25
    assert report["settings"]["ebu_gamma"] == 10


METHODS = {
    "joint": ["--surrogate", "null_class"],
    "selective_amnesia": ["--method_options", '{"lam": 1e3}'],
    "salun": ["--adversary_steps", 2, "--adversaries", 2],
    "gradient_ascent": ["--relearner_steps", 1, "--relearner_weight", 0.5],
    "embedding_only": ["--surrogate", "gaussian", "--relearner_steps", 2],
    "esd": ["--guided_steps", 3, "--adversary_steps", 1, "--adversary_loss", "teacher"],
    "retrain": ["--digits"],
    "ebu_routed": [
        "--remember",
        "crossed",
        "--surrogate",
        "analytic",
        "--condition_noise",
        1,
        "--mixed_precision",
        "bf16",
        "--gradient_accumulation_steps",
        2,
        "--relearner_steps",
        1,
    ],
}


def test_every_kind_of_method_runs(made, tmp_path):
    succeed(
        *(
            unlearn(made, tmp_path / name, "--method", name, "--max_train_steps", 1, *options)
            for name, options in METHODS.items()
        )
    )
    base = weights(made / "base" / "unet")
    for name in METHODS:
        found = weights(tmp_path / name / "unet")
        moved = {k for k in base if not torch.equal(found[k], base[k])}
        assert moved, name
        if name == "embedding_only":
            assert moved == {"class_embedding.weight"}


def test_a_report_has_the_three_axes_and_its_protocol(forgotten, made, tmp_path):
    out = tmp_path / "report"
    command = [
        "evaluate.py",
        "--pretrained_model_name_or_path",
        forgotten,
        "--classifier",
        made / "judge",
        "--reject_classifier",
        made / "reject",
        "--digits",
        "--images_per_class",
        4,
        "--num_inference_steps",
        2,
        "--inversion_steps",
        1,
        "--relearn_max_steps",
        2,
        "--attack_images",
        4,
        "--output_dir",
        out,
    ]
    wrong = [*command[:2], made / "base", *command[3:]]
    (code, said), (again, held), (_, base) = several(
        command, command, [*wrong, "--overwrite_output_dir"]
    )
    assert code == 0, said
    assert again == 2
    assert "holds a report" in held
    assert "was not made by unlearn.py" in base
    report = json.loads((out / "results.json").read_text())
    rows = {row["name"]: row["values"] for row in report["rows"]}
    assert list(rows) == ["base model", "noise", "EBU added"]
    keys = {"p_f", "p_f_reject", "ce_f", "ra", "classifier_frechet", "relearn_steps", "inversion_1"}
    assert keys <= set(rows["EBU added"])
    assert report["protocol"]["sampling"]["weights"] == "trained"
    sets = report["protocol"]["data"]["replay_set"]
    assert re.match(r"\d+ images generated by model [0-9a-f]{16}, DDIMScheduler, \d+ steps, ", sets)
    assert sets.endswith("; Fisher of 8 of them, 2 timesteps each, sum; remember data: replay")
    assert re.search(r", [\d,]{7,} parameters$", report["protocol"]["model"]["name"])
    assert (out / "results.md").read_text().startswith("# scikit-learn digits without 3")
    assert (out / "report.html").is_file()
    assert list((out / "pictures").glob("*.png"))


def test_erasediff_learns_the_wrong_noise_and_ga_unlearns_the_right_one(monkeypatch):
    """Descending the denoising loss of the class itself would teach it."""
    unlearn_losses, seen = module(monkeypatch, "unlearn_losses"), []

    def denoising_loss(model, x, labels, scheduler, *, noise=None, reduction):
        seen.append(noise)

    monkeypatch.setattr(unlearn_losses, "denoising_loss", denoising_loss)
    losses = object.__new__(unlearn_losses.Objectives)
    losses.own, losses.kind = [(torch.full((4, 1, 8, 8), -1.0), torch.zeros(4))], "own"
    losses.model = losses.raw = SimpleNamespace(class_embedding=torch.nn.Embedding(2, 2))
    losses.scheduler, losses.forgotten = None, [0]
    losses.at(0)
    for method in ("gradient_ascent", "erasediff"):
        losses.args = SimpleNamespace(method=method, reduction="sum", condition_noise=0.0)
        losses.forget()
    assert seen[0] is None
    assert seen[1].shape == (4, 1, 8, 8)
    assert seen[1].min() >= 0
    assert seen[1].unique().numel() > 200


# -- bad input ----------------------------------------------------------------------------------


ROOMS = {
    "data": "training",
    "sources": "training",
    "models": "class_conditional",
    "train_classifier": "class_conditional",
    "prepare": "class_conditional.sets",
    "unlearn_losses": "diffusion.objectives",
}


def module(monkeypatch, name: str):
    if name not in ROOMS:
        monkeypatch.syspath_prepend(str(SCRIPTS))
        return importlib.import_module(name)
    room = ROOMS[name]
    return importlib.import_module(f"ebu_optim.{room}" + ("" if "." in room else f".{name}"))


def source(monkeypatch, *args):
    data = module(monkeypatch, "data")
    return data, parse(DataOptions, [str(a) for a in args])


def refused(monkeypatch, match: str):
    return pytest.raises(module(monkeypatch, "sources").InputError, match=match)


def images(folder: Path, broken: int) -> Path:
    for name in ("cat", "dog"):
        (folder / name).mkdir(parents=True)
        for i in range(3):
            Image.new("RGB", (9, 8), (20 * i, 0, 0)).save(folder / name / f"{i}.png")
    for i in range(broken):
        (folder / "cat" / f"broken{i}.png").write_bytes(b"\x89PNG\r\n\x1a\nno more")
    return folder


def test_unreadable_images_are_named_and_counted(monkeypatch, tmp_path, capsys):
    folder = images(tmp_path / "pets", broken=7)
    data, args = source(monkeypatch, "--train_data_dir", folder, "--resolution", 8)
    with refused(monkeypatch, "7 of 13 images cannot be read: cat/broken0.png .* and 2 more"):
        data.load(args)
    args = replace(args, skip_unreadable=True)
    found = data.load(args)
    assert "left out" in capsys.readouterr().err
    assert found.images.shape == (6, 3, 8, 8)
    assert found.classes == ("cat", "dog")
    assert len(found.skipped) == 7
    args = replace(args, resolution=None)
    assert data.load(args).images.shape == (6, 3, 8, 9)


def test_a_folder_of_nothing_and_no_source(monkeypatch, tmp_path):
    data, args = source(monkeypatch, "--train_data_dir", tmp_path)
    with refused(monkeypatch, "no image"):
        data.load(args)
    with refused(monkeypatch, "no data: give one of"):
        data.load(source(monkeypatch)[1])
    with refused(monkeypatch, "no such file"):
        data.load(source(monkeypatch, "--parquet", tmp_path / "none")[1])


def test_parquet_has_the_splits_of_its_names(monkeypatch, tmp_path):
    pyarrow = pytest.importorskip("pyarrow", reason="parquet files need pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    images(tmp_path / "pets", broken=1)
    for split, names in (("train", ("cat/0", "dog/1")), ("test", ("dog/2", "cat/broken0"))):
        cells = [{"bytes": (tmp_path / "pets" / f"{n}.png").read_bytes(), "path": n} for n in names]
        table = pyarrow.table({"img": cells, "label": [0, 1]})
        features = {"info": {"features": {"label": {"names": ["cat", "dog"]}}}}
        table = table.replace_schema_metadata({"huggingface": json.dumps(features)})
        parquet.write_table(table, tmp_path / f"{split}-0.parquet")
    data, args = source(monkeypatch, "--parquet", tmp_path)
    found = data.load(args)
    assert found.labels.tolist() == [0, 1]
    assert found.classes == ("cat", "dog")
    with refused(monkeypatch, r"1 of 2 images cannot be read: test-0.parquet, row 1"):
        data.load(args, "test")
    args = replace(args, label_column="kind")
    with refused(monkeypatch, "has no column kind; it has img, label"):
        data.load(args)
    (tmp_path / "train-1.parquet").write_bytes(b"PAR1 no more")
    args = replace(args, label_column=None)
    with refused(monkeypatch, "train-1.parquet cannot be read"):
        data.load(args)


def test_splits_by_name_held_out_and_joined(monkeypatch, tmp_path):
    images(tmp_path / "pets" / "train", broken=0)
    images(tmp_path / "pets" / "test", broken=0)
    data, args = source(monkeypatch, "--train_data_dir", tmp_path / "pets")
    assert [len(data.load(args, s).labels) for s in ("train", "test", "all")] == [6, 6, 6]
    args = replace(args, join_splits=True)
    assert [len(data.load(args, s).labels) for s in ("train", "test", "all")] == [11, 1, 12]
    args = replace(args, max_train_samples=4)
    assert [len(data.load(args, s).labels) for s in ("train", "test", "all")] == [4, 1, 4]
    # a class that is called "train" is no split
    (tmp_path / "pets" / "train" / "cat").rename(tmp_path / "pets" / "train" / "train")
    data, args = source(monkeypatch, "--train_data_dir", tmp_path / "pets" / "train")
    found = data.load(args)
    assert found.classes == ("dog", "train")
    assert len(found.labels) == 6
    assert "held out" in found.source
    args = replace(args, join_splits=True)
    with refused(monkeypatch, "no test split to join"):
        data.load(args)


def test_real_cifar(monkeypatch):
    pytest.importorskip("pyarrow", reason="parquet files need pyarrow")
    folder = os.environ.get("EBU_TEST_CIFAR10")
    if not folder:
        pytest.skip("EBU_TEST_CIFAR10 names no folder with CIFAR-10 as parquet files")
    data, args = source(monkeypatch, "--parquet", folder)
    found = data.load(args, "test")
    assert found.images.shape == (10000, 3, 32, 32)
    assert found.classes[0] == "airplane"
    assert torch.bincount(found.labels).tolist() == [1000] * 10


def test_a_hub_that_is_not_reached(monkeypatch):
    models = module(monkeypatch, "models")
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with refused(monkeypatch, "nobody/nothing is not a folder here, and the hub does not"):
        models.load_unet("nobody/nothing")
    datasets = pytest.importorskip("datasets", reason="the hub's data sets need datasets")

    def fails(*args: object) -> None:
        raise ConnectionError("Couldn't reach the Hub")

    monkeypatch.setattr(datasets, "get_dataset_split_names", fails)
    data, args = source(monkeypatch, "--dataset_name", "nobody/nothing")
    with refused(
        monkeypatch, "cannot be downloaded .*ConnectionError.* the same command continues"
    ):
        data.load(args)


def test_classes_that_are_not_there_or_on_both_sides(monkeypatch):
    prepare = module(monkeypatch, "prepare")
    with refused(monkeypatch, r"--forget 5: there is no such class; give one of 0..2 \(a, b, c\)"):
        prepare.split_classes(["5"], None, ["a", "b", "c"])
    with refused(monkeypatch, "overlap: b in both"):
        prepare.split_classes(["b"], ["0", "1"], ["a", "b", "c"])
    with refused(monkeypatch, "all classes"):
        prepare.split_classes(["0", "1"], None, ["a", "b"])
    assert prepare.split_classes(["b"], None, ["a", "b", "c"]) == ([1], [0, 2])
    # folders named by numbers, in the order of their names: the first is number 0 and called 1
    assert prepare.split_classes(["1"], ["10"], ["1", "10", "2"]) == ([0], [1])
    with refused(monkeypatch, "--forget 0: there is no such class; give one of 1, 10, 2"):
        prepare.split_classes(["0"], None, ["1", "10", "2"])


def test_sets_of_another_model_or_with_the_forgotten_class(made, monkeypatch, tmp_path):
    prepare = module(monkeypatch, "prepare")
    classes = [str(i) for i in range(10)]
    own = json.loads((made / "sets" / "prepared.json").read_text())["model"]
    given = SimpleNamespace(forget=None, replay_classes=None)
    found = prepare.read(made / "sets", own, given, classes)
    assert found.replayed == [0, 1, 2, 4, 5, 6, 7, 8, 9]
    with refused(monkeypatch, "replay.safetensors belongs to another model"):
        prepare.read(made / "sets", "0123456789abcdef", given, classes)
    with refused(monkeypatch, "overlap: 4 in both"):
        prepare.read(
            made / "sets", own, SimpleNamespace(forget=["4"], replay_classes=None), classes
        )
    shutil.copytree(made / "sets", tmp_path / "sets")
    with open(tmp_path / "sets" / "replay.safetensors", "r+b") as f:
        f.truncate(1000)
    with refused(monkeypatch, "delete it and run prepare.py again"):
        prepare.read(tmp_path / "sets", own, given, classes)
    with refused(monkeypatch, "another model .*; give another folder"):
        prepare.claim(made / "sets", {"model": "0123456789abcdef"})


def test_a_classifier_with_other_classes(made, monkeypatch):
    models = module(monkeypatch, "models")
    with refused(monkeypatch, "was trained on other classes: 0, 1, 2, 3, 4"):
        models.load_classifier(made / "judge", ["cat", "dog"])
    with refused(monkeypatch, "is not a classifier"):
        models.load_classifier(made / "base", ["cat", "dog"])
    with refused(monkeypatch, "is not a model of train.py"):
        models.load_unet(str(made / "judge"))


def test_a_disk_that_is_too_small(made, monkeypatch, tmp_path):
    free = shutil.disk_usage(tmp_path).free
    need_disk(tmp_path / "a" / "b", free / 2, "checkpoints")
    with refused(monkeypatch, "needs about .* GB for checkpoints, and the disk has .* GB free"):
        need_disk(tmp_path / "a" / "b", free * 2, "checkpoints")
    assert not (tmp_path / "a").exists()


def test_mistakes_are_told_in_one_line(made, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("mine")
    cases = {
        "is in use by something else": ["train.py", *UNET, "--output_dir", tmp_path / "mine"],
        "--train_batch_size must be >= 1": [
            "train.py",
            *UNET,
            "--train_batch_size",
            0,
            "--output_dir",
            tmp_path / "o",
        ],
        "--report_to nothing: this tracker is not installed": [
            "train.py",
            *UNET,
            "--report_to",
            "nothing",
            "--output_dir",
            tmp_path / "o",
        ],
        "--alpha must be in [0, 1]; got 2.0": unlearn(made, tmp_path / "o", "--alpha", 2),
        "--method joint has no option alpha": unlearn(
            made, tmp_path / "o", "--method", "joint", "--alpha", 0.5
        ),
        "--method joint: forget_weight": unlearn(
            made, tmp_path / "o", "--method", "joint", "--method_options", '{"forget_weight": -1}'
        ),
        "has other classes than the model: cat, dog": [
            "prepare.py",
            "--pretrained_model_name_or_path",
            made / "base",
            "--forget",
            3,
            "--train_data_dir",
            images(tmp_path / "pets", broken=0),
            "--resolution",
            8,
            "--output_dir",
            tmp_path / "sets",
        ],
        "belongs to another model": unlearn(made, tmp_path / "o", "--start_from", "ema"),
        "--validation_inference_steps must be <= 1000, the model's; got 1001": unlearn(
            made,
            tmp_path / "o",
            "--classifier",
            made / "judge",
            "--validation_inference_steps",
            1001,
        ),
        "--guided_steps must be <= 1000": unlearn(
            made, tmp_path / "o", "--method", "esd", "--guided_steps", 1001
        ),
        "--num_inference_steps must be <= 1000": [
            "prepare.py",
            "--pretrained_model_name_or_path",
            made / "base",
            "--forget",
            3,
            "--num_inference_steps",
            1001,
            "--output_dir",
            tmp_path / "sets",
        ],
        "step_00000007: there is no such folder": unlearn(
            made, tmp_path / "o", "--resume_from_checkpoint", tmp_path / "step_00000007"
        ),
        "another process": [
            "train.py",
            *UNET,
            "--overwrite_output_dir",
            "--output_dir",
            made / "base",
        ],
    }
    with locked(made / "base" / ".lock", made / "base"):
        found = several(*cases.values())
    for message, (code, said) in zip(cases, found, strict=True):
        assert code == 2, (message, said)
        assert message in said
        assert "Traceback" not in said
    assert (made / "base" / "checkpoints" / "step_00000004").is_dir()
    assert [p.name for p in (tmp_path / "mine").iterdir()] == ["thesis.txt"]
