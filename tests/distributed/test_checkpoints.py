"""Replicated runs: rank 0 writes, every rank goes on with its own random states, all fail alike."""

from __future__ import annotations

from .launch import outcomes


def test_two_ranks_save_load_and_fail_together(tmp_path):
    """That the loaded run goes on bit for bit is asserted on the ranks."""
    first, second = outcomes(2, "checkpoints", tmp_path)
    wanted = {
        "rank 0 cannot write": ("remove the file that is where a folder goes", "rank 0: "),
        "shards": ("torch.distributed.checkpoint", "torch.distributed.checkpoint"),
        "another folder": ("file system that all ranks share", "file system that all"),
        "rank 1 has another model": ("rank 1: ValueError", "does not fit the 'm'"),
        "damaged": ("m.pt is damaged", "m.pt is damaged"),
    }
    assert first.keys() == wanted.keys()
    for name, words in wanted.items():
        for error, word in zip((first[name], second[name]), words, strict=True):
            assert word in error, (name, error)
    assert [p.name for p in (tmp_path / "run").iterdir()] == ["step_00000003"]
