"""examples/stable_diffusion/evaluate.py on a tiny pipeline: which pictures it draws, what it says
of them by judges whose weights are made here (NudeNet brings its own), what bad input is told."""

from __future__ import annotations

import importlib
import json
import shutil
import urllib.error
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw, ImageFilter, ImageOps

pytest.importorskip("transformers", reason="transformers comes with the extra text_to_image")

from safetensors.torch import load_file, save_file

from ebu_optim.errors import InputError
from ebu_optim.metrics.intervals import wilson
from ebu_optim.text_to_image.prompt_files import Row
from ebu_optim.training.command_line import parse

from .text_to_image import pipeline

TEXTS = ("a person", "a cat", "a dog")  # two pictures of each; the person is forgotten
EACH = ("--prompts", *TEXTS, "--forget", "a person", "--images_per_prompt", 2)
BODY = "0000_0001.png"  # the second of the person


@pytest.fixture(scope="module", autouse=True)
def _paths():
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TQDM_DISABLE", "1")
        yield


def module(name: str):
    return importlib.import_module(f".{name}", "ebu_optim.text_to_image")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Path:
    return pipeline(tmp_path_factory.mktemp("tiny") / "model")


def evaluate(tiny: Path, folder: Path, *options) -> dict:
    given = [
        "--pretrained_model_name_or_path",
        tiny,
        "--output_dir",
        folder,
        "--num_inference_steps",
        1,
        *options,
    ]
    evaluation = module("evaluation")
    evaluation.evaluate(parse(evaluation.Evaluation, [str(g) for g in given]))
    return json.loads((folder / "evaluation.json").read_text())


def refused(match: str):
    return pytest.raises(InputError, match=match)


def saved(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in (folder / "images").iterdir()}


# -- pictures ------------------------------------------------------------------------------------


def test_pictures_are_of_their_noise_and_go_on(tiny, tmp_path):
    given = ("--prompts", "a cat", "a dog", "--images_per_prompt", 2)
    evaluate(tiny, tmp_path / "a", *given)
    first = saved(tmp_path / "a")
    assert sorted(first) == [f"{i:04d}_{k:04d}.png" for i in range(2) for k in range(2)]
    assert len(set(first.values())) == 4
    with refused("holds a finished evaluation: delete its evaluation.json to measure the same"):
        evaluate(tiny, tmp_path / "a", *given)
    # interrupted: the result and a picture are missing
    (tmp_path / "a" / "evaluation.json").unlink()
    (tmp_path / "a" / "images" / "0001_0000.png").unlink()
    with refused("holds images of other options"):
        evaluate(tiny, tmp_path / "a", *given, "--seed", 3)
    evaluate(tiny, tmp_path / "a", *given)
    assert saved(tmp_path / "a") == first
    evaluate(tiny, tmp_path / "a", *given, "--seed", 1, "--overwrite")
    assert saved(tmp_path / "a")["0000_0000.png"] == first["0000_0001.png"]


def test_noise_of_pictures_past_the_ten_thousandth(tiny, tmp_path, monkeypatch):
    evaluate(tiny, tmp_path / "a", "--prompts", "a cat", "--images_per_prompt", 1, "--seed", 10001)
    script = module("evaluation")
    monkeypatch.setattr(script.Evaluation, "drawn", {"10000_10001.png": Row("a cat", 10001, 7.5)})
    evaluate(tiny, tmp_path / "b", "--prompts", "a cat")
    assert [*saved(tmp_path / "a").values()] == [*saved(tmp_path / "b").values()]


def test_changed_tensors_are_drawn_in_their_base(tiny, tmp_path):
    shutil.copytree(tiny, tmp_path / "whole")
    (file,) = (tmp_path / "whole" / "unet").glob("*.safetensors")
    state = load_file(file)
    state["conv_in.weight"].mul_(2)
    save_file(state, file, {"format": "pt"})
    changed = tmp_path / "changed"
    changed.mkdir()
    save_file({"conv_in.weight": state["conv_in.weight"]}, changed / "unet_changed.safetensors")
    one = ("--prompts", "a cat", "--images_per_prompt", 1)
    evaluate(tmp_path / "whole", tmp_path / "a", *one)
    evaluate(changed, tmp_path / "b", *one, "--base_model", tiny)
    evaluate(tiny, tmp_path / "c", *one)
    assert saved(tmp_path / "a") == saved(tmp_path / "b") != saved(tmp_path / "c")
    with refused("--base_model is not given, and .* has no unlearn.json"):
        evaluate(changed, tmp_path / "d", *one)


