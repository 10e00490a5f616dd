"""EBUOptimizer: the paper's rule over the fused kernels."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from ..kernels import reference
from ..kernels.contract import Weights
from . import _checks
from ._holding import Holding, TensorMap
from ._shards import local
from ._slots import Group
from ._stats import read_stats
from .phased import PhasedOptimizer
from .rule import Combined, Rule, Step


class EBURule(Rule):
    """Steps 1 to 5 of docs/method.md for all slots at once. The options are EBUOptimizer's."""

    def __init__(
        self,
        *,
        alpha: float,
        delta: float | tuple[float, float],
        gamma: float,
        penalty: str,
        update: str,
        unrelated: str,
        terms: Sequence[str],
        granularity: str,
        fused: bool | None,
        stats: bool,
    ) -> None:
        super().__init__(alpha=alpha, delta=delta, gamma=gamma)
        choice = _checks.choice
        self.options = {
            "penalty": choice("penalty", penalty, ("partial", "full", "none")),
            "update": choice("update", update, ("added", "replaced", "routed")),
            "unrelated": choice("unrelated", unrelated, ("update", "freeze")),
            "terms": _checks.terms(terms, update),
            "granularity": choice("granularity", granularity, ("model", "tensor")),
        }
        self.fused, self.stats = fused, stats

    @property
    def penalised(self) -> bool:  # type: ignore[override]
        return self.options["penalty"] != "none"

    def nonfinite(self, step: Step) -> Tensor:
        return step.select(self.options["granularity"], self.fused).nonfinite

    def combine(self, step: Step) -> Combined:
        selection = step.select(self.options["granularity"], self.fused)
        freeze = self.options["unrelated"] == "freeze"
        made = step.combine(selection, self._weigh, freeze=freeze, counted=self.stats)
        stats, total = made.last
        return made._replace(last=(stats, selection.thresholds(step.inv_scale), total))

    def _weigh(self, group: Group) -> tuple[Weights, float]:
        penalty, update, terms = (self.options[name] for name in ("penalty", "update", "terms"))
        summed: Any = tuple(t in terms for t in _checks.TERMS)
        alpha, gamma = float(group["ebu_alpha"]), float(group["ebu_gamma"])
        return Weights.reading(alpha=alpha, penalty=penalty, update=update, terms=summed), gamma

    def accepted(self, step: Step) -> None:
        """Do nothing: the kernels have already updated an online F."""

    def read(self, last: Any) -> dict[str, Any]:
        return read_stats(last, self.stats)


