"""Checkpoints on disk: whole, or a clear error, the older one usable and nothing changed."""

from __future__ import annotations

import errno
import json
import os
import random
import resource
import shutil
import signal
import subprocess
from collections import OrderedDict
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from torch import nn
from torch.optim import SGD
from torch.optim.lr_scheduler import MultiStepLR, ReduceLROnPlateau

from ebu_optim.checkpoint import latest_checkpoint, load_checkpoint, save_checkpoint
from ebu_optim.checkpoint._files import FORMAT, _digest
from ebu_optim.files import locked, replacing_folder, save_tensors

from .crash_loop import objects, train
from .steps import assert_same

ROOT = os.geteuid() == 0


def values(run):
    """Everything there is, and the next draws (which are drawn from copies of the states)."""
    found = {n: o.state_dict() for n, o in run.items() if hasattr(o, "state_dict")}
    found["generator"] = run["generator"].get_state()
    found["progress"] = dict(run["progress"])
    python, numpy = random.getstate(), np.random.get_state()  # noqa: NPY002
    with torch.random.fork_rng(devices=[]):
        found["draws"] = [torch.rand(3), *np.random.rand(3), random.random()]  # noqa: NPY002
    random.setstate(python)
    np.random.set_state(numpy)  # noqa: NPY002
    return json.loads(json.dumps(found, default=lambda t: t.tolist()))


@pytest.fixture
def saved(tmp_path):
    """A folder with steps 4 and 8, what they hold, and a run at step 9 that nothing may change."""
    folder, held, run = tmp_path / "run", {}, objects()
    for step in range(1, 10):
        train(run, step)
        if step in (4, 8):
            save_checkpoint(folder, step, run)
            held[step] = values(run)
    return folder, held, run


def refuses(folder, run, *words, error=ValueError, **options):
    before = values(run)
    with pytest.raises(error) as caught:
        load_checkpoint(folder, run, **options)
    for word in words:
        assert str(word) in str(caught.value), caught.value
    assert values(run) == before


def test_a_loaded_run_is_the_saved_one_and_its_random_states_too(saved):
    folder, held, _ = saved
    assert latest_checkpoint(folder) == folder / "step_00000008"
    for path, step in ((folder, 8), (folder / "step_00000004", 4)):
        fresh = objects()
        assert load_checkpoint(path, fresh) == step
        assert values(fresh) == held[step]
    train(fresh, 5)
    assert values(fresh) != held[4]


def test_saving_and_looking_change_nothing(saved):
    folder, _, run = saved
    before = values(run)
    save_checkpoint(folder, 9, run)
    latest_checkpoint(folder)
    assert values(run) == before
    assert sorted(p.name for p in folder.iterdir()) == ["step_00000008", "step_00000009"]


def test_no_checkpoint_is_step_0(tmp_path):
    run = objects()
    before = values(run)
    assert load_checkpoint(tmp_path / "none", run) == 0
    assert load_checkpoint(tmp_path, run, fallback=True) == 0
    assert latest_checkpoint(tmp_path / "none") is None
    assert values(run) == before
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(FileNotFoundError, match="step_00000003 does not exist"):
        load_checkpoint(tmp_path / "step_00000003", run)


@pytest.mark.parametrize(("keep", "left"), [(1, [5]), (2, [4, 5]), (None, [0, 1, 2, 3, 4, 5])])
def test_the_last_ones_are_kept(tmp_path, keep, left):
    for step in range(6):
        save_checkpoint(tmp_path, step, {"a": {}}, keep=keep)
    assert sorted(p.name for p in tmp_path.iterdir()) == [f"step_{s:08d}" for s in left]


def test_steps_are_ordered_as_numbers(tmp_path):
    for step in (99_999_999, 100_000_000):
        save_checkpoint(tmp_path, step, {"a": {"step": step}})
    found = {"a": {}}
    assert load_checkpoint(tmp_path, found) == found["a"]["step"] == 100_000_000