def test_the_base_is_the_one_that_unlearn_json_beside_a_result_names(tmp_path):
    file = tmp_path / "without.safetensors"
    file.touch()
    with refused("--base_model is not given, and .* has no unlearn.json"):
        module("results").named_base(str(file))
    (tmp_path / "unlearn.json").write_text('{"base": "before.safetensors"}')
    for result in (file, tmp_path):
        assert module("results").named_base(str(result)) == "before.safetensors"


def test_a_diverged_model_is_told_before_it_counts_as_forgotten(tiny, tmp_path):
    shutil.copytree(tiny, tmp_path / "model")
    (file,) = (tmp_path / "model" / "unet").glob("*.safetensors")
    state = load_file(file)
    state["conv_out.bias"].fill_(torch.nan)
    save_file(state, file, {"format": "pt"})
    with refused("model generates NaN: its weights have diverged"):
        evaluate(tmp_path / "model", tmp_path / "o", *EACH)
    assert not (tmp_path / "o" / "evaluation.json").exists()


# -- figures -------------------------------------------------------------------------------------


def body() -> Image.Image:
    """What NudeNet takes for a belly."""
    picture = Image.new("RGB", (320, 320), (40, 60, 120))
    brush = ImageDraw.Draw(picture)
    brush.ellipse((60, -40, 260, 380), fill=(224, 172, 140))
    brush.ellipse((151, 191, 169, 209), fill=(120, 70, 55))
    return picture.filter(ImageFilter.GaussianBlur(3))


@pytest.fixture(scope="module")
def drawn(tiny, tmp_path_factory) -> Path:
    """What was drawn of EACH and not yet measured."""
    folder = tmp_path_factory.mktemp("drawn") / "evaluated"
    assert evaluate(tiny, folder, *EACH)["values"] == {}
    (folder / "evaluation.json").unlink()
    return folder


@pytest.fixture
def ready(drawn, tmp_path) -> Path:
    return shutil.copytree(drawn, tmp_path / "evaluated")


def kept(folder: Path) -> torch.Tensor:
    """(4, 3, 16, 16) uint8 of the cats and dogs."""
    names = [f"{i:04d}_{k:04d}.png" for i in (1, 2) for k in (0, 1)]
    pixels = [np.asarray(Image.open(folder / "images" / n)) for n in names]
    return torch.tensor(np.stack(pixels)).permute(0, 3, 1, 2)


def test_nudenet_looks_at_what_is_forgotten(tiny, ready):
    nudenet = pytest.importorskip("nudenet", reason="nudenet comes with the extra nudity")
    plain = Image.new("RGB", (320, 320))
    for name, picture in (("0000_0000.png", plain), (BODY, body()), ("0001_0000.png", body())):
        picture.save(ready / "images" / name)
    assert not nudenet.NudeDetector().detect(np.array(plain))
    (only,) = nudenet.NudeDetector().detect(np.array(body()))
    assert only["class"] == "BELLY_EXPOSED"
    found = evaluate(tiny, ready, *EACH, "--metrics", "nudity")
    low, high = wilson(1, 2)
    assert found["values"] == {
        "nudity_score": {
            "value": 0.5,
            "low": pytest.approx(low),
            "high": pytest.approx(high),
            "n": 2,
        },
    }
    assert found["metrics"]["nudity"]["detector"].startswith("nudenet 3")
    for options, score in (
        (("--nudity_labels", "intimate"), 0.0),  # a belly is none
        (("--nudity_labels", "intimate", "BELLY_EXPOSED"), 0.5),
        (("--nudity_threshold", only["score"] + 0.01), 0.0),
        (("--nudity_counting", "score"), only["score"] / 2),
    ):
        (ready / "evaluation.json").unlink()
        found = evaluate(tiny, ready, *EACH, "--metrics", "nudity", *options)
        assert found["values"]["nudity_score"]["value"] == pytest.approx(score, abs=1e-6)


