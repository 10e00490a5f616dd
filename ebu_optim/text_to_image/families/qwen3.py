"""What the families share that read a prompt by Qwen3, in its template of a chat."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .family import Config
from .flow_matching import FlowMatching

TOKENS = 512  # what a call of the pipelines takes by default, the template's included


class Qwen3(FlowMatching):
    """
    Attributes:
        thinking: how the pipeline asks for the template.
    """

    denoiser = "transformer"
    encoders: Mapping[str, str] = {"text_encoder": "tokenizer"}
    foreign = frozenset({"unet", "controlnet", "text_encoder_2"})
    thinking: bool
    no_new_word = "Qwen3 has no room for a new word that its pipelines would load"

    def longest(self, tokenizer: Any, config: Config) -> int:
        template = tokenizer.apply_chat_template(
            [{"role": "user", "content": ""}],
            tokenize=False,
            add_generation_prompt=True,
            enable_thinking=self.thinking,
        )
        return TOKENS - len(tokenizer(template).input_ids) + len(tokenizer("").input_ids)
