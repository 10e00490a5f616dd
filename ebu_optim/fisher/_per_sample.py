"""Per-sample gradients in three ways with the same result but different speed and memory.

Each function takes a model, a loss ``loss(model, batch) -> (n,)`` and a batch (a mapping of tensors
with n rows). It yields per-sample gradients by name, shape (m, *parameter) for m samples at a time.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..modules import without_gradients

Batch = Mapping[str, Tensor]
Loss = Callable[[Any, Batch], Tensor]
Grads = Mapping[str, Tensor]


def size(batch: Batch) -> int:
    return len(next(iter(batch.values())))


def _trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def loop(model: nn.Module, loss: Loss, batch: Batch) -> Iterator[Grads]:
    """One backward pass per sample: works for any model, with the least memory."""
    params = _trainable(model)
    for i in range(size(batch)):
        one = {k: v[i : i + 1] for k, v in batch.items()}
        grads = torch.autograd.grad(
            loss(model, one).sum(), list(params.values()), allow_unused=True
        )
        yield {
            name: torch.zeros_like(p)[None] if g is None else g[None]
            for (name, p), g in zip(params.items(), grads, strict=True)
        }


def vmap(model: nn.Module, loss: Loss, batch: Batch) -> Iterator[Grads]:
    """torch.func: any model without data-dependent control flow; memory n times the parameters."""
    params = {name: p.detach() for name, p in _trainable(model).items()}

    class Functional:
        """The model with the parameters that vmap passes; other attributes are the model's."""

        def __init__(self, p: dict[str, Tensor]) -> None:
            self._p = p

        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            return torch.func.functional_call(model, self._p, args, kwargs)

        def __getattr__(self, name: str) -> Any:
            return getattr(model, name)

    def one(p: dict[str, Tensor], item: Batch) -> Tensor:
        return loss(Functional(p), {k: v[None] for k, v in item.items()}).sum()

    yield torch.func.vmap(torch.func.grad(one), in_dims=(None, 0))(params, dict(batch))