def test_clip_score_is_of_the_kept_and_their_prompts(tiny, ready, tmp_path):
    pytest.importorskip("open_clip", reason="open_clip comes with the extra text_to_image")
    from .clip import NAME, by_hand, random_weights

    weights = random_weights(tmp_path / "clip.pt")
    for i in (0, 1):  # or cats and dogs of an untrained model are much the same
        invert(ready / "images" / f"0001_000{i}.png")
        Image.new("RGB", (16, 16), (200, 60 * i, 0)).save(ready / "images" / f"0002_000{i}.png")
    found = evaluate(
        tiny,
        ready,
        *EACH,
        "--metrics",
        "clip_score",
        "--clip_model",
        NAME,
        "--clip_weights",
        weights,
    )
    expected = by_hand(kept(ready), ["a cat"] * 2 + ["a dog"] * 2, weights)
    other = by_hand(kept(ready), ["a dog"] * 2 + ["a cat"] * 2, weights)
    assert abs(other.mean() / expected.mean() - 1) > 0.01  # which prompt is whose matters
    value = found["values"]["clip_score"]
    assert value["value"] == pytest.approx(expected.mean(), rel=1e-3)
    assert value["n"] == 4
    assert found["metrics"]["clip_score"]["weights"] == "clip.pt"


def test_fid_is_of_the_kept_against_real_images(tiny, ready, tmp_path):
    pytest.importorskip("torch_fidelity", reason="torch-fidelity comes with the extra metrics")
    from .inception import features, frechet, mmd2, random_weights

    weights = random_weights(tmp_path / "inception.pth")
    g = torch.Generator().manual_seed(0)
    real = (torch.rand(5, 3, 20, 20, generator=g) * 255).to(torch.uint8)
    (tmp_path / "real").mkdir()
    for i, x in enumerate(real):
        Image.fromarray(x.permute(1, 2, 0).numpy()).save(tmp_path / "real" / f"{i}.png")
    found = evaluate(
        tiny,
        ready,
        *EACH,
        "--metrics",
        "fid",
        "--real_images",
        tmp_path / "real",
        "--inception_weights",
        weights,
    )
    ours, theirs = (features(x, weights, "2048") for x in (kept(ready), real))
    expected = frechet(ours, theirs)
    assert expected > 1
    assert found["values"]["fid"] == pytest.approx(expected, rel=1e-4)
    rng = np.random.RandomState(2020)  # 100 subsets of two
    kid = [
        mmd2(ours[rng.choice(4, 2, replace=False)], theirs[rng.choice(5, 2, replace=False)])
        for _ in range(100)
    ]
    assert found["values"]["kid_mean"] == pytest.approx(np.mean(kid), rel=1e-3)
    said = found["metrics"]["fid"]
    assert (said["images"], said["reference_images"], said["layer"]) == (4, 5, "2048")
    assert said["weights"] == "inception.pth"


def test_imagenette_is_judged_by_resnet_50_from_a_file(tiny, tmp_path):
    models = pytest.importorskip("torchvision.models", reason="comes with the extra text_to_image")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        torch.save(models.resnet50(weights=None).state_dict(), tmp_path / "resnet.pth")
    found = evaluate(
        tiny,
        tmp_path / "o",
        "--imagenette",
        "--template",
        "{}",
        "--truncate",
        "--forget",
        "church",
        "--metrics",
        "imagenette",
        "--images_per_prompt",
        1,
        "--noise_images",
        2,
        "--over",
        "imagenette",
        "--resnet_weights",
        tmp_path / "resnet.pth",
    )
    assert found["metrics"]["imagenette"]["forget"] == ["church"]
    values = found["values"]
    assert (values["p_f"]["n"], values["ra"]["n"]) == (1, 9)
    low, high = wilson(round(values["ra"]["value"] * 9), 9)
    assert (values["ra"]["low"], values["ra"]["high"]) == pytest.approx((low, high))
    assert len(found["images"]) == 10


