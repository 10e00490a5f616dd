"""One reader of image files: every mode of PIL against arithmetic in NumPy, EXIF's eight turns, and
which files of a folder count."""

from __future__ import annotations

import io
import re
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from ebu_optim.images import ENDINGS, image_files, pixels_of, read_rgb
from ebu_optim.metrics.images import RGBImages
from ebu_optim.metrics.images import read_image as of_metrics
from ebu_optim.training.sources import Item, decode

EACH = settings(max_examples=25, deadline=None)
SEEDS = st.integers(0, 2**31)
SIZES = st.tuples(st.integers(1, 7), st.integers(1, 5))


def png(image: Image.Image, **options) -> bytes:
    file = io.BytesIO()
    image.save(file, "PNG", **options)
    return file.getvalue()


def read(data: bytes) -> np.ndarray:
    return np.asarray(read_rgb(data)).astype(int)


def drawn(seed: int, *shape: int, high: int = 256) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, high, shape)


def bytes_of(values: np.ndarray, mode: str) -> Image.Image:
    """An image of a mode whose channels are of one byte."""
    return Image.frombytes(mode, values.shape[1::-1], values.astype(np.uint8).tobytes())


def over_white(colour: np.ndarray, alpha: np.ndarray) -> np.ndarray:
    a = alpha[..., None] / 255
    return colour * a + 255 * (1 - a)


@EACH
@given(SEEDS, SIZES)
def test_opaque_modes_keep_their_values(seed, size):
    gray, colour = drawn(seed, *size), drawn(seed, *size, 3)
    assert (read(png(bytes_of(gray, "L"))) == gray[..., None]).all()
    assert (read(png(bytes_of(colour, "RGB"))) == colour).all()
    palette = Image.fromarray(gray.astype(np.uint8)).convert("P")
    palette.putpalette(drawn(seed, 256, 3).astype(np.uint8).tobytes())
    assert (read(png(palette)) == drawn(seed, 256, 3)[np.asarray(palette)]).all()


@EACH
@given(SEEDS, SIZES)
def test_alpha_is_composited_on_white(seed, size):
    gray, colour, alpha = drawn(seed, *size), drawn(seed, *size, 3), drawn(seed + 1, *size)
    for values, mode in ((gray[..., None].repeat(3, -1), "LA"), (colour, "RGBA")):
        stored = values[..., :1] if mode == "LA" else values
        found = read(png(bytes_of(np.concatenate([stored, alpha[..., None]], -1), mode)))
        assert np.abs(found - over_white(values, alpha)).max() <= 1, mode
        assert (found[alpha == 0] == 255).all()
        assert (found[alpha == 255] == values[alpha == 255]).all()


@EACH
@given(SEEDS, SIZES)
def test_transparent_entries_of_a_palette_and_one_transparent_colour_are_white(seed, size):
    number, table = drawn(seed, *size, high=4), drawn(seed, 4, 3)
    image = bytes_of(number, "P")
    image.putpalette(table.astype(np.uint8).tobytes())
    alpha = drawn(seed + 1, 4)
    found = read(png(image, transparency=alpha.astype(np.uint8).tobytes()))
    assert np.abs(found - over_white(table[number], alpha[number])).max() <= 1
    # alpha beside the palette's number, which TIFF can hold
    both = bytes_of(np.stack([number, alpha[number]], -1), "PA")
    both.putpalette(table.astype(np.uint8).tobytes())
    file = io.BytesIO()
    both.save(file, "TIFF")
    assert Image.open(file).mode == "PA"
    found = read(file.getvalue())
    assert np.abs(found - over_white(table[number], alpha[number])).max() <= 1
    # one gray and one colour
    found = read(png(bytes_of(number * 60, "L"), transparency=60))
    assert (found == np.where(number == 1, 255, number * 60)[..., None]).all()
    colour = table[number]
    found = read(png(bytes_of(colour, "RGB"), transparency=tuple(table[2].tolist())))
    clear = (colour == table[2]).all(-1, keepdims=True)
    assert (found == np.where(clear, 255, colour)).all()


@EACH
@given(SEEDS, SIZES)
def test_sixteen_bits_are_scaled_and_not_cut(seed, size):
    values = drawn(seed, *size, high=65536)
    image = Image.fromarray(values.astype(np.uint16))
    file = io.BytesIO()
    image.save(file, "TIFF")
    for data in (png(image), file.getvalue()):
        assert (read(data) == np.floor(values / 257 + 0.5)[..., None]).all()
    clear = int(values[0, 0])
    found = read(png(image, transparency=clear))
    wanted = np.where(values == clear, 255, np.floor(values / 257 + 0.5))
    assert (found == wanted[..., None]).all()


