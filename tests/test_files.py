"""Nothing half-written is taken for a result, and no old result is lost."""

from __future__ import annotations

import pytest
import torch

from ebu_optim._files import load_tensors, replacing, replacing_folder, save_tensors


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
