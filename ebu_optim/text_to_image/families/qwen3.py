"""What the families share that encode a prompt with Qwen3 and its chat template."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .family import Config
from .flow_matching import FlowMatching

TOKENS = 512  # the default of the pipelines' call, with the template's tokens


class Qwen3(FlowMatching):
    """An adapter for flow matching with Qwen3.

    Attributes:
        thinking: `enable_thinking` with which the pipeline applies the template.
    """

    denoiser = "transformer"
    encoders: Mapping[str, str] = {"text_encoder": "tokenizer"}
    foreign = frozenset({"unet", "controlnet", "text_encoder_2"})
    thinking: bool

    def longest(self, tokenizer: Any, config: Config) -> int:
        template = tokenizer.apply_chat_template(
            [{"role": "user", "content": ""}],
            tokenize=False,
            add_generation_prompt=True,
            enable_thinking=self.thinking,
        )
        return TOKENS - len(tokenizer(template).input_ids) + len(tokenizer("").input_ids)
