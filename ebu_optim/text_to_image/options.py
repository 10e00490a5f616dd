"""The options of unlearn.py for text-to-image models, checked."""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence

from .. import training
from ..baselines import methods
from ..diffusion import objectives
from ..errors import InputError
from ..training import method as method_options
from . import hub, modules, pipelines, prompts, save, sets, validation

#: --method: short names, and those of the table that text-to-image models have.
ALIASES = {"ebu": "ebu_added", "sa": "selective_amnesia"}
METHODS = (*ALIASES, *(m for m in methods if m not in ("retrain", "embedding_only")))

#: Numbers of the published text-to-image runs; SA's lambda of 50 belongs to an F of the loss summed
#: over 1000 timesteps, ours is of their mean.
PUBLISHED = {"selective_amnesia": {"lam": 5e7}, "salun": {"remember_weight": 0.5}}
LEARNING_RATE = {"spm": 1e-4}
UNCLIPPED = ("esd", "spm")


def parse(argv: Sequence[str] | None = None, description: str | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawTextHelpFormatter
    )
    pipelines.add_arguments(parser)
    prompts.add_arguments(parser)
    method_options.add_arguments(parser, METHODS, "estimate")
    modules.add_arguments(parser)
    objectives.add_arguments(parser, "--remember_loss", reduction="mean")
    for part in (sets, validation, save, hub):
        part.add_arguments(parser)
    training.add_arguments(parser, train_batch_size=1, learning_rate=None, max_grad_norm=None)
    args = parser.parse_args(argv)
    if args.learning_rate is None:
        args.learning_rate = LEARNING_RATE.get(args.method, 1e-5)
    if args.max_grad_norm is None:
        args.max_grad_norm = 0.0 if args.method in UNCLIPPED else 1.0
    training.check(args)
    method_options.check(args, ALIASES)
    args.method_options = {**PUBLISHED.get(args.method, {}), **args.method_options}
    if args.method == "spm" and args.train_modules is not None:
        raise InputError(
            f"--train_modules {args.train_modules}: SPM trains adapters of its own; leave it out"
        )
    if args.method != "spm" and args.train_modules is None:
        args.train_modules = "xattn"
    if args.rank < 1:
        raise InputError(f"--rank must be >= 1; got {args.rank}")
    if args.lora_alpha is not None and not 0 < args.lora_alpha < math.inf:
        raise InputError(f"--lora_alpha must be finite, > 0; got {args.lora_alpha}")
    for part in (objectives, sets, validation, save, hub):
        part.check(args)
    return args
