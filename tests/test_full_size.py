"""The benchmark of Stable Diffusion at its real size, every line of it at a tiny one."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

pytest.importorskip("transformers", reason="transformers comes with the extra text_to_image")

from .processes import ROOT, python

SCRIPT = ROOT / "tests" / "benchmarks" / "full_size.py"
CASES = ("cross attention, bf16",)


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="Linux counts its peaks")
def test_a_file_goes_in_and_comes_back_at_a_tiny_size(tmp_path):
    found = tmp_path / "found.json"
    given = ("--tiny", "--cases", *CASES, "--steps", 2, "--threads", 1)
    done = python(SCRIPT, *given, "--folder", tmp_path, "--json", found)
    assert done.returncode == 0, done.stderr[-4000:]
    result = json.loads(found.read_text())
    assert tuple(row["case"] for row in result["rows"]) == CASES
    for row in result["rows"]:
        assert len(row["steps"]) == 2
        assert row["peak"] == max(row["needed"].values()) > row["counted"]["peak"] > 0
        assert all(row["needed"][name] > 0 for name in row["resident"])
        for clock in ("seconds", "processor"):
            whole, *parts = (row["step"][clock][k] for k in ("whole", "passes", "base", "wrapper"))
            assert whole == pytest.approx(sum(parts))
            assert row["wrapper_share"][clock] == pytest.approx(parts[-1] / whole)
        # the average is left out, and nothing else
        assert result["source"]["bytes"] > row["file"]["bytes"]
        assert 0 < row["file"]["changed"] <= row["file"]["trained"] < row["file"]["tensors"]
    assert list(tmp_path.iterdir()) == [found]
