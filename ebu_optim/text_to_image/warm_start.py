"""An edit in closed form before the first step: training begins where the edit leads."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from ..errors import InputError
from ..training.fields import option
from .edits import layers
from .families import Family
from .modules import is_adapter


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
    fixed = is_adapter(args) or not all(
        w.requires_grad for w in layers(unet, args.warm_start).values()
    )
    if fixed:
        how = f"--train_modules {args.train_modules}" if args.train_modules else args.method
        raise InputError(
            f"--warm_start {args.warm_start}: {how} does not train all of the cross attention's "
            "keys and values, so that the edit would be lost when the result is saved; give "
            "--train_modules xattn or full"
        )
