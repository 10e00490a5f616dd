"""The optimizer's state in the standard layout: the base's keys and ours (`ebu_*`) together.

Tools drop other top-level keys. So theta0 and F are in "state" with the base's tensors, and the
counters are in every group. States are matched by position, as in torch; saved ids may be names.
If both sides have parameter names, a parameter is matched by its name, wherever it is.
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
    """Return name -> place; {} if not every parameter has a unique name."""
    found = {
        name: (g, i)
        for g, group in enumerate(groups)
        for i, name in enumerate(group.get("param_names") or ())
    }
    named = all(len(g.get("param_names") or ()) == len(g["params"]) for g in groups)
    return found if named and len(found) == sum(len(g["params"]) for g in groups) else {}


def _by_name(groups: Groups, saved: Groups) -> Groups:
    """Return the saved groups in the order of our names, or unchanged if no name has moved.

    Raises:
        ValueError: names have moved, and the saved groups are not ours in another order.
    """
    ours, theirs = _places(groups), _places(saved)
    # torch.distributed.checkpoint orders the parameters itself by ids that are names, and leaves
    # the list of names unchanged
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
                f"{n} is parameter {ours[n][1]} of group {ours[n][0]}, but in the checkpoint it is "
                f"parameter {theirs[n][1]} of group {theirs[n][0]}, among other names: this is a "
                "checkpoint of another model or of other groups; build the optimizer with the "
                "groups that it was saved with"
            )
        ids = dict(zip(match["param_names"], match["params"], strict=True))
        ordered.append({**match, "params": [ids[name] for name in group["param_names"]]})
    return ordered


def _in_our_order(groups: Groups, saved: Groups) -> list[dict[str, Any]]:
    """Return the saved groups with the parameters in our order and under our names.

    Raises:
        ValueError: the groups belong to another model or have other parameters.
    """
    saved = _by_name(groups, saved)
    sizes, saved_sizes = ([len(g["params"]) for g in gs] for gs in (groups, saved))
    if sizes != saved_sizes:
        raise ValueError(
            f"the checkpoint has groups of {saved_sizes} parameters, this optimizer has {sizes}: "
            "this is a checkpoint of another model; load one of this model"
        )
    return [
        {**theirs, **{k: ours[k] for k in ("param_names",) if k in ours}}
        for ours, theirs in zip(groups, saved, strict=True)
    ]


def _slot_of_id(groups: Groups, saved: Groups, slots: Sequence[Slot]) -> dict[Any, Slot]:
    """Map saved parameter ids to slots; the groups are in our order."""
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
    """Return the base's state dict with our tensors by parameter and our counters per group."""
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
    """Convert a rule's numbers from numpy types, which no file without pickle can hold."""
    if isinstance(number, (tuple, list)):
        return type(number)(map(_plain, number))
    real = isinstance(number, Real) and not isinstance(number, bool)
    return float(number) if real and type(number) is not int else number


def split(
    saved: Mapping[str, Any], groups: Groups, slots: Sequence[Slot], shaped: bool
) -> tuple[dict[str, Any], dict[Key, dict[str, Tensor]], dict[str, Any]]:
    """Undo `join`.

    Args:
        shaped: the base's own tensors have the shape of their parameter (or are 0-d), as in
            torch.optim. Then their shapes are checked too.

    Returns:
        The base's state dict in our order; our tensors by key, in the checkpoint's order; our
        counters ({} for a state of the base alone).

    Raises:
        ValueError: groups or shapes belong to another model. Nothing has been changed.
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
                    f"has {tuple(value.shape)}: this is a checkpoint of another model; load one of "
                    "this model"
                )
        own[slot.key] = ours
        rest = {k: v for k, v in entry.items() if k not in ours}
        if rest:  # an empty entry would stop Adam from initializing its state
            state[saved_id] = rest
    first = ordered[0] if ordered else {}
    counters = {name: first[name] for name in COUNTERS if name in first}
    stripped = [{k: v for k, v in g.items() if k not in COUNTERS} for g in ordered]
    return {"state": state, "param_groups": stripped}, own, counters
