"""attack.py: what it asks, what each attack does to a model and what it leaves alone, resuming, and
what bad input is told. The pipelines have random weights."""

from __future__ import annotations

import contextlib
import importlib
import io
import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("transformers", reason="transformers comes with the extra text_to_image")

from diffusers import StableDiffusionPipeline
from safetensors.torch import load_file, save_file

from ebu_optim.errors import InputError
from ebu_optim.files import save_tensors
from ebu_optim.training.command_line import parse

from .text_to_image import pipeline


def module(name: str):
    return importlib.import_module(f".{name}", "ebu_optim.attacks")


def run(*args) -> tuple[int, str]:
    """Exit status and what was said."""
    attack, training, said = module("run"), module(".training"), io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        try:
            training.command(attack.attack, attack.AttackOptions, None, [str(a) for a in args])
        except SystemExit as end:
            return end.code, said.getvalue()
    return 0, said.getvalue()


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


# -- what is asked ------------------------------------------------------------------------------


@pytest.mark.parametrize("words", [["seven"], ["7", "VII"], ["one"], ["red"], ["plain"]])
def test_world_is_asked_in_all_words_and_templates_of_the_concept_once(words):
    a, c = module("prompts"), module(".worlds.styled_digits.captions")
    kind, name = a.concept_of(words)
    forget = a.of_world(words)
    for one in forget:
        assert one.template.count("{}") == 1
        assert one.text in [one.template.replace("{}", w) for w in words]
    wordings = a.reworded(words, {one.text for one in forget})
    assert len(wordings) == 6 - len(words)
    asked = [one.text for one in forget] + [t for w in wordings for t in w.texts]
    every = c.captions((*c.TRAINED, *c.HELD_OUT))
    named = [x.text for x in every if getattr(x, kind) == name and getattr(x, f"{kind}_word")]
    assert sorted(asked) == sorted(named)
    assert not {w.name for w in wordings} & {f"{w}, trained templates" for w in words}
    held_out = [t for w in wordings if "held out" in w.name for t in w.texts]
    assert sorted(held_out) == sorted(x.text for x in every if x.held_out and x.text in named)


def arguments(**options) -> SimpleNamespace:
    return SimpleNamespace(
        **{
            "judge": "nudity",
            "forget": ["cat"],
            "forget_templates": None,
            "paraphrases": [],
            "attacks": ["paraphrase", "inversion"],
            "initializer_token": [],
            "ignore_row_settings": False,
            **options,
        }
    )


def test_elsewhere_prompts_and_paraphrases_are_those_given(tmp_path):
    a = module("prompts")
    (tmp_path / "other.txt").write_text("a photo of cat\n# no prompt\n\na cat\n")
    from .text_to_image import tokenizer

    words = tokenizer(tmp_path / "words")
    found = a.collect(
        arguments(
            forget=["cat", "dog"],
            forget_templates=["an image of {}", "{} in red"],
            paraphrases=["the cat", str(tmp_path / "other.txt")],
        ),
        words,
    )
    assert [one[:2] for one in found.forget] == [
        ("an image of cat", "an image of {}"),
        ("cat in red", "{} in red"),
        ("an image of dog", "an image of {}"),
        ("dog in red", "{} in red"),
    ]
    assert [w.texts for w in found.paraphrases] == [["the cat"], ["a photo of cat"], ["a cat"]]


def test_rows_of_a_table_bring_their_seed_and_guidance(tmp_path):
    from .text_to_image import tokenizer

    (tmp_path / "a.csv").write_text("prompt,sd_seed,sd_guidance_scale\na cat,7,1.5\na dog,,\n")
    a, words = module("prompts"), tokenizer(tmp_path / "words")
    given = {"forget": [str(tmp_path / "a.csv")], "paraphrases": ["the cat"]}
    found = a.collect(arguments(**given), words).forget
    assert found == [("a cat", "{}", 7, 1.5), ("a dog", "{}", None, None)]
    plain = a.collect(arguments(**given, ignore_row_settings=True), words).forget
    assert [one[2:] for one in plain] == [(None, None)] * 2


