"""The options that choose a method of ebu_optim.baselines, and its optimizer."""

from __future__ import annotations

import argparse
import inspect
import json
import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch

from ..baselines import methods
from ..errors import InputError

EBU = ("alpha", "delta", "gamma")


def add_arguments(parser: argparse.ArgumentParser, names: Iterable[str], estimated: str) -> None:
    """Args:
    names: what --method may be.
    estimated: what --fisher calls a Fisher that was estimated beforehand.
    """
    add = parser.add_argument_group("method").add_argument
    add("--method", choices=tuple(names), default="ebu", help='"ebu" is ebu_added')
    for name in EBU:
        add(f"--{name}", type=float, help="of EBU; default: EBUOptimizer's own")
    add("--method_options", type=json.loads, default={}, help="JSON, e.g. '{\"lam\": 10}'")
    add(
        "--fisher", choices=("online", estimated, "none"),
        help=f"default: online; SA: {estimated}",
    )  # fmt: skip
    add("--esd_variant", choices=("paper", "released"), default="paper", help="of ESD's target")
    add("--esd_eta", type=float, help="default: 1 for paper, 2 for released")
    add("--guided_steps", type=int, help="DDIM, to ESD's and SPM's x_t; default: 50, SPM: 30")
    add("--guided_scale", type=float, default=3.0, help="guidance on the way to x_t")


def check(args: argparse.Namespace, aliases: Mapping[str, str]) -> None:
    """Numbers that cannot be; --method becomes its name in the table."""
    args.method = aliases.get(args.method, args.method)
    if args.guided_steps is None:
        args.guided_steps = 30 if methods[args.method].forgets == "adapter" else 50
    if args.guided_steps < 2:
        raise InputError(f"--guided_steps must be >= 2; got {args.guided_steps}")
    if not 0 <= args.guided_scale < math.inf:
        raise InputError(f"--guided_scale must be finite, >= 0; got {args.guided_scale}")
    given = {n: getattr(args, n) for n in EBU if getattr(args, n) is not None}
    try:
        methods["ebu_added"].needs(**given)
    except ValueError as error:
        raise InputError(f"--{error}") from error
    if not isinstance(args.method_options, dict):
        raise InputError(f"--method_options must be a JSON object; got {args.method_options}")
    known, fixed = _known(args)
    for name in _options(args):
        if name not in known or name in fixed:
            raise InputError(f"--method {args.method} has no option {name} to set")
    needs(args)  # numbers that the method itself refuses


def needs(args: argparse.Namespace) -> tuple[str, ...]:
    """The phases of the method with its options; `build` on one number says."""
    number = torch.nn.Parameter(torch.zeros(1))
    return build(args, [number], None if args.fisher == "none" else "online").needs


def fisher_source(args: argparse.Namespace, estimated: str) -> str | None:
    """Where the method's F comes from; None where it has none."""
    if "fisher" not in _known(args)[0]:
        return None
    return args.fisher or (estimated if args.method == "selective_amnesia" else "online")


def build(
    args: argparse.Namespace, parameters: Iterable[Any], fisher: Any, anchor: Any = None
) -> Any:
    """The method's optimizer over the parameters; `fisher` and `anchor` as the optimizer takes
    them, where it does."""
    given = {"fisher": fisher, **({} if anchor is None else {"anchor": anchor})}
    options = _options(args) | {k: v for k, v in given.items() if k in _known(args)[0]}
    base = torch.optim.Adam(parameters, lr=args.learning_rate)
    try:
        return methods[args.method].build(base, max_grad_norm=args.max_grad_norm or None, **options)
    except (TypeError, ValueError) as error:
        raise InputError(f"--method {args.method}: {error}") from error


def _options(args: argparse.Namespace) -> dict[str, Any]:
    given = {n: getattr(args, n) for n in EBU if getattr(args, n) is not None}
    return {**args.method_options, **given}


def _known(args: argparse.Namespace) -> tuple[Mapping[str, Any], Mapping[str, Any]]:
    method = methods[args.method]
    return inspect.signature(method.build.func).parameters, method.build.keywords
