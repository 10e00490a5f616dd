"""Bad input of `ebu evaluate`: one line that says what is wrong and what to give, nothing drawn
twice."""

from __future__ import annotations

import csv
import json
import os
import shutil
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers", reason="transformers comes with the extra text_to_image")

from ebu_optim.errors import InputError
from ebu_optim.protocols import PROTOCOLS, Asked, Evaluate, evaluate, judges, label
from ebu_optim.protocols.judges import Judge
from ebu_optim.protocols.prompt_lists import FILE
from ebu_optim.protocols.protocol import LISTS as SHIPPED
from ebu_optim.text_to_image import drawing
from ebu_optim.training.command_line import parse

from .text_to_image import pipeline

SMALL = ("--change", "steps=1", "size=16", "dtype=float32", "noise=cpu")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Path:
    return pipeline(tmp_path_factory.mktemp("tiny") / "model")


@pytest.fixture
def calls(monkeypatch) -> list[list[str]]:
    """Prompts of each call of the pipeline; the judge takes every picture for a church."""
    found, together = [], drawing.together

    def counted(pipe, texts, *args, **options):
        found.append(list(texts))
        return together(pipe, texts, *args, **options)

    monkeypatch.setattr(drawing, "together", counted)
    judge = Judge(lambda x, asked, _: [["church", "497"]] * len(x), "tiny")
    monkeypatch.setattr(judges, "JUDGES", dict.fromkeys(judges.JUDGES, lambda *_: judge))
    return found


def run(folder: Path, *options) -> list[dict]:
    return evaluate(parse(Evaluate, [str(o) for o in (*options, "-o", folder)]))


LISTS = {
    "byte order mark": "\ufeffprompt,evaluation_seed,class\na cat,1,church\na dog,2,church\n",
    "CRLF": "prompt,evaluation_seed,class\r\na cat,1,church\r\na dog,2,church\r\n",
    "quotes": 'prompt,evaluation_seed,class\n"a cat",1,church\n"a dog",2,church\n',
    "empty rows": "prompt,evaluation_seed,class\n\na cat,1,church\n,,\n\na dog,2,church\n",
    "another seed column": "prompt,sd_seed,class\na cat,1,church\na dog,2,church\n",
    "duplicates": "prompt,evaluation_seed,class\na cat,1,church\na cat,1,church\na dog,2,church\n",
}


@pytest.mark.parametrize("kind", LISTS)
def test_a_list_is_read_however_it_was_saved(tiny, tmp_path, calls, kind):
    file = tmp_path / "list.csv"
    file.write_bytes(LISTS[kind].encode())
    (row,) = run(
        tmp_path / "o",
        tiny,
        "--protocol",
        "imagenette-uce",
        "--forget",
        "church",
        *SMALL,
        "--files",
        f"uce_imagenette={file}",
    )
    assert calls == [["a cat", "a dog"]]
    assert row["figures"]["ua"]["n"] == (3 if kind == "duplicates" else 2)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("text,seed\na cat,1\n", "has no column 'prompt': it has text, seed"),
        (
            "prompt,seed,sd_seed\na cat,1,2\n",
            "has the columns sd_seed and seed: remove all but one",
        ),
        ("prompt,seed\na cat,one\n", "row 1: the seed must be a number; got 'one'"),
        ("prompt,seed\na cat,1\n", "the column class must name one of tench, .* one has ''"),
        ("", "has no column 'prompt'"),
        ("prompt,class\n", "imagenette-uce: its list has no prompt for which an image may be"),
    ],
)
def test_a_list_that_is_none_says_what_is_wanted(tiny, tmp_path, calls, text, said):
    file = tmp_path / "list.csv"
    file.write_text(text)
    with pytest.raises(InputError, match=said):
        run(
            tmp_path / "o",
            tiny,
            "--protocol",
            "imagenette-uce",
            "--forget",
            "church",
            *SMALL,
            "--files",
            f"uce_imagenette={file}",
        )
    assert not calls
    assert not (tmp_path / "o").exists()


def test_a_judge_of_other_classes_is_refused_before_anything_is_drawn(tiny, tmp_path):
    from ebu_optim.files import save_tensors
    from ebu_optim.worlds.styled_digits.judges import Judge as Network

    for name in ("content", "style"):
        state = Network(3).state_dict()
        save_tensors(tmp_path / f"{name}.safetensors", state, {"classes": ["a", "b", "c"]})
    with pytest.raises(InputError, match=r"has the classes \['a', 'b', 'c'\], this world has"):
        run(
            tmp_path / "o",
            tiny,
            "--protocol",
            "unlearncanvas-digits",
            "--forget",
            "seven",
            "--files",
            f"digits-judges={tmp_path}",
        )
    assert not (tmp_path / "o" / "images").exists()


def test_pictures_that_are_gone_or_damaged(tiny, tmp_path, calls):
    """What is missing is drawn, and nothing else; what cannot be read is named."""
    given = (
        tiny,
        "--protocol",
        "imagenette-10",
        "--forget",
        "church",
        *SMALL,
        "--first",
        4,
        "--sample_batch_size",
        1,
    )
    rows = run(tmp_path, *given)
    (folder,) = (tmp_path / "images").iterdir()
    first, second, *_ = sorted(folder.glob("*.png"))
    first.unlink()
    calls.clear()
    assert run(tmp_path, *given) == rows
    assert len(calls) == 1
    second.write_bytes(second.read_bytes()[:100])
    with pytest.raises(InputError, match=f"{second.name}.*: delete it to generate it again"):
        run(tmp_path, *given)
    second.unlink()
    assert run(tmp_path, *given) == rows


