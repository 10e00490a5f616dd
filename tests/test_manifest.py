"""What is kept under which key: contents and configurations, not names and places."""

from __future__ import annotations

import io
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler, UNet2DModel
from torch import nn

from ebu_optim import manifest
from ebu_optim.diffusion import sample_set
from ebu_optim.errors import InputError
from ebu_optim.modules import model_hash, parameter_bytes


def unet(**config) -> UNet2DModel:
    torch.manual_seed(0)
    return UNet2DModel(
        sample_size=8,
        in_channels=1,
        out_channels=1,
        layers_per_block=1,
        norm_num_groups=4,
        block_out_channels=(8,),
        down_block_types=("DownBlock2D",),
        up_block_types=("UpBlock2D",),
        **config,
    )


def test_equal_weights_under_another_configuration_are_another_model():
    one, other = unet(), unet(act_fn="gelu")
    assert model_hash(one) == model_hash(other)
    assert manifest.of_model(one) != manifest.of_model(other)
    assert manifest.config_of(other)["act_fn"] == "gelu"
    assert manifest.of_model(one) == manifest.of_model(unet(act_fn="silu"))  # the default


def test_where_a_model_was_saved_and_by_which_version_is_no_configuration(tmp_path):
    one = unet()
    one.save_pretrained(tmp_path / "a")
    again = UNet2DModel.from_pretrained(tmp_path / "a")
    assert str(again.config["_name_or_path"]) == str(tmp_path / "a")
    assert manifest.of_model(again) == manifest.of_model(one)


def test_a_model_in_another_is_known_by_its_configuration():
    one, other = (
        nn.ModuleDict({"unet": u, "head": nn.Linear(1, 1)}) for u in (unet(), unet(act_fn="gelu"))
    )
    assert manifest.config_of(other)["unet"]["act_fn"] == "gelu"
    assert manifest.config_of(nn.Linear(1, 1)) == {}
    assert manifest.config_of(one) != manifest.config_of(other)


class Counting(nn.Linear):
    """A layer that keeps more than tensors, as quantizers and fp8 recipes do."""

    def __init__(self, extra) -> None:
        torch.manual_seed(0)
        super().__init__(2, 2)
        self.extra = extra

    def get_extra_state(self):
        return self.extra

    def set_extra_state(self, state) -> None:
        self.extra = state


EXTRAS = [
    None,
    3,
    0.5,
    "fp8",
    b"amax",
    torch.tensor([1.0]),
    torch.bfloat16,
    [1, 2],
    [1, [2]],
    {},
    {"scale": torch.tensor([1.0]), "recipe": {"margin": 0}},
    io.BytesIO(b"pickled"),
    {"scale": torch.tensor([2.0]), "recipe": {"margin": 0}},
    np.float32(1),
    np.arange(3),
    {"scale": torch.tensor([1.0]), "recipe": {"margin": 1}},
]


def test_a_state_that_is_no_tensor_counts_by_its_contents():
    hashes = [model_hash(nn.Sequential(Counting(extra))) for extra in EXTRAS]
    assert len(set(hashes)) == len(EXTRAS)
    assert hashes == [model_hash(nn.Sequential(Counting(extra))) for extra in EXTRAS]
    a, b = (dict.fromkeys(order, 1) for order in ("xy", "yx"))
    assert model_hash(Counting(a)) == model_hash(Counting(b))
    assert model_hash(Counting((1, 2))) == model_hash(Counting([1, 2]))
    with pytest.raises(TypeError, match=r"extra state _extra_state.'a'. holds a object, which"):
        model_hash(Counting({"a": object()}))
    assert parameter_bytes(nn.Sequential(Counting({"a": 1}))) == 4 * (4 + 2)


def test_the_hash_of_tensors_alone_stays_what_it_was():
    """Sets, Fishers and runs of earlier versions name their model by it."""
    model = nn.Linear(2, 2)
    model.load_state_dict({"weight": torch.arange(4.0).view(2, 2), "bias": torch.zeros(2)})
    assert model_hash(model) == "9c3c75cfc6ff8482"


def compiled(model: nn.Module) -> nn.Module:
    return torch.compile(model, backend="eager")


def test_a_compiled_model_is_the_same_model(tmp_path):
    part = unet()
    part.down_blocks[0] = compiled(part.down_blocks[0])
    whole, scheduler, labels = unet(num_class_embeds=2), DDPMScheduler(), torch.tensor([0, 1])
    for one, other in ((unet(), compiled(unet())), (unet(), part), (whole, compiled(whole))):
        assert any("_orig_mod" in name for name in other.state_dict())
        assert model_hash(one) == model_hash(other)
        assert manifest.of_model(one) == manifest.of_model(other)
    pair = nn.ModuleDict({"unet": unet()})
    assert manifest.config_of(pair) == manifest.config_of(compiled(pair))
    path = tmp_path / "set.safetensors"
    options = scheduler, labels, (1, 8, 8)
    images, _ = sample_set(path, whole, *options, num_inference_steps=1)
    again, _ = sample_set(path, compiled(whole), *options, num_inference_steps=1)
    assert torch.equal(images, again)


def test_contents_are_names_and_bytes_and_not_places(tmp_path):
    for folder, text in (("a", "x"), ("b", "x"), ("c", "y")):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "prompts.txt").write_text(text)
    a, b, c = (manifest.contents([tmp_path / n / "prompts.txt"]) for n in "abc")
    assert a == b != c
    (tmp_path / "a" / "prompts.txt").rename(tmp_path / "a" / "other.txt")
    assert manifest.contents([tmp_path / "a" / "other.txt"]) != a


def test_a_file_that_changes_in_place_is_read_again(tmp_path):
    file = tmp_path / "weights"
    file.write_bytes(b"aa")
    before = manifest.contents([file])
    file.write_bytes(b"ab")
    os.utime(file, ns=(1, 1))  # of the same size, and put back to an old time
    assert manifest.contents([file]) != before


def test_what_changed_is_named():
    before = {"unet": "1", "prompts": "2", "vae": "3"}
    assert manifest.changed(before, before) == []
    assert manifest.changed(before, {"unet": "1", "prompts": "9", "images": "4"}) == [
        "prompts",
        "vae",
        "images",
    ]
    with pytest.raises(InputError, match=r"^the run was begun with another prompts \(prompts: 2"):
        manifest.refuse_changed(before, {**before, "prompts": "5"}, "the run")


def test_a_digest_is_of_what_is_said_and_not_of_its_order_or_place():
    said = {"a": [1, "x"], "b": Path("here/model"), "c": {"y": None, "z": 0.5}}
    same = {"c": {"z": 0.5, "y": None}, "b": Path("/elsewhere/model"), "a": (1, "x")}
    assert manifest.digest(said) == manifest.digest(same)
    assert len(manifest.digest(said)) == 64
    for other in ({"a": ["x", 1]}, {"b": Path("here/other")}, {"c": {"y": None, "z": 0.25}}):
        assert manifest.digest(said | other) != manifest.digest(said)
