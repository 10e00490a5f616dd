"""The processes that draw together, as `accelerate launch` or torchrun starts them."""

from __future__ import annotations

import os
from collections.abc import Callable
from datetime import timedelta
from typing import NamedTuple

import torch

from ..errors import InputError


class Processes(NamedTuple):
    """Attributes:
    rank: which of them this is, from 0.
    number: how many there are.
    wait: until all are here.
    """

    rank: int = 0
    number: int = 1
    wait: Callable[[], None] = lambda: None


def joined() -> Processes:
    """Of this process, with the others that were started beside it.

    Raises:
        InputError: they cannot find each other.
    """
    asked = int(os.environ.get("WORLD_SIZE", "1"))
    if asked == 1:
        return Processes()
    from accelerate import PartialState

    # one may judge for hours while the others wait
    state = PartialState(cpu=not torch.cuda.is_available(), timeout=timedelta(hours=24))
    if state.num_processes != asked:
        raise InputError(
            f"{asked} processes were started, accelerate joined {state.num_processes} of them: "
            "start them by accelerate launch, or leave WORLD_SIZE out"
        )
    return Processes(state.process_index, asked, state.wait_for_everyone)