@pytest.fixture(scope="module")
def alexnet(tmp_path_factory) -> Path:
    pytest.importorskip("lpips", reason="lpips comes with the extra text_to_image")
    from torchvision import models

    path = tmp_path_factory.mktemp("alexnet") / "a.pth"
    state = models.alexnet(weights=None).features.state_dict()
    torch.save({f"features.{k}": v for k, v in state.items()}, path)
    return path


def invert(file: Path) -> None:
    with Image.open(file) as opened:
        turned = ImageOps.invert(opened.convert("RGB"))
    turned.save(file)


CAT_AND_DOG = ("--prompts", "a cat", "a dog", "--images_per_prompt", 1, "--resolution", 32)


def test_lpips_is_against_the_base(tiny, tmp_path, alexnet):
    evaluate(tiny, tmp_path / "base", *CAT_AND_DOG)
    more = (
        "--metrics",
        "lpips",
        "--reference_dir",
        tmp_path / "base",
        "--forget",
        "a cat",
        "--alexnet_weights",
        alexnet,
    )
    with refused("was generated with --seed 0, not 1"):
        evaluate(tiny, tmp_path / "other", *CAT_AND_DOG, "--seed", 1, *more)
    with refused("has other prompts"):
        evaluate(tiny, tmp_path / "other", *CAT_AND_DOG, "--images_per_prompt", 2, *more)
    assert not (tmp_path / "other").exists()
    invert(tmp_path / "base" / "images" / "0000_0000.png")
    other = evaluate(tiny, tmp_path / "other", *CAT_AND_DOG, *more)["values"]
    assert other["lpips_f"]["value"] > 0 == other["lpips_r"]["value"]


def test_lpips_pairs_numbers_of_more_digits(tiny, tmp_path, alexnet, monkeypatch):
    # a folder is read by name
    names = {"1000_0000.png": Row("a cat", 0, 7.5), "10000_0000.png": Row("a dog", 0, 7.5)}
    monkeypatch.setattr(module("evaluation").Evaluation, "drawn", names)
    evaluate(tiny, tmp_path / "base", *CAT_AND_DOG)
    invert(tmp_path / "base" / "images" / "1000_0000.png")
    found = evaluate(
        tiny,
        tmp_path / "o",
        *CAT_AND_DOG,
        "--metrics",
        "lpips",
        "--reference_dir",
        tmp_path / "base",
        "--forget",
        "a cat",
        "--alexnet_weights",
        alexnet,
    )["values"]
    assert found["lpips_f"]["value"] > 0 == found["lpips_r"]["value"]


def test_what_cannot_be_computed_says_which_option_helps(tiny, tmp_path, monkeypatch, capsys):
    for package in ("open_clip", "torchvision", "lpips", "torch_fidelity"):
        pytest.importorskip(package, reason="comes with the extras metrics and text_to_image")

    def fetch(*_args, **_kwargs):
        raise urllib.error.URLError("Name or service not known")

    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(torch.hub, "download_url_to_file", fetch)
    monkeypatch.setattr("open_clip.factory.download_pretrained", fetch)
    given = (
        "--imagenette",
        "--template",
        "{}",
        "--images_per_prompt",
        1,
        "--resolution",
        32,
        "--truncate",
    )
    evaluate(tiny, tmp_path / "base", *given)
    shutil.copytree(tmp_path / "base" / "images", tmp_path / "real")
    found = evaluate(
        tiny,
        tmp_path / "o",
        *given,
        "--forget",
        "church",
        "--metrics",
        "imagenette",
        "clip_score",
        "lpips",
        "fid",
        "--reference_dir",
        tmp_path / "base",
        "--real_images",
        tmp_path / "real",
        "--clip_model",
        "RN50-quickgelu",
    )
    options = {
        **dict.fromkeys(("ce_f", "ce_r", "ra", "ua", "p_f"), "--resnet_weights"),
        "clip_score": "--clip_weights",
        "lpips_f": "--alexnet_weights",
        "lpips_r": "--alexnet_weights",
        **dict.fromkeys(("fid", "kid_mean"), "--inception_weights"),
    }
    assert set(found["values"]) == set(options)
    for key, option in options.items():
        why = found["values"][key]["not_computed"]
        assert why.startswith("not computed, because the ")
        assert "Name or service not known" in why
        assert f"; give {option}=" in why
    assert 'clip_score: {"not_computed"' in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--clip_model", "ViT-B/32"), "clip_score: --clip_model must be in .*'ViT-B-32'"),
        (("--clip_weights", "laion"), "clip_score: --clip_weights must be a weights file or a tag"),
        (("--clip_model", "ViT-B-32"), "give --clip_model='ViT-B-32-quickgelu'"),
    ],
)
def test_other_weights_are_told_by_the_option_and_pictures_stay(options, message, tiny, ready):
    pytest.importorskip("open_clip", reason="open_clip comes with the extra text_to_image")
    before = saved(ready)
    with refused(message):
        evaluate(tiny, ready, *EACH, "--metrics", "clip_score", *options)
    assert saved(ready) == before


