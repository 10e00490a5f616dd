"""What is public, what the bare install needs, and what goes into the wheel."""

from __future__ import annotations

import importlib
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
import torch

import ebu_optim

from .processes import PATIENCE, python

ROOT = Path(__file__).parent.parent

PUBLIC = {
    "ebu_optim": ["DiagonalFisher", "EBUOptimizer", "__version__", "forget"],
    "ebu_optim.closed_form": [
        "CROSS_ATTENTION",
        "adversarial",
        "apply",
        "gram",
        "influential",
        "invariants",
        "null_space",
        "rece",
        "speed",
        "uce",
    ],
    "ebu_optim.checkpoint": ["latest_checkpoint", "load_checkpoint", "save_checkpoint"],
    "ebu_optim.fisher": ["DiagonalFisher"],
    "ebu_optim.optim": [
        "EBUOptimizer",
        "Holding",
        "PhasedOptimizer",
        "Rule",
        "Slot",
        "Step",
        "TensorMap",
        "WeightedSum",
    ],
    "ebu_optim.optimizer": ["EBUOptimizer"],
    "ebu_optim.baselines": [
        "AEGIS",
        "ESD",
        "EmbeddingOnly",
        "EraseDiff",
        "FineTune",
        "GRU",
        "GU",
        "GradientAscent",
        "JacobianDescent",
        "Joint",
        "MUNBa",
        "Method",
        "PCGrad",
        "RandomMasks",
        "Recipe",
        "RestrictedGradient",
        "Retrain",
        "SAGO",
        "SPM",
        "SalUn",
        "SelectiveAmnesia",
        "anchor_loss",
        "closed_forms",
        "esd_loss",
        "esd_target",
        "fisher_images",
        "methods",
        "next_class",
        "partly_denoised",
        "random_anchors",
        "recipes",
        "relabel_loss",
        "replayed_images",
        "reset_weights",
        "transport",
    ],
    "ebu_optim.kernels": ["active", "backend", "reference"],
    "ebu_optim.diffusion": [
        "Adversary",
        "FisherBatches",
        "Relearner",
        "anchor_loss",
        "anchored",
        "antithetic_timesteps",
        "denoising_loss",
        "distillation_loss",
        "esd_loss",
        "esd_target",
        "evaluating",
        "fisher_loss",
        "gaussian_forget_loss",
        "model_hash",
        "next_class",
        "noisy_condition",
        "partly_denoised",
        "random_anchors",
        "relabel_loss",
        "sample",
        "sample_set",
        "surrogate_noise",
        "transport",
    ],
    "ebu_optim.metrics": [
        "ClipClassifier",
        "ClipCosine",
        "ImagenetteClassifier",
        "LpipsDistance",
        "NotComputed",
        "NudityDetector",
        "UnlearnCanvasClassifier",
        "accuracy",
        "check_protocol",
        "classifier_frechet",
        "classifier_metrics",
        "classify",
        "clip_score",
        "condition_replaced",
        "entropy",
        "fid",
        "frechet_distance",
        "imagenette_metrics",
        "inversion",
        "learn_embedding",
        "learn_embeddings",
        "lpips_distance",
        "nudity_score",
        "probability",
        "relearn",
        "relearn_steps",
        "relearning",
        "unlearn_steps",
        "versions",
    ],
    "ebu_optim.formats": [
        "Checkpoint",
        "Header",
        "Single",
        "cache_folder",
        "fuse",
        "look",
        "open_single",
        "read_header",
        "shipped_folder",
        "tokenizer",
        "unpacked",
        "write_folder",
        "write_lora",
        "write_single",
    ],
    "ebu_optim.takedown": [
        "Forget",
        "ForgetClasses",
        "Forgotten",
        "chosen",
        "forget",
        "verify",
    ],
    "ebu_optim.protocols": [
        "Asked",
        "Evaluate",
        "PROTOCOLS",
        "Protocol",
        "Sampling",
        "Seen",
        "evaluate",
        "label",
        "named",
        "published",
    ],
    "ebu_optim.report": ["check_folder", "fid_values", "limit_rows", "write_report"],
}

# What a bare install does not have.
EXTRAS = {
    "accelerate",
    "datasets",
    "diffusers",
    "huggingface_hub",
    "matplotlib",
    "PIL",
    "safetensors",
    "cv2",
    "lpips",
    "nudenet",
    "onnxruntime",
    "open_clip",
    "peft",
    "pyarrow",
    "scipy",
    "sklearn",
    "torch_fidelity",
    "torchjd",
    "torchvision",
    "tqdm",
    "transformers",
    "timm",
    "triton",
}


@pytest.fixture(scope="module")
def bare(tmp_path_factory):
    """Run code where torch, numpy and what they need can be imported, and no extra can."""
    site = tmp_path_factory.mktemp("site")
    for entry in Path(torch.__file__).parent.parent.iterdir():
        if entry.name.partition(".")[0] not in EXTRAS and entry.suffix != ".pth":
            (site / entry.name).symlink_to(entry)
    start = f"import sys; sys.path += [{str(site)!r}, {str(ROOT)!r}]\nimport torch, ebu_optim\n"

    def run(code: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-S", "-c", start + code],
            capture_output=True,
            text=True,
            timeout=PATIENCE,
            cwd="/",
        )

    return run


