"""GIPHY's celebrity detector, by the answers that it gave elsewhere.

The published detector (Giphy/celeb-detection-oss: MTCNN, and a ResNet-50 after it) needs TensorFlow
1, and its weights are pickled. It is therefore run in an environment of its own, over the folder of
the images, and its answers are read from a table."""

from __future__ import annotations

import csv
from pathlib import Path

from ..errors import InputError
from ..text_to_image.prompt_files import read_csv

IMAGE, NAME = "image", "name"
COLUMNS = (
    f"a .csv table with the columns {IMAGE!r}, the name of an image's file, and {NAME!r}, the "
    "detector's first label, empty where it finds no face"
)
#: What to do without a table.
MISSING = (
    "GIPHY's celebrity detector (https://github.com/Giphy/celeb-detection-oss) needs TensorFlow 1 "
    "and is not run here: run it over the folder of the images and give its answers, "
    f"--files giphy=TABLE, {COLUMNS}"
)


class Answers:
    """The detector's answers by the names of the images' files.

    Args:
        file: the table.

    Raises:
        InputError: the file is no such table, or has two answers for an image.
    """

    def __init__(self, file: Path) -> None:
        self.file = file
        self.of: dict[str, str | None] = {}
        try:
            names, rows = read_csv(file)
        except (OSError, UnicodeDecodeError, csv.Error) as error:
            raise InputError(f"--files giphy={file} cannot be read: {error}") from error
        if not {IMAGE, NAME} <= set(names):
            raise InputError(
                f"--files giphy={file} has the columns {', '.join(names) or 'none'}: give {COLUMNS}"
            )
        for row in rows:
            image, name = Path(row[IMAGE] or "").name, person(row[NAME] or "")
            if self.of.setdefault(image, name) != name:
                raise InputError(
                    f"--files giphy={file} has two answers for {image}: give one for each image"
                )

    def __call__(self, image: Path) -> str | None:
        """The name in the image, or None without a face.

        Raises:
            InputError: the table lacks the image.
        """
        if image.name not in self.of:
            raise InputError(
                f"--files giphy={self.file} has no row for {image}: run the detector over all "
                f"images of {image.parent}, and give the answers for all models in one table"
            )
        return self.of[image.name]


def person(label: str) -> str | None:
    """The name in one of GIPHY's labels, such as "Jane_Doe_[with_a_note]", as MACE's
    evaluate_by_GCD.py reads it; None for an empty label."""
    return label.partition("_[")[0].replace("_", " ").strip() or None
