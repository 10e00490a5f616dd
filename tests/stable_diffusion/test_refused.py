"""What unlearn.py refuses, and what it says."""

from __future__ import annotations

import json
import re
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("transformers", reason="transformers comes with the extra text_to_image")
pytest.importorskip("peft", reason="peft comes with the extra text_to_image")

from diffusers import (
    DDIMScheduler,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from safetensors.torch import load_file

from ebu_optim.baselines import closed_forms
from ebu_optim.closed_form import gram, influential, invariants, rece, speed, uce
from ebu_optim.diffusion import Adversary
from ebu_optim.errors import InputError
from ebu_optim.text_to_image.families import Conditions
from ebu_optim.text_to_image.prompts import Prompts

from ..steps import NAMES
from ..text_to_image import LENGTH
from .script import (
    PAGE,
    REQUIRED,
    ROOT,
    SCRIPTS,
    hub_error,
    module,
    run,
    succeed,
    unlearn,
    weights,
)


def refused(match: str):
    return pytest.raises(InputError, match=match)


CHECKER = ["stable_diffusion", "StableDiffusionSafetyChecker"]


def test_a_model_that_cannot_be_unlearned_is_told_before_anything_is_loaded(made, tmp_path):
    def broken(name: str, change) -> Path:
        shutil.copytree(made / "base", tmp_path / name)
        change(tmp_path / name)
        return tmp_path / name

    def config(folder: Path, file: str, **values) -> None:
        path = folder / file
        path.write_text(json.dumps({**json.loads(path.read_text()), **values}))

    def unsafe(folder: Path) -> None:
        config(folder, "model_index.json", safety_checker=CHECKER)
        (folder / "safety_checker").mkdir()
        (folder / "safety_checker" / "pytorch_model.bin").touch()

    cases = {
        "is not a diffusers pipeline: model_index.json is missing": tmp_path,
        "is not a complete safetensors file": Path(__file__),
        "the subfolder vae is missing": broken("a", lambda f: shutil.rmtree(f / "vae")),
        "with one text encoder and a UNet": broken(
            "b", lambda f: config(f, "model_index.json", text_encoder_2=["transformers", "X"])
        ),
        "its unet is a UNet2DModel, not a UNet2DConditionModel": broken(
            "c", lambda f: config(f, "model_index.json", unet=["diffusers", "UNet2DModel"])
        ),
        "has no text_encoder": broken(
            "d", lambda f: config(f, "model_index.json", text_encoder=[None, None])
        ),
        "9 channels and the VAE makes 4": broken(
            "e", lambda f: config(f, "unet/config.json", in_channels=9)
        ),
        "prediction_type is 'sample'": broken(
            "f", lambda f: config(f, "scheduler/scheduler_config.json", prediction_type="sample")
        ),
        "has no safetensors weights; it has config.json": broken(
            "g", lambda f: (f / "unet" / "diffusion_pytorch_model.safetensors").unlink()
        ),
        "tokens and the text encoder": broken(
            "h", lambda f: config(f, "text_encoder/config.json", vocab_size=49408)
        ),
        "text embeddings of 32, its text encoder makes 16": broken(
            "i", lambda f: config(f, "unet/config.json", cross_attention_dim=32)
        ),
        "scheduler is incomplete": broken(
            "j", lambda f: (f / "scheduler" / "scheduler_config.json").unlink()
        ),
        # read when the result is saved, that is, after the hours
        "the subfolder safety_checker is missing": broken(
            "k", lambda f: config(f, "model_index.json", safety_checker=CHECKER)
        ),
        "safety_checker has no safetensors weights": broken("l", unsafe),
    }
    for message, folder in cases.items():
        command = unlearn(made, tmp_path / "o")
        command[1] = folder
        code, said = run(*command)
        assert code == 2, (message, said)
        assert message in said
        assert "Traceback" not in said
    assert not (tmp_path / "o").exists()


def test_mistakes_are_told_in_one_line_before_any_time_is_spent(made, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("mine")
    (tmp_path / "empty.txt").write_text("# nothing\n")
    out = tmp_path / "o"
    cases = {
        f"has {LENGTH + 1} tokens, begin and end included, and the tokenizer takes {LENGTH}": [
            "--remember",
            " ".join(["cat"] * (LENGTH - 1)),
        ],
        "--remember 'cat' is also a prompt to forget": ["--remember", "a dog", "cat"],
        "--remember 'CAT' is also a prompt to forget": ["--remember", "CAT"],  # CLIP lowers it
        "--surrogate_prompt 'cat' is also a prompt to forget": ["--surrogate_prompt", "cat"],
        "--surrogate_concept 'cat' is also a prompt to forget": ["--surrogate_concept", "cat"],
        "--surrogate_concept and --surrogate_prompt: give one": [
            "--surrogate_concept",
            "dog",
            "--surrogate_prompt",
            "a dog",
        ],
        "--surrogate_pairing each: --forget has 1 and --surrogate_concept 2; give one for each": [
            "--surrogate_pairing",
            "each",
            "--surrogate_concept",
            "dog",
            "dog",
        ],
        "the empty prompt is the unconditional model": ["--forget", ""],
        "needs exactly one": ["--forget_templates", "a photo"],
        "empty.txt has no prompt": ["--remember", tmp_path / "empty.txt"],
        "none.txt cannot be read": ["--forget", tmp_path / "none.txt"],
        "attn9: the denoiser has no such Linear or Conv2d layer; their names end in": [
            "--train_modules",
            "lora",
            "--lora_target_modules",
            "to_k",
            "attn9",
        ],
        "--train_modules xlayer selects no parameter of this UNet": ["--train_modules", "xlayer"],
        "is in use by something else": ["--output_dir", tmp_path / "mine"],
        "--resolution must be a multiple of 4": ["--resolution", 18],
        "--variant fp16; it has": ["--variant", "fp16"],
        "SPM trains its own adapters": ["--method", "spm", "--train_modules", "full"],
        "--save_as lora: --train_modules xattn": ["--save_as", "lora"],
        "--surrogate folder and --surrogate_dir go together": ["--surrogate", "folder"],
        "no image (": ["--surrogate", "folder", "--surrogate_dir", tmp_path / "mine"],
        "--fisher_timesteps must be even": ["--fisher_timesteps", 3],
        "--forget_loss: esd has its own forget loss": [
            "--method",
            "esd",
            "--forget_loss",
            "relabel",
        ],
        "--method salun: remember_weight": [
            "--method",
            "salun",
            "--method_options",
            '{"remember_weight": -1}',
        ],
        "--method joint has no option alpha": ["--method", "joint", "--alpha", 0.5],
        "--alpha must be in [0, 1]; got 2.0": ["--alpha", 2],
        "--guided_steps must be >= 2": ["--guided_steps", 1],
        "--mixed_precision fp16 needs a GPU": ["--mixed_precision", "fp16", "--cpu"],
        # with Stable Diffusion's steps_offset DDIM's 1000 steps begin at t = 1000
        "--num_inference_steps must be <= 999, the model's; got 1000": [
            "--num_inference_steps",
            1000,
        ],
        "--guided_steps must be <= 999": ["--method", "esd", "--guided_steps", 1001],
        "--validation_inference_steps must be <= 999": ["--validation_inference_steps", 1000],
        "--guidance_scale: Expected float. Got value: nan": ["--guidance_scale", "nan"],
        "--guided_scale: Expected float. Got value: inf": ["--guided_scale", "inf"],
        "--validation_guidance_scale must be finite": ["--validation_guidance_scale", -1],
        "--lora_alpha must be finite, > 0": ["--train_modules", "lora", "--lora_alpha", 0],
        "--condition_noise must be finite, >= 0; got -1.0": ["--condition_noise", -1],
        "--condition_noise: not possible with --method esd": [
            "--method",
            "esd",
            "--condition_noise",
            1,
        ],
        "--adversary_steps must be >= 0; got -1": ["--adversary_steps", -1],
        "--adversaries must be >= 1; got 0": ["--adversary_steps", 1, "--adversaries", 0],
        "--adversary_restart must be >= 1": ["--adversary_steps", 1, "--adversary_restart", 0],
        "--adversary_learning_rate must be > 0 and finite; got 0.0": [
            "--adversary_steps",
            1,
            "--adversary_learning_rate",
            0,
        ],
        "--adversary_weight must be > 0 and finite; got 0.0": [
            "--adversary_steps",
            1,
            "--adversary_weight",
            0,
        ],
        "--adversaries needs --adversary_steps, of which there are none": ["--adversaries", 2],
        "--adversary_prompts needs --adversary_steps": ["--adversary_prompts", "a cat"],
        f"--adversary_prompts: the prompt {' '.join(['cat'] * LENGTH)!r}... has": [
            "--adversary_steps",
            1,
            "--adversary_prompts",
            " ".join(["cat"] * LENGTH),
        ],
        "--adversary_steps: --method fine_tune has no forget loss": [
            "--method",
            "fine_tune",
            "--adversary_steps",
            1,
        ],
        "--relearner_steps must be >= 0; got -1": ["--relearner_steps", -1],
        "--relearner_learning_rate must be > 0 and finite; got 0.0": [
            "--relearner_steps",
            1,
            "--relearner_learning_rate",
            0,
        ],
        "--relearner_weight must be > 0 and finite; got -1.0": [
            "--relearner_steps",
            1,
            "--relearner_weight",
            -1,
        ],
        "--relearner_weight needs --relearner_steps, of which there are none": [
            "--relearner_weight",
            2,
        ],
        "--relearner_learning_rate needs --relearner_steps": ["--relearner_learning_rate", 1],
        "--relearner_steps: --method fine_tune has no forget loss": [
            "--method",
            "fine_tune",
            "--relearner_steps",
            1,
        ],
        "--warm_start uce: --train_modules selfattn does not train all": [
            "--warm_start",
            "uce",
            "--train_modules",
            "selfattn",
        ],
        "--warm_start uce: not possible with --method rece, RECE, because it is the same": [
            "--method",
            "rece",
            "--warm_start",
            "uce",
        ],
        "--train_modules lora: not possible with --method uce, UCE, because it edits": [
            "--method",
            "uce",
            "--train_modules",
            "lora",
        ],
        "--quantize int8: not possible with --method uce": [
            "--method",
            "uce",
            "--quantize",
            "int8",
        ],
        "--forget_loss relabel: not possible with --method uce, UCE, because it has no loss": [
            "--method",
            "uce",
            "--forget_loss",
            "relabel",
        ],
        "--adversary_steps 1: not possible with --method speed": [
            "--method",
            "speed",
            "--adversary_steps",
            1,
        ],
        "--relearner_steps 1: not possible with --method speed": [
            "--method",
            "speed",
            "--relearner_steps",
            1,
        ],
        "--save_as lora: UCE has no adapters": ["--method", "uce", "--save_as", "lora"],
        "UCE takes no step and has no checkpoints; give latest": [
            "--method",
            "uce",
            "--resume_from_checkpoint",
            tmp_path / "step_7",
        ],
        "--method uce: ridge must be finite and > 0; got -1": [
            "--method",
            "uce",
            "--method_options",
            '{"ridge": -1}',
        ],
        "--method uce has no option rounds to set": [
            "--method",
            "uce",
            "--method_options",
            '{"rounds": 2}',
        ],
        "--warm_start rece: spm does not train all": ["--warm_start", "rece", "--method", "spm"],
        "--hub_model_id needs --push_to_hub": ["--hub_model_id", "me/model"],
        "there is no such folder": ["--resume_from_checkpoint", tmp_path / "step_7"],
    }
    for message, wrong in cases.items():
        code, said = run(*unlearn(made, out, *wrong))
        assert code == 2, (message, said)
        assert message in said, said
        assert "Traceback" not in said
    assert [p.name for p in (tmp_path / "mine").iterdir()] == ["thesis.txt"]


def test_modules_that_select_nothing(made):
    unet = UNet2DConditionModel.from_pretrained(made / "base" / "unet")
    for _, child in list(unet.named_children()):
        for name, block in list(child.named_modules()):
            if name.endswith("attn1"):
                parent = child.get_submodule(name.rpartition(".")[0])
                parent.attn1 = torch.nn.Identity()
            del block
    with refused("--train_modules selfattn selects no parameter of this UNet"):
        module("modules").choose(
            unet, SimpleNamespace(method="ebu_added", train_modules="selfattn")
        )
    assert all(p.requires_grad for p in unet.parameters())
    with refused("no Transformer2DModel"):
        module("modules").spm_layers(torch.nn.Linear(2, 2))


def test_spm_samples_in_eval_mode(made, tmp_path, monkeypatch):
    losses, modes = module("objectives"), []

    def denoised(model, *args, of=losses.partly_denoised, **kwargs):
        modes.append(model.training)
        return of(model, *args, **kwargs)

    monkeypatch.setattr(losses, "partly_denoised", denoised)
    succeed(*unlearn(made, tmp_path / "o", "--method", "spm", "--max_train_steps", 1))
    assert modes == [False]


def test_noise_is_on_the_forgotten_condition_and_not_on_what_it_is_compared_with(
    made, tmp_path, monkeypatch
):
    losses, seen = module(".diffusion.objectives"), []

    def relabelled(model, x, labels, other, *args, **kwargs):
        clean = model.class_embedding.weight
        seen.extend((model.class_embedding(c) != clean[c]).any(1).tolist() for c in (labels, other))
        return losses_of(model, x, labels, other, *args, **kwargs)

    losses_of = losses.relabel_loss
    monkeypatch.setattr(losses, "relabel_loss", relabelled)
    succeed(
        *unlearn(
            made,
            tmp_path / "o",
            "--method",
            "salun",
            "--surrogate_prompt",
            "dog",
            "--condition_noise",
            1,
            "--max_train_steps",
            1,
        )
    )
    assert seen == [[True], [False]]


def test_adversaries_begin_at_given_prompts(made, tmp_path, monkeypatch):
    seen = []
    step = Adversary.step

    def noted(self, attack):
        step(self, attack)
        seen.append((self.vectors[0].detach(), self.embedding.weight, self.start))

    monkeypatch.setattr(Adversary, "step", noted)
    succeed(
        *unlearn(
            made,
            tmp_path / "o",
            "--adversary_steps",
            1,
            "--adversary_prompts",
            "a photo of a cat",
            "--adversary_learning_rate",
            1e-6,
        )
    )
    texts = ["cat", "", "a dog", "a red car", "a photo of a cat"]  # shown ones are among them
    vector, table, start = seen[0]
    assert len(table) == len(texts)
    torch.testing.assert_close(vector, table[-1], rtol=0, atol=1e-4)
    assert torch.equal(start, table[-1:])
    assert len(seen) == 2


@pytest.mark.parametrize("kind", ["uce", "rece"])
def test_a_warm_start_begins_at_the_edit_in_closed_form(kind, made, tmp_path):
    still = ["--warm_start", kind, "--learning_rate", 1e-12, "--surrogate_prompt", "dog"]
    still += ["--remember", "a red car", ""]
    succeed(*unlearn(made, tmp_path / "o", *still))
    pipe = StableDiffusionPipeline.from_pretrained(made / "base")
    texts = ["cat", "dog", "a red car", ""]
    given = pipe.tokenizer(texts, padding="max_length", max_length=LENGTH, return_tensors="pt")
    with torch.no_grad():
        hidden = pipe.text_encoder(given.input_ids)[0]
    ends = [max(len(pipe.tokenizer(t).input_ids) - 2, 0) for t in texts]
    cat, dog, car, empty = hidden[range(4), ends].split(1)
    keep, read = torch.cat([car, empty]), ("attn2.to_k.weight", "attn2.to_v.weight")
    base, found = weights(made / "base"), weights(tmp_path / "o" / "pipeline")
    edit = uce(cat, dog, keep)
    if kind == "rece":
        sums = gram(w for n, w in base.items() if n.endswith(read))
        edit = rece(sums, hidden[0], hidden[1], keep, start=edit)
    for name, w in base.items():
        led = (w.double() @ edit).float() if name.endswith(read) else w
        torch.testing.assert_close(found[name], led, rtol=1e-4, atol=1e-5)
    assert any((found[n] - w).abs().max() > 1e-3 for n, w in base.items() if n.endswith(read))


def read_as(pipe, texts):
    """The last tokens of prompts (the beginning of the empty one), and all tokens."""
    given = pipe.tokenizer(texts, padding="max_length", max_length=LENGTH, return_tensors="pt")
    with torch.no_grad():
        hidden = pipe.text_encoder(given.input_ids)[0].double()
    ends = [max(len(pipe.tokenizer(t).input_ids) - 2, 0) for t in texts]
    return hidden[range(len(texts)), ends], hidden


CLOSED = ["--surrogate_prompt", "dog", "--remember", "a red car", "a person", ""]


@pytest.mark.parametrize("method", ["uce", "rece", "speed"])
def test_an_edit_in_closed_form_is_a_method_of_its_own(method, made, tmp_path):
    own = ["--sets_dir", tmp_path / "o" / "sets"]
    said = succeed(*unlearn(made, tmp_path / "o", "--method", method, *CLOSED, *own))
    assert "sets in" not in said
    assert not list((tmp_path / "o").glob("**/checkpoints"))
    kept = [f.name.partition("-")[0] for f in (tmp_path / "o" / "sets").iterdir()]
    assert kept == ["text"]
    pipe = StableDiffusionPipeline.from_pretrained(tmp_path / "o" / "pipeline")
    (cat, dog, *keep), hidden = read_as(pipe, ["cat", "dog", "a red car", "a person", ""])
    keep, pair = torch.stack(keep), (cat[None], dog[None])
    base, found = weights(made / "base"), weights(tmp_path / "o" / "pipeline")
    ends = tuple(f"{end}.weight" for end in closed_forms[method].edits)
    edited = {n: w.double() for n, w in base.items() if n.endswith(ends)}
    edit = uce(*pair, keep)
    if method == "rece":
        edit = rece(gram(edited.values()), hidden[0], hidden[1], keep, start=edit)
    for name, w in edited.items():
        new = found[name].double()
        if method == "speed":
            chosen = influential(w, *pair, keep)
            assert 0 < len(chosen) < len(keep)
            edit = speed(*pair, chosen, invariants(hidden[-1]))
            torch.testing.assert_close(new @ chosen.T, w @ chosen.T, rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(new @ hidden[-1][0], w @ hidden[-1][0], rtol=1e-4, atol=1e-4)
        # the concept is read as what takes its place, up to the ridge
        before, after = ((m @ cat - w @ dog).norm() for m in (w, new))
        if method != "rece":  # its rounds edit further embeddings, which move this one again
            assert after < 0.5 * before
        torch.testing.assert_close(new, w @ edit, rtol=1e-4, atol=1e-5)
    assert all(torch.equal(found[n], w) for n, w in base.items() if n not in edited)
    report = json.loads((tmp_path / "o" / "unlearn.json").read_text())
    assert report["remember"] == ["a red car", "a person", ""]
    assert (
        report["settings"].items()
        >= {"speed": {"threshold": 0.1}, "uce": {"ridge": 0.5}}.get(method, {"rounds": 3}).items()
    )
    assert report["options"]["max_train_steps"] == "0"
    assert report["memory_counted"].keys() == {"peak", "prompts"}


def test_an_edit_in_closed_form_is_the_same_in_every_form_and_with_its_options(made, tmp_path):
    more = ["--method", "uce", *CLOSED, "--method_options", '{"ridge": 0.01}']
    for form in ("pipeline", "changed", "single"):
        succeed(*unlearn(made, tmp_path / form, *more, "--save_as", form))
    again = unlearn(made, tmp_path / "changed", *more, "--save_as", "changed")
    succeed(*again, "--resume_from_checkpoint", "latest")
    whole = weights(tmp_path / "pipeline" / "pipeline")
    part = load_file(tmp_path / "changed" / "changed" / "unet_changed.safetensors")
    assert part.keys() == {
        n for n in whole if n.endswith(("attn2.to_k.weight", "to_v.weight")) and "attn2" in n
    }
    assert all(torch.equal(t, whole[n]) for n, t in part.items())
    pipe = StableDiffusionPipeline.from_single_file(
        tmp_path / "single" / "single" / "single.safetensors", config=str(made / "base")
    )
    assert all(torch.equal(t, whole[n]) for n, t in pipe.unet.state_dict().items())
    base = weights(made / "base")
    (cat, dog), _ = read_as(StableDiffusionPipeline.from_pretrained(made / "base"), ["cat", "dog"])
    for name, w in part.items():
        new, old = w.double(), base[name].double()
        assert (new @ cat - old @ dog).norm() < 0.1 * (old @ cat - old @ dog).norm()


def test_speed_without_a_null_space_names_options(made):
    """Of random embeddings, as those of the small text encoder never fill their last direction."""
    unet = UNet2DConditionModel.from_pretrained(made / "base" / "unet")
    before = {n: w.clone() for n, w in unet.state_dict().items()}
    texts = ["cat", "dog", "", *(f"a {'red ' * i}car" for i in range(5))] + ["a car"] * 55
    g = torch.Generator().manual_seed(0)
    table = Conditions.of(torch.randn(len(texts), LENGTH, 16, generator=g))
    prompts = Prompts(texts, [0], [1], [*range(3, len(texts))], 2, [0], {0: [1]})
    words = StableDiffusionPipeline.from_pretrained(made / "base").tokenizer
    with refused(
        r"--method speed: threshold=0.1: in all 16 .* Give fewer prompts to keep, or a "
        r"larger threshold, e.g. --method_options '{\"threshold\": 1}'"
    ):
        module("edits").edit("speed", unet, table, prompts, words)
    assert all(torch.equal(w, before[n]) for n, w in unet.state_dict().items())
    module("edits").edit("speed", unet, table, prompts, words, {"threshold": 1})
    assert any(not torch.equal(w, before[n]) for n, w in unet.state_dict().items())


def test_a_warm_started_run_is_resumed_bit_for_bit(made, tmp_path):
    more = ["--warm_start", "uce", "--remember_loss", "crossed", "--checkpointing_steps", 1]
    more += ["--max_train_steps"]
    succeed(*unlearn(made, tmp_path / "whole", *more, 3))
    succeed(*unlearn(made, tmp_path / "parts", *more, 1))
    succeed(*unlearn(made, tmp_path / "parts", *more, 3, "--resume_from_checkpoint", "latest"))
    a, b = (weights(tmp_path / name / "pipeline") for name in ("whole", "parts"))
    assert all(torch.equal(a[n], b[n]) for n in a)


@NAMES
def test_a_rule_that_works_module_by_module_is_resumed_bit_for_bit(made, tmp_path):
    more = ["--method", "pcgrad", "--method_options", '{"scope": "module"}']
    more += ["--checkpointing_steps", 1, "--max_train_steps"]
    succeed(*unlearn(made, tmp_path / "whole", *more, 3))
    succeed(*unlearn(made, tmp_path / "parts", *more, 1))
    succeed(*unlearn(made, tmp_path / "parts", *more, 3, "--resume_from_checkpoint", "latest"))
    a, b = (weights(tmp_path / name / "pipeline") for name in ("whole", "parts"))
    assert all(torch.equal(a[n], b[n]) for n in a)


def test_another_base_model_is_not_resumed(made, tmp_path):
    shutil.copytree(made / "base", tmp_path / "base")
    command = unlearn(tmp_path, tmp_path / "o")
    succeed(*command)
    fewer = ("--resume_from_checkpoint", "latest", "--max_train_steps", 1)
    code, said = run(*command, *fewer)
    assert code == 2
    assert "--max_train_steps 1: the checkpoint is of step 2" in said
    other = [made / "base" if part == tmp_path / "base" else part for part in command]
    code, said = run(*other, "--resume_from_checkpoint", "latest")
    assert code == 2
    assert f"has pretrained_model_name_or_path {tmp_path / 'base'}, this one {made}" in said
    file = tmp_path / "base" / "unet" / "diffusion_pytorch_model.safetensors"
    from safetensors.torch import save_file

    save_file({n: t * 1.01 for n, t in load_file(file).items()}, file)
    code, said = run(*command, "--resume_from_checkpoint", "latest")
    assert code == 2
    assert "was begun with another unet (unet: " in said


def test_a_full_gpu_is_told_with_what_takes_less(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["/somewhere/unlearn.py"])

    def full():
        raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nFrames")

    with pytest.raises(SystemExit) as end:
        module(".training").command(lambda _: full(), module("options").Unlearn, None, REQUIRED)
    assert end.value.code == 2
    said = capsys.readouterr().err
    assert said.startswith("unlearn.py: error: CUDA out of memory. Tried to allocate 2 GiB.\nA ")
    assert "smaller batch needs less" in said
    assert "--resume_from_checkpoint latest continues" in said
    assert "Frames" not in said


def test_prompts_that_mention_what_is_forgotten_are_told(made, tmp_path):
    (tmp_path / "some.txt").write_text('a photo of a CAT, in a car\n\n""\n')
    said = succeed(
        *unlearn(made, tmp_path / "o", "--remember", tmp_path / "some.txt", "--max_train_steps", 1)
    )
    assert "1 of the prompts to remember mention a concept to forget" in said
    report = json.loads((tmp_path / "o" / "unlearn.json").read_text())
    assert report["remember"] == ["a photo of a CAT, in a car", ""]


def test_options_without_effect_and_prompts_without_images_are_told(made, tmp_path):
    said = succeed(
        *unlearn(
            made,
            tmp_path / "a",
            "--method",
            "esd",
            "--surrogate",
            "gaussian",
            "--fisher",
            "estimate",
            "--esd_eta",
            1,
            "--surrogate_concept",
            "dog",
            "--max_train_steps",
            1,
        )
    )
    assert (
        "without effect on this run: --surrogate, --surrogate_concept, --remember, --fisher\n"
        in said
    )
    assert "remembers nothing" in said
    said = succeed(*unlearn(made, tmp_path / "b", "--replay_images", 2, "--max_train_steps", 1))
    assert "--replay_images 2: only as many of the 3 prompts are replayed" in said
    assert "without effect" not in said


def test_the_shipped_prompts_are_many_and_short_enough():
    prompts = module("prompts")
    texts = prompts.read([str(prompts.REMEMBER)], "--remember")
    assert len(texts) >= 40
    assert texts[0] == ""
    assert max(len(t.split()) for t in texts) < 20


@pytest.mark.parametrize(
    ("error", "match"),
    [
        (
            "GatedRepoError",
            "is gated: accept its licence on https://huggingface.co/a/b, then log in",
        ),
        ("RepositoryNotFoundError", "neither a folder here nor a public model on the hub"),
        ("RevisionNotFoundError", "has no --revision main2"),
        (None, "the download from the hub failed .*Without a network give a folder"),
    ],
)
def test_the_hubs_errors_say_what_to_do(error, match, monkeypatch):
    import huggingface_hub

    args = module("pipelines").Model(pretrained_model_name_or_path="a/b", revision="main2")
    if error is None:
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    else:

        def fails(*_: object, **__: object):
            raise hub_error(error)

        monkeypatch.setattr(huggingface_hub, "snapshot_download", fails)
    with refused(match):
        module("pipelines").look(args)


def test_a_scheduler_of_the_pipeline_and_ours_have_the_same_noise(made):
    """PNDM, DDIM and DDPM of one configuration share alphas_cumprod."""
    model = module("pipelines").Model(pretrained_model_name_or_path=str(made / "base"))
    looked = module("pipelines").look(model)
    theirs = DDIMScheduler.from_pretrained(made / "base", subfolder="scheduler")
    assert torch.equal(looked.scheduler.alphas_cumprod, theirs.alphas_cumprod)
    assert looked.latents == (4, 8, 8)
    assert looked.resolution == 16


def test_the_guide_names_real_options():
    files = [*SCRIPTS.rglob("*.py"), ROOT / "ebu_optim" / "diffusion" / "objectives.py"]
    for room in ("text_to_image", "attacks", "worlds", "training", "experiments"):
        files += (ROOT / "ebu_optim" / room).rglob("*.py")
    code = "\n".join(f.read_text() for f in files)
    known = set(re.findall(r'"--([a-z_]+)"', code))
    known |= set(re.findall(r"^    ([a-z_]+): .+ = option\(", code, re.MULTILINE))
    named = set(re.findall(r"--([a-z_]+)", PAGE.read_text()))
    assert len(named) > 25
    assert named - known == set()
