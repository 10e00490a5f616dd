"""Killed and interrupted at any moment, a run goes on and ends as if nothing had happened."""

from __future__ import annotations

import json

import pytest
import torch

from ebu_optim.files import load_tensors

from .crash_loop import KILLS
from .processes import python
from .steps import assert_same


def run(module, folder):
    done = python("-m", f"tests.{module}", folder)
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def crashed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("crash")
    run("crash_loop", folder)
    return folder, json.loads((folder / "report.json").read_text())


def test_killed_at_random_moments_and_restarted_it_ends_with_the_same_bits(crashed):
    folder, report = crashed
    kills = report["random_moments"]["kills"]
    assert len(kills) == KILLS
    assert len({step for _, step, _ in kills}) > 5  # all over the run
    in_a_save = [left for _, _, left in kills if any(name.endswith(".partial") for name in left)]
    assert len(in_a_save) > 5
    whole = torch.load(folder / "whole" / "final.pt", weights_only=True)
    assert whole["opt"]["state"][0].keys() > {"exp_avg", "ebu_anchor", "ebu_fisher"}
    assert len(whole["stats"]) > 3
    for i in range(report["random_moments"]["runs"]):
        killed = folder / f"killed{i}"
        assert_same(torch.load(killed / "final.pt", weights_only=True), whole)
        assert not list((killed / "run").glob(".*")), "nothing of the killed saves lies about"


def test_killed_at_every_moment_of_a_save_the_old_or_the_new_checkpoint_is_there(crashed):
    """That it is whole, and that the next save leaves nothing lying about, is checked in the
    process that kills: `found_new`."""
    _, report = crashed
    for moments in report["every_moment"].values():
        new = [found for _, found in moments]
        assert new == sorted(new), "the old one up to a moment, from then on the new"
        assert False in new
        assert True in new
        (first,) = [i for i, found in enumerate(new) if found and not new[i - 1]]
        assert moments[first - 1][0].startswith("before os.rename"), "that moment is a rename"
    # a power cut: files and folder are on the disk before the rename, the rename itself after it
    what = [moment for moment, _ in report["every_moment"]["3"]]
    rename = next(i for i, m in enumerate(what) if m.startswith("before os.rename"))
    written = max(i for i, m in enumerate(what) if m == "half written")
    assert what[written:rename].count("after fsync") == 5
    assert what[rename:].count("after fsync") == 1


def test_interrupted_by_ctrl_c_a_fisher_and_a_replay_set_keep_what_was_done(tmp_path):
    """Twice each; that neither had come to its end is checked where the signal is sent."""
    run("crash_long", tmp_path)
    for what, batches, once in (("fisher", 12, 3), ("replay", 18, 3)):
        files = [tmp_path / f"{what}_{name}.safetensors" for name in ("whole", "stopped")]
        (a, meta_a), (b, meta_b) = map(load_tensors, files)
        assert_same(a, b)
        assert meta_a == meta_b
        whole, stopped = (len(f.with_suffix(".log").read_text().split()) for f in files)
        assert whole == batches + (what == "fisher") * 2  # the first one is looked at before
        # a batch that was broken off is done again, and no other
        assert stopped <= whole + 2 * once
    names = {
        f"{w}_{n}.{e}"
        for w in ("fisher", "replay")
        for n in ("whole", "stopped")
        for e in ("safetensors", "log")
    }
    assert {p.name for p in tmp_path.iterdir()} == names
