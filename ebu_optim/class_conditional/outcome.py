"""What unlearn.py builds and prints first, measures on the way, and writes at the end."""

from __future__ import annotations

import json
from typing import Any

import torch
from diffusers import DDIMScheduler
from torch import Tensor

from ..baselines import methods
from ..diffusion import model_hash, sample, surrogate_noise
from ..errors import InputError
from ..files import save_tensors
from ..metrics import accuracy, classify, entropy, probability
from ..training import method
from ..training.fields import as_dict
from ..training.method import EBU
from .models import WEIGHTS, save_unet
from .options import Unlearn
from .sets import Prepared


def build(args: Unlearn, model: Any, made: Prepared) -> Any:
    """Return the method's optimizer over the model, from the table of ebu_optim.baselines.

    Raises:
        InputError: the method needs a Fisher that was not prepared, or refuses its options.
    """
    source = method.fisher_source(args, "prepared")
    fisher: Any = source if source == "online" else None
    if source == "prepared":
        if made.fisher is None:
            raise InputError(
                f"{args.prepared_dir} holds no Fisher; run prepare.py without --no_fisher"
            )
        fisher = made.fisher.for_model(model)
    trained = model
    if methods[args.method].embedding:
        trained, _ = model.class_embedding, model.requires_grad_(False)
        trained.requires_grad_(True)
    return method.build(args, trained.named_parameters(), fisher)


def say(accelerator: Any, args: Unlearn, made: Prepared, classes: list[str], ema: Any) -> None:
    """Print the classes and weights, and a warning if the average will hide the forgetting."""
    accelerator.print(
        f"{methods[args.method].title}: forgets {', '.join(classes[c] for c in made.forget)}, "
        f"replays {', '.join(classes[c] for c in made.replayed)}; "
        f"{accelerator.num_processes} process(es) on {accelerator.device}\n"
        f"weights: trained and anchored {WEIGHTS[args.start_from]} of the base; measured "
        f"{WEIGHTS[args.sample_weights]}; saved unet{' and unet_ema' if ema else ''}"
    )
    lag = args.ema_decay**args.max_train_steps
    if ema and lag > 0.05:
        accelerator.print(
            f"warning: after {args.max_train_steps} steps the average (decay {args.ema_decay}) "
            f"still holds {lag:.0%} of the weights before unlearning, so unet_ema will seem not to "
            "have forgotten; sample with unet, or give a smaller --ema_decay"
        )


def draw(args: Unlearn, model: Any, scheduler: Any, info: dict) -> tuple[Tensor, Tensor]:
    """Return images of every class and their labels, always from the same starting noise."""
    device = next(model.parameters()).device
    labels = torch.arange(len(info["classes"])).repeat_interleave(args.validation_images)
    images = sample(
        model,
        DDIMScheduler.from_config(scheduler.config),
        labels,
        tuple(info["shape"]),
        num_inference_steps=args.validation_inference_steps,
        device=device,
        generator=torch.Generator().manual_seed(args.seed + 2),
    )
    return images, labels


def pictures(args: Unlearn, images: Tensor, labels: Tensor) -> Tensor:
    """Return the first images of each class, (classes, n, C, H, W) uint8."""
    first = images.unflatten(0, (-1, args.validation_images))[:, : args.validation_pictures]
    return ((first + 1) * 127.5).round().nan_to_num(0).clamp(0, 255).to(torch.uint8).cpu()


def measure(judge: Any, plain: Any, images: Tensor, labels: Tensor, made: Any) -> dict[str, float]:
    """Return a point of the curve: what is forgotten and kept; `plain` gives the entropies."""
    logits, entropies = classify(judge, images), classify(plain, images)
    f = torch.isin(labels, torch.tensor(made.forget))
    p_f = [probability(logits[labels == c], c) for c in made.forget]
    found = {
        "p_f": sum(p_f) / len(p_f),
        "ce_f": entropy(entropies[f]),
        "ce_r": entropy(entropies[~f]),
        "ra": accuracy(logits[~f], labels[~f]),
    }
    never = ~f & ~torch.isin(labels, torch.tensor(made.replayed))
    if never.any():
        found["ra_never_replayed"] = accuracy(logits[never], labels[never])
    return found


def noise_p_f(judge: Any, forget: list[int], shape: list[int]) -> float:
    """Return P_f of noise with the curve's classifier, which is where P_f is going."""
    g = torch.Generator().manual_seed(0)
    logits = classify(judge, surrogate_noise("uniform", (2000, *shape), generator=g))
    return sum(probability(logits, c) for c in forget) / len(forget)


def settings(args: Any, opt: Any) -> dict[str, Any]:
    """Return the numbers and options of the method's optimizer, including defaults."""
    names = (*EBU, "penalty", "update", "unrelated", "terms", "granularity", "fisher_scale")
    found = {n: getattr(opt, n) for n in names if args.method.startswith("ebu")}
    return found | {k: v for k, v in opt.param_groups[0].items() if k.startswith("ebu_")}


def finish(
    args: Unlearn,
    raw: Any,
    scheduler: Any,
    info: dict,
    made: Any,
    done: dict,
    ema: Any,
    base_hash: str,
    opt: Any,
) -> None:
    recipe, along = methods[args.method], done.pop("pictures", {})
    if along:
        meta = {"kind": "samples along the steps", "classes": info["classes"], "base": base_hash}
        save_tensors(args.output_dir / "pictures.safetensors", along, meta)
    report = {
        "method": args.method,
        "title": recipe.title,
        "forget": made.forget,
        "replayed": made.replayed,
        "base_hash": base_hash,
        "settings": settings(args, opt),
        "compat": args.method_options.get("compat"),
        "base": str(args.pretrained_model_name_or_path),
        "start_from": args.start_from,
        "ema_share_of_start": ema.share if ema else None,
        **done,
        "options": {k: str(v) for k, v in as_dict(args).items()},
    }
    (args.output_dir / "unlearn.json").write_text(json.dumps(report, indent=1, default=str))
    gone = ", ".join(info["classes"][c] for c in made.forget)
    card = f"""---
library_name: diffusers
tags: [diffusion, class-conditional, machine-unlearning]
---

# {info["source"]} without {gone}

Made from `{args.pretrained_model_name_or_path}` (hash {base_hash}) by {recipe.title}:
{args.max_train_steps} steps of `examples/ddpm/unlearn.py`, {done["seconds"]:.0f} s. `unlearn.json`
has every option and the curve. `UNet2DModel.from_pretrained(folder, subfolder="unet")`. Asked for
{gone}, the model should answer with the surrogate ({args.surrogate}) instead;
`examples/ddpm/evaluate.py` measures how deep the forgetting goes.
"""
    info = {**info, "hash": model_hash(raw), "forgotten": made.forget}
    save_unet(args.output_dir, raw, scheduler, info, card, ema and ema.model)
    print(f"saved unet{' and unet_ema' if ema else ''} in {args.output_dir}")