# -- what the attacks do ------------------------------------------------------------------------


def bright(pictures: torch.Tensor) -> torch.Tensor:
    return pictures.double().mean((1, 2, 3)).sigmoid()


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Path:
    return pipeline(tmp_path_factory.mktemp("tiny") / "base")


@pytest.fixture
def attack(tiny, tmp_path):
    """An attack on a tiny pipeline by itself, with its target made."""
    args = parse(
        module("run").AttackOptions,
        [
            "--pretrained_model_name_or_path",
            str(tiny),
            "--base_model",
            str(tiny),
            "--forget",
            "cat",
            "--forget_templates",
            "an image of {}",
            "a {} in red",
            "--judge",
            "nudity",
            "--paraphrases",
            "the cat",
            "a blue cat",
            "--attack_images",
            "3",
            "--target_images",
            "6",
            "--num_inference_steps",
            "2",
            "--inversion_steps",
            "40",
            "--inversion_learning_rates",
            "0.05",
            "--train_batch_size",
            "6",
            "--relearn_max_steps",
            "12",
            "--relearn_learning_rate",
            "0.005",
            "--output_dir",
            str(tmp_path / "out"),
        ],
    ).resolved()
    m, r = module("model"), module(".text_to_image.results")
    looked = module(".text_to_image.pipelines").look(args)
    models = [m.Attacked(r.load(args), looked, args, torch.device("cpu")) for _ in "ab"]
    questions = module("prompts").collect(args, looked.tokenizer)
    judge = module("judges").Judge(bright, {"judge": "how bright it is"})
    made = module("attacks").Attack(args, *models, questions, judge, [])
    for name in ("target", "p_f"):
        made.known(name, made.make(name))
    return made


def state(model) -> dict[str, torch.Tensor]:
    parts = {n: model.parts[n] for n in ("unet", "vae", "text_encoder")}
    return {f"{n}.{k}": v.clone() for n, m in parts.items() for k, v in m.state_dict().items()}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def loss_on_target(attack, unet, embeddings) -> float:
    """Of all pictures, each with its embedding, over the same 64 draws of noise."""
    latents, numbers = attack.pairs(attack.rows())
    with torch.no_grad():
        return sum(
            attack.denoise(
                unet,
                latents,
                {"encoder_hidden_states": embeddings[numbers]},
                torch.Generator().manual_seed(1000 + k),
            ).item()
            for k in range(64)
        )


def test_the_target_is_the_bases_pictures_with_their_prompts_and_a_look_repeats(attack):
    found = attack.looks["target"]
    assert found.tensors["latents"].shape == (6, 4, 8, 8)
    again = attack.base.latents(attack.base.encode([x.text for x in attack.drawn]), 1)
    assert torch.equal(found.tensors["latents"], again)
    assert found.tensors["prompts"].tolist() == list(range(6))
    # half of the six are of each prompt
    assert sorted(x.text for x in attack.drawn) == ["a cat in red"] * 3 + ["an image of cat"] * 3
    # model and base are the same here, and looked at in the same way
    assert attack.looks["p_f"].values["p_f"] == found.values["p_f"]
    # other noise than the one that the target was drawn from
    assert not torch.equal(
        attack.model.latents(attack.model.encode(["a cat"]), attack.args.seed),
        attack.model.latents(attack.model.encode(["a cat"]), attack.args.seed + 1),
    )


def test_a_paraphrase_is_judged_alone_and_the_worst_is_told(attack):
    found = attack.make("paraphrase")
    each = found.said["wordings"]
    assert set(each) == {"the cat", "a blue cat"}
    pictures = attack.model.pictures(attack.model.latents(attack.model.encode(["the cat"] * 3), 0))
    assert each["the cat"]["value"] == pytest.approx(bright(pictures).mean().item())
    values = [e["value"] for e in each.values()]
    assert found.values["paraphrase"]["value"] == pytest.approx(sum(values) / 2)
    assert found.values["paraphrase"]["n"] == 6
    assert found.values["paraphrase_worst"]["value"] == max(values)


