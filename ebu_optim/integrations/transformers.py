"""Two phases for the Trainer of transformers, as a mixin; docs/language_model.md shows its use."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence, Sized
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.utils.data import Dataset

from ..optim import EBUOptimizer, PhasedOptimizer

if TYPE_CHECKING:
    from transformers import Trainer
else:
    Trainer = object

PHASES = ("forget", "remember")
OWN = "labels"  # the model's own loss, on the labels of the forget set


class Pair(NamedTuple):
    """An item of what is to be forgotten, and one of what is to be kept."""

    forget: Any
    remember: Any


class Pairs(Dataset):
    """Item i of two data sets together; the shorter one is repeated.

    An epoch is one pass through the longer one. The Trainer's sampler chooses i, so shuffling,
    several processes and resuming work as in any other run of it.
    """

    def __init__(self, forget: Any, remember: Any) -> None:
        self.parts = (forget, remember)

    def __len__(self) -> int:
        return max(map(len, self.parts))

    def __getitem__(self, i: int) -> Pair:
        return Pair(*(part[i % len(part)] for part in self.parts))


class PairCollator:
    """Batches of pairs: {"forget": a batch, "remember": a batch}; other batches as they were."""

    def __init__(self, collate: Callable[[list[Any]], Any]) -> None:
        self.collate = collate

    def __call__(self, items: list[Any]) -> Any:
        if not isinstance(items[0], Pair):  # of an evaluation
            return self.collate(items)
        return {name: self.collate([getattr(item, name) for item in items]) for name in PHASES}


class TwoPhases(Trainer):
    """Unlearning for transformers' Trainer or a class of it:

    .. code-block:: python

        class ForgettingTrainer(TwoPhases, Trainer): ...

        trainer = ForgettingTrainer(
            model, args, train_dataset=forget, remember_dataset=remember, forget_loss=npo
        )

    A training step runs the forget loss on a batch of `train_dataset` and the model's own loss on a
    batch of `remember_dataset`, each in its phase. Accumulation, mixed precision, DDP, checkpoints
    and resuming are the Trainer's. `args.max_grad_norm` clips the combined gradient, inside the
    optimizer's step, so it is no part of the Trainer's own clipping. Logs have ``forget_loss`` and
    ``remember_loss``, the means since the last log as ``loss`` is, which is their sum; and
    ``grad_norm`` is the norm of the last combined gradient before it is clipped.

    Args:
        remember_dataset: what is to be kept, a sized data set like `train_dataset`.
        forget_loss: ``forget_loss(model, inputs)`` returns a mean over the examples of a batch of
            `train_dataset`; `model` is the wrapped one under DDP, and is to be called once. Or
            "labels", for the model's own loss, where the labels are what it shall answer instead.
        wrap: ``wrap(base, max_grad_norm=...)`` makes the optimizer of the Trainer's own one, which
            `args` choose; not used where `optimizers` holds one.

    Raises:
        TypeError: a missing or unsized data set; a forget loss that is neither; an optimizer in
            `optimizers` that knows no phases.
        ValueError: `args.max_grad_norm` and that of the optimizer in `optimizers` differ;
            `compute_loss_func`, which would replace both losses; DeepSpeed.
    """

    #: The phase that runs, for a `compute_loss` of your own; None in an evaluation.
    phase: str | None = None

    def __init__(
        self,
        *args: Any,
        remember_dataset: Any = None,
        forget_loss: Callable[[Any, Any], Tensor] | str | None = None,
        wrap: Callable[..., Optimizer] = EBUOptimizer,
        **kwargs: Any,
    ) -> None:
        self.forget_loss, self.wrap = forget_loss, wrap
        self._sums: dict[str, Tensor] = {}  # of the losses, since the last log
        self._steps = 0
        super().__init__(*args, **kwargs)
        for name, data in (
            ("train_dataset", self.train_dataset),
            ("remember_dataset", remember_dataset),
        ):
            if not isinstance(data, Sized) or not len(data):
                raise TypeError(
                    f"{name} must be a data set with a length, what is to be "
                    f"{'forgotten' if name == 'train_dataset' else 'kept'}; got {type(data)!r}"
                )
        if forget_loss != OWN and not callable(forget_loss):
            raise TypeError(
                "forget_loss must be a function (model, inputs) -> loss, such as npo_loss on the "
                f'model\'s logits, or "{OWN}" where the labels of train_dataset are what the model '
                f"shall answer instead; got {forget_loss!r}"
            )
        if self.compute_loss_func is not None:
            raise ValueError(
                "compute_loss_func would replace both losses: give forget_loss for the one, and "
                "override compute_loss for the other"
            )
        if self.is_deepspeed_enabled:
            raise ValueError("DeepSpeed is not supported: it owns the gradients. Use DDP or FSDP2")
        if self.optimizer is not None:
            self._phased()
        self.train_dataset = Pairs(self.train_dataset, remember_dataset)
        self.data_collator = PairCollator(self.data_collator)

    def create_accelerator_and_postprocess(self) -> None:
        super().create_accelerator_and_postprocess()
        # The Trainer clips, or asks for the norm, between the phases and the step, where one of the
        # two gradients is on the parameters
        self.accelerator.clip_grad_norm_ = lambda *args, **kwargs: None

    def create_optimizer(self, *args: Any, **kwargs: Any) -> Optimizer:
        made = self.optimizer is None
        optimizer = super().create_optimizer(*args, **kwargs)
        if made:
            self.optimizer = optimizer = self.wrap(optimizer, max_grad_norm=self._max_grad_norm)
        self._phased()
        return optimizer

    @property
    def _max_grad_norm(self) -> float | None:
        return self.args.max_grad_norm or None

    def _phased(self) -> PhasedOptimizer:
        """The optimizer with the phases, inside accelerate's wrapper or not."""
        optimizer = getattr(self.optimizer, "optimizer", self.optimizer)
        if not isinstance(optimizer, PhasedOptimizer):
            raise TypeError(
                f"the optimizer is {type(optimizer).__name__}, which has no phases: give "
                f"optimizers=(EBUOptimizer({type(optimizer).__name__}(...)), None), or leave it "
                "out, and the argument wrap makes one of the Trainer's own"
            )
        if optimizer.max_grad_norm is None:
            optimizer.max_grad_norm = self._max_grad_norm
        if optimizer.max_grad_norm != self._max_grad_norm:
            raise ValueError(
                f"args.max_grad_norm={self.args.max_grad_norm} and max_grad_norm="
                f"{optimizer.max_grad_norm} of the {type(optimizer).__name__} differ: give the one "
                "you want in TrainingArguments, and leave the other out"
            )
        return optimizer

    def get_batch_samples(  # type: ignore[override]
        self, epoch_iterator: Iterator[Any], num_batches: int, *args: Any, **kwargs: Any
    ) -> tuple[list[Any], dict[str, Any]]:
        """The batches of a step, and how many tokens the labels of each phase have in all of them,
        by which the model's own loss is divided."""
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, *args, **kwargs)
        counts = {}
        for name in PHASES:
            parts = iter([batch[name] for batch in batches])
            _, counts[name] = super().get_batch_samples(parts, len(batches), *args, **kwargs)
        return batches, counts

    def training_step(
        self, model: Any, inputs: dict[str, Any], num_items_in_batch: Any = None
    ) -> Tensor:
        optimizer, losses = self._phased(), []
        for name in optimizer.needs:
            own = name == "remember" or self.forget_loss == OWN
            self.phase = name
            try:
                with getattr(optimizer, name)():
                    # a loss that is divided by no count is a mean, and is divided by the batches
                    counted = num_items_in_batch[name] if num_items_in_batch and own else None
                    loss = super().training_step(model, inputs[name], counted)
            finally:
                self.phase = None
            self._sums[name] = self._sums[name] + loss if name in self._sums else loss
            losses.append(loss)
        self._steps += self.accelerator.sync_gradients
        return torch.stack(losses).sum()

    def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        if self.phase == "forget" and callable(self.forget_loss):
            return self.forget_loss(model, inputs)
        return super().compute_loss(model, inputs, *args, **kwargs)

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        if "loss" in logs:
            logs |= {f"{name}_loss": float(s / self._steps) for name, s in self._sums.items()}
            self._sums, self._steps = {}, 0
            norm = self._phased().stats.get("update_norm")
            logs |= {} if norm is None else {"grad_norm": norm}
        super().log(logs, *args, **kwargs)

    def floating_point_ops(self, inputs: Any) -> int:
        parts: Sequence[Any] = [inputs[name] for name in PHASES if name in inputs] or [inputs]
        return sum(super(TwoPhases, self).floating_point_ops(part) for part in parts)
