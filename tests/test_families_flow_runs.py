"""Runs of forgetting on families of flow matching in small: every method, every form of the result,
what goes on, and what is refused."""

from __future__ import annotations

import contextlib
import io
import json
import shutil
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers", "5", reason="the tiny tokenizers are made as of 5")
pytest.importorskip("peft", reason="peft comes with the extra text_to_image")
diffusers = pytest.importorskip("diffusers")
if not hasattr(diffusers, "Flux2KleinPipeline"):
    pytest.skip("this diffusers has no FLUX.2 klein", allow_module_level=True)

from safetensors.torch import load_file

from ebu_optim.errors import InputError
from ebu_optim.training.options import parse

from .flow_families import MADE, SIZE, look, module, opened, unlearn

FILE = "diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("flow")
    for name, make in MADE.items():
        make(out / name)
    return out


# -- runs ---------------------------------------------------------------------------------------

BF16 = ("--mixed_precision", "bf16", "--gradient_checkpointing")
#: Family, method, options, and what is in the names of the weights that move.
RUNS = [
    ("sd3", "ebu", ("--condition_noise", 1), (".add_k_proj.", ".add_v_proj.")),
    ("sd3", "joint", ("--surrogate", "pixels", *BF16), (".add_k_proj.", ".add_v_proj.")),
    ("sd3", "sa", ("--train_modules", "attention", "--surrogate", "analytic"), (".attn.",)),
    ("sd3", "esd", ("--train_modules", "context", "--remember_loss", "replay"),
     ("context_embedder",)),
    ("sd3_without_t5", "ebu", (), (".add_k_proj.", ".add_v_proj.")),
    ("flux_dev", "esd", (), (".add_k_proj.", ".add_v_proj.")),
    ("flux_dev", "ebu", ("--train_modules", "single", *BF16), ("single_transformer_blocks",)),
    ("flux_schnell", "salun", ("--train_modules", "full", "--surrogate_prompt", "dog",
                               "--remember", "a red car"), ("",)),
    ("klein", "sa", ("--train_modules", "attention", *BF16), (".attn.",)),
    ("klein_distilled", "ebu", (), (".add_k_proj.", ".add_v_proj.")),
    ("z_image", "esd", ("--train_modules", "context", *BF16), ("cap_embedder",)),
    ("z_image", "ebu", ("--surrogate", "pixels"), (".attention.to_k.", ".attention.to_v.")),
]  # fmt: skip


@pytest.mark.parametrize(("name", "method", "more", "where"), RUNS)
def test_a_method_trains_what_it_is_to_train(name, method, more, where, made, tmp_path):
    out = unlearn(made / name, tmp_path / "o", "--method", method, *more)
    report = json.loads((out / "unlearn.json").read_text())
    assert report["pipeline"] == look(made / name).family.pipeline.__name__
    assert report["memory_counted"]["prompts"]["text encoders"] > 0
    a, b = (load_file(f / "transformer" / FILE) for f in (made / name, out / "pipeline"))
    moved = {n for n in a if not torch.equal(a[n], b[n])}
    assert moved
    assert all(any(part in n for part in where) for n in moved)
    assert all(t.isfinite().all() for t in b.values())


def drawn(pipe, family) -> torch.Tensor:
    pipe.set_progress_bar_config(disable=True)
    with torch.no_grad():
        return pipe(
            prompt="a cat", num_inference_steps=2, output_type="pt", height=SIZE, width=SIZE,
            generator=torch.Generator().manual_seed(0), **family.drawing(pipe, SIZE),
        ).images  # fmt: skip


@pytest.mark.parametrize("name", ["sd3", "sd3_without_t5", "flux_dev", "klein", "z_image"])
def test_what_is_saved_draws_the_same_by_every_way(name, made, tmp_path):
    r, p, fuse = module("results"), module("pipelines"), module("ebu_optim.formats").fuse
    family = look(made / name).family
    lora = ["--train_modules", "lora", "--learning_rate", 1e-1]
    found = {}
    for way in ("pipeline", "changed", "lora", "kohya"):
        out = unlearn(made / name, tmp_path / way, *lora, "--save_as", way) / way
        if way == "kohya":
            pipe = opened(made / name)
            fuse(pipe, out / "kohya.safetensors")
            found[way] = drawn(pipe, family)
        else:
            found[way] = drawn(r.load(p.Model(pretrained_model_name_or_path=str(out))), family)
        if way == "pipeline":
            assert torch.equal(found[way], drawn(opened(out), family))
        code = (out / "README.md").read_text().partition("```python\n")[2].partition("```")[0]
        space: dict = {}
        exec(code.replace("<this repository or folder>", str(out)), space)  # noqa: S102 - the card's
        torch.testing.assert_close(drawn(space["pipe"], family), found[way], atol=1e-4, rtol=0)
    base = drawn(opened(made / name), family)
    for picture in found.values():
        assert (picture - base).abs().max() > 1e-3
        torch.testing.assert_close(picture, found["pipeline"], atol=1e-5, rtol=0)