@pytest.mark.parametrize("masks", [False, True])
@pytest.mark.parametrize("pad", [None, "a</w>"])  # SD 1.x pads with the end, SD 2.x with a word
def test_a_known_word_in_the_new_ones_place_is_the_prompt(attack, pad, masks, monkeypatch):
    m, model = module("model"), attack.model
    words, encoder = model.tokenizers["tokenizer"], model.text_encoders[0]
    monkeypatch.setattr(encoder.config, "use_attention_mask", masks, raising=False)
    if pad:
        words.pad_token = pad
    number = words("cat", add_special_tokens=False).input_ids[0]
    word = encoder.get_input_embeddings().weight[number].detach()
    templates = ["a photo of {}", "{} in red"]
    found = m.NewWord(model, templates, word).embeddings(torch.arange(2))
    assert torch.equal(found, model.encode([t.format("cat") for t in templates]))


def test_inversion_lowers_the_loss_by_a_new_embedding_and_changes_nothing_else(attack, tmp_path):
    m, model = module("model"), attack.model
    before, known = state(model), dict(model.tokenizers["tokenizer"].get_vocab())
    (initial,) = m.initial_words(model, [], 0).values()
    vectors, losses = module("textual_inversion").learn(attack, initial, 0.05, [20, 40])
    assert len(losses) == 40
    assert set(vectors) == {20, 40}
    assert same(before, state(model))
    assert known == model.tokenizers["tokenizer"].get_vocab()
    assert not any(p.requires_grad for p in model.unet.parameters())
    templates = [x.template for x in attack.drawn]
    fixed = []
    for vector in (initial, vectors[20], vectors[40]):
        embeddings = m.NewWord(model, templates, vector).embeddings(torch.arange(6))
        fixed.append(loss_on_target(attack, model.unet, embeddings))
    assert fixed[0] > fixed[1] > fixed[2]
    # what diffusers itself makes of the word is the same
    save_file({"<attack>": vectors[40]}, tmp_path / "word.safetensors")
    pipe = StableDiffusionPipeline.from_pretrained(attack.args.pretrained_model_name_or_path)
    pipe.load_textual_inversion(tmp_path / "word.safetensors")
    theirs = pipe.encode_prompt("an image of <attack>", "cpu", 1, False)[0]
    ours = m.NewWord(model, ["an image of {}"], vectors[40]).embeddings(torch.tensor([0]))
    torch.testing.assert_close(ours, theirs)
    # and the concept's own embedding in that place is the prompt with the concept
    cat = m.initial_words(model, ["cat"], 0)["cat"]
    word = m.NewWord(model, ["an image of {}"], cat).embeddings(torch.tensor([0]))
    torch.testing.assert_close(word, model.encode(["an image of cat"]))


def test_the_strongest_of_several_starts_and_learning_rates_counts(attack):
    attack.args = replace(
        attack.args,
        inversion_learning_rates=[0.01, 0.3],
        initializer_token=["cat"],
        inversion_steps=10,
    )
    found = attack.make("inversion")
    runs = found.said["runs"]
    tried = [(r["start"], r["learning_rate"]) for r in runs]
    assert tried == [("random", 0.01), ("random", 0.3), ("cat", 0.01), ("cat", 0.3)]
    last = [r["p_f"][10] for r in runs]
    assert len(set(last)) == 4
    assert found.values["inversion_10"]["value"] == max(last)
    best = tried[last.index(max(last))]
    assert (found.said["start"], found.said["learning_rate"]) == best


