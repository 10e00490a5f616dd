"""A tiny GPT-2 that forgets by transformers' Trainer; `distributed.trainer` is a rank of two."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments

from ebu_optim import EBUOptimizer
from ebu_optim.integrations.transformers import TwoPhases
from ebu_optim.language import answer_nll, npo_loss

from .scripts import reset_accelerate

WORDS, LENGTH = 20, 8


class ForgettingTrainer(TwoPhases, Trainer):
    pass


def tiny() -> GPT2LMHeadModel:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        sizes = {"vocab_size": WORDS, "n_positions": LENGTH, "n_embd": 16, "n_layer": 1}
        none = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
        return GPT2LMHeadModel(GPT2Config(**sizes, **none, n_head=2, initializer_range=0.3))


def texts(count: int, seed: int) -> list[dict[str, Tensor]]:
    """Answers of one to five tokens."""
    g = torch.Generator().manual_seed(seed)
    found = []
    for i in range(count):
        ids = torch.randint(1, WORDS, (LENGTH,), generator=g)
        labels = ids.clone()
        labels[: LENGTH - 1 - i % 5] = -100
        found.append({"input_ids": ids, "labels": labels})
    return found


#: Adam's first steps are signs: where a gradient is 0 but for rounding, they are of the rounding.
SGD = {"optim": "sgd", "learning_rate": 0.1}
FORGET, REMEMBER = texts(8, 1), texts(12, 2)


def npo(model: Any, inputs: dict[str, Tensor]) -> Tensor:
    reference = torch.full((len(inputs["labels"]),), 4.0)
    return npo_loss(model(inputs["input_ids"]).logits, inputs["labels"], reference)


def both_nll(model: Any, inputs: dict[str, Tensor]) -> Tensor:
    nll, lengths = answer_nll(model(inputs["input_ids"]).logits, inputs["labels"])
    return (nll / lengths).mean()


def make(folder: Path, *, forget_loss: Any = npo, **given: Any) -> ForgettingTrainer:
    """Three steps an epoch of four of each kind, as far as `given` says nothing else."""
    reset_accelerate()
    names = (
        "model",
        "train_dataset",
        "remember_dataset",
        "optimizers",
        "wrap",
        "compute_loss_func",
    )
    of_trainer = {name: given.pop(name) for name in names if name in given}
    args = {
        "per_device_train_batch_size": 4,
        "num_train_epochs": 2,
        "learning_rate": 0.01,
        "optim": "adamw_torch",
        "max_grad_norm": 0.5,
        "use_cpu": True,
        "report_to": "none",
        "disable_tqdm": True,
        "save_strategy": "no",
        "logging_steps": 1,
        **given,
    }
    of_trainer = {
        "model": tiny(),
        "train_dataset": FORGET,
        "remember_dataset": REMEMBER,
        "wrap": partial(EBUOptimizer, gamma=3.0),
        **of_trainer,
    }
    return ForgettingTrainer(
        args=TrainingArguments(output_dir=str(folder), **args),
        forget_loss=forget_loss,
        **of_trainer,
    )


def trained(trainer: ForgettingTrainer, **options: Any) -> dict[str, Any]:
    trainer.train(**options)
    optimizer = trainer._phased()
    return {
        "weights": [p.detach().clone() for p in trainer.model.parameters()],
        "state": optimizer.state_dict(),
        "stats": optimizer.stats,
    }


def joined(folder: Path, ranks: int) -> dict[str, Any]:
    """The runs that two processes are compared by."""
    size = {"per_device_train_batch_size": 4 // ranks, **SGD}
    return {
        loss if isinstance(loss, str) else "npo": trained(
            make(folder, forget_loss=loss, **size, **more)
        )["weights"]
        for loss, more in (
            (npo, {}),
            ("labels", {"gradient_accumulation_steps": 2, "ddp_find_unused_parameters": False}),
        )
    }