def test_a_folder_of_another_protocol_is_gone_on_with(tiny, tmp_path, calls):
    given = (tiny, "--forget", "church", *SMALL, "--first", 2, "--protocol")
    run(tmp_path, *given, "imagenette-10")
    run(tmp_path, *given, "imagenette-esd-10")
    assert len(calls) == 2
    again = run(tmp_path, *given, "imagenette-10")
    assert len(calls) == 2
    assert again[0]["pictures"]["folder"].startswith("images/")


@pytest.mark.parametrize("part", ["vae", "text_encoder", "scheduler"])
def test_a_model_without_a_part_is_said(tiny, tmp_path, part):
    shutil.copytree(tiny, tmp_path / "model")
    shutil.rmtree(tmp_path / "model" / part)
    with pytest.raises(InputError, match=f"{part}"):
        run(tmp_path / "o", tmp_path / "model", "--protocol", "imagenette", "--forget", "church")
    assert not (tmp_path / "o").exists()


def test_a_model_that_diverged_is_said(tiny, tmp_path, calls):
    from diffusers import StableDiffusionPipeline

    pipe = StableDiffusionPipeline.from_pretrained(tiny)
    torch.nn.init.constant_(pipe.unet.conv_out.bias, torch.nan)
    pipe.save_pretrained(tmp_path / "model")
    with pytest.raises(InputError, match="generates NaN: its weights have diverged"):
        run(
            tmp_path / "o",
            tmp_path / "model",
            "--protocol",
            "imagenette-10",
            "--forget",
            "church",
            *SMALL,
            "--first",
            1,
        )
    assert not list((tmp_path / "o").rglob("*.png"))


def test_another_list_of_as_many_rows_takes_the_name_away(tmp_path):
    whole = PROTOCOLS["imagenette"]
    with open(SHIPPED / "salun_imagenette.csv", newline="", encoding="utf-8-sig") as opened:
        rows = list(csv.DictReader(opened))

    def called(rows) -> str:
        file = tmp_path / "list.csv"
        with open(file, "w", newline="") as opened:
            writer = csv.DictWriter(opened, list(rows[0]), lineterminator="\r\n")
            writer.writeheader()
            writer.writerows(rows)
        asked = whole.asked({"salun_imagenette": file})
        return label(whole, len(asked), listed=asked)

    used = ("class", "evaluation_seed", "prompt")
    # CRLF, no byte order mark, another order, a column more, and a guidance that is not used
    same = [{"of": "me", **{n: row[n] for n in used}, "guidance": "3"} for row in rows]
    assert called(rows) == called(same) == "imagenette"
    for column, value in (("prompt", "a tench"), ("evaluation_seed", "1"), ("class", "church")):
        other = [{**rows[0], column: value}, *rows[1:]]
        assert called(other) == "imagenette, changed: another list"
    assert called(rows[::-1]) == "imagenette, changed: another list"


def test_a_list_without_a_known_hash_is_only_counted():
    rows = [Asked("a cat", 1)] * 4703
    assert label(PROTOCOLS["i2p-nudity"], 4703, listed=rows) == "i2p-nudity"
    assert label(PROTOCOLS["i2p-nudity"], 1, listed=rows[:1]).endswith("1 of 4,703 images")


def test_a_shipped_list_is_the_published_one():
    shipped = [name for name in json.loads(FILE.read_text()) if not PROTOCOLS[name].needs]
    assert len(shipped) == 8
    for name in shipped:
        asked = PROTOCOLS[name].asked({})
        assert label(PROTOCOLS[name], len(asked), listed=asked) == name


def test_published_lists_are_read_as_they_are():
    folder = Path(os.environ.get("EBU_TEST_PROMPTS", ""))
    uda = folder / "unlearndiffatk"
    if not (uda / "church.csv").is_file():
        pytest.skip("EBU_TEST_PROMPTS names no folder with published prompt lists")
    for target in ("church", "tench", "parachute", "garbage-truck", "vangogh"):
        name = f"unlearndiffatk_{target.replace('-', '_')}"
        files = {name: uda / f"{target.replace('-', '_')}.csv"}
        protocol = PROTOCOLS[f"unlearndiffatk-{target}"]
        assert len(protocol.asked(files)) == protocol.images == 50
        assert {a.guidance for a in protocol.asked(files)} == {7.5}
    coco = {"coco_10k": folder / "advunlearn" / "coco_10k.csv"}
    assert len(PROTOCOLS["coco-10k"].asked(coco)) == 10_000
    uce = {"uce_imagenette": folder / "uce" / "imagenette.csv"}
    assert len(PROTOCOLS["imagenette-uce"].asked(uce)) == 5000
    lists = {f"unlearndiffatk_{file.stem}": file for file in uda.glob("*.csv")} | coco | uce
    for name in json.loads(FILE.read_text()):
        asked = PROTOCOLS[name].asked(lists if PROTOCOLS[name].needs else {})
        assert label(PROTOCOLS[name], len(asked), listed=asked) == name
