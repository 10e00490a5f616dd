"""An edit in closed form before the first step: training begins where the edit leads."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from torch import Tensor

from ..closed_form import CROSS_ATTENTION, apply, gram, rece, uce
from ..errors import InputError
from ..training.fields import option
from .families import Conditions, Family
from .modules import is_adapter
from .prompts import Prompts


@dataclass(frozen=True, kw_only=True)
class WarmStartOptions:
    """What comes before the first step."""

    group: ClassVar[str] = "warm start"

    warm_start: Literal["uce", "rece"] | None = option(
        None,
        help="Edit the cross attention in closed form before the first step, so that what is "
        "forgotten is read as what takes its place: by UCE, or by RECE, which follows it by rounds "
        "against what is still read as the concept. The edited weights are then theta0.",
    )


def check(args: Any, unet: Any, family: Family) -> None:
    """Before weights are read, on a denoiser whose trained parameters are chosen.

    Raises:
        InputError: the edit does not fit the family, or changes what is not trained.
    """
    if args.warm_start is None:
        return
    if family.denoiser != "unet":
        raise InputError(
            f"--warm_start {args.warm_start}: the keys and values of {family.name} do not read the "
            "text embeddings as they are; it is for UNets with cross attention"
        )
    fixed = is_adapter(args) or not all(w.requires_grad for _, w in _layers(unet))
    if fixed:
        how = f"--train_modules {args.train_modules}" if args.train_modules else args.method
        raise InputError(
            f"--warm_start {args.warm_start}: {how} does not train all of the cross attention's "
            "keys and values, so that the edit would be lost when the result is saved; give "
            "--train_modules xattn or full"
        )


def edit(args: Any, unet: Any, table: Conditions, prompts: Prompts, tokenizer: Any) -> None:
    """Edit the keys and values of the cross attention, in place.

    UCE has the last token of each forgotten prompt, and of what takes its place; RECE all tokens.
    Both keep the last tokens of the remembered prompts.
    """
    of = table.each["encoder_hidden_states"]
    pairs = [(f, s) for f in prompts.forget for s in prompts.instead[f]]
    erase, targets = ([pair[i] for pair in pairs] for i in (0, 1))
    keep = last(of, prompts, prompts.remember, tokenizer)
    c, g = (last(of, prompts, numbers, tokenizer) for numbers in (erase, targets))
    matrix = uce(c, g, keep)
    if args.warm_start == "rece":
        weights = gram(w for _, w in _layers(unet))
        matrix = rece(
            weights, of[erase].flatten(0, 1), of[targets].flatten(0, 1), keep, start=matrix
        )
    apply(unet, matrix)


def last(of: Tensor, prompts: Prompts, numbers: list[int], tokenizer: Any) -> Tensor:
    """Embeddings (n, D) of the last tokens before the end of numbered prompts; of the empty one
    that of its beginning."""
    at = [max(len(tokenizer(prompts.texts[i]).input_ids) - 2, 0) for i in numbers]
    return of[numbers, at]


def _layers(unet: Any) -> list[tuple[str, Tensor]]:
    ends = tuple(f"{end}.weight" for end in CROSS_ATTENTION)
    return [(n, p) for n, p in unet.named_parameters() if n.endswith(ends)]
