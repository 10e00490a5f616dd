"""SalUn: only the weights that the forget loss is most sensitive to are trained."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from .._combine import select
from .._penalty import Penalty
from .._phases import Key, Phases, Slot
from .._shards import Shards, like, local, spread
from ..kernels import reference
from ._rule import Figures, Rule, Step, _wide, weight
from ._rule import compat as _paper


class SalUn(Rule):
    r"""SalUn (Fan et al., 2024): a fixed mask from the forget gradient at theta0.

    .. math:: M = [\,|g_f(\theta_0)| \text{ among the top } \delta\,], \qquad
              G = M \odot (w_f g_f + w_r g_r)

    with one exact threshold over all tensors together. Scalars outside M stay bit-identical through
    the base step, weight decay and momentum included; clipping sees the masked G.

    The mask is made by `make_mask` before the first step, from the sum of the gradients over the
    forget set (batches may cancel: the magnitude is taken of the sum); without it, from the first
    step's forget gradient. It is saved.

    Its forget loss is :func:`relabel_loss`, a mean over pixels, its remember loss a sum over them:
    the published alpha = 1e-3 is w_r for that pair, about 3 for two means at 32x32x3.

    Args:
        base: a built torch optimizer.
        delta: the share of scalars in M, in (0, 1].
        forget_weight, remember_weight: w_f and w_r.
        compat: "paper" is the released code: the gradient is clipped *before* it is masked, the
            batches of `make_mask` are clipped to norm 1 one by one, and the mask acts on the
            gradient alone, so that weight decay moves what it excludes.
        max_grad_norm, nonfinite: as of :class:`~ebu_optim.EBUOptimizer`.
    """

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
        self._compat = _paper(compat)
        options = {"forget_weight": forget_weight, "remember_weight": remember_weight}
        super().__init__(
            base, options={"delta": delta, **{n: weight(n, v) for n, v in options.items()}},
            max_grad_norm=max_grad_norm, nonfinite=nonfinite,
        )  # fmt: skip
        self._penalty: _Masks = _Masks(list(self._slots()), None, None, "none", False)
        self._phases = Phases(self._slots, self._penalty.take, self.needs)

    def make_mask(self, closures: Iterable[Callable[[], Any]]) -> None:
        """The mask from the forget loss on batches of the forget set, before the first step.

        Args:
            closures: each runs forward and backward of the loss on one batch, in eval mode (the
                released code predicts with classifier-free guidance, 3 eps_c - 2 eps_null).

        Raises:
            RuntimeError: a phase is under way, steps were taken, or a gradient is not finite.
        """
        if self._phases.done or self._phases.active or self._step_count:
            raise RuntimeError("make_mask: call it before the first phase of a new SalUn")
        slots = list(self._slots())
        total: dict[Key, Tensor] = {}
        for closure in closures:
            with torch.enable_grad(), self.forget():
                closure()
            found = {key: local(g) for key, g in self._phases.forget.items()}
            if self._compat and found:
                norm = torch.stack([g.double().square().sum() for g in found.values()]).sum().sqrt()
                reference.scale(list(found.values()), (1.0 / (norm + 1e-6)).clamp(max=1.0).float())
            for key, g in found.items():
                total[key] = total[key] + g if key in total else _wide(g, 1.0)
            self._phases.discard()
        slots = [s._replace(param=local(s.param)) for s in slots if s.key in total]
        self._select(slots, [total[s.key] for s in slots], Shards(list(self._slots())))

    def _select(self, slots: Sequence[Slot], grads: Sequence[Tensor], shards: Shards) -> None:
        if not slots:
            raise RuntimeError("SalUn: the forget loss made no gradient to take a mask from")
        found = select(slots, grads, grads, granularity="model", fused=None, shards=shards)
        if int(found.nonfinite[0]):
            raise RuntimeError("SalUn: the forget gradient holds NaN or Inf; so would the mask")
        for slot, g, pool in zip(slots, grads, found.pools[0], strict=True):
            at_least = reference.keys(g, found.dtype) >= found.taus[pool].to(g.device)
            self._penalty.mask[slot.key] = at_least & (g != 0)

    def mask_of(self, param: Tensor) -> Tensor:
        """The mask of a parameter, bool (this process's part of a sharded one); do not write."""
        for slot in self._slots():
            if slot.param is param and slot.key in self._penalty.mask:
                return self._penalty.mask[slot.key]
        raise KeyError("mask_of: there is no mask for this parameter (yet)")

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Refused once there is a mask, which does not cover the new parameters."""
        if self._penalty.mask:
            raise ValueError("add_param_group: the mask is made; build a new SalUn")
        super().add_param_group(param_group)

    def begin(self, step: Step) -> Figures:
        if not self._penalty.mask:
            self._select(step.slots, step.g_f, step.shards)
        figures: Figures = {"selected": self._selected(step)}
        if self._compat and self.max_grad_norm is not None:
            square = sum(
                _sum_sq(self._sum(s, _wide(f, step.scale), _wide(r, step.scale)))
                for s, f, r in zip(step.slots, step.g_f, step.g_r, strict=True)
            )
            total = torch.as_tensor(square)
            step.shards.add(total)
            figures["clip"] = (self.max_grad_norm / (total.sqrt() + 1e-6)).clamp(max=1.0)
        return figures

    def rule(self, slot: Slot, g_f: Tensor, g_r: Tensor, figures: Figures) -> Tensor:
        G = self._sum(slot, g_f, g_r).masked_fill_(~self._mask(slot), 0.0)
        return G.mul_(figures["clip"].to(G)) if "clip" in figures else G

    def moves(self, slot: Slot) -> Tensor | None:
        return None if self._compat else self._mask(slot)

    @staticmethod
    def _sum(slot: Slot, g_f: Tensor, g_r: Tensor) -> Tensor:
        w_f, w_r = (slot.group[f"ebu_{n}_weight"] for n in ("forget", "remember"))
        return g_f.mul_(w_f).add_(g_r, alpha=w_r)

    def _mask(self, slot: Slot) -> Tensor:
        mask = self._penalty.mask.get(slot.key)
        # a parameter that made no gradient when the mask was made: the forget loss does not feel it
        return torch.zeros_like(slot.param, dtype=torch.bool) if mask is None else mask

    def _selected(self, step: Step) -> Tensor:
        counted = [s for s in step.slots if step.shards.counts(s.key)]
        total = sum((self._mask(s).sum() for s in counted), torch.zeros((), dtype=torch.int64))
        total = torch.as_tensor(total).to(step.dot.device)
        step.shards.add(total)
        return total


class _Masks(Penalty):
    """No theta0 and no F, but a mask by position, saved with the optimizer."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.mask: dict[Key, Tensor] = {}

    def state(self, slots: Iterable[Slot]) -> dict[Key, dict[str, Tensor]]:
        # an empty mask stands for none: tools fill only the keys that they find
        return {
            s.key: {"ebu_mask": like(self.mask[s.key], s.param) if s.key in self.mask
                    else torch.zeros_like(s.param, dtype=torch.bool)}
            for s in slots
        }  # fmt: skip

    def load(
        self, own: Mapping[Key, Mapping[str, Tensor]], slots: Iterable[Slot], **counters: Any
    ) -> None:
        slots = [s for s in slots if "ebu_mask" in own.get(s.key, {})]
        loaded = {
            s.key: local(spread(own[s.key]["ebu_mask"].to(s.param.device, copy=True), s.param))
            for s in slots
        }
        made = any(bool(own[s.key]["ebu_mask"].any()) for s in slots)
        self.mask = {key: m.bool() for key, m in loaded.items()} if made else {}


def _sum_sq(t: Tensor) -> Tensor:
    return t.double().square().sum()
