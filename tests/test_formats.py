"""Checkpoints in one file: what comes out is what went in, but for what was changed."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers", reason="transformers comes with the extra text_to_image")

from diffusers import DiffusionPipeline, StableDiffusionPipeline, StableDiffusionXLPipeline

from ebu_optim.errors import InputError
from ebu_optim.formats import Single, look, open_single, tokens, write_folder, write_single
from ebu_optim.formats.architecture import Architecture, architecture, shipped
from ebu_optim.formats.folders import layout
from ebu_optim.formats.tokens import from_open_clip, tokenizer
from ebu_optim.formats.writing import header_bytes

from .single_files import FAMILIES, draw, folder, metadata, resaved, same_bytes, tensors


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Family -> its folder and its file."""
    place = tmp_path_factory.mktemp("files")
    found = {}
    for family in FAMILIES:
        base = folder(family, place / family)
        found[family] = base, write_folder(base, {}, place / f"{family}.safetensors")
    return found


def loaded(base: Path, **options):
    return DiffusionPipeline.from_pretrained(base, safety_checker=None, **options)


def changed_values(single: Single, part: str, seed: int = 5) -> dict[str, torch.Tensor]:
    torch.manual_seed(seed)
    return {n: t + 0.1 * torch.randn_like(t) for n, t in single.part(part).state_dict().items()}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_folder_and_its_file_draw_the_same(made, family):
    base, file = made[family]
    pipe = open_single(file, config=base)
    assert type(pipe).__name__ == type(loaded(base)).__name__
    assert torch.equal(draw(pipe), draw(loaded(base)))
    for part in ("unet", "vae", "text_encoder"):
        weights = getattr(pipe, part).state_dict().values()
        assert all(t.dtype == torch.float32 and t.device.type == "cpu" for t in weights)
        assert not getattr(pipe, part).training


@pytest.mark.parametrize("family", ["sd1", "sd2", "sdxl"])
def test_diffusers_reads_what_is_written(made, family):
    base, file = made[family]
    kind = StableDiffusionXLPipeline if family == "sdxl" else StableDiffusionPipeline
    theirs = kind.from_single_file(file, config=str(base), local_files_only=True)
    assert torch.equal(draw(theirs), draw(loaded(base)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("family", FAMILIES)
def test_written_without_a_change_it_is_the_same_file(made, tmp_path, family, dtype):
    base, file = made[family]
    extra = {
        "model_ema.diffusion_modelinput_blocks00weight": torch.ones(3),
        "model_ema.decay": torch.tensor(0.9999),
        "global_step": torch.tensor(840000),
        "cond_stage_model.logit_scale": torch.tensor(4.6),
        "alphas_cumprod": torch.rand(1000),
    }
    said = {"modelspec.title": "a model", "modelspec.hash_sha256": "0x12", "format": "pt"}
    source = resaved(file, tmp_path / "in.safetensors", dtype=dtype, add=extra, said=said)
    single = Single(source, config=base)
    assert single.checkpoint.ema == 2
    everything = {part: single.part(part).state_dict() for part in single.architecture.parts}
    for name, changed in (("nothing", {}), ("the same values", everything)):
        out = write_single(single, changed, tmp_path / f"{name}.safetensors")
        before, after = tensors(source), tensors(out)
        assert after.keys() == {n for n in before if not n.startswith("model_ema.")}
        assert same_bytes(before, after, after)
        assert metadata(out) == {"modelspec.title": "a model", "format": "pt"}


@pytest.mark.parametrize("family", FAMILIES)
def test_changed_parts_come_back_bit_for_bit(made, tmp_path, family):
    base, file = made[family]
    single, pipe = Single(file, config=base), loaded(base)
    new = {part: changed_values(single, part) for part in single.architecture.parts}
    for part, values in new.items():
        getattr(pipe, part).load_state_dict(values)
    out = write_single(file, new, tmp_path / "out.safetensors", config=base)
    again = open_single(out, config=base)
    for part, values in new.items():
        assert same_bytes(getattr(again, part).state_dict(), values, values)
    assert torch.equal(draw(again), draw(pipe))
    assert not torch.equal(draw(again), draw(loaded(base)))


def test_only_what_changed_is_written(made, tmp_path):
    base, file = made["sd1"]
    single = Single(file, config=base)
    name = "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k.weight"
    key = "model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight"
    value = changed_values(single, "unet")[name]
    out = write_single(single, {"unet": {name: value}}, tmp_path / "a.safetensors")
    before, after = tensors(file), tensors(out)
    assert list(before) == list(after)
    assert torch.equal(after[key], value)
    assert same_bytes(before, after, before.keys() - {key})


def test_a_row_of_a_fused_tensor(made, tmp_path):
    """OpenCLIP holds q, k and v in one tensor, and text_projection transposed."""
    base, file = made["sdxl"]
    single = Single(file, config=base)
    start = "text_model.encoder.layers.1.self_attn"
    new = {
        f"{start}.k_proj.weight": torch.randn(24, 24),
        f"{start}.v_proj.bias": torch.randn(24),
        "text_projection.weight": torch.randn(16, 24),
    }
    out = write_single(single, {"text_encoder_2": new}, tmp_path / "a.safetensors")
    before, after = tensors(file), tensors(out)
    start = "conditioner.embedders.1.model."
    weight, bias = (f"{start}transformer.resblocks.1.attn.in_proj_{n}" for n in ("weight", "bias"))
    k, v, p = new.values()
    assert torch.equal(after[weight], torch.cat([before[weight][:24], k, before[weight][48:]]))
    assert torch.equal(after[bias], torch.cat([before[bias][:48], v]))
    assert torch.equal(after[f"{start}text_projection"], p.T)
    same = before.keys() - {weight, bias, f"{start}text_projection"}
    assert same_bytes(before, after, same)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float8_e4m3fn])
