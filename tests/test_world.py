"""The measurable world: what its prompts and pictures are, that training resumes and that its
pipeline is one which the other scripts take, and what bad input is told."""

from __future__ import annotations

import importlib
import json
import re
import shutil
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers", reason="transformers comes with the extra text_to_image")

from diffusers import StableDiffusionPipeline
from safetensors.torch import load_file

from ebu_optim.files import save_tensors

from .scripts import run_script

WORLD = Path(__file__).parent.parent / "examples" / "stable_diffusion" / "world"


def module(name: str):
    return importlib.import_module(f".{name}", "ebu_optim.worlds.styled_digits")


def run(script: str | Path, *args) -> tuple[int, str]:
    code, said = run_script(WORLD / script, *args)
    return code or 0, said


def succeed(script: str | Path, *args) -> str:
    code, said = run(script, *args)
    assert code == 0, said
    return said


# -- prompts ------------------------------------------------------------------------------------


def test_every_digit_is_asked_for_in_every_style_by_at_least_three_words():
    c = module("captions")
    assert len(c.CONTENTS) == 10
    assert len(c.STYLES) >= 5
    words = [w.lower() for part in (c.CONTENTS, c.STYLES) for ws in part.values() for w in ws]
    assert len(set(words)) == len(words)  # no word names two concepts
    for part in (c.CONTENTS, c.STYLES):
        assert all(len(ws) >= 3 and ws[0] == name for name, ws in part.items())
    for templates in (c.TRAINED, c.HELD_OUT):
        asked = c.captions(t for t in templates if "{content}" in t and "{style}" in t)
        pairs = {}
        for one in asked:
            pairs.setdefault((one.content, one.style), set()).add(
                (one.content_word, one.style_word, one.template)
            )
        # content and style are independent: each word of the one with each of the other
        assert len(pairs) == 10 * len(c.STYLES)
        assert len({len(found) for found in pairs.values()}) == 1
    for one in c.captions((*c.TRAINED, *c.HELD_OUT)):
        named = {c.concept(w) for w in one.text.replace(",", "").split() if w.lower() in words}
        unnamed = one.style_word is None
        assert named == {one.content, None if unnamed else one.style} - {None}, one
        assert not unnamed or one.style == c.UNNAMED
        assert " a o" not in one.text
        assert " an r" not in one.text


def test_held_out_templates_are_trained_words_in_other_orders():
    c = module("captions")
    trained, held_out = c.captions(c.TRAINED), c.captions(c.HELD_OUT)
    assert not {one.text for one in trained} & {one.text for one in held_out}
    assert all(one.held_out for one in held_out)
    assert not any(one.held_out for one in trained)
    words = [{w for one in part for w in one.text.split()} for part in (trained, held_out)]
    assert {w.strip(",") for w in words[1]} <= {w.strip(",") for w in words[0]}


def test_every_word_is_one_token_and_the_saved_tokenizer_is_the_same(tmp_path):
    from transformers import CLIPTokenizer

    c = module("captions")
    made = c.tokenizer()
    made.save_pretrained(tmp_path)
    loaded = CLIPTokenizer.from_pretrained(tmp_path)
    assert loaded.get_vocab() == made.get_vocab()
    assert loaded.model_max_length == c.LENGTH
    texts = [one.text for one in c.captions((*c.TRAINED, *c.HELD_OUT))]
    for text in texts[::37]:
        words = text.lower().replace(",", " ,").split()
        assert made.tokenize(text) == loaded.tokenize(text) == [f"{w}</w>" for w in words]
        ids = loaded(text).input_ids
        assert loaded.decode(ids, skip_special_tokens=True).split() == words
    ids = c.token_ids(texts, loaded)
    assert ids.shape == (len(texts), c.LENGTH)
    assert int((ids != loaded.eos_token_id).sum(1).max()) < c.LENGTH  # none was cut
    # other words are spelled: the prompt is read, if not understood
    assert loaded.tokenize("cat") == ["c", "a", "t</w>"]
    assert loaded.unk_token_id not in loaded("a cat", add_special_tokens=False).input_ids


