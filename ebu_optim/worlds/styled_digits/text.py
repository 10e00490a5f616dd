"""The world's text encoder, trained to predict the digit and the style that a caption asks for.

Stable Diffusion's text encoder comes from CLIP, which was trained on captions and images before
the UNet. When this text encoder was trained together with the UNet instead, the model had learned
the styles after 750 steps, but no digit.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel

from .captions import CONTENTS, LENGTH, STYLES, TRAINED, Caption, captions, token_ids

WIDTH = 96  # width of a token's embedding
_CONTENTS, _STYLES = (*CONTENTS, None), tuple(STYLES)


class Reader(nn.Module):
    """The text encoder with a head that classifies every token.

    Token ids (n, LENGTH) -> logits of the content (n, LENGTH, 11), whose last class means that the
    caption asks for none, and of the style (n, LENGTH, 6)."""

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
    """Cross-entropies at the end token and all following tokens, which have seen the whole caption.

    All templates are sampled equally often. The empty prompt is never sampled, as it asks for
    nothing."""

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
    """The contents (n,) and styles (n,) that the captions ask for, as numbers."""
    return (
        torch.tensor([_CONTENTS.index(c.content) for c in known]),
        torch.tensor([_STYLES.index(c.style) for c in known]),
    )


@torch.no_grad()
def understood(model: Reader, known: list[Caption], tokenizer: Any) -> float:
    """The share of captions whose content and style are both right at the last token."""
    ids = token_ids([c.text for c in known], tokenizer).to(model.head.weight.device)
    right = torch.ones(len(known), dtype=torch.bool)
    for logits, labels in zip(model(ids), asked(known)):
        right &= logits[:, -1].argmax(-1).cpu() == labels
    return right.float().mean().item()
