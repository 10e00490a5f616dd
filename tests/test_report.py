"""The report: complete or refused, whole or not at all, and alone in a real browser."""

from __future__ import annotations

import io
import json
import math
import re
import shutil
import xml.etree.ElementTree as ET
from html.parser import HTMLParser

import pytest
import torch
from PIL import Image

from ebu_optim.metrics.protocol import CLASS_WISE, PROTOCOL
from ebu_optim.report import fid_values, limit_rows, write_report
from ebu_optim.report.cells import cell, columns
from ebu_optim.report.plots import line_chart, log_ticks, pixels, png, ticks

HOSTILE = '<script>document.title = "owned"</script><img src="https://example.invalid/x.png">'


def report(**changed):
    g = torch.Generator().manual_seed(0)
    before = torch.rand(3, 4, 1, 8, 8, generator=g) * 2 - 1
    protocol = {part: dict.fromkeys(PROTOCOL[part], "said") for part in CLASS_WISE}
    protocol["data"]["name"] = HOSTILE
    protocol["unlearning"]["settings"] = {"alpha": 0.6, "delta": [0.5, 0.5]}
    return {
        "title": "Digits without 0 & more",
        "rows": [
            {"name": "base model", "values": {"p_f": 0.98, "ra": 0.99, "inversion_100": 1.0}},
            {"name": "noise", "values": {"p_f": 0.029}},
            {
                "name": "EBU | added",
                "values": {
                    "relearn_steps": {"more_than": 200},
                    HOSTILE: 3,
                    "p_f": {"value": 1.7e-7, "low": 0.0, "high": 0.0712, "n": 50},
                    "ra": {"mean": 0.984, "std": 0.0041},
                    "fid": {"not_computed": "no weights"},
                    "inversion_100": torch.tensor(0.25),
                },
            },
        ],
        "protocol": protocol,
        "curves": [
            {
                "title": "P_f over steps",
                "x": "step",
                "y": "P_f",
                "series": {"EBU": [(0, 0.98), (25, 0.3), (50, 0.01)], HOSTILE: [(0, 1), (50, 0)]},
                "limits": {"noise": 0.029},
            }
        ],
        "grids": [
            {
                "title": f"Before and after {HOSTILE}",
                "rows": ["0", "1", "2"],
                "forgotten": ["0"],
                "columns": {"before": before, "after": before.flip(0)},
            }
        ],
        "notes": HOSTILE,
        "command": "python x.py --a 'b < c'",
        **changed,
    }


def test_the_folder_is_whole(tmp_path):
    page = write_report(tmp_path / "r", **report())
    files = sorted(str(p.relative_to(tmp_path / "r")) for p in (tmp_path / "r").rglob("*.*"))
    words = "before_and_after_script_document_title_o"
    assert files == [
        f"pictures/0_{words}_after.png",
        f"pictures/0_{words}_before.png",
        "plots/0_p_f_over_steps.svg",
        "report.html",
        "results.json",
        "results.md",
    ]
    assert page == tmp_path / "r" / "report.html"
    found = json.loads((tmp_path / "r" / "results.json").read_text())
    assert found["rows"][2]["values"]["inversion_100"] == 0.25
    assert found["protocol"]["unlearning"]["settings"]["alpha"] == 0.6
    assert found["notes"] == [HOSTILE]
    text = (tmp_path / "r" / "results.md").read_text()
    table = [line for line in text.splitlines() if line.startswith("| ")]
    assert len({len(re.split(r"(?<!\\)\|", line)) for line in table}) == 1
    assert "1.7e-07 [0.000, 0.071]" in text
    assert "0.984 ± 0.004" in text
    assert "> 200" in text
    assert "FID: no weights" in text
    for link in re.findall(r"\]\(([^)]+)\)", text):
        assert (tmp_path / "r" / link).is_file()
    ET.parse(tmp_path / "r" / files[2])  # noqa: S314


