"""Files that are not taken, each with a line that says what it is and what helps."""

from __future__ import annotations

import json
import shutil
import struct

import pytest
import torch

pytest.importorskip("transformers", reason="transformers comes with the extra text_to_image")

from safetensors.torch import save_file

from ebu_optim.errors import InputError
from ebu_optim.formats import Single, look, open_single, write_folder, write_single
from ebu_optim.formats.header import read_header

from .single_files import folder, resaved, tensors

UNET = "model.diffusion_model."


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    place = tmp_path_factory.mktemp("files")
    found = {}
    for family in ("sd1", "sd2", "sdxl"):
        base = folder(family, place / family)
        found[family] = base, write_folder(base, {}, place / f"{family}.safetensors")
    return found


def refused(path, said):
    with pytest.raises(InputError) as caught:
        look(path)
    text = str(caught.value)
    assert said in text
    assert str(path) in text
    assert "\n" not in text


def test_no_whole_file(made, tmp_path):
    whole = made["sd1"][1].read_bytes()
    refused(tmp_path, "is a folder")
    refused(tmp_path / "none.safetensors", "no such file")
    length = int.from_bytes(whole[:8], "little")
    header = json.loads(whole[8 : 8 + length])
    name = next(n for n in header if n != "__metadata__")

    def with_header(change):
        copy = json.loads(json.dumps(header))
        change(copy)
        text = json.dumps(copy).encode()
        return struct.pack("<Q", len(text)) + text + whole[8 + length :]

    for i, (content, said) in enumerate(
        (
            (b"", "is empty"),
            (b"abc", "is not a complete safetensors file"),
            (whole[:-1], "and its header describes"),
            (whole + b"x", "and its header describes"),
            (whole[: length // 2], "its header would end at byte"),
            (b"\xff" * 64, "its header would end at byte"),
            (whole[:8] + b"{" * length + whole[8 + length :], "its header is damaged"),
            (whole[:8] + b"\xff" * length + whole[8 + length :], "its header is damaged"),
            (with_header(lambda h: h[name].update(shape=[7])), "its header is damaged"),
            (with_header(lambda h: h[name].pop("dtype")), "its header is damaged"),
            (with_header(lambda h: h.pop(name)), "leave a hole"),
            (with_header(lambda h: h[name].update(dtype="F4")), "is F4, which is not supported"),
            (struct.pack("<Q", 2) + b"{}", "it holds no tensors"),
            (struct.pack("<Q", 2) + b"[]", "its header is damaged"),
            (b"version https://git-lfs.github.com/spec/v1\n", "pointer of Git LFS"),
            (b"GGUF" + b"\0" * 60, "is GGUF"),
        )
    ):
        path = tmp_path / f"{i}.safetensors"
        path.write_bytes(content)
        refused(path, said)


def test_pickles(made, tmp_path):
    state = {"state_dict": {f"{UNET}input_blocks.0.0.weight": torch.ones(8, 4, 3, 3)}}
    for name in ("model.ckpt", "model.pt", "pytorch_model.bin", "model.safetensors"):
        torch.save(state, tmp_path / name)
        refused(tmp_path / name, "is a pickle")
        refused(tmp_path / name, "torch.load(path, weights_only=True)")


def saved(tmp_path, held, name="a.safetensors"):
    save_file({k: torch.zeros(s) for k, s in held.items()}, tmp_path / name)
    return tmp_path / name


def test_other_things_than_a_model(made, tmp_path):
    base, file = made["sd1"]
    for held, said in (
        ({"lora_unet_mid_block_proj_in.lora_down.weight": (1, 8)}, "is a LoRA, not a model"),
        ({"unet.conv_in.lora_A.weight": (1, 8)}, "is a LoRA, not a model"),
        ({"lora_unet_conv_in.hada_w1_a": (1, 8)}, "is a LoRA, not a model"),
        ({"emb_params": (1, 768)}, "is an embedding of a prompt"),
        ({"text_model.encoder.layers.0.mlp.fc1.bias": (4,)}, "is a text encoder without a UNet"),
        ({"layer.weight": (2, 2)}, "it begins with layer.weight"),
    ):
        refused(saved(tmp_path, held), said)
    refused(base / "unet" / "diffusion_pytorch_model.safetensors", "one part of a diffusers folder")
    start = "first_stage_model."
    for cut in ("", start):
        vae = resaved(
            file,
            tmp_path / "v",
            drop=lambda n: not n.startswith(start),
            rename=lambda n, cut=cut: n.removeprefix(cut),
        )
        refused(vae, "is a VAE without a UNet")


def test_other_families_are_named(made, tmp_path):
    for held, said in (
        ({"double_blocks.0.img_attn.norm.key_norm.scale": (8,)}, "flux-schnell"),
        (
            {
                f"{UNET}double_blocks.0.img_attn.norm.key_norm.scale": (8,),
                f"{UNET}guidance_in.in_layer.bias": (8,),
                f"{UNET}img_in.weight": (8, 64),
            },
            "flux-dev",
        ),
        ({f"{UNET}single_stream_modulation.lin.weight": (8, 8)}, "flux-2-dev"),
        (
            {
                f"{UNET}joint_blocks.0.context_block.adaLN_modulation.1.bias": (9216,),
                f"{UNET}pos_embed": (1, 36864, 8),
            },
            "sd3",
        ),
        ({f"{UNET}joint_blocks.37.x_block.mlp.fc1.weight": (8, 8)}, "sd35_large"),
        ({f"{UNET}layers.0.adaLN_modulation.0.weight": (8, 8)}, "z-image-turbo"),
        ({"blocks.0.cross_attn.q_linear.weight": (8, 8)}, "sana"),
    ):
        refused(saved(tmp_path, held), f"it looks like {said}")
    sd1, xl = made["sd1"][1], made["sdxl"][1]

    def first(channels):
        return {f"{UNET}input_blocks.0.0.weight": torch.zeros(8, channels, 3, 3)}

    to = tmp_path / "b.safetensors"
    refused(resaved(sd1, to, add=first(8)), "a UNet of 8 channels (it looks like instruct-pix2pix)")
    refused(resaved(sd1, to, add=first(5)), "a UNet of 5 channels")
    refused(resaved(xl, to, add={"edm_mean": torch.zeros(1)}), "it looks like playground-v2-5")
    refused(resaved(xl, to, add={"edm_vpred.sigma_max": torch.zeros(1)}), "a model of EDM")
    two = "conditioner.embedders.1.model."
    refiner = resaved(
        xl,
        to,
        drop=lambda n: n.startswith("conditioner.embedders.0."),
        rename=lambda n: n.replace(two, two.replace("1", "0")),
    )
    refused(refiner, "looks like SDXL's refiner")
    unclip = {f"{UNET}label_emb.0.0.weight": torch.zeros(8, 8)}
    refused(resaved(made["sd2"][1], to, add=unclip), "looks like Stable Diffusion 2.x unCLIP")
    no_text = resaved(sd1, to, drop=lambda n: "attn2" in n)
    refused(no_text, "without cross attention")


def test_float8_with_scales(made, tmp_path):
    _, file = made["sd1"]
    for name in ("scaled_fp8", f"{UNET}out.2.scale_weight", f"{UNET}out.2.weight_scale"):
        path = resaved(file, tmp_path / "a", dtype=torch.float8_e4m3fn, add={name: torch.ones(1)})
        refused(path, f"quantized weights with scales ({name})")


def test_tensors_missing_too_many_or_of_another_size(made, tmp_path):
    base, file = made["sd1"]
    to = tmp_path / "a.safetensors"
    key = f"{UNET}time_embed.0.weight"
    for source, said in (
        (
            resaved(file, to, drop=lambda n: n == key),
            "its unet lacks time_embedding.linear_1.weight",
        ),
        (resaved(file, tmp_path / "b", drop=lambda n: "down.1.block" in n), "and 6 more"),
        (resaved(file, tmp_path / "c", drop=lambda n: "cond_stage" in n), "has no text_encoder"),
        (
            resaved(file, tmp_path / "d", add={f"{UNET}strange": torch.ones(1)}),
            f"its unet also holds {UNET}strange",
        ),
        (
            resaved(file, tmp_path / "e", add={f"{UNET}time_embed.0.bias": torch.ones(7)}),
            f"{UNET}time_embed.0.bias has the shape [7], and "
            "time_embedding.linear_1.bias needs [32]",
        ),
        (
            resaved(file, tmp_path / "f", add={key: torch.ones(32, 8, dtype=torch.int8)}),
            f"{key} is I8, which is not a dtype of weights",
        ),
    ):
        with pytest.raises(InputError) as caught:
            open_single(source, config=base)
        assert said in str(caught.value)
    # a small model with the configuration of a release
    with pytest.raises(InputError, match=r"its unet lacks .* give config= \(--architecture\), a"):
        open_single(file)


def test_folders_that_are_no_configuration(made, tmp_path):
    file = made["sd1"][1]
    with pytest.raises(InputError, match=r"has no model_index\.json"):
        open_single(file, config=tmp_path)
    with pytest.raises(InputError, match=r"is Stable Diffusion 1\.x, and .* a StableDiffusionXL"):
        open_single(file, config=made["sdxl"][0])
    with pytest.raises(InputError, match=r"is SDXL, and .* is a StableDiffusionPipeline"):
        open_single(made["sdxl"][1], config=made["sd1"][0])
    (tmp_path / "model_index.json").write_text("{")
    with pytest.raises(InputError, match=r"model_index\.json cannot be read"):
        open_single(file, config=tmp_path)
    (tmp_path / "model_index.json").write_text("{}")
    with pytest.raises(InputError, match=r"its model_index\.json has no unet"):
        open_single(file, config=tmp_path)
    nine = f"{UNET}input_blocks.0.0.weight"
    inpainting = resaved(file, tmp_path / "a", add={nine: torch.zeros(8, 9, 3, 3)})
    with pytest.raises(InputError, match=r"its UNet takes 9 channels, that of .* 4"):
        open_single(inpainting, config=made["sd1"][0])
    with pytest.raises(InputError, match="part must be one of unet, vae, text_encoder; got 'clip'"):
        Single(file, config=made["sd1"][0]).part("clip")


def test_what_is_not_written(made, tmp_path):
    base, file = made["sd1"]
    out = tmp_path / "out.safetensors"
    half = resaved(file, tmp_path / "half.safetensors", dtype=torch.float16)
    weight = "conv_in.weight"
    ones = torch.ones(8, 4, 3, 3)
    for source, changed, said in (
        (file, {"unet": {"conv_in.strange": ones}}, "conv_in.strange, [8, 4, 3, 3]: the unet of"),
        (file, {"unet": {weight: torch.ones(8)}}, "has the shape [8, 4, 3, 3]"),
        (file, {"text_encoder_2": {}}, "has no text_encoder_2; it has unet, vae, text_encoder"),
        (file, {"unet": {weight: ones / 0}}, "holds NaN or Inf"),
        (half, {"unet": {weight: ones * 1e6}}, "has values beyond torch.float16"),
    ):
        with pytest.raises(InputError) as caught:
            write_single(source, changed, out, config=base)
        assert said in str(caught.value)
    for changed, said in (
        ({"unet": {weight: torch.ones(8)}}, "has the shape [8, 4, 3, 3]"),
        ({"text_encoder_2": {}}, "has no text_encoder_2"),
    ):
        with pytest.raises(InputError) as caught:
            write_folder(base, changed, out)
        assert said in str(caught.value)
    strange = shutil.copytree(base, tmp_path / "strange")
    config = json.loads((strange / "unet" / "config.json").read_text())
    (strange / "unet" / "config.json").write_text(json.dumps(config | {"time_cond_proj_dim": 8}))
    with pytest.raises(
        InputError,
        match=r"its unet has time_embedding.cond_proj.weight, which has no name in the layout",
    ):
        write_folder(strange, {}, out)
    with pytest.raises(InputError, match="has no safetensors weights of the variant fp16"):
        write_folder(base, {}, out, variant="fp16")
    with pytest.raises(InputError, match=r"dtype must be one .* got torch\.complex64"):
        write_folder(base, {}, out, dtype=torch.complex64)
    assert list(tmp_path.glob("*out*")) == list(tmp_path.glob(".*out*")) == []
    out.write_text("mine")
    for write in (
        lambda: write_single(file, {}, out, config=base),
        lambda: write_folder(base, {}, out),
    ):
        with pytest.raises(InputError, match=r"out\.safetensors exists: delete it"):
            write()
    assert out.read_text() == "mine"
    assert tensors(file).keys() == read_header(file).tensors.keys()
