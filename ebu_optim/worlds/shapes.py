"""Generated images of coloured shapes in ten classes, for smoke tests without a data set.

    python -m ebu_optim.worlds.shapes --output_dir outputs/shapes

writes the folders train and test, each with a folder of PNG files per class.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageDraw

from ..files import replacing_folder
from ..training.command_line import command
from ..training.fields import at_least, option

COLOURS = ("red", "green", "blue", "yellow", "white")
SHAPES = ("disc", "square")
SIZE = 24


def draw(colour: str, shape: str, g: random.Random) -> Image.Image:
    """One shape of random size at a random place, on a random dark background."""
    ground = tuple(g.randrange(60) for _ in range(3))
    image = Image.new("RGB", (SIZE, SIZE), ground)
    side = g.randrange(SIZE // 3, 2 * SIZE // 3)
    x, y = (g.randrange(SIZE - side) for _ in range(2))
    pen = ImageDraw.Draw(image)
    (pen.ellipse if shape == "disc" else pen.rectangle)((x, y, x + side, y + side), fill=colour)
    return image


@dataclass(frozen=True, kw_only=True)
class Shapes:
    """The number of images, and their folder."""

    output_dir: Path = option(help="Folder for the images.")
    per_class: int = option(40, help="Images of each class in train; test has a quarter as many.")
    seed: int = option(0, help="Seed of the images.")

    def __post_init__(self) -> None:
        at_least(self, 1, "per_class")


def draw_all(args: Shapes) -> None:
    """Write the folders."""
    g = random.Random(args.seed)  # noqa: S311 - images are no secrets
    with replacing_folder(args.output_dir) as work:
        for split, n in (("train", args.per_class), ("test", max(1, args.per_class // 4))):
            for colour in COLOURS:
                for shape in SHAPES:
                    folder = work / split / f"{colour} {shape}"
                    folder.mkdir(parents=True)
                    for i in range(n):
                        draw(colour, shape, g).save(folder / f"{i:04d}.png")
        (work / "README.md").write_text(f"{__doc__}\nSeed {args.seed}.\n")


if __name__ == "__main__":
    command(draw_all, Shapes, __doc__)
