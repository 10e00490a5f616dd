"""What unlearn.py leaves behind, and what the hub makes of it."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

pytest.importorskip("transformers", reason="transformers comes with the extra text_to_image")
pytest.importorskip("peft", reason="peft comes with the extra text_to_image")

from diffusers import StableDiffusionPipeline
from safetensors.torch import load_file

from .script import ADAPTERS, SCRIPTS, drawn, module, run, succeed, unlearn


@pytest.mark.parametrize("method", ADAPTERS)
def test_a_lora_draws_what_the_merged_pipeline_and_the_changed_tensors_draw(method, made, tmp_path):
    options = ["--method", method, "--learning_rate", 0.05]
    options += [
        "--relearner_steps",
        1,
        "--relearner_learning_rate",
        1e-3,
    ]  # the adapter alone moves
    if method == "ebu":
        options += [
            "--train_modules",
            "lora",
            "--rank",
            2,
            "--lora_alpha",
            6,
            "--lora_target_modules",
            "to_k",
            "attn2.to_v",
            "ff.net.2",
        ]
    for kind in ("lora", "pipeline", "changed"):
        succeed(*unlearn(made, tmp_path / kind, *options, "--save_as", kind))
    base = StableDiffusionPipeline.from_pretrained(made / "base")
    before = drawn(base)
    # by name: older versions of diffusers look it up on the hub
    base.load_lora_weights(
        tmp_path / "lora" / "lora", weight_name="pytorch_lora_weights.safetensors"
    )
    found = drawn(base)
    assert np.abs(found - before).max() > 1e-3
    whole = StableDiffusionPipeline.from_pretrained(tmp_path / "pipeline" / "pipeline")
    np.testing.assert_allclose(drawn(whole), found, atol=1e-5)
    for kind in ("lora", "pipeline", "changed"):  # by the lines of their cards
        np.testing.assert_allclose(loaded(tmp_path / kind / kind / "README.md"), found, atol=1e-5)
    tensors = load_file(tmp_path / "changed" / "changed" / "unet_changed.safetensors")
    partly = StableDiffusionPipeline.from_pretrained(made / "base")
    assert 0 < len(tensors) < len(partly.unet.state_dict())
    assert not partly.unet.load_state_dict(tensors, strict=False).unexpected_keys
    np.testing.assert_allclose(drawn(partly), drawn(whole), atol=1e-6)


def test_changed_tensors_in_16_bits(made, tmp_path):
    succeed(*unlearn(made, tmp_path / "o", "--save_as", "changed", "--save_precision", "fp16"))
    tensors = load_file(tmp_path / "o" / "changed" / "unet_changed.safetensors")
    assert all("attn2" in n and t.dtype == torch.float16 for n, t in tensors.items())
    assert not (tmp_path / "o" / "pipeline").exists()


def test_transport_of_two_spms_is_the_sum_of_the_papers_formula(made, tmp_path):
    folders = []
    for concept in ("cat", "red car"):
        out = tmp_path / concept.replace(" ", "_")
        command = unlearn(made, out, "--method", "spm", "--learning_rate", 0.05)
        command[command.index("--forget") + 1] = concept
        command[command.index("--remember") + 1 :][:3] = ["a dog", "a dog", "a dog"]
        succeed(*command)
        folders.append(out / "lora")
    transport = module("transport")
    pipe = StableDiffusionPipeline.from_pretrained(made / "base")
    erased = transport.load(pipe, folders)
    m = transport.scale(pipe, erased, "a car")
    assert m[1] >= 0.5  # one of its two words
    assert m[0] != m[1]
    found = drawn(pipe, "a car")
    hand = StableDiffusionPipeline.from_pretrained(made / "base")
    state = hand.unet.state_dict()
    for folder, strength in zip(folders, m, strict=True):
        (file,) = folder.glob("*.safetensors")
        layers = load_file(file)
        ups = [n for n in layers if ".lora_B." in n]
        assert len(ups) == len(module("modules").spm_layers(hand.unet))
        for n in ups:
            up, down = layers[n], layers[n.replace(".lora_B.", ".lora_A.")]
            assert up.shape[1] == down.shape[0] == 1  # rank 1
            name = n.removeprefix("unet.").replace(".lora_B.", ".")
            delta = torch.einsum("o...,...i->oi", up.flatten(1), down.flatten(1))
            state[name] += strength * delta.view_as(state[name])
    hand.unet.load_state_dict(state)
    np.testing.assert_allclose(drawn(hand, "a car"), found, atol=1e-5)
    said = succeed(
        "--pretrained_model_name_or_path",
        made / "base",
        "--adapters",
        *folders,
        "--prompt",
        "a car",
        "a cat",
        "--num_inference_steps",
        2,
        "--device",
        "cpu",
        "--output_dir",
        tmp_path / "drawn",
        script=SCRIPTS / "transport.py",
    )
    assert f"'a car': erased_0 {m[0]:.2f}, erased_1 {m[1]:.2f}" in said
    assert len(list((tmp_path / "drawn").glob("*.png"))) == 2


# -- the hub ------------------------------------------------------------------------------------


@pytest.fixture
def hub(monkeypatch):
    """The hub, replaced: what was asked of it, in order, and what is to fail."""
    import huggingface_hub

    asked: list[tuple] = []
    fails: dict[str, Exception] = {}

    def call(name: str, answer):
        def asks(*args, **kwargs):
            asked.append((name, args, kwargs))
            if name in fails:
                raise fails[name]
            return answer(*args, **kwargs)

        monkeypatch.setattr(huggingface_hub, name, asks)

    def uploaded(*, folder_path, **_):
        asked.append(("holds", sorted(p.name for p in Path(folder_path).iterdir())))

    call("create_repo", lambda name, **_: SimpleNamespace(repo_id=f"me/{name.split('/')[-1]}"))
    call("model_info", lambda name: SimpleNamespace(private="public" not in name))
    call("upload_folder", uploaded)
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: "hf_of_a_test")
    return SimpleNamespace(asked=asked, fails=fails)


def test_the_result_goes_to_the_hub_and_its_card_loads_it(hub, made, tmp_path, monkeypatch):
    import huggingface_hub
    from huggingface_hub import metadata_load

    out = tmp_path / "without_cat"
    said = succeed(
        *unlearn(made, out, "--push_to_hub", "--hub_private_repo", "--save_as", "changed")
    )
    assert "uploaded https://huggingface.co/me/without_cat" in said
    assert hub.asked[0] == ("create_repo", ("without_cat",), {"private": True, "exist_ok": True})
    (_, _, sent), holds = hub.asked[-2:]
    assert sent["repo_id"] == "me/without_cat"
    assert sent["folder_path"] == out / "changed"
    assert sent["commit_message"] == "Forgets cat (EBU added)"
    assert holds[1] == ["README.md", "unet_changed.safetensors", "unlearn.json"]
    assert "hf_of_a_test" not in (out / "run.json").read_text()
    card = out / "changed" / "README.md"
    assert metadata_load(card)["library_name"] == "diffusers"
    monkeypatch.setattr(
        huggingface_hub,
        "hf_hub_download",
        lambda name, file: out / name.replace("me/without_cat", "changed") / file,
    )
    assert str(made) not in card.read_text()
    before = drawn(StableDiffusionPipeline.from_pretrained(made / "base"))
    assert not np.allclose(loaded(card, made / "base"), before)


BASE = "<the base model>"


def loaded(card: Path, base: Path | None = None) -> np.ndarray:
    """What the pipeline of a card's own lines draws."""
    place = "<this repository or folder>"
    (code,) = re.findall(r"```python\n(.*?)```", card.read_text(), re.DOTALL)
    namespace: dict = {}
    exec(code.replace(place, str(card.parent)).replace(BASE, str(base)), namespace)  # noqa: S102
    return drawn(namespace["pipe"])


