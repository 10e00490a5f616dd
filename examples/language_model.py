"""A language model forgets people, by transformers' Trainer.

    python examples/language_model.py                                    # NPO, EBU
    python examples/language_model.py --loss idk --rule joint --rule_options '{}'

Trains a small GPT (0.4 million parameters, words as tokens, nothing is downloaded) on invented
facts about 80 invented people, makes it forget 8 of them while 18 others are replayed, and measures
what is forgotten, what is kept of people who were replayed and of people who never were, and how
much comes back when half of the forgotten facts are learned again. About a minute on one CPU core.
"""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import Trainer, TrainingArguments

from ebu_optim.baselines import methods
from ebu_optim.errors import InputError
from ebu_optim.files import check_free, replacing_folder
from ebu_optim.integrations.transformers import TwoPhases
from ebu_optim.language import answer_nll, ascent_loss, npo_loss
from ebu_optim.metrics.protocol import versions
from ebu_optim.training import as_dict, command, option
from ebu_optim.training.fields import at_least
from ebu_optim.worlds.people import People, collate, new_model
from ebu_optim.worlds.people_judged import PARTS, evaluated, train


class ForgettingTrainer(TwoPhases, Trainer):
    """Two phases in each training step; any Trainer of transformers or of its kind will do."""


@dataclass(frozen=True, kw_only=True)
class Forget:
    loss: Literal["npo", "idk", "ascent"] = option(
        "npo",
        help="Forget loss: negative preference optimization, answers such as 'I do not know', or "
        "gradient ascent.",
    )
    rule: str = option("ebu_routed", help="Rule that makes one step of two gradients.")
    rule_options: dict[str, Any] = option(
        {"gamma": 1000.0}, help="Options of the rule, as JSON; '{}' takes its own defaults."
    )
    steps: int = option(200, help="Steps of forgetting.")
    learning_rate: float = option(1e-3, help="Learning rate of forgetting, by AdamW.")
    batch_size: int = option(16, help="Questions of each kind in a step.")
    gradient_accumulation_steps: int = option(1, help="Micro-batches that make one step.")
    max_grad_norm: float = option(1.0, help="Norm that the combined gradient is clipped to.")
    seed: int = option(1, help="Seed of people, of both trainings and of who is forgotten.")
    output_dir: Path = option(Path("outputs/language_model"), help="Folder for the result.")
    overwrite: bool = option(False, help="Replace a finished result.")

    def __post_init__(self) -> None:
        at_least(self, 1, "steps", "batch_size", "gradient_accumulation_steps")
        if self.rule not in methods:
            raise InputError(f"--rule {self.rule}: there is {', '.join(methods)}")
        try:
            methods[self.rule].needs(**self.rule_options)
        except (TypeError, ValueError) as error:
            raise InputError(f"--rule_options {json.dumps(self.rule_options)}: {error}") from error
        check_free(self.output_dir, is_result, self.overwrite)


def is_result(folder: Path) -> bool:
    """True of a folder that this script wrote, and may replace when told to."""
    try:
        return {"before", "after", "options"} <= json.loads(
            (folder / "results.json").read_text()
        ).keys()
    except (OSError, ValueError, AttributeError):
        return False


def forget_loss(kind: str, model: Any) -> Callable[[Any, Any], Tensor] | str:
    """What `TwoPhases` takes: a function of model and batch, or the model's own loss."""
    if kind == "idk":
        return "labels"  # the labels say "I do not know"
    frozen = copy.deepcopy(model).eval().requires_grad_(False)

    def loss(model: Any, inputs: dict[str, Tensor]) -> Tensor:
        asked = {name: value for name, value in inputs.items() if name != "labels"}
        logits = model(**asked).logits
        if kind == "ascent":
            return ascent_loss(logits, inputs["labels"])
        with torch.no_grad():
            reference, _ = answer_nll(frozen(**asked).logits, inputs["labels"])
        return npo_loss(logits, inputs["labels"], reference)

    return loss


def unlearn(model: Any, people: People, args: Forget, work: Path) -> None:
    facts, recipe = people.of("forgotten"), methods[args.rule]
    options = ({"fisher": "online"} if recipe.fisher else {}) | args.rule_options
    trainer = ForgettingTrainer(
        model=model,
        args=TrainingArguments(
            output_dir=str(work / "trainer"),
            max_steps=args.steps,
            learning_rate=args.learning_rate,
            per_device_train_batch_size=args.batch_size,
            gradient_accumulation_steps=args.gradient_accumulation_steps,
            max_grad_norm=args.max_grad_norm,
            lr_scheduler_type="constant",
            optim="adamw_torch",
            seed=args.seed,
            save_strategy="no",
            dataloader_pin_memory=torch.cuda.is_available(),
            logging_steps=max(1, args.steps // 5),
            report_to="none",
        ),
        data_collator=collate,
        train_dataset=people.ignorance(facts) if args.loss == "idk" else people.improbable(facts),
        remember_dataset=people.examples(people.of("replayed")),
        forget_loss=forget_loss(args.loss, model),
        wrap=partial(recipe.build, **options),
    )
    trainer.train()
    shutil.rmtree(work / "trainer", ignore_errors=True)  # it is empty


def table(rows: dict[str, dict[str, Any]]) -> str:
    """Probability of the answers before and after, in both wordings."""
    lines = [f"{'probability of the answers':<42}" + "".join(f"{name:>10}" for name in rows)]
    for part in PARTS:
        for wording, said in enumerate(("", ", in another wording")):
            text = part.replace("_", " ") + said
            cells = (f"{row[part][wording]['probability']:>10.3f}" for row in rows.values())
            lines.append(f"{text:<42}" + "".join(cells))
    for text, of in (
        ("truth ratio, forgotten", lambda row: row["forgotten"][0]["ratio_forgotten"]),
        ("truth ratio, never replayed", lambda row: row["never_replayed"][0]["ratio_kept"]),
        ("back after relearning the other half", lambda row: row["relearning"]["back"]),
    ):
        lines.append(f"{text:<42}" + "".join(f"{of(row):>10.3f}" for row in rows.values()))
    return "\n".join(lines)


def main(args: Forget) -> None:
    people = People(args.seed)
    with replacing_folder(args.output_dir) as work:
        model = new_model(people, args.seed).train()
        print(f"teaching {model.num_parameters()} parameters {len(people.facts)} facts")
        train(model, people, PARTS, args.seed)
        before = evaluated(model, people, args.seed)
        unlearn(model, people, args, work)
        model = model.cpu()
        after = evaluated(model, people, args.seed)
        model.save_pretrained(work / "model")
        kept = {n: v for n, v in as_dict(args).items() if n not in ("output_dir", "overwrite")}
        results = {"options": kept, "before": before, "after": after, "versions": versions()}
        (work / "results.json").write_text(json.dumps(results, indent=1))
        (work / "vocabulary.json").write_text(json.dumps(people.words))
    print(f"\n{table({'before': before, 'after': after})}\n\nsee {args.output_dir}/")


if __name__ == "__main__":
    command(main, Forget, __doc__)
