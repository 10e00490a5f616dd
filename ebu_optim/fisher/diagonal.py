r"""DiagonalFisher: the mean over samples of squared per-sample gradients at theta0.

:math:`F_i = \frac1n \sum_x (\partial \ell(x) / \partial \theta_i)^2` is computed per sample, never
as the square of a batch mean. For a diffusion model, :math:`\ell(x)` is the mean over timesteps.
With T' sampled timesteps, its square is too large by var / T'; the cross product of two halves is
unbiased.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ..files import load_tensors, save_tensors
from ..manifest import config_of, key
from ..modules import evaluating, model_hash, plain_name, refuse_hooks
from ._per_sample import METHODS, Batch, Loss, choose
from ._run import Run, same_run


class DiagonalFisher(Mapping[str, Tensor]):
    """A mapping from parameter name to F (float32, the parameter's shape), with its protocol.

    :meth:`estimate` computes it, :meth:`save` and :meth:`load` keep it. Pass it as
    ``EBUOptimizer(Adam(model.named_parameters()), fisher=...)``. If the optimizer has no names,
    pass ``fisher=fisher.for_model(model)``.

    Attributes:
        tensors: the values by name, without the names that torch.compile adds.
        protocol: how it was made, and ``convergence``: the relative standard error of the trace,
            and its median over 4096 single entries (nan with fewer than two batches).
    """

    def __init__(self, tensors: Mapping[str, Tensor], protocol: Mapping[str, Any]) -> None:
        self.tensors = {plain_name(name): t for name, t in tensors.items()}
        self.protocol = dict(protocol)

    def __getitem__(self, name: str) -> Tensor:
        return self.tensors[plain_name(name)]

    def __iter__(self) -> Iterator[str]:
        return iter(self.tensors)

    def __len__(self) -> int:
        return len(self.tensors)

    def __repr__(self) -> str:
        n = sum(t.numel() for t in self.tensors.values())
        return f"DiagonalFisher({len(self)} tensors, {n} values, protocol={self.protocol})"

    def for_model(self, model: nn.Module) -> dict[Tensor, Tensor]:
        """Return the values with the trainable parameters of `model` as keys.

        Raises:
            ValueError: names or shapes belong to another model.
        """
        found: dict[Tensor, Tensor] = {}
        for name, p in model.named_parameters():
            if not p.requires_grad:
                continue
            if name not in self:
                raise ValueError(
                    f"the Fisher has no entry {name!r} (it has {', '.join(list(self)[:3])}, ...): "
                    "it was made for another model, or with this parameter frozen; estimate it "
                    "again"
                )
            if self[name].shape != p.shape:
                raise ValueError(
                    f"the Fisher's {name!r} has shape {tuple(self[name].shape)}, the "
                    f"model's {tuple(p.shape)}: it was made for another model; estimate it again"
                )
            found[p] = self[name]
        return found

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a safetensors file: the tensors by name, the protocol in the metadata.

        Raises:
            ValueError: a tensor holds NaN or Inf. Nothing is written.
        """
        save_tensors(path, self.tensors, {"kind": "ebu_optim fisher", **self.protocol})

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> DiagonalFisher:
        """Read what :meth:`save` wrote.

        Raises:
            ValueError: the file is damaged, holds NaN or Inf, or is not a Fisher.
        """
        tensors, meta = load_tensors(path)
        if meta.pop("kind", None) != "ebu_optim fisher":
            raise ValueError(f"{path} is a safetensors file, but not a Fisher of ebu_optim")
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
        """Estimate F over batches of samples. The model is in eval mode meanwhile.

        Args:
            model: F covers its trainable parameters; their ``.grad`` is not changed.
            loss: ``loss(model, batch) -> (n,)``, one value per sample, deterministic: random draws
                such as timesteps and noise belong in the batch. The model may be any callable.
            batches: an indexable that is the same at every call, so that a run can be resumed. Its
                ``protocol`` and that of `loss`, mappings, are saved if they exist. A batch is
                a mapping of tensors with n rows. If an item is a pair of batches over the same
                samples with independent draws, F is the mean of the product of the two gradients,
                which has no bias from the number of draws (negative values are set to 0 at the
                end; their share is in the protocol).
            method: "hooks", "vmap", "loop", or "auto" for the fastest of them on the first batch.
                The results of "hooks" and "vmap" on its first and last sample are compared with
                "loop".
            path: where to save F. A finished file with the same protocol is loaded. An interrupted
                call is resumed from ``<path>.partial`` with the same result, bit for bit.
            save_every: number of batches between two saves of the partial result.
            protocol: whatever else identifies the data and the loss (JSON); compared on resuming.
            progress: show a tqdm bar, if tqdm is installed.

        Raises:
            ValueError: the method is unknown or differs from "loop" on this model; the model uses
                diffusers' group offloading; a file is damaged or belongs to another protocol or
                model; the loss is not one value per sample or does not depend on the model; a
                gradient is NaN or Inf (the message names the batch).
            TypeError: ``method="hooks"`` with a module that it does not support.
        """
        if method not in ("auto", *METHODS):
            raise ValueError(f"method must be auto, hooks, vmap or loop; got {method!r}")
        if not len(batches):
            raise ValueError("batches is empty; give at least one batch of samples")
        if save_every < 1:
            raise ValueError(f"save_every must be >= 1; got {save_every}")
        params = {plain_name(n): p for n, p in model.named_parameters() if p.requires_grad}
        if not params:
            raise ValueError("the model has no trainable parameter; call requires_grad_(True)")
        refuse_hooks(model, "model", ["group_offloading"])
        identity = _identity(model, loss, batches, protocol)
        path = Path(path) if path is not None else None
        partial = path.with_name(path.name + ".partial") if path is not None else None
        if path is not None and partial is not None and path.exists():
            done = cls.load(path)
            same_run(path, done.protocol, identity, done.tensors, params)
            partial.unlink(missing_ok=True)
            return done
        with evaluating(model):
            run = _resumed(partial, identity, params, method)
            if run is None:
                run = Run.begin(params, choose(model, loss, batches[0], method), identity)
            _go_on(run, model, loss, batches, partial, save_every, progress)
        result = cls(*run.finish())
        if path is not None and partial is not None:
            try:
                result.save(path)
            except BaseException:  # an interrupt; if the disk is full, the next line fails too
                run.save(partial)
                raise
            partial.unlink(missing_ok=True)
        return result


def _resumed(
    partial: Path | None, identity: dict[str, Any], params: Mapping[str, Tensor], method: str
) -> Run | None:
    """Return the interrupted run of the same protocol, or None."""
    if partial is None or not partial.exists():
        return None
    run = Run.load(partial, identity, params)
    if method not in ("auto", run.method):
        raise ValueError(
            f'{partial} was begun with method="{run.method}", this call has "{method}"; give '
            'method="auto" to continue, or delete it'
        )
    return run


def _go_on(
    run: Run,
    model: nn.Module,
    loss: Loss,
    batches: Any,
    partial: Path | None,
    save_every: int,
    progress: bool,
) -> None:
    """Add the missing batches; save the partial result on an interrupt."""
    try:
        for i in _bar(range(run.next, len(batches)), run.next, len(batches), progress):
            run.add(model, loss, batches[i])
            if partial is not None and run.next % save_every == 0:
                run.save(partial)
    except BaseException:
        # if an update was interrupted, the last saved part stays
        if partial is not None and run.next and run.whole:
            run.save(partial)
        raise


def _bar(steps: Iterable[int], begin: int, total: int, progress: bool) -> Iterable[int]:
    """Add a tqdm bar if tqdm is installed; the bare install does not have it."""
    if not progress or find_spec("tqdm") is None:
        return steps
    return import_module("tqdm.auto").tqdm(steps, desc="Fisher", initial=begin, total=total)


def _identity(
    model: nn.Module, loss: Any, batches: Any, protocol: Mapping[str, Any] | None
) -> dict[str, Any]:
    found = {
        "batches": len(batches),
        "estimator": "cross" if isinstance(batches[0], (tuple, list)) else "square",
        "model": model_hash(model),
        "config": key(config_of(model)),
        **(getattr(batches, "protocol", None) or {}),
        **(getattr(loss, "protocol", None) or {}),
        **(protocol or {}),
    }
    taken = {"method", "samples", "trace", "negative_share", "convergence", "kind"} & found.keys()
    if taken:
        raise ValueError(f"protocol must not hold {sorted(taken)}; the result sets these itself")
    try:
        return json.loads(json.dumps(found))
    except (TypeError, ValueError) as error:
        raise ValueError(f"protocol must be JSON: {error}") from error
