"""How much memory a run of each family takes, and on which card it fits.

The peaks ship with the package, because to count them takes minutes:
``python -m ebu_optim.takedown.counting`` counts them again.
"""

from __future__ import annotations

import json
from pathlib import Path

FILE = Path(__file__).with_name("peaks.json")  # what the run is -> bytes
GIB = 2**30
LIBRARIES = GIB  # workspace of the CUDA libraries, which the count does not include
CARDS = (12, 16, 24, 48, 80)  # GB


def table(room: int | None) -> list[str]:
    """One line per family and way: the peak in GiB, and whether it fits into `room` bytes.

    With `room` None each line names the smallest common card that has enough memory.
    """
    peaks = json.loads(FILE.read_text(encoding="utf-8"))
    return [_line(what, peak, room) for what, peak in peaks.items()]


def _line(what: str, peak: int, room: int | None) -> str:
    peak += LIBRARIES
    card = next((f"on {n} GB" for n in CARDS if peak < n * GIB), f"on no card of {CARDS[-1]} GB")
    fits = f"  {card}" if room is None else ("  fits" if peak < room else "  does not fit")
    return f"  {what}: {peak / GIB:.1f} GiB{fits}"
