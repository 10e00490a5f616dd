"""LoRAs in and out: added to the weights, and written in both layouts."""

from __future__ import annotations

import re

import pytest
import torch

pytest.importorskip("transformers", reason="transformers comes with the extra text_to_image")
pytest.importorskip("peft", reason="peft comes with the extra text_to_image")

from diffusers import DiffusionPipeline
from peft import LoraConfig, inject_adapter_in_model
from peft.utils import get_peft_model_state_dict

from ebu_optim.errors import InputError
from ebu_optim.formats import fuse, open_single, write_folder, write_lora, write_single

from .single_files import draw, folder, metadata, resaved, tensors

UNET = ["to_q", "to_k", "to_v", "to_out.0", "conv1", "proj_in"]
TEXT = ["q_proj", "v_proj", "fc1"]


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    place = tmp_path_factory.mktemp("loras")
    return {family: folder(family, place / family) for family in ("sd1", "sdxl")}


def loaded(base):
    return DiffusionPipeline.from_pretrained(base)


def adapted(base, alpha, rank=2):
    """A pipeline with a LoRA in it, and the LoRA's layers."""
    pipe, layers = loaded(base), {}
    for part in ("unet", "text_encoder", "text_encoder_2"):
        model = getattr(pipe, part, None)
        if model is None:
            continue
        targets = UNET if part == "unet" else TEXT
        config = LoraConfig(r=rank, lora_alpha=alpha, target_modules=targets)
        inject_adapter_in_model(config, model)
        torch.manual_seed(len(part))
        for name, p in model.named_parameters():
            if ".lora_" in name:
                torch.nn.init.normal_(p, std=0.3)
        layers[part] = get_peft_model_state_dict(model)
    return pipe, layers


