"""The optimizer's state in the standard layout: the base's keys and ours (`ebu_*`) together.

Tools drop any other top-level key, so ours sit beside the base's: theta0 and F in "state", the
counters in every group. States are matched by position, as torch does; saved ids may be names.
Where both sides know the names of their parameters, a name is the same parameter in any place.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from numbers import Real
from typing import Any

from torch import Tensor

from ._slots import Key, Slot

COUNTERS = (
    "ebu_step",
    "ebu_skipped",
    "ebu_fisher_mean",
    "ebu_fisher_frozen",
    "ebu_started",
    "ebu_anchor_source",
    "ebu_anchor_hash",
)

Groups = Sequence[Mapping[str, Any]]


def _places(groups: Groups) -> dict[str, tuple[int, int]]:
    """Name -> place; {} where not every parameter has a name of its own."""
    found = {
        name: (g, i)
        for g, group in enumerate(groups)
        for i, name in enumerate(group.get("param_names") or ())
    }
    named = all(len(g.get("param_names") or ()) == len(g["params"]) for g in groups)
    return found if named and len(found) == sum(len(g["params"]) for g in groups) else {}


def _by_name(groups: Groups, saved: Groups) -> Groups:
    """The saved groups with every name where ours is; as they are where none has another place.

    Raises:
        ValueError: names have other places, and their groups are not ours in another order.
    """
    ours, theirs = _places(groups), _places(saved)
    # torch.distributed.checkpoint orders them itself, by ids that are names, and leaves the list of
    # names as it was
    by_id = any(isinstance(saved_id, str) for group in saved for saved_id in group["params"])
    moved = [n for n in ours if n in theirs and theirs[n] != ours[n]]
    if by_id or not moved:
        return saved
    of_names = {frozenset(group["param_names"]): group for group in saved}
    found = [of_names.get(frozenset(group["param_names"])) for group in groups]
    ordered = []
    for group, match in zip(groups, found, strict=True):
        if match is None or len(found) != len(saved):
            n = moved[0]
            raise ValueError(
                f"{n} is parameter {ours[n][1]} of group {ours[n][0]} but the checkpoint has it as "
                f"parameter {theirs[n][1]} of group {theirs[n][0]}, among other names: this is a "
                "checkpoint of another model or of other groups; build the optimizer with the "
                "groups that it was saved with"
            )
        ids = dict(zip(match["param_names"], match["params"], strict=True))
        ordered.append({**match, "params": [ids[name] for name in group["param_names"]]})
    return ordered


def _in_our_order(groups: Groups, saved: Groups) -> list[dict[str, Any]]:
    """The saved groups with the parameters where ours are, under our names.

    Raises:
        ValueError: they are those of another model or of other groups.
    """
    saved = _by_name(groups, saved)
    sizes, saved_sizes = ([len(g["params"]) for g in gs] for gs in (groups, saved))
    if sizes != saved_sizes:
        raise ValueError(
            f"the checkpoint has groups of {saved_sizes} parameters, this optimizer has {sizes}: "
            "this is a checkpoint of another model"
        )
    return [
        {**theirs, **{k: ours[k] for k in ("param_names",) if k in ours}}
        for ours, theirs in zip(groups, saved, strict=True)
    ]


def _slot_of_id(groups: Groups, saved: Groups, slots: Sequence[Slot]) -> dict[Any, Slot]:
    """Saved parameter id -> slot, of groups in our order."""
    slot_of = {id(s.param): s for s in slots}
    return {
        saved_id: slot_of[id(p)]
        for group, theirs in zip(groups, saved, strict=True)
        for p, saved_id in zip(group["params"], theirs["params"], strict=True)
    }


def join(
    base: Mapping[str, Any],
    groups: Groups,
    slots: Sequence[Slot],
    own: Mapping[Key, Mapping[str, Tensor]],
    counters: Mapping[str, Any],
) -> dict[str, Any]:
    """The base's state_dict with our tensors by parameter and our counters in every group."""
    state = dict(base["state"])
    for saved_id, slot in _slot_of_id(groups, base["param_groups"], slots).items():
        if own.get(slot.key):
            state[saved_id] = {**state.get(saved_id, {}), **own[slot.key]}
    saved = [
        {k: _plain(v) if k.startswith("ebu_") else v for k, v in group.items()}
        for group in base["param_groups"]
    ]
    return {"state": state, "param_groups": [{**group, **counters} for group in saved]}


def _plain(number: Any) -> Any:
    """A rule's number without numpy, whose scalars no file without pickle holds."""
    if isinstance(number, (tuple, list)):
        return type(number)(map(_plain, number))
    real = isinstance(number, Real) and not isinstance(number, bool)
    return float(number) if real and type(number) is not int else number


def split(
    saved: Mapping[str, Any], groups: Groups, slots: Sequence[Slot], shaped: bool
) -> tuple[dict[str, Any], dict[Key, dict[str, Tensor]], dict[str, Any]]:
    """Undo `join`: the base's state_dict in our order, our tensors by key in the checkpoint's
    order, our counters ({} in a state of the base alone).

    Args:
        shaped: the base's own tensors have their parameter's shape (or are 0-d), as those of
            torch.optim have; they are checked too then.

    Raises:
        ValueError: groups or shapes are those of another model; nothing has been changed then.
    """
    ordered = _in_our_order(groups, saved["param_groups"])
    slot_of = _slot_of_id(groups, ordered, slots)
    own: dict[Key, dict[str, Tensor]] = {
        slot_of[saved_id].key: {} for group in saved["param_groups"] for saved_id in group["params"]
    }
    state = {}
    for saved_id, entry in saved["state"].items():
        if saved_id not in slot_of:
            state[saved_id] = entry
            continue
        slot = slot_of[saved_id]
        ours = {k: v for k, v in entry.items() if k.startswith("ebu_")}
        for name, value in (entry if shaped else ours).items():
            if isinstance(value, Tensor) and value.dim() and value.shape != slot.param.shape:
                raise ValueError(
                    f"{slot.name} has shape {tuple(slot.param.shape)} but the checkpoint's {name} "
                    f"has {tuple(value.shape)}: this is a checkpoint of another model"
                )
        own[slot.key] = ours
        rest = {k: v for k, v in entry.items() if k not in ours}
        if rest:  # an empty entry would stop Adam from initialising
            state[saved_id] = rest
    first = ordered[0] if ordered else {}
    counters = {name: first[name] for name in COUNTERS if name in first}
    stripped = [{k: v for k, v in g.items() if k not in COUNTERS} for g in ordered]
    return {"state": state, "param_groups": stripped}, own, counters
