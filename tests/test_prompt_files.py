"""The one reader of prompts, and what the seeds and guidances of rows do."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers", reason="transformers comes with the extra text_to_image")

from PIL import Image
from safetensors.torch import load_file, save_file

from ebu_optim.errors import InputError
from ebu_optim.text_to_image import drawing, results
from ebu_optim.text_to_image.evaluation import evaluate
from ebu_optim.text_to_image.evaluation_options import Evaluation
from ebu_optim.text_to_image.prompt_files import Row, read, rows

from .processes import PATIENCE
from .text_to_image import pipeline

BOM = b"\xef\xbb\xbf"


@pytest.fixture(autouse=True)
def _quiet(monkeypatch):
    monkeypatch.setenv("TQDM_DISABLE", "1")


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return pipeline(tmp_path_factory.mktemp("prompts") / "model")


def written(path: Path, content: bytes) -> str:
    path.write_bytes(content)
    return str(path)


@pytest.mark.parametrize("mark", [b"", BOM], ids=["plain", "mark"])
@pytest.mark.parametrize("end", [b"\n", b"\r\n"], ids=["LF", "CRLF"])
@pytest.mark.parametrize("name", ["a.txt", "a.TXT"])
def test_text_with_any_mark_and_line_end(tmp_path, mark, end, name):
    lines = [b"a cat", b"", b"# not this", b'""', "ein Käfer".encode(), b"a cat"]
    given = written(tmp_path / name, mark + end.join(lines))
    assert read([given, "  a dog "], "--prompts") == ["a cat", "", "ein Käfer", "a dog"]


@pytest.mark.parametrize("mark", [b"", BOM], ids=["plain", "mark"])
@pytest.mark.parametrize(
    ("seed", "guidance"),
    [
        ("evaluation_seed", "evaluation_guidance"),
        ("sd_seed", "sd_guidance_scale"),
        ("seed", "guidance"),
    ],
)
def test_tables_as_they_are_published(tmp_path, mark, seed, guidance):
    text = (
        f'case_number,prompt,{seed},{guidance}\r\n0,"a cat, red",7,7.5\r\n1,a dog,,\r\n2,,3,1\r\n'
    )
    given = written(tmp_path / "a.csv", mark + text.encode())
    assert rows([given], "--prompts") == [Row("a cat, red", 7, 7.5), Row("a dog")]


def test_parquet_is_read_as_csv_is(tmp_path):
    pyarrow = pytest.importorskip("pyarrow", reason="pyarrow comes with the extra data")
    from pyarrow import parquet

    table = pyarrow.table(
        {
            "prompt": ["a cat", None, "a dog"],
            "sd_seed": [3, 4, None],
            "sd_guidance_scale": [7.0, 1.0, float("nan")],
            "image": [b"x"] * 3,
        }
    )
    parquet.write_table(table, tmp_path / "a.parquet")
    given = str(tmp_path / "a.parquet")
    assert rows([given], "--prompts") == [Row("a cat", 3, 7.0), Row("a dog")]


def test_published_lists_are_read(request):
    folder = Path(os.environ.get("EBU_TEST_PROMPTS", ""))
    if not (folder / "salun" / "imagenette.csv").is_file():
        pytest.skip("EBU_TEST_PROMPTS names no folder with published prompt lists")
    found = {p.stem: rows([str(p)], "--prompts") for p in folder.rglob("*.csv")}
    assert found["church"][0] == Row("Old stone church in countryside.", 69922, 7.5)
    assert len(found["church"]) == 50
    assert len(found["coco_10k"]) == 10000
    assert all(row.seed is not None for row in found["coco_10k"])


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", b"text,seed\na,1\n", "has no column 'prompt': it has text, seed"),
        ("a.csv", b"prompt,seed\na,x\n", "row 1: the seed must be a number; got 'x'"),
        ("a.csv", b"prompt,seed\na,1.5\n", "the seed must be a whole number >= 0; got '1.5'"),
        ("a.csv", b"prompt,seed\na,-1\n", "the seed must be a whole number >= 0; got '-1'"),
        ("a.csv", b"prompt,guidance\na,inf\n", "the guidance must be a finite number; got 'inf'"),
        (
            "a.csv",
            b"prompt,seed,sd_seed\na,1,2\n",
            "has the columns sd_seed and seed: remove all but one",
        ),
        ("a.csv", b"prompt\n", "has no prompt"),
        ("a.csv", b"prompt\n\xff\n", "cannot be read: 'utf-8' codec"),
        ("a.txt", b"# nothing\n", "has no prompt"),
        ("a.tsv", b"prompt\na\n", r"is a file; prompts are read from .txt, .csv, .parquet"),
        ("prompts", b"a\n", "is a file; prompts are read from"),
        ("a.parquet", b"PAR1", "a.parquet cannot be read"),
    ],
)
def test_what_is_no_list_of_prompts_is_told(tmp_path, name, content, message):
    if name.endswith("parquet"):
        pytest.importorskip("pyarrow", reason="pyarrow comes with the extra data")
    with pytest.raises(InputError, match=message):
        rows([written(tmp_path / name, content)], "--prompts")
    with pytest.raises(InputError, match=r"--prompts .*gone.csv cannot be read"):
        rows([str(tmp_path / "gone.csv")], "--prompts")


def options(model: Path, out: Path, **more) -> Evaluation:
    given = {"pretrained_model_name_or_path": str(model), "num_inference_steps": 2, **more}
    return Evaluation(output_dir=out, **{"images_per_prompt": 1, **given})


def shown(folder: Path) -> list[bytes]:
    return [Image.open(f).tobytes() for f in sorted((folder / "images").iterdir())]


def test_an_evaluation_draws_a_row_with_its_own_seed_and_guidance(model, tmp_path):
    table = written(tmp_path / "a.csv", b"prompt,seed,guidance\na cat,7,1.5\na cat,9,\na dog,,3\n")
    evaluate(options(model, tmp_path / "o", prompts=[table], images_per_prompt=2, seed=20))
    pipe = drawing.ready(results.load(options(model, tmp_path / "x", prompts=["a"])))
    wanted = [
        ("a cat", 7, 1.5),
        ("a cat", 8, 1.5),
        ("a cat", 9, 7.5),
        ("a cat", 10, 7.5),
        ("a dog", 20, 3.0),
        ("a dog", 21, 3.0),
    ]
    for drawn, (prompt, seed, guidance) in zip(shown(tmp_path / "o"), wanted, strict=True):
        (x,) = drawing.draw(
            pipe,
            [prompt],
            [seed],
            batch=1,
            num_inference_steps=2,
            guidance_scale=guidance,
            height=16,
            width=16,
        )
        alone = x.mul(255).round().clamp(0, 255).to(torch.uint8).permute(1, 2, 0)
        off = torch.frombuffer(bytearray(drawn), dtype=torch.uint8).view(16, 16, 3).int() - alone
        assert off.abs().max() <= 1  # a batch rounds in another way
    told = json.loads((tmp_path / "o" / "evaluation.json").read_text())["protocol"]["options"]
    assert "('a cat', 7, 1.5)" in told["texts"]

    evaluate(options(model, tmp_path / "i", prompts=[table], ignore_row_settings=True, seed=20))
    evaluate(options(model, tmp_path / "p", prompts=["a cat", "a dog"], seed=20))
    assert shown(tmp_path / "i") == shown(tmp_path / "p")


def test_a_prompt_that_would_be_cut_is_refused_unless_that_is_wanted(model, tmp_path):
    long = "a cat and " * 8
    with pytest.raises(InputError, match="shorten it, or give --truncate"):
        evaluate(options(model, tmp_path / "o", prompts=[long]))
    assert not (tmp_path / "o").exists()
    evaluate(options(model, tmp_path / "o", prompts=[long], truncate=True))
    assert len(shown(tmp_path / "o")) == 1


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder"])
def test_weights_that_lack_a_tensor_are_told_in_one_line(tmp_path, part):
    broken = pipeline(tmp_path / "model")
    (file,) = (broken / part).glob("*.safetensors")
    state = load_file(file)
    (gone, *_) = [n for n in state if n.endswith("weight")]
    del state[gone]
    save_file(state, file, {"format": "pt"})
    with pytest.raises(InputError, match=r"the weights lack .*: the file is incomplete"):
        results.load(options(broken, tmp_path / "o", prompts=["a"]))


def test_a_console_that_does_not_know_a_character_ends_nothing():
    code = (
        "from ebu_optim.training import exit_on_input_errors\n"
        "exit_on_input_errors(lambda: print('\\u732b ok'))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        timeout=PATIENCE,
        env={**os.environ, "PYTHONIOENCODING": "cp1252"},
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == rb"\u732b ok"
