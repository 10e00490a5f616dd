r"""DiagonalFisher: the mean over samples of squared per-sample gradients at theta0.

:math:`F_i = \frac1n \sum_x (\partial \ell(x) / \partial \theta_i)^2`, per sample, never the square
of a batch mean. For a diffusion model :math:`\ell(x)` is the mean over timesteps; with T' sampled
timesteps its square is too large by var / T', the cross product of two halves is not.
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

    Made by :meth:`estimate`, kept by :meth:`save`, read by :meth:`load`; handed to
    ``EBUOptimizer(Adam(model.named_parameters()), fisher=...)``, or, where the optimizer has no
    names, as ``fisher=fisher.for_model(model)``.

    Attributes:
        tensors: the values by name, as without torch.compile.
        protocol: how it was made, and ``convergence``: the relative standard error of the trace,
            and the median of it over 4096 single entries (nan with less than two batches).
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
        """The values keyed by the trainable parameters of `model`.

        Raises:
            ValueError: names or shapes are those of another model.
        """
        found: dict[Tensor, Tensor] = {}
        for name, p in model.named_parameters():
            if not p.requires_grad:
                continue
            if name not in self:
                raise ValueError(
                    f"the Fisher has no entry {name!r} (it has {', '.join(list(self)[:3])}, ...): "
                    "it was made for another model, or with this parameter frozen"
                )
            if self[name].shape != p.shape:
                raise ValueError(
                    f"the Fisher's {name!r} has shape {tuple(self[name].shape)}, the "
                    f"model's {tuple(p.shape)}: it was made for another model"
                )
            found[p] = self[name]
        return found

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a safetensors file: the tensors by name, the protocol in the metadata.

        Raises:
            ValueError: NaN or Inf in it; nothing is written.
        """
        save_tensors(path, self.tensors, {"kind": "ebu_optim fisher", **self.protocol})

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> DiagonalFisher:
        """Read what :meth:`save` wrote.

        Raises:
            ValueError: the file is damaged, holds NaN or Inf, or is no Fisher.
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
            batches: indexable and the same at every call, so that a run can be resumed; their
                ``protocol`` and that of `loss`, mappings, are kept where they have one. A batch is
                a mapping of tensors with n rows. Where an item is a pair of batches over the same
                samples with independent draws, F is the mean of the product of the two gradients,
                which has no bias from the number of draws (negative values are set to 0 at the
                end; their share is in the protocol).
            method: "hooks", "vmap", "loop", or "auto": the fastest of them on the first batch. What
                "hooks" and "vmap" say of its first and last sample is compared with "loop".
            path: where to save. A finished file of the same protocol is loaded; an interrupted
                call is resumed from ``<path>.partial`` with the same result, bit for bit.
            save_every: batches between two savings of the partial result.
            protocol: whatever else identifies the data and the loss (JSON); compared on resuming.
            progress: show a tqdm bar, where tqdm is installed.

        Raises:
            ValueError: unknown method; a model under diffusers' group offloading; a file of another
                protocol, model or damaged; a loss that is not one value per sample or does not
                depend on the model; a `method` that differs from "loop" on this model; NaN or
                Inf, with the batch it is from.
            TypeError: ``method="hooks"`` on a module that it does not know.
        """
        if method not in ("auto", *METHODS):
            raise ValueError(f"method must be auto, hooks, vmap or loop; got {method!r}")
        if not len(batches):
            raise ValueError("batches is empty: give at least one batch of samples")
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
            except BaseException:  # an interrupt: where the disk is full this fails as well
                run.save(partial)
                raise
            partial.unlink(missing_ok=True)
        return result


def _resumed(
    partial: Path | None, identity: dict[str, Any], params: Mapping[str, Tensor], method: str
) -> Run | None:
    """The interrupted run of the same protocol, None where there is none."""
    if partial is None or not partial.exists():
        return None
    run = Run.load(partial, identity, params)
    if method not in ("auto", run.method):
        raise ValueError(
            f'{partial} was begun with method="{run.method}", this call has "{method}": give '
            'method="auto" to go on, or delete it'
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
    """Add the batches that are missing; what an interrupt leaves is saved."""
    try:
        for i in _bar(range(run.next, len(batches)), run.next, len(batches), progress):
            run.add(model, loss, batches[i])
            if partial is not None and run.next % save_every == 0:
                run.save(partial)
    except BaseException:
        # in the middle of an update the last saved part stands
        if partial is not None and run.next and run.whole:
            run.save(partial)
        raise


def _bar(steps: Iterable[int], begin: int, total: int, progress: bool) -> Iterable[int]:
    """With a tqdm bar where there is tqdm: the bare install has none."""
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
        raise ValueError(f"protocol must not hold {sorted(taken)}, which the result has itself")
    try:
        return json.loads(json.dumps(found))
    except (TypeError, ValueError) as error:
        raise ValueError(f"protocol must be JSON: {error}") from error
