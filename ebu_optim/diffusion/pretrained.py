"""The pretrained model's weights and buffers, without a second copy of the weights."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn


class Pretrained:
    """The tensors of a model before unlearning, for `torch.func.functional_call`.

    Args:
        model: the present model. Its floating buffers are copied here (in train mode, BatchNorm's
            statistics change with every forward pass), so make this before the first pass.
        optimizer: its ``anchors()`` returns theta0 by parameter.
        masters: maps the model's parameters to the optimizer's, if these differ.

    Raises:
        TypeError, ValueError: `masters` is not a mapping, or a master has another shape.
    """

    def __init__(
        self, model: nn.Module, optimizer: Any, masters: Mapping[Tensor, Tensor] | None
    ) -> None:
        self.model, self.optimizer, self.masters = model, optimizer, masters or {}
        if not isinstance(self.masters, Mapping):
            raise TypeError(
                "masters must be a mapping from the model's parameter to the optimizer's, such as "
                f"dict(zip(model.parameters(), masters)); got {type(masters)!r}"
            )
        for name, p in model.named_parameters():
            if p in self.masters and self.masters[p].shape != p.shape:
                raise ValueError(
                    f"masters: {name} has shape {tuple(p.shape)} but its master has "
                    f"{tuple(self.masters[p].shape)}; give each parameter its own master"
                )
        self._buffers = {
            name: b.detach().clone() for name, b in model.named_buffers() if b.is_floating_point()
        }
        self._warn_if_late()

    def tensors(self) -> dict[str, Tensor]:
        """Return theta0 and the buffers by name; the caller may write into the buffers.

        Raises:
            RuntimeError: a trained parameter has no theta0.
        """
        held = self._held()
        if not held:
            raise RuntimeError(
                "anchored: the optimizer holds no theta0. It is taken at the first phase if a "
                "penalty uses it; with fisher=None or penalty='none', give the values to "
                "EBUOptimizer(anchor={p: p.detach() for p in model.parameters()})"
            )
        theta0 = {
            name: held[p].to(p.device, p.dtype)  # a master may have another device and dtype
            for name, p in self.model.named_parameters()
            if p in held
        }
        self._check_covered(theta0)
        return {**theta0, **{name: self._buffer(name, b) for name, b in self.model.named_buffers()}}

    def _held(self) -> dict[Tensor, Tensor]:
        """Return theta0 by the model's parameters."""
        anchors = self.optimizer.anchors()
        mapped = {p: anchors[m] for p, m in self.masters.items() if m in anchors}
        return {**anchors, **mapped}

    def _check_covered(self, theta0: Mapping[str, Tensor]) -> None:
        trained = [(n, p) for n, p in self.model.named_parameters() if p.requires_grad]
        if all(name in theta0 for name, _ in trained):
            return
        # theta0 of a parameter that no step has moved yet is the model's own value
        groups = getattr(self.optimizer, "param_groups", ())
        known = {id(p) for group in groups for p in group["params"]}
        missing = [
            n for n, p in trained if n not in theta0 and id(self.masters.get(p, p)) not in known
        ]
        if missing:
            more = f" and {len(missing) - 1} more" if missing[1:] else ""
            raise RuntimeError(
                f"anchored: the optimizer does not hold {missing[0]}{more} of the model, so the "
                "teacher would be the present model. If the optimizer holds float32 masters, use "
                "anchored(model, opt, masters=dict(zip(model.parameters(), masters))); call "
                "requires_grad_(False) on what is not trained"
            )

    def _buffer(self, name: str, now: Tensor) -> Tensor:
        before = self._buffers.get(name)
        if before is None or before.shape != now.shape:
            return now.clone()
        return before.to(now.device, now.dtype, copy=True)

    def _warn_if_late(self) -> None:
        if not any(name.endswith("running_mean") for name in self._buffers):
            return
        held = self._held()
        if not all(torch.equal(p, held[p].to(p)) for p in self.model.parameters() if p in held):
            warnings.warn(
                "anchored: the model has already been trained, so its BatchNorm statistics have "
                "changed, and the teacher combines these with the pretrained weights; make the "
                "teacher before the first phase, and before a checkpoint is loaded",
                stacklevel=4,
            )
