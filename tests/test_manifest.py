"""What is kept under which key: contents and configurations, not names and places."""

from __future__ import annotations

import os

import pytest
import torch
from diffusers import UNet2DModel
from torch import nn

from ebu_optim import manifest
from ebu_optim.errors import InputError
from ebu_optim.modules import model_hash


def unet(**config) -> UNet2DModel:
    torch.manual_seed(0)
    return UNet2DModel(
        sample_size=8, in_channels=1, out_channels=1, layers_per_block=1, norm_num_groups=4,
        block_out_channels=(8,), down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",),
        **config,
    )  # fmt: skip


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
    one, other = (nn.ModuleDict({"unet": u, "head": nn.Linear(1, 1)})
                  for u in (unet(), unet(act_fn="gelu")))  # fmt: skip
    assert manifest.config_of(other)["unet"]["act_fn"] == "gelu"
    assert manifest.config_of(nn.Linear(1, 1)) == {}
    assert manifest.config_of(one) != manifest.config_of(other)


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
        "prompts", "vae", "images",
    ]  # fmt: skip
    with pytest.raises(InputError, match=r"^the run was begun with another prompts \(prompts: 2"):
        manifest.refuse_changed(before, {**before, "prompts": "5"}, "the run")
