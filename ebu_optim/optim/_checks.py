"""Checks of what users pass in: every message names the argument, the value and the remedy."""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping, Sequence
from itertools import repeat
from numbers import Real
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from ..kernels.contract import has_float64
from ._gradients import Grads, addresses
from ._shards import any_sharded, is_sharded, local, spread
from ._slots import SlotList

TERMS = ("forget", "remember", "modulated")  # terms of the update, in the order of the kernels


def choice(name: str, value: Any, allowed: Sequence[str]) -> str:
    if value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, allowed))}; got {value!r}")
    return value


def number(name: str, value: Any) -> float:
    """Return a number, or a tensor that holds one, as a float."""
    scalar = isinstance(value, Tensor) and value.numel() == 1
    if isinstance(value, bool) or not (scalar or isinstance(value, Real)):
        raise ValueError(f"{name} must be a number; got {value!r}")
    return float(value)


def group(values: Mapping[str, Any]) -> None:
    """Check those of ebu_alpha, ebu_delta and ebu_gamma that `values` has."""
    if "ebu_alpha" in values:
        alpha = number("alpha", values["ebu_alpha"])
        if not 0 <= alpha <= 1:
            raise ValueError(f"alpha must be in [0, 1]; got {alpha}")
    if "ebu_delta" in values:
        delta = values["ebu_delta"]
        pair = delta if isinstance(delta, (tuple, list)) else (delta, delta)
        if len(pair) != 2:
            raise ValueError(f"delta must be a number or a pair (forget, remember); got {delta!r}")
        for d in pair:
            if not 0 < number("delta", d) <= 1:
                raise ValueError(f"delta must be in (0, 1], a share of the parameters; got {d}")
    if "ebu_gamma" in values:
        gamma = number("gamma", values["ebu_gamma"])
        if not (gamma >= 0 and math.isfinite(gamma)):
            raise ValueError(f"gamma must be finite and >= 0; got {gamma}")


def direction(groups: Sequence[Mapping[str, Any]], penalised: bool) -> None:
    """Raise ValueError if the base maximizes: it would push the weights away from theta0."""
    if penalised and any(g.get("maximize") for g in groups):
        raise ValueError(
            "the base has maximize=True, which reverses the penalty: it would push the weights "
            "away from theta0; build the base without it and change the sign of both losses, or "
            "use fisher=None"
        )


def terms(given: Sequence[str], update: str) -> tuple[str, ...]:
    value: tuple[Any, ...] = tuple(given) if isinstance(given, (list, tuple, set)) else (given,)
    if not value or len(set(value)) != len(value) or any(t not in TERMS for t in value):
        raise ValueError(f"terms must name at least one of {TERMS}, each once; got {value!r}")
    if update == "routed" and len(value) != 3:
        raise ValueError(
            f'terms={value!r} with update="routed": the routed update is not a sum of three terms; '
            'use update="added" or "replaced" for the ablations'
        )
    return value


def max_grad_norm(value: Any) -> float | None:
    if value is None:
        return None
    norm = number("max_grad_norm", value)
    if not norm > 0:
        raise ValueError(f"max_grad_norm must be > 0 or None; got {norm}")
    return norm


def base(optimizer: Any) -> None:
    if not isinstance(optimizer, Optimizer):
        raise TypeError(
            f"base must be a torch.optim.Optimizer, such as Adam(params); got {type(optimizer)!r}"
        )
    name = type(optimizer).__name__
    if hasattr(optimizer, "forget") and hasattr(optimizer, "remember"):
        raise TypeError(f"base is already a {name}; wrap the plain optimizer, {name}.base")
    if not (hasattr(optimizer, "defaults") and hasattr(optimizer, "state")):
        raise TypeError(
            f"base {name} never called Optimizer.__init__. An optimizer that removes the gradients "
            "during backward(), such as torchao's CPUOffloadOptimizer, would step on one of the "
            "two gradients and never see the combined one; keep master copies on the CPU instead "
            "(docs/loops.md)"
        )
    closure = inspect.signature(optimizer.step).parameters.get("closure")
    if isinstance(optimizer, torch.optim.LBFGS) or (
        closure is not None
        and closure.default is inspect.Parameter.empty
        and closure.kind is not inspect.Parameter.VAR_KEYWORD
    ):
        raise TypeError(
            f"base {name} needs a closure, which would overwrite the combined gradient; "
            "use an optimizer whose step() needs none"
        )
    for g, param_group in enumerate(optimizer.param_groups):
        for i, p in enumerate(param_group["params"]):
            real(p, f"parameter {i} of group {g}")