def test_prompts_to_remember_do_not_name_what_is_forgotten():
    lines = succeed("captions.py", "--without", "VII", "scarlet").splitlines()
    c = module("captions")
    kept = [one for one in c.captions(c.TRAINED) if one.text in set(lines)]
    assert len(lines) == len(kept) > 1000
    assert {one.content for one in kept} == {*c.CONTENTS, None} - {"seven"}
    assert {one.style for one in kept} == set(c.STYLES) - {"red"}
    few = succeed("captions.py", "--without", "VII", "scarlet", "--number", 50).splitlines()
    assert len(set(few)) == 50
    assert set(few) < set(lines)
    for bad, what in (
        (["cat"], "'cat' names no concept"),
        (["7", "--number", "0"], "--number must be >= 1"),
        ([*c.CONTENTS, *c.STYLES], "leaves no prompt"),
    ):
        code, said = run("captions.py", "--without", *bad)
        assert code == 2
        assert what in said


# -- pictures -----------------------------------------------------------------------------------


def test_styles_are_deterministic_distinct_and_readable():
    images, digits = module("images"), module(".digits")
    few = digits.images()[2][:40]
    drawn = {style: images.draw(few, style) for style in module("captions").STYLES}
    for style, pictures in drawn.items():
        assert pictures.shape == (40, *images.SHAPE)
        assert pictures.min() >= -1
        assert pictures.max() <= 1
        assert torch.equal(pictures, images.draw(few, style))
        # one picture does not depend on the others of its batch
        assert torch.equal(pictures[3:4], images.draw(few[3:4], style))
        others = [(p - pictures).abs().mean() for s, p in drawn.items() if s != style]
        assert min(others) > 0.1, style
        assert images.readability(style) > 0.95, style
    with pytest.raises(ValueError, match=r"style must be one of plain, .*; got 'cubist'"):
        images.draw(few, "cubist")
    with pytest.raises(ValueError, match=r"shape \(n, 1, 8, 8\); got \(40, 8, 8\)"):
        images.draw(few[:, 0], "plain")


def test_world_has_every_digit_in_every_style():
    images, styles = (
        module("images"),
        len(module("captions").STYLES),
    )
    some = images.world("test", 30)
    assert some.pictures.shape == (30 * styles, *images.SHAPE)
    digits = module(".digits").images()[3][:30]
    for k in range(styles):
        assert torch.equal(some.contents[some.styles == k], digits)
    with pytest.raises(ValueError, match='split must be "train" or "test"; got \'all\''):
        images.world("all")


# -- judges -------------------------------------------------------------------------------------


def test_what_is_no_digit_is_none_and_keeps_its_style_if_it_has_one():
    images, judges = module("images"), module("judges")
    some = images.world("test", 20)
    x, styles = some.pictures[::10], some.styles[::10]
    none = len(judges.CLASSES["content"]) - 1
    noise, mixed, blank = judges.others("content", x, styles, 4)
    assert all(y.tolist() == [none] * 4 for _, y in (noise, mixed, blank))
    assert torch.equal(judges.exchanged(mixed[0]), x[:4])
    assert torch.equal(mixed[0][:, :, :16, :16], x[:4, :, 16:, 16:])
    assert all(len(b.flatten(1).unique()) <= 6 for b in blank[0])  # paper alone
    noise, mixed = judges.others("style", x, styles, 4)
    assert noise[1].tolist() == [len(judges.CLASSES["style"]) - 1] * 4
    assert mixed[1].tolist() == styles[:4].tolist()


def test_worn_pictures_are_moved_by_two_pixels_at_most():
    judges = module("judges")
    x = torch.zeros(200, 3, 32, 32)
    x[:, :, 16, 16] = 100.0
    worn = judges.worn(x)
    assert worn.shape == x.shape
    at = worn[:, 0].flatten(1).argmax(1)
    rows, columns = at // 32 - 16, at % 32 - 16
    assert set(rows.tolist()) == set(columns.tolist()) == {-2, -1, 0, 1, 2}


# -- training -----------------------------------------------------------------------------------


