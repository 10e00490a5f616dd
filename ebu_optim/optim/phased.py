"""PhasedOptimizer: two gradients, one step of any torch optimizer. It knows no method."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor
from torch._compile import _disable_dynamo
from torch.optim import Optimizer

from .. import kernels
from . import _checks, _ranks, _state
from ._anchors import Anchors, Holding, TensorMap
from ._phases import Phases
from ._shards import Shards, is_sharded, like, local, local_gradient
from ._slots import Key, Slot, Slots
from .rule import Combined, Rule, Step

Closure = Callable[[], Any]


class _Number:
    """A rule's number of that name as an attribute over the parameter groups."""

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name
        self.__doc__ = f"ebu_{name} of the groups: one value, or a tuple where they differ."

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


class PhasedOptimizer(Optimizer):
    """Any torch optimizer on what a rule makes of two gradients.

    It owns the phases, GradScaler, ranks and shards, clipping, the policy for NaN and Inf, theta0
    and F, statistics and the state; the :class:`~ebu_optim.optim.Rule` says what G is.
    :class:`~ebu_optim.EBUOptimizer` and every baseline are one of these.

    Args:
        base: a built optimizer over dense real floating parameters; see EBUOptimizer.
        rule: what G is.
        fisher, fisher_scale, anchor: F and theta0 for a rule with a penalty; see EBUOptimizer.
        max_grad_norm: clip G to this 2-norm; None does not clip.
        nonfinite: on NaN or Inf in a gradient or in G ``"raise"``, ``"skip"`` the step (counted in
            ``skipped_steps``) or ``"propagate"``.
        holding: how theta0 and F are held; see EBUOptimizer.

    Raises:
        TypeError: ``base`` is not a torch optimizer or needs a closure; sparse or complex tensors.
        ValueError: an option out of range; a mapping that does not fit the parameters.
    """

    base: Optimizer
    rule: Rule
    #: The phases that a step needs; a loop may leave out the other (see `ebu_optim.baselines`).
    needs: tuple[str, ...] = ("forget", "remember")
    rank_checks: int = 3  # accepted steps still to be compared; the same on all ranks
    alpha, delta, gamma = _Number(), _Number(), _Number()
    # GradScaler then calls step with the scale and its findings instead of unscaling param.grad
    # itself, which is one of the two gradients only.
    _step_supports_amp_scaling = True

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
        slots = Slots(lambda: base.param_groups)()
        kernels.backend([local(s.param) for s in slots], rule.fused)
        Shards(slots)
        self._anchors = Anchors(
            slots, fisher, anchor, rule.penalised, self.fisher_scale == "unit", holding
        )
        for group in base.param_groups:
            for name, value in self._defaults.items():
                group.setdefault(name, value)
        # What torch.optim itself does for an unpickled optimizer: hooks and the patched step. Its
        # __init__ would give us groups of our own.
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
        # The base's own: Adam and torch.distributed.checkpoint look at whether it is empty.
        return self.base.state

    @property
    def defaults(self) -> dict[str, Any]:  # type: ignore[override]
        return self.base.defaults

    def __getattr__(self, name: str) -> Any:
        # train() and eval() exist where the base has them (schedule-free optimizers)
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
        # like torch.optim without hooks and patched methods; an unfinished phase is not copied
        return {
            k: v for k, v in self.__dict__.items()
            if k not in ("_phases", "_slots") and not _is_hook_or_patch(k)
        }  # fmt: skip

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._slots = Slots(lambda: self.base.param_groups)
        self._phases = Phases(self._slots, self._anchors.take, self.needs)

    def __repr__(self) -> str:
        shown = {name: _common(self.param_groups, f"ebu_{name}") for name in self.rule.numbers}
        if self.rule.penalised and self._anchors.mode != "none":
            shown |= {"fisher": self._anchors.mode, "fisher_scale": self.fisher_scale}
        shown |= self.rule.options
        shown |= {n: getattr(self, n) for n in ("max_grad_norm", "nonfinite", "fused")}
        listed = ", ".join(f"{n}={v!r}" for n, v in shown.items())
        return f"{type(self).__name__}({listed})\nbase: {self.base!r}"

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group to the base. Its anchor is taken at the next first phase."""
        values = {n: param_group.get(n, default) for n, default in self._defaults.items()}
        _checks.group(values)
        if self._anchors.mode == "fixed":
            raise ValueError(
                "add_param_group: fisher is a fixed mapping, which has no values for the new "
                "parameters; build a new EBUOptimizer with a Fisher that covers them"
            )
        params = param_group["params"]
        if not isinstance(params, (Tensor, set)):  # a set is refused by the base
            params = list(params)
        for i, p in enumerate([params] if isinstance(params, Tensor) else params):
            _checks.real(p[1] if isinstance(p, tuple) else p, f"parameter {i} of the new group")
        self.base.add_param_group({**param_group, "params": params})
        self.base.param_groups[-1].update(values)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Inside a phase clear that phase's gradients, outside the gradients of both."""
        self.base.zero_grad(set_to_none)
        if self._phases.active is None:
            self._phases.reset()

    # -- phases ---------------------------------------------------------------------------------

    def forget(self) -> AbstractContextManager[None]:
        """Run the forward and backward passes of the forget loss in here, once per micro-batch.

        Leaving takes the gradients off the parameters, entering again puts them back first.

        Raises:
            RuntimeError: phases nest; a gradient lies there that belongs to no phase.
            TypeError: a sparse or complex gradient; a parameter that has become a shard.
        """
        return self._phases.phase("forget")

    def remember(self) -> AbstractContextManager[None]:
        """Run the forward and backward passes of the remember loss in here; see `forget`."""
        return self._phases.phase("remember")

    # -- step -----------------------------------------------------------------------------------

    def step(  # type: ignore[override]
        self,
        forget: Closure | None = None,
        remember: Closure | None = None,
        *,
        closure: Closure | None = None,
    ) -> tuple[Any, Any] | None:
        """One step, from two closures or from the phases that ran before.

        Args:
            forget, remember: run forward and backward of their loss and return it. One that calls
                zero_grad itself is harmless.
            closure: None, or after the phases one that makes no gradient: Lightning's manual
                optimization passes such a closure by name, and torch's checkpoint tools pass None.

        Returns:
            The values that the two closures returned (None for one that `needs` leaves out, which
            is not called); None after phases.

        Raises:
            TypeError: a single closure.
            RuntimeError: a phase is missing or made no gradient; gradients were touched between
                the phases and the step; NaN or Inf with ``nonfinite="raise"``; the ranks of
                torch.distributed differ.
        """
        losses = None
        if closure is not None and forget is remember is None and self._phases.complete:
            with torch.enable_grad():
                closure()  # what it does to the gradients is an error below
            closure = None
        given = {"forget": forget, "remember": remember}
        wanted = {name: call for name in self.needs if (call := given[name]) is not None}
        some = forget is not None or remember is not None
        if closure is not None or (some and len(wanted) < len(self.needs)):
            count, takes, names = (
                ("two closures", "forget=..., remember=...", "phases forget() and remember()")
                if len(self.needs) == 2
                else ("one closure", f"{self.needs[0]}=...", f"phase {self.needs[0]}()")
            )
            raise TypeError(
                f"{type(self).__name__}.step takes {count}, step({takes}), or none after the "
                f"{names}; it got {'another' if len(self.needs) == 1 else 'one'}. In Lightning use "
                "manual optimization; through a prepared accelerate optimizer use the phases"
            )
        if some:
            found = {}
            try:
                with torch.enable_grad():
                    for name, call in wanted.items():
                        with self._phases.phase(name):
                            found[name] = call()
            except BaseException:
                self._phases.discard()
                raise
            losses = (found.get("forget"), found.get("remember"))
        elif not self._phases.done and all(_is_zero(g.get("lr", 1)) for g in self.param_groups):
            # torch.distributed.checkpoint initialises the base's state by such a call
            self.base.step()
            return None
        try:
            self._apply()
        except BaseException:
            # GradScaler takes them away after a step only; the next one would use them again
            self.__dict__.pop("grad_scale", None)
            self.__dict__.pop("found_inf", None)
            raise
        return losses

    @_disable_dynamo  # as torch.optim has it: in compiled code a step is one graph break
    @torch.no_grad()
    def _apply(self) -> None:
        phases = self._phases
        scaler = getattr(self, "found_inf", None) is not None
        slots = self._slots()
        if scaler and getattr(self, "grad_scale", None) is None:
            phases.discard()
            raise RuntimeError(
                "scaler.unscale_() was called between the phases and step (accelerate's "
                "clip_grad_norm_ does so): it reaches one of the two gradients only. Clip with "
                "EBUOptimizer(max_grad_norm=...) and leave unscaling to scaler.step()"
            )
        if phases.complete and phases.active is None:
            phases.check_untouched(slots)
        phases.require_all(slots)
        for group in self.param_groups:
            _checks.group(group)
        _checks.capture(self.nonfinite, self._anchors.mode if self._anchors.active else "none")
        phases.unpoison()

        of_f, of_r = phases.grads["forget"], phases.grads["remember"]
        slots = [s for s in slots if s.key in of_f or s.key in of_r]
        g_f = [local_gradient(of_f.get(s.key), s.param) for s in slots]
        g_r = [local_gradient(of_r.get(s.key), s.param) for s in slots]
        compared = self.rank_checks > 0 and self._compare_ranks(g_f, g_r)
        combined = None
        if not scaler or not self.found_inf.item():
            combined = self._combine(slots, g_f, g_r, scaler)
        self.last_step_skipped = combined is None
        if combined is None:
            self.skipped_steps += 1
        else:
            self._last = combined.last
            for slot, grad in zip(slots, combined.grads, strict=True):
                slot.param.grad = like(grad, slot.param)
            try:
                self.base.step()
            except BaseException:
                phases.discard()
                raise
            if combined.held is not None:
                params = [local(s.param) for s in slots]
                kernels.backend(params, self.rule.fused).restore(params, combined.held)
            self._step_count += 1
            self.rank_checks -= compared
        phases.close(slots)

    def _compare_ranks(self, g_f: Sequence[Tensor | None], g_r: Sequence[Tensor | None]) -> bool:
        """True where there are ranks and they agree. It comes before any may skip or raise.

        Of sharded parameters, which differ from rank to rank, the layout is compared.
        """
        if _ranks.alone():
            return False
        slots = [s for s in self._slots() if s.param.requires_grad]
        own = ("fisher_scale", "nonfinite", "max_grad_norm")
        options: list[Any] = [*self.rule.options.items(), *(getattr(self, n) for n in own)]
        options += [(s.key, *(s.group[name] for name in self._defaults)) for s in slots]
        whole = {s.key for s in slots if not is_sharded(s.param)}
        options += [
            (s.key, tuple(s.param.shape), str(s.param.placements))  # type: ignore[attr-defined]
            for s in slots if s.key not in whole
        ]  # fmt: skip
        anchor, fisher = (
            {key: t for key, t in held.items() if key in whole}
            for held in (self._anchors.anchor, self._anchors.fisher)
        )
        if len(whole) < len(slots):
            g_f, g_r = [], []
        try:
            _ranks.same_on_all_ranks(
                [s.param for s in slots if s.key in whole], g_f, g_r,
                getattr(self, "grad_scale", None), anchor, fisher, options,
                local(slots[0].param).device,
            )  # fmt: skip
        except RuntimeError:
            self._phases.discard()
            raise
        return True

    def _combine(
        self,
        slots: Sequence[Slot],
        g_f: Sequence[Tensor | None],
        g_r: Sequence[Tensor | None],
        scaler: bool,
    ) -> Combined | None:
        """G and what belongs to it; None where the step is to be skipped."""
        step = Step(
            [s._replace(param=local(s.param)) for s in slots], g_f, g_r,
            self.grad_scale.double().reciprocal() if scaler else None,
            Shards(slots), self._anchors, self._step_count,
        )  # fmt: skip
        looks = self.nonfinite != "propagate"
        if looks and not scaler:
            f, r = self.rule.nonfinite(step).tolist()
            if (f or r) and self._skips(
                f"non-finite gradients: {f} elements of the forget gradient, {r} of the remember "
                "gradient are NaN or Inf; nothing was changed"
            ):
                return None
        combined = self.rule.combine(step)
        square, finite = combined.update_sq, combined.finite
        if looks:
            finite, norm_sq = torch.stack([finite.to(square), square]).tolist()
            exceeded = not finite or (self.max_grad_norm and not math.isfinite(norm_sq))
            if exceeded and self._skips(
                "non-finite combined gradient: the two gradients are finite, but what "
                f"{type(self).__name__} makes of them exceeds what its dtype holds (65504 in "
                "float16), or the norm to clip it by does; no weight was changed. Scale the losses "
                "or strengths down, or use float32 or bfloat16 weights"
            ):
                return None
        self.rule.accepted(step)
        if self.max_grad_norm is not None:
            factor = (self.max_grad_norm / (square.sqrt() + 1e-6)).clamp(max=1.0)
            kernels.reference.scale(combined.grads, factor)
        return combined

    def _skips(self, message: str) -> bool:
        """True where the step is to be skipped; raises where `nonfinite` says so."""
        if self.nonfinite == "skip" or getattr(self, "found_inf", None) is not None:
            return True
        self._phases.discard()
        raise RuntimeError(f'{message}. Use nonfinite="skip" to drop such steps')

    # -- checkpoints ----------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """The standard layout: the base's keys and ours (``ebu_*``) together.

        Tensors of ours that are not made yet stand as what they would be made of now, so that a
        tool which only fills the keys it finds fills ours; ``ebu_started`` is False then.
        """
        for before in self._optimizer_state_dict_pre_hooks.values():
            before(self)
        own = self._anchors.state(self._slots())
        for key, tensors in self.rule.state(self._slots()).items():
            own.setdefault(key, {}).update(tensors)
        counters = {
            "ebu_step": self._step_count,
            "ebu_skipped": self.skipped_steps,
            "ebu_fisher_mean": None if self._anchors.mean is None else self._anchors.mean.item(),
            "ebu_fisher_frozen": self._anchors.mode == "warm",
            "ebu_started": bool(self._anchors.anchor),
        }
        counters |= self._anchors.reference()
        packed = _state.join(self.base.state_dict(), self.param_groups, own, counters)
        for after in self._optimizer_state_dict_post_hooks.values():
            changed = after(self, packed)
            packed = packed if changed is None else changed
        return packed

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what `state_dict` returned, or a state of the base alone.

        States are matched by position, as torch does. The dtypes of theta0 and F are kept.

        Raises:
            ValueError: the state is one of another model, or holds theta0 by reference and
                ``anchor`` is missing or another; nothing has been changed then.
        """
        state_dict = dict(state_dict)
        for before_load in self._optimizer_load_state_dict_pre_hooks.values():
            changed = before_load(self, state_dict)
            state_dict = state_dict if changed is None else changed
        slots = self._slots()
        base, own, counters = _state.split(
            state_dict, self.param_groups, slots,
            shaped=type(self.base).__module__.startswith("torch.optim")
            # its factors have the shapes of rows and columns
            and not isinstance(self.base, getattr(torch.optim, "Adafactor", ())),
        )  # fmt: skip
        self._anchors.check_reference(counters)
        values = [{n: group[n] for n in self._defaults} for group in self.param_groups]
        self.base.load_state_dict(base)
        for group, missing in zip(self.param_groups, values, strict=True):
            group.update({n: v for n, v in missing.items() if n not in group})
            if isinstance(group.get("ebu_delta"), list):  # some formats have no tuples
                group["ebu_delta"] = tuple(group["ebu_delta"])
        self._phases.reset()
        if counters:  # else it is a state of the base alone
            self._step_count = int(counters["ebu_step"])
            self.skipped_steps = int(counters["ebu_skipped"])
            self._anchors.load(
                own, slots,
                started=bool(counters["ebu_started"]),
                frozen=bool(counters["ebu_fisher_frozen"]),
                mean=counters["ebu_fisher_mean"],
            )  # fmt: skip
            self.rule.load(own, slots)
        for after_load in self._optimizer_load_state_dict_post_hooks.values():
            after_load(self)

    # -- reading --------------------------------------------------------------------------------

    @property
    def stats(self) -> dict[str, Any]:
        """Figures of the last accepted step, {} before the first; reading waits for the device.

        total (scalars that had a gradient); forget_norm, remember_norm (where the method needs that
        gradient) and cosine (where it needs both); update_norm, |G| before clipping; moved,
        |theta - theta0| before the step (where theta0 is held); and the method's own: those of EBU
        are in docs/method.md.
        """
        return {} if self._last is None else self.rule.read(self._last)

    def anchors(self) -> dict[Tensor, Tensor]:
        """theta0 of every parameter that has one, by parameter (do not write)."""
        return self._by_parameter(self._anchors.anchor)

    def anchor_of(self, param: Tensor) -> Tensor:
        """theta0 of a parameter: the frozen model's weight, same shape and dtype (do not write)."""
        held = self.anchors()
        if param not in held:
            raise KeyError(
                "anchor_of: no anchor is held for this parameter; anchors are taken at the first "
                "phase, of the optimizer's trainable parameters, where a penalty uses them"
            )
        return held[param]

    def fisher_of(self, param: Tensor) -> Tensor:
        """F of a parameter as it is now, before `fisher_scale` (do not write)."""
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
        "step", "_opt_called", "_zero_grad_profile_name", "grad_scale", "found_inf",
        "_warned_capturable_if_run_uncaptured",
    )  # fmt: skip


def _common(groups: Sequence[Mapping[str, Any]], name: str) -> Any:
    values = [group[name] for group in groups]
    return values[0] if all(v == values[0] for v in values) else tuple(values)


def _is_zero(lr: Any) -> bool:
    return float(lr) == 0