def hooks(model: nn.Module, loss: Loss, batch: Batch) -> Iterator[Grads]:
    """One ordinary backward pass; per-sample gradients from inputs and output gradients.

    Supports Linear, Conv2d (groups=1, zero padding), GroupNorm, LayerNorm and Embedding. If a loss
    gives a module several rows per sample, the rows of one sample must be adjacent
    (``repeat_interleave``).

    Raises:
        TypeError: a trainable parameter belongs to another kind of module.
    """
    n = size(batch)
    params = _trainable(model)
    calls: list[tuple[nn.Module, Tensor, Any]] = []

    def forward(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        if output.requires_grad:
            edge = torch.autograd.graph.get_gradient_edge(output)
            calls.append((module, args[0].detach(), edge))

    with ExitStack() as handles:
        for module in model.modules():
            if any(p.requires_grad for p in module.parameters(recurse=False)):
                if not _known(module):
                    raise TypeError(
                        f'method="hooks" does not support {module}; use "vmap" or "loop"'
                    )
                handles.callback(module.register_forward_hook(forward).remove)
        total = loss(model, batch).sum()
    # only the gradients of the outputs are computed, not those of the parameters
    edges = [edge for _, _, edge in calls]
    grads = torch.autograd.grad(total, edges, allow_unused=True) if edges else ()
    parts: dict[int, list[Callable[[], Tensor]]] = {id(p): [] for p in params.values()}
    for (module, x, _), g in zip(calls, grads, strict=True):
        if g is not None:
            for p, grad in _of_module(module, x, g, n):
                parts.get(id(p), []).append(grad)
    yield _OnDemand(params, parts, n)


class _OnDemand(Grads):
    """Per-sample gradients, each computed when it is read.

    So a gradient that is used at once stays in the cache, and the n-fold parameters are never
    held all together.
    """

    def __init__(
        self, params: dict[str, nn.Parameter], parts: dict[int, list[Callable[[], Tensor]]], n: int
    ) -> None:
        self._params, self._parts, self._n = params, parts, n

    def __getitem__(self, name: str) -> Tensor:
        p = self._params[name]
        if not (parts := self._parts[id(p)]):
            return torch.zeros((), dtype=p.dtype, device=p.device).expand(self._n, *p.shape)
        grad = parts[0]()
        for part in parts[1:]:  # the module was called several times
            grad = grad + part()
        return grad.reshape(self._n, *p.shape)

    def __iter__(self) -> Iterator[str]:
        return iter(self._params)

    def __len__(self) -> int:
        return len(self._params)


def _of_module(
    module: nn.Module, x: Tensor, g: Tensor, n: int
) -> list[tuple[Tensor | None, Callable[[], Tensor]]]:
    """Return one module's parameters with functions that compute their per-sample gradients.

    Args:
        x: the module's input.
        g: the gradient of its output.
    """
    if x.is_floating_point():
        x = x.to(g.dtype)  # they differ under autocast
    if isinstance(module, nn.Linear):
        rows, out = x.reshape(n, -1, x.shape[-1]), g.reshape(n, -1, g.shape[-1])
        return [
            (module.weight, lambda: torch.bmm(out.transpose(1, 2), rows)),
            (module.bias, lambda: out.sum(1)),
        ]
    if isinstance(module, nn.Conv2d):
        return [
            (module.weight, lambda: _conv_weight(module, x, g, n)),
            (module.bias, lambda: _channels(g, n)),
        ]
    if isinstance(module, nn.GroupNorm):
        groups, eps = module.num_groups, module.eps
        return [
            (module.weight, lambda: _channels(g * F.group_norm(x, groups, eps=eps), n)),
            (module.bias, lambda: _channels(g, n)),
        ]
    if isinstance(module, nn.LayerNorm):
        normal, eps = module.normalized_shape, module.eps
        shape = (n, -1, *normal)
        return [
            (module.weight, lambda: (g * F.layer_norm(x, normal, eps=eps)).reshape(shape).sum(1)),
            (module.bias, lambda: g.reshape(shape).sum(1)),
        ]
    assert isinstance(module, nn.Embedding)
    index, out = x.reshape(n, -1), g.reshape(n, -1, g.shape[-1])
    where = index.unsqueeze(-1).expand_as(out)
    zeros = (n, *module.weight.shape)
    return [(module.weight, lambda: out.new_zeros(zeros).scatter_add_(1, where, out))]


def _known(module: nn.Module) -> bool:
    # a subclass that overrides forward may use its weight in another way
    for kind in (nn.Linear, nn.Conv2d, nn.GroupNorm, nn.LayerNorm, nn.Embedding):
        if isinstance(module, kind) and type(module).forward is kind.forward:
            if isinstance(module, nn.Conv2d):
                zeros = module.padding_mode == "zeros" and not isinstance(module.padding, str)
                return module.groups == 1 and zeros
            return not isinstance(module, nn.Embedding) or module.padding_idx is None
    return False


def differ(a: Grads, b: Grads) -> float:
    """Return the relative difference of two sets of per-sample gradients, by their global norm."""
    wrong = sum(float((a[n].float() - b[n].float()).square().sum()) for n in b)
    size_b = sum(float(b[n].float().square().sum()) for n in b)
    return (wrong / size_b) ** 0.5 if size_b else float(wrong > 0)


def _conv_weight(module: nn.Conv2d, x: Tensor, g: Tensor, n: int) -> Tensor:
    """Return (n, out, in * kh * kw); the rows of one sample (its timesteps) are more positions."""
    top, left = module.padding  # type: ignore[str-unpack]  # `_known` lets no string pass
    (down, right), (dy, dx) = module.stride, module.dilation
    x = F.pad(x, (left, left, top, top))  # type: ignore[arg-type]
    sample, channel, line, column = x.stride()
    out, *kernel = module.weight.shape
    rows = len(x) // n
    # equals F.unfold but is faster: each entry of the kernel sees the image from another place
    seen = x.as_strided(
        (n, *kernel, rows, *g.shape[2:]),
        (rows * sample, channel, dy * line, dx * column, sample, down * line, right * column),
    ).reshape(n, math.prod(kernel), -1)
    g = g.reshape(n, rows, out, -1).transpose(1, 2).reshape(n, out, -1)
    return torch.bmm(g, seen.transpose(1, 2))


def _channels(t: Tensor, n: int) -> Tensor:
    """Map (rows, C, ...) to (n, C): the sum over a sample's rows and all positions."""
    return t.reshape(n, len(t) // n, t.shape[1], -1).sum((1, 3))


METHODS = {"hooks": hooks, "vmap": vmap, "loop": loop}


def choose(model: nn.Module, loss: Loss, batch: Any, method: str = "auto") -> str:
    """Return `method` if it agrees with "loop" on the first batch; for "auto" the fastest one.

    Raises:
        ValueError: the loss is not one value per sample, or `method` is wrong for this model.
    """
    one = batch[0] if isinstance(batch, (tuple, list)) else batch
    with without_gradients():
        shape = tuple(loss(model, one).shape)
    if shape != (size(one),):
        raise ValueError(
            f"loss must return one value per sample, shape ({size(one)},); got {shape}"
        )
    if method == "loop":  # the others are compared with it
        return method
    ends = {k: v[[0, -1]] for k, v in one.items()}
    truth = list(METHODS["loop"](model, loss, ends))
    expected = {n: torch.cat([g[n] for g in truth]) for n in truth[0]}
    times: dict[str, float] = {}
    reasons = {}
    for name in METHODS if method == "auto" else [method]:
        try:
            for _ in range(2 if method == "auto" else 1):  # the first call warms up
                start = time.perf_counter()
                grads = [dict(g) for g in METHODS[name](model, loss, one)]
                float(next(iter(grads[-1].values())).sum())  # wait for an accelerator
                seconds = time.perf_counter() - start
            got = {n: torch.stack([grads[0][n][0], grads[-1][n][-1]]) for n in expected}
            coarse = max(torch.finfo(g.dtype).eps for g in expected.values())
            if (error := differ(got, expected)) > 3 * coarse**0.5:  # 1e-3 in float32
                raise ValueError(
                    f'method="{name}" differs from "loop" by {error:.0e} on this model and loss: a '
                    "parameter is used outside its module, or the rows of a sample are not "
                    'adjacent; use "loop"'
                )
            times[name] = seconds
        except Exception as error:  # hooks and vmap do not support every model
            if method != "auto" or name == "loop":
                raise
            reasons[name] = error
    return min(times, key=times.__getitem__)