def test_the_same_step_again_replaces_it(tmp_path):
    for value in (1, 2):
        save_checkpoint(tmp_path, 3, {"a": {"value": value}})
    found = {"a": {"other": 0}}
    load_checkpoint(tmp_path, found)
    assert found["a"] == {"value": 2}


def test_some_of_the_objects_and_no_random_states(saved):
    folder, held, run = saved
    draws = values(run)["draws"]
    load_checkpoint(folder, {"model": run["model"]}, random=False)
    now = values(run)
    assert now["model"] == held[8]["model"]
    assert now["opt"] != held[8]["opt"]
    assert now["draws"] == draws


def test_files_hold_no_pickle_and_the_manifest_says_what_they_are(saved):
    folder, _, run = saved
    manifest = json.loads((folder / "step_00000008" / "manifest.json").read_text())
    assert manifest["format"] == FORMAT
    assert manifest["step"] == 8
    assert set(manifest["files"]) == {*(f"{name}.pt" for name in run), "random.pt"}
    for name, entry in manifest["files"].items():
        file = folder / "step_00000008" / name
        torch.load(file, weights_only=True)
        assert entry["bytes"] == file.stat().st_size


def test_states_of_schedulers_with_lists_and_counters(tmp_path):
    opt = SGD([nn.Parameter(torch.ones(2))], lr=1.0)
    pair = {"a": MultiStepLR(opt, [2, 3]), "b": ReduceLROnPlateau(opt), "c": OrderedDict(x=1)}
    opt.step()
    pair["a"].step()
    pair["b"].step(0.5)
    save_checkpoint(tmp_path, 1, pair)
    fresh = {"a": MultiStepLR(opt, [7]), "b": ReduceLROnPlateau(opt), "c": OrderedDict()}
    load_checkpoint(tmp_path, fresh)
    assert fresh["a"].milestones == pair["a"].milestones
    assert fresh["b"].best == 0.5
    assert fresh["c"] == pair["c"]


def test_loading_removes_what_a_killed_save_left_unless_somebody_is_saving(tmp_path):
    save_checkpoint(tmp_path, 1, {"a": {"x": 1}})
    (tmp_path / "step_00000001").rename(tmp_path / ".step_00000001.old")  # about to be replaced
    (tmp_path / ".step_00000002.partial").mkdir()
    (tmp_path / ".step_00000002.lock").touch()
    found = {"a": {}}
    with locked(tmp_path / ".lock", tmp_path):
        assert load_checkpoint(tmp_path, found) == found["a"]["x"] == 1
        assert len(list(tmp_path.iterdir())) == 4
    assert load_checkpoint(tmp_path, found) == 1
    assert [p.name for p in tmp_path.iterdir()] == ["step_00000001"]


# -- damage -------------------------------------------------------------------------------------


def truncate(file):
    file.write_bytes(file.read_bytes()[:-7])


def flip(file):
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 4
    file.write_bytes(data)


@pytest.mark.parametrize("damage", [truncate, flip, os.remove])
@pytest.mark.parametrize("name", ["model.pt", "opt.pt", "random.pt", "manifest.json"])
def test_a_damaged_one_is_named_and_the_older_one_is_usable(saved, name, damage):
    folder, held, run = saved
    damage(folder / "step_00000008" / name)
    older = folder / "step_00000004"
    refuses(folder, run, folder / "step_00000008" / name, older, "fallback=True")
    fresh = objects()
    assert load_checkpoint(older, fresh) == 4
    assert values(fresh) == held[4]

    with pytest.warns(UserWarning, match=f"{name}.*Continuing from .*step_00000004"):
        assert load_checkpoint(folder, run, fallback=True) == 4
    assert values(run) == held[4]
    save_checkpoint(folder, 6, run)
    names = ["step_00000004", "step_00000006", "step_00000008.damaged"]
    assert sorted(p.name for p in folder.iterdir()) == names