class EBUOptimizer(PhasedOptimizer):
    r"""Unlearning as a wrapper around any torch optimizer (EBU; docs/method.md has the equations).

    Each step takes two gradients at the same weights: :math:`g_f` of the forget loss and
    :math:`g_r` of the remember loss. Of each, the top ``delta`` share by magnitude is selected over
    all parameters together. Where the two selections overlap, the gradients are blended with weight
    ``alpha``. Where only the remember loss selects, a Fisher penalty holds the weights near the
    pretrained values. The base optimizer steps on the result.

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
        base: an optimizer over dense real floating parameters. One whose ``step`` needs a closure
            (LBFGS) is refused, because a closure would overwrite the combined gradient.
        alpha: weight of :math:`g_f` on the overlap, in [0, 1] (eq. 11 as in Algorithm 1, line 7).
        delta: share of the scalars selected for each task, in (0, 1], or a pair (forget, remember).
            Groups with the same delta are ranked together, groups with another delta separately.
        gamma: strength of the Fisher penalty, >= 0 (eq. 9). The paper gives no value; the default
            is from experiments (docs/evidence.md).
        fisher: ``"online"`` (a cumulative mean of :math:`g_r^2`, no extra pass), None (no penalty),
            or a mapping to non-negative tensors of the parameters' shapes, such as a
            :class:`~ebu_optim.DiagonalFisher`. Its keys are parameters, or names if the base was
            built with named parameters.
        fisher_scale: ``"unit"`` uses F / sqrt(mean F), which makes gamma independent of the
            scale of the loss; ``"raw"`` uses F as it is.
        anchor: theta0, a mapping like ``fisher``; None takes the values before a parameter's first
            step.
        penalty: ``"partial"`` (on remember-only scalars, the paper), ``"full"`` (on all, as in
            Selective Amnesia) or ``"none"``.
        update: ``"added"``, ``"replaced"`` or ``"routed"``, three readings of the paper's update.
        unrelated: ``"update"`` lets the base move scalars that neither task selects; ``"freeze"``
            keeps them bit-identical through the base's step, including momentum and weight decay.
        terms: which of the three summed terms are used (Table 4): ``"forget"``, ``"remember"``,
            ``"modulated"``. ``update="routed"`` needs all three.
        granularity: rank over the whole ``"model"`` or within each ``"tensor"``.
        max_grad_norm: clip the combined gradient to this 2-norm; None does not clip.
        nonfinite: what happens if a gradient holds NaN or Inf. ``"raise"`` raises NonFiniteError,
            a RuntimeError. ``"skip"`` leaves the step out and counts it in ``skipped_steps``.
            ``"propagate"`` lets the values through and needs no host synchronization. If both
            gradients are finite but G is not, an online F already includes the remember gradient.
        fused: as in torch.optim: None uses the best available kernels, True requires fused
            kernels, False uses plain torch.
        anchor_dtype: hold theta0 in ``torch.float16`` or ``torch.bfloat16`` instead of the
            parameter's dtype; the penalty then pulls towards the rounded theta0.
        fisher_dtype: hold F in ``torch.bfloat16`` instead of float32 (float16 would turn small
            values into 0). In bfloat16, an online F no longer changes after about 250 steps,
            because each update of the mean is rounded away; warm it up, or give a mapping.
        held_on: ``"cpu"`` holds theta0 and F in main memory (pinned if there is a GPU) and streams
            them through the step; None holds them on the devices of their parameters.
        stats: False leaves out of ``opt.stats`` the sums over the two gradients and the masks.
            These sums take time where a single thread computes more slowly than memory delivers.
        anchor_source: where theta0 comes from (a hub id or a path). Checkpoints then hold this and
            a hash instead of theta0, and loading one needs ``anchor``.

    Raises:
        TypeError: ``base`` is not a torch optimizer or needs a closure; a tensor is sparse or
            complex.
        ValueError: an option is out of range; a mapping has missing names, wrong shapes, negative
            or non-finite values; ``anchor_dtype`` cannot represent theta0.

    ``param_groups``, ``state`` and ``defaults`` are always the base's own. ``ebu_alpha``,
    ``ebu_delta`` and ``ebu_gamma`` are in the groups, where they can be scheduled.

    Under torch.distributed, the first ``rank_checks`` (3) accepted steps compare checksums over
    the ranks, and all ranks raise RuntimeError if one differs. Processes that share a process group
    but train independently set ``opt.rank_checks = 0``. Checkpoints do not hold this number.
    """

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
        stats: bool = True,
    ) -> None:
        rule = EBURule(
            alpha=alpha,
            delta=delta,
            gamma=gamma,
            penalty=penalty,
            update=update,
            unrelated=unrelated,
            terms=terms,
            granularity=granularity,
            fused=fused,
            stats=stats,
        )
        super().__init__(
            base,
            rule,
            fisher=fisher,
            fisher_scale=fisher_scale,
            anchor=anchor,
            max_grad_norm=max_grad_norm,
            nonfinite=nonfinite,
            holding=Holding(anchor_dtype, fisher_dtype, held_on, anchor_source),
        )

    def warmup_fisher(self, closures: Sequence[Callable[[], Any]], *, freeze: bool = True) -> None:
        """Estimate the online F from remember batches before the first step, at theta0.

        F becomes the mean over the closures of the squared batch gradient.

        Args:
            closures: each runs forward and backward of the remember loss on one batch.
            freeze: keep F fixed afterwards; False continues to average at every step.

        Raises:
            RuntimeError: a phase has begun, steps were taken, ``fisher`` is not "online", or a
                gradient holds NaN or Inf.
        """
        started = self._phases.done or self._phases.active or self._step_count
        if started or self._anchors.mode != "online":
            raise RuntimeError(
                "warmup_fisher: call it before the first phase of an EBUOptimizer with "
                f'fisher="online" (fisher: {self._anchors.mode}, steps: {self._step_count})'
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
                    "warmup_fisher: a remember gradient holds NaN or Inf, so F would too; leave "
                    "that batch out, or scale the loss down"
                )
            self._anchors.warm(self._slots())
            self._phases.discard()
        if freeze:
            self._anchors.mode = "warm"
