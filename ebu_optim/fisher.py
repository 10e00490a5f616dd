r"""DiagonalFisher: the mean over samples of squared per-sample gradients at theta0.

:math:`F_i = \frac1n \sum_x (\partial \ell(x) / \partial \theta_i)^2`, per sample, never the square
of a batch mean. For a diffusion model :math:`\ell(x)` is the mean over timesteps; with T' sampled
timesteps its square is too large by var / T', the cross product of two halves is not.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ._extras import require
from ._files import load_tensors, save_tensors
from ._per_sample import METHODS, Batch, Loss, size

_PROBES = 4096


class DiagonalFisher(Mapping[str, Tensor]):
    """A mapping from parameter name to F (float32, the parameter's shape), with its protocol.

    Made by :meth:`estimate`, kept by :meth:`save`, read by :meth:`load`; handed to
    ``EBUOptimizer(Adam(model.named_parameters()), fisher=...)``, or, where the optimizer has no
    names, as ``fisher=fisher.for_model(model)``.

    Attributes:
        tensors: the values by name.
        protocol: how it was made, and ``convergence``: the relative standard error of the trace,
            and the median of it over 4096 single entries (nan with less than two batches).
    """

    def __init__(self, tensors: Mapping[str, Tensor], protocol: Mapping[str, Any]) -> None:
        self.tensors = dict(tensors)
        self.protocol = dict(protocol)

    def __getitem__(self, name: str) -> Tensor:
        return self.tensors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.tensors)

    def __len__(self) -> int:
        return len(self.tensors)

    def __repr__(self) -> str:
        n = sum(t.numel() for t in self.tensors.values())
        return f"DiagonalFisher({len(self)} tensors, {n} values, protocol={self.protocol})"

    def for_model(self, model: nn.Module) -> dict[Tensor, Tensor]:
        """The values keyed by the trainable parameters of `model`.

        Raises:
            ValueError: names or shapes are those of another model.
        """
        found: dict[Tensor, Tensor] = {}
        for name, p in model.named_parameters():
            if not p.requires_grad:
                continue
            if name not in self.tensors:
                raise ValueError(
                    f"the Fisher has no entry {name!r} (it has {', '.join(list(self)[:3])}, ...): "
                    "it was made for another model, or with this parameter frozen"
                )
            if self.tensors[name].shape != p.shape:
                raise ValueError(
                    f"the Fisher's {name!r} has shape {tuple(self.tensors[name].shape)}, the "
                    f"model's {tuple(p.shape)}: it was made for another model"
                )
            found[p] = self.tensors[name]
        return found

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a safetensors file: the tensors by name, the protocol in the metadata."""
        save_tensors(path, self.tensors, {"kind": "ebu_optim fisher", **self.protocol})

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> DiagonalFisher:
        """Read what :meth:`save` wrote.

        Raises:
            ValueError: the file is damaged or no Fisher.
        """
        tensors, meta = load_tensors(path)
        if meta.pop("kind", None) != "ebu_optim fisher":
            raise ValueError(f"{path} is a safetensors file, but no Fisher of ebu_optim")
        return cls(tensors, meta)

    @classmethod
    def estimate(
        cls,
        model: nn.Module,
        loss: Loss,
        batches: Sequence[Batch] | Sequence[tuple[Batch, Batch]],
        *,
        method: str = "auto",
        path: str | os.PathLike[str] | None = None,
        save_every: int = 50,
        protocol: Mapping[str, Any] | None = None,
        progress: bool = True,
    ) -> DiagonalFisher:
        """Estimate F over batches of samples; the model is put in eval mode meanwhile.

        Args:
            model: its trainable parameters are covered; their ``.grad`` is not touched.
            loss: ``loss(model, batch) -> (n,)``, one value per sample, deterministic (draws such
                as timesteps and noise belong into the batch); the model may be any callable.
            batches: indexable and the same at every call, so that a run can be resumed. A batch is
                a mapping of tensors with n rows. Where an item is a pair of batches over the same
                samples with independent draws, F is the mean of the product of the two gradients,
                which has no bias from the number of draws (negative values are set to 0 at the
                end; their share is in the protocol).
            method: "hooks", "vmap", "loop", or "auto": the fastest of them on the first batch.
            path: where to save. A finished file of the same protocol is loaded; an interrupted
                call is resumed from ``<path>.partial`` with the same result, bit for bit.
            save_every: batches between two savings of the partial result.
            protocol: whatever identifies the data and the loss; compared on resuming.
            progress: show a tqdm bar.

        Raises:
            ValueError: unknown method; a file of another protocol, model or damaged.
            TypeError: ``method="hooks"`` on a module that it does not know.
        """
        if method not in ("auto", *METHODS):
            raise ValueError(f"method must be auto, hooks, vmap or loop; got {method!r}")
        if not len(batches):
            raise ValueError("batches is empty: give at least one batch of samples")
        shapes = {n: tuple(p.shape) for n, p in model.named_parameters() if p.requires_grad}
        identity = {
            "batches": len(batches),
            "estimator": "cross" if isinstance(batches[0], tuple) else "square",
            **(protocol or {}),
        }
        path = Path(path) if path is not None else None
        if path is not None and path.exists():
            done = cls.load(path)
            _same_run(path, done.protocol, identity, done.tensors, shapes)
            return done
        partial = path.with_name(path.name + ".partial") if path is not None else None
        training = model.training
        model.eval()
        try:
            if partial is not None and partial.exists():
                run = _Run.load(partial, identity, shapes)
            else:
                if method == "auto":
                    method = fastest(model, loss, batches[0])
                run = _Run.begin(model, method, identity)
            steps: Any = range(run.next, len(batches))
            if progress:
                tqdm = require("tqdm.auto", "diffusion").tqdm
                steps = tqdm(steps, desc="Fisher", initial=run.next, total=len(batches))
            try:
                for i in steps:
                    run.add(model, loss, batches[i])
                    if partial is not None and run.next % save_every == 0:
                        run.save(partial)
            except BaseException:
                if partial is not None and run.next:
                    run.save(partial)
                raise
        finally:
            model.train(training)
        result = run.finish()
        if path is not None:
            result.save(path)
            partial.unlink(missing_ok=True)  # type: ignore[union-attr]
        return result


def fastest(model: nn.Module, loss: Loss, batch: Batch | tuple[Batch, Batch]) -> str:
    """Time every method that can do the model on one batch (after a warm-up) and name the best."""
    one = batch[0] if isinstance(batch, tuple) else batch
    times = {}
    for name, per_sample in METHODS.items():
        try:
            for _ in range(2):  # the first call warms up
                start = time.perf_counter()
                for grads in per_sample(model, loss, one):
                    float(next(iter(grads.values())).sum())  # wait for an accelerator
                times[name] = time.perf_counter() - start
        except (TypeError, RuntimeError):  # hooks and vmap cannot do every model
            times.pop(name, None)
    if not times:
        raise RuntimeError("no method can differentiate this loss: see what method='loop' raises")
    return min(times, key=times.__getitem__)


def _same_run(
    path: Path,
    found: Mapping[str, Any],
    identity: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    shapes: Mapping[str, tuple[int, ...]],
) -> None:
    for key, value in identity.items():
        if found.get(key) != value:
            raise ValueError(
                f"{path} was made with another {key} ({found.get(key)!r}, this call has "
                f"{value!r}): give another path, or delete it to start anew"
            )
    if {n: tuple(t.shape) for n, t in tensors.items()} != shapes:
        raise ValueError(f"{path} holds the Fisher of another model: names or shapes differ")


class _Run:
    """An estimate under way: the running mean, what has been seen, and its spread."""

    def __init__(self, mean: dict[str, Tensor], method: str, identity: dict[str, Any]) -> None:
        self.mean, self.method, self.identity = mean, method, identity
        self.samples = 0
        self.next = 0
        # sums and sums of squares over batches: entry 0 the trace, then single entries of F
        self.spread = torch.zeros(2, 1 + _PROBES, dtype=torch.float64)
        generator = torch.Generator().manual_seed(0)
        sizes = torch.tensor([m.numel() for m in mean.values()])
        draw = torch.randint(int(sizes.sum()), (_PROBES,), generator=generator).sort().values
        starts = [0, *sizes.cumsum(0).tolist()]
        cuts = torch.searchsorted(draw, torch.tensor(starts)).tolist()
        self.probes = {name: draw[cuts[i] : cuts[i + 1]] - starts[i] for i, name in enumerate(mean)}

    @classmethod
    def begin(cls, model: nn.Module, method: str, identity: dict[str, Any]) -> _Run:
        mean = {
            n: torch.zeros_like(p, dtype=torch.float32)
            for n, p in model.named_parameters()
            if p.requires_grad
        }
        return cls(mean, method, identity)

    def add(self, model: nn.Module, loss: Loss, batch: Batch | tuple[Batch, Batch]) -> None:
        per_sample = METHODS[self.method]
        pair = batch if isinstance(batch, tuple) else (batch,)
        n = size(pair[0])
        total: dict[str, Tensor] = {}
        for grads in zip(*(per_sample(model, loss, b) for b in pair), strict=True):
            for name in self.mean:
                first, last = grads[0][name].float(), grads[-1][name].float()
                product = (first * last).sum(0)
                total[name] = total[name] + product if name in total else product
        values = []
        for name, mean in self.mean.items():
            batch_mean = total[name] / n
            mean.lerp_(batch_mean, n / (self.samples + n))
            values.append(batch_mean.flatten()[self.probes[name].to(mean.device)].cpu().double())
        trace = sum(float(t.sum(dtype=torch.float64)) for t in total.values()) / n
        row = torch.cat([torch.tensor([trace], dtype=torch.float64), *values])
        self.spread += torch.stack([row, row.square()])
        self.samples += n
        self.next += 1

    def finish(self) -> DiagonalFisher:
        mean, square = self.spread / self.next
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
        return DiagonalFisher({n: t.clamp(min=0) for n, t in self.mean.items()}, protocol)

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
    def load(
        cls, path: Path, identity: dict[str, Any], shapes: Mapping[str, tuple[int, ...]]
    ) -> _Run:
        tensors, meta = load_tensors(path)
        spread = tensors.pop("//spread")
        _same_run(path, meta["identity"], identity, tensors, shapes)
        run = cls({n: tensors[n] for n in shapes}, meta["method"], identity)
        run.spread, run.samples, run.next = spread, meta["samples"], meta["next"]
        return run
