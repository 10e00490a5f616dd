"""The options that choose a method of ebu_optim.baselines, and its optimizer."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch

from ..baselines import recipes
from ..errors import InputError
from .fields import option

EBU = ("alpha", "delta", "gamma")
# torch's optimizers know the names of their parameters from this version on
NAMED = tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 6)


@dataclass(frozen=True, kw_only=True)
class MethodOptions:
    """A method of the table ``ebu_optim.baselines.recipes`` and its numbers."""

    group: ClassVar[str] = "method"

    method: str = option("ebu_added", help="Method of unlearning.")
    alpha: float | None = option(
        None,
        help="EBU's weight of the forget gradient on the overlap. Default: that of EBUOptimizer.",
    )
    delta: float | None = option(
        None, help="EBU's share of scalars that each task selects. Default: that of EBUOptimizer."
    )
    gamma: float | None = option(
        None, help="EBU's strength of the Fisher penalty. Default: that of EBUOptimizer."
    )
    method_options: dict[str, Any] = option(
        {}, help="Further options of the method as JSON, e.g. '{\"lam\": 10}'."
    )
    fisher: str | None = option(None, help="Source of F.")
    esd_variant: Literal["paper", "released"] = option(
        "paper",
        help="How ESD samples x_t: as the paper's code or as the newer release.",
    )
    esd_eta: float | None = option(
        None, help="Strength of ESD's guidance. Default: 1 for paper, 2 for released."
    )
    guided_steps: int | None = option(
        None, help="DDIM steps of the schedule for x_t, for ESD and SPM. Default: 50; for SPM 30."
    )
    guided_scale: float = option(3.0, help="Guidance scale while x_t is sampled, for ESD and SPM.")

    def check_method(self) -> None:
        """Check the values.

        Raises:
            InputError: a value is out of range, or the method has no such option.
        """
        if self.guided_steps is not None and self.guided_steps < 2:
            raise InputError(f"--guided_steps must be >= 2; got {self.guided_steps}")
        if not 0 <= self.guided_scale < math.inf:
            raise InputError(f"--guided_scale must be finite, >= 0; got {self.guided_scale}")
        given = {n: getattr(self, n) for n in EBU if getattr(self, n) is not None}
        try:
            recipes["ebu_added"].needs(**given)
        except ValueError as error:
            raise InputError(f"--{error}") from error
        if not isinstance(self.method_options, dict):
            raise InputError(f"--method_options must be a JSON object; got {self.method_options}")
        known = recipes[self.method].options
        for name in _options(self):
            if name not in known:
                raise InputError(f"--method {self.method} has no option {name} to set")
        needs(self)  # raises for values that the method itself rejects


def guided_steps(method: str) -> int:
    """The default of --guided_steps."""
    return 30 if recipes[method].adapter else 50


def needs(args: Any) -> tuple[str, ...]:
    """The phases that the method needs with its options, found by building it on one number.

    An edit in closed form needs none; its options are tried on one number, too.

    Raises:
        InputError: the method rejects its options.
    """
    if (recipe := recipes[args.method]).edits:
        try:
            return recipe.needs(**args.method_options)
        except (TypeError, ValueError) as error:
            raise InputError(f"--method {args.method}: {error}") from error
    number = torch.nn.Parameter(torch.zeros(1))
    return build(args, [("number", number)], None if args.fisher == "none" else "online").needs


def fisher_source(args: Any, estimated: str) -> str | None:
    """The source of the method's F; None for a method without F.

    Args:
        estimated: the value of --fisher for a Fisher that was estimated beforehand.
    """
    own = recipes[args.method].fisher
    return own and (args.fisher or (estimated if own == "estimated" else own))


def build(args: Any, parameters: Iterable[tuple[str, Any]], fisher: Any, anchor: Any = None) -> Any:
    """Build the method's optimizer over named parameters.

    Args:
        args: a config with `MethodOptions` and `TrainingOptions`.

    Raises:
        InputError: the method rejects its options.
    """
    recipe = recipes[args.method]
    given = {"fisher": fisher, **({} if anchor is None else {"anchor": anchor})}
    options = _options(args) | {k: v for k, v in given.items() if k in recipe.options}
    # a rule that works module by module has the names; others keep the state that they had
    by_name = options.get("scope") == "module" and NAMED
    given_to: list[Any] = [pair if by_name else pair[1] for pair in parameters]
    base = torch.optim.Adam(given_to, lr=args.learning_rate)
    try:
        return recipe.build(base, max_grad_norm=args.max_grad_norm or None, **options)
    except (TypeError, ValueError) as error:
        raise InputError(f"--method {args.method}: {error}") from error


def _options(args: Any) -> dict[str, Any]:
    given = {n: getattr(args, n) for n in EBU if getattr(args, n) is not None}
    return {**args.method_options, **given}
