"""A Fisher estimate in progress: the running mean, the samples seen, and the spread."""

from __future__ import annotations

import math
import signal
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..files import load_tensors, not_finite, save_tensors
from ..modules import plain_name
from ._per_sample import METHODS, Batch, Loss, size

_PROBES = 4096


def same_run(
    path: Path,
    found: Mapping[str, Any],
    identity: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    params: Mapping[str, Tensor],
) -> None:
    shapes = {n: tuple(p.shape) for n, p in params.items()}
    if {n: tuple(t.shape) for n, t in tensors.items()} != shapes:
        raise ValueError(f"{path} holds the Fisher of another model: names or shapes differ")
    for key, value in identity.items():
        if found.get(key) != value:
            raise ValueError(
                f"{path} was made with another {key} ({found.get(key)!r}, this call has "
                f"{value!r}); give another path, or delete the file to start again"
            )


@contextmanager
def _undisturbed() -> Iterator[None]:
    """Delay Ctrl-C until the block ends, because a mean that is half updated is useless."""
    handler = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or not callable(handler):
        yield
        return
    held: list[Any] = []
    signal.signal(signal.SIGINT, lambda *args: held.append(args))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler)
        if held:
            handler(*held[0])


class Run:
    """An estimate in progress: the running mean, the samples seen, and the spread."""

    def __init__(self, mean: dict[str, Tensor], method: str, identity: dict[str, Any]) -> None:
        self.mean, self.method, self.identity = mean, method, identity
        self.samples = 0
        self.next = 0
        self.whole = True
        # sums and sums of squares over batches, weighted by their samples; entry 0 is the trace,
        # the others are single entries of F
        self.spread = torch.zeros(2, 1 + _PROBES, dtype=torch.float64)
        generator = torch.Generator().manual_seed(0)
        self.sizes = [m.numel() for m in mean.values()]
        self.probes = torch.randint(sum(self.sizes), (_PROBES,), generator=generator).sort().values

    @classmethod
    def begin(cls, params: Mapping[str, Tensor], method: str, identity: dict[str, Any]) -> Run:
        mean = {n: torch.zeros_like(p, dtype=torch.float32) for n, p in params.items()}
        return cls(mean, method, identity)

    def add(self, model: nn.Module, loss: Loss, batch: Batch | Sequence[Batch]) -> None:
        per_sample = METHODS[self.method]
        pair = batch if isinstance(batch, (tuple, list)) else (batch,)
        n = size(pair[0])
        total: dict[str, Tensor] = {}
        for found in zip(*(per_sample(model, loss, b) for b in pair), strict=True):
            grads = [{plain_name(name): g for name, g in one.items()} for one in found]
            for name in self.mean:
                factors = [g[name].float() for g in grads]
                product = (factors[0] * factors[-1]).sum(0)
                total[name] = total[name] + product if name in total else product
        # one vector, because a model has hundreds of tensors and each call takes time
        device = next(iter(total.values())).device
        batch_mean = torch.cat([t.flatten().to(device) for t in total.values()]) / n
        trace = batch_mean.sum(dtype=torch.float64).reshape(1)
        if not trace.isfinite():
            raise ValueError(self._bad(total, n))
        with _undisturbed():
            self.whole = False  # until the end of this update
            pieces = batch_mean.split(self.sizes)
            for mean, piece in zip(self.mean.values(), pieces, strict=True):
                mean.lerp_(piece.view(mean.shape).to(mean.device), n / (self.samples + n))
            row = torch.cat([trace, batch_mean[self.probes.to(device)].double()]).cpu()
            self.spread += n * torch.stack([row, row.square()])
            self.samples += n
            self.next += 1
            self.whole = True

    def _bad(self, total: Mapping[str, Tensor], n: int) -> str:
        return (
            f"the Fisher of batch {self.next} (samples {self.samples} to {self.samples + n - 1}): "
            f"{not_finite(total)}; the batches before it are kept. Check these samples, the "
            "model's weights, and whether its precision is too small for them"
        )

    def finish(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        mean, square = self.spread / self.samples
        if not any(bool(t.count_nonzero()) for t in self.mean.values()):
            raise ValueError(
                "every gradient is 0: the loss does not depend on the model; compute it with the "
                "model that is passed to it"
            )
        variance = (square - mean.square()).clamp(min=0) / max(self.next - 1, 1)
        error = variance.sqrt() / mean.abs().clamp(min=1e-30)
        known = error[1:][mean[1:] != 0]
        enough = self.next > 1
        negative = sum(int((t < 0).sum()) for t in self.mean.values())
        total = sum(t.numel() for t in self.mean.values())
        protocol = {
            **self.identity,
            "method": self.method,
            "samples": self.samples,
            "trace": float(mean[0]),
            "negative_share": negative / total,
            "convergence": {
                "trace_relative_error": float(error[0]) if enough else math.nan,
                "entry_relative_error": float(known.median())
                if enough and len(known)
                else math.nan,
            },
        }
        return {n: t.clamp(min=0) for n, t in self.mean.items()}, protocol

    def save(self, path: Path) -> None:
        meta = {
            "kind": "ebu_optim partial fisher",
            "identity": self.identity,
            "method": self.method,
            "samples": self.samples,
            "next": self.next,
        }
        save_tensors(path, {**self.mean, "//spread": self.spread}, meta)

    @classmethod
    def load(cls, path: Path, identity: dict[str, Any], params: Mapping[str, Tensor]) -> Run:
        tensors, meta = load_tensors(path)
        spread = tensors.pop("//spread")
        same_run(path, meta["identity"], identity, tensors, params)
        mean = {n: tensors[n].to(p.device) for n, p in params.items()}
        run = cls(mean, meta["method"], identity)
        run.spread, run.samples, run.next = spread, meta["samples"], meta["next"]
        return run
