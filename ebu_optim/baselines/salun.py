"""SalUn: trains only the weights to which the forget loss is most sensitive."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from .._compat import compat as _paper
from ..errors import NonFiniteError
from ..kernels import reference
from ..optim import PhasedOptimizer, Rule, Slot, Step
from ..optim.rule import (
    Figures,
    Key,
    Selection,
    Shards,
    like,
    local,
    select,
    spread,
    square,
    weight,
    wide,
)
from ._recipe import recipe


class Masked(Rule):
    """G = M (w_f g_f + w_r g_r); M is made once, moves with its parameters, and is saved.

    Args:
        delta: the share of scalars in M, in (0, 1].
        forget_weight, remember_weight: w_f and w_r, >= 0.
        clipped_before: with `paper`, clip G to this norm *before* it is masked; None does not clip.
        paper: use the released code's variant, in which the mask acts only on the gradient.
    """

    def __init__(
        self,
        delta: float,
        forget_weight: float,
        remember_weight: float,
        *,
        paper: bool,
        clipped_before: float | None,
    ) -> None:
        super().__init__(
            delta=delta,
            forget_weight=weight("forget_weight", forget_weight),
            remember_weight=weight("remember_weight", remember_weight),
        )
        self.options = {"compat": "paper" if paper else None}
        self.paper, self.clipped_before = paper, clipped_before
        self.mask: dict[Key, Tensor] = {}

    def make(self, slots: Sequence[Slot], found: Selection) -> None:
        """Make the mask from the selection of a forget gradient."""
        if int(found.nonfinite[0]):
            raise NonFiniteError(
                "SalUn: the forget gradient holds NaN or Inf, so no mask can be made; scale the "
                "loss down, or use float32"
            )
        for slot, g, pool in zip(slots, found.grads[0], found.pools[0], strict=True):
            at_least = reference.keys(g, found.dtype) >= found.taus[pool].to(g.device)
            self.mask[slot.key] = at_least & (g != 0)

    def begin(self, step: Step) -> Figures:
        if not self.mask:
            self.make(step.slots, step.select())
        figures: Figures = {"selected": self._selected(step)}
        if self.paper and self.clipped_before is not None:
            sums = (self._sum(s, *step.gradients(i)) for i, s in enumerate(step.slots))
            total = step.add_up(map(square, sums))
            step.shards.add(total)
            figures["clip"] = (self.clipped_before / (total.sqrt() + 1e-6)).clamp(max=1.0)
        return figures

    def update(self, slot: Slot, g_f: Tensor, g_r: Tensor, figures: Figures) -> Tensor:
        G = self._sum(slot, g_f, g_r).masked_fill_(~self._mask(slot), 0.0)
        return G.mul_(figures["clip"].to(G)) if "clip" in figures else G

    def moves(self, slot: Slot) -> Tensor | None:
        return None if self.paper else self._mask(slot)

    @staticmethod
    def _sum(slot: Slot, g_f: Tensor, g_r: Tensor) -> Tensor:
        w_f, w_r = (slot.group[f"ebu_{n}_weight"] for n in ("forget", "remember"))
        return g_f.mul_(w_f).add_(g_r, alpha=w_r)

    def _mask(self, slot: Slot) -> Tensor:
        mask = self.mask.get(slot.key)
        # a parameter without a gradient when the mask was made: the forget loss does not use it
        return torch.zeros_like(slot.param, dtype=torch.bool) if mask is None else mask

    def _selected(self, step: Step) -> Tensor:
        counted = (s for s in step.slots if step.shards.counts(s.key))
        total = step.add_up(self._mask(s).sum() for s in counted).long()
        step.shards.add(total)
        return total

    def state(self, slots: Iterable[Slot]) -> dict[Key, dict[str, Tensor]]:
        # an empty mask stands for no mask, because tools fill only the keys that they find
        return {
            s.key: {
                "ebu_mask": like(self.mask[s.key], s.param)
                if s.key in self.mask
                else torch.zeros_like(s.param, dtype=torch.bool)
            }
            for s in slots
        }

    def load(self, saved: Mapping[Key, Mapping[str, Tensor]], slots: Iterable[Slot]) -> None:
        slots = [s for s in slots if "ebu_mask" in saved.get(s.key, {})]
        loaded = {
            s.key: local(spread(saved[s.key]["ebu_mask"].to(s.param.device, copy=True), s.param))
            for s in slots
        }
        made = any(bool(saved[s.key]["ebu_mask"].any()) for s in slots)
        self.mask = {key: m.bool() for key, m in loaded.items()} if made else {}


class SalUn(PhasedOptimizer):
    r"""SalUn (Fan et al., 2024): a fixed mask from the forget gradient at theta0.

    .. math:: M = [\,|g_f(\theta_0)| \text{ among the top } \delta\,], \qquad
              G = M \odot (w_f g_f + w_r g_r)

    with one exact threshold over all tensors together. Scalars outside M stay bit-identical through
    the base step, including weight decay and momentum. Clipping uses the masked G.

    `make_mask` makes the mask before the first step, from the sum of the gradients over the
    forget set (the magnitude is that of the sum, so batches may cancel). Without `make_mask`, the
    mask is made from the first step's forget gradient. The mask is saved.

    The published forget loss is ``relabel_loss``, a mean over pixels; the remember loss is a sum
    over pixels. The published alpha = 1e-3 is w_r for that pair; for two means at 32x32x3 it
    corresponds to about 3.

    Args:
        base: a torch optimizer.
        delta: the share of scalars in M, in (0, 1].
        forget_weight, remember_weight: w_f and w_r.
        compat: "paper" is the released code: the gradient is clipped *before* it is masked, each
            batch of `make_mask` is clipped to norm 1, and the mask acts only on the gradient, so
            weight decay moves the scalars outside the mask.
        max_grad_norm, nonfinite: as for :class:`~ebu_optim.EBUOptimizer`.
    """

    rule: Masked

    def __init__(
        self,
        base: Optimizer,
        *,
        delta: float = 0.5,
        forget_weight: float = 1.0,
        remember_weight: float = 1.0,
        compat: str | None = None,
        max_grad_norm: float | None = None,
        nonfinite: str = "raise",
    ) -> None:
        rule = Masked(
            delta,
            forget_weight,
            remember_weight,
            paper=_paper(compat),
            clipped_before=max_grad_norm,
        )
        super().__init__(base, rule, max_grad_norm=max_grad_norm, nonfinite=nonfinite)

    def make_mask(self, closures: Iterable[Callable[[], Any]]) -> None:
        """Make the mask from the forget loss on batches of the forget set, before the first step.

        Args:
            closures: each runs forward and backward of the loss on one batch, in eval mode (the
                released code predicts with classifier-free guidance, 3 eps_c - 2 eps_null).

        Raises:
            RuntimeError: a phase has begun, steps were taken, or a gradient is missing or not
                finite.
        """
        if self._phases.done or self._phases.active or self._step_count:
            raise RuntimeError("make_mask: call it before the first phase of a new SalUn")
        total: dict[Key, Tensor] = {}
        for closure in closures:
            with torch.enable_grad(), self.forget():
                closure()
            of = zip(self._phases.look(), self._phases.of("forget"), strict=True)
            grads = {slot.key: local(g) for slot, g in of if g is not None}
            if self.rule.paper and grads:
                norm = torch.stack([square(g) for g in grads.values()]).sum().sqrt()
                reference.scale(list(grads.values()), (1.0 / (norm + 1e-6)).clamp(max=1.0).float())
            for key, g in grads.items():
                total[key] = total[key] + g if key in total else wide(g, None)
            self._phases.discard()
        if not total:
            raise NonFiniteError(
                "make_mask: the forget loss made no gradient; call backward() in each closure"
            )
        slots = [s._replace(param=local(s.param)) for s in self._slots() if s.key in total]
        sums = [total[s.key] for s in slots]
        shards = Shards(self._slots())
        found = select(slots, sums, sums, granularity="model", fused=None, shards=shards)
        self.rule.make(slots, found)

    def mask_of(self, param: Tensor) -> Tensor:
        """Return the mask of a parameter, bool, this process's part if sharded (read-only).

        Raises:
            KeyError: there is no mask for this parameter.
        """
        for slot in self._slots():
            if slot.param is param and slot.key in self.rule.mask:
                return self.rule.mask[slot.key]
        raise KeyError(
            "mask_of: there is no mask for this parameter; call make_mask or take a step first"
        )

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Raise ValueError once there is a mask, because it does not cover new parameters."""
        if self.rule.mask:
            raise ValueError("add_param_group: the mask is already made; build a new SalUn")
        super().add_param_group(param_group)


#: What SalUn learns from.
RECIPE = recipe(
    "SalUn",
    SalUn,
    strength="remember_weight",
    forgets="relabel",
    masked=True,
    published={"remember_weight": 0.5},
)
