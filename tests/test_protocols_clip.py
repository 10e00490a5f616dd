"""CLIP's two models as judges of protocols: the cosine by hand, the published preprocessing."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

pytest.importorskip("transformers", reason="transformers comes with the extra text_to_image")
pytest.importorskip("open_clip", reason="open_clip comes with the extra text_to_image")

import open_clip

from ebu_optim.manifest import sha256
from ebu_optim.metrics import ClipCosine
from ebu_optim.protocols import PROTOCOLS, Asked, Seen, judges, label

from .clip import NAME, by_hand, random_weights

LARGE = "coco-30k-rece-large"


@pytest.mark.parametrize(
    ("name", "published"), [("clip", "ViT-B-32-quickgelu"), ("clip-large", "ViT-L-14-quickgelu")]
)
def test_a_judge_observes_the_cosine_with_each_prompt(tmp_path, monkeypatch, name, published):
    opened, weights = [], random_weights(tmp_path / "clip.pt")

    def tiny(*, model, **given):
        opened.append(model)
        return ClipCosine(model=NAME, **given)

    monkeypatch.setattr(judges, "ClipCosine", tiny)
    judge = judges.open_judge(name, {name: weights}, "cpu")
    assert opened == [published]
    assert judge.identity == sha256(weights)
    x = torch.randint(0, 256, (3, 3, 40, 48), dtype=torch.uint8)
    prompts = ["a cat", "a church", "two dogs on a bench"]
    found = judge.look(list(x), [Asked(prompt, 0) for prompt in prompts], [])
    assert found == pytest.approx(by_hand(x, prompts, weights), abs=1e-6)


def test_the_large_model_is_the_published_one():
    config = open_clip.get_model_config(judges.CLIP_LARGE)
    assert config["quick_gelu"]  # as OpenAI's weights were trained
    assert config["vision_cfg"]["patch_size"] == 14
    assert "openai" in open_clip.list_pretrained_tags_by_model(judges.CLIP_LARGE)
    assert PROTOCOLS[LARGE].judges == {"clip-large": "ViT-L-14-quickgelu openai"}


def test_pictures_are_prepared_as_by_the_published_processor():
    from open_clip.transform import PreprocessCfg, image_transform_v2
    from transformers import CLIPImageProcessor

    config = open_clip.get_pretrained_cfg(judges.CLIP_LARGE, "openai")
    theirs = CLIPImageProcessor()  # its defaults are those of openai/clip-vit-large-patch14
    ours = image_transform_v2(
        PreprocessCfg(
            size=224,
            mean=config["mean"],
            std=config["std"],
            interpolation=config["interpolation"],
            resize_mode=config["resize_mode"],
        ),
        is_train=False,
    )
    rng = np.random.default_rng(0)
    # where an odd number of pixels is cut off, the two differ by one pixel
    for size in ((512, 512), (640, 480)):
        image = Image.fromarray(rng.integers(0, 256, (*size[::-1], 3), dtype=np.uint8))
        by_them = theirs(image, return_tensors="pt")["pixel_values"][0]
        assert ours(image).shape == by_them.shape
        # one level of 255: some versions of transformers round otherwise
        assert (ours(image) - by_them).abs().max() < 1.01 / 255 / 0.26


def test_the_large_models_figures_have_their_own_names():
    large, base = PROTOCOLS[LARGE], PROTOCOLS["coco-30k-rece"]
    assert large.sampling == base.sampling  # the same pictures
    assert large.asked is base.asked
    figures = large.count(Seen([Asked("", 0)] * 2, [], {"clip-large": [0.2, 0.3]}))
    assert figures["clip_large_score_x100"]["value"] == pytest.approx(25)
    assert figures["clip_large_cosine"]["value"] == pytest.approx(0.25)
    assert label(large, 30_000, {"clip-large": "ViT-L-14-quickgelu openai"}) == LARGE
    assert not {*figures} & {*base.count(Seen([], [], {}, dict.fromkeys(base.judges, "none")))}