def test_relearning_trains_a_copy_of_the_unet_alone_until_half_of_the_base(attack, monkeypatch):
    model, before = attack.model, state(attack.model)
    looks, unets = iter([0.2, 0.25, 0.3, 0.6, 0.9]), []

    def look(_model, _embeddings, unet=None):
        unets.append({k: v.clone() for k, v in unet.state_dict().items()})
        return {"value": next(looks), "low": 0.0, "high": 1.0, "n": 3}, torch.zeros(3, 3, 16, 16)

    monkeypatch.setattr(attack, "look", look)
    attack.looks["target"].values["p_f"] = {"value": 0.9}
    attack.looks["p_f"].values["p_f"] = {"value": 0.1, "low": 0.0, "high": 1.0, "n": 3}
    found = attack.make("relearn")
    assert [r["step"] for r in found.said["curve"]] == [0, 1, 2, 5, 10]
    # half of 0.9, between 0.3 after 5 steps and 0.6 after 10
    assert found.values["relearn_steps"] == {
        "reached": True,
        "steps": pytest.approx(7.5),
        "within": 10,
    }
    assert found.values["relearn_10"]["value"] == 0.6
    assert same(before, state(model))
    embeddings = model.encode([x.text for x in attack.drawn])
    lost = loss_on_target(attack, model.unet, embeddings)
    own = {k: v.clone() for k, v in model.unet.state_dict().items()}
    model.unet.load_state_dict(unets[-1])
    assert loss_on_target(attack, model.unet, embeddings) < lost
    model.unet.load_state_dict(own)


def test_relearning_that_does_not_get_there_says_so(attack, monkeypatch):
    score = {"value": 0.1, "low": 0.0, "high": 1.0, "n": 3}
    monkeypatch.setattr(attack, "look", lambda *_: (score, torch.zeros(1, 3, 16, 16)))
    attack.looks["target"].values["p_f"] = {"value": 0.9}
    attack.looks["p_f"].values["p_f"] = score
    found = attack.make("relearn")
    assert [r["step"] for r in found.said["curve"]] == [0, 1, 2, 5, 10, 12]
    assert found.values["relearn_steps"] == {"reached": False, "steps": None, "within": 12}


def test_a_row_is_drawn_with_its_own_seed_and_guidance(attack):
    model, Asked = attack.model, module("prompts").Asked
    one, other = Asked("a cat", "a {}", 7, 1.5), Asked("a dog", "a {}")
    embeddings = model.encode([one.text, one.text, other.text])
    drawn = model.latents(embeddings, 3, asked=[one, one, other])
    for row, seed in ((0, 7), (1, 8)):  # where it comes again, from the next seed
        alone = model.latents(embeddings[:1], 99, asked=[one._replace(seed=seed)])
        assert torch.equal(drawn[row : row + 1], alone)
    assert not torch.equal(drawn[0], drawn[1])
    dearer = model.latents(embeddings[:1], 99, asked=[one._replace(guidance=3.0)])
    assert not torch.equal(drawn[:1], dearer)
    usual = model.latents(embeddings, 3, asked=[other] * 3)
    assert torch.equal(usual, model.latents(embeddings, 3))


def test_nan_is_told_before_it_counts_as_forgotten(attack):
    model = attack.model
    model.unet.conv_out.bias.data.fill_(torch.nan)
    with pytest.raises(InputError, match="generates NaN: its weights have diverged"):
        attack.make("p_f")
    model.unet.conv_out.bias.data.zero_()
    attack.make("p_f")
    model.vae.decoder.conv_out.bias.data.fill_(torch.nan)
    with pytest.raises(InputError, match="generates NaN: its weights have diverged"):
        attack.make("p_f")


# -- what is attacked ---------------------------------------------------------------------------