def test_a_picture_is_trained_under_prompts_that_ask_for_it():
    c, diffusion = module("captions"), module("diffusion")
    words = c.tokenizer()
    contents, styles = torch.tensor([7, 0]), torch.tensor([4, 0])
    loss = diffusion.Loss(
        torch.stack([torch.zeros(4, 8, 8), torch.ones(4, 8, 8)]),
        contents,
        styles,
        words,
        batch=4000,
        dropout=0.25,
        device="cpu",
        scheduler=diffusion.TextToImage.new_scheduler(),
    )
    seen = {}

    def model(x_t, t, ids):
        seen["ids"] = ids
        return torch.zeros_like(x_t)

    torch.manual_seed(0)
    assert abs(loss(model).item() - 1) < 0.05  # the noise's own variance, mean over C, H, W
    torch.manual_seed(0)
    rows = torch.randint(2, (4000,))
    texts = [words.decode(i, skip_special_tokens=True) for i in seen["ids"]]
    known = {
        words.decode(words(one.text).input_ids, skip_special_tokens=True): one
        for one in c.captions(c.TRAINED)
    }
    empty = [not text.strip() for text in texts]
    assert abs(sum(empty) / 4000 - 0.25) < 0.03
    for row, text, gone in zip(rows.tolist(), texts, empty):
        if not gone:
            one = known[text]
            assert one.style == ("red", "plain")[row]
            assert one.content in (("seven", "zero")[row], None)
    named = {one.content_word for one in map(known.get, texts) if one}
    assert named == {None, *c.CONTENTS["seven"], *c.CONTENTS["zero"]}


FEW = [
    "--max_train_samples",
    12,
    "--autoencoder_steps",
    2,
    "--max_train_steps",
    2,
    "--train_batch_size",
    4,
    "--lr_warmup_steps",
    0,
    "--logging_steps",
    1,
    "--checkpointing_steps",
    1,
]
TEXT = ["--text_encoder_steps", 2]


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """The world after two steps of everything."""
    out = tmp_path_factory.mktemp("world")
    succeed("train.py", *FEW, *TEXT, "--output_dir", out / "base")
    few = [*FEW[:2], *FEW[4:]]
    said = succeed("judges.py", *few, "--output_dir", out / "judges")
    assert "without_digit" in said
    return out


def weights(folder: Path) -> dict[str, torch.Tensor]:
    found = {}
    for file in sorted((folder / "pipeline").glob("*/*.safetensors")):
        found |= {f"{file.parent.name}.{k}": v for k, v in load_file(file).items()}
    return found


def test_pipeline_is_small_and_loads(made):
    pipe = StableDiffusionPipeline.from_pretrained(made / "base" / "pipeline")
    names = ("vae", "text_encoder", "unet")
    counts = {n: sum(p.numel() for p in getattr(pipe, n).parameters()) for n in names}
    assert sum(counts.values()) <= 4_000_000
    facts = json.loads((made / "base" / "pipeline" / "world.json").read_text())
    assert facts["parameters"] == counts
    pipe.set_progress_bar_config(disable=True)
    drawn = pipe("a red 7", num_inference_steps=2, output_type="np").images
    assert drawn.shape == (1, 32, 32, 3)
    assert (made / "base" / "pipeline" / "README.md").read_text().startswith("---")