def real(p: Tensor, name: str) -> None:
    if p.is_meta:
        raise TypeError(
            f"{name} is on the meta device and has no values; load the weights first "
            "(model.to_empty(device=...) and load_state_dict, or load_state_dict(..., "
            "assign=True)), then build the optimizer over the new parameters"
        )
    if p.is_complex() or not p.is_floating_point():
        raise TypeError(f"{name} has dtype {p.dtype}; parameters must be real floating tensors")
    if p.layout is not torch.strided:
        raise TypeError(f"{name} has layout {p.layout}; parameters must be dense")
    wide_device(p, name)
    sharded(p, name)


def wide_device(p: Tensor, name: str) -> None:
    """Raise TypeError for a device without float64, which the sums need."""
    if not has_float64(p.device):
        raise TypeError(
            f"{name} is on {p.device}, which has no float64 for the sums over all parameters; "
            "unlearn on the CPU, model.cpu(), or on a CUDA device"
        )


def sharded(p: Tensor, name: str) -> None:
    """Raise TypeError for a DTensor on an old torch, and for a parameter of FSDP1."""
    if is_sharded(p) and tuple(map(int, torch.__version__.split(".")[:2])) < (2, 6):
        raise TypeError(
            f"{name} is a DTensor: fully_shard and tensor parallelism need torch 2.6 "
            f"or newer; this is {torch.__version__}"
        )
    if hasattr(p, "_fsdp_flattened"):
        raise TypeError(
            f"{name} belongs to FullyShardedDataParallel (FSDP1), which is not supported, because "
            "its parameters are pieces of flat buffers; use fully_shard (FSDP2, torch >= 2.6) or "
            "DistributedDataParallel"
        )


def all_sharded(slots: Sequence[Any]) -> None:
    """Check `sharded` for every slot, and the device of the first slot."""
    if slots:
        wide_device(slots[0].param, slots[0].name)
    params = [s.param for s in slots]
    looks = any(map(hasattr, params, repeat("_fsdp_flattened")))
    if looks or any_sharded(params):
        for slot in slots:
            sharded(slot.param, slot.name)


def gradients(slots: SlotList, grads: Grads) -> list[int]:
    """Return the addresses of the gradients, which are by slot.

    Raises:
        TypeError: a gradient is sparse or complex.
    """
    dtypes = set(map(attrgetter("dtype"), [g for g in grads if g is not None]))
    try:
        at = addresses(slots, grads)
    except RuntimeError:  # a sparse tensor has none
        at = None
    if at is not None and not any(dtype.is_complex for dtype in dtypes):
        return at
    for slot, grad in zip(slots, grads, strict=True):
        if grad is None:
            continue
        if grad.layout is not torch.strided:
            raise TypeError(
                f"the gradient of {slot.name} has layout {grad.layout}; gradients must be dense "
                "(nn.Embedding: sparse=False)"
            )
        if grad.is_complex():
            raise TypeError(f"the gradient of {slot.name} is complex; gradients must be real")
    return addresses(slots, grads)


