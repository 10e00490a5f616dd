"""EBUOptimizer: two gradients, one step of any torch optimizer. Moves tensors, does no maths."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor
from torch._compile import _disable_dynamo
from torch.optim import Optimizer

from . import _checkpoint, _checks, distributed, kernels
from ._combine import Combined, combine, select
from ._penalty import Holding, Penalty
from ._phases import Key, Phases, Slot
from ._shards import Shards, is_sharded, like, local, local_gradient
from ._stats import read_stats
from .kernels import reference

Closure = Callable[[], Any]
TensorMap = Mapping[str, Tensor] | Mapping[Tensor, Tensor]

_UPDATE_NONFINITE, _UPDATE_SQ = map(reference.STATS.index, ("update_nonfinite", "update_sq"))
_OPTIONS = ("penalty", "update", "unrelated", "terms", "granularity", "nonfinite", "fisher_scale")


class EBUOptimizer(Optimizer):
    r"""Unlearning as a wrapper round any torch optimizer (EBU; docs/method.md has the equations).

    Each step takes two gradients at the same weights, :math:`g_f` of the forget loss and
    :math:`g_r` of the remember loss. The top ``delta`` share of each by magnitude is selected over
    all parameters together; where the two selections overlap the gradients are blended with weight
    ``alpha``; a Fisher penalty holds what only the remember loss selects near the pretrained
    values; the base optimizer steps on the result.

    .. code-block:: python

        opt = EBUOptimizer(Adam(model.parameters(), lr=1e-4), alpha=0.6, delta=0.5)
        opt.step(forget=lambda: backward(loss_f()), remember=lambda: backward(loss_r()))

        with opt.forget():            # the same, spelled out (accelerate, GradScaler, Lightning)
            loss_f().backward()
        with opt.remember():
            loss_r().backward()
        opt.step()
        opt.zero_grad()

    Args:
        base: a built optimizer over dense real floating parameters. One whose ``step`` needs a
            closure (LBFGS) is refused: a closure would overwrite the combined gradient.
        alpha: weight of :math:`g_f` on the overlap, in [0, 1] (eq. 11 as in Algorithm 1, line 7).
        delta: share of the scalars selected for each task, in (0, 1]; or a pair (forget, remember).
            Groups with the same delta are ranked together, a group with another one by itself.
        gamma: strength of the Fisher penalty, >= 0 (eq. 9); the paper gives no value, the default
            is from experiments (docs/evidence.md).
        fisher: ``"online"`` (a cumulative mean of :math:`g_r^2`, no extra pass), None (no penalty),
            or a mapping from parameter, or from name where the base was given named parameters, to
            a non-negative tensor of the parameter's shape; a :class:`~ebu_optim.DiagonalFisher` is
            one.
        fisher_scale: ``"unit"`` uses F / sqrt(mean F), which makes gamma independent of the
            scale of the loss; ``"raw"`` uses F as it is.
        anchor: theta0, a mapping like ``fisher``; None takes the values at the first phase.
        penalty: ``"partial"`` (on remember-only scalars, the paper), ``"full"`` (on all, as in
            Selective Amnesia) or ``"none"``.
        update: ``"added"``, ``"replaced"`` or ``"routed"``, three readings of the paper's update.
        unrelated: ``"update"`` lets the base move scalars that neither task selects; ``"freeze"``
            keeps them bit-identical through its step, momentum and weight decay included.
        terms: which of the three summed terms take part (Table 4): of ``"forget"``, ``"remember"``,
            ``"modulated"``; all three for ``update="routed"``.
        granularity: rank over the whole ``"model"`` or inside each ``"tensor"``.
        max_grad_norm: clip the combined gradient to this 2-norm; None does not clip.
        nonfinite: on NaN or Inf in a gradient ``"raise"``, ``"skip"`` the step (counted in
            ``skipped_steps``) or ``"propagate"`` (no host synchronisation). Where the gradients are
            finite and their combination is not, an online F has counted the remember gradient.
        fused: as in torch.optim: None takes the best kernels there are, True insists on fused
            ones, False takes plain torch.
        anchor_dtype: hold theta0 in ``torch.float16`` or ``torch.bfloat16`` instead of the
            parameter's dtype; the penalty then pulls towards the rounded theta0.
        fisher_dtype: hold F in ``torch.bfloat16`` instead of float32 (float16 would turn small F
            into 0). An online F stalls in it after some 250 steps: warm up or give a mapping.
        held_on: ``"cpu"`` holds theta0 and F in the main memory (pinned where there is a GPU) and
            streams them through the step; None holds them beside their parameters.
        anchor_source: where theta0 comes from (a hub id, a path): checkpoints then name it, with a
            hash, instead of holding theta0. Loading one needs ``anchor``.

    Raises:
        TypeError: ``base`` is not a torch optimizer or needs a closure; sparse or complex tensors.
        ValueError: an option out of range; a mapping with missing names, wrong shapes, negative
            or non-finite values; a theta0 that ``anchor_dtype`` does not hold.

    ``param_groups``, ``state`` and ``defaults`` are the base's own at all times. ``ebu_alpha``,
    ``ebu_delta`` and ``ebu_gamma`` live in the groups, where they can be scheduled.

    Under torch.distributed the first ``rank_checks`` (3) accepted steps compare a checksum over
    the ranks, and all raise a RuntimeError where one differs. Processes that share a process group
    and train independently set ``opt.rank_checks = 0``. No checkpoint holds it.
    """

    base: Optimizer
    #: The phases that a step needs; a loop may leave out the other (see `ebu_optim.baselines`).
    needs: tuple[str, ...] = ("forget", "remember")
    rank_checks: int = 3  # accepted steps still to be compared; the same on all ranks
    # GradScaler then calls step with the scale and its findings instead of unscaling param.grad
    # itself, which is one of the two gradients only.
    _step_supports_amp_scaling = True

    def __init__(
        self,
        base: Optimizer,
        *,
        alpha: float = 0.6,
        delta: float | tuple[float, float] = 0.5,
        gamma: float = 100.0,
        fisher: str | TensorMap | None = "online",
        fisher_scale: str = "unit",
        anchor: TensorMap | None = None,
        penalty: str = "partial",
        update: str = "added",
        unrelated: str = "update",
        terms: Sequence[str] = ("forget", "remember", "modulated"),
        granularity: str = "model",
        max_grad_norm: float | None = None,
        nonfinite: str = "raise",
        fused: bool | None = None,
        anchor_dtype: torch.dtype | None = None,
        fisher_dtype: torch.dtype | None = None,
        held_on: str | None = None,
        anchor_source: str | None = None,
    ) -> None:
        _checks.base(base)
        self.base = base
        self.penalty = _checks.choice("penalty", penalty, ("partial", "full", "none"))
        self.update = _checks.choice("update", update, ("added", "replaced", "routed"))
        self.unrelated = _checks.choice("unrelated", unrelated, ("update", "freeze"))
        self.granularity = _checks.choice("granularity", granularity, ("model", "tensor"))
        self.nonfinite = _checks.choice("nonfinite", nonfinite, ("raise", "skip", "propagate"))
        self.fisher_scale = _checks.choice("fisher_scale", fisher_scale, ("unit", "raw"))
        self.terms = _checks.terms(terms, update)
        self.max_grad_norm = _checks.max_grad_norm(max_grad_norm)
        self.fused = fused
        self.skipped_steps = 0
        self.last_step_skipped = False
        self._defaults = {"ebu_alpha": alpha, "ebu_delta": delta, "ebu_gamma": gamma}
        _checks.group(self._defaults)
        for group in base.param_groups:
            _checks.group(group)

        self._step_count = 0
        self._last: tuple[Tensor, Tensor, int] | None = None
        slots = list(self._find())
        kernels.backend([local(s.param) for s in slots], fused)
        Shards(slots)
        holding = Holding(anchor_dtype, fisher_dtype, held_on, anchor_source)
        self._penalty = Penalty(
            slots, fisher, anchor, self.penalty, self.fisher_scale == "unit", holding
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
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    def __getstate__(self) -> dict[str, Any]:
        # like torch.optim without hooks and patched methods; an unfinished phase is not copied
        return {
            k: v for k, v in self.__dict__.items()
            if k not in ("_phases", "_seen", "_known") and not _is_hook_or_patch(k)
        }  # fmt: skip

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._seen: list[Any] = []  # groups and parameters when `_known` was made
        self._known: list[Slot] = []
        self._phases = Phases(self._slots, self._penalty.take, self.needs)

    def __repr__(self) -> str:
        groups = self.param_groups
        shown = [f"{n}={_common(groups, 'ebu_' + n)!r}" for n in ("alpha", "delta", "gamma")]
        shown += [f"fisher={self._penalty.mode!r}"]
        shown += [f"{n}={getattr(self, n)!r}" for n in (*_OPTIONS, "max_grad_norm", "fused")]
        return f"{type(self).__name__}({', '.join(shown)})\nbase: {self.base!r}"

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group to the base. Its anchor is taken at the next first phase."""
        values = {n: param_group.get(n, default) for n, default in self._defaults.items()}
        _checks.group(values)
        if self._penalty.mode == "fixed":
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

    # -- alpha, delta, gamma: attributes over the groups ----------------------------------------

    @property
    def alpha(self) -> Any:
        """ebu_alpha of the groups: one value, or a tuple where they differ."""
        return _common(self.param_groups, "ebu_alpha")

    @alpha.setter
    def alpha(self, value: float) -> None:
        self._set("ebu_alpha", value)

    @property
    def delta(self) -> Any:
        """ebu_delta of the groups: one value, or a tuple of them where they differ."""
        return _common(self.param_groups, "ebu_delta")

    @delta.setter
    def delta(self, value: float | tuple[float, float]) -> None:
        self._set("ebu_delta", value)

    @property
    def gamma(self) -> Any:
        """ebu_gamma of the groups: one value, or a tuple where they differ."""
        return _common(self.param_groups, "ebu_gamma")

    @gamma.setter
    def gamma(self, value: float) -> None:
        self._set("ebu_gamma", value)

    def _set(self, name: str, value: Any) -> None:
        _checks.group({name: value})
        for group in self.param_groups:
            group[name] = value

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
        slots = list(self._slots())
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
        _checks.capture(self.nonfinite, self._penalty.mode if self._penalty.active else "none")
        phases.unpoison()

        slots = [s for s in slots if s.key in phases.forget or s.key in phases.remember]
        g_f = [local_gradient(phases.forget.get(s.key), s.param) for s in slots]
        g_r = [local_gradient(s.param.grad, s.param) for s in slots]
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
                kernels.backend(params, self.fused).restore(params, combined.held)
            self._step_count += 1
            self.rank_checks -= compared
        phases.close(slots)

    def _compare_ranks(self, g_f: Sequence[Tensor | None], g_r: Sequence[Tensor | None]) -> bool:
        """True where there are ranks and they agree. It comes before any may skip or raise.

        Of sharded parameters, which differ from rank to rank, the layout is compared.
        """
        if distributed.alone():
            return False
        slots = [s for s in self._slots() if s.param.requires_grad]
        options: list[Any] = [getattr(self, name) for name in (*_OPTIONS, "max_grad_norm")]
        options += [(s.key, *(s.group[name] for name in self._defaults)) for s in slots]
        whole = {s.key for s in slots if not is_sharded(s.param)}
        options += [
            (s.key, tuple(s.param.shape), str(s.param.placements))  # type: ignore[attr-defined]
            for s in slots if s.key not in whole
        ]  # fmt: skip
        anchor, fisher = (
            {key: t for key, t in held.items() if key in whole}
            for held in (self._penalty.anchor, self._penalty.fisher)
        )
        if len(whole) < len(slots):
            g_f, g_r = [], []
        try:
            distributed.same_on_all_ranks(
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
        shards = Shards(slots)
        slots = [s._replace(param=local(s.param)) for s in slots]
        selection = select(
            slots, g_f, g_r, granularity=self.granularity, fused=self.fused, shards=shards
        )
        if self.nonfinite != "propagate" and not scaler:
            f, r = selection.nonfinite.tolist()
            if f or r:
                if self.nonfinite == "skip":
                    return None
                self._phases.discard()
                raise RuntimeError(
                    f"non-finite gradients: {f} elements of the forget gradient, {r} of the "
                    "remember gradient are NaN or Inf; nothing was changed. Use "
                    'nonfinite="skip" to drop such steps'
                )
        scale = self.grad_scale.double().reciprocal().float() if scaler else None
        combined = combine(
            slots, g_f, g_r, selection, self._penalty,
            update=self.update, unrelated=self.unrelated, terms=self.terms,
            max_grad_norm=self.max_grad_norm, inv_scale=scale, shards=shards,
        )  # fmt: skip
        if self.nonfinite != "propagate" and self._exceeded(combined):
            if self.nonfinite == "skip" or scaler:
                return None
            self._phases.discard()
            raise RuntimeError(
                "non-finite combined gradient: the two gradients are finite, but their combination "
                "(with the penalty), or the norm to clip it by, exceeds what its dtype holds, "
                "65504 in float16; no weight was changed. Scale the losses or gamma down, use "
                'float32 or bfloat16 weights, or nonfinite="skip" to drop such steps'
            )
        return combined

    def _exceeded(self, combined: Combined) -> bool:
        """True where G, or the norm to clip it by, is not finite."""
        if combined.last is None:
            return False
        nonfinite, square = combined.last[0][[_UPDATE_NONFINITE, _UPDATE_SQ]].tolist()
        return nonfinite > 0 or (self.max_grad_norm is not None and not math.isfinite(square))

    def warmup_fisher(self, closures: Sequence[Closure], *, freeze: bool = True) -> None:
        """Estimate the online F from remember batches before the first step, at theta0.

        F becomes the mean over the closures of the squared batch gradient.

        Args:
            closures: each runs forward and backward of the remember loss on one batch.
            freeze: keep F fixed from then on; False goes on averaging at every step.

        Raises:
            RuntimeError: a phase is under way, steps were taken, or ``fisher`` is not "online".
        """
        started = self._phases.done or self._phases.active or self._step_count
        if started or self._penalty.mode != "online":
            raise RuntimeError(
                "warmup_fisher: call it before the first phase of an EBUOptimizer with "
                f'fisher="online" (fisher: {self._penalty.mode}, steps: {self._step_count})'
            )
        for closure in closures:
            with torch.enable_grad(), self.remember():
                closure()
            probe = reference.finite_probe(
                [local(g) for s in self._slots() if (g := s.param.grad) is not None]
            )
            if probe is not None and probe.isnan():
                self._phases.discard()
                raise RuntimeError(
                    "warmup_fisher: a remember gradient holds NaN or Inf; F would too. Leave that "
                    "batch out, or scale the loss down"
                )
            self._penalty.warm(self._slots())
            self._phases.discard()
        if freeze:
            self._penalty.mode = "warm"

    # -- checkpoints ----------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """The standard layout: the base's keys and ours (``ebu_*``) together.

        Tensors of ours that are not made yet stand as what they would be made of now, so that a
        tool which only fills the keys it finds fills ours; ``ebu_started`` is False then.
        """
        for before in self._optimizer_state_dict_pre_hooks.values():
            before(self)
        own = self._penalty.state(self._slots())
        counters = {
            "ebu_step": self._step_count,
            "ebu_skipped": self.skipped_steps,
            "ebu_fisher_mean": None if self._penalty.mean is None else self._penalty.mean.item(),
            "ebu_fisher_frozen": self._penalty.mode == "warm",
            "ebu_started": bool(self._penalty.anchor),
        }
        counters |= self._penalty.reference()
        packed = _checkpoint.join(self.base.state_dict(), self.param_groups, own, counters)
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
        slots = list(self._slots())
        base, own, counters = _checkpoint.split(
            state_dict, self.param_groups, slots,
            shaped=type(self.base).__module__.startswith("torch.optim")
            and type(self.base).__name__ != "Adafactor",
        )  # fmt: skip
        self._penalty.check_reference(counters)
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
            self._penalty.load(
                own, slots,
                started=bool(counters["ebu_started"]),
                frozen=bool(counters["ebu_fisher_frozen"]),
                mean=counters["ebu_fisher_mean"],
            )  # fmt: skip
        for after_load in self._optimizer_load_state_dict_post_hooks.values():
            after_load(self)

    # -- reading --------------------------------------------------------------------------------

    @property
    def stats(self) -> dict[str, float]:
        """Figures of the last accepted step; reading them waits for the device (see `_stats`)."""
        return read_stats(self._last)

    def anchors(self) -> dict[Tensor, Tensor]:
        """theta0 of every parameter that has one, by parameter (do not write)."""
        return self._by_parameter(self._penalty.anchor)

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
        held = self._by_parameter(self._penalty.fisher)
        if param not in held:
            raise KeyError(
                "fisher_of: no Fisher is held for this parameter; the online one starts at the "
                "first phase, for the optimizer's trainable parameters"
            )
        return held[param]

    def _by_parameter(self, held: Mapping[Key, Tensor]) -> dict[Tensor, Tensor]:
        return {s.param: held[s.key] for s in self._slots() if s.key in held}

    def _slots(self) -> list[Slot]:
        """Every parameter of the base, a tied one once (do not write).

        Kept until a group or a parameter is another: making them anew at every look costs more
        than the step of a model of many small tensors.
        """
        groups = self.base.param_groups
        now = [x for group in groups for x in (group, *group["params"])]
        if len(now) != len(self._seen) or any(map(operator.is_not, now, self._seen)):
            self._seen, self._known = now, list(self._find())
        return self._known

    def _find(self) -> Iterator[Slot]:
        seen: set[int] = set()
        index = 0
        for g, group in enumerate(self.base.param_groups):
            names = group.get("param_names")
            for i, p in enumerate(group["params"]):
                if id(p) not in seen:
                    seen.add(id(p))
                    name = names[i] if names else f"parameter {index} (group {g})"
                    yield Slot((g, i), group, p, name)
                index += 1


def _is_hook_or_patch(name: str) -> bool:
    return name.startswith("_optimizer_") or name in (
        "step", "_opt_called", "_zero_grad_profile_name", "grad_scale", "found_inf",
        "_warned_capturable_if_run_uncaptured",
    )  # fmt: skip


def _common(groups: Sequence[Mapping[str, Any]], name: str) -> Any:
    if any(name not in group for group in groups):  # a baseline without it
        raise AttributeError(f"the parameter groups have no {name}")
    values = [group[name] for group in groups]
    return values[0] if all(v == values[0] for v in values) else tuple(values)


def _is_zero(lr: Any) -> bool:
    return float(lr) == 0
