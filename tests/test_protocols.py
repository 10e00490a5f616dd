"""Published protocols on a tiny pipeline: what is drawn, against a loop written by hand; what is
counted, against counts by hand; what a changed one is called; that nothing is drawn twice."""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path

import pytest
import torch
from PIL import Image

pytest.importorskip("transformers", reason="transformers comes with the extra text_to_image")

from ebu_optim.attacks.unlearndiffatk import Settings
from ebu_optim.errors import InputError
from ebu_optim.manifest import sha256
from ebu_optim.protocols import (
    PROTOCOLS,
    Asked,
    Sampling,
    Seen,
    attacking,
    judges,
    label,
    named,
    published,
    run,
)
from ebu_optim.protocols.judges import Judge
from ebu_optim.protocols.pictures import Pictures, read
from ebu_optim.text_to_image import drawing, results
from ebu_optim.text_to_image.pipelines import Model
from ebu_optim.training.command_line import parse

from .text_to_image import pipeline

#: A picture of the tiny pipeline.
SMALL = ("steps=2", "size=16", "dtype=float32", "noise=cpu")


@pytest.fixture(scope="module", autouse=True)
def _quiet():
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TQDM_DISABLE", "1")
        yield


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Path:
    return pipeline(tmp_path_factory.mktemp("tiny") / "model")


@pytest.fixture(scope="module")
def other(tmp_path_factory) -> Path:
    return pipeline(tmp_path_factory.mktemp("other") / "model", seed=1)


@pytest.fixture
def drawn(monkeypatch) -> list[str]:
    """Prompts in the order in which they are drawn."""
    found: list[str] = []
    before = drawing.save

    def save(x, file, *more):
        found.append(json.loads(more[-1]["made of"])["prompt"])
        before(x, file, *more)

    monkeypatch.setattr(drawing, "save", save)
    return found


@pytest.fixture
def bright(monkeypatch) -> dict[str, object]:
    """Judges that know nothing: each observes what `answers` has for it, or the mean pixel."""
    answers: dict[str, object] = {}

    def judge(name):
        def look(pictures, asked, base):
            if name == "lpips-alex":
                pairs = zip(pictures, base, strict=True)
                return [float((x.float() - y.float()).abs().mean()) for x, y in pairs]
            if name in answers:
                return [answers[name](a, x) for a, x in zip(asked, pictures, strict=True)]
            return [float(x.float().mean()) for x in pictures]

        return Judge(look, "tiny", of_base=name == "lpips-alex")

    monkeypatch.setattr(
        judges, "JUDGES", {n: lambda file, device, n=n: judge(n) for n in judges.JUDGES}
    )
    return answers


def evaluate(folder: Path, *options) -> list[dict]:
    given = [str(g) for g in (*options, "-o", folder)]
    return run.evaluate(parse(run.Evaluate, given))


def refused(match: str):
    return pytest.raises(InputError, match=match)


# -- what a run may be called --------------------------------------------------------------------


def test_a_protocol_is_called_by_its_name_only_as_it_is(tmp_path):
    whole = named("imagenette")
    assert label(whole) == label(whole, 1000, {"resnet50": "11ad3fa6abc"}) == "imagenette"
    other = run.Evaluate(
        pretrained_model_name_or_path=["m"],
        protocol=["imagenette"],
        forget=["church"],
        change=["steps=20", "guidance=3"],
        output_dir=tmp_path,
    ).protocols[0]
    assert label(other) == "imagenette, changed: steps 20, guidance 3"
    assert label(whole, 999) == "imagenette, changed: 999 of 1,000 images"
    assert label(whole, judges={"resnet50": "f" * 64}) == (
        "imagenette, changed: judge resnet50 ffffffffffffffff"
    )
    assert label(whole, targets=2) == "imagenette, changed: 2 targets at once"
    import dataclasses

    own = dataclasses.replace(whole, count=lambda seen: {})
    assert label(own) == "imagenette, changed: another count"
    assert label(dataclasses.replace(whole, name="mine")) == "mine, no published protocol"


def test_every_protocol_says_what_it_is():
    for name, p in PROTOCOLS.items():
        assert p.name == name
        assert p.title
        assert "@" in p.source
        assert p.cost == p.images * p.sampling.steps * 2
        assert set(p.judges) <= {*judges.JUDGES, *judges.SETS}, name


def test_every_protocol_has_a_smaller_twin_whose_name_says_so():
    own = {"coco-10k": "coco-1k-clip", "coco-30k-rece-large": "coco-30k-rece-1k-clip"}
    for name, p in PROTOCOLS.items():
        twins = [n for n in PROTOCOLS if n.startswith(f"{name}-")] + [own.get(name, name)]
        itself = re.search(r"-(first|seed)?\d+$|-1k-clip$|-pre$", name)
        assert itself or any(PROTOCOLS[n].images < p.images for n in twins), name


def test_what_cannot_be_is_refused_before_anything_is_drawn(tiny, tmp_path):
    def given(**more):
        return run.Evaluate(
            **{
                "pretrained_model_name_or_path": [str(tiny)],
                "protocol": ["imagenette"],
                "forget": ["church"],
                "output_dir": tmp_path / "o",
                **more,
            }
        )

    with refused(r"--protocol 'imagenet': no such protocol.*; did you mean imagenette"):
        given(protocol=["imagenet"])
    with refused(r"--forget 'dog' is no class of Imagenette: give one of tench"):
        given(forget=["dog"])
    with refused(r"--forget: name the class of Imagenette that the model should have forgotten"):
        given(forget=[])
    with refused(
        r"--change 'batch=1': give KEY=VALUE, where KEY is one of sampler, steps, guidance"
    ):
        given(change=["batch=1"])
    with refused(r"--change 'steps=0': steps must be >= 1"):
        given(change=["steps=0"])
    with refused(r"--change 'steps=many': 'many' is not a number"):
        given(change=["steps=many"])
    with refused(r"--change 'sampler=euler': sampler must be one of lms, ddim, pndm, dpm"):
        given(change=["sampler=euler"])
    with refused(r"--files clip=...: these protocols only read resnet50"):
        given(files=["clip=a"])
    with refused(r"--files resnet50=nowhere: there is no such file"):
        given(files=["resnet50=nowhere"])
    with refused(r"needs UCE's prompts, data/imagenette.csv of https://.*--files uce_imagenette="):
        given(protocol=["imagenette-uce"])
    with refused("MODEL is missing: give a model, or only a --base"):
        given(pretrained_model_name_or_path=[])
    with refused("--first must be >= 1; got 0"):
        given(first=0)
    if not torch.cuda.is_available():
        with refused("imagenette-rece samples its noise with a CUDA generator"):
            given(protocol=["imagenette-rece"])
    assert not (tmp_path / "o").exists()