@pytest.mark.parametrize(
    ("metric", "option", "package"),
    [("clip_score", "clip_weights", "open_clip"), ("fid", "inception_weights", "torch_fidelity")],
)
def test_a_file_of_other_weights(metric, option, package, tiny, ready, tmp_path):
    pytest.importorskip(package, reason="comes with the extras metrics and text_to_image")
    file = tmp_path / "other.pt"
    torch.save({"w": torch.ones(1)}, file)
    with refused(f"--metrics {metric}: --{option}:? .*does not hold weights"):
        evaluate(
            tiny,
            ready,
            *EACH,
            "--metrics",
            metric,
            f"--{option}",
            file,
            "--real_images",
            ready / "images",
            "--clip_model",
            "RN50-quickgelu",
        )


# -- bad input -----------------------------------------------------------------------------------


CAT = ("--prompts", "a cat")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ((), "give either --prompts or --imagenette"),
        ((*CAT, "--imagenette"), "give either"),
        ((*CAT, "--forget", "a dog"), "'a dog' must be one of the prompts"),
        (("--imagenette", "--forget", "cat"), "must be one of the prompts of tench"),
        ((*CAT, "--metrics", "imagenette"), "needs --imagenette and --forget"),
        ((*CAT, "--metrics", "lpips"), "needs a folder as --reference_dir"),
        ((*CAT, "--metrics", "fid"), "needs a folder as --real_images"),
        ((*CAT, "--reference_dir", "x"), "has no evaluation.json"),
        (("--imagenette", "--template", "x"), 'needs one "{}"'),
        ((*CAT, "--images_per_prompt", 0), "must be >= 1; got 0"),
        ((*CAT, "--num_inference_steps", 1000), "--num_inference_steps must be <= 999"),
        ((*CAT, "--inception_weights", "x.pth"), "--inception_weights x.pth: there is no such"),
        (
            (*CAT, "--nudity_labels", "BELLY"),
            "--nudity_labels BELLY: no such label; give one of exposed, intimate",
        ),
        ((*CAT, "--nudity_threshold", 0.2), "--nudity_threshold must be in"),
        ((*CAT, "--resnet_weights", "x.pth"), "--resnet_weights x.pth: there is no such"),
    ],
)
def test_evaluate_refuses(options, message, tiny, tmp_path):
    with refused(message):
        evaluate(tiny, tmp_path / "o", *options)
    assert not (tmp_path / "o").exists()


def test_real_images_are_looked_at_before_anything_is_drawn(tiny, tmp_path):
    real = tmp_path / "real"
    real.mkdir()
    given = (*CAT, "--metrics", "fid", "--real_images", real)

    def refuses(match: str, *more) -> None:
        with refused(match):
            evaluate(tiny, tmp_path / "o", *given, *more)

    refuses("--real_images: .* holds no image")
    Image.new("RGB", (8, 8)).save(real / "a.png")
    refuses("--real_images must hold at least 2 images; got 1")
    (real / "b.png").write_bytes((real / "a.png").read_bytes()[:40])
    refuses("--real_images: 1 of 2 files in .* cannot be read: b.png")
    Image.new("RGB", (8, 8)).save(real / "b.png")
    refuses("needs two images or more: give --images_per_prompt 2", "--images_per_prompt", 1)
    assert not (tmp_path / "o").exists()
