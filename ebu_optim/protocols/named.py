"""All protocols by name, and the label of a run."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import fields
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from ..errors import InputError
from . import (
    artists,
    celebrities,
    coco,
    fixed_prompts,
    i2p,
    imagenette,
    paper,
    prompt_lists,
    unlearncanvas,
    unlearndiffatk,
)
from .protocol import Asked, Protocol, Sampling

FILE = Path(__file__).with_name("published.json")
_ROOMS = (
    unlearncanvas,
    unlearndiffatk,
    i2p,
    imagenette,
    coco,
    artists,
    celebrities,
    fixed_prompts,
    paper,
)
PROTOCOLS: dict[str, Protocol] = {p.name: p for room in _ROOMS for p in room.PROTOCOLS}


def named(name: str) -> Protocol:
    """The protocol of this name.

    Raises:
        InputError: there is no such protocol.
    """
    if name not in PROTOCOLS:
        near = get_close_matches(name, PROTOCOLS, n=3)
        meant = f"; did you mean {' or '.join(near)}?" if near else ""
        raise InputError(
            f"--protocol {name!r}: no such protocol; give one of {', '.join(PROTOCOLS)}{meant}"
        )
    return PROTOCOLS[name]


def label(
    protocol: Protocol,
    drawn: int | None = None,
    judges: Mapping[str, str] | None = None,
    targets: int = 1,
    listed: Sequence[Asked] | None = None,
) -> str:
    """The label of a run: the protocol's name, followed by all differences from the publication.

    Args:
        drawn: the number of images; None: all.
        judges: name -> identity of the judges that were used.
        targets: the number of forgotten concepts.
        listed: the whole prompt list; None: the published one.
    """
    whole = PROTOCOLS.get(protocol.name)
    if whole is None:
        return f"{protocol.name}, no published protocol"
    changes = [
        f"{f.name} {_word(getattr(protocol.sampling, f.name))}"
        for f in fields(Sampling)
        if getattr(protocol.sampling, f.name) != getattr(whole.sampling, f.name)
    ]
    changes += [
        f"another {f.name}"
        for f in fields(Protocol)
        if f.name != "sampling" and getattr(protocol, f.name) != getattr(whole, f.name)
    ]
    if listed is not None and prompt_lists.differs(whole, listed):
        changes.append("another list")
    if drawn not in (None, whole.images):
        changes.append(f"{drawn:,} of {whole.images:,} images")
    changes += [
        f"judge {judge} {identity[:16]}"
        for judge, identity in (judges or {}).items()
        if not identity.startswith(whole.judges[judge])
    ]
    if targets > 1:
        changes.append(f"{targets} targets at once")
    return f"{protocol.name}, changed: {', '.join(changes)}" if changes else protocol.name


def _word(value: Any) -> str:
    return "of each row" if value is None else f"{value:g}" if isinstance(value, float) else value


def published(name: str) -> list[dict[str, Any]]:
    """The rows in papers for a protocol: method, figures, source.

    Smaller versions of a protocol have no rows. The exception is ``unlearndiffatk-...-pre``: the
    rows of the full protocol also have the share of prompts that succeed without an attack."""
    found = json.loads(FILE.read_text(encoding="utf-8"))
    if not name.startswith("unlearndiffatk-"):
        return found.get(name, [])
    of = name.removeprefix("unlearndiffatk-").removesuffix("-pre").replace("-", "")
    return [
        row
        for row in found["unlearndiffatk"]
        if "".join(c for c in row["target"].casefold() if c.isalpha()) == of
    ]
