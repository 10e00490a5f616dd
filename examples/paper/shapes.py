"""Generated images in ten classes, coloured shapes: for smoke runs where a data set is not at hand.

    python examples/paper/shapes.py --output_dir outputs/shapes

Folders train and test, in each a folder of PNG files for each class.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageDraw

from ebu_optim.files import replacing_folder

COLOURS = ("red", "green", "blue", "yellow", "white")
SHAPES = ("disc", "square")
SIZE = 24


def draw(colour: str, shape: str, g: random.Random) -> Image.Image:
    """One shape of a random size at a random place, on a random dark ground."""
    ground = tuple(g.randrange(60) for _ in range(3))
    image = Image.new("RGB", (SIZE, SIZE), ground)
    side = g.randrange(SIZE // 3, 2 * SIZE // 3)
    x, y = (g.randrange(SIZE - side) for _ in range(2))
    pen = ImageDraw.Draw(image)
    (pen.ellipse if shape == "disc" else pen.rectangle)((x, y, x + side, y + side), fill=colour)
    return image


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--per_class", type=int, default=40, help="in train; a quarter in test")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    g = random.Random(args.seed)  # noqa: S311 - pictures, no secrets
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
    main()
