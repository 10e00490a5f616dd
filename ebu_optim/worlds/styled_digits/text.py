"""The world's text encoder: it learns to say which digit and which style a caption asks for.

Stable Diffusion's comes from CLIP, trained on captions and pictures before there was a UNet.
Trained together with the UNet instead, this one had taught it the styles after 750 steps, and no
digit.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel

from .captions import CONTENTS, LENGTH, STYLES, TRAINED, Caption, captions, token_ids

WIDTH = 96  # of a token's embedding
_CONTENTS, _STYLES = (*CONTENTS, None), tuple(STYLES)


class Reader(nn.Module):
    """The encoder and what reads its tokens: ids (n, LENGTH) -> logits of the content (the last is
    "none asked for") and of the style, (n, LENGTH, 11) and (n, LENGTH, 6)."""

    def __init__(self, tokenizer: Any) -> None:
        super().__init__()
        self.text_encoder = CLIPTextModel(
            CLIPTextConfig(
                vocab_size=len(tokenizer),
                hidden_size=WIDTH,
                intermediate_size=4 * WIDTH,
                num_hidden_layers=2,
                num_attention_heads=4,
                max_position_embeddings=LENGTH,
                bos_token_id=tokenizer.bos_token_id,
                eos_token_id=tokenizer.eos_token_id,
                pad_token_id=tokenizer.pad_token_id,
            )
        )
        self.head = nn.Linear(WIDTH, len(_CONTENTS) + len(_STYLES))

    def forward(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        content, style = self.head(self.text_encoder(ids)[0]).split(
            (len(_CONTENTS), len(_STYLES)), dim=-1
        )
        return content, style


class Loss:
    """Cross-entropies at every token from the end of the caption on, where all of it was seen.
    Each template is drawn as often as the others; the empty prompt asks for nothing: never."""

    def __init__(self, tokenizer: Any, batch: int, device: torch.device | str) -> None:
        known = captions(TRAINED)
        self.batch, self.device, self.end = batch, device, tokenizer.eos_token_id
        self.ids, self.asked = token_ids([c.text for c in known], tokenizer), asked(known)
        each = torch.tensor([TRAINED.index(c.template) for c in known])
        self.weights = 1 / each.bincount()[each]

    def __call__(self, model: nn.Module) -> Tensor:
        rows = torch.multinomial(self.weights, self.batch, replacement=True)
        ids = self.ids[rows].to(self.device)
        past = ids == self.end
        value = torch.zeros((), device=self.device)
        for logits, labels in zip(model(ids), self.asked):
            every = labels[rows].to(self.device)[:, None].expand(-1, LENGTH)
            value = value + F.cross_entropy(logits[past], every[past])
        return value


def asked(known: list[Caption]) -> tuple[Tensor, Tensor]:
    """What the captions ask for, as numbers: contents (n,) and styles (n,)."""
    return (
        torch.tensor([_CONTENTS.index(c.content) for c in known]),
        torch.tensor([_STYLES.index(c.style) for c in known]),
    )


@torch.no_grad()
def understood(model: Reader, known: list[Caption], tokenizer: Any) -> float:
    """The share of captions whose last token tells both what is asked for."""
    ids = token_ids([c.text for c in known], tokenizer).to(model.head.weight.device)
    right = torch.ones(len(known), dtype=torch.bool)
    for logits, labels in zip(model(ids), asked(known)):
        right &= logits[:, -1].argmax(-1).cpu() == labels
    return right.float().mean().item()
