"""`ebu compare`: the means are over targets, then over seeds; published rows are marked; the page
needs nothing else."""

from __future__ import annotations

import csv
import json
import re
from pathlib import Path

import pytest

pytest.importorskip("transformers", reason="transformers comes with the extra text_to_image")

from ebu_optim import cli
from ebu_optim.errors import InputError
from ebu_optim.protocols.compare import Compare, blocks_of, compare
from ebu_optim.report import leaderboard


def row(method: str, seed: int, forget: str, ua: float, ira: float, **more) -> dict:
    kind = "style" if forget[0].isupper() else "object"
    return {
        "model": f"{method}-{forget}-{seed}",
        "label": "unlearncanvas",
        "kind": kind,
        "run": {"method": method, "settings": "a1", "seed": seed},
        "forget": [forget],
        "protocol": {"name": "unlearncanvas", "title": "in words", "notes": ["a note"]},
        "figures": {
            "ua": {"value": ua, "low": 0.0, "high": 1.0},
            "ira": ira,
            "fid_unlearncanvas": {"not_computed": "not computed: not here"},
            "accuracy/Cats": 0.5,
        },
        **more,
    }


ROWS = [
    row("EBU", 1, "Monet", 1.0, 0.9),
    row("EBU", 1, "Picasso", 0.8, 0.7),
    row("EBU", 2, "Monet", 0.6, 0.9),
    row("EBU", 2, "Picasso", 0.4, 0.7),
    row("sum", 1, "Monet", 0.5, 0.8),
    row("EBU", 1, "cats", 0.3, 0.9),
]


@pytest.fixture
def runs(tmp_path) -> Path:
    for name, some in (("a", ROWS[:3]), ("b", ROWS[3:])):
        (tmp_path / name).mkdir()
        (tmp_path / name / "protocols.json").write_text(json.dumps(some))
    return tmp_path


def test_the_mean_is_over_targets_and_then_over_seeds(runs):
    style, thing = compare(
        Compare(runs=[str(runs / "a"), str(runs / "b" / "protocols.json")], output_dir=runs / "o")
    )
    assert (style.title, thing.title) == ("unlearncanvas, style", "unlearncanvas, object")
    ours = [r for r in style.rows if r["published"] is None]
    assert [(r["name"], r["seeds"], r["targets"]) for r in ours] == [
        ("EBU", 2, ["Monet", "Picasso"]),
        ("sum", 1, ["Monet"]),
    ]
    ebu = ours[0]["values"]["ua"]  # 0.9 and 0.5 of the seeds
    assert ebu["value"] == pytest.approx(0.7)
    assert ebu["n"] == 2
    assert ebu["high"] - ebu["value"] == pytest.approx(12.7062 * 0.4 / 2, rel=1e-3)
    assert ours[1]["values"]["ua"] == ROWS[4]["figures"]["ua"]  # one picture set's own interval
    assert "Not every row is of the same targets" in style.notes[0]
    assert leaderboard.ranks([style]) == {
        "forgotten": {"EBU": 1, "sum": 2},
        "kept": {"EBU": 1.5, "sum": 1.5},
    }


def test_published_rows_stand_beside_in_our_units_with_their_source(runs):
    style, thing = blocks_of(ROWS, {})
    (esd,) = [r for r in style.rows if r["name"] == "ESD, published"]
    assert esd["values"]["ua"] == pytest.approx(0.9858)
    assert esd["values"]["fid_unlearncanvas"] == 65.55
    assert esd["published"] == "space OPTML-Group/UnlearnCanvas-Benchmark, assets/uc_result.csv"
    (seot,) = [r for r in thing.rows if r["name"] == "SEOT, published"]
    assert seot["published"].endswith("as another paper copied it")
    changed = [{**r, "label": "unlearncanvas, changed: steps 20"} for r in ROWS]
    assert blocks_of(changed, {})[0].notes[1].startswith("What is changed is no part of")


def test_two_settings_of_a_method_are_two_rows_and_names_may_be_given():
    other = row("EBU", 1, "Monet", 0.1, 0.2, run={"method": "EBU", "settings": "b2", "seed": 1})
    (block,) = blocks_of([ROWS[0], other], {})
    assert [r["name"] for r in block.rows[:2]] == ["EBU (a1)", "EBU (b2)"]
    plain = [row("x", i, "Monet", 0.1 * i, 0.5, run={}) for i in (1, 2)]
    (block,) = blocks_of(plain, {f"x-Monet-{i}": "mine" for i in (1, 2)})
    assert [(r["name"], r["seeds"]) for r in block.rows[:1]] == [("mine", 2)]


def test_the_page_needs_nothing_else(runs, capsys):
    cli.main(["compare", str(runs / "a"), str(runs / "b"), "-o", str(runs / "o")])
    said = capsys.readouterr().out
    assert "| EBU | 0.700 [" in said
    assert "rank, forgotten: EBU 1.00, sum 2.00" in said
    page = (runs / "o" / "index.html").read_text()
    assert not re.search(r"<script|src=\"http|href=\"http|@import", page)
    assert "<svg" in page
    assert "Published, ESD" in page
    assert "not here" in page
    assert "accuracy/Cats" not in page
    found = json.loads((runs / "o" / "compared.json").read_text())
    assert found["blocks"][0]["rows"][0]["values"]["accuracy/Cats"]["value"] == 0.5
    lines = list(csv.DictReader((runs / "o" / "compared.csv").read_text().splitlines()))
    (line,) = [x for x in lines if (x["model"], x["figure"]) == ("sum", "ua")]
    assert (line["value"], line["low"], line["targets"]) == ("0.5", "0.0", "Monet")


@pytest.mark.parametrize("text", [None, "[]", "{}", "no json", '[{"model": "a"}]', "[1]"])
def test_what_is_no_run_is_said(tmp_path, text):
    if text is not None:
        (tmp_path / "protocols.json").write_text(text)
    with pytest.raises(InputError, match=r"RUNS .*: no protocols.json of `ebu evaluate` can be"):
        compare(Compare(runs=[str(tmp_path)], output_dir=tmp_path / "o"))
    assert not (tmp_path / "o").exists()


def test_names_are_pairs(tmp_path):
    with pytest.raises(InputError, match="--names 'mine': give MODEL=NAME"):
        Compare(runs=["a"], names=["mine"], output_dir=tmp_path)
