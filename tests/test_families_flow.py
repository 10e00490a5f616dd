"""Families with a transformer in small: what they compute is what diffusers computes, and a model
that is trained on these losses draws what it is asked for."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers", "5", reason="the tiny tokenizers are made as of 5")
pytest.importorskip("peft", reason="peft comes with the extra text_to_image")

import diffusers

from ebu_optim import diffusion as D
from ebu_optim.errors import InputError

from .cross_attention import pixart
from .flow_families import MADE, look, module, opened, options, prompted
from .text_to_image import LENGTH, sd3

TEXTS = ["a cat", "", "a red car"]
#: Tokens of a text in each family.
TOLD = {
    "sd3": LENGTH + 256,
    "flux_dev": 512,
    "flux_schnell": 256,
    "klein": 512,
    "z_image": 512,
    "pixart": 300,
    "sana": 300,
    "qwen_image": 512,
}

pytestmark = pytest.mark.skipif(
    not hasattr(diffusers, "Flux2KleinPipeline"), reason="this diffusers has no FLUX.2 klein"
)


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("flow")
    for name, make in MADE.items():
        make(out / name)
    # a latent's 16 channels fit through a width of 32, a patch of four of them would not
    sd3(out / "fine", patch_size=1)
    pixart(out / "fine_pixart", patch_size=1)
    return out


def generator(seed: int = 3) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# -- what is computed is what the pipeline computes ---------------------------------------------


@pytest.mark.parametrize("name", MADE)
def test_a_drawing_is_the_pipelines(name, made, tmp_path):
    """Signs, times, packing, guidance, the shift of the steps and the latents' scale."""
    scale = () if "schnell" in name or "distilled" in name else ("--guidance_scale", 5)
    args, looked, model = prompted(made / name, TEXTS, tmp_path, *scale)
    family, pipe, side = looked.family, opened(made / name), looked.resolution
    if not D.flow.is_flow(pipe.scheduler):  # DPM-Solver, which this package does not draw by
        pipe.scheduler = family.sampler(pipe.scheduler)
    with torch.no_grad():
        theirs = pipe(
            prompt="a red car",
            height=side,
            width=side,
            num_inference_steps=3,
            output_type="pt",
            generator=generator(),
            **family.guiding(args.guidance_scale),
            **family.drawing(pipe, side),
        ).images[0]
    x = D.sample(
        model,
        family.sampler(looked.scheduler),
        torch.tensor([2]),
        looked.latents,
        num_inference_steps=3,
        guidance_scale=family.away(looked.unet, args.guidance_scale),
        null_condition=1,
        clip=False,
        generator=generator(),
    )
    ours = family.to_pixels(pipe.vae, x)[0] / 2 + 0.5
    torch.testing.assert_close(ours.clamp(0, 1), theirs, atol=1e-5, rtol=0)
    args = options(
        made / name,
        tmp_path,
        "--num_validation_images",
        1,
        "--validation_inference_steps",
        3,
        "--seed",
        3,
        *(("--validation_guidance_scale", 5) if scale else ()),
    ).resolved()
    args = family.guided(args, looked.unet)
    found = module("validation").draw(
        args, model, looked.scheduler, [2], 1, looked.latents, made / name
    )
    assert (found[0].float() - theirs * 255).abs().max() <= 1


@pytest.mark.parametrize("name", [n for n in MADE if "distilled" not in n])
def test_prompts_of_one_batch_are_told_apart(name, made, tmp_path):
    """Prompts of other lengths, one beside the other, as each alone."""
    _, looked, model = prompted(made / name, TEXTS, tmp_path)
    x = torch.randn(3, *looked.latents, generator=generator())
    t = torch.tensor([900.0, 500.0, 20.0])
    with torch.no_grad():
        together = model(x, t, torch.arange(3))
        alone = [model(x[i : i + 1], t[i : i + 1], torch.tensor([i])) for i in range(3)]
        other = model(x[:1], t[:1], torch.tensor([2]))
    torch.testing.assert_close(together, torch.cat(alone), atol=1e-5, rtol=1e-4)
    assert (together[:1] - other).abs().max() > 1e-5


@pytest.mark.parametrize("name", TOLD)
def test_the_conditions_have_their_shapes(name, made, tmp_path):
    _, looked, model = prompted(made / name, TEXTS, tmp_path)
    shapes = looked.family.shapes(looked.unet, looked.tokenizer.model_max_length)
    assert {n: tuple(s) for n, s in model.shapes.items()} == shapes
    assert shapes["encoder_hidden_states"][0] == TOLD[name]


