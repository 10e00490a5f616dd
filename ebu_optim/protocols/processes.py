"""The processes that generate together, started by `accelerate launch` or torchrun."""

from __future__ import annotations

import os
from collections.abc import Callable
from datetime import timedelta
from typing import NamedTuple

import torch

from ..errors import InputError


class Processes(NamedTuple):
    """This process among all.

    Attributes:
        rank: the index of this process, from 0.
        number: the number of processes.
        wait: waits until all processes have called it.
    """

    rank: int = 0
    number: int = 1
    wait: Callable[[], None] = lambda: None


def joined() -> Processes:
    """Connect this process with the others that were started with it.

    Raises:
        InputError: accelerate did not connect all of them.
    """
    asked = int(os.environ.get("WORLD_SIZE", "1"))
    if asked == 1:
        return Processes()
    from accelerate import PartialState

    # the others may wait for hours while one process judges
    state = PartialState(cpu=not torch.cuda.is_available(), timeout=timedelta(hours=24))
    if state.num_processes != asked:
        raise InputError(
            f"{asked} processes were started, accelerate connected {state.num_processes} of them: "
            "start them with accelerate launch, or unset WORLD_SIZE"
        )
    return Processes(state.process_index, asked, state.wait_for_everyone)
