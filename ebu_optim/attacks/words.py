"""Words that no tokenizer knows, and whose input embeddings are given: the new word of textual
inversion, and the free tokens of UnlearnDiffAtk."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import torch
from tokenizers import AddedToken
from torch import Tensor, nn

if TYPE_CHECKING:
    from .model import Attacked

NAME = "<word-{}>"  # lower case, because some pipelines lower their prompts


class Words:
    """Words for the prompts of a model.

    Their tokens are added to copies of the tokenizers, so that each family encodes a prompt as it
    always does. A text encoder gets the words' embeddings instead of their tokens; its vocabulary
    does not change.

    Args:
        number: the number k of words.

    Attributes:
        names: the words, to be written in a prompt.
        tokenizers: name of a tokenizer -> its copy, which knows the words.
    """

    def __init__(self, model: Attacked, number: int = 1) -> None:
        self.model, self.names = model, [NAME.format(i) for i in range(number)]
        self.tokenizers = {n: _taught(t, self.names) for n, t in model.tokenizers.items()}

    def encode(self, texts: Sequence[str], vectors: Sequence[Tensor]) -> Tensor:
        """The conditions of prompts, as rows of `Attacked.encode`, with gradients to the vectors.

        Args:
            vectors: the embeddings (k, D) of the words for each text encoder.
        """
        model = self.model
        with ExitStack() as stack:
            stack.enter_context(model.registered(self.tokenizers))
            taught = self.tokenizers.values()
            for encoder, tokenizer, given in zip(model.text_encoders, taught, vectors, strict=True):
                first = tokenizer.convert_tokens_to_ids(self.names[0])
                stack.enter_context(_read_as(encoder, first, given))
            return model.read(texts)


def _taught(tokenizer: Any, words: Sequence[str]) -> Any:
    """A copy of a tokenizer in which each word is one token.

    The space before a word belongs to it, as it belongs to the tokens of byte-level tokenizers."""
    taught = copy.deepcopy(tokenizer)
    taught.add_tokens([AddedToken(w, lstrip=True, normalized=False) for w in words])
    return taught


@contextmanager
def _read_as(encoder: nn.Module, first: int, vectors: Tensor) -> Iterator[None]:
    """Inside the block, the encoder's input embeddings of the tokens `first`, `first` + 1, ... are
    the rows of `vectors` (k, D)."""
    weight = encoder.get_input_embeddings().weight  # type: ignore[operator]
    # T5 has two modules with this weight, and reads the second one
    tables = [m for m in encoder.modules() if isinstance(m, nn.Embedding) and m.weight is weight]
    scale = getattr(tables[0], "embed_scale", 1.0)  # Gemma multiplies what it reads
    places: list[Tensor] = []

    def hide(_module: Any, args: tuple[Any, ...], options: dict[str, Any]) -> Any:
        ids = args[0] if args else options["input_ids"]
        places[:] = [ids - first]
        # Any token but the end: CLIP pools at the end token, or at the highest number.
        ids = torch.where(ids >= first, 0, ids)
        return ((ids, *args[1:]), options) if args else (args, {**options, "input_ids": ids})

    def put(_module: Any, _args: Any, out: Tensor) -> Tensor:
        (at,) = places
        return torch.where((at >= 0)[..., None], vectors[at.clamp_min(0)] * scale, out)

    handles = [encoder.register_forward_pre_hook(hide, with_kwargs=True)]
    handles += [table.register_forward_hook(put) for table in tables]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