@pytest.mark.parametrize("name", ["z_image", "pixart", "sana", "qwen_image"])
def test_noise_on_a_condition_leaves_its_mask(name, made, tmp_path):
    _, _, model = prompted(made / name, TEXTS, tmp_path)
    numbers = torch.arange(3)
    told = model.condition(numbers)
    with D.noisy_condition(model.class_embedding, 2.0):
        noisy = model.condition(numbers)
    assert torch.equal(noisy["mask"], told["mask"])
    assert len(set(told["mask"].sum(1).tolist())) == 3
    assert not torch.equal(noisy["encoder_hidden_states"], told["encoder_hidden_states"])


def test_sd3_without_t5_has_zeros_in_its_place(made, tmp_path):
    for name in ("sd3", "sd3_without_t5"):
        _, looked, model = prompted(made / name, ["a dog"], tmp_path)
        assert len(looked.family.encoders) == (3 if name == "sd3" else 2)
        text = model.condition(torch.tensor([0]))["encoder_hidden_states"]
        assert bool(text[:, LENGTH:].abs().max()) == (name == "sd3")


@pytest.mark.parametrize(
    "name", ["sd3", "flux_dev", "klein", "z_image", "pixart", "sana", "qwen_image"]
)
def test_latents_are_what_the_pipeline_encodes_and_decodes(name, made):
    looked, pipe = look(made / name), opened(made / name)
    family, vae = looked.family, pipe.vae
    pixels = torch.rand(2, 3, looked.resolution, looked.resolution, generator=generator()) * 2 - 1
    x = family.to_latents(vae, pixels)
    assert x.shape[1:] == looked.latents
    with torch.no_grad():
        posterior = vae.encode(pixels.unsqueeze(2) if name == "qwen_image" else pixels)
        mode = posterior.latent if name == "sana" else posterior.latent_dist.mode()
        if name == "klein":
            theirs = pipe._encode_vae_image(pixels, None)
        elif name == "qwen_image":
            of = vae.config.latents_mean, vae.config.latents_std
            mean, spread = (torch.tensor(numbers).view(-1, 1, 1) for numbers in of)
            theirs = (mode[:, :, 0] - mean) / spread
        else:
            theirs = (mode - (vae.config.get("shift_factor") or 0)) * vae.config.scaling_factor
        torch.testing.assert_close(x, theirs, rtol=1e-4, atol=1e-5)
        back = vae.decode(mode).sample
        back = back[:, :, 0] if name == "qwen_image" else back
    torch.testing.assert_close(family.to_pixels(vae, x), back, rtol=1e-4, atol=1e-5)


def test_sigmas_are_learned_at_as_sd3_does_and_any_number_of_steps_draws(made, tmp_path):
    looked = look(made / "sd3")
    assert looked.scheduler.config.weighting_scheme == "logit_normal"
    assert look(made / "flux_dev").scheduler.config.weighting_scheme == "none"
    assert "weighting_scheme" not in looked.family.sampler(looked.scheduler).config
    args = options(made / "sd3", tmp_path, "--num_inference_steps", 1500).resolved()
    looked.family.check_steps(args, looked.scheduler, "num_inference_steps")


def test_memory_is_counted_by_the_transformers_blocks(made, tmp_path):
    _, looked, model = prompted(made / "sd3", ["a cat"], tmp_path)
    memory, number = module("memory"), torch.zeros(1, dtype=torch.long)
    with memory.saved(model.denoiser, looked.family.units) as (units, inputs):
        model(torch.zeros(1, *looked.latents), torch.tensor([500.0]), number)
    picture, text, time = 16 * 32, (LENGTH + 256) * 32, 32
    assert set(inputs) == {"transformer_blocks.0", "transformer_blocks.1"} < set(units)
    assert set(inputs.values()) == {4 * (picture + text + time)}
    with torch.device("meta"):
        empty = diffusers.SD3Transformer2DModel.from_config(looked.unet)
    one = memory.passes(empty, looked)
    assert one.kept_checkpointed < one.kept
    assert one.prompt == 4 * ((LENGTH + 256) * 64 + 64)


