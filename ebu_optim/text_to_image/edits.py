"""Edits in closed form of a UNet's cross attention: which embeddings each of them reads."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

from torch import Tensor

from ..baselines import closed_forms
from ..closed_form import apply, gram, influential, invariants, rece, speed, uce
from ..errors import InputError
from .families import Conditions
from .prompts import Prompts


def check(args: Any) -> None:
    """Check that the options fit an edit in closed form.

    Args:
        args: the options of a run whose method is one.

    Raises:
        InputError: an option asks for training, for another method beside it or for a result that
            needs adapters.
    """
    title = closed_forms[args.method].title
    own = "it edits the cross attention's own weights"
    refused = {
        "warm_start": "it is the same kind of edit, and no training follows it",
        "train_modules": own,
        "quantize": own,
        "forget_loss": "it has no loss",
        "adversary_steps": "it takes no step",
        "relearner_steps": "it takes no step",
    }
    for name, why in refused.items():
        if value := getattr(args, name):
            raise InputError(
                f"--{name} {value}: not possible with --method {args.method}, {title}, because "
                f"{why}; leave the option out"
            )
    if args.save_as in ("lora", "kohya"):
        raise InputError(
            f"--save_as {args.save_as}: {title} has no adapters: {own}; give --save_as changed, "
            "which saves only the changed tensors"
        )
    if args.resume_from_checkpoint not in (None, "latest"):
        raise InputError(
            f"--resume_from_checkpoint {args.resume_from_checkpoint}: {title} takes no step and "
            "has no checkpoints; give latest, which makes the edit again"
        )


class Read(NamedTuple):
    """Embeddings, each as rows (n, D).

    Attributes:
        erase, targets: the last tokens of what is forgotten, and of what takes its place.
        erase_all, targets_all: all tokens of these.
        keep: the last tokens of the remembered prompts.
        empty: all tokens of the empty prompt.
    """

    erase: Tensor
    targets: Tensor
    erase_all: Tensor
    targets_all: Tensor
    keep: Tensor
    empty: Tensor


def read(table: Conditions, prompts: Prompts, tokenizer: Any) -> Read:
    """The embeddings of a run's prompts. The last token is the one before the end; of the empty
    prompt it is the beginning."""
    of = table.each["encoder_hidden_states"]

    def last(numbers: list[int]) -> Tensor:
        ends = [max(len(tokenizer(prompts.texts[i]).input_ids) - 2, 0) for i in numbers]
        return of[numbers, ends]

    pairs = [(f, s) for f in prompts.forget for s in prompts.instead[f]]
    gone, instead = ([pair[i] for pair in pairs] for i in (0, 1))
    return Read(
        last(gone),
        last(instead),
        of[gone].flatten(0, 1),
        of[instead].flatten(0, 1),
        last(prompts.remember),
        of[prompts.null],
    )


def layers(unet: Any, method: str) -> dict[str, Tensor]:
    """The weights that a method edits, by name."""
    ends = tuple(f"{end}.weight" for end in closed_forms[method].edits)
    return {n: w for n, w in unet.named_parameters() if n.endswith(ends)}


def edit(
    method: str,
    unet: Any,
    table: Conditions,
    prompts: Prompts,
    tokenizer: Any,
    options: dict[str, Any] | None = None,
) -> None:
    """Edit the cross attention in place, by "uce", "rece" or "speed".

    Args:
        options: numbers of the method.

    Raises:
        InputError: SPEED has no null space.
    """
    found, given = read(table, prompts, tokenizer), options or {}
    weights = layers(unet, method)
    if method == "speed":
        return _speed(unet, weights, found, given)
    if method == "uce":
        matrix = uce(found.erase, found.targets, found.keep, **given)
    else:
        start = uce(found.erase, found.targets, found.keep)
        sums = gram(weights.values())
        pair = found.erase_all, found.targets_all
        matrix = rece(sums, *pair, found.keep, start=start, **given)
    apply(unet, matrix)
    return None


def _speed(unet: Any, weights: Iterable[str], found: Read, options: dict[str, Any]) -> None:
    """Each layer has its own choice of what is kept, and therefore its own matrix."""
    same = invariants(found.empty)
    matrices = {}
    for name in weights:
        pair = found.erase, found.targets
        chosen = influential(unet.get_parameter(name), *pair, found.keep)
        retain = chosen if len(chosen) else found.keep  # none is above the mean if all are equal
        try:
            matrices[name] = speed(*pair, retain, same, **options)
        except ValueError as error:
            threshold = options.get("threshold", closed_forms["speed"].defaults["threshold"])
            raise InputError(
                f"--method speed: {str(error).partition(' Give ')[0]} Give fewer prompts to keep, "
                f"or a larger threshold, e.g. --method_options "
                f"'{{\"threshold\": {10 * threshold:g}}}'"
            ) from error
    for name, matrix in matrices.items():
        block, _, layer = name.removesuffix(".weight").rpartition(".")
        apply(unet.get_submodule(block), matrix, endings=(layer,))