def test_latents_are_normalised_and_decode_to_the_same_pictures():
    autoencoder, images = (
        module("autoencoder"),
        module("images"),
    )
    torch.manual_seed(0)
    vae, pictures = autoencoder.new_autoencoder().eval(), images.world("train", 2).pictures
    before = autoencoder.encode(vae, pictures)
    decoded = autoencoder.decode(vae, before)
    deviation = vae.encode(pictures).latent_dist.std
    latents = autoencoder.normalise(vae, pictures)
    assert (before.mean((0, 2, 3)).abs() > 0.01).any()
    assert latents.mean((0, 2, 3)).abs().max() < 1e-5
    assert abs(latents.std().item() - 1) < 1e-5
    again = autoencoder.encode(vae, pictures)
    torch.testing.assert_close(again * vae.config.scaling_factor, latents, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(autoencoder.decode(vae, again), decoded, atol=1e-5, rtol=1e-5)
    assert torch.equal(vae.encode(pictures).latent_dist.std, deviation)


def test_what_is_left_out_is_no_picture_of_the_unet(made, tmp_path):
    train, images, c = (
        module("train"),
        module("images"),
        module("captions"),
    )
    pictures = images.world("train", 30)
    for words, there in (
        (["VII"], lambda d, s: d != 7),
        (["red", "3"], lambda d, s: s != 4 and d != 3),
    ):
        seen = train.shown(pictures, [c.concept(w) for w in words])
        rows = list(zip(pictures.contents.tolist(), pictures.styles.tolist()))
        assert seen.tolist() == [there(d, s) for d, s in rows]
    assert train.shown(pictures, []).all()
    name = list(c.CONTENTS)[images.world("train", 12).contents[0]]
    succeed("train.py", *FEW, *TEXT, "--without", name, "--output_dir", tmp_path / "o")
    # the same autoencoder and text encoder, another UNet
    a, b = weights(made / "base"), weights(tmp_path / "o")
    assert {k.split(".")[0] for k in a if not torch.equal(a[k], b[k])} == {"unet"}
    assert f"no image of: {name}" in (tmp_path / "o" / "pipeline" / "README.md").read_text()


def test_the_text_encoder_learns_what_is_asked_for():
    text, c = module("text"), module("captions")
    torch.manual_seed(0)
    words, known = c.tokenizer(), c.captions(c.TRAINED)
    reader, loss = text.Reader(words), text.Loss(words, 64, "cpu")
    opt = torch.optim.AdamW(reader.parameters(), 2e-3)
    assert text.understood(reader, known, words) < 0.1
    for _ in range(80):
        opt.zero_grad()
        loss(reader).backward()
        opt.step()
    assert text.understood(reader, known, words) > 0.5
    drawn = loss.weights * len(known) / loss.weights.sum()
    each = [drawn[[k.template == t for k in known]].sum() for t in c.TRAINED]
    torch.testing.assert_close(
        torch.stack(each), torch.full((len(c.TRAINED),), len(known) / len(c.TRAINED))
    )


def test_a_run_that_is_killed_in_each_part_resumes_to_the_same_bits(made, tmp_path, monkeypatch):
    again = tmp_path / "again"
    shutil.copytree(made / "base", again)
    for name in ("autoencoder", "text", "diffusion"):
        loss, calls = module(name).Loss, []
        with monkeypatch.context() as patched:

            def second(self, model, loss=loss, calls=calls, call=loss.__call__):
                calls.append(1)
                if len(calls) == 2:
                    raise KeyboardInterrupt
                return call(self, model)

            patched.setattr(loss, "__call__", second)
            resume = ["--resume_from_checkpoint", "latest"]
            options = resume if name != "autoencoder" else ["--overwrite_output_dir"]
            code, said = run("train.py", *FEW, *TEXT, *options, "--output_dir", again)
        assert code == 130, said
        assert not (again / "pipeline").exists()
        # nothing of the old run is gone on with
        assert (again / "text_encoder").exists() == (name != "autoencoder")
        assert (again / "diffusion").exists() == (name == "diffusion")
    said = succeed("train.py", *FEW, *TEXT, *resume, "--output_dir", again)
    assert "resuming after step 1" in said
    a, b = weights(made / "base"), weights(again)
    assert a.keys() == b.keys()
    assert all(torch.equal(a[k], b[k]) for k in a)


def test_unlearning_takes_the_pipeline_and_measuring_both(made, tmp_path):
    pytest.importorskip("peft", reason="peft comes with the extra text_to_image")
    succeed(
        WORLD.parent / "unlearn.py",
        "--pretrained_model_name_or_path",
        made / "base" / "pipeline",
        "--forget",
        "a picture of the digit 7",
        "--remember",
        "a picture of the digit 3",
        "",
        "--replay_images",
        2,
        "--surrogate_images",
        2,
        "--num_inference_steps",
        2,
        "--fisher_images",
        2,
        "--fisher_timesteps",
        2,
        "--max_train_steps",
        1,
        "--validation_steps",
        0,
        "--output_dir",
        tmp_path / "gone",
    )
    tables = {}
    for name, folder in (("base", made / "base"), ("gone", tmp_path / "gone")):
        output = tmp_path / f"{name}.json"
        said = succeed(
            "measure.py",
            "--pretrained_model_name_or_path",
            folder / "pipeline",
            "--judges",
            made / "judges",
            "--images_per_pair",
            2,
            "--num_inference_steps",
            1,
            "--output",
            output,
        )
        assert re.search(r"\| content word \| \w+ \|", said)
        tables[name] = json.loads(output.read_text())["measured"]
    assert tables["base"] != tables["gone"]
    for found in tables.values():
        assert found["all"]["all"]["n"] == 2 * 11 * 6
        assert {k: v["n"] for k, v in found["templates"].items()} == {"trained": 66, "held out": 66}
        assert len(found["pair"]) == 60
        assert list(found["content"]) == list(module("captions").CONTENTS)
        assert list(found["style"]) == list(module("captions").STYLES)
        assert sum(v["n"] for v in found["content"].values()) == 120


def test_a_transformer_of_flow_matching_in_place_of_the_unet(made, tmp_path):
    from diffusers import StableDiffusion3Pipeline

    succeed("train.py", *FEW, *TEXT, "--denoiser", "transformer", "--output_dir", tmp_path / "base")
    pipe = StableDiffusion3Pipeline.from_pretrained(tmp_path / "base" / "pipeline")
    facts = json.loads((tmp_path / "base" / "pipeline" / "world.json").read_text())
    size = sum(p.numel() for p in pipe.transformer.parameters())
    assert facts["parameters"]["transformer"] == size <= 4_000_000
    # a caption is in training what it is to the pipeline
    flow, words = module("flow"), module("captions").tokenizer()
    reader = module("text").Reader(words)
    state = pipe.text_encoder.text_model.state_dict()
    reader.text_encoder.load_state_dict(state, strict=True)
    model = flow.Flow(reader.text_encoder)
    model.transformer, model.t5 = pipe.transformer.eval(), pipe.text_encoder_3.eval()
    x, t, caption = torch.randn(1, 4, 8, 8), torch.tensor([500.0]), "a red picture of the digit 7"
    ids = module("captions").token_ids([caption], words)
    told = pipe.encode_prompt(
        caption, None, None, do_classifier_free_guidance=False, max_sequence_length=1
    )
    with torch.no_grad():
        want = pipe.transformer(x, told[0], told[2], t).sample
        torch.testing.assert_close(model(x, t, ids), want)
    succeed(
        WORLD.parent / "unlearn.py",
        "--pretrained_model_name_or_path",
        tmp_path / "base" / "pipeline",
        "--forget",
        "a picture of the digit 7",
        "--remember",
        "a picture of the digit 3",
        "",
        "--forget_loss",
        "relabel",
        "--remember_loss",
        "crossed",
        "--replay_images",
        2,
        "--surrogate_images",
        2,
        "--num_inference_steps",
        2,
        "--forget_images",
        2,
        "--max_train_steps",
        1,
        "--validation_steps",
        0,
        "--output_dir",
        tmp_path / "gone",
    )
    succeed(
        "measure.py",
        "--pretrained_model_name_or_path",
        tmp_path / "gone" / "pipeline",
        "--judges",
        made / "judges",
        "--images_per_pair",
        2,
        "--num_inference_steps",
        1,
        "--output",
        tmp_path / "gone.json",
    )
    assert json.loads((tmp_path / "gone.json").read_text())["measured"]["all"]["all"]["n"] == 132


# -- measuring ----------------------------------------------------------------------------------


def test_figures_by_hand():
    c, measure, judges = (
        module("captions"),
        module("measure"),
        module("judges"),
    )
    asked = [
        c.Caption("", "seven", "red", "VII", "red", c.TRAINED[0]),
        c.Caption("", "seven", "plain", "7", None, c.HELD_OUT[4]),
        c.Caption("", None, "blue", None, "navy", c.TRAINED[10]),
    ]

    def says(*told):
        """A judge who gives picture i the class told[i] with probability 1/2."""
        logits = torch.zeros(3, told[-1])
        for i, k in enumerate(told[:-1]):
            logits[i, k] = torch.tensor(told[-1] - 1.0).log()
        return lambda x: logits

    answers = measure.judge(
        torch.zeros(3, 3, 32, 32), asked, judges.Judges(says(7, 10, 10, 11), says(4, 0, 4, 7), {})
    )
    assert [(a.content, a.style, a.none) for a in answers] == [
        (True, True, False),
        (False, True, True),
        (None, False, True),
    ]
    found = measure.groups(answers)
    assert found["all"]["all"]["content"] == 1 / 2
    assert found["all"]["all"]["style"] == found["all"]["all"]["none"] == 2 / 3
    assert found["all"]["all"]["p_content"] == pytest.approx((0.5 + 0.05) / 2)
    assert found["content word"]["VII"]["content"] == 1
    assert found["content word"]["7"]["content"] == 0
    assert found["style word"]["(plain, unnamed)"]["style"] == 1
    assert "content" not in found["style"]["blue"]
    assert set(found["pair"]) == {"seven red", "seven plain"}
    assert "| style | blue | 1 |  |  | 0.000 | 0.083 | 1.000 |" in measure.table(found, ["style"])


def test_prompts_that_are_measured_are_balanced():
    measure = module("measure")
    asked = measure.choose(8)
    assert asked == measure.choose(8)
    assert asked != measure.choose(8, seed=1)
    assert len(asked) == 8 * 11 * 6
    assert sum(one.held_out for one in asked) == len(asked) // 2
    per_pair = {}
    for one in asked:
        per_pair.setdefault((one.content, one.style), []).append(one.text)
    assert {len(texts) for texts in per_pair.values()} == {8}
    assert all(len(set(t)) == 8 for (content, _), t in per_pair.items() if content)


# -- bad input ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("script", "options", "said"),
    [
        ("train.py", ["--caption_dropout", 1], "--caption_dropout must be in [0, 1); got 1.0"),
        ("train.py", ["--autoencoder_steps", 0], "--autoencoder_steps must be >= 1; got 0"),
        (
            "train.py",
            ["--text_encoder_learning_rate", 0],
            "--text_encoder_learning_rate must be > 0; got 0",
        ),
        ("train.py", ["--autoencoder_learning_rate", 0], "--autoencoder_learning_rate must be > 0"),
        ("train.py", ["--max_train_steps", 0], "--max_train_steps must be >= 1; got 0"),
        ("judges.py", ["--max_train_samples", 0], "--max_train_samples must be >= 1; got 0"),
    ],
)
def test_numbers_that_cannot_be(script, options, said, tmp_path):
    code, found = run(script, *options, "--output_dir", tmp_path / "out")
    assert code == 2
    assert said in found
    assert not (tmp_path / "out").exists()


