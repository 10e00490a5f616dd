"""Nothing half-written is taken for a result, and no old result is lost."""

from __future__ import annotations

import math
import os
import subprocess
from contextlib import suppress

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from ebu_optim.files import (
    load_tensors,
    not_finite,
    replacing,
    replacing_folder,
    save_tensors,
)


def write(path, text):
    with replacing_folder(path) as work:
        (work / "a").write_text(text)


def test_a_folder_is_replaced_whole_or_stays(tmp_path):
    out = tmp_path / "x" / "out"
    write(out, "1")
    with pytest.raises(TypeError), replacing_folder(out) as work:
        (work / "a").write_text(2)
    assert (out / "a").read_text() == "1"
    assert [p.name for p in out.parent.iterdir()] == ["out"]
    write(out, "3")
    assert (out / "a").read_text() == "3"
    assert [p.name for p in out.parent.iterdir()] == ["out"]


def test_a_kill_between_the_renames_loses_nothing(tmp_path):
    out = tmp_path / "out"
    write(out, "1")
    out.rename(tmp_path / ".out.old")
    (tmp_path / ".out.partial").mkdir()
    with pytest.raises(KeyError), replacing_folder(out):
        raise KeyError
    assert (out / "a").read_text() == "1"


def test_a_link_stays_a_link(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    for text in "12":
        write(tmp_path / "link", text)
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "real" / "a").read_text() == "2"


def test_two_at_once_are_told_apart(tmp_path):
    out = tmp_path / "out"
    with replacing_folder(out) as work:
        (work / "a").write_text("first")
        with pytest.raises(RuntimeError, match="another process"), replacing_folder(out):
            pass
    assert (out / "a").read_text() == "first"


def test_a_file_is_replaced_whole_or_stays(tmp_path):
    path = tmp_path / "f"
    save_tensors(path, {"a": torch.ones(2)}, {"k": 1})
    with pytest.raises(TypeError), replacing(path) as temporary:
        temporary.open("wb").write("half")
    tensors, meta = load_tensors(path)
    assert torch.equal(tensors["a"], torch.ones(2))
    assert meta == {"k": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["f"]


def left_by_an_interrupt(out, resume):
    with suppress(KeyboardInterrupt), replacing_folder(out, resume) as work:
        (work / "done").write_text("1")
        raise KeyboardInterrupt


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
def test_work_with_the_same_resume_is_handed_out_again(tmp_path, error):
    out = tmp_path / "out"
    for _ in range(2):
        with suppress(error), replacing_folder(out, {"seed": 0}) as work:
            (work / "done").open("a").write("1")
            raise error
    with replacing_folder(out, {"seed": 0}) as work:
        assert (work / "done").read_text() == "11"
    assert [p.name for p in out.iterdir()] == ["done"]
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("then", [{"seed": 1}, None])
@pytest.mark.parametrize("first", [{"seed": 0}, None])
def test_work_of_anything_else_is_begun_anew(tmp_path, first, then):
    left_by_an_interrupt(tmp_path / "out", first)
    assert (tmp_path / ".out.partial" / "done").exists()
    with replacing_folder(tmp_path / "out", then) as work:
        assert not (work / "done").exists()
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_temporary_files_of_dead_processes_are_removed_and_of_living_ones_left(tmp_path):
    path = tmp_path / "f.safetensors"
    dead = subprocess.Popen(["true"])
    dead.wait()
    with replacing(path) as temporary:
        temporary.write_text("1")
        ours = temporary.parent
        theirs, living = (
            ours.with_name(ours.name.replace(f".{os.getpid()}.", f".{pid}."))
            for pid in (dead.pid, os.getppid())
        )
        for folder in (theirs, living):
            folder.mkdir()
            (folder / ".tmpXYZ").write_text("half")
    with replacing(path) as temporary:
        temporary.write_text("2")
    assert sorted(p.name for p in tmp_path.iterdir()) == [living.name, "f.safetensors"]


def test_an_error_about_another_file_is_not_called_one_of_writing(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    with pytest.raises(FileNotFoundError) as caught, replacing_folder(tmp_path / "a" / "out"):
        (tmp_path / "elsewhere" / "x").read_text()
    assert "cannot write" not in str(caught.value)


# -- NaN -----------------------------------------------------------------------------------------


@given(
    st.sampled_from([torch.float16, torch.bfloat16, torch.float32, torch.float64]),
    st.lists(st.integers(1, 4), max_size=3),
    st.sampled_from([math.nan, math.inf, -math.inf]),
    st.data(),
)
@settings(max_examples=60, deadline=None)
def test_one_value_of_any_place_and_dtype_that_is_not_finite_is_found(dtype, shape, value, data):
    x = torch.ones(shape, dtype=dtype)
    assert not_finite({"n": torch.tensor([1]), "empty": torch.empty(0), "x": x}) == ""
    at = data.draw(st.integers(0, x.numel() - 1))
    x.view(-1)[at] = value
    row = at // (x.numel() // len(x)) if shape else 0
    assert not_finite({"n": torch.tensor([1]), "x": x}) == f"x[{row}] holds NaN or Inf"


def test_nan_is_refused_before_it_is_written_and_when_it_is_read(tmp_path):
    path, x = tmp_path / "x.safetensors", torch.ones(5, 2)
    save_tensors(path, {"images": x}, {})
    before = path.read_bytes()
    x[1, 0] = x[3, 1] = math.nan
    with pytest.raises(ValueError, match=r"is not written: images\[1\] and 1 more of 5 holds NaN"):
        save_tensors(path, {"images": x}, {})
    assert path.read_bytes() == before
    save_file({"images": x}, path, {"meta": "{}"})  # as an earlier version did
    with pytest.raises(
        ValueError, match=r"x.safetensors: images\[1\].*delete it and make it again"
    ):
        load_tensors(path)
    assert load_tensors(path, finite=False)[0]["images"].isnan().sum() == 2
