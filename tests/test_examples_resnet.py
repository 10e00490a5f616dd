"""ResNet-34, the classifier of the protocol for CIFAR and STL: one step on two tiny images."""

from __future__ import annotations

import shutil
import sys

import pytest
import torch
from PIL import Image

from ebu_optim.metrics import accuracy, classify

from .test_examples_ddpm import module, refused, succeed

COLOURS = {"cat": (200, 30, 90), "dog": (10, 120, 60)}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Trained from chance and from a file of weights; 0.7 GB, which the test takes away again."""
    models = pytest.importorskip("torchvision.models", reason="torchvision is not installed")
    out = tmp_path_factory.mktemp("resnet")
    for split in ("train", "test"):
        for name, colour in COLOURS.items():
            (out / "pets" / split / name).mkdir(parents=True)
            Image.new("RGB", (8, 8), colour).save(out / "pets" / split / name / "0.png")
    torch.manual_seed(7)
    torch.save(models.resnet34().state_dict(), out / "weights.pt")
    run = [
        "train_classifier.py",
        "--train_data_dir",
        out / "pets",
        "--train_batch_size",
        2,
        "--max_train_steps",
        1,
        "--checkpoints_total_limit",
        1,
    ]
    try:
        succeed(
            [*run, "--pretrained_weights", "none", "--output_dir", out / "none"],
            [*run, "--pretrained_weights", out / "weights.pt", "--output_dir", out / "file"],
        )
        given = torch.load(out / "weights.pt", weights_only=True)
        with pytest.MonkeyPatch.context() as patch:
            load = module(patch, "models").load_classifier
            yield given, {name: load(out / name, COLOURS) for name in ("none", "file")}
    finally:
        shutil.rmtree(out)


@pytest.mark.parametrize("name", ["none", "file"])
def test_a_saved_resnet_judges_as_the_trained_one_did(name, trained):
    model, info = trained[1][name]
    assert info["kind"] == "resnet34"
    assert not model.training
    x = torch.tensor(list(COLOURS.values())).view(2, 3, 1, 1).expand(2, 3, 8, 8) / 127.5 - 1
    logits = classify(model, x)
    assert logits.shape == (2, 2)
    assert accuracy(logits, torch.tensor([0, 1])) == info["test_accuracy"]
    grey = x[:1, :1]  # one channel is repeated
    assert torch.equal(classify(model, grey), classify(model, grey.expand(-1, 3, -1, -1)))


def test_it_begins_at_the_weights_of_the_file_with_a_head_of_its_own(trained, monkeypatch):
    torch.manual_seed(0)  # the script's default
    start = module(monkeypatch, "models").Classifier("resnet34", (3, 8, 8), 2)
    begun = {"file": trained[0], "none": start.body.state_dict()}
    for name, (model, _) in trained[1].items():
        # the first step of Adam moves a weight by its learning rate at most
        for part, p in model.body.named_parameters():
            assert 0 < (p - begun[name][part]).abs().max() < 1.02e-5, (name, part)
        moved = (model.head.weight - start.head.weight).abs().max()
        assert 9e-5 < moved < 1.02e-4  # ten times the body's rate


def test_weights_that_are_none_are_refused(trained, monkeypatch, tmp_path):
    script = module(monkeypatch, "train_classifier")
    model = trained[1]["none"][0]
    torch.save({"conv1.weight": torch.zeros(3)}, tmp_path / "other.pt")
    with refused(monkeypatch, "other.pt does not hold a ResNet-34"):
        script.pretrained(model, str(tmp_path / "other.pt"))
    with refused(monkeypatch, 'nowhere.pt is not available .*FileNotFoundError.* or "none"'):
        script.pretrained(model, "nowhere.pt")


def test_without_torchvision_the_extra_is_named(monkeypatch):
    models = module(monkeypatch, "models")
    monkeypatch.setitem(sys.modules, "torchvision.models", None)
    with refused(monkeypatch, r'resnet34 needs torchvision .*pip install "ebu_optim\[data\]"'):
        models.Classifier("resnet34", (3, 8, 8), 2)


def test_a_medium_classifier_has_two_layers_at_each_size_and_is_for_larger_images(tmp_path):
    from ebu_optim.class_conditional.models import Classifier, load_classifier, save_classifier
    from ebu_optim.errors import InputError

    model = Classifier("medium", (3, 16, 16), 3).eval()
    widths = [m.out_channels for m in model.modules() if isinstance(m, torch.nn.Conv2d)]
    assert widths == [64, 64, 128, 128, 256, 256]
    x = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    info = {"kind": "medium", "shape": [3, 16, 16], "classes": list("abc"), "reject": False}
    save_classifier(tmp_path, model, info)
    assert torch.equal(load_classifier(tmp_path, "abc")[0](x), model(x))
    with pytest.raises(InputError, match="--model medium is for images of 16x16 and more; got 8x8"):
        Classifier("medium", (3, 8, 8), 2)