def test_the_dtype_stays(made, tmp_path, dtype):
    base, file = made["sd1"]
    source = resaved(file, tmp_path / "in.safetensors", dtype=dtype)
    single = Single(source, config=base)
    assert len(single.checkpoint.dtypes) == 1
    weight = single.part("unet").conv_in.weight
    key = "model.diffusion_model.input_blocks.0.0.weight"
    assert torch.equal(weight, tensors(source)[key].float())
    new = torch.randn_like(weight)
    out = write_single(single, {"unet": {"conv_in.weight": new}}, tmp_path / "out.safetensors")
    after = tensors(out)
    assert {t.dtype for t in after.values()} == {dtype}
    assert torch.equal(after[key].float(), new.to(dtype).float())
    assert torch.equal(Single(out, config=base).part("unet").conv_in.weight, new.to(dtype).float())


def test_a_folder_as_a_file_with_changes_in_another_dtype(made, tmp_path):
    base, _ = made["sdxl"]
    new = torch.randn(16, 24)
    changed = {"text_encoder_2": {"text_projection.weight": new}}
    out = write_folder(
        base, changed, tmp_path / "a.safetensors", dtype=torch.float16, metadata={"a": "b"}
    )
    found = tensors(out)
    assert {t.dtype for t in found.values()} == {torch.float16}
    assert torch.equal(found["conditioner.embedders.1.model.text_projection"], new.half().T)
    assert metadata(out) == {"a": "b", "format": "pt", "modelspec.prediction_type": "epsilon"}
    draw(open_single(out, config=base))


def test_a_file_says_what_its_scheduler_was(made, tmp_path):
    assert metadata(made["sd2"][1])["modelspec.prediction_type"] == "v"
    base = shutil.copytree(made["sdxl"][0], tmp_path / "base")
    place = base / "scheduler" / "scheduler_config.json"
    config = json.loads(place.read_text())
    config |= {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True}
    place.write_text(json.dumps(config))
    file = write_folder(base, {}, tmp_path / "v.safetensors")
    assert tensors(file)["v_pred"].shape == (0,)
    scheduler = architecture(look(file)).configs["scheduler"]
    assert scheduler["prediction_type"] == "v_prediction"
    assert scheduler["rescale_betas_zero_snr"]
    out = write_single(file, {}, tmp_path / "again.safetensors", config=base)
    assert tensors(out).keys() == tensors(file).keys()
    assert "v_pred" not in tensors(made["sdxl"][1])


