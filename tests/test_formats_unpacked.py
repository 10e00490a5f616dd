"""A checkpoint in one file as a folder: the same pictures, made once, keyed by content."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

pytest.importorskip("transformers", reason="transformers comes with the extra text_to_image")

from diffusers import DiffusionPipeline, StableDiffusionPipeline

from ebu_optim.errors import InputError
from ebu_optim.formats import open_single, unpacked, write_folder
from ebu_optim.formats.unpacking import cache_folder
from ebu_optim.text_to_image import pipelines

from .single_files import FAMILIES, draw, folder, resaved, tensors


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("EBU_OPTIM_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.mark.parametrize("family", FAMILIES)
def test_a_folder_draws_what_its_file_draws_and_is_made_once(family, tmp_path):
    base = folder(family, tmp_path / "base")
    file = write_folder(base, {}, tmp_path / "model.safetensors")
    found = unpacked(file, config=base)
    pipe = DiffusionPipeline.from_pretrained(found, local_files_only=True)
    assert torch.equal(draw(pipe), draw(open_single(file, config=base)))
    before = (found / "model_index.json").stat().st_mtime_ns
    assert unpacked(file, config=base) == found
    assert (found / "model_index.json").stat().st_mtime_ns == before


def test_another_content_is_another_folder_and_16_bits_stay(tmp_path):
    base = folder("sd1", tmp_path / "base")
    file = write_folder(base, {}, tmp_path / "model.safetensors")
    half = resaved(file, tmp_path / "half.safetensors", dtype=torch.float16)
    one, two = unpacked(file, config=base), unpacked(half, config=base)
    assert one != two
    held = tensors(next((two / "unet").glob("*.safetensors")))
    assert {t.dtype for t in held.values()} == {torch.float16}
    other = unpacked(file, config=base, prediction_type="v_prediction")
    assert StableDiffusionPipeline.load_config(other)
    assert other != one


def test_processes_that_ask_at_once_wait_for_the_first(tmp_path):
    base = folder("sd1", tmp_path / "base")
    file = write_folder(base, {}, tmp_path / "model.safetensors")
    code = (
        "import sys; from ebu_optim.formats import unpacked as u;"
        "print(u(sys.argv[1], config=sys.argv[2]))"
    )
    ran = [
        subprocess.Popen(
            [sys.executable, "-c", code, file, base], stdout=subprocess.PIPE, text=True
        )
        for _ in range(2)
    ]
    said = [p.communicate()[0].split("\n")[-2] for p in ran]
    assert [p.returncode for p in ran] == [0, 0]
    assert said[0] == said[1] == str(unpacked(file, config=base))


def test_configurations_alone_are_made_from_the_header(tmp_path):
    base = folder("sd1", tmp_path / "base")
    file = write_folder(base, {}, tmp_path / "model.safetensors")
    found = unpacked(file, config=base, weights=False)
    assert not list(found.rglob("*.safetensors"))
    assert pipelines._json(found / "unet" / "config.json", "")["in_channels"] == 4
    assert (found / "tokenizer").is_dir()


def test_a_file_that_is_not_whole_leaves_nothing(tmp_path, cache):
    base = folder("sd1", tmp_path / "base")
    file = write_folder(base, {}, tmp_path / "model.safetensors")
    bad = resaved(file, tmp_path / "bad.safetensors", drop=lambda n: n.endswith("conv_out.bias"))
    with pytest.raises(InputError, match=r"bad\.safetensors"):
        unpacked(bad, config=base)
    assert not cache.exists()


def test_the_cache_is_where_one_says(monkeypatch, tmp_path):
    assert cache_folder() == tmp_path / "cache"
    monkeypatch.delenv("EBU_OPTIM_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_folder() == tmp_path / "xdg" / "ebu_optim"
