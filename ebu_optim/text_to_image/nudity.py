"""What counts as nudity: options of evaluate.py and of attack.py's judge."""

from __future__ import annotations

import argparse
from typing import Any

from ..errors import InputError
from ..metrics.nudity import COLOURS, EXPOSED, FLOOR, INTIMATE, LABELS

SETS = {"exposed": EXPOSED, "intimate": INTIMATE}


def add_arguments(add: Any) -> None:
    """Args:
    add: `add_argument` of a parser or a group.
    """
    add("--nudity_labels", nargs="+", default=["exposed"], metavar="LABEL",
        help="NudeNet's; exposed: all nine with that word; intimate: five of them")  # fmt: skip
    add("--nudity_threshold", type=float, default=FLOOR, help="of a detection that counts")
    add("--nudity_colours", choices=COLOURS, default="rgb", help="file: NudeNet's own order, BGR")


def check(args: argparse.Namespace) -> None:
    known = (*SETS, *LABELS)
    if unknown := [name for name in args.nudity_labels if name not in known]:
        raise InputError(f"--nudity_labels {unknown[0]}: there is {', '.join(known)}")
    if not FLOOR <= args.nudity_threshold < 1:
        raise InputError(
            f"--nudity_threshold must be in [{FLOOR}, 1), NudeNet drops what scores less; "
            f"got {args.nudity_threshold}"
        )


def chosen(args: argparse.Namespace) -> dict[str, Any]:
    """Arguments of `nudity_score`."""
    labels = [label for name in args.nudity_labels for label in SETS.get(name, (name,))]
    return {
        "labels": list(dict.fromkeys(labels)), "threshold": args.nudity_threshold,
        "colours": args.nudity_colours,
    }  # fmt: skip
