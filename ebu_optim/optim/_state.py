"""The optimizer's state in the standard layout: the base's keys and ours (`ebu_*`) together.

Tools drop any other top-level key, so ours sit beside the base's: theta0 and F in "state", the
counters in every group. States are matched by position, as torch does; saved ids may be names.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from ._slots import Key, Slot

COUNTERS = ("ebu_step", "ebu_skipped", "ebu_fisher_mean", "ebu_fisher_frozen", "ebu_started",
            "ebu_anchor_source", "ebu_anchor_hash")  # fmt: skip


def _by_position(
    groups: Sequence[Mapping[str, Any]], saved: Sequence[Mapping[str, Any]]
) -> dict[Any, tuple[Key, Tensor]]:
    """Saved parameter id -> (position, parameter)."""
    sizes, saved_sizes = ([len(g["params"]) for g in gs] for gs in (groups, saved))
    if sizes != saved_sizes:
        raise ValueError(
            f"the checkpoint has groups of {saved_sizes} parameters, this optimizer has {sizes}: "
            "this is a checkpoint of another model"
        )
    return {
        saved_id: ((g, i), p)
        for g, (group, saved_group) in enumerate(zip(groups, saved, strict=True))
        for i, (p, saved_id) in enumerate(zip(group["params"], saved_group["params"], strict=True))
    }


def join(
    base: Mapping[str, Any],
    groups: Sequence[Mapping[str, Any]],
    own: Mapping[Key, Mapping[str, Tensor]],
    counters: Mapping[str, Any],
) -> dict[str, Any]:
    """The base's state_dict with our tensors by parameter and our counters in every group."""
    state = dict(base["state"])
    for saved_id, (key, _) in _by_position(groups, base["param_groups"]).items():
        if own.get(key):
            state[saved_id] = {**state.get(saved_id, {}), **own[key]}
    return {
        "state": state,
        "param_groups": [{**group, **counters} for group in base["param_groups"]],
    }


def split(
    saved: Mapping[str, Any],
    groups: Sequence[Mapping[str, Any]],
    slots: Sequence[Slot],
    shaped: bool,
) -> tuple[dict[str, Any], dict[Key, dict[str, Tensor]], dict[str, Any]]:
    """Undo `join`: the base's state_dict, our tensors by position, our counters ({} in a state of
    the base alone).

    Args:
        shaped: the base's own tensors have their parameter's shape (or are 0-d), as those of
            torch.optim have; they are checked too then.

    Raises:
        ValueError: groups or shapes are those of another model; nothing has been changed then.
    """
    positions = _by_position(groups, saved["param_groups"])
    names = {s.key: s.name for s in slots}
    own: dict[Key, dict[str, Tensor]] = {}
    state = {}
    for saved_id, entry in saved["state"].items():
        if saved_id not in positions:
            state[saved_id] = entry
            continue
        key, p = positions[saved_id]
        ours = {k: v for k, v in entry.items() if k.startswith("ebu_")}
        for name, value in (entry if shaped else ours).items():
            if isinstance(value, Tensor) and value.dim() and value.shape != p.shape:
                raise ValueError(
                    f"{names.get(key, key)} has shape {tuple(p.shape)} but the checkpoint's {name} "
                    f"has {tuple(value.shape)}: this is a checkpoint of another model"
                )
        own[key] = ours
        rest = {k: v for k, v in entry.items() if k not in ours}
        if rest:  # an empty entry would stop Adam from initialising
            state[saved_id] = rest
    first = saved["param_groups"][0] if saved["param_groups"] else {}
    counters = {name: first[name] for name in COUNTERS if name in first}
    stripped = [{k: v for k, v in g.items() if k not in COUNTERS} for g in saved["param_groups"]]
    return {"state": state, "param_groups": stripped}, own, counters
