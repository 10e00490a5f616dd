"""What evaluate.py's report holds next to the table: curves, grids and the protocol."""

from __future__ import annotations

import json
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from ..baselines import methods
from ..metrics import versions
from ..metrics.protocol import CLASS_WISE


def forget_loss(made: Mapping[str, Any]) -> str:
    """Return the forget loss of unlearn.py's run as text."""
    said = made["options"]
    kind = methods[made["method"]].forgets if said["forget_loss"] == "None" else said["forget_loss"]
    words = {
        None: "none",
        "surrogate": f"denoising of the surrogate {said['surrogate']}",
        "own": "denoising of the class's real images",
        "relabel": "the next kept class's prediction, on the class's real images",
        "guidance": f"ESD's, {said['esd_variant']}",
    }
    if methods[made["method"]].noise == "uniform":
        words["own"] += " with uniform instead of Gaussian noise"
    return f"{words[kind]}; noise on the condition {said['condition_noise']}"


def prepared(folder: Path) -> str:
    """Return, as text, how prepare.py made the replay set and the Fisher."""
    said = []
    for name, words in (
        (
            "replay",
            "{n} images drawn by model {model}, {sampler}, {num_inference_steps} steps, "
            "guidance {guidance_scale}, seed {seed}",
        ),
        ("fisher", "Fisher of {images} of them, {timesteps} timesteps each, {reduction}"),
    ):
        path = folder / f"{name}.safetensors"
        if path.is_file():
            with safe_open(path, framework="pt") as f:
                meta = json.loads(f.metadata()["meta"])
                n = f.get_slice("labels").get_shape()[0] if name == "replay" else None
            said.append(words.format(n=n, **meta))
    return "; ".join(said) or f"of {folder}, which is gone"


def protocol(
    args: Any,
    info: Mapping[str, Any],
    made: Mapping[str, Any],
    judged: Mapping[str, Any],
    table: Mapping[str, Any],
    real: Any,
) -> tuple[dict[str, Any], list[str]]:
    """Return the protocol, and those of its parts that the report measured."""
    said, names = made["options"], info["classes"]
    none = said["use_ema"] == "False"
    found: dict[str, dict[str, Any]] = {
        "data": {
            "name": real.source,
            "forget": [names[c] for c in made["forget"]],
            "replayed": [names[c] for c in made["replayed"]],
            "replay_set": f"{prepared(Path(said['prepared_dir']))}; remember data: "
            f"{said['remember_data']}",
            "image_range": "[-1, 1] from uint8, the same scale for every image",
        },
        "model": {
            "name": f"UNet2DModel of {info['source']}, {info['parameters']:,} parameters",
            "base_hash": made["base_hash"],
            "prediction": "epsilon, linear beta 1e-4 to 2e-2, 1000 steps",
        },
        "unlearning": {
            "method": made["method"],
            "settings": made["settings"] or {"all": "defaults"},
            "compat": made.get("compat") or "none",
            "steps": said["max_train_steps"],
            "batch_size": f"{said['train_batch_size']} a process, accumulated over "
            f"{said['gradient_accumulation_steps']}",
            "optimizer": "Adam",
            "learning_rate": f"{said['learning_rate']}, {said['lr_scheduler']}",
            "forget_loss": forget_loss(made),
            "remember_loss": said["remember"],
            "reduction": said["reduction"],
            "timesteps": "antithetic",
            "condition_dropout": "0",
            "dropout": "train mode",
            "clipping": said["max_grad_norm"],
            "trained": "the class embedding" if made["method"] == "embedding_only" else "all",
            "ema": "none"
            if none
            else f"{said['ema_decay']}, warm, from the base's own; it still "
            f"holds {made['ema_share_of_start']:.3g} of its start",
            "tuning": "none by this script",
        },
        "sampling": {
            "weights": args.weights,
            "sampler": f"DDIM, {args.num_inference_steps} steps, eta 0",
            "guidance": "none"
            if args.guidance_scale == 1
            else f"{args.guidance_scale}: eps_null + w (eps_c - eps_null)",
            "images_per_class": args.images_per_class,
            "starting_noise": "the same before and after",
        },
        "classifier": {
            "name": judged["kind"],
            "classes": f"{len(names)}; for the attacks with a reject class"
            if args.reject_classifier
            else f"{len(names)}",
            "test_accuracy": judged["test_accuracy"],
            "base_accuracy": table["ra"]["base"],
            "noise": "uniform, 2000 images",
        },
        "fid": {
            "extractor": "torch-fidelity's inception-v3-compat, 2048",
            "colours": "RGB",
            "pixels": "uint8, the same scale for every image",
            "reference_split": real.source,
            "images": args.images_per_class,
            "kid_subset_size": "1000 or half of the smaller set",
        },
        "attacks": {
            "inversion": f"{args.inversion_steps} steps, Adam 0.1, batch 32",
            "relearning": f"until P_f >= 0.5, at most {args.relearn_max_steps} steps, Adam 1e-4, "
            "batch 32, measured every 5",
            "images": f"all of the class in {real.source}",
        },
        "timing": {
            "unlearn_steps": f"P_f by {said['classifier']}, 95 % of the way from the base to "
            f"noise, measured every {said['validation_steps']} steps on "
            f"{said['validation_images']} images a class",
            "seconds": "of the unlearning loop, evaluations not counted",
            "hardware": f"{platform.processor() or platform.machine()}, {args.device}, "
            f"{torch.get_num_threads()} threads here",
        },
        "seeds": {"unlearning": said["seed"], "evaluation": args.seed},
        "versions": versions(),
    }
    left_out = set() if args.fid else {"fid"}
    left_out |= {"attacks"} if args.no_depth else set()
    left_out |= {"timing"} if not made["curve"] else set()
    parts = [part for part in CLASS_WISE if part not in left_out]
    return {part: found[part] for part in parts}, parts


def curves(made: dict[str, Any]) -> list[dict[str, Any]]:
    if not made["curve"]:
        return []
    series = {k: [(row["step"], row[k]) for row in made["curve"]] for k in ("p_f", "ra")}
    return [
        {
            "title": "P_f and RA over steps",
            "x": "step",
            "y": "0 to 1",
            "series": {"P_f": series["p_f"], "RA": series["ra"]},
            "limits": {"P_f of noise": made["noise_p_f"]},
        }
    ]


def grid(
    before: Tensor, after: Tensor, classes: list[str], forget: list[int], per_class: int
) -> dict[str, Any]:
    """Return the first images of up to twenty classes, with the forgotten classes first."""
    shown = [*forget, *(c for c in range(len(classes)) if c not in forget)][:20]
    pick = {
        name: images.unflatten(0, (len(classes), per_class))[shown, :8]
        for name, images in (("before", before), ("after", after))
    }
    return {
        "title": "The same starting noise before and after",
        "rows": [classes[c] for c in shown],
        "columns": pick,
        "forgotten": [classes[c] for c in forget],
    }