@pytest.mark.parametrize("name", ["flux_dev", "klein", "z_image", "pixart", "sana", "qwen_image"])
def test_memory_is_counted_without_data(name, made):
    looked = look(made / name)
    with torch.device("meta"):
        empty = looked.family.kind("transformer").from_config(looked.unet)
    found = {type(m).__name__ for m in empty.modules()}
    assert set(looked.family.units) <= found
    one = module("memory").passes(empty, looked)
    assert 0 < one.kept_checkpointed < one.kept
    assert one.drawn > 0
    assert min(*one.decoded.values(), *one.encoded.values()) > 0


@pytest.mark.parametrize("name", TOLD)
@pytest.mark.parametrize("modules", ["full", "lora"])
def test_what_is_trained_has_a_gradient(modules, name, made, tmp_path):
    """Several processes would wait for ever for one that never comes."""
    if (name, modules) == ("pixart", "lora"):
        pytest.skip("it has none")
    args, looked, model = prompted(made / name, TEXTS, tmp_path, "--train_modules", modules)
    module("modules").choose(model.denoiser, args, looked.family)
    x = torch.randn(2, *looked.latents, generator=generator())
    model(x, torch.tensor([500.0, 20.0]), torch.tensor([0, 2])).sum().backward()
    assert not [n for n, p in model.trained().items() if p.grad is None]


def test_a_model_whose_weights_diffusers_moves_or_rounds_is_refused(made, tmp_path):
    """Under group offloading gradients are NaN, zero or noise, without an error."""
    from ebu_optim import DiagonalFisher, forget

    for call, more in (
        ("enable_group_offload", {"onload_device": torch.device("cpu"), "num_blocks_per_group": 1}),
        (
            "enable_layerwise_casting",
            {"storage_dtype": torch.float8_e4m3fn, "compute_dtype": torch.float32},
        ),
    ):
        pipe = opened(made / "sd3")
        getattr(pipe.transformer, call)(**more)
        with pytest.raises(InputError, match=rf"model's transformer: diffusers' {call}\(\)"):
            forget(pipe, "cat", output_dir=tmp_path / "o")
        if call == "enable_group_offload":
            with pytest.raises(ValueError, match="model: diffusers' enable_group_offload"):
                DiagonalFisher.estimate(pipe.transformer, None, [0])
    assert not list(tmp_path.iterdir())


# -- the conventions of sign and time -----------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["fine", "flux_dev", "klein", "z_image", "fine_pixart", "sana", "qwen_image"]
)
def test_a_model_trained_on_two_colours_draws_what_it_is_asked_for(name, made, tmp_path):
    """Were the sign of the velocity or the time another in the losses than in the drawing, which is
    the pipeline's, this would draw something else."""
    texts, colours = ["cat", "a red person"], torch.tensor([[0.8, -0.6], [-0.5, 0.9]])
    _, looked, model = prompted(made / name, texts, tmp_path)
    told = model.condition(torch.arange(2))
    # most of a text is padding, which takes time, or the template, which says the same of both
    part = {"z_image": slice(None), "qwen_image": slice(110, 150)}.get(name, slice(32))
    told |= {n: told[n][:, part] for n in ("encoder_hidden_states", "mask") if n in told}
    shared = {n: model.get_buffer(n) for n in model.shared}
    told = module("families").Conditions(told, shared)
    model = module("modules").Prompted(model.denoiser, told, looked.family)
    images, half = torch.zeros(2, *looked.latents), looked.latents[0] // 2
    images[:, :half], images[:, half:] = (colours[:, i].view(2, 1, 1, 1) for i in (0, 1))
    steps, schedule = 80, looked.scheduler
    if noise := not D.flow.is_flow(schedule):  # at the usual end an error of noise is a hundredfold
        schedule = diffusers.DDPMScheduler.from_config(schedule.config, beta_end=0.006)
    opt = torch.optim.AdamW(model.denoiser.parameters(), lr=7e-3)
    fall = torch.optim.lr_scheduler.LinearLR(opt, 1.0, 0.02, total_iters=steps)
    g, labels = generator(0), torch.arange(2).repeat(2)
    for _ in range(steps):
        loss = D.denoising_loss(
            model, images[labels], labels, schedule, reduction="mean", generator=g
        )
        opt.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        opt.step()
        fall.step()
    x = D.sample(
        model,
        looked.family.sampler(schedule),
        torch.arange(2),
        looked.latents,
        num_inference_steps=12,
        clip=noise,
        generator=g,
    )
    asked, other = ((x - pictures).abs().mean((1, 2, 3)) for pictures in (images, images.flip(0)))
    assert asked.max() < 0.4 < 1 < other.min()
