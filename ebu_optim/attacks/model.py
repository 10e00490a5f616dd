"""The attacked pipeline, split into its parts, and the new word that textual inversion learns.

The conditions of a prompt are one row of a tensor here: text embeddings (L, D), or, for a family
with several conditions, all their numbers (F,). `Attacked.told` splits the row."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from ..diffusion import sample
from ..errors import InputError
from ..manifest import key, of_model, plain
from ..modules import stream
from ..text_to_image import pipelines
from ..text_to_image.families import join, split
from ..text_to_image.prompts import fill
from .prompts import Asked, one_token
from .words import Words


class Attacked:
    """A pipeline in float32 and eval mode, with all weights frozen.

    Args:
        pipe: the pipeline; its parts are moved to `device`.
        looked: the result of `pipelines.look` for it, with the schedule and the latents' shape.
        args: the options for generating images.
    """

    def __init__(self, pipe: Any, looked: pipelines.Looked, args: Any, device: Any) -> None:
        self.family = looked.family
        self.parts = {
            # not diffusers' own `to`, which logs a warning for each part
            n: nn.Module.to(getattr(pipe, n), device, torch.float32).eval().requires_grad_(False)
            for n in self.family.weighty()
        }
        self.unet, self.vae = self.parts[self.family.denoiser], self.parts["vae"]
        self.text_encoders = [self.parts[n] for n in self.family.encoders]
        self.tokenizers = {n: looked.tokenizers[n] for n in self.family.tokenizers()}
        self.schedule, self.shape, self.size = looked.scheduler, looked.latents, looked.resolution
        self.args = looked.family.guided(args, looked.unet)
        self.device, self.folder = device, looked.folder
        self.sampler = self.family.sampler(looked.scheduler)
        self.pipe = pipe
        pipe.register_modules(**looked.tokenizers)
        with torch.no_grad():
            null = self.family.encode(pipe, [""])
        self.shapes, self.null = {n: t.shape[1:] for n, t in null.items()}, join(null).to(device)
        shared = self.family.shared(self.size, lambda x: self.family.to_latents(self.vae, x))
        self.shared = {n: t.to(device) for n, t in shared.items()}

    def made_of(self) -> dict[str, str]:
        """Hashes of the contents of the pipeline's parts."""
        return {
            **{n: of_model(part) for n, part in self.parts.items()},
            **{n: pipelines.tokenizer_hash(self.folder, n) for n in self.family.tokenizers()},
            "scheduler": key(plain(self.schedule.config)),
        }

    @torch.no_grad()
    def encode(self, texts: Sequence[str]) -> Tensor:
        """The conditions of prompts, one row each, on the device."""
        return self.read(texts)

    def read(self, texts: Sequence[str]) -> Tensor:
        """As `encode`, with gradients."""
        return join(self.family.encode(self.pipe, texts)).to(self.device)

    @contextmanager
    def registered(self, tokenizers: Mapping[str, Any]) -> Iterator[None]:
        """Inside the block, the pipeline has these tokenizers, by name."""
        own = {name: getattr(self.pipe, name) for name in tokenizers}
        self.pipe.register_modules(**tokenizers)
        try:
            yield
        finally:
            self.pipe.register_modules(**own)

    def told(self, embeddings: Tensor) -> dict[str, Tensor]:
        """The conditions in such rows, by name."""
        return split(embeddings, self.shapes)

    def denoiser(self, unet: Any = None, guidance: float | None = None) -> Callable[..., Tensor]:
        """The denoiser as a function that the losses and `sample` call.

        Args:
            unet: another denoiser with the same configuration.
            guidance: another guidance scale than that of the options, for a denoiser that takes
                one as an input.
        """
        part = self.unet if unet is None else unet
        scale = self.args.guidance_scale if guidance is None else guidance
        shared = {**self.shared, **self.family.told(part.config, scale)}

        def call(x_t: Tensor, t: Tensor, **told: Tensor) -> Tensor:
            return self.family.predict(part, x_t, t, {**told, **shared})

        call.guide = self.family.guide  # type: ignore[attr-defined] # `sample` looks for it
        return call

    @torch.no_grad()
    def latents(
        self, embeddings: Tensor, seed: int, unet: Any = None, asked: Sequence[Asked] = ()
    ) -> Tensor:
        """Latents (n, C, H, W) on the CPU, generated for the rows `embeddings` of `encode`.

        The same seed gives the same starting noise for every model.

        Args:
            unet: another denoiser than the pipeline's.
            asked: the prompts of the embeddings. If one has its own seed or guidance, images are
                generated one by one. A repeated prompt takes the following seeds.
        """
        found = []
        for a, b, g, guidance in tqdm(
            list(self._batches(len(embeddings), seed, asked)), "generating", leave=False
        ):
            null = self.told(self.null.expand(b - a, *self.null.shape[1:]))
            found.append(
                sample(
                    self.denoiser(unet, guidance),
                    self.sampler,
                    self.told(embeddings[a:b]),
                    self.shape,
                    num_inference_steps=self.args.num_inference_steps,
                    guidance_scale=self.family.away(self.unet.config, guidance),
                    null_condition=null,
                    clip=False,
                    generator=g,
                    device=self.device,
                ).cpu()
            )
        return finite(torch.cat(found))

    def _batches(
        self, n: int, seed: int, asked: Sequence[Asked]
    ) -> Iterator[tuple[int, int, torch.Generator, float]]:
        """First row, end row, generator of the noise and guidance scale of each batch."""
        size, usual = self.args.sample_batch_size, self.args.guidance_scale
        if all(one.seed is None and one.guidance is None for one in asked):
            for i in range(0, n, size):
                yield i, min(i + size, n), stream(seed, i), usual
            return
        seen: Counter[Asked] = Counter()
        for i, one in enumerate(asked):
            g = stream(seed, i)
            if one.seed is not None:
                g = torch.Generator().manual_seed(one.seed + seen[one])
            seen[one] += 1
            yield i, i + 1, g, usual if one.guidance is None else one.guidance

    @torch.no_grad()
    def pictures(self, latents: Tensor) -> Tensor:
        """Images (n, 3, H, W) in [-1, 1] on the CPU."""
        parts = latents.split(self.args.sample_batch_size)
        return finite(
            torch.cat([self.family.to_pixels(self.vae, x.to(self.device)).cpu() for x in parts])
        ).clamp(-1, 1)