@pytest.mark.parametrize(
    ("asked", "fails", "message"),
    [
        (
            [],
            {"create_repo": OSError("403 Forbidden")},
            "--hub_model_id o cannot be created on the hub (OSError: 403 Forbidden)",
        ),
        (["--hub_model_id", "a/b/c"], {}, "--hub_model_id a/b/c: Repo id must be in the form"),
        (
            ["--hub_private_repo", "--hub_model_id", "me/public"],
            {},
            "--hub_private_repo: me/public already exists on the hub and is public",
        ),
    ],
)
def test_what_the_hub_would_refuse_is_told_before_any_time_is_spent(
    asked, fails, message, hub, made, tmp_path
):
    hub.fails.update(fails)
    sets = tmp_path / "sets"
    code, said = run(*unlearn(made, tmp_path / "o", "--sets_dir", sets, "--push_to_hub", *asked))
    assert code == 2
    assert message in said, said
    assert not sets.exists()
    assert "upload_folder" not in [call[0] for call in hub.asked]


def test_without_a_token_nothing_begins(hub, made, tmp_path, monkeypatch):
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub, "get_token", lambda: None)
    code, said = run(*unlearn(made, tmp_path / "o", "--push_to_hub"))
    assert code == 2
    assert "--push_to_hub: this machine has no token: log in with `hf auth login`" in said
    assert hub.asked == []
    assert not (tmp_path / "o").exists()


