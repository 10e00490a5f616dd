"""A torch optimizer that shares the groups and the state of another one and adds to them.

This is what torch sees of `PhasedOptimizer`: groups, hooks, copies, ``repr``, ``state_dict``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from .. import kernels
from . import _checks, _state
from ._anchors import Anchors
from ._holding import Holding, TensorMap
from ._phases import Phases
from ._shards import Shards, local
from ._slots import Key, Slots
from .rule import Rule


class _Number:
    """A rule's number of the same name, as an attribute over the parameter groups."""

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name
        self.__doc__ = f"ebu_{name} of the groups: one value, or a tuple if they differ."

    def __get__(self, opt: Any, owner: type | None = None) -> Any:
        if opt is None:
            return self
        if self.name not in opt.rule.numbers:
            raise AttributeError(f"{type(opt).__name__} has no {self.name}")
        return _common(opt.param_groups, f"ebu_{self.name}")

    def __set__(self, opt: Any, value: Any) -> None:
        if self.name not in opt.rule.numbers:
            raise AttributeError(f"{type(opt).__name__} has no {self.name}")
        _checks.group({f"ebu_{self.name}": value})
        for group in opt.param_groups:
            group[f"ebu_{self.name}"] = value


class WrappedOptimizer(Optimizer):
    """The base optimizer's groups and state, with the rule's numbers in the groups.

    It also holds theta0 and F. See `PhasedOptimizer` for the arguments.
    """

    base: Optimizer
    rule: Rule
    alpha, delta, gamma = _Number(), _Number(), _Number()

    def __init__(
        self,
        base: Optimizer,
        rule: Rule,
        *,
        fisher: str | TensorMap | None = None,
        fisher_scale: str = "raw",
        anchor: TensorMap | None = None,
        max_grad_norm: float | None = None,
        nonfinite: str = "raise",
        holding: Holding | None = None,
    ) -> None:
        _checks.base(base)
        self.base, self.rule, self.needs = base, rule, rule.needs
        self.nonfinite = _checks.choice("nonfinite", nonfinite, ("raise", "skip", "propagate"))
        self.fisher_scale = _checks.choice("fisher_scale", fisher_scale, ("unit", "raw"))
        self.max_grad_norm = _checks.max_grad_norm(max_grad_norm)
        self.skipped_steps = 0
        self.last_step_skipped = False
        self._defaults = {f"ebu_{name}": value for name, value in rule.numbers.items()}
        _checks.group(self._defaults)
        for group in base.param_groups:
            _checks.group(group)

        self._step_count = 0
        self._last: Any = None
        self._slots = Slots(base)
        slots = self._slots()
        kernels.backend([local(s.param) for s in slots], rule.fused)
        Shards(slots)
        self._anchors = Anchors(
            slots,
            fisher,
            anchor,
            rule.penalised,
            self.fisher_scale == "unit",
            holding,
            rule.anchored,
        )
        _checks.direction(base.param_groups, self._anchors.active)
        for group in base.param_groups:
            for name, value in self._defaults.items():
                group.setdefault(name, value)
        # torch.optim does the same for an unpickled optimizer: it sets up hooks and patches step.
        # Optimizer.__init__ would create separate groups.
        self.__setstate__({})

    # -- the face of torch.optim.Optimizer ------------------------------------------------------

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        return self.base.param_groups

    @param_groups.setter
    def param_groups(self, value: list[dict[str, Any]]) -> None:
        self.base.param_groups = value

    @property
    def state(self) -> Any:  # type: ignore[override]
        # The base's own state: Adam and torch.distributed.checkpoint check whether it is empty.
        return self.base.state

    @property
    def defaults(self) -> dict[str, Any]:  # type: ignore[override]
        return self.base.defaults

    def __getattr__(self, name: str) -> Any:
        # train() and eval() exist if the base has them (schedule-free optimizers)
        if name in ("train", "eval") and "base" in self.__dict__:
            return getattr(self.base, name)
        if "rule" in self.__dict__ and name in (*self.rule.options, "fused"):
            return self.rule.options.get(name, self.rule.fused)
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    def __setattr__(self, name: str, value: Any) -> None:
        if "rule" in self.__dict__ and name in self.rule.options:
            self.rule.options[name] = value
        else:
            super().__setattr__(name, value)

    def __getstate__(self) -> dict[str, Any]:
        # like torch.optim: hooks and patched methods are left out, and so is an unfinished phase
        return {
            k: v for k, v in self.__dict__.items() if k != "_phases" and not _is_hook_or_patch(k)
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._phases = Phases(self._slots, self._anchors, self.needs)

    def __repr__(self) -> str:
        shown = {name: _common(self.param_groups, f"ebu_{name}") for name in self.rule.numbers}
        if self.rule.penalised and self._anchors.mode != "none":
            shown |= {"fisher": self._anchors.mode, "fisher_scale": self.fisher_scale}
        shown |= self.rule.options
        shown |= {n: getattr(self, n) for n in ("max_grad_norm", "nonfinite", "fused")}
        listed = ", ".join(f"{n}={v!r}" for n, v in shown.items())
        return f"{type(self).__name__}({listed})\nbase: {self.base!r}"

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group to the base. Its theta0 is taken at the next first phase.

        Raises:
            TypeError: a parameter is not a dense real floating tensor.
            ValueError: a number is out of range, or ``fisher`` is a fixed mapping.
        """
        values = {n: param_group.get(n, default) for n, default in self._defaults.items()}
        _checks.group(values)
        if self._anchors.mode == "fixed":
            raise ValueError(
                "add_param_group: fisher is a fixed mapping, which has no values for the new "
                "parameters; build a new EBUOptimizer with a Fisher that covers them"
            )
        params = param_group["params"]
        if not isinstance(params, (Tensor, set)):  # the base refuses a set
            params = list(params)
        for i, p in enumerate([params] if isinstance(params, Tensor) else params):
            _checks.real(p[1] if isinstance(p, tuple) else p, f"parameter {i} of the new group")
        self.base.add_param_group({**param_group, "params": params})
        self.base.param_groups[-1].update(values)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear the gradients of the active phase, or of both phases outside a phase."""
        self.base.zero_grad(set_to_none)
        if self._phases.active is None:
            self._phases.reset()
            if set_to_none:
                self._phases.release()

    # -- checkpoints ----------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Return the state in the standard layout: the base's keys and ours (``ebu_*``) together.

        A tensor of ours that does not exist yet is included with the value that it would have now,
        so a tool that fills only the keys it finds also fills ours; ``ebu_started`` is then False.
        """
        for before in self._optimizer_state_dict_pre_hooks.values():
            before(self)
        slots = self._slots()
        own = self._anchors.state(slots)
        for key, tensors in self.rule.state(slots).items():
            own.setdefault(key, {}).update(tensors)
        counters = {
            "ebu_step": self._step_count,
            "ebu_skipped": self.skipped_steps,
            "ebu_fisher_mean": None if self._anchors.mean is None else self._anchors.mean.item(),
            "ebu_fisher_frozen": self._anchors.mode == "warm",
            "ebu_started": bool(self._anchors.anchor),
        }
        counters |= self._anchors.reference(s.key for s in slots)
        packed = _state.join(self.base.state_dict(), self.param_groups, slots, own, counters)
        for after in self._optimizer_state_dict_post_hooks.values():
            changed = after(self, packed)
            packed = packed if changed is None else changed
        return packed

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what `state_dict` returned, or a state of the base alone.

        States are matched by position, as in torch. If both sides have parameter names, states are
        matched by name in any order. theta0 and F keep their dtypes.

        Raises:
            ValueError: the state belongs to another model or other groups, or it holds theta0 by
                reference and ``anchor`` is missing or different. Nothing has been changed.
        """
        state_dict = dict(state_dict)
        for before_load in self._optimizer_load_state_dict_pre_hooks.values():
            changed = before_load(self, state_dict)
            state_dict = state_dict if changed is None else changed
        slots = self._slots()
        base, own, counters = _state.split(
            state_dict,
            self.param_groups,
            slots,
            shaped=type(self.base).__module__.startswith("torch.optim")
            # Adafactor's factors have the shapes of rows and columns
            and not isinstance(self.base, getattr(torch.optim, "Adafactor", ())),
        )
        self._anchors.check_reference(counters, own)
        values = [{n: group[n] for n in self._defaults} for group in self.param_groups]
        self.base.load_state_dict(base)
        for group, missing in zip(self.param_groups, values, strict=True):
            group.update({n: v for n, v in missing.items() if n not in group})
            if isinstance(group.get("ebu_delta"), list):  # some formats have no tuples
                group["ebu_delta"] = tuple(group["ebu_delta"])
        self._phases.reset()
        if counters:  # a state of the base alone has none
            self._step_count = int(counters["ebu_step"])
            self.skipped_steps = int(counters["ebu_skipped"])
            self._anchors.load(
                own,
                slots,
                started=bool(counters["ebu_started"]),
                frozen=bool(counters["ebu_fisher_frozen"]),
                mean=counters["ebu_fisher_mean"],
            )
            self.rule.load(own, slots)
        for after_load in self._optimizer_load_state_dict_post_hooks.values():
            after_load(self)

    def anchors(self) -> dict[Tensor, Tensor]:
        """Return theta0 of every parameter that has one, by parameter (read-only)."""
        return self._by_parameter(self._anchors.anchor)

    def anchor_of(self, param: Tensor) -> Tensor:
        """Return theta0 of a parameter: the frozen model's weight, same shape (read-only).

        Raises:
            KeyError: no theta0 is held for this parameter.
        """
        held = self.anchors()
        if param not in held:
            raise KeyError(
                "anchor_of: no anchor is held for this parameter; anchors are taken at the first "
                "phase for the optimizer's trainable parameters, if a penalty uses them"
            )
        return held[param]

    def fisher_of(self, param: Tensor) -> Tensor:
        """Return the present F of a parameter, before `fisher_scale` is applied (read-only).

        Raises:
            KeyError: no F is held for this parameter.
        """
        held = self._by_parameter(self._anchors.fisher)
        if param not in held:
            raise KeyError(
                "fisher_of: no Fisher is held for this parameter; the online one starts at the "
                "first phase, for the optimizer's trainable parameters"
            )
        return held[param]

    def _by_parameter(self, held: Mapping[Key, Tensor]) -> dict[Tensor, Tensor]:
        return {s.param: held[s.key] for s in self._slots() if s.key in held}


def _is_hook_or_patch(name: str) -> bool:
    return name.startswith("_optimizer_") or name in (
        "step",
        "_opt_called",
        "_zero_grad_profile_name",
        "grad_scale",
        "found_inf",
        "_warned_capturable_if_run_uncaptured",
    )


def _common(groups: Sequence[Mapping[str, Any]], name: str) -> Any:
    values = [group[name] for group in groups]
    return values[0] if all(v == values[0] for v in values) else tuple(values)