def finite(drawn: Tensor) -> Tensor:
    """Return a tensor unchanged if it is finite.

    Raises:
        InputError: it has NaN or Inf, which a judge would take for a forgotten concept.
    """
    if not drawn.isfinite().all():
        raise InputError(
            "the attacked model or its base generates NaN: its weights have diverged, or "
            "--relearn_learning_rate or --inversion_learning_rates are too high"
        )
    return drawn


class NewWord(nn.Module):
    """Prompts in which the input embedding of one word is the only row of `self.word`.

    With several text encoders the row holds the embeddings for all of them, one after the other.

    Args:
        templates: prompts with a place for the word.
        initial: the first value of the row (D,).
    """

    def __init__(self, model: Attacked, templates: Sequence[str], initial: Tensor) -> None:
        super().__init__()
        self.unet, self.words = model.unet, Words(model)
        self.text_encoders = nn.ModuleList(model.text_encoders)
        self.word = nn.Embedding.from_pretrained(initial[None].clone(), freeze=True)
        self.texts = [fill(t, self.words.names[0]) for t in templates]

    def embeddings(self, rows: Tensor) -> Tensor:
        """The conditions of the templates `rows` (n,), as rows of `Attacked.encode`."""
        encoders: list[Any] = list(self.text_encoders)
        sizes = [e.get_input_embeddings().embedding_dim for e in encoders]
        # called as a module, so that the code that learns the word can replace its output
        vectors = self.word(torch.zeros(1, dtype=torch.long, device=self.word.weight.device))
        return self.words.encode([self.texts[i] for i in rows.tolist()], vectors.split(sizes, -1))


def initial_words(model: Attacked, tokens: Sequence[str], seed: int) -> dict[str, Tensor]:
    """The vectors (D,) at which inversion starts: a random vector and the embeddings of tokens.

    The random vector has the mean and the standard deviation of the whole vocabulary."""
    tables = [e.get_input_embeddings().weight.detach() for e in model.text_encoders]
    mean, spread = (torch.cat([f(t, 0).cpu() for t in tables]) for f in (torch.mean, torch.std))
    draw = torch.randn(mean.shape, generator=stream(seed, 0))
    pairs = list(zip(tables, model.tokenizers.values(), strict=True))
    named = {t: torch.cat([table[one_token(words, t)] for table, words in pairs]) for t in tokens}
    return {"random": (mean + spread * draw).to(tables[0]), **named}


def by_encoder(model: Attacked, word: Tensor, name: str) -> dict[str, Tensor]:
    """The word as it is saved.

    With one text encoder the key is the word's name, which pipe.load_textual_inversion uses as the
    token. With several the keys are the text encoders' names."""
    if len(model.text_encoders) == 1:
        return {name: word}
    sizes = [e.get_input_embeddings().embedding_dim for e in model.text_encoders]
    return {n: t.clone() for n, t in zip(model.family.encoders, word.split(sizes), strict=True)}
