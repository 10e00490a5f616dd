"""What differs from one family of text-to-image pipelines to another: the questions that an adapter
answers. Here are the answers that most of them share."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from diffusers import DDIMScheduler, DDPMScheduler
from torch import Tensor

from ...diffusion.sampling import guide
from ...errors import InputError
from ...training.options import ddim_takes
from .unets import Choice

Config = Mapping[str, Any]


class Family:
    """A subclass for each family; it keeps nothing.

    Attributes:
        name: in messages.
        made: of which parts, in messages.
        pipeline: its class in diffusers, whose name model_index.json has.
        parts: name of a part -> its class (None: any) and its file of settings.
        denoiser: the part that is trained.
        encoders: part that reads text -> its tokenizer.
        foreign: parts that make it a pipeline of another family.
        settings: entries of model_index.json on which the conditions depend.
        absent: parts that the pipeline may do without, and here does: it wants to be told so.
        opened: what `pipeline.from_pretrained` is told beside.
        tags: of the model card.
        modules: of --train_modules, beside lora -> which weights of the denoiser these are.
        no_modules: why there are no others of them.
        lora_targets: names of layers, or their ends, where --train_modules lora puts its adapters.
        units: classes that diffusers' gradient checkpointing recomputes one by one.
        lacks: an option with its value, e.g. "--method spm" -> why the family cannot do that.
        readers: the text encoders that a new word is learned in; none: all.
        no_new_word: why textual inversion cannot be tried, where it cannot.
        masks: conditions that say which tokens there are; no noise is added to them.
        reads: the tokenizer by which prompts' lengths are looked at; None: the first.
        usual: value of --guidance_scale, where it is not given.
        framed: the VAE is for films: pictures (n, 3, 1, H, W).
        wide: the text encoders read in float32 under mixed precision too; else in bfloat16.
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
    readers: Sequence[str] = ()
    no_new_word: str | None = None
    masks: Sequence[str] = ()
    reads: str | None = None
    usual: float = 7.5
    framed: bool = False
    wide: bool = True

    def of(self, index: Mapping[str, Any]) -> Family:
        """This one, or its variant for pipelines whose model_index.json leaves parts out."""
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
        """Raises:
        InputError: parts that do not fit together, or that the losses do not know.
        """
        raise NotImplementedError

    def check_tokenizers(self, name: str, tokenizers: Mapping[str, Any]) -> None:
        """Prompts' lengths are looked at by the first of them.

        Raises:
            InputError: others read prompts otherwise.
        """

    def longest(self, tokenizer: Any, config: Config) -> int:
        """Tokens that a prompt may have, begin and end included; `config` is the denoiser's."""
        return tokenizer.model_max_length

    def distilled(self, name: str, config: Config) -> str | None:
        """What a model of this name is distilled to, and what that means for its training."""
        return None

    def refuse(self, args: Any) -> None:
        """Raises:
        InputError: options whose value the family cannot do.
        """
        for said, why in self.lacks.items():
            option, _, value = said.removeprefix("--").partition(" ")
            if getattr(args, option, None) == value:
                raise InputError(f"{said}: not with {self.name}: {why}")
        chosen = args.train_modules
        if chosen not in (None, "lora", *self.modules):
            raise InputError(
                f"--train_modules {chosen}: not with {self.name}: {self.no_modules}; there is "
                f"{', '.join((*self.modules, 'lora'))}"
            )

    # -- latents ---------------------------------------------------------------------------------

    def factor(self, configs: Mapping[str, Config]) -> int:
        """Pixels of a latent's side."""
        return 2 ** (len(configs["vae"].get("block_out_channels", [0] * 4)) - 1)

    def step(self, configs: Mapping[str, Config]) -> int:
        """Of which a picture's side must be a multiple."""
        raise NotImplementedError

    def size(self, configs: Mapping[str, Config]) -> int:
        """A picture's side that the model was made for."""
        return configs[self.denoiser].get("sample_size", 64) * self.factor(configs)

    def latents(self, configs: Mapping[str, Config], size: int) -> tuple[int, int, int]:
        """Shape of what is noised, for pictures with sides of `size`."""
        side = size // self.factor(configs)
        return configs["vae"].get("latent_channels", 4), side, side

    @torch.no_grad()
    def to_latents(self, vae: Any, pixels: Tensor) -> Tensor:
        """What is noised (n, C, H, W), on the CPU, of pictures (n, 3, H, W) in [-1, 1]: the mode of
        the posterior, scaled; one picture at a time."""
        latents = [vae.encode(x[None].to(vae.device)).latent_dist.mode().cpu() for x in pixels]
        return torch.cat(latents) * vae.config.scaling_factor

    @torch.no_grad()
    def to_pixels(self, vae: Any, latents: Tensor) -> Tensor:
        """Pictures, about in [-1, 1], of what is noised; both on the VAE's device."""
        return vae.decode(latents / vae.config.scaling_factor).sample

    # -- the noise schedule ----------------------------------------------------------------------

    def schedule(self, folder: Path, latents: Sequence[int]) -> Any:
        """The scheduler that the losses noise by.

        Args:
            latents: (C, H, W) of what is noised.
        """
        return DDPMScheduler.from_pretrained(folder, subfolder="scheduler")

    def sampler(self, schedule: Any) -> Any:
        """The scheduler that draws."""
        return DDIMScheduler.from_config(schedule.config, clip_sample=False)

    def check_steps(self, args: Any, schedule: Any, *names: str) -> None:
        """Raises:
        InputError: an option of these names is more steps than `sampler` takes.
        """
        ddim_takes(args, schedule, *names)

    # -- guidance --------------------------------------------------------------------------------

    def guides(self, config: Config) -> str:
        """What --guidance_scale is to a denoiser of this configuration: "away" from the empty
        prompt, which takes a second pass; "told", a number beside the prompt; "" nothing."""
        return "away"

    def guided(self, args: Any, config: Config) -> Any:
        """The options, each guidance with its value.

        Raises:
            InputError: one for a model that takes none; two for a model that is told one.
        """
        kind, own = self.guides(config), {}
        for name in ("guidance_scale", "validation_guidance_scale"):
            value = getattr(args, name, None)
            if value is None and hasattr(args, name):
                own[name] = self.usual_of(args.pretrained_model_name_or_path) if kind else 1.0
            elif value not in (None, 1) and not kind:
                raise InputError(
                    f"--{name} {value}: this {self.name} is distilled and takes no guidance: leave "
                    "it out"
                )
        if kind == "told" and hasattr(args, "validation_guidance_scale"):
            said = args.validation_guidance_scale, args.guidance_scale
            given = {v for v in said if v is not None} or {own["guidance_scale"]}
            if len(given) > 1:
                raise InputError(
                    f"--validation_guidance_scale {said[0]}: this {self.name} is told one guidance "
                    f"in training and pictures, and --guidance_scale is {said[1]}: give one of them"
                )
            own = dict.fromkeys(("guidance_scale", "validation_guidance_scale"), given.pop())
        if kind != "away" and hasattr(args, "guided_scale"):
            own["guided_scale"] = 1.0  # of the points of ESD, drawn as any picture
        own = {name: value for name, value in own.items() if getattr(args, name) != value}
        return replace(args, **own) if own else args

    def usual_of(self, name: str) -> float:
        """`usual`, of a model of this name."""
        return self.usual

    def away(self, config: Config, scale: float) -> float:
        """How far guidance leads away from the empty prompt; 1: not at all."""
        return scale if self.guides(config) == "away" else 1.0

    def passes(self, config: Config, scale: float) -> int:
        """Of the denoiser for a step of a picture."""
        return 2 if self.away(config, scale) != 1 else 1

    def told(self, config: Config, scale: float) -> dict[str, Tensor]:
        """The condition, of one row, that says the guidance."""
        return {"guidance": torch.tensor([scale])} if self.guides(config) == "told" else {}

    # -- conditions ------------------------------------------------------------------------------

    def reader(self, folder: Path, variant: str | None, parts: Mapping[str, Any]) -> Any:
        """The pipeline of these text encoders and tokenizers, without denoiser and VAE."""
        return self.pipeline.from_pretrained(
            folder,
            variant=variant,
            use_safetensors=True,
            **{**self.opened, **dict.fromkeys([*self.absent, self.denoiser, "vae"]), **parts},
        )

    def encode(self, pipe: Any, texts: Sequence[str], batch: int = 32) -> dict[str, Tensor]:
        """The conditions of prompts, float32 on the CPU, of a pipeline whose text encoders are
        there; those of "" are what the pipeline's guidance leads away from."""
        raise NotImplementedError

    def of_tokens(
        self, encoders: Sequence[Any], ids: Sequence[Tensor], used: Sequence[Tensor]
    ) -> dict[str, Tensor]:
        """The same of tokens (n, L), for each encoder in turn, with gradients; `used` is 0 at
        padding. For textual inversion, see `no_new_word`."""
        raise NotImplementedError

    def shapes(self, config: Config, length: int) -> dict[str, tuple[int, ...]]:
        """Shape of a row of each condition, by the denoiser's configuration and the number of
        tokens."""
        raise NotImplementedError

    def shared(self, size: int, encode: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
        """Conditions that are the same for all prompts, one row each.

        Args:
            size: side of a picture.
            encode: `to_latents` with the VAE, which is loaded for it.
        """
        return {}

    def predict(self, denoiser: Any, x_t: Tensor, t: Tensor, told: Mapping[str, Tensor]) -> Tensor:
        """The denoiser's prediction, like x_t (n, C, H, W); `told` has n rows, or the one of
        `shared`."""
        raise NotImplementedError

    def drawing(self, pipe: Any, size: int) -> dict[str, Any]:
        """What a call of the pipeline needs beside a prompt, to draw from text alone."""
        return {}

    def fits(self, name: str, takes: int | None, width: int, times: int = 1) -> None:
        """Raises:
        InputError: the transformer takes another width than the text encoder makes.
        """
        if takes != times * width:
            raise InputError(
                f"{name}: the transformer takes text embeddings of {takes}, its text encoder makes "
                f"{f'{times} times ' if times > 1 else ''}{width}"
            )

    def guide(self, null: Tensor, text: Tensor, scale: float) -> Tensor:
        """Of what is predicted without and with a prompt, what guidance makes."""
        return guide(null, text, scale)

    def unread(self, config: Config) -> tuple[str, ...]:
        """How the names begin of weights that decide nothing, and have no gradient."""
        return ()

    def guiding(self, scale: float) -> dict[str, Any]:
        """What a call of the pipeline is told of --guidance_scale."""
        return {"guidance_scale": scale}
