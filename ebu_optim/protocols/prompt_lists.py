"""The published content of prompt lists, by the SHA-256 of what a protocol reads of them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import cache
from pathlib import Path

from ..manifest import digest
from .protocol import Asked, Protocol

#: Protocol -> hash. A list whose published content may not be passed on has none.
FILE = Path(__file__).with_name("prompt_lists.json")


def read_of(protocol: Protocol, listed: Sequence[Asked]) -> str:
    """The SHA-256, in hexadecimal, of what the protocol uses of its list.

    A file's encoding, line ends, the order of its columns and the columns that are not used do not
    affect it; neither does a guidance or size for which the protocol has a value of its own."""
    own = protocol.sampling
    return digest(
        [
            [
                a.prompt,
                a.seed,
                a.nth,
                a.guidance if own.guidance is None else None,
                [a.width, a.height] if own.size is None else None,
                sorted(a.of.items()),
            ]
            for a in listed
        ]
    )


def differs(protocol: Protocol, listed: Sequence[Asked]) -> bool:
    """Whether a list is known not to be the published one; False if no hash is known."""
    known = _known().get(protocol.name)
    return known is not None and read_of(protocol, listed) != known


@cache
def _known() -> dict[str, str]:
    return json.loads(FILE.read_text(encoding="utf-8"))
