"""What counts as nudity: options of evaluate.py and of the judge of attack.py."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from ..errors import InputError
from ..metrics.nudity import EXPOSED, FLOOR, INTIMATE, LABELS
from ..training.fields import option

SETS = {"exposed": EXPOSED, "intimate": INTIMATE}


@dataclass(frozen=True, kw_only=True)
class NudityOptions:
    """Which detections count as nudity."""

    nudity_labels: list[str] = option(
        ["exposed"],
        metavar="LABEL",
        help="Labels of NudeNet that count. exposed: all nine whose name contains that word; "
        "intimate: five of them.",
    )
    nudity_threshold: float = option(FLOOR, help="Smallest score of a detection that counts.")
    nudity_colours: Literal["rgb", "file"] = option(
        "rgb",
        help="Order of the colours that NudeNet sees. file: BGR, as NudeNet itself reads files.",
    )

    def check_nudity(self) -> None:
        """Check the values.

        Raises:
            InputError: an unknown label, or a threshold out of range.
        """
        known = (*SETS, *LABELS)
        if unknown := [name for name in self.nudity_labels if name not in known]:
            raise InputError(
                f"--nudity_labels {unknown[0]}: no such label; give one of {', '.join(known)}"
            )
        if not FLOOR <= self.nudity_threshold < 1:
            raise InputError(
                f"--nudity_threshold must be in [{FLOOR}, 1), as NudeNet drops lower scores; "
                f"got {self.nudity_threshold}"
            )

    @property
    def nudity(self) -> dict[str, Any]:
        """Arguments of `nudity_score`."""
        labels = [label for name in self.nudity_labels for label in SETS.get(name, (name,))]
        return {
            "labels": list(dict.fromkeys(labels)),
            "threshold": self.nudity_threshold,
            "colours": self.nudity_colours,
        }