def test_any_flipped_bit_is_found(tmp_path):
    a = {"t": torch.arange(5.0), "n": [1, "x"]}
    path = save_checkpoint(tmp_path, 1, {"a": a})
    draw = random.Random(0)
    for file in sorted(path.iterdir()):
        data = file.read_bytes()
        for _ in range(150):
            bit = draw.randrange(8 * len(data))
            changed = bytearray(data)
            changed[bit // 8] ^= 1 << bit % 8
            file.write_bytes(changed)
            found = {"a": {"mine": 1}}
            with pytest.raises(ValueError, match=f"{file.name}|format"):
                load_checkpoint(tmp_path, found)
            assert found == {"a": {"mine": 1}}
        file.write_bytes(data)
    load_checkpoint(tmp_path, found)
    assert_same(found["a"], a)


def test_damage_everywhere_is_an_error_not_a_fresh_start(saved):
    folder, _, run = saved
    for step in (4, 8):
        truncate(folder / f"step_{step:08d}" / "model.pt")
    for fallback in (False, True):
        refuses(folder, run, "no complete checkpoint", "another folder", fallback=fallback)
    refuses(folder, run, "step_00000004", "step_00000008", fallback=True)


def test_a_newer_format_is_refused_and_the_older_one_usable(saved):
    folder, _, run = saved
    file = folder / "step_00000008" / "manifest.json"
    manifest = json.loads(file.read_text())
    manifest |= {"format": FORMAT + 1, "ebu_optim": "9.0"}
    del manifest["sha256"]
    file.write_text(json.dumps({**manifest, "sha256": _digest(manifest)}))
    for fallback in (False, True):  # it is whole: falling back would lose it
        refuses(folder, run, "9.0", "newer", folder / "step_00000004", fallback=fallback)
    assert load_checkpoint(folder / "step_00000004", run) == 4
    with pytest.raises(ValueError, match="step_00000008, a later step than 5"):
        save_checkpoint(folder, 5, run)


def test_a_checkpoint_of_another_run_changes_nothing(saved):
    folder, held, _ = saved
    other = objects()
    other["model"] = nn.Sequential(nn.Linear(6, 24), nn.Tanh(), nn.Dropout(0.3), nn.Linear(24, 2))
    # what comes before it has been loaded already, and is put back
    refuses(folder, dict(reversed(other.items())), "does not fit the 'model'", "size mismatch")
    refuses(folder, {**objects(), "ema": nn.Linear(1, 1)}, "no 'ema'", "model, opt, schedule")
    fresh = objects()
    load_checkpoint(folder, fresh)
    assert values(fresh) == held[8]


def test_a_used_optimizer_gets_its_own_state_back(saved):
    folder, _, run = saved
    run["schedule"] = nn.Linear(1, 1)
    before = values(run)
    refuses(folder, run, "does not fit the 'schedule'")
    assert before["opt"]["state"]["0"]["exp_avg"]


# -- what cannot be saved -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("objects", "error", "message"),
    [
        ({"a": 3}, TypeError, "'a' is a int, which has no state_dict"),
        ({"a": {"f": lambda: 0}}, TypeError, "the state of 'a'"),
        ({"a": {"x": np.ones(2)}}, TypeError, "the state of 'a' cannot be read back without"),
        ({"random": {}}, ValueError, "random states"),
        ({"../a": {}}, ValueError, "letters, digits"),
        ({"": {}}, ValueError, "letters, digits"),
    ],
)
def test_what_cannot_be_saved_is_refused_before_anything_is_written(
    tmp_path, objects, error, message
):
    with pytest.raises(error, match=message):
        save_checkpoint(tmp_path, 1, objects)
    assert list(tmp_path.iterdir()) == []


def test_bad_steps_are_named(tmp_path):
    with pytest.raises(ValueError, match="step must be the number of steps done"):
        save_checkpoint(tmp_path, -1, {})
    with pytest.raises(TypeError):
        save_checkpoint(tmp_path, 1.5, {})
    with pytest.raises(ValueError, match="keep must be >= 1"):
        save_checkpoint(tmp_path, 1, {}, keep=0)
    save_checkpoint(tmp_path, 5, {})
    with pytest.raises(ValueError, match="step_00000005, a later step than 4; load it first"):
        save_checkpoint(tmp_path, 4, {})