def test_sixteen_bit_gray_is_the_eight_bit_gray_of_the_same_light():
    gray = np.arange(256).reshape(16, 16)
    assert (read(png(Image.fromarray((gray * 257).astype(np.uint16)))) == gray[..., None]).all()


@pytest.mark.parametrize("mode", ["F", "I"])
def test_numbers_without_a_known_range_are_refused(mode, tmp_path):
    Image.new(mode, (3, 2), 7).save(tmp_path / "x.tif")
    with pytest.raises(ValueError, match=f"mode {mode}: 32 bits a channel have no known range"):
        read_rgb(tmp_path / "x.tif")


#: What EXIF's number says is done to the stored pixels to see the picture.
TURNS = {
    1: lambda x: x,
    2: lambda x: x[:, ::-1],
    3: lambda x: x[::-1, ::-1],
    4: lambda x: x[::-1],
    5: lambda x: x.swapaxes(0, 1),
    6: lambda x: np.rot90(x, -1),
    7: lambda x: x[::-1, ::-1].swapaxes(0, 1),
    8: lambda x: np.rot90(x),
}


@pytest.mark.parametrize("number", TURNS)
@EACH
@given(SEEDS, SIZES)
def test_pictures_are_turned_as_exif_says(number, seed, size):
    exif = Image.Exif()
    exif[0x0112] = number
    colour, deep = drawn(seed, *size, 3), drawn(seed, *size, high=256)
    found = read(png(bytes_of(colour, "RGB"), exif=exif))
    assert np.array_equal(found, TURNS[number](colour))
    found = read(png(Image.fromarray((deep * 257).astype(np.uint16)), exif=exif))
    assert np.array_equal(found, TURNS[number](deep)[..., None].repeat(3, -1))


def test_every_reader_of_the_package_is_this_one(tmp_path):
    """A picture with all of it: 16 bits, a transparent gray, lying on its side."""
    exif = Image.Exif()
    exif[0x0112] = 6
    values = drawn(0, 4, 4, high=65536)
    data = png(Image.fromarray(values.astype(np.uint16)), exif=exif, transparency=int(values[1, 2]))
    (tmp_path / "x.png").write_bytes(data)
    wanted = pixels_of(read_rgb(data))
    assert wanted.shape == (3, 4, 4)
    assert torch.equal(of_metrics(tmp_path / "x.png"), wanted)
    assert torch.equal(RGBImages(tmp_path, "images")[0], wanted)
    for given_as in (data, tmp_path / "x.png"):
        found, _, _ = decode([Item(given_as, 0, "x")], ["a"], "here", resolution=None, skip=False)
        assert torch.equal(found[0], wanted)


def test_no_other_file_of_the_package_reads_images():
    package = Path(__file__).parents[1] / "ebu_optim"
    reads = re.compile(r"\bconvert\(\W?RGB|Image\.open\(|decode_image\(|imread\(")
    found = {f.name for f in package.rglob("*.py") if reads.search(f.read_text(encoding="utf-8"))}
    assert found <= {"images.py"}


# -- which files count ---------------------------------------------------------------------------


def test_hidden_names_are_no_images_and_what_else_is_left_out_is_named(tmp_path):
    for ending in (*ENDINGS, ".JPG", ".Tiff"):
        (tmp_path / f"a{ending}").touch()
    for name in (".ipynb_checkpoints/a-checkpoint.png", ".hidden.png", "sub/._b.jpg", "sub/b.jpg"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = [str(f.relative_to(tmp_path)) for f in image_files(tmp_path)]
    assert found == sorted([*(f"a{e}" for e in (*ENDINGS, ".JPG", ".Tiff")), "sub/b.jpg"])
    for name in ("c.gif", "d.heic", "e.txt", "sub/f.avif", "sub/g"):
        (tmp_path / name).touch()
    with pytest.warns(UserWarning, match=r"left out: c\.gif, d\.heic, e\.txt and 2 more"):
        assert len(image_files(tmp_path)) == len(found)


def test_a_folder_under_a_hidden_one_is_read(tmp_path):
    (tmp_path / ".cache").mkdir()
    (tmp_path / ".cache" / "a.png").touch()
    assert len(image_files(tmp_path / ".cache")) == 1