@pytest.mark.parametrize(
    ("family", "inpainting", "called", "unet", "names"),
    [
        ("sd1", False, "v1", 859_520_964, 686),
        ("sd1", True, "inpainting", 859_535_364, 686),
        ("sd2", False, "v2", 865_910_724, 686),
        ("sdxl", False, "xl_base", 2_567_463_684, 1680),
        ("sdxl", True, "xl_inpaint", 2_567_478_084, 1680),
    ],
)
def test_every_tensor_of_the_released_sizes_has_its_place(
    tmp_path, family, inpainting, called, unet, names
):
    """A file with holes for weights: its header is that of a release, gigabytes long."""
    from diffusers.loaders.single_file_utils import infer_diffusers_model_type

    configs = shipped(family)
    for part, change in (configs["inpainting"] if inpainting else {}).items():
        configs[part] |= change
    whole = Architecture(configs, None, "", "")
    shapes = {}
    for part in whole.parts:
        places = layout(family, part, whole)
        if part == "unet":
            assert (len(places), sum(math.prod(s) for s, _ in places.values())) == (names, unet)
        shapes |= {key: ("F16", shape) for key, (shape, _) in places.items()}
    head = header_bytes(shapes, {})
    file = tmp_path / "model.safetensors"
    with file.open("wb") as opened:
        opened.write(head)
        opened.truncate(len(head) + 2 * sum(math.prod(s) for _, s in shapes.values()))
    found = Single(file)
    assert (found.checkpoint.family, found.checkpoint.inpainting) == (family, inpainting)
    assert infer_diffusers_model_type(dict(found.checkpoint.header.tensors)) == called
    found.check()
    for part in whole.parts:
        shapes_ = whole.shapes(part)
        table = found.table(part)
        assert table.keys() == shapes_.keys()
        rows = sum(at.last - at.first for at in table.values())
        ours = {k: found.checkpoint.header.tensors[k] for k in found.checkpoint.keys(part)}
        assert rows == sum(entry.shape[0] for entry in ours.values())


def test_names_that_are_known_by_heart(made):
    """Of released files, where the layout is least regular."""
    whole = {f: Architecture(shipped(f), None, "", "") for f in ("sd1", "sd2", "sdxl")}
    unets = {f: layout(f, "unet", whole[f]) for f in whole}
    start = "model.diffusion_model."
    for family, ups in (("sd1", ("2.1", "5.2", "8.2")), ("sdxl", ("2.2", "5.2"))):
        found = {k for k in unets[family] if k.endswith("conv.weight") and "output" in k}
        assert found == {f"{start}output_blocks.{up}.conv.weight" for up in ups}
    assert unets["sd1"][f"{start}input_blocks.1.1.proj_in.weight"][0] == (320, 320, 1, 1)
    assert unets["sd2"][f"{start}input_blocks.1.1.proj_in.weight"][0] == (320, 320)
    assert f"{start}label_emb.0.2.bias" in unets["sdxl"]
    vae = layout("sd1", "vae", whole["sd1"])
    assert vae["first_stage_model.decoder.mid.attn_1.proj_out.weight"][0] == (512, 512, 1, 1)
    assert "first_stage_model.encoder.down.1.block.0.nin_shortcut.weight" in vae
    bigg = layout("sdxl", "text_encoder_2", whole["sdxl"])
    start = "conditioner.embedders.1.model."
    assert bigg[f"{start}transformer.resblocks.31.attn.in_proj_weight"][0] == (3840, 1280)
    assert bigg[f"{start}positional_embedding"][0] == (77, 1280)