@pytest.mark.parametrize("layout", ["diffusers", "kohya"])
@pytest.mark.parametrize("family", ["sd1", "sdxl"])
def test_written_and_read_again_it_draws_the_same(bases, tmp_path, family, layout):
    pipe, layers = adapted(bases[family], alpha=5)
    file = write_lora(layers, tmp_path / "a.safetensors", 5, layout, metadata={"what": "a test"})
    assert metadata(file)["what"] == "a test"
    want, before = draw(pipe), draw(loaded(bases[family]))
    assert (want - before).abs().max() > 0.01
    ours = loaded(bases[family])
    fuse(ours, file)
    torch.testing.assert_close(draw(ours), want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("layout", ["diffusers", "kohya"])
@pytest.mark.parametrize("family", ["sd1", "sdxl"])
def test_diffusers_loads_it(bases, tmp_path, family, layout):
    """alpha is not the rank. Of kohya's layout the UNet's: text encoders' attention is dropped by
    diffusers 0.42 with transformers 5."""
    pipe, layers = adapted(bases[family], alpha=5)
    if layout == "kohya":
        for part in layers.keys() - {"unet"}:
            setattr(pipe, part, getattr(loaded(bases[family]), part))
        layers = {"unet": layers["unet"]}
    file = write_lora(layers, tmp_path / "a.safetensors", 5, layout)
    theirs = loaded(bases[family])
    theirs.load_lora_weights(tmp_path, weight_name=file.name, local_files_only=True)
    torch.testing.assert_close(draw(theirs), draw(pipe), rtol=1e-4, atol=1e-5)


def test_names_of_kohya(bases, tmp_path):
    for family, text in (("sd1", {"lora_te"}), ("sdxl", {"lora_te1", "lora_te2"})):
        _, layers = adapted(bases[family], alpha=5)
        file = write_lora(layers, tmp_path / f"{family}.safetensors", 5, "kohya")
        found = tensors(file)
        layer = "lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn2_to_k"
        if family == "sd1":
            layer = layer.replace("blocks_1", "blocks_0", 1)
        assert found[f"{layer}.lora_down.weight"].shape[0] == 2
        assert found[f"{layer}.lora_up.weight"].shape[1] == 2
        assert {float(t) for n, t in found.items() if n.endswith(".alpha")} == {5.0}
        starts = {re.split("_unet_|_text_model_", n)[0] for n in found}
        assert starts == text | {"lora"}
        layer = f"{max(text)}_text_model_encoder_layers_0_self_attn_q_proj.lora_up.weight"
        assert layer in found
        said = metadata(file)
        assert (said["ss_network_dim"], said["ss_network_alpha"]) == ("2", "5")


def test_ranks_and_alpha_that_differ(bases, tmp_path):
    _, layers = adapted(bases["sd1"], alpha=3.5)
    state = layers["unet"]
    name = "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k"
    state[f"{name}.lora_A.weight"] = torch.randn(3, 16)
    state[f"{name}.lora_B.weight"] = torch.randn(8, 3)
    for layout in ("diffusers", "kohya"):
        file = write_lora({"unet": state}, tmp_path / f"{layout}.safetensors", 3.5, layout)
        pipe = loaded(bases["sd1"])
        before = pipe.unet.get_submodule(name).weight.clone()
        fuse(pipe, file, 0.5)
        a, b = (state[f"{name}.lora_{x}.weight"] for x in "AB")
        added = pipe.unet.get_submodule(name).weight - before
        torch.testing.assert_close(added, 0.5 * 3.5 / 3 * b @ a)


def test_beside_a_checkpoint_and_into_one(bases, tmp_path):
    base = bases["sdxl"]
    pipe, layers = adapted(base, alpha=1)
    lora = write_lora(layers, tmp_path / "lora.safetensors", 1, "kohya")
    source = write_folder(base, {}, tmp_path / "model.safetensors")
    opened = open_single(source, config=base, lora=lora)
    torch.testing.assert_close(draw(opened), draw(pipe), rtol=1e-4, atol=1e-5)
    parts = ("unet", "text_encoder", "text_encoder_2")
    new = {part: getattr(opened, part).state_dict() for part in parts}
    out = write_single(source, new, tmp_path / "merged.safetensors", config=base)
    assert torch.equal(draw(open_single(out, config=base)), draw(opened))


def test_what_is_no_lora_for_this_model(bases, tmp_path):
    _, layers = adapted(bases["sdxl"], alpha=2)
    pipe = loaded(bases["sd1"])
    before = {n: t.clone() for n, t in pipe.unet.state_dict().items()}
    for part in ("unet", "text_encoder_2"):
        for layout in ("diffusers", "kohya"):
            file = write_lora({part: layers[part]}, tmp_path / f"{part}{layout}", 2, layout)
            with pytest.raises(InputError, match="is not a LoRA for this StableDiffusionPipeline"):
                fuse(pipe, file)
    file = write_lora({"unet": layers["unet"]}, tmp_path / "a", 2, "kohya")
    loha = resaved(file, tmp_path / "b", rename=lambda n: n.replace("lora_up.weight", "hada_w1_a"))
    with pytest.raises(InputError, match="LoRA"):
        fuse(pipe, loha)
    with pytest.raises(InputError, match="is not a LoRA"):
        fuse(pipe, write_folder(bases["sd1"], {}, tmp_path / "model.safetensors"))
    assert all(torch.equal(t, before[n]) for n, t in pipe.unet.state_dict().items())


def test_what_cannot_be_written(bases, tmp_path):
    _, layers = adapted(bases["sd1"], alpha=2)
    out = tmp_path / "a.safetensors"
    for given, layout, said in (
        ({}, "kohya", "layers must be of unet"),
        ({"vae": layers["unet"]}, "kohya", "layers must be of unet"),
        ({"unet": {"conv_in.weight": torch.ones(1)}}, "kohya", "not a half of a LoRA"),
        (layers, "peft", 'layout must be "diffusers" or "kohya"; got \'peft\''),
    ):
        with pytest.raises(InputError, match=re.escape(said)):
            write_lora(given, out, 2, layout)
    assert not out.exists()
    write_lora(layers, out, 2)
    with pytest.raises(InputError, match=r"a\.safetensors exists: delete it"):
        write_lora(layers, out, 2)