def test_changed_tensors_and_loras_are_put_into_the_base(tiny, tmp_path):
    from peft import LoraConfig

    r, save = module(".text_to_image.results"), module(".text_to_image.save")

    def load(folder: Path):
        model = module(".text_to_image.pipelines").Model(pretrained_model_name_or_path=str(folder))
        return r.load(model, str(tiny)).unet

    unet = load(tiny)
    own = {k: v.clone() for k, v in unet.state_dict().items()}
    name = next(k for k in own if "attn2.to_k" in k)
    (tmp_path / "changed").mkdir()
    save_file({name: own[name] + 1}, tmp_path / "changed" / "unet_changed.safetensors")
    found = load(tmp_path / "changed").state_dict()
    assert [k for k in own if not torch.equal(own[k], found[k])] == [name]
    torch.testing.assert_close(found[name], own[name] + 1)

    unet.add_adapter(LoraConfig(r=2, lora_alpha=2, target_modules=[name.removesuffix(".weight")]))
    layers = save.lora_layers(unet)
    for k in layers:
        layers[k] = torch.randn_like(layers[k])
    StableDiffusionPipeline.save_lora_weights(tmp_path / "lora", layers)
    found = load(tmp_path / "lora").state_dict()
    assert found.keys() == own.keys()
    a, b = (next(v for k, v in layers.items() if f"lora_{x}" in k) for x in "AB")
    torch.testing.assert_close(found[name], own[name] + b @ a)
    assert same(
        {k: v for k, v in own.items() if k != name}, {k: v for k, v in found.items() if k != name}
    )

    save_file({"no.such": torch.ones(1)}, tmp_path / "changed" / "unet_changed.safetensors")
    with pytest.raises(InputError, match=r"does not fit .* no such no\.such"):
        load(tmp_path / "changed")


# -- the judges ---------------------------------------------------------------------------------


def test_imagenette_and_nudity_give_a_figure_for_each_picture(monkeypatch):
    j = module("judges")

    class Network:
        indices = torch.arange(10) * 2
        model = torch.nn.Linear(1, 1)

        def __init__(self, **options):
            assert options["over"] == "imagenet"

        def __call__(self, pictures):
            logits = torch.zeros(len(pictures), 20)
            logits[0, 4] = torch.tensor(19.0).log()  # a half for the third class
            return logits

    monkeypatch.setattr(j, "ImagenetteClassifier", Network)
    args = SimpleNamespace(
        judge="imagenette",
        imagenette_class="cassette player",
        imagenette_over="imagenet",
        imagenette_weights=None,
    )
    judge = j.load(args, None, "cpu")
    assert judge.score(torch.zeros(2, 3, 8, 8)).tolist() == pytest.approx([0.5, 0.05])
    args.imagenette_class = "cat"
    with pytest.raises(InputError, match="--imagenette_class must be"):
        j.load(args, None, "cpu")

    asked = j.JudgeOptions(
        judge="nudity",
        nudity_threshold=0.3,
        nudity_colours="file",
        nudity_labels=["intimate", "BELLY_EXPOSED"],
    )

    def score(pictures, labels, threshold, colours):
        assert (len(labels), labels[-1], colours) == (6, "BELLY_EXPOSED", "file")
        assert pictures.dtype == torch.uint8  # bright floats would be refused
        seen = [bool(p.float().mean() / 127.5 - 1 > threshold) for p in pictures]
        return {"per_image": seen, "not_computed": None, "protocol": {"threshold": threshold}}

    monkeypatch.setattr(j, "nudity_score", score)
    judge = j.load(asked, None, "cpu")
    found = judge.score(torch.tensor([0.0, 1.0]).view(2, 1, 1, 1).expand(2, 3, 8, 8))
    assert (found.dtype, found.tolist()) == (torch.bool, [False, True])
    monkeypatch.setattr(j, "nudity_score", lambda *_, **__: {"not_computed": "no such package"})
    with pytest.raises(InputError, match="--judge nudity: no such package"):
        j.load(asked, None, "cpu")


def test_the_nudity_judge_opens_and_looks_at_a_picture_without_a_dark_pixel():
    pytest.importorskip("nudenet", reason="nudenet comes with the extra nudity")
    judge = module("judges").load(module("judges").JudgeOptions(judge="nudity"), None, "cpu")
    assert judge.score(torch.ones(1, 3, 64, 64)).tolist() == [False]


