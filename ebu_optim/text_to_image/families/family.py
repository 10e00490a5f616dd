"""The interface of an adapter: what differs between families of text-to-image pipelines.

The defaults here suit most families."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from diffusers import DDIMScheduler, DDPMScheduler
from torch import Tensor

from ...baselines import closed_forms
from ...diffusion.sampling import guide
from ...errors import InputError
from ...training.options import ddim_takes
from .unets import Choice

Config = Mapping[str, Any]
#: What the families with a transformer lack, see `Family.lacks`.
FOR_UNETS: Mapping[str, str] = {
    "--method spm": "SPM's adapters need the attention of a UNet",
    **{
        f"--method {method}": f"{recipe.title} edits the keys and values of a UNet's cross "
        "attention, and those of a transformer do not read the text embeddings as they are"
        for method, recipe in closed_forms.items()
    },
}


class Family:
    """The adapter of a family, without state. Each family has a subclass.

    Attributes:
        name: the name in messages.
        made: the parts of the pipeline, in messages.
        pipeline: the class in diffusers whose name is in model_index.json.
        parts: name of a part -> its class (None: any) and its configuration file.
        denoiser: the part that is trained.
        encoders: name of a text encoder -> name of its tokenizer.
        foreign: parts that show that a pipeline belongs to another family.
        settings: entries of model_index.json on which the conditions depend.
        absent: optional parts that this family lacks; the pipeline is loaded with None for them.
        opened: further arguments of `pipeline.from_pretrained`.
        tags: tags of the model card.
        modules: value of --train_modules, except lora -> the choice of the denoiser's weights.
        no_modules: why the other values of --train_modules are not supported.
        lora_targets: names of layers, or ends of names, to which --train_modules lora adds
            adapters.
        units: names of the classes that diffusers' gradient checkpointing recomputes one by one.
        lacks: an option with its value, e.g. "--method spm" -> why the family does not support it.
        searched: the text encoders whose tokens UnlearnDiffAtk searches, which must have one
            vocabulary; empty: all.
        masks: conditions that mark the used tokens; no noise is added to them.
        reads: the tokenizer that limits the length of prompts; None: the first.
        usual: default of --guidance_scale.
        framed: the VAE is for videos and takes images as (n, 3, 1, H, W).
        wide: the text encoders run in float32 under mixed precision too; else in bfloat16.
    """

    name: str
    made: str
    pipeline: Any
    parts: Mapping[str, tuple[Any, str]]
    denoiser: str
    encoders: Mapping[str, str]
    foreign: frozenset[str] = frozenset()
    settings: tuple[str, ...] = ()
    absent: Sequence[str] = ()
    opened: Mapping[str, Any] = {}
    tags: tuple[str, ...] = ()
    modules: Mapping[str, Choice]
    no_modules: str
    lora_targets: Sequence[str]
    units: Sequence[str]
    lacks: Mapping[str, str] = {}
    searched: Sequence[str] = ()
    masks: Sequence[str] = ()
    reads: str | None = None
    usual: float = 7.5
    framed: bool = False
    wide: bool = True

    def of(self, index: Mapping[str, Any]) -> Family:
        """This adapter, or its variant for a pipeline with this content of model_index.json."""
        return self

    def kind(self, part: str) -> Any:
        """The class of a part."""
        return self.parts[part][0]

    def tokenizers(self) -> Iterator[str]:
        return iter(self.encoders.values())

    def weighty(self) -> list[str]:
        """The parts that have weights."""
        return [self.denoiser, "vae", *self.encoders]

    def check(self, name: str, configs: Mapping[str, Config]) -> None:
        """Check the configurations of the parts.

        Raises:
            InputError: parts do not fit together, or the losses do not support them.
        """
        raise NotImplementedError

    def check_tokenizers(self, name: str, tokenizers: Mapping[str, Any]) -> None:
        """Check that the tokenizers agree, where the length of prompts is checked by only one.

        Raises:
            InputError: they tokenize prompts differently.
        """

    def longest(self, tokenizer: Any, config: Config) -> int:
        """The maximal number of tokens of a prompt, begin and end included.

        Args:
            config: the denoiser's configuration.
        """
        return tokenizer.model_max_length

    def distilled(self, name: str, config: Config) -> str | None:
        """A warning about the training of a distilled model; None for any other model."""
        return None

    def refuse(self, args: Any) -> None:
        """Check that the family supports the options.

        Raises:
            InputError: an option has a value that the family does not support.
        """
        for said, why in self.lacks.items():
            option, _, value = said.removeprefix("--").partition(" ")
            if getattr(args, option, None) == value:
                raise InputError(f"{said} is not supported for {self.name}: {why}")
        chosen = args.train_modules
        if chosen not in (None, "lora", *self.modules):
            raise InputError(
                f"--train_modules {chosen} is not supported for {self.name}: {self.no_modules}; "
                f"give one of {', '.join((*self.modules, 'lora'))}"
            )

    # -- latents ---------------------------------------------------------------------------------

    def factor(self, configs: Mapping[str, Config]) -> int:
        """The number of pixels per latent along a side."""
        return 2 ** (len(configs["vae"].get("block_out_channels", [0] * 4)) - 1)

    def step(self, configs: Mapping[str, Config]) -> int:
        """The number of pixels of which an image's side must be a multiple."""
        raise NotImplementedError

    def size(self, configs: Mapping[str, Config]) -> int:
        """The side in pixels of the images that the model was made for."""
        return configs[self.denoiser].get("sample_size", 64) * self.factor(configs)

    def latents(self, configs: Mapping[str, Config], size: int) -> tuple[int, int, int]:
        """The shape (C, H, W) of the latents of images with sides of `size` pixels."""
        side = size // self.factor(configs)
        return configs["vae"].get("latent_channels", 4), side, side

    @torch.no_grad()
    def to_latents(self, vae: Any, pixels: Tensor) -> Tensor:
        """Latents (n, C, h, w) on the CPU of images (n, 3, H, W) in [-1, 1].

        They are the scaled mode of the posterior, encoded one image at a time."""
        latents = [vae.encode(x[None].to(vae.device)).latent_dist.mode().cpu() for x in pixels]
        return torch.cat(latents) * vae.config.scaling_factor

    @torch.no_grad()
    def to_pixels(self, vae: Any, latents: Tensor) -> Tensor:
        """Images (n, 3, H, W), about in [-1, 1], of latents; both are on the VAE's device."""
        return vae.decode(latents / vae.config.scaling_factor).sample

    # -- the noise schedule ----------------------------------------------------------------------

    def schedule(self, folder: Path, latents: Sequence[int]) -> Any:
        """The noise schedule of the losses.

        Args:
            latents: (C, H, W) of the latents.
        """
        return DDPMScheduler.from_pretrained(folder, subfolder="scheduler")

    def sampler(self, schedule: Any) -> Any:
        """The scheduler that generates images, for a noise schedule."""
        return DDIMScheduler.from_config(schedule.config, clip_sample=False)

    def check_steps(self, args: Any, schedule: Any, *names: str) -> None:
        """Check numbers of sampling steps.

        Raises:
            InputError: an option of these names asks for more steps than `sampler` supports.
        """
        ddim_takes(args, schedule, *names)

    # -- guidance --------------------------------------------------------------------------------

    def guides(self, config: Config) -> str:
        """What --guidance_scale means for a denoiser of this configuration.

        "away": classifier-free guidance away from the empty prompt, which takes a second pass.
        "told": a number that is an input of the denoiser. "": nothing."""
        return "away"

    def guided(self, args: Any, config: Config) -> Any:
        """The options with a value for each guidance scale.

        Raises:
            InputError: a guidance scale for a model without guidance; or two different ones for a
                model that takes the guidance scale as an input.
        """
        kind, own = self.guides(config), {}
        for name in ("guidance_scale", "validation_guidance_scale"):
            value = getattr(args, name, None)
            if value is None and hasattr(args, name):
                own[name] = self.usual_of(args.pretrained_model_name_or_path) if kind else 1.0
            elif value not in (None, 1) and not kind:
                raise InputError(
                    f"--{name} {value}: this {self.name} is distilled and takes no guidance: leave "
                    "the option out"
                )
        if kind == "told" and hasattr(args, "validation_guidance_scale"):
            said = args.validation_guidance_scale, args.guidance_scale
            given = {v for v in said if v is not None} or {own["guidance_scale"]}
            if len(given) > 1:
                raise InputError(
                    f"--validation_guidance_scale {said[0]}: this {self.name} takes one guidance "
                    f"scale for training and images, and --guidance_scale is {said[1]}: give one "
                    "of them"
                )
            own = dict.fromkeys(("guidance_scale", "validation_guidance_scale"), given.pop())
        if kind != "away" and hasattr(args, "guided_scale"):
            own["guided_scale"] = 1.0  # the points of ESD are generated like other images
        own = {name: value for name, value in own.items() if getattr(args, name) != value}
        return replace(args, **own) if own else args

    def usual_of(self, name: str) -> float:
        """The default guidance scale of a model of this name."""
        return self.usual

    def away(self, config: Config, scale: float) -> float:
        """The scale of classifier-free guidance; 1: none."""
        return scale if self.guides(config) == "away" else 1.0

    def passes(self, config: Config, scale: float) -> int:
        """The number of passes through the denoiser per image and step."""
        return 2 if self.away(config, scale) != 1 else 1

    def told(self, config: Config, scale: float) -> dict[str, Tensor]:
        """The condition with one row that holds the guidance scale, if the denoiser takes one."""
        return {"guidance": torch.tensor([scale])} if self.guides(config) == "told" else {}

    # -- conditions ------------------------------------------------------------------------------

    def reader(self, folder: Path, variant: str | None, parts: Mapping[str, Any]) -> Any:
        """A pipeline of these text encoders and tokenizers, without denoiser and VAE."""
        return self.pipeline.from_pretrained(
            folder,
            variant=variant,
            use_safetensors=True,
            **{**self.opened, **dict.fromkeys([*self.absent, self.denoiser, "vae"]), **parts},
        )

    def encode(self, pipe: Any, texts: Sequence[str], batch: int = 32) -> dict[str, Tensor]:
        """The conditions of prompts, float32 on the CPU, with one row per prompt.

        Guidance leads away from the conditions of "". Where gradients are enabled, they reach the
        outputs of the text encoders' input embeddings.

        Args:
            pipe: a pipeline with text encoders, see `reader`.
        """
        raise NotImplementedError

    def shapes(self, config: Config, length: int) -> dict[str, tuple[int, ...]]:
        """The shape of a row of each condition.

        Args:
            config: the denoiser's configuration.
            length: the number of tokens.
        """
        raise NotImplementedError

    def shared(self, size: int, encode: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
        """Conditions that are the same for all prompts, one row each.

        Args:
            size: the side of an image in pixels.
            encode: `to_latents` with the VAE, which it loads.
        """
        return {}

    def predict(self, denoiser: Any, x_t: Tensor, t: Tensor, told: Mapping[str, Tensor]) -> Tensor:
        """The denoiser's prediction, of the shape of x_t (n, C, H, W).

        Args:
            told: conditions with n rows, and those of `shared` with one.
        """
        raise NotImplementedError

    def drawing(self, pipe: Any, size: int) -> dict[str, Any]:
        """Further arguments that a call of the pipeline needs to generate from text alone."""
        return {}

    def fits(self, name: str, takes: int | None, width: int, times: int = 1) -> None:
        """Check that the text encoder's width fits the transformer.

        Raises:
            InputError: `takes` is not `times` * `width`.
        """
        if takes != times * width:
            raise InputError(
                f"{name}: the transformer takes text embeddings of {takes}, its text encoder makes "
                f"{f'{times} times ' if times > 1 else ''}{width}"
            )

    def guide(self, null: Tensor, text: Tensor, scale: float) -> Tensor:
        """The guided prediction, from those without (`null`) and with (`text`) a prompt."""
        return guide(null, text, scale)

    def unread(self, config: Config) -> tuple[str, ...]:
        """Prefixes of the names of weights that have no effect, and therefore no gradient."""
        return ()

    def guiding(self, scale: float) -> dict[str, Any]:
        """The arguments of a call of the pipeline for --guidance_scale."""
        return {"guidance_scale": scale}
