"""The attacked pipeline in parts, and the new word that textual inversion learns in it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from diffusers import DDIMScheduler
from torch import Tensor, nn
from tqdm.auto import tqdm

from ..diffusion import sample
from ..errors import InputError
from ..manifest import key, of_model, plain
from ..modules import stream
from ..text_to_image import pipelines
from ..text_to_image.prompts import encode
from .prompts import Asked, one_token, tokens_around


class Attacked:
    """A pipeline in float32 and eval mode, nothing of it trained.

    Args:
        pipe: its parts are moved to `device`.
        looked: of the same pipeline, for the schedule and the latents' shape.
        args: how pictures are drawn.
    """

    def __init__(self, pipe: Any, looked: pipelines.Looked, args: Any, device: Any) -> None:
        self.unet, self.vae, self.text_encoder = (
            # not diffusers' own `to`, which logs a warning for each part
            nn.Module.to(m, device, torch.float32).eval().requires_grad_(False)
            for m in (pipe.unet, pipe.vae, pipe.text_encoder)
        )
        self.tokenizer, self.schedule, self.shape = (
            looked.tokenizer,
            looked.scheduler,
            looked.latents,
        )
        self.args, self.device, self.folder = args, device, looked.folder
        self.sampler = DDIMScheduler.from_config(looked.scheduler.config, clip_sample=False)
        self.null = self.encode([""])

    def made_of(self) -> dict[str, str]:
        """What draws: hashes of its parts' contents."""
        return {
            **{n: of_model(getattr(self, n)) for n in ("unet", "vae", "text_encoder")},
            "tokenizer": pipelines.tokenizer_hash(self.folder),
            "scheduler": key(plain(self.schedule.config)),
        }  # fmt: skip

    def encode(self, texts: Sequence[str]) -> Tensor:
        """(n, L, D) on the device."""
        return encode(texts, self.tokenizer, self.text_encoder).to(self.device)

    @torch.no_grad()
    def latents(
        self, embeddings: Tensor, seed: int, unet: Any = None, asked: Sequence[Asked] = ()
    ) -> Tensor:
        """(n, C, H, W) on the CPU, drawn for the embeddings (n, L, D); the same starting noise for
        the same seed, whatever the model.

        Args:
            unet: another than the pipeline's.
            asked: what the embeddings are of: one with a seed of its own is drawn from that, one
                by one; where it comes again, from the next seed.
        """
        found = []
        for a, b, g, guidance in tqdm(
            list(self._batches(len(embeddings), seed, asked)), "drawing", leave=False
        ):
            null = {"encoder_hidden_states": self.null.expand(b - a, -1, -1)}
            found.append(
                sample(
                    unet or self.unet, self.sampler, {"encoder_hidden_states": embeddings[a:b]},
                    self.shape, num_inference_steps=self.args.num_inference_steps,
                    guidance_scale=guidance, null_condition=null, clip=False, generator=g,
                    device=self.device,
                ).cpu()
            )  # fmt: skip
        return finite(torch.cat(found))

    def _batches(
        self, n: int, seed: int, asked: Sequence[Asked]
    ) -> Iterator[tuple[int, int, torch.Generator, float]]:
        """First and last row of each batch, its starting noise and its guidance."""
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
        """(n, 3, H, W) in [-1, 1] on the CPU."""
        scale = self.vae.config.scaling_factor
        parts = latents.split(self.args.sample_batch_size)
        return finite(
            torch.cat([self.vae.decode(x.to(self.device) / scale).sample.cpu() for x in parts])
        ).clamp(-1, 1)


def finite(drawn: Tensor) -> Tensor:
    """Raises:
    InputError: NaN or Inf, which a judge would take for a forgotten concept.
    """
    if not drawn.isfinite().all():
        raise InputError(
            "the attacked model or its base draws NaN: its weights have diverged, or "
            "--relearn_learning_rate or --inversion_learning_rates are too high"
        )
    return drawn


class NewWord(nn.Module):
    """Prompts in which one word's input embedding is `self.word`, the only row of a table; the
    tokenizer and the text encoder's vocabulary stay as they are.

    Args:
        templates: with a place where the word goes.
        initial: (D,) its first value.
    """

    def __init__(self, model: Attacked, templates: Sequence[str], initial: Tensor) -> None:
        super().__init__()
        self.unet, self.text_encoder = model.unet, model.text_encoder
        self.word = nn.Embedding.from_pretrained(initial[None].clone(), freeze=True)
        rows = [tokens_around(model.tokenizer, t) for t in templates]
        self.ids = torch.tensor([ids for ids, _ in rows], device=model.device)
        self.at = torch.tensor([at for _, at in rows], device=model.device)
        # the end, after the place of the word, where such a token stands too; then padding
        number = torch.arange(self.ids.shape[1], device=model.device)
        ends = (self.ids == model.tokenizer.eos_token_id) & (number > self.at[:, None])
        self.used = (number <= ends.int().argmax(1, keepdim=True)).long()
        self.masks = getattr(self.text_encoder.config, "use_attention_mask", False)

    def embeddings(self, rows: Tensor) -> Tensor:
        """(n, L, D) text embeddings of the templates `rows` (n,)."""
        ids, at = self.ids[rows], self.at[rows]
        with self._put_in(at):
            return self.text_encoder(ids, self.used[rows] if self.masks else None)[0]

    @contextmanager
    def _put_in(self, at: Tensor) -> Iterator[None]:
        number = torch.arange(self.ids.shape[1], device=at.device)
        mask = (number == at[:, None])[..., None]
        table = self.text_encoder.get_input_embeddings()
        handle = table.register_forward_hook(
            lambda _module, _args, out: torch.where(
                mask, self.word(torch.zeros_like(at))[:, None], out
            )
        )
        try:
            yield
        finally:
            handle.remove()


def initial_words(model: Attacked, tokens: Sequence[str], seed: int) -> dict[str, Tensor]:
    """Where inversion begins, (D,) each: a random draw with the mean and the spread of the whole
    vocabulary, and the embeddings of tokens."""
    table = model.text_encoder.get_input_embeddings().weight.detach()
    mean, spread = table.mean(0).cpu(), table.std(0).cpu()
    draw = torch.randn(mean.shape, generator=stream(seed, 0))
    named = {t: table[one_token(model.tokenizer, t)].clone() for t in tokens}
    return {"random": (mean + spread * draw).to(table), **named}
