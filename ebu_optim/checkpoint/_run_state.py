"""What a checkpoint holds of a run: the state of its objects, and the random states."""

from __future__ import annotations

import copy
import io
import random
import re
import warnings
from collections.abc import Mapping, MutableMapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..modules import tensors_in

RANDOM = "random"


class RandomStates:
    """The random states of `rank`, in a list like that of all ranks."""

    def __init__(self, rank: int) -> None:
        self.rank = rank

    def state_dict(self) -> list[dict[str, Any]]:
        return [random_state()] * (self.rank + 1)

    def load_state_dict(self, states: Sequence[Mapping[str, Any]]) -> None:
        if self.rank >= len(states):
            warnings.warn(
                f"the checkpoint has random states of {len(states)} processes; rank {self.rank} "
                "keeps its own",
                stacklevel=4,
            )
            return
        state = states[self.rank]
        torch.set_rng_state(state["torch"])
        if torch.cuda.is_available():
            for i, cuda in enumerate(state["cuda"][: torch.cuda.device_count()]):
                torch.cuda.set_rng_state(cuda, i)
        np.random.set_state(state["numpy"])  # noqa: NPY002 - others still sample from it
        random.setstate(state["python"])


def random_state() -> dict[str, Any]:
    def plain(tree: Any) -> Any:  # arrays would need pickle
        if isinstance(tree, Mapping):
            return {k: plain(v) for k, v in tree.items()}
        return tree.tolist() if isinstance(tree, np.ndarray) else tree

    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else [],
        "numpy": plain(np.random.get_state(legacy=False)),  # noqa: NPY002
        "python": random.getstate(),
    }


def named(objects: Mapping[str, Any]) -> dict[str, Any]:
    """Return the objects after a check that their names can be file names and all have a state."""
    for name, item in objects.items():
        if not re.fullmatch(r"\w[\w.-]*", str(name), re.ASCII) or name == RANDOM:
            raise ValueError(
                f"objects has the name {name!r}; use letters, digits, '_', '.' and '-', and not "
                f"{RANDOM!r}, which is used for the random states"
            )
        stateful = hasattr(item, "state_dict") and hasattr(item, "load_state_dict")
        if not stateful and not isinstance(item, (torch.Generator, MutableMapping)):
            raise TypeError(
                f"{name!r} is a {type(item).__name__}, which has no state_dict and "
                "load_state_dict; give an object with both, a torch.Generator or a dict"
            )
    return dict(objects)


def get(item: Any) -> Any:
    if hasattr(item, "state_dict"):
        return item.state_dict()
    return item.get_state() if isinstance(item, torch.Generator) else dict(item)


def put(item: Any, state: Any) -> None:
    if hasattr(item, "load_state_dict"):
        item.load_state_dict(state)
    elif isinstance(item, torch.Generator):
        item.set_state(state)
    else:
        item.clear()
        item.update(state)


def on_cpu(state: Any) -> Any:
    """Return a deep copy with its tensors on the CPU, which has room for them."""
    return copy.deepcopy(state, {id(t): t.detach().to("cpu", copy=True) for t in tensors_in(state)})


def check_plain(name: str, state: Any) -> None:
    for t in tensors_in(state):
        sharded = hasattr(t, "placements") or hasattr(t, "_fsdp_flattened")
        if sharded or type(t).__name__ == "ShardedTensor":
            raise TypeError(
                f"{name!r} holds shards ({type(t).__name__}), but only one rank writes; use "
                "torch.distributed.checkpoint, which saves and loads them in parallel"
            )
    plain = (Tensor, torch.nn.Parameter)
    try:  # save and load everything except plain tensors
        rest = copy.deepcopy(state, {id(t): 0 for t in tensors_in(state) if type(t) in plain})
        file = io.BytesIO()
        torch.save(rest, file)
        file.seek(0)
        torch.load(file, weights_only=True)
    except Exception as error:
        raise TypeError(
            f"the state of {name!r} cannot be read back without pickle; leave out everything but "
            f"tensors, numbers, text and containers of these ({error})"
        ) from error