def test_tensors_that_no_model_has_are_left_alone(made, tmp_path):
    """Layers of OpenCLIP that SD 2.x does not use, position ids, what training a VAE left."""
    for family, extra in (
        ("sd1", "cond_stage_model.transformer.text_model.embeddings.position_ids"),
        ("sd1", "first_stage_model.loss.logvar"),
        ("sd2", "cond_stage_model.model.transformer.resblocks.2.ln_1.weight"),
        ("sd2", "cond_stage_model.model.text_projection"),
    ):
        base, file = made[family]
        (tmp_path / "in.safetensors").unlink(missing_ok=True)
        add = {extra: torch.ones(16, 16)}
        source = resaved(file, tmp_path / "in.safetensors", add=add)
        assert torch.equal(draw(open_single(source, config=base)), draw(loaded(base)))


@pytest.mark.parametrize("prefix", ["", "diffusion_model."])
def test_a_unet_alone(made, tmp_path, prefix):
    base, file = made["sd1"]
    start = "model.diffusion_model."
    source = resaved(
        file,
        tmp_path / "unet.safetensors",
        drop=lambda n: not n.startswith(start),
        rename=lambda n: prefix + n.removeprefix(start),
    )
    single = Single(source, config=base)
    assert set(single.checkpoint.parts) == {"unet"}
    unet = single.part("unet").state_dict()
    assert same_bytes(unet, loaded(base).unet.state_dict(), unet)
    new = changed_values(single, "unet")
    out = write_single(single, {"unet": new}, tmp_path / "out.safetensors")
    assert tensors(out).keys() == tensors(source).keys()
    again = Single(out, config=base).part("unet").state_dict()
    assert same_bytes(again, new, new)
    with pytest.raises(InputError, match="has no vae: give a file of the whole model, or vae="):
        single.pipeline()


def test_early_merges_lack_text_model(made, tmp_path):
    base, file = made["sd1"]
    source = resaved(
        file, tmp_path / "in.safetensors", rename=lambda n: n.replace(".text_model.", ".")
    )
    assert torch.equal(draw(open_single(source, config=base)), draw(loaded(base)))
    new = {"text_encoder": changed_values(Single(source, config=base), "text_encoder")}
    out = write_single(source, new, tmp_path / "out.safetensors", config=base)
    assert tensors(out).keys() == tensors(source).keys()


@pytest.mark.parametrize("layout_", ["prefixed", "bare", "diffusers"])
def test_the_file_of_another_vae(made, tmp_path, layout_):
    base, file = made["sd1"]
    single = Single(file, config=base)
    new = changed_values(single, "vae")
    other = write_single(single, {"vae": new}, tmp_path / "other.safetensors")
    start, vae = "first_stage_model.", tmp_path / "vae.safetensors"
    if layout_ == "diffusers":
        from safetensors.torch import save_file

        save_file(new, vae)
    else:
        cut = "" if layout_ == "prefixed" else start
        resaved(
            other,
            vae,
            drop=lambda n: not n.startswith(start),
            rename=lambda n: n.removeprefix(cut),
        )
    pipe = loaded(base)
    pipe.vae.load_state_dict(new)
    assert torch.equal(draw(open_single(file, config=base, vae=vae)), draw(pipe))
    # a file without one takes it too
    without = resaved(file, tmp_path / "b.safetensors", drop=lambda n: n.startswith(start))
    assert torch.equal(draw(open_single(without, config=base, vae=vae)), draw(pipe))
    # and may get it for good, in its own layout
    theirs = Single(file, config=base, vae=vae)
    merged = write_single(theirs, {"vae": new}, tmp_path / "merged.safetensors")
    assert same_bytes(tensors(merged), tensors(other), tensors(other))
    with pytest.raises(InputError, match="has no vae; it has unet, text_encoder"):
        write_single(Single(without, config=base, vae=vae), {"vae": new}, tmp_path / "d")
    with pytest.raises(InputError, match="has no VAE"):
        open_single(file, config=base, vae=resaved(file, tmp_path / "c", drop=lambda n: start in n))