def test_a_failed_upload_loses_nothing_and_says_how_to_go_on(hub, made, tmp_path):
    hub.fails["upload_folder"] = ConnectionError("the line is gone\nand more")
    command = unlearn(made, tmp_path / "o", "--push_to_hub", "--hub_model_id", "me/x")
    code, said = run(*command)
    assert code == 2
    assert "the upload to me/x failed (ConnectionError: the line is gone)" in said
    assert f"\n  hf upload me/x {tmp_path / 'o' / 'pipeline'}\n" in said
    StableDiffusionPipeline.from_pretrained(tmp_path / "o" / "pipeline")
    hub.fails.clear()
    said = succeed(*command, "--resume_from_checkpoint", "latest")
    assert "resuming after step 2" in said
    assert "uploaded https://huggingface.co/me/x" in said


def test_a_finished_run_is_uploaded_with_the_card_as_it_was_edited(hub, made, tmp_path):
    out = tmp_path / "o"
    command = unlearn(made, out, "--save_as", "changed", "--checkpointing_steps", 1)
    again = [*command, "--resume_from_checkpoint", "latest"]
    upload = [*again, "--push_to_hub", "--hub_model_id", "me/x"]
    succeed(*command)
    folder = out / "changed"
    card, file = folder / "README.md", folder / "unet_changed.safetensors"
    first = file.stat().st_mtime_ns
    # nobody edited it: its lines load from the hub, and name no folder of this machine
    assert f"{folder} was already saved, with its README.md\nuploaded" in succeed(*upload)
    assert 'hf_hub_download("me/x"' in card.read_text()
    assert str(made) not in card.read_text()
    card.write_text(card.read_text() + "\nMeasured: CLIP score 0.31.\n")
    edited = card.read_text()
    succeed(*upload)
    assert card.read_text() == edited
    assert file.stat().st_mtime_ns == first
    # what is not whole, or of other steps, is saved again
    shutil.copytree(folder, tmp_path / "old")
    file.unlink()
    assert f"saved {folder}\n" in succeed(*again)
    assert file.exists()
    succeed(*again, "--max_train_steps", 3)
    newer = load_file(file)
    shutil.rmtree(folder)
    (tmp_path / "old").rename(folder)
    assert f"saved {folder}\n" in succeed(*again, "--max_train_steps", 3)
    assert all(torch.equal(t, newer[n]) for n, t in load_file(file).items())


def test_a_card_has_the_licence_of_the_base_and_names_it(tmp_path):
    card = module("card")
    said = {
        "forget": ["cat"],
        "title": "EBU added",
        "seconds": 1.0,
        "train_modules": "lora",
        "trained": 7,
        "instead": "noise",
    }
    args = SimpleNamespace(
        pretrained_model_name_or_path="a/b",
        save_as="lora",
        method="ebu_added",
        max_train_steps=2,
        output_dir=tmp_path,
    )
    header = "---\nlicense: other\nlicense_name: its-own\ntags: [x]\n---\n# base\n"
    (tmp_path / "README.md").write_text(header)
    (tmp_path / "card.md").write_text(card.write(args, tmp_path, said, "me/x"))
    from huggingface_hub import metadata_load

    found = metadata_load(tmp_path / "card.md")
    assert found.pop("tags")[-2:] == ["machine-unlearning", "lora"]
    assert found == {
        "library_name": "diffusers",
        "pipeline_tag": "text-to-image",
        "base_model": "a/b",
        "base_model_relation": "adapter",
        "license": "other",
        "license_name": "its-own",
    }
    assert "licence (`other`) holds for this model too" in (tmp_path / "card.md").read_text()
    for broken in ("no header", "---\nlicense: [\n---\n", "---\nlicense: [a, b]\n---\n"):
        (tmp_path / "README.md").write_text(broken)
        assert card.licence(tmp_path) == {}
    assert card.licence(tmp_path / "none") == {}