def kept_back(slots: Sequence[Any], grads: Sequence[Tensor | None], phase: str) -> None:
    """Refuse fully_shard's own accumulation, which would add up the gradients of both phases.

    Raises:
        RuntimeError: no sharded parameter has a gradient after the phase.
    """
    if all(g is None for g in grads) and any(is_sharded(s.param) for s in slots):
        raise RuntimeError(
            f"the {phase} phase made no gradient. With set_requires_gradient_sync(False), "
            "fully_shard keeps the gradients of that micro-batch and adds them to the next loss, "
            "whichever phase it belongs to; leave it True (accelerate: "
            "GradientAccumulationPlugin(num_steps=..., sync_each_batch=True))"
        )


def capturing() -> bool:
    return torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()


def capture(nonfinite: str, fisher: str) -> None:
    """Raise RuntimeError in a CUDA graph for what it would replay wrongly or what needs a sync."""
    if capturing() and (nonfinite != "propagate" or fisher == "online"):
        raise RuntimeError(
            'a step inside a CUDA graph needs nonfinite="propagate", because the other policies '
            "wait for the device, and a Fisher that does not count steps: a fixed one, None, or "
            "the online one after warmup_fisher(..., freeze=True); "
            f"got nonfinite={nonfinite!r}, Fisher: {fisher}"
        )


def foreign_gradient(slot: Any, phase: str) -> None:
    """Raise RuntimeError for a gradient from before the first phase; zeros are accepted."""
    grad = slot.param.grad
    if grad.layout is torch.strided and not local(grad).count_nonzero():
        return
    raise RuntimeError(
        f"{slot.name} has a gradient from before {phase}(), which belongs to no phase; call "
        "zero_grad() first, and run every backward pass inside forget() or remember()"
    )


def tensor_map(
    argument: str, mapping: Any, slots: Sequence[Any], nonnegative: bool = False
) -> dict[Any, Tensor]:
    """Return the mapping's tensors by slot key, checked.

    Non-negative tensors are returned in float32 or float64.

    Raises:
        TypeError: `mapping` is not a mapping, or a value is not a tensor.
        ValueError: a tensor is missing, has another shape, or has values that are not allowed.
    """
    if not isinstance(mapping, Mapping):
        raise TypeError(
            f"{argument} must be a mapping from parameter or name to tensor; got {type(mapping)!r}"
        )
    named = any(isinstance(k, str) for k in mapping)
    if named and any("param_names" not in s.group for s in slots):
        raise ValueError(
            f"{argument} has names as keys, but the base optimizer does not know its parameters' "
            "names; build it with model.named_parameters() (torch >= 2.6), or use parameters as "
            "keys: {p: tensors[name] for name, p in model.named_parameters()}"
        )
    found = {}
    missing = []
    for slot in slots:
        k = slot.name if named else slot.param
        if k not in mapping:
            if slot.param.requires_grad:
                missing.append(slot.name)
            continue
        value = mapping[k]
        if not isinstance(value, Tensor):
            raise TypeError(f"{argument}[{slot.name}] must be a tensor; got {value!r}")
        if value.shape != slot.param.shape:
            raise ValueError(
                f"{argument}[{slot.name}] has shape {tuple(value.shape)} but the parameter has "
                f"{tuple(slot.param.shape)}: the tensor was made for another model"
            )
        value = spread(value.detach().to(slot.param.device), slot.param)
        if not local(value).isfinite().all():
            raise ValueError(f"{argument}[{slot.name}] holds NaN or Inf; make it again")
        if nonnegative:
            if (local(value) < 0).any():
                raise ValueError(
                    f"{argument}[{slot.name}] holds negative values; a diagonal of squared "
                    "gradients is >= 0 (clamp an estimate by cross products: .clamp(min=0))"
                )
            wide = torch.float64 if slot.param.dtype == torch.float64 else torch.float32
            value = value.to(wide)
        found[slot.key] = value
    if missing:
        shown = ", ".join(missing[:3]) + (f" and {len(missing) - 3} more" if missing[3:] else "")
        raise ValueError(
            f"{argument} has no tensor for {shown}; it has {len(mapping)} entries: "
            f"{', '.join(str(k) for k in list(mapping)[:3] if isinstance(k, str)) or 'no names'}"
        )
    return found
