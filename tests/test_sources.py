"""Labelled images from folders and parquet files: what counts as a class, which labels are ones."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from ebu_optim.errors import InputError
from ebu_optim.training import data
from ebu_optim.training.sources import DataOptions


def refused(match: str):
    return pytest.raises(InputError, match=match)


def put(folder: Path, *names: str, gray: int = 7) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", (8, 8), gray).save(folder / name, "PNG")


def of_folder(folder: Path, split: str = "train", **options) -> data.Data:
    return data.load(DataOptions(train_data_dir=folder, **options), split)


# -- folders -------------------------------------------------------------------------------------


def test_hidden_folders_are_no_classes_and_double_no_image(tmp_path):
    put(tmp_path, *(f"{c}/{i}.png" for c in ("cat", "dog") for i in range(10)))
    put(tmp_path, ".ipynb_checkpoints/x.png", "cat/.ipynb_checkpoints/0-checkpoint.png")
    found = [of_folder(tmp_path, split) for split in ("train", "test")]
    assert [f.classes for f in found] == [("cat", "dog")] * 2
    assert sum(len(f.labels) for f in found) == 20


def test_a_hidden_folder_beside_the_splits_changes_nothing(tmp_path):
    put(tmp_path, "train/cat/0.png", "train/dog/1.png", "test/cat/2.png", ".git/x.png")
    assert of_folder(tmp_path).classes == ("cat", "dog")


def test_a_class_that_the_test_split_lacks_keeps_the_numbers_of_the_others(tmp_path):
    put(tmp_path, "train/cat/0.png", "train/dog/1.png", "test/dog/2.png")
    found = of_folder(tmp_path, "test")
    assert (found.classes, found.labels.tolist()) == (("cat", "dog"), [1])
    joined = [of_folder(tmp_path, "all", join_splits=True).labels.sort().values.tolist()]
    assert joined == [[0, 1, 1]]
    put(tmp_path, "test/eel/3.png")
    with refused("the test split has the class eel, which is not in the train split: cat, dog"):
        of_folder(tmp_path, "test")


def test_a_class_without_images_is_refused_unless_others_are_named(tmp_path):
    put(tmp_path, "cat/0.png", "cat/1.png", "dog/0.png", "eel/0.txt")
    (tmp_path / "ant").mkdir()
    with (
        refused("no image of class ant, eel: the model could not learn it.*delete its folder"),
        pytest.warns(UserWarning, match=r"eel: .*left out: 0\.txt"),
    ):
        of_folder(tmp_path)
    (tmp_path / "eel" / "0.txt").unlink()
    found = of_folder(tmp_path, classes=["cat", "dog"])
    assert found.classes == ("cat", "dog")


def test_a_class_whose_images_were_all_left_out_is_refused(tmp_path):
    put(tmp_path, "cat/0.png", "dog/0.png")
    (tmp_path / "cat" / "0.png").write_bytes(b"no image")
    with refused("no image of class cat"):
        of_folder(tmp_path, skip_unreadable=True)


def test_images_of_every_ending_are_taken_and_those_of_no_class_named(tmp_path):
    put(tmp_path, "cat/0.tif", "cat/1.jfif", "cat/2.TIFF", "cat/3.png", "loose.png")
    with pytest.warns(UserWarning, match=r"left out: loose\.png"):
        assert len(of_folder(tmp_path).labels) == 4
    put(tmp_path / "flat", "a.png", "b.png")
    with refused("in folders named by class; the 2 images in .*flat itself have no class"):
        of_folder(tmp_path / "flat")


# -- parquet -------------------------------------------------------------------------------------


def table(folder: Path, labels: list, **more) -> data.Data:
    pyarrow = pytest.importorskip("pyarrow", reason="parquet files need pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    put(folder, "x.png")
    cells = [{"bytes": (folder / "x.png").read_bytes(), "path": None}] * len(labels)
    parquet.write_table(
        pyarrow.table({"image": cells, "label": labels, **more}), folder / "train.parquet"
    )
    return data.load(DataOptions(parquet=[folder]), "all")


@pytest.mark.parametrize(
    ("labels", "said"),
    [
        (["cat", "dog"], "row 0: the label in column label is 'cat', not a whole number"),
        ([0, None], "row 1: the label in column label is None, not a whole number"),
        ([0.0, 1.0], "row 0: the label in column label is 0.0, not a whole number"),
        ([[0], [1]], r"row 0: the label in column label is \[0\], not a whole number"),
        ([0, 10**12], "row 1: label 1000000000000 is too large for a class: give --label_column"),
        ([0, -1], "row 1 has label -1"),
        ([0, 2], "no image of class 1"),
    ],
)
def test_labels_that_are_no_numbers_are_told_in_one_line(labels, said, tmp_path):
    with refused(rf"{said}") as caught:
        table(tmp_path, labels)
    assert "\n" not in str(caught.value)


def test_labels_that_are_numbers_or_true_and_false(tmp_path):
    assert table(tmp_path, [0, 1, 1]).classes == ("0", "1")
    assert table(tmp_path, [False, True, True, True]).labels.tolist().count(1) == 3


def test_an_empty_cell_is_told(tmp_path):
    with refused(r"train.parquet, row 1 \(the cell is empty\)"):
        table(tmp_path, [0, 0], img=[(tmp_path / "x").name.encode(), None])