@pytest.mark.parametrize("module", sorted(PUBLIC))
def test_public_names(module):
    found = importlib.import_module(module)
    assert sorted(found.__all__) == PUBLIC[module]
    for name in found.__all__:
        assert getattr(found, name) is not None


def test_imports_and_steps_with_torch_and_numpy_alone(bare):
    done = bare(
        "w = torch.nn.Parameter(torch.ones(3))\n"
        "opt = ebu_optim.EBUOptimizer(torch.optim.Adam([w]))\n"
        "opt.step(forget=lambda: w.sum().backward(), remember=lambda: (-w).sum().backward())\n"
        "fisher = ebu_optim.DiagonalFisher.estimate(torch.nn.Linear(2, 1),"
        " lambda m, b: m(b['x'])[:, 0], [{'x': torch.ones(2, 2)}])\n"
        "import ebu_optim.baselines\n"
        "print(opt.stats['overlap'], len(fisher))\n"
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split()[-1] == "2"


def test_a_missing_package_names_the_extra(bare):
    done = bare("ebu_optim.DiagonalFisher({'a': torch.ones(1)}, {}).save('/tmp/f')")
    assert done.returncode == 1
    last = done.stderr.strip().splitlines()[-1]
    assert "safetensors" in last
    assert 'pip install "ebu_optim[diffusion]"' in last


def test_a_weighting_by_name_names_its_extra(bare):
    done = bare(
        "from ebu_optim.baselines import methods\n"
        "methods['upgrad'].build(torch.optim.SGD([torch.nn.Parameter(torch.ones(1))]))"
    )
    assert done.returncode == 1
    last = done.stderr.strip().splitlines()[-1]
    assert "torchjd cannot be imported" in last
    assert 'pip install "ebu_optim[torchjd]"' in last


@pytest.mark.parametrize(
    ("room", "extra"),
    [
        ("training", "examples"),
        ("class_conditional", "examples"),
        ("formats", "text-to-image"),
        ("text_to_image", "text-to-image"),
        ("attacks", "text-to-image"),
        ("protocols", "text-to-image"),
        ("worlds", "examples"),
    ],
)
def test_a_room_that_needs_more_names_the_extra(bare, room, extra):
    done = bare(f"import ebu_optim.{room}")
    assert done.returncode == 1
    assert f'pip install "ebu_optim[{extra}]"' in done.stderr.strip().splitlines()[-1]


def build(what, source, into, **environment):
    """The one file that `python -m build` makes of a source tree."""
    done = subprocess.run(
        [sys.executable, "-m", "build", what, "--no-isolation", "--outdir", into, source],
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        env={**os.environ, "PYTHONWARNINGS": "ignore", **environment},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (made,) = into.iterdir()
    return made


@pytest.fixture(scope="module")
def unpacked(tmp_path_factory):
    """The source distribution, unpacked: what it lacks, no build from it has."""
    made = build("--sdist", ROOT, tmp_path_factory.mktemp("sdist"))
    with tarfile.open(made) as archive:
        into = tmp_path_factory.mktemp("unpacked")
        archive.extractall(into, filter="data")
    (source,) = into.iterdir()
    return source


def test_the_source_distribution_holds_what_a_build_needs(unpacked):
    files = {str(p.relative_to(unpacked)) for p in unpacked.rglob("*")}
    sources = {p for k in ("py", "c", "h") for p in (ROOT / "ebu_optim").rglob(f"*.{k}")}
    assert {str(p.relative_to(ROOT)) for p in sources} <= files
    assert {"setup.py", "setup.cfg", "pyproject.toml", "LICENSE", "README.md"} <= files
    assert not [f for f in files if f.endswith((".so", ".pyc"))]


def assert_contents(names, extension):
    tops = {n.partition("/")[0] for n in names}
    assert {t for t in tops if not t.endswith(".dist-info")} == {"ebu_optim"}
    sources = {str(p.relative_to(ROOT)) for p in (ROOT / "ebu_optim").rglob("*.py")}
    others = {"ebu_optim/py.typed", "ebu_optim/text_to_image/remember_prompts.txt"}
    assets = [
        *(ROOT / "ebu_optim" / "worlds" / "assets").rglob("*.*"),
        *(ROOT / "ebu_optim" / "experiments").glob("*.json"),
        *(ROOT / "ebu_optim" / "formats" / "configs").glob("*.json"),
        *(ROOT / "ebu_optim" / "protocols").glob("*.json"),
        *(ROOT / "ebu_optim" / "takedown").glob("*.json"),
        *(ROOT / "ebu_optim" / "protocols" / "lists").iterdir(),
    ]
    others |= {str(p.relative_to(ROOT)) for p in assets}
    if extension:
        others.add("ebu_optim/kernels/_cpu.abi3.so")
    assert {n for n in names if n.startswith("ebu_optim/")} == sources | others


@pytest.mark.slow
def test_the_wheel_holds_the_package_and_nothing_else(unpacked, tmp_path):
    wheel = build("--wheel", unpacked, tmp_path)
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        (metadata,) = [n for n in names if n.endswith("METADATA")]
        text = archive.read(metadata).decode()
    assert_contents(names, extension=not wheel.name.endswith("-none-any.whl"))
    needs = [line for line in text.splitlines() if line.startswith("Requires-Dist")]
    core = sorted(re.split(r"[ :<>=]+", n)[1] for n in needs if "extra ==" not in n)
    assert core == ["numpy", "torch"]
    links = re.findall(r"\]\((.*?)\)", text)
    assert len(links) > 10
    assert all(link.startswith("https://") for link in links)  # PyPI shows no file of ours
    if sys.platform == "linux" and shutil.which("cc"):
        # one wheel for every Python, and no OpenMP library beside torch's
        assert "-cp310-abi3-linux_" in wheel.name
        with zipfile.ZipFile(wheel) as archive:
            library = archive.read("ebu_optim/kernels/_cpu.abi3.so")
        assert b"libgomp" not in library
        assert b"GOMP_parallel" in library


@pytest.mark.slow
@pytest.mark.parametrize("environment", [{"EBU_OPTIM_PURE": "1"}, {"CC": "/bin/false"}])
def test_without_a_compiler_the_wheel_is_a_pure_one(unpacked, tmp_path, environment):
    source = tmp_path / "source"  # no left-overs of another build
    shutil.copytree(unpacked, source, ignore=shutil.ignore_patterns("build", "*.egg-info"))
    wheel = build("--wheel", source, tmp_path / "dist", **environment)
    assert wheel.name.endswith("-py3-none-any.whl")
    with zipfile.ZipFile(wheel) as archive:
        assert_contents(archive.namelist(), extension=False)


def test_every_metric_imports_without_the_extras(bare):
    done = bare(
        "from ebu_optim.metrics import clip_score, fid, imagenette_metrics, lpips_distance\n"
        "from ebu_optim.metrics import nudity_score\n"
        "x = torch.zeros(4, 1, 8, 8, dtype=torch.uint8)\n"
        "for found in (fid(x, x, reference_split='none'), imagenette_metrics(x, range(4), [0]),\n"
        "              clip_score(x, 'a'), nudity_score(x),\n"
        "              lpips_distance(x, x, net='vgg', size=16)):\n"
        "    print(found['not_computed'])\n"
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count('pip install "ebu_optim[metrics]"') == 1
    assert done.stdout.count('pip install "ebu_optim[text-to-image]"') == 3
    assert done.stdout.count('pip install "ebu_optim[nudity]"') == 1


def test_extras_are_spelt_as_pip_of_any_age_finds_them():
    """A wheel's metadata has hyphens; pip before 23.3 takes another spelling for no extra at all,
    with a warning that is soon off the screen."""
    (section,) = re.findall(
        r"^\[project.optional-dependencies\]\n(.*?)^\[",
        (ROOT / "pyproject.toml").read_text(),
        re.M | re.S,
    )
    extras = set(re.findall(r"^([\w-]+) = \[", section, re.M))
    assert {"diffusion", "text-to-image", "test"} <= extras
    assert not [name for name in extras if "_" in name]
    texts = [ROOT / "README.md", ROOT / "examples" / "README.md", ROOT / "pyproject.toml"]
    texts += [*(ROOT / "docs").glob("*.md"), *(ROOT / "ebu_optim").rglob("*.py")]
    for file in texts:
        text = file.read_text()
        named = re.findall(r'(?:ebu_optim|"\.)\[([\w,-]+)\]', text)
        named += re.findall(r'(?:require|needed)\("[\w.]+", "([\w-]+)"\)', text)
        for name in ",".join(named).split(",") if named else ():
            assert name in extras, (file.name, name)


def test_kernels_import_nothing_of_the_package():
    for file in (ROOT / "ebu_optim" / "kernels").glob("*.py"):
        found = re.findall(r"^\s*(?:from|import) (\.\.\S*|ebu_optim\S*)", file.read_text(), re.M)
        assert not found, file.name


def test_nothing_is_loaded_unsafely():
    forbidden = re.compile(
        r"pickle\.loads?\(|weights_only *= *False|trust_remote_code *= *True|shell *= *True"
    )
    for folder in ("ebu_optim", "examples"):
        for file in (ROOT / folder).rglob("*.py"):
            assert not forbidden.search(file.read_text()), file


def test_a_release_has_one_version_everywhere():
    def compare(tag: str) -> subprocess.CompletedProcess[str]:
        return python(".ci/release.py", "--tag", tag)

    assert compare(f"v{ebu_optim.__version__}").returncode == 0
    refused = compare("v9.9.9")
    assert refused.returncode == 1
    assert "CHANGELOG.md" in refused.stderr
    assert "9.9.9" in refused.stderr