# -- the whole script, in the world -------------------------------------------------------------


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    """Two pipelines of the world and its judges, nothing of them trained."""
    out = tmp_path_factory.mktemp("world")
    d, j = module(".worlds.styled_digits.diffusion"), module(".worlds.styled_digits.judges")
    words = module(".worlds.styled_digits.captions").tokenizer()
    for seed, name in enumerate(("base", "gone")):
        torch.manual_seed(seed)
        model = d.TextToImage(module(".worlds.styled_digits.text").Reader(words).text_encoder)
        vae = module(".worlds.styled_digits.autoencoder").new_autoencoder()
        model.pipeline(vae, words).save_pretrained(out / name)
    for name, classes in j.CLASSES.items():
        meta = {"classes": list(classes), "found": {}}
        save_tensors(
            out / "judges" / f"{name}.safetensors", j.Judge(len(classes)).state_dict(), meta
        )
    return out


def options(world: Path, output: Path, forget: str = "seven") -> list:
    return [
        "--pretrained_model_name_or_path",
        world / "gone",
        "--base_model",
        world / "base",
        "--forget",
        forget,
        "--judge",
        "world",
        "--judges",
        world / "judges",
        "--attack_images",
        2,
        "--target_images",
        4,
        "--num_inference_steps",
        1,
        "--inversion_steps",
        3,
        "--relearn_max_steps",
        10,
        "--train_batch_size",
        2,
        "--target_dir",
        output.parent / "shared",
        "--output_dir",
        output,
    ]


def test_a_killed_run_goes_on_with_the_next_attack_to_the_same_result(world, tmp_path, monkeypatch):
    before = contents(world / "gone")
    code, said = run(*options(world, tmp_path / "whole"))
    assert code == 0, said
    whole = json.loads((tmp_path / "whole" / "attacks.json").read_text())
    expected = {"p_f", "paraphrase", "paraphrase_worst", "inversion_3", "relearn_10"}
    assert set(whole["values"]) == {*expected, "relearn_steps"}
    for key in expected:
        v = whole["values"][key]
        assert 0 <= v["low"] <= v["value"] <= v["high"] <= 1
    assert set(whole["values"]["relearn_steps"]) == {"reached", "steps", "within"}
    assert len(whole["details"]["paraphrase"]["wordings"]) == 5
    (word,) = load_file(tmp_path / "whole" / "learned_word.safetensors").values()
    assert word.shape == (96,)

    attacks = module("attacks")
    with monkeypatch.context() as patched:
        patched.setitem(
            attacks.ATTACKS, "relearn", lambda _: (_ for _ in ()).throw(KeyboardInterrupt)
        )
        # the target is not made again
        patched.setattr(attacks.Attack, "target", None)
        code, said = run(*options(world, tmp_path / "killed"))
    assert code == 130, said
    assert not (tmp_path / "killed" / "attacks.json").exists()
    with monkeypatch.context() as patched:
        patched.setitem(attacks.ATTACKS, "inversion", None)
        code, said = run(*options(world, tmp_path / "killed"), "--seed", 1)
        assert code == 2
        assert "belongs to another model or other options" in said
        code, said = run(*options(world, tmp_path / "killed"))
    assert code == 0, said
    again = json.loads((tmp_path / "killed" / "attacks.json").read_text())
    assert again == whole
    pictures = [(tmp_path / n / "pictures.png").read_bytes() for n in ("whole", "killed")]
    assert pictures[0] == pictures[1]

    code, said = run(*options(world, tmp_path / "whole"))
    assert code == 2
    assert "holds finished attacks: replace them with --overwrite" in said
    few = ["--attacks", "paraphrase", "--overwrite"]
    code, said = run(*options(world, tmp_path / "whole"), *few)
    assert code == 0, said
    again = json.loads((tmp_path / "whole" / "attacks.json").read_text())["values"]
    assert set(again) == {"p_f", "paraphrase", "paraphrase_worst"}
    assert again["paraphrase"] == whole["values"]["paraphrase"]
    assert not (tmp_path / "whole" / "learned_word.safetensors").exists()
    assert contents(world / "gone") == before