def test_the_prediction(made, tmp_path):
    _, file = made["sd2"]
    telling = "model.diffusion_model.output_blocks.11.1.transformer_blocks.0.norm1.bias"
    wide, narrow = ({telling: s * torch.tensor([-1.0, 1.0])} for s in (0.2, 0.01))
    step = {"global_step": torch.tensor(875000)}
    for said, add, want, by in (
        ({}, {}, "v_prediction", "nothing"),
        ({}, wide, "v_prediction", "0.200"),
        ({}, narrow, "epsilon", "0.010"),
        ({}, step | wide, "epsilon", "global_step"),
        ({"modelspec.prediction_type": "epsilon"}, wide, "epsilon", "modelspec"),
        ({"modelspec.prediction_type": "v"}, narrow, "v_prediction", "modelspec"),
        ({"modelspec.prediction_type": "v"}, {"v_pred": torch.ones(0)}, "v_prediction", "v_pred"),
    ):
        found = look(resaved(file, tmp_path / "a.safetensors", add=add, said=said))
        told = architecture(found)
        assert told.prediction == want == told.configs["scheduler"]["prediction_type"]
        assert by in told.told_by
        assert told.configs["unet"]["sample_size"] == (64 if want == "epsilon" else 96)
        assert architecture(found, prediction_type="epsilon").prediction == "epsilon"
    marks = {"v_pred": torch.ones(0), "ztsnr": torch.ones(0)}
    xl = architecture(look(resaved(made["sdxl"][1], tmp_path / "b", add=marks)))
    assert xl.prediction == xl.configs["scheduler"]["prediction_type"] == "v_prediction"
    assert xl.configs["scheduler"]["rescale_betas_zero_snr"]
    assert architecture(look(made["sdxl"][1])).prediction == "epsilon"
    base = made["sd2"][0]
    assert architecture(look(file), base).prediction == "v_prediction"
    assert architecture(look(file), base, "epsilon").prediction == "epsilon"
    with pytest.raises(
        InputError, match="prediction_type must be epsilon or v_prediction; got 'v'"
    ):
        architecture(look(file), prediction_type="v")


def test_clips_vocabulary(made, tmp_path, monkeypatch):
    open_clip = pytest.importorskip("open_clip")
    ours, theirs = from_open_clip(), open_clip.get_tokenizer("ViT-L-14")
    prompts = [
        "a photo of a cat",
        "",
        "Hello, World! 123 it's über café 日本 😀",
        "the van gogh-style, (masterpiece:1.2), 8k",
        "word " * 100,
    ]
    found = ours(prompts, padding="max_length", truncation=True, max_length=77).input_ids
    for a, b in zip(found, theirs(prompts).tolist()):
        end = b.index(49407)
        assert a[: end + 1] == b[: end + 1]
        assert set(a[end:]) == {49407}
    assert (len(ours), ours.model_max_length) == (49408, 77)
    assert from_open_clip("!").pad_token_id == 0
    base, file = made["sd1"]
    assert len(tokenizer(base)) < 200
    monkeypatch.setattr(tokens, "HUB", str(tmp_path / "hub"))
    from_open_clip().save_pretrained(tmp_path / "hub")
    monkeypatch.setattr(tokens, "find_spec", lambda name: None)
    assert (len(tokenizer()), tokenizer(pad_token="!").pad_token_id) == (49408, 0)  # noqa: S106
    monkeypatch.setattr(tokens, "HUB", str(tmp_path / "none"))
    with pytest.raises(InputError, match="CLIP's vocabulary is missing: pip install open_clip"):
        tokenizer()
    monkeypatch.undo()
    without = tmp_path / "bare"
    shutil.copytree(base, without, ignore=shutil.ignore_patterns("tokenizer", "*.safetensors"))
    with pytest.raises(InputError, match="the tokenizer has 49408 tokens"):
        Single(file, config=without).tokenizer()
