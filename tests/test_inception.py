"""FID's Inception without its resize, and the preparations of published code, against NumPy and
PIL, the extractor that resizes, and clean-fid where it is installed."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

pytest.importorskip("torch_fidelity", reason="torch-fidelity comes with the extra metrics")

from ebu_optim.metrics import frechet_distance, inception
from ebu_optim.metrics.frechet import Moments, distance_of

from .inception import features, random_weights


def picture(width: int, height: int, seed: int = 0) -> Image.Image:
    """Edges as sharp as they can be, so that a bicubic filter overshoots."""
    rng = np.random.default_rng(seed)
    return Image.fromarray(rng.choice(np.array([0, 255], np.uint8), (height, width, 3)))


@pytest.mark.parametrize("size", [(640, 427), (96, 130), (299, 299)])
def test_clean_fids_resize_is_of_floats_channel_by_channel(size):
    image = picture(*size)
    found = inception.clean(image)
    pixels = np.asarray(image).astype(np.float32)
    for channel in range(3):
        one = Image.fromarray(pixels[:, :, channel]).resize((299, 299), Image.Resampling.BICUBIC)
        by_hand = (np.asarray(one).clip(0, 255) - 128) / 128
        assert np.array_equal(found[channel].numpy(), by_hand)
    assert found.shape == (3, 299, 299)
    assert found.dtype == torch.float32
    if size != (299, 299):  # not rounded to 8 bits
        assert ((found * 128 + 128) % 1 != 0).float().mean() > 0.2


@pytest.mark.parametrize("size", [(640, 427), (96, 130)])
def test_clean_fids_resize_is_that_of_the_package(size):
    resize = pytest.importorskip("cleanfid.resize", reason="clean-fid is not installed")
    image = picture(*size)
    theirs = resize.build_resizer("clean")(np.asarray(image)).transpose(2, 0, 1)
    assert np.array_equal(inception.clean(image).numpy(), (theirs - 128) / 128)


@pytest.mark.parametrize("size", [(640, 427), (96, 131)])
def test_text2image_benchmark_cuts_a_square_and_rounds(size):
    image = picture(*size)
    pixels = np.asarray(image)
    side = min(size)
    left, top = (size[0] - side) // 2, (size[1] - side) // 2
    square = Image.fromarray(pixels[top : top + side, left : left + side])
    resized = np.asarray(square.resize((299, 299), Image.Resampling.BICUBIC))
    by_hand = 2 * (resized.astype(np.float32) / np.float32(255)) - 1
    found = inception.text2image(image)
    assert np.array_equal(found.numpy(), by_hand.transpose(2, 0, 1))
    assert not torch.allclose(found, inception.clean(image), atol=0.05)


@pytest.mark.slow
def test_the_network_is_the_extractors_without_its_resize(tmp_path):
    weights = random_weights(tmp_path / "random.pth")
    state = torch.get_rng_state()
    network = inception.network(weights, "cpu")
    assert torch.equal(torch.get_rng_state(), state)
    images = [picture(299, 299, seed) for seed in range(2)]
    x = torch.stack([torch.from_numpy(np.array(i)).permute(2, 0, 1) for i in images])
    with torch.no_grad():
        found = network(torch.stack([inception.clean(i) for i in images]))
    assert found.shape == (2, inception.FEATURES)
    # of 299 pixels the extractor's own resize changes nothing
    assert np.allclose(found.numpy(), features(x, weights, "2048"), atol=1e-5)


def test_moments_of_batches_are_those_of_all():
    torch.manual_seed(0)
    a, b = torch.rand(40, 6) + 3, torch.rand(31, 6) ** 2
    found = []
    for x in (a, b):
        moments = Moments()
        for batch in x.split(16):
            moments.add(batch)
        mean, covariance = moments.statistics()
        assert np.allclose(mean, x.double().mean(0))
        assert np.allclose(covariance, np.cov(x.double().numpy(), rowvar=False))
        found.append((mean, covariance))
    assert distance_of(*found) == pytest.approx(frechet_distance(a, b), rel=1e-9)
    with pytest.raises(ValueError, match="NaN"):
        Moments().add(torch.tensor([[float("nan")]]))


def test_unlearncanvass_resize_is_that_of_opencv():
    cv2 = pytest.importorskip("cv2", reason="opencv comes with the extra nudity")
    for size in ((512, 512), (640, 427), (96, 130)):
        image = picture(*size)
        # as published: to 512 in 8 bits, then to 299 in floats
        whole = cv2.resize(np.asarray(image), (512, 512)).astype(np.float32) / 255
        theirs = 2 * cv2.resize(whole, (299, 299)).transpose(2, 0, 1) - 1
        apart = np.abs(inception.unlearncanvas(image).numpy() - theirs)
        # OpenCV's 8 bits are of fixed point numbers, one level off at times
        assert apart.max() < (1e-4 if size == (512, 512) else 2.01 / 255)
    assert not torch.allclose(inception.unlearncanvas(image), inception.clean(image), atol=0.05)


def test_unlearncanvass_features_are_the_means_of_mixed_7c_on_values_normalised_twice(tmp_path):
    models = pytest.importorskip("torchvision.models", reason="comes with the extra text_to_image")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        plain = models.inception_v3(weights=None, init_weights=False).eval()
    torch.save(plain.state_dict(), tmp_path / "google.pth")
    weights = inception.torchvision_weights_of(tmp_path / "google.pth")
    caught = []
    plain.Mixed_7c.register_forward_hook(lambda _module, _args, out: caught.append(out))
    x = torch.stack([inception.unlearncanvas(picture(80, 60, seed)) for seed in (0, 1)])
    # torchvision's own normalisation, of values that it takes for those in [0, 1]
    mean, std = (
        torch.tensor(v).view(1, 3, 1, 1) for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    )
    with torch.no_grad():
        plain(x * (std / 0.5) + (mean - 0.5) / 0.5)
        found = inception.torchvision_network(weights, "cpu")(x)
    assert found.shape == (2, inception.FEATURES)
    torch.testing.assert_close(found, caught[0].mean((2, 3)))
    with pytest.raises(ValueError, match="inception_weights does not hold weights of Inception3"):
        inception.torchvision_network({"w": torch.ones(1)}, "cpu")