def test_two_processes_in_one_folder_are_told_apart(tmp_path):
    with locked(tmp_path / ".lock", tmp_path), pytest.raises(RuntimeError, match="another process"):
        save_checkpoint(tmp_path, 1, {})
    save_checkpoint(tmp_path, 1, {})


# -- disks --------------------------------------------------------------------------------------


@contextmanager
def mounted(path):
    """A real disk of one megabyte."""
    path.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(path)]
    may = ROOT and shutil.which("mount")
    if not may or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("only root may mount a small disk")
    try:
        yield path
    finally:
        subprocess.run(["umount", str(path)], check=True)


@contextmanager
def limited(path):
    """No file may grow beyond a megabyte: the same error path, another number."""
    path.mkdir()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    old = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, hard))
    try:
        yield path
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, old)


@pytest.mark.parametrize("disk", [mounted, limited])
def test_a_full_disk(tmp_path, disk):
    small, large = {"a": {"t": torch.ones(1000)}}, {"a": {"t": torch.ones(1_000_000)}}
    with disk(tmp_path / "disk") as folder:
        save_checkpoint(folder, 1, small)
        with pytest.raises(OSError, match=r"step_00000002.*free some space") as caught:
            save_checkpoint(folder, 2, large)
        assert caught.value.errno in (errno.ENOSPC, errno.EFBIG)
        assert [p.name for p in folder.iterdir()] == ["step_00000001"]
        found = {"a": {}}
        assert load_checkpoint(folder, found) == 1
        assert_same(found, small)
        save_checkpoint(folder, 2, small)  # smaller now, and the disk has room

        save_tensors(folder / "f", {"t": torch.ones(10)}, {})
        with pytest.raises(OSError, match=r"disk.f.*free some space"):
            save_tensors(folder / "f", {"t": torch.ones(1_000_000)}, {})
        assert sorted(p.name for p in folder.iterdir()) == ["f", "step_00000001", "step_00000002"]
        with (
            pytest.raises(OSError, match=r"disk.g.*free some space"),
            replacing_folder(folder / "g") as work,
        ):
            (work / "x").write_bytes(bytes(2 << 20))


def test_a_disk_that_may_only_be_read(tmp_path):
    state = {"a": {"x": 1}}
    with mounted(tmp_path / "disk") as folder:
        for step in (1, 2):
            save_checkpoint(folder, step, state)
        truncate(folder / "step_00000002" / "a.pt")
        subprocess.run(["mount", "-o", "remount,ro", str(folder)], check=True)
        with pytest.raises(OSError, match=r"step_00000003.*may write to"):
            save_checkpoint(folder, 3, state)
        with pytest.raises(OSError, match=r"disk.f.*may write to"):
            save_tensors(folder / "f", {"t": torch.ones(1)}, {})
        found = {"a": {}}
        with pytest.warns(UserWarning, match="Continuing from"):
            assert load_checkpoint(folder, found, fallback=True) == 1
        assert found == state


@pytest.mark.skipif(ROOT, reason="root may write everywhere")
def test_a_folder_that_may_only_be_read(tmp_path):
    save_checkpoint(tmp_path, 1, {"a": {"x": 1}})
    tmp_path.chmod(0o555)
    try:
        with pytest.raises(PermissionError, match=r"step_00000002.*may write to"):
            save_checkpoint(tmp_path, 2, {"a": {}})
        assert load_checkpoint(tmp_path, {"a": {}}) == 1
    finally:
        tmp_path.chmod(0o755)


def test_a_file_where_a_folder_should_be(tmp_path):
    (tmp_path / "file").write_text("mine")
    for folder in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(
            OSError, match=r"cannot write .*step_00000001.*remove the file that is where"
        ):
            save_checkpoint(folder, 1, {})
    with pytest.raises(NotADirectoryError, match="file"):
        load_checkpoint(tmp_path / "file", {})
    assert (tmp_path / "file").read_text() == "mine"