def test_own_pictures_of_the_target(world, tmp_path):
    from PIL import Image

    (tmp_path / "pictures").mkdir()
    for i in range(3):
        Image.new("RGB", (40, 36), (90 * i, 50, 20)).save(tmp_path / "pictures" / f"{i}.png")
    code, said = run(
        *options(world, tmp_path / "out"),
        "--instance_data_dir",
        tmp_path / "pictures",
        "--attacks",
        "relearn",
    )
    assert code == 0, said
    found = json.loads((tmp_path / "out" / "attacks.json").read_text())
    assert found["details"]["target"] == {"pictures": "3 of a folder"}


# -- bad input ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("extra", "told"),
    [
        (["--forget", "cat"], "'cat' names no concept of this world"),
        (["--forget", "seven", "red"], "--forget names the concepts red, seven"),
        (["--judges", "{tmp}"], "content.safetensors is missing: run judges.py"),
        (["--instance_data_dir", "{tmp}"], "no image of the target"),
        (["--initializer_token", "cat"], "--initializer_token 'cat' is 3 tokens (c a t</w>)"),
        (["--initializer_token", ""], "--initializer_token '' is 0 tokens"),
        (["--pretrained_model_name_or_path", "{tmp}"], "is not a diffusers pipeline"),
        (["--num_inference_steps", "1001"], "--num_inference_steps must be <= 999, the model's"),
        (["--paraphrases", "a seven " * 20], "tokens, begin and end included"),
        (["--forget_templates", "a {} " + "red " * 20], "tokens, begin and end included"),
        (["--forget_templates", "a picture"], '--forget_templates needs exactly one "{}" in each'),
        (["--relearn_max_steps", "0"], "--relearn_max_steps must be >= 1; got 0"),
        (["--inversion_learning_rates", "0.1", "0"], "--inversion_learning_rates must be > 0"),
        (["--resolution", "64"], "images of 64 pixels, and --judge world supports only 32"),
    ],
)
def test_bad_input_is_told_before_anything_is_made(world, tmp_path, extra, told):
    (tmp_path / "empty").mkdir()
    extra = [e.format(tmp=tmp_path / "empty") if e == "{tmp}" else e for e in extra]
    code, said = run(*options(world, tmp_path / "out"), *extra)
    assert code == 2, said
    assert told in said
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "shared").exists()


def test_a_folder_of_something_else_or_in_use_is_refused(world, tmp_path):
    from ebu_optim.files import locked

    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.tex").write_text("years of work")
    code, said = run(*options(world, tmp_path / "other"), "--overwrite")
    assert code == 2
    assert "is in use by something else (thesis.tex)" in said
    (tmp_path / "held").mkdir()
    with locked(tmp_path / "held" / ".lock", tmp_path / "held"):
        code, said = run(*options(world, tmp_path / "held"))
    assert code == 2
    assert "--output_dir is in use" in said


def test_a_base_must_be_named_and_draw_the_target(tiny, world, tmp_path, monkeypatch):
    code, said = run(
        "--pretrained_model_name_or_path",
        world / "gone",
        "--forget",
        "seven",
        "--judge",
        "world",
        "--output_dir",
        tmp_path / "out",
    )
    assert code == 2
    assert "--base_model is not given" in said
    code, said = run(*options(world, tmp_path / "out"), "--base_model", tiny)
    assert code == 2
    assert "generates images of 16 pixels from latents (4, 8, 8)" in said
    assert "give the base of this model" in said
    j = module("judges")
    nothing = j.Judge(lambda x: torch.zeros(len(x), dtype=torch.bool), {"judge": "blind"})
    monkeypatch.setattr(j, "load", lambda *_: nothing)
    code, said = run(*options(world, tmp_path / "out"))
    assert code == 2
    assert "the judge finds the target in no image that the base generates" in said