class Page(HTMLParser):
    """Tags, their attributes, and the cells of the first table by row."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.rows, self.open = [], [], False
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag == "tr":
            self.rows.append([])
        self.open = tag in ("td", "th")
        if self.open:
            self.rows[-1].append("")

    def handle_data(self, data):
        if self.open and self.rows:
            self.rows[-1][-1] += data.strip()


def test_the_page_is_its_own_world_and_says_everything(tmp_path):
    text = write_report(tmp_path / "r", **report()).read_text()
    page = Page(text)
    assert not [tag for tag, _ in page.tags if tag in ("script", "link", "iframe", "object")]
    for tag, attributes in page.tags:
        for name in ("src", "href", "srcset", "action"):
            assert attributes.get(name, "data:").startswith("data:"), tag
    images = [a for tag, a in page.tags if tag == "img"]
    assert [a["alt"] for a in images[:3]] == [
        "before: 4 images of 0 (forgotten)",
        "after: 4 images of 0 (forgotten)",
        "before: 4 images of 1",
    ]
    assert page.rows[:7] == [
        ["axis", "measure", "base model", "noise", "EBU | added"],
        ["forgotten", "P_f", "0.980", "0.029", "1.7e-07"],
        ["kept", "RA", "0.990", "-", "0.984 ± 0.004"],
        ["FID", "-", "-", "not computed"],
        ["deep", "inversion, 100 steps", "1.000", "-", "0.250"],
        ["relearn_steps", "-", "-", "> 200"],
        ["other", HOSTILE, "-", "-", "3.0000"],
    ]
    assert "<small>[0.000, 0.071]</small>" in text
    for part in CLASS_WISE:
        assert f"Protocol: {part}" in text
    assert "alpha: 0.6; delta: 0.5, 0.5" in text


def test_many_models_are_rows(tmp_path):
    rows = [{"name": f"m{i}", "values": {"p_f": i / 10, "ra": 1}} for i in range(7)]
    page = Page(write_report(tmp_path / "r", **report(rows=rows)).read_text())
    assert page.rows[:3] == [
        ["model", "forgotten", "kept"],
        ["P_f", "RA"],
        ["m0", "0.000", "1.000"],
    ]
    assert page.rows[8] == ["m6", "0.600", "1.000"]


def test_pictures_are_what_was_drawn():
    x = torch.tensor([-1.0, 0.0, 1.0, 0.5]).view(2, 1, 1, 2)
    strip = pixels(x)
    assert strip.shape == (1, 5, 3)
    assert strip[0, :, 0].tolist() == [0, 128, 128, 255, 191]  # the third is the gap
    assert pixels(x, width=8).shape == (4, 8 + 2 + 8, 3)
    big = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16)
    assert pixels(big, at_most=2)[..., 0].tolist() == [[60, 68], [188, 196]]
    g = torch.Generator().manual_seed(0)
    x = torch.randint(256, (7, 5, 3), generator=g).to(torch.uint8)
    with Image.open(io.BytesIO(png(x))) as opened:
        assert opened.mode == "RGB"
        assert torch.equal(
            torch.frombuffer(bytearray(opened.tobytes()), dtype=torch.uint8), x.flatten()
        )


def test_charts_put_points_where_they_belong():
    curve = {"title": "t", "x": "x", "y": "y", "series": {"a": [(0, 0), (10, 1)]}}
    root = ET.fromstring(line_chart(curve))  # noqa: S314
    name = "{http://www.w3.org/2000/svg}"
    circles = [(float(c.get("cx")), float(c.get("cy"))) for c in root.iter(name + "circle")]
    assert circles == [(62, 254), (606, 14)]
    assert root.find(name + "desc").text == "y over x. a: from 0 to 1"
    assert ticks(0, 1) == pytest.approx([0, 0.2, 0.4, 0.6, 0.8, 1])
    assert ticks(-3, 290, 8) == [0, 50, 100, 150, 200, 250]
    line_chart({**curve, "series": {"a": [(5, 2)]}, "limits": {"l": 2}})  # one point, no range


def test_a_log_scale_has_its_own_distances_and_ticks():
    curve = {
        "title": "t",
        "x": "x",
        "y": "y",
        "x_scale": "log",
        "series": {"a": [(1, 0), (10, 1), (1000, 0)]},
    }
    root = ET.fromstring(line_chart(curve))  # noqa: S314
    name = "{http://www.w3.org/2000/svg}"
    across = [float(c.get("cx")) for c in root.iter(name + "circle")]
    assert across == pytest.approx([62, 62 + (606 - 62) / 3, 606], abs=0.05)
    assert log_ticks(1, 1000) == pytest.approx([1, 10, 100, 1000])
    assert log_ticks(3, 60) == pytest.approx([5, 10, 20, 50])
    with pytest.raises(ValueError, match="leave those points out"):
        line_chart({**curve, "series": {"a": [(0, 0), (10, 1)]}})


def test_cells():
    assert cell("p_f", None) == "-"
    assert cell("p_f", 0) == "0.000"
    assert cell("p_f", 4e-4) == "4.0e-04"
    assert cell("fid", 12.345) == "12.35"
    assert cell("ut", {"value": 2}) == "2.00"
    assert cell("note", "as printed") == "as printed"
    speed = {"reached": True, "steps": 47.5, "seconds": 3.614}
    assert [cell(k, speed) for k in ("unlearn_steps", "ut")] == ["47.5", "3.61"]
    speed = {"reached": False, "steps": None, "within": 200.0, "within_seconds": 12.5}
    assert [cell(k, speed) for k in ("unlearn_steps", "ut")] == ["> 200", "> 12.50"]
    assert columns([{"values": {"b": 1, "ut": 1}}, {"values": {"ra": 1, "a": 1, "p_f": 1}}]) == [
        "p_f",
        "ra",
        "ut",
        "b",
        "a",
    ]
    table = {"p_f": {"value": 0.1, "noise": 0.2, "base": 0.9}, "ra": {"value": 1, "noise": 0.3}}
    assert limit_rows(table) == [
        {"name": "base model", "values": {"p_f": 0.9}},
        {"name": "noise", "values": {"p_f": 0.2, "ra": 0.3}},
    ]


def test_what_fid_returns_has_a_place_in_a_row():
    found = {"fid": 2.5, "kid_mean": 0.1, "kid_std": 0.2, "not_computed": None, "protocol": {}}
    assert fid_values(found) == {"fid": 2.5, "kid_mean": 0.1}
    found = {
        "fid": None,
        "kid_mean": None,
        "kid_std": None,
        "not_computed": "not computed, because",
    }
    assert [cell(k, v) for k, v in fid_values(found).items()] == ["not computed"] * 2


def test_nothing_is_replaced_unasked_and_an_error_leaves_the_old_one(tmp_path):
    folder = tmp_path / "r"
    write_report(folder, **report())
    with pytest.raises(FileExistsError, match="overwrite=True"):
        write_report(folder, **report())
    old = (folder / "results.json").read_bytes()
    bad = report()
    bad["curves"][0]["series"]["EBU"] = [(0, math.nan)]
    with pytest.raises(ValueError, match="NaN"):
        write_report(folder, **bad, overwrite=True)
    assert (folder / "results.json").read_bytes() == old
    assert [p.name for p in tmp_path.iterdir()] == ["r"]
    write_report(folder, **report(title="new"), overwrite=True)
    assert json.loads((folder / "results.json").read_text())["title"] == "new"
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "results.json").write_text("[]")
    with pytest.raises(FileExistsError, match="in use by something else"):
        write_report(tmp_path / "other", **report(), overwrite=True)


def one_grid(images):
    return {"title": "g", "rows": ["0"], "columns": {"x": images}}


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"protocol": {}}, "the protocol leaves .* things unsaid"),
        ({"rows": []}, "at least one row"),
        ({"rows": [{"name": "a"}]}, "row 0 must have name and values"),
        ({"rows": [{"name": "a", "values": {"p_f": math.nan}}]}, "may not hold NaN or Inf"),
        ({"rows": [{"name": "a", "values": {"p_f": {"mean": math.inf, "std": 0}}}]}, "hold Infini"),
        ({"grids": [one_grid(torch.zeros(2, 1, 1, 8, 8))]}, "its column 'x' must have shape"),
        ({"grids": [one_grid(torch.zeros(1, 2, 4, 8, 8))]}, "C of 1 or 3"),
    ],
)
def test_bad_input_is_named_and_nothing_is_written(tmp_path, changed, message):
    with pytest.raises(ValueError, match=message):
        write_report(tmp_path / "r", **report(**changed))
    assert list(tmp_path.iterdir()) == []


@pytest.fixture(scope="module")
def browser():
    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright drives the browser")
    path = shutil.which("chromium") or shutil.which("google-chrome")
    if path is None:
        pytest.skip("no chromium on this machine (apt-get install chromium)")
    with sync_api.sync_playwright() as p:
        running = p.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield running
        running.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_in_a_browser_it_asks_nothing_runs_nothing_and_shows_everything(tmp_path, browser, scheme):
    path = write_report(tmp_path / "r", **report())
    page = browser.new_page(color_scheme=scheme, viewport={"width": 900, "height": 700})
    asked, errors = [], []
    page.on("request", lambda r: asked.append(r.url))
    page.on("pageerror", lambda e: errors.append(str(e)))
    page.on("console", lambda m: errors.append(m.text))
    page.goto(path.as_uri(), wait_until="networkidle")
    assert [url for url in asked if not url.startswith("data:")] == [path.as_uri()]
    assert errors == []
    assert page.title() == "Digits without 0 & more"  # the hostile text ran nowhere
    assert HOSTILE in page.inner_text("main")
    shown = page.evaluate(
        "[...document.images].map(i => [i.complete, i.naturalWidth, i.width, i.alt])"
    )
    assert len(shown) == 6
    for complete, natural, width, alt in shown:
        assert complete
        assert natural == 4 * 8 + 3
        assert width == 4 * natural
        assert alt
    assert page.locator("svg").count() == 1
    assert page.locator("svg").bounding_box()["height"] > 200
    # no wider than the window, whatever the table needs
    assert page.evaluate("document.documentElement.scrollWidth") <= 900
    ink, paper = (
        page.evaluate(f"getComputedStyle(document.body).{name}")
        for name in ("color", "backgroundColor")
    )
    assert contrast(ink, paper) > 7
    assert (luminance(paper) < 0.1) == (scheme == "dark")
    page.close()


def luminance(rgb: str) -> float:
    """WCAG's relative luminance."""
    values = [int(v) / 255 for v in re.findall(r"\d+", rgb)[:3]]
    r, g, b = (v / 12.92 if v <= 0.03928 else ((v + 0.055) / 1.055) ** 2.4 for v in values)
    return 0.2126 * r + 0.7152 * g + 0.0722 * b


def contrast(a: str, b: str) -> float:
    low, high = sorted((luminance(a), luminance(b)))
    return (high + 0.05) / (low + 0.05)