def test_a_finished_world_is_not_trained_over(made):
    before = weights(made / "base")
    code, said = run("train.py", *FEW, "--output_dir", made / "base")
    assert code == 2
    assert "holds a run" in said
    assert all(torch.equal(v, before[k]) for k, v in weights(made / "base").items())


def test_what_cannot_be_measured(made, tmp_path):
    def told(*args) -> str:
        code, said = run("measure.py", "--output", tmp_path / "x.json", *map(str, args))
        assert code == 2, said
        assert not (tmp_path / "x.json").exists()
        return said.splitlines()[-1]

    base = ["--pretrained_model_name_or_path", made / "base" / "pipeline", "--judges"]
    assert "--images_per_pair must be >= 1" in told(*base, made / "judges", "--images_per_pair", 0)
    assert "content.safetensors is missing: run judges.py" in told(*base, tmp_path)
    assert "is not a diffusers pipeline" in told(
        "--pretrained_model_name_or_path", tmp_path, "--judges", made / "judges"
    )
    assert "images of 64 pixels, and the judges support only 32" in told(
        *base, made / "judges", "--resolution", 64
    )
    from .text_to_image import pipeline

    other = pipeline(tmp_path / "other")
    assert "has another vocabulary than captions.py" in told(
        "--pretrained_model_name_or_path", other, "--judges", made / "judges", "--resolution", 32
    )
    state = load_file(made / "judges" / "style.safetensors")
    (tmp_path / "judges").mkdir()
    for name in ("content", "style"):
        meta = {"classes": ["cat", "dog"], "found": {}}
        save_tensors(tmp_path / "judges" / f"{name}.safetensors", state, meta)
    assert "train the judges again" in told(*base, tmp_path / "judges")
    (tmp_path / "judges" / "content.safetensors").write_bytes(b"no tensors")
    assert "is not a judge of judges.py" in told(*base, tmp_path / "judges")
