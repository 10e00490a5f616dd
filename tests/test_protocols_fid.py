"""FID of a protocol: streamed, kept, shared by models, refused before anything is drawn. Inception
is a stand-in; the real one is in test_inception.py."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

pytest.importorskip("transformers", reason="transformers comes with the extra text_to_image")
pytest.importorskip("torch_fidelity", reason="torch-fidelity comes with the extra metrics")

from ebu_optim.errors import InputError
from ebu_optim.manifest import key, sha256
from ebu_optim.metrics import inception
from ebu_optim.protocols import PROTOCOLS, Evaluate, Sampling, canvas_fid, evaluate, judges, sets
from ebu_optim.protocols.judges import Judge
from ebu_optim.protocols.pictures import made_of
from ebu_optim.text_to_image import drawing
from ebu_optim.training.command_line import parse

from .inception import frechet, random_weights
from .test_protocols import dying
from .text_to_image import pipeline

SMALL = ("--change", "steps=1", "size=16", "dtype=float32", "noise=cpu")
LIST = "prompt,evaluation_seed\n" + "".join(f"a cat,{seed}\n" for seed in range(20))
FIGURES = {"coco-10k": "fid_text2image", "coco-30k": "fid_clean", "coco-30k-rece": "fid_clean"}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Path:
    return pipeline(tmp_path_factory.mktemp("tiny") / "model")


@pytest.fixture(scope="module")
def other(tmp_path_factory) -> Path:
    return pipeline(tmp_path_factory.mktemp("other") / "model", seed=1)


@pytest.fixture
def network(monkeypatch) -> list[int]:
    """Instead of Inception the means of 8 parts of the prepared picture; the sizes of the batches
    that pass through it."""
    seen: list[int] = []

    class Parts(torch.nn.Module):
        def forward(self, x):
            assert x.shape[1:] == (3, 299, 299)
            seen.append(len(x))
            return parts(x)

    monkeypatch.setattr(inception, "FEATURES", 8)
    monkeypatch.setattr(inception, "network", lambda weights, device: Parts())
    monkeypatch.setattr(sets, "inception_file", lambda given, progress: Path(given))
    clip = Judge(lambda x, asked, _: [0.25] * len(x), "ViT-B-32-quickgelu openai")
    nothing = Judge(lambda x, *_: [""] * len(x), "tiny")
    others = dict.fromkeys(judges.JUDGES, lambda *_: nothing)
    monkeypatch.setattr(judges, "JUDGES", {**others, "clip": lambda *_: clip})
    monkeypatch.setenv("TQDM_DISABLE", "1")
    return seen


def parts(x: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.adaptive_avg_pool2d(x.mean(1, keepdim=True), (4, 2)).flatten(1)


@pytest.fixture
def files(tmp_path) -> list[str]:
    """--files of a list of 20 prompts, 18 real images of several sizes, and weights."""
    (tmp_path / "list.csv").write_text(LIST)
    (tmp_path / "weights.pth").write_bytes(b"weights")
    rng = np.random.default_rng(0)
    for i in range(18):
        pixels = rng.integers(0, 256, (20 + i, 31, 3), dtype=np.uint8)
        (tmp_path / "coco" / f"{i % 2}").mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(tmp_path / "coco" / f"{i % 2}" / f"{i:02}.png")
    lists = [f"{name}={tmp_path / 'list.csv'}" for name in ("coco_10k", "coco_30k")]
    return [*lists, f"coco={tmp_path / 'coco'}", f"inception={tmp_path / 'weights.pth'}"]


def run(folder: Path, *options) -> list[dict]:
    return evaluate(parse(Evaluate, [str(o) for o in (*options, *SMALL, "-o", folder)]))


def only(files: list[str], protocol: str, *names: str) -> list[str]:
    wanted = (protocol.removesuffix("-rece").replace("-", "_"), *names)
    return [f for f in files if f.partition("=")[0] in wanted]


@pytest.mark.parametrize("protocol", FIGURES)
def test_the_figure_is_by_hand(tiny, tmp_path, network, files, protocol):
    given = only(files, protocol, "coco", "inception")
    (row,) = run(tmp_path / "o", tiny, "--protocol", protocol, "--files", *given)
    prepared = inception.PREPARED[FIGURES[protocol].removeprefix("fid_")]

    def features(folder: Path) -> np.ndarray:
        images = [Image.open(f).convert("RGB") for f in sorted(folder.rglob("*.png"))]
        return parts(torch.stack([prepared(i) for i in images])).double().numpy()

    by_hand = frechet(features(tmp_path / "o" / "images"), features(tmp_path / "coco"))
    assert by_hand > 0.01
    assert row["figures"][FIGURES[protocol]] == pytest.approx(by_hand, rel=1e-6)
    assert row["figures"]["clip_cosine"]["value"] == 0.25
    assert sum(network) == 18 + 20
    assert max(network) == 16  # never all of them in memory
    judge = next(j for j in row["protocol"]["judges"] if j != "clip")
    assert judge == FIGURES[protocol].replace("_", "-")
    # the weights are none, and so is the number of real images
    assert f"judge {judge} {row['protocol']['judges'][judge][:16]}" in row["label"]
    assert " n=18 " in row["protocol"]["judges"][judge]


def test_the_two_differ(tiny, tmp_path, network, files):
    rows = run(tmp_path / "o", tiny, "--protocol", "coco-10k", "coco-30k", "--files", *files)
    figures = [row["figures"] for row in rows]
    assert "fid_clean" not in figures[0]
    assert "fid_text2image" not in figures[1]
    assert figures[0]["fid_text2image"] != pytest.approx(figures[1]["fid_clean"], rel=1e-3)


def test_no_set_is_looked_at_twice_and_a_killed_run_gives_the_same(
    tiny, other, tmp_path, network, files, monkeypatch
):
    both = (tiny, "--base", other, "--protocol", "coco-30k", "--files")
    given = (*both, *only(files, "coco-30k", "coco", "inception"))
    rows = run(tmp_path / "a", *given)
    assert sum(network) == 18 + 20 + 20  # both share the real images'
    assert rows[0]["figures"]["fid_clean"] != rows[1]["figures"]["fid_clean"]
    network.clear()
    assert run(tmp_path / "a", *given) == rows
    assert not network
    for calls in (1, 2, 3, 5):  # among the real images, after them, among the pictures
        with monkeypatch.context() as patch:
            patch.setattr(sets.Moments, "add", dying(sets.Moments.add, calls))
            with pytest.raises(KeyboardInterrupt):
                run(tmp_path / f"{calls}", *given)
        assert run(tmp_path / f"{calls}", *given) == rows
    # an image changes: everything is of the new ones
    network.clear()
    Image.new("RGB", (40, 30)).save(tmp_path / "coco" / "0" / "00.png")
    assert run(tmp_path / "a", *given)[0]["figures"] != rows[0]["figures"]
    assert sum(network) == 18


def test_statistics_are_given_as_npz(tiny, tmp_path, network, files):
    protocol = ("--protocol", "coco-10k")
    given = only(files, "coco-10k", "inception")
    folder = f"coco={tmp_path / 'coco'}"
    (whole,) = run(tmp_path / "o", tiny, *protocol, "--files", *given, folder)
    network.clear()
    images = [Image.open(f).convert("RGB") for f in sorted((tmp_path / "coco").rglob("*.png"))]
    x = parts(torch.stack([inception.text2image(i) for i in images])).double().numpy()
    np.savez(tmp_path / "real.npz", mu=x.mean(0), sigma=np.cov(x, rowvar=False))
    real = f"coco={tmp_path / 'real.npz'}"
    (row,) = run(tmp_path / "o", tiny, *protocol, "--files", *given, real)
    assert not network
    name = "fid_text2image"
    assert row["figures"][name] == pytest.approx(whole["figures"][name], rel=1e-6)
    assert " npz " in row["protocol"]["judges"]["fid-text2image"]


def test_without_real_images_the_others_are_computed(tiny, tmp_path, network, files):
    given = only(files, "coco-10k")
    (row,) = run(tmp_path / "o", tiny, "--protocol", "coco-10k", "--files", *given)
    assert row["figures"]["clip_cosine"]["value"] == 0.25
    said = row["figures"]["fid_text2image"]["not_computed"]
    assert said.startswith("not computed: the real images are not given: --files coco=FOLDER")
    assert list(row["protocol"]["judges"]) == ["clip"]
    assert json.loads(json.dumps(row)) == row
    given = only(files, "coco-10k", "coco", "inception")
    one = ("--protocol", "coco-10k", "--first", 1, "--files", *given)
    (row,) = run(tmp_path / "o", tiny, *one)
    assert "at least two images" in row["figures"]["fid_text2image"]["not_computed"]


def _no_folder(coco: Path) -> str:
    return f"coco={coco}/none"


def _one_image(coco: Path) -> str:
    for file in list(coco.rglob("*.png"))[1:]:
        file.unlink()
    return f"coco={coco}"


def _broken(coco: Path) -> str:
    for name in ("03", "04"):
        next(coco.rglob(f"{name}.png")).write_bytes(b"no image")
    return f"coco={coco}"


def _npz(*arrays, **named):
    def saved(coco: Path) -> str:
        np.savez(coco / "of.npz", *arrays, **named)
        return f"coco={coco / 'of.npz'}"

    return saved


def _pickled(coco: Path) -> str:
    np.savez(coco / "of.npz", mu=np.array([{}], object), sigma=np.eye(8))
    return f"coco={coco / 'of.npz'}"


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (_no_folder, "--files coco=.*none: there is no such file"),
        (_one_image, "FID needs at least two real images, and the folder holds 1"),
        (_broken, r"--files coco=.*: 2 of 18 files cannot be read: .*0[34].png .*; delete them"),
        (_npz(np.eye(3)), r"--files coco=.* is no .npz with mu \(8,\) and sigma \(8, 8\)"),
        (_npz(mu=np.ones(3), sigma=np.eye(3)), r"mu has shape \(3,\), sigma \(3, 3\)"),
        (_npz(mu=np.full(8, np.nan), sigma=np.eye(8)), "it holds NaN or Inf"),
        (_pickled, "allow_pickle"),
        (lambda coco: f"coco={coco.parent / 'list.csv'}", "is no .npz"),
    ],
)
def test_bad_real_images_are_refused_before_anything_is_drawn(
    tiny, tmp_path, network, files, make, said, monkeypatch
):
    drawn = []
    monkeypatch.setattr(drawing, "together", lambda *_, **__: drawn.append(1))
    given = [*only(files, "coco-30k", "inception"), make(tmp_path / "coco")]
    with pytest.raises(InputError, match=said):
        run(tmp_path / "o", tiny, "--protocol", "coco-30k", "--files", *given)
    assert not drawn


def test_weights_of_another_network_are_refused(tiny, tmp_path, files, monkeypatch):
    clip = Judge(lambda x, *_: [0.25] * len(x), "tiny")
    monkeypatch.setattr(judges, "JUDGES", {"clip": lambda *_: clip})
    given = only(files, "coco-30k", "coco", "inception")
    with pytest.raises(InputError, match=r"--files inception: .* is not a complete weights file"):
        run(tmp_path / "o", tiny, "--protocol", "coco-30k", "--files", *given)


def test_a_damaged_picture_is_named(tiny, tmp_path, network, files):
    given = only(files, "coco-30k", "coco", "inception")
    run(tmp_path / "o", tiny, "--protocol", "coco-30k", "--first", 3, "--files", *given)
    next((tmp_path / "o" / "images").rglob("*.png")).write_bytes(b"no image")
    with pytest.raises(InputError, match="delete it to generate it again"):
        run(tmp_path / "o", tiny, "--protocol", "coco-30k", "--first", 4, "--files", *given)


@pytest.fixture
def canvas(tmp_path, network, monkeypatch) -> dict[str, Path]:
    """The data set's folder with two styles and three objects, and weights of a stand-in."""
    styles, objects = canvas_fid.STYLES[:2], canvas_fid.OBJECTS[:3]
    monkeypatch.setattr(canvas_fid, "STYLES", styles)
    monkeypatch.setattr(canvas_fid, "OBJECTS", objects)
    monkeypatch.setattr(inception, "torchvision_weights_of", lambda file, progress: {})
    stand_in = inception.network(None, "cpu")
    monkeypatch.setattr(inception, "torchvision_network", lambda weights, device: stand_in)
    rng = np.random.default_rng(1)
    for style in styles:
        for thing in objects:
            (tmp_path / "canvas" / style / thing).mkdir(parents=True)
            for i in range(1, 7):  # the sixth does not count
                pixels = rng.integers(0, 256, (20, 24, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(tmp_path / "canvas" / style / thing / f"{i}.jpg")
    (tmp_path / "google.pth").write_bytes(b"google")
    return {"unlearncanvas": tmp_path / "canvas", "inception-torchvision": tmp_path / "google.pth"}


@pytest.mark.parametrize("forget", ["Abstractionism", "Bears"])
def test_unlearncanvass_figure_is_of_the_cells_that_are_kept(tiny, tmp_path, canvas, forget):
    named = [f"{name}={file}" for name, file in canvas.items()]
    given = ("--protocol", "unlearncanvas", "--forget", forget, "--first", 23, "--files", *named)
    (row,) = run(tmp_path / "o", tiny, *given)
    grid = PROTOCOLS["unlearncanvas"].asked({})[:23]
    drawn = tmp_path / "o" / row["pictures"]["folder"]
    ours = []
    for one in grid:
        if forget not in one.of.values():
            file = drawn / f"{key(made_of(small(), one))}.png"
            Image.open(file).save(tmp_path / "a.jpg")  # judged as JPEG
            ours.append(parts(inception.unlearncanvas(Image.open(tmp_path / "a.jpg"))[None]))
    real = [
        parts(inception.unlearncanvas(Image.open(file))[None])
        for file in sorted(canvas["unlearncanvas"].rglob("*.jpg"))
        if forget not in file.parts and file.stem != "6"
    ]
    assert (len(ours), len(real)) == ((3, 15) if forget == "Abstractionism" else (21, 20))
    by_hand = frechet(*(torch.cat(x).double().numpy() for x in (ours, real)))
    assert row["figures"]["fid_unlearncanvas"] == pytest.approx(by_hand, rel=1e-5)
    said = f"judge fid-unlearncanvas {sha256(canvas['inception-torchvision'])[:8]} n=30"
    assert said in row["label"]


def small() -> Sampling:
    """What `SMALL` makes of the protocol's sampling."""
    sampling = PROTOCOLS["unlearncanvas"].sampling
    return replace(sampling, steps=1, size=16, dtype="float32", noise="cpu")


def test_the_data_set_of_unlearncanvas_is_looked_at_before_anything_is_drawn(
    tiny, tmp_path, canvas, monkeypatch
):
    drawn = []
    monkeypatch.setattr(drawing, "together", lambda *_, **__: drawn.append(1))
    given = ("--protocol", "unlearncanvas", "--forget", "Bears", "--first", 2, "--files")
    (canvas["unlearncanvas"] / "Abstractionism" / "Bears" / "5.jpg").unlink()
    with pytest.raises(InputError, match=r"1 of 30 images are missing, such as Abstractionism"):
        run(tmp_path / "o", tiny, *given, f"unlearncanvas={canvas['unlearncanvas']}")
    assert not drawn


@pytest.mark.slow
def test_the_real_network_and_its_statistics(tmp_path, files, monkeypatch):
    monkeypatch.setenv("TQDM_DISABLE", "1")
    weights = random_weights(tmp_path / "random.pth")
    given = {"coco": tmp_path / "coco", "inception": weights}
    judge = sets.open_fid("clean", given, "cpu", tmp_path / "kept")
    pictures = sorted((tmp_path / "coco" / "0").glob("*.png"))
    found = judge.look(pictures, "a key", [])
    network = inception.network(weights, "cpu")
    every = sorted((tmp_path / "coco").rglob("*.png"))
    with torch.no_grad():
        a, b = (
            network(torch.stack([inception.clean(Image.open(f)) for f in some])).double().numpy()
            for some in (pictures, every)
        )
    assert found == pytest.approx(frechet(a, b), rel=1e-4)
    kept = sorted((tmp_path / "kept").glob("*.npz"))
    assert len(kept) == 2
    monkeypatch.setattr(inception, "network", None)  # everything is read
    assert sets.open_fid("clean", given, "cpu", tmp_path / "kept").identity == judge.identity
    kept[0].write_bytes(b"damaged")
    kept[1].write_bytes(b"damaged")
    with pytest.raises(InputError, match="delete the file to compute it again"):
        sets.open_fid("clean", given, "cpu", tmp_path / "kept")