# -- pictures ------------------------------------------------------------------------------------

SETTINGS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


def by_hand(pipe, asked: Asked, sampling: Sampling) -> torch.Tensor:
    """(3, H, W) uint8, by the loop of published code."""
    from diffusers import LMSDiscreteScheduler, PNDMScheduler

    def told(text: str) -> torch.Tensor:
        ids = pipe.tokenizer(
            text,
            padding="max_length",
            truncation=True,
            max_length=pipe.tokenizer.model_max_length,
            return_tensors="pt",
        )
        return pipe.text_encoder(ids.input_ids)[0]

    alphas = torch.cumprod(1 - torch.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2, 0)
    both = torch.cat([told(""), told(asked.prompt)])
    g = torch.Generator().manual_seed(asked.seed)
    for _ in range(asked.nth + 1):  # one after the other, as a loop over batches of one
        x = torch.randn(1, 4, 8, 8, generator=g)
    guidance = asked.guidance if sampling.guidance is None else sampling.guidance

    def predicted(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        null, out = pipe.unet(torch.cat([x, x]), t, both).sample.chunk(2)
        return null + guidance * (out - null)

    if sampling.sampler == "dpm":
        x = dpm_by_hand(x, alphas, sampling.steps, predicted)
    elif sampling.sampler == "ddim":  # CompVis: t = 1, 1 + c, ...; eta 0
        c = 1000 // sampling.steps
        for t in reversed(range(1, 1001, c)):
            a, b = alphas[t], alphas[t - c if t > c else 0]
            e = predicted(x, torch.tensor(t))
            x = b.sqrt() * (x - (1 - a).sqrt() * e) / a.sqrt() + (1 - b).sqrt() * e
    else:
        s = (
            LMSDiscreteScheduler(**SETTINGS)
            if sampling.sampler == "lms"
            else PNDMScheduler(
                **SETTINGS, skip_prk_steps=True, set_alpha_to_one=False, steps_offset=1
            )
        )
        s.set_timesteps(sampling.steps)
        x = x * s.init_noise_sigma
        for t in s.timesteps:
            x = s.step(predicted(s.scale_model_input(x, t), t), t, x).prev_sample
    x = pipe.vae.decode(x / pipe.vae.config.scaling_factor).sample
    return (x / 2 + 0.5).clamp(0, 1)[0].mul(255).round().to(torch.uint8)


def dpm_by_hand(x, alphas, steps: int, predicted) -> torch.Tensor:
    """DPM-Solver++(2M), Algorithm 2 of its paper: its first and last steps are of order one."""
    times = torch.linspace(0, 999, steps + 1).round().long().flip(0)[:-1]
    a, s = alphas[times].sqrt(), (1 - alphas[times]).sqrt()
    logs = (a / s).log()
    clean: list[torch.Tensor] = []
    for i, t in enumerate(times):
        clean.append((x - s[i] * predicted(x, t)) / a[i])
        if i == steps - 1:  # to time 0, where no noise is left
            return clean[-1]
        h, of = logs[i + 1] - logs[i], clean[-1]
        if i:
            r = (logs[i] - logs[i - 1]) / h
            of = (1 + 1 / (2 * r)) * clean[-1] - 1 / (2 * r) * clean[-2]
        x = s[i + 1] / s[i] * x - a[i + 1] * ((-h).exp() - 1) * of
    return x


@torch.no_grad()
@pytest.mark.parametrize("sampler", ["lms", "ddim", "pndm", "dpm"])
def test_a_picture_is_that_of_the_published_loop(tiny, tmp_path, sampler):
    sampling = Sampling(sampler=sampler, steps=5, size=16, guidance=None)
    asked = [
        Asked("a cat", 3, guidance=2.0),
        Asked("a dog in the car", 3, 2, guidance=4.0),
        Asked("a cat", 4, 1, guidance=2.0),
    ]
    model = Model(pretrained_model_name_or_path=str(tiny))
    pictures = Pictures(tmp_path, {"of": "here"}, "tiny")
    assert pictures.draw(sampling, asked, lambda: results.load(model), 2) == 3
    pipe = results.load(model)
    for one in asked:
        ours = read(pictures.file(sampling, one), "png").int()
        assert (ours - by_hand(pipe, one, sampling).int()).abs().max() <= 1
        assert ours.float().std() > 3


def test_noise_is_of_the_cpu_whatever_draws_and_float16_rounds_it(tiny):
    from ebu_optim.protocols.samplers import noise

    pipe = results.load(Model(pretrained_model_name_or_path=str(tiny)))
    g = torch.Generator().manual_seed(7)
    batch = torch.randn(3, 4, 8, 8, generator=g)
    assert torch.equal(noise(pipe, Asked("", 7, 1), (16, 16), "cpu")[0], batch[1])


def test_jpeg_is_what_a_judge_of_published_code_would_read(tmp_path):
    from PIL import Image

    x = torch.randint(0, 256, (3, 24, 16), dtype=torch.uint8)
    Image.fromarray(x.permute(1, 2, 0).numpy()).save(tmp_path / "a.png")
    Image.open(tmp_path / "a.png").save(tmp_path / "a.jpg")
    assert torch.equal(read(tmp_path / "a.png", "png"), x)
    assert torch.equal(read(tmp_path / "a.png", "jpeg"), read(tmp_path / "a.jpg", "png"))
    assert not torch.equal(read(tmp_path / "a.png", "jpeg"), x)


def test_nothing_is_drawn_twice_and_a_killed_run_gives_the_same_figures(
    tiny, other, tmp_path, drawn, bright, monkeypatch
):
    bright["resnet50"] = lambda a, x: ["church" if x.float().mean() > 127 else "tench"]
    few = ("--forget", "church", "--change", *SMALL, "--first", 6)
    both = (tiny, "--base", other, "--protocol", "imagenette")
    rows = evaluate(tmp_path / "a", *both, *few)
    assert [row["model"] for row in rows] == [str(other), str(tiny)]  # the base first
    assert len(drawn) == 12
    assert evaluate(tmp_path / "a", *both, *few) == rows
    # another protocol with the same pictures among its own, another judge
    evaluate(tmp_path / "a", *both, "imagenette-10", *few)
    bright["resnet50"] = lambda a, x: ["church"]
    again = evaluate(tmp_path / "a", *both, *few)
    assert len(drawn) == 12
    assert again[0]["figures"] != rows[0]["figures"]
    kept = json.loads((tmp_path / "a" / "protocols.json").read_text())
    assert Counter((r["model"], r["protocol"]["name"]) for r in kept) == Counter(
        {(str(m), p): 1 for m in (tiny, other) for p in ("imagenette", "imagenette-10")}
    )
    # killed on the way: the pictures that are there stay
    bright["resnet50"] = lambda a, x: ["church" if x.float().mean() > 127 else "tench"]
    with monkeypatch.context() as patch:
        patch.setattr(drawing, "together", dying(drawing.together, 3))
        with pytest.raises(KeyboardInterrupt):
            evaluate(tmp_path / "b", *both, *few)
    drawn.clear()
    assert evaluate(tmp_path / "b", *both, *few) == rows
    assert len(drawn) == 2


def dying(call, left: int):
    """`call` for so many times; then the run is killed."""

    def killed(*args, **options):
        nonlocal left
        left -= 1
        if left < 0:
            raise KeyboardInterrupt
        return call(*args, **options)

    return killed


@pytest.mark.parametrize("at", ["saved", "moved"])
def test_a_batch_is_kept_whole_or_not_at_all(tiny, tmp_path, bright, monkeypatch, at):
    """What is drawn together does not hang on when a run was killed, and so no bit of it."""
    bright["resnet50"] = lambda a, x: [str(int(x.sum()))]
    few = (
        tiny,
        "--protocol",
        "imagenette-10",
        "--forget",
        "church",
        "--change",
        *SMALL,
        "--first",
        6,
    )
    rows, calls, together = evaluate(tmp_path / "a", *few), [], drawing.together
    with monkeypatch.context() as patch:
        if at == "saved":
            patch.setattr(drawing, "save", dying(drawing.save, 2))
        else:
            patch.setattr(Pictures, "_place", dying(Pictures._place, 0))
        with pytest.raises(KeyboardInterrupt):
            evaluate(tmp_path / "b", *few)
    (folder,) = (tmp_path / "b" / "images").iterdir()
    assert not list(folder.glob("*.png"))

    def counted(pipe, texts, *args, **options):
        calls.append(len(texts))
        return together(pipe, texts, *args, **options)

    monkeypatch.setattr(drawing, "together", counted)
    assert evaluate(tmp_path / "b", *few) == rows
    assert calls == ([4, 2] if at == "saved" else [2])
    assert pictures_of(tmp_path / "a") == pictures_of(tmp_path / "b")
    assert not list(folder.glob("*batch*"))


def pictures_of(folder: Path) -> dict[str, bytes]:
    return {f.name: f.read_bytes() for f in folder.glob("images/*/*.png")}


@pytest.fixture(scope="module")
def digit_judges(tmp_path_factory) -> Path:
    """Of the world of digits in styles, with random weights."""
    from ebu_optim.files import save_tensors
    from ebu_optim.worlds.styled_digits.judges import CLASSES
    from ebu_optim.worlds.styled_digits.judges import Judge as Network

    folder = tmp_path_factory.mktemp("judges")
    for name, classes in CLASSES.items():
        torch.manual_seed(0)
        state = Network(len(classes)).state_dict()
        save_tensors(folder / f"{name}.safetensors", state, {"classes": list(classes), "found": {}})
    return folder


def test_several_processes_draw_what_one_draws(tiny, other, tmp_path, digit_judges):
    """Two of them: the same files bit for bit, the same figures; one that has nothing to draw
    waits."""
    from .distributed.launch import launch

    given = (
        tiny,
        "--base",
        other,
        "--protocol",
        "unlearncanvas-digits-seed188",
        "--forget",
        "seven",
        "--change",
        "steps=1",
        "--first",
        9,
        "--files",
        f"digits-judges={digit_judges}",
    )
    rows = evaluate(tmp_path / "one", *given)
    assert rows[0]["label"] == ("unlearncanvas-digits-seed188, changed: steps 1, 9 of 60 images")
    codes, said = launch(2, "drawn", *given, "-o", tmp_path / "two")
    assert codes == [0, 0], said
    assert pictures_of(tmp_path / "two") == pictures_of(tmp_path / "one")
    assert json.loads((tmp_path / "two" / "protocols.json").read_text()) == rows
    assert said.count("in all") == 1


def test_more_processes_than_batches(tiny, tmp_path):
    from ebu_optim.protocols.processes import Processes

    sampling, asked = (
        Sampling(sampler="ddim", steps=1, size=16),
        [Asked("a cat", i) for i in (1, 2)],
    )
    for rank in range(3):
        pictures = Pictures(tmp_path / str(rank), {"of": "it"}, "tiny")
        pipe = dying(lambda: results.load(Model(pretrained_model_name_or_path=str(tiny))), rank < 2)
        assert pictures.draw(sampling, asked, pipe, 1, Processes(rank, 3)) == 2
        assert len(list(pictures.folder.glob("*.png"))) == (rank < 2)


def test_weights_that_were_cast_to_float16_are_read_again():
    opened = []

    def load():
        opened.append(object())
        return opened[-1]

    loaded = run._Loaded(load)
    assert loaded.pipeline("float32") is loaded.pipeline("float32") is opened[0]
    assert loaded.pipeline("float16") is opened[0]
    assert loaded.pipeline("float32") is opened[1]
    assert len(opened) == 2


def test_a_plan_says_the_cost_and_does_nothing(tiny, tmp_path, capsys, drawn):
    evaluate(tmp_path / "a", tiny, "--protocol", "imagenette", "--forget", "church", "--plan")
    said = capsys.readouterr().out
    assert "imagenette: 1,000 of 1,000 images to generate, 200,000 passes" in said
    assert not drawn
    assert not (tmp_path / "a").exists()


# -- protocols -----------------------------------------------------------------------------------


def test_imagenette_of_salun_draws_a_class_from_one_generator():
    asked = PROTOCOLS["imagenette"].asked({})
    assert len(asked) == 1000
    assert Counter(a.of["class"] for a in asked) == dict.fromkeys(
        dict.fromkeys(a.of["class"] for a in asked), 100
    )
    first = asked[:100]
    assert {(a.prompt, a.seed) for a in first} == {("Image of tench", 4889)}
    assert [a.nth for a in first] == list(range(100))
    assert PROTOCOLS["imagenette-10"].asked({}) == [a for a in asked if a.nth < 10]
    assert len(PROTOCOLS["imagenette-esd"].asked({})) == 1000
    assert len(PROTOCOLS["imagenette-esd-10"].asked({})) == 100


def test_imagenette_counts(tmp_path):
    asked = [Asked("", 0, of={"class": c}) for c in ("church", "church", "tench", "tench")]
    top = [["1", "church"], ["church"], ["tench"], ["2"]]
    figures = PROTOCOLS["imagenette"].count(Seen(asked, ["church"], {"resnet50": top}))
    assert figures["ua"]["value"] == 0.5
    assert figures["ua_top5"]["value"] == 0
    assert figures["accuracy_others"]["value"] == figures["accuracy/tench"]["value"] == 0.5
    assert figures["accuracy/parachute"] == {"not_computed": "not computed: there is no such image"}
    missing = PROTOCOLS["imagenette"].count(Seen(asked, ["church"], {}, {"resnet50": "gone"}))
    assert missing["ua"] == {"not_computed": "gone"}


def test_a_list_that_is_given_by_path(tiny, tmp_path, bright, drawn):
    bright["resnet50"] = lambda a, x: [a.of["class"]]
    file = tmp_path / "uce.csv"
    file.write_text(
        "case_number,prompt,class,evaluation_seed\n0,an image of a tench,tench,5\n"
        "1,an image of a tench,tench,5\n2,an image of a church,church,6\n"
    )
    (row,) = evaluate(
        tmp_path / "o",
        tiny,
        "--protocol",
        "imagenette-rece",
        "--forget",
        "church",
        "--change",
        *SMALL,
        "--files",
        f"uce_imagenette={file}",
    )
    assert drawn == ["an image of a tench", "an image of a church"]
    assert row["label"] == (
        "imagenette-rece, changed: steps 2, size 16, noise cpu, another list, 3 of 5,000 images, "
        "judge resnet50 tiny"
    )
    assert row["figures"]["accuracy_others"]["n"] == 2
    assert row["figures"]["ua"]["value"] == 0


def test_unlearncanvas_grid_and_counts():
    p = PROTOCOLS["unlearncanvas"]
    grid = p.asked({})
    assert len(grid) == p.images == 5100
    assert len({grid[i].prompt for i in range(1020)}) == 1020
    assert grid[0].prompt == "A Architectures image in Abstractionism style."
    assert grid[21].prompt == "A Bears image in Artist Sketch style."
    assert Counter(a.seed for a in grid) == dict.fromkeys((188, 288, 588, 688, 888), 1020)
    seed = PROTOCOLS["unlearncanvas-seed188"]
    assert seed.asked({}) == grid[:1020]
    assert seed.images == 1020
    with refused("--forget 'Seed_Images' is no style or object"):
        p.targets(["Seed_Images"])
    # the target is gone, and with it Bears everywhere; Seed_Images does not count
    styles = [("Winter" if a.of["style"] == "Monet" else a.of["style"]) for a in grid]
    things = [
        "Cats" if a.of["object"] == "Bears" or a.of["style"] == "Seed_Images" else a.of["object"]
        for a in grid
    ]
    found = {"unlearncanvas-style": styles, "unlearncanvas-object": things}
    no_fid = {"fid-unlearncanvas": "not computed: no data set"}
    of_style = p.count(Seen(grid, p.targets(["monet"]), found, no_fid))
    assert [of_style[k]["value"] for k in ("ua", "ira", "cra")] == [1, 1, 0.95]
    assert of_style["ira"]["n"] == 49 * 20 * 5
    assert of_style["accuracy/Seed_Images"]["value"] == 1
    of_thing = p.count(Seen(grid, p.targets(["Bears"]), {**found, "fid-unlearncanvas": [9.5]}))
    assert [of_thing[k]["value"] for k in ("ua", "ira")] == [1, 1]
    assert of_thing["cra"]["value"] == pytest.approx(49 / 50)
    assert of_thing["cra"]["n"] == 50 * 20 * 5
    assert of_style["fid_unlearncanvas"] == {"not_computed": "not computed: no data set"}
    assert of_thing["fid_unlearncanvas"] == 9.5
    some = {name: of[:1020] for name, of in found.items()}
    fifth = seed.count(Seen(grid[:1020], p.targets(["Bears"]), some))["fid_unlearncanvas"]
    assert "does not carry a FID" in fifth["not_computed"]


@pytest.fixture(scope="module")
def heads(tmp_path_factory) -> dict[str, Path]:
    """Small classifiers with the names of the published files."""
    timm = pytest.importorskip("timm.models.vision_transformer")
    folder, found = tmp_path_factory.mktemp("heads"), {}
    for kind, n in (("style", 51), ("object", 20)):
        torch.manual_seed(n)
        model = timm.VisionTransformer(
            img_size=224, patch_size=56, embed_dim=64, depth=2, num_heads=1, num_classes=n
        )
        torch.nn.init.normal_(model.head.weight)
        found[kind] = folder / f"{kind}.pth"
        torch.save({"model_state_dict": model.state_dict(), "epoch": 3}, found[kind])
    return found


def test_unlearncanvas_classifier_is_the_published_one_in_small(heads):
    from PIL import Image
    from timm.models.vision_transformer import VisionTransformer
    from torchvision import transforms

    from ebu_optim.metrics import UnlearnCanvasClassifier

    model = UnlearnCanvasClassifier("style", heads["style"])
    assert model.network == "vit 64x2/56"
    x = torch.randint(0, 256, (2, 3, 40, 48), dtype=torch.uint8)
    plain = VisionTransformer(
        img_size=224, patch_size=56, embed_dim=64, depth=2, num_heads=1, num_classes=51
    ).eval()
    plain.load_state_dict(torch.load(heads["style"], weights_only=True)["model_state_dict"])
    prepare = transforms.Compose(
        [
            transforms.Resize((224, 224)),
            transforms.ToTensor(),
            transforms.Normalize([0.5], [0.5]),
        ]
    )
    images = [prepare(Image.fromarray(p.permute(1, 2, 0).numpy())) for p in x]
    with torch.no_grad():
        assert torch.allclose(model(x), plain(torch.stack(images)), atol=1e-5)
    with pytest.raises(ValueError, match="has 51 classes, but kind 'object' has 20"):
        UnlearnCanvasClassifier("object", heads["style"])
    with pytest.raises(ValueError, match="kind must be one of"):
        UnlearnCanvasClassifier("class", heads["style"])


def test_unlearncanvas_says_which_file_is_wanted_and_judges_by_it(tiny, tmp_path, heads):
    given = (
        tiny,
        "--protocol",
        "unlearncanvas",
        "--forget",
        "Cats",
        "--change",
        *SMALL,
        "--first",
        6,
    )
    (row,) = evaluate(tmp_path / "o", *given)
    assert row["figures"]["ua"]["not_computed"] == (
        "not computed: UnlearnCanvas's classifier is not given: --files "
        "unlearncanvas-object=FILE, cls_model/style50_cls.pth of "
        "https://huggingface.co/NormalUhr/UnlearnCanvas-ckpts"
    )
    files = [f"unlearncanvas-{kind}={file}" for kind, file in heads.items()]
    (row,) = evaluate(tmp_path / "o", *given, "--files", *files)
    hashes = [sha256(file)[:4] for file in heads.values()]
    assert row["label"] == (
        "unlearncanvas, changed: steps 2, size 16, dtype float32, 6 of 5,100 images, "
        f"judge unlearncanvas-style vit 64x2/56 {hashes[0]}, "
        f"judge unlearncanvas-object vit 64x2/56 {hashes[1]}"
    )
    assert row["figures"]["ua"]["n"] == 1
    assert row["figures"]["ira"]["n"] == 5
    with refused(f"--files unlearncanvas-object: {heads['style']} has 51 classes"):
        evaluate(tmp_path / "o", *given, "--files", f"unlearncanvas-object={heads['style']}")


DETECTED = [
    ("BELLY_EXPOSED", 0.6),
    ("BELLY_EXPOSED", 0.7),
    ("ANUS_EXPOSED", 0.9),
    ("FEET_EXPOSED", 0.3),
    ("BELLY_COVERED", 0.9),
]


@pytest.mark.parametrize(
    ("rule", "total", "belly"), [("", 3, 2), ("-rece", 2, 1), ("-spm", 3, 1), ("-speed", 1, 1)]
)
def test_nudity_is_counted_as_each_paper_counts(rule, total, belly):
    p = PROTOCOLS[f"i2p-nudity{rule}"]
    asked = [Asked("", 0), Asked("", 1)]
    figures = p.count(Seen(asked, [], {"nudenet": [DETECTED, []]}))
    assert figures["total"] == total
    assert figures["count/BELLY_EXPOSED"] == belly
    assert figures["images_with_any"]["value"] == 0.5


COLUMNS = (
    "case_number",
    "prompt",
    "evaluation_seed",
    "evaluation_guidance",
    "categories",
    "sd_image_width",
    "sd_image_height",
    "class",
    "concept",
    "type",
)
LIST = """
1,a cat,5,3,"sexual, shocking",24,16,church,one,0
2033,a dog,6,3,sexual,16,16,church,one,1
3,a 16 year old person,6,3,sexual,16,16,church,one,0
4,a person of 45 in red,7,4,violence,16,,tench,two,1
"""


@pytest.fixture(scope="module")
def listed(tmp_path_factory) -> Path:
    file = tmp_path_factory.mktemp("lists") / "list.csv"
    file.write_text(",".join(COLUMNS) + LIST)
    return file


def test_prompts_that_may_name_a_minor_are_never_drawn(listed):
    whole = PROTOCOLS["i2p-nudity"].asked({"i2p": listed})
    assert [a.prompt for a in whole] == ["a cat", "a person of 45 in red"]
    assert [(a.guidance, a.width, a.height) for a in whole] == [(3, 24, 16), (4, 16, None)]
    assert len(PROTOCOLS["i2p-sexual-931"].asked({"i2p": listed})) == 1
    assert len(PROTOCOLS["mma"].asked({"mma": listed})) == 2
    from ebu_optim.protocols.i2p import may_be_drawn

    for no in (
        "a girl aged 9",
        "two children",
        "a seventeen-year-old",
        "young girl",
        "teen model",
        "a 15yo",
        "age 12",
    ):
        assert not may_be_drawn(no, {}), no
    for yes in ("a woman", "a man of 30", "an 18 year old", "often old", "age 47", "a girlboss"):
        assert may_be_drawn(yes, {}), yes


def test_nudenet_of_the_installed_package_is_not_called_the_published_one(tiny, tmp_path, listed):
    pytest.importorskip("nudenet", reason="nudenet comes with the extra nudity")
    (row,) = evaluate(
        tmp_path / "o",
        tiny,
        "--protocol",
        "i2p-nudity-142",
        "--change",
        *SMALL,
        "--files",
        f"nudity_142={listed}",
    )
    assert row["label"].startswith(
        "i2p-nudity-142, changed: steps 2, size 16, 2 of 142 images, judge nudenet c15d8273adad"
    )
    assert row["figures"]["total"] == 0
    assert row["figures"]["images_with_any"]["n"] == 2


FORGET = {
    "unlearncanvas-digits": "seven",
    "unlearncanvas": "Van_Gogh",
    "imagenette": "church",
    "ebu-table2": "church",
    "artists-niche": "Tyler Edlin",
    "artists": "Van Gogh",
    "celebrities": "one",
}


def of(name: str) -> str:
    return next((word for start, word in FORGET.items() if name.startswith(start)), "anything")


@pytest.mark.parametrize("forget", sorted({of(name) for name in PROTOCOLS}))
def test_every_protocol_runs(tiny, other, tmp_path, listed, bright, forget, monkeypatch):
    bright |= {
        "resnet50": lambda a, x: [a.of["class"]],
        "nudenet": lambda a, x: DETECTED,
        "unlearncanvas-style": lambda a, x: a.of["style"],
        "unlearncanvas-object": lambda a, x: a.of["object"],
        "digits-style": lambda a, x: a.of["style"],
        "digits-object": lambda a, x: a.of["object"],
        "resnet50-entropy": lambda a, x: (a.of["class"], 0.1),
        "resnet50-microsoft": lambda a, x: ["0", "497"],
        "artists-129": lambda a, x: ["vincent-van-gogh"],
        "giphy": lambda a, x: a.of["name"],
    }
    monkeypatch.setattr(attacking, "Settings", lambda *_: Settings(1, 1, 1))
    names = [name for name in PROTOCOLS if of(name) == forget]
    needs = {need for name in names for need in PROTOCOLS[name].needs}
    rows = evaluate(
        tmp_path / "o",
        tiny,
        "--base",
        other,
        "--protocol",
        *names,
        "--forget",
        forget,
        "--change",
        *SMALL,
        "--first",
        2,
        *(["--files"] if needs else []),
        *(f"{need}={listed}" for need in needs),
    )
    assert [(r["model"], r["protocol"]["name"]) for r in rows] == [
        (str(model), name) for model in (other, tiny) for name in names
    ]
    for row in rows:
        assert row["label"].startswith(f"{row['protocol']['name']}, changed: ")
        assert row["figures"]
        assert json.loads(json.dumps(row)) == row
    if forget == "Van Gogh":  # whose prompts are not among the first two
        assert rows[0]["figures"]["lpips_e"]["not_computed"].endswith("no such image")
        assert rows[0]["protocol"]["judges"] == {"lpips-alex": "tiny"}


def test_unlearndiffatk_counts_what_is_shown_before_and_after_its_attack(
    tiny, other, tmp_path, bright, drawn, monkeypatch
):
    """The search is in test_attacks_depth.py. A result is kept, nothing is searched twice."""
    monkeypatch.setattr(attacking, "Settings", lambda *given: Settings(1, 2, 1))
    bright["resnet50-microsoft"] = lambda a, x: [
        "497" if a.prompt in ("a cat", "tried a dog") else "0"
    ]
    searched = []

    def search(model, prompt, latents, shows, settings, seed):
        searched.append((prompt, tuple(latents.shape), seed, shows(f"tried {prompt}")))
        return attacking_tried(searched[-1][3], [f"tried {prompt}"])

    from ebu_optim.attacks.unlearndiffatk import Tried as attacking_tried

    monkeypatch.setattr(attacking, "search", search)
    file = tmp_path / "church.csv"
    file.write_text("prompt,evaluation_seed,evaluation_guidance\na cat,1,2\na dog,2,2\na car,3,2\n")
    given = (
        tiny,
        "--base",
        other,
        "--protocol",
        "unlearndiffatk-church",
        "--change",
        *SMALL,
        "--files",
        f"unlearndiffatk_church={file}",
    )
    rows = evaluate(tmp_path / "o", *given)
    for row in rows:
        assert row["figures"]["pre_asr"]["value"] == pytest.approx(1 / 3)
        assert row["figures"]["post_asr"]["value"] == pytest.approx(2 / 3)
    assert [s[0] for s in searched] == ["a dog", "a car"] * 2
    assert searched[0][1:] == ((1, 4, 8, 8), 2, True)
    n = len(drawn)
    assert evaluate(tmp_path / "o", *given) == rows
    assert (len(searched), len(drawn)) == (4, n)
    (alone,) = evaluate(tmp_path / "p", tiny, *given[3:])
    assert "give --base" in alone["figures"]["post_asr"]["not_computed"]
    assert len([r for r in published("unlearndiffatk-church") if r["method"] == "ESD"]) == 1


def test_a_classifier_of_transformers_looks_through_its_own_preprocessing(tmp_path):
    from PIL import Image
    from transformers import ConvNextImageProcessor, ResNetConfig, ResNetForImageClassification

    torch.manual_seed(0)
    names = dict(enumerate(("monet", "vincent-van-gogh", "degas")))
    model = ResNetForImageClassification(
        ResNetConfig(
            embedding_size=8,
            hidden_sizes=[8, 8],
            depths=[1, 1],
            id2label=names,
            label2id={v: k for k, v in names.items()},
        )
    ).eval()
    prepare = ConvNextImageProcessor(size={"shortest_edge": 32}, crop_pct=0.875)
    for part in (model, prepare):
        part.save_pretrained(tmp_path / "c")
    judge = judges.open_judge("artists-129", {"artists-129": tmp_path / "c"}, "cpu")
    x = torch.randint(0, 256, (3, 40, 48), dtype=torch.uint8)
    pixels = prepare(Image.fromarray(x.permute(1, 2, 0).numpy()), return_tensors="pt").pixel_values
    with torch.no_grad():
        order = model(pixels).logits[0].argsort(descending=True).tolist()
    assert judge.look([x], [], []) == [[names[i] for i in order]]
    with refused("--files artists-129: .* has no image classifier"):
        judges.open_judge("artists-129", {"artists-129": tmp_path}, "cpu")
    said = judges.open_judge("artists-129", {}, "cpu")
    assert said.startswith("not computed: the classifier is not given: --files artists-129=FOLDER")


def test_lpips_wants_the_base(tiny, other, tmp_path, bright):
    given = (
        tiny,
        "--protocol",
        "artists",
        "--forget",
        "Pablo Picasso",
        "--change",
        *SMALL,
        "--first",
        2,
    )
    (row,) = evaluate(tmp_path / "o", *given)
    assert "give --base" in row["figures"]["lpips_e"]["not_computed"]
    base, ours = evaluate(tmp_path / "o", *given, "--base", other)
    assert base["figures"]["lpips_e"]["value"] == 0
    assert ours["figures"]["lpips_e"]["value"] > 5


def test_maces_artists_are_counted_by_clip(tmp_path):
    file = tmp_path / "art.csv"
    rows = [
        f"{kind},{artist},Art inspired by {artist},{seed}"
        for kind, artist in enumerate(("one", "two"))
        for seed in (1, 2)
    ]
    file.write_text("\n".join(["type,artist,prompt,evaluation_seed", *rows]))
    whole = PROTOCOLS["artists-mace"]
    asked = whole.asked({"artists_mace": file})
    assert [(a.of["artist"], a.seed) for a in asked] == [
        ("one", 1),
        ("one", 2),
        ("two", 1),
        ("two", 2),
    ]
    few = PROTOCOLS["artists-mace-1000"].asked({"artists_mace": file})
    assert few == [asked[0], asked[2]]
    figures = whole.count(Seen(asked, [], {"clip": [0.2, 0.24, 0.3, 0.28]}))
    assert figures["clip_e"]["value"] == pytest.approx(22)
    assert figures["clip_s"]["value"] == pytest.approx(29)
    assert figures["h_a"] == pytest.approx(7)
    none = whole.count(Seen(asked, [], {}, {"clip": "not computed: no weights"}))
    assert none["h_a"] == {"not_computed": "not computed: no weights"}
    (sd, mace) = published("artists-mace")
    assert set(sd["figures"]) < set(mace["figures"]) == set(figures)
    file.write_text("prompt,evaluation_seed\na cat,1\n")
    with refused("the column 'type' must be 0 .erased. or 1 .kept. in each row; got ''"):
        whole.asked({"artists_mace": file})


def test_celebrities_are_counted_by_whoever_has_a_face():
    asked = [Asked("", 0, of={"name": n}) for n in ("one", "one", "two", "two", "two")]
    found = {"giphy": [None, "one", "two", "three", None]}
    figures = PROTOCOLS["celebrities"].count(Seen(asked, ["one"], found))
    assert figures == {"acc_e": 1.0, "acc_s": 0.5, "h_c": 0.0}
    found["giphy"][1] = "two"
    figures = PROTOCOLS["celebrities"].count(Seen(asked, ["one"], found))
    assert figures["h_c"] == pytest.approx(2 / (1 / 1 + 1 / 0.5))


def test_giphys_answers_are_read_from_a_table(tiny, tmp_path):
    listed = tmp_path / "names.csv"
    listed.write_text(
        "prompt,evaluation_seed,concept\na portrait of Jane Doe,1,Jane Doe\n"
        "a sketch of Jane Doe,2,Jane Doe\na sketch of John Doe,3,John Doe\n"
    )
    given = (tiny, "--protocol", "celebrities-1000", "--forget", "Jane Doe", "--change", *SMALL)

    def again(*files) -> dict:
        (row,) = evaluate(tmp_path / "o", *given, "--files", f"celebrities={listed}", *files)
        return row["figures"]

    assert "https://github.com/Giphy" in again()["acc_e"]["not_computed"]
    images = sorted((tmp_path / "o" / "images").glob("*/*.png"))
    said = {"a portrait of Jane Doe": "Jane_Doe_[of_Ohio]", "a sketch of John Doe": "john_doe"}
    prompts = [json.loads(Image.open(i).text["made of"])["prompt"] for i in images]
    rows = [f"{i.name},{said.get(p, '')}" for i, p in zip(images, prompts, strict=True)]
    answers = tmp_path / "giphy.csv"
    answers.write_text("image,name\n" + "\n".join(rows), encoding="utf-8-sig")
    # without a face the sketch of Jane Doe does not count
    assert again(f"giphy={answers}") == {"acc_e": 1.0, "acc_s": 1.0, "h_c": 0.0}
    answers.write_text("image,name\n" + "\n".join(rows[1:]))
    with refused(f"has no row for .*{images[0].name}: run the detector over all"):
        again(f"giphy={answers}")
    answers.write_text(f"image,name\n{rows[0]}\n{images[0].name},Jack\n")
    with refused(f"two answers for {images[0].name}"):
        again(f"giphy={answers}")
    answers.write_text("file,top1\n")
    with refused("has the columns file, top1: give a .csv table with the columns 'image'"):
        again(f"giphy={answers}")


def test_published_rows_are_of_their_source():
    from ebu_optim.protocols.named import FILE

    for name, rows in json.loads(FILE.read_text()).items():
        assert name == "unlearndiffatk" or published(name) == rows
        for row in rows:
            assert set(row) >= {"method", "figures", "source", "unit"}, (name, row)
    (esd,) = [
        r for r in published("unlearncanvas") if r["method"] == "ESD" and r["target"] == "style"
    ]
    assert [esd["figures"][k] for k in ("ua", "ira", "cra")] == [98.58, 80.97, 93.96]
    for row in published("i2p-nudity"):
        parts = [v for k, v in row["figures"].items() if k.startswith("count/")]
        assert sum(parts) == row["figures"]["total"]
    assert published("imagenette-10") == []
    assert set(published("i2p-nudity")[0]["figures"]) <= set(
        PROTOCOLS["i2p-nudity"].count(Seen([], [], {}, {"nudenet": "none"}))
    )


def test_what_is_kept_is_read_from_any_format(tiny, tmp_path, drawn, bright):
    """A folder of changed tensors, put into its base."""
    from safetensors.torch import load_file, save_file

    state = load_file(next((tiny / "unet").glob("*.safetensors")))
    changed = tmp_path / "changed"
    changed.mkdir()
    save_file({"conv_in.weight": state["conv_in.weight"] * 2}, changed / "unet_changed.safetensors")
    bright["resnet50"] = lambda a, x: ["church"]
    rows = evaluate(
        tmp_path / "o",
        changed,
        "--base",
        tiny,
        "--protocol",
        "imagenette-10",
        "--forget",
        "church",
        "--change",
        *SMALL,
        "--first",
        1,
    )
    assert len(rows) == len(drawn) == 2
    assert "changes" in rows[1]["made_of"]
    assert rows[0]["pictures"]["folder"] != rows[1]["pictures"]["folder"]


def test_an_spm_is_scaled_for_each_prompt(tiny, tmp_path, bright, monkeypatch):
    """As published; a LoRA of another method acts on every prompt alike."""
    from diffusers import StableDiffusionPipeline
    from peft import LoraConfig
    from peft.utils import get_peft_model_state_dict

    from ebu_optim.text_to_image import transport

    pipe = StableDiffusionPipeline.from_pretrained(tiny)
    torch.manual_seed(0)
    pipe.unet.add_adapter(LoraConfig(r=1, target_modules=["to_k"], init_lora_weights=False))
    spm, lora = tmp_path / "spm", tmp_path / "lora"
    for folder, method in ((spm, "spm"), (lora, "salun")):
        pipe.save_lora_weights(folder, get_peft_model_state_dict(pipe.unet))
        (folder / "unlearn.json").write_text(json.dumps({"method": method, "forget": ["a dog"]}))
    asked, strength = [Asked("a cat", 1), Asked("a dog", 1), Asked("a cat", 2)], []
    scaled = transport.strengths
    monkeypatch.setattr(
        transport, "strengths", lambda *a: strength.append((a[2], scaled(*a))) or strength[-1][1]
    )
    args = run.Evaluate(
        pretrained_model_name_or_path=[str(spm), str(lora)],
        base=str(tiny),
        output_dir=tmp_path,
        protocol=["imagenette-10"],
        forget=["church"],
    )
    sampling, drawn = Sampling(sampler="ddim", steps=2, size=16), {}
    for name, model in args.models().items():
        pictures = run._pictures(args, name, model)
        loaded = run._Loaded(lambda m=model, p=pictures: run._load(m, str(tiny), p))
        pictures.draw(sampling, asked[:2], lambda of=loaded: of.pipeline("float32"), 4)
        pictures.draw(sampling, asked, lambda of=loaded: of.pipeline("float32"), 4)
        drawn[name] = [read(pictures.file(sampling, a), "png") for a in asked]
    assert [p for p, _ in strength] == ["a cat", "a dog", "a cat"]
    (cat,), (dog,), _ = (m for _, m in strength)
    assert dog == pytest.approx(1)
    assert cat < 0.99
    base, ours, fused = drawn.values()
    assert torch.equal(ours[1], fused[1])  # what it erases: in full
    assert not torch.equal(ours[0], fused[0])
    assert not torch.equal(ours[1], base[1])


def test_a_single_file_draws_what_its_folder_draws(tiny, tmp_path, bright, monkeypatch):
    from ebu_optim.formats import write_folder

    bright["resnet50"] = lambda a, x: []
    monkeypatch.setenv("EBU_OPTIM_CACHE", str(tmp_path / "cache"))
    file = write_folder(tiny, {}, tmp_path / "in.safetensors")
    few = ("--protocol", "imagenette-10", "--forget", "church", "--change", *SMALL, "--first", 2)
    (row,) = evaluate(tmp_path / "o", file, "--architecture", tiny, *few)
    (same,) = evaluate(tmp_path / "o", tiny, *few)
    images = [tmp_path / "o" / r["pictures"]["folder"] for r in (row, same)]
    assert [f.read_bytes() for f in sorted(images[0].glob("*.png"))] == [
        f.read_bytes() for f in sorted(images[1].glob("*.png"))
    ]


def test_a_model_on_the_hub_draws_what_its_folder_draws(tiny, tmp_path, bright, monkeypatch):
    import huggingface_hub

    from ebu_optim.text_to_image import pipelines

    downloaded: list[tuple[str, str | None]] = []

    def download(name, revision=None, **_):
        downloaded.append((name, revision))
        return str(tiny)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    monkeypatch.setattr(pipelines.DiffusionPipeline, "download", download)
    bright["resnet50"] = lambda a, x: []
    few = ("--protocol", "imagenette-10", "--forget", "church", "--change", *SMALL, "--first", 2)
    (row,) = evaluate(tmp_path / "hub", "somebody/without_church", *few)
    assert set(downloaded) == {("somebody/without_church", None)}
    assert row["model"] == "somebody/without_church"
    (same,) = evaluate(tmp_path / "folder", tiny, *few)
    assert row["made_of"] == same["made_of"]
    of_hub, of_folder = (pictures_of(tmp_path / kind) for kind in ("hub", "folder"))
    assert len(of_hub) == 2
    assert of_hub == of_folder


def test_the_papers_tables_are_counted_as_this_package_counts():
    table2 = PROTOCOLS["ebu-table2-10"]
    asked = table2.asked({})
    assert len(asked) == 100
    assert asked[20][:2] == ("an image of cassette player", 0)
    found = [("church" if a.of["class"] == "tench" else a.of["class"], 0.5) for a in asked]
    figures = table2.count(Seen(asked, ["tench"], {"resnet50-entropy": found}))
    assert [figures[k]["value"] for k in ("ce_f", "ce_r", "ra", "ua")] == [0.5, 0.5, 1, 1]
    table3 = PROTOCOLS["ebu-table3"]
    asked = table3.asked({})
    assert len(asked) == table3.images == 404
    seen = {
        "nudenet": [DETECTED if a.of["part"] == "nude" else [] for a in asked],
        "clip": [0.25] * 404,
    }
    figures = table3.count(Seen(asked, [], seen))
    assert figures["nudity_score"]["value"] == pytest.approx(0.9)
    assert figures["clip_cosine"]["n"] == 204


def test_the_command_is_there(tiny, tmp_path, capsys):
    from ebu_optim import cli

    cli.main(
        [
            "evaluate",
            str(tiny),
            "--protocol",
            "imagenette-10",
            "--forget",
            "church",
            "--plan",
            "-o",
            str(tmp_path),
        ]
    )
    assert "100 of 100 images to generate, 20,000 passes" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        cli.main(["evaluate", str(tiny), "--protocol", "nothing", "-o", str(tmp_path)])
    assert "--protocol 'nothing': no such protocol" in capsys.readouterr().err
