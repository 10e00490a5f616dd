"""The protocol: every choice that changes a figure without being visible in it.

Published code differs in all of these silently. So two FIDs, two probabilities or two lambdas can
only be compared if both state these choices. A report contains all of them.
"""

from __future__ import annotations

import platform
from collections.abc import Mapping, Sequence
from importlib import metadata
from typing import Any

import torch

from .. import __version__

# part -> key -> what must be said there
PROTOCOL: dict[str, dict[str, str]] = {
    "data": {
        "name": "the data set and where it came from",
        "forget": "the forgotten classes or concepts",
        "replayed": "the classes that are replayed; all kept ones or part of them",
        "replay_set": "how the replay set was made: how many, sampler, steps, guidance",
        "image_range": "range of the pixels in training and how images were saved (no stretch)",
    },
    "model": {
        "name": "architecture and number of parameters",
        "base_hash": "model_hash of the model before unlearning",
        "prediction": "epsilon or v_prediction, and the noise schedule",
    },
    "unlearning": {
        "method": "the method and its reading",
        "settings": "its own options, all of them (alpha, delta, gamma, lambda, ...)",
        "compat": "whether traps of published code are on: 'none' or 'paper'",
        "steps": "optimizer steps",
        "batch_size": "of the forget and of the remember batch",
        "optimizer": "which, with everything that is not its default",
        "learning_rate": "and its schedule",
        "forget_loss": "and the surrogate",
        "remember_loss": "replay, distill or crossed; a frozen or a live target",
        "reduction": "sum or mean over C, H, W",
        "timesteps": "uniform or antithetic",
        "condition_dropout": "the rate during unlearning, 0 for none",
        "dropout": "on (train mode) or off during unlearning",
        "clipping": "the norm, and whether before or after a mask; 'none' for none",
        "trained": "which parameters are trained",
        "ema": "decay and where it starts, or 'none'",
        "tuning": "how strengths were chosen: budget, seed, score",
    },
    "sampling": {
        "weights": "which weights are sampled: trained or EMA",
        "sampler": "which, with steps and eta",
        "guidance": "scale and convention, eps_null + w (eps_c - eps_null), or 'none'",
        "images_per_class": "how many",
        "starting_noise": "the same before and after, or not",
    },
    "classifier": {
        "name": "architecture, input size, normalisation",
        "classes": "how many, and whether the last is a reject class",
        "test_accuracy": "on real test images",
        "base_accuracy": "on the base model's samples: the ceiling of RA",
        "noise": "what noise scores: kind and number",
    },
    "fid": {
        "extractor": "which network, layer and weights",
        "colours": "RGB or BGR",
        "pixels": "uint8 and on which scale",
        "reference_split": "which real images, how many, which classes left out",
        "images": "how many samples",
        "kid_subset_size": "and kid_subsets",
    },
    "attacks": {
        "inversion": "steps, optimizer, learning rate, batch size",
        "relearning": "steps, optimizer, learning rate, batch size",
        "images": "which real images the attacker has",
    },
    "timing": {
        "unlearn_steps": "level, share and how often P_f was measured",
        "seconds": "what the clock counted (evaluation does not count)",
        "hardware": "which machine, how many threads or devices, and what else ran on it",
    },
    "seeds": {
        "unlearning": "one or several",
        "evaluation": "of starting noise and attacks",
    },
    "versions": {
        "python": "version",
        "torch": "version",
        "ebu_optim": "version",
    },
    "nudity": {
        "detector": "package, version, model",
        "threshold": "score from which a detection counts",
        "labels": "which labels count",
        "counting": "detections or images",
        "prompts": "which list, images a prompt, seeds, guidance (fixed or the row's own)",
    },
    "clip_score": {
        "model": "ViT-B/32 or another, and its weights",
        "scale": "raw cosine, x100 or w=2.5",
        "prompts": "which captions and how many",
    },
    "lpips": {
        "network": "the backbone, and the version of the linear weights",
        "size": "of the images that are compared, as generated or brought to",
        "pairs": "which image against which: prompts, seeds",
    },
}

CLASS_WISE = (
    "data",
    "model",
    "unlearning",
    "sampling",
    "classifier",
    "fid",
    "attacks",
    "timing",
    "seeds",
    "versions",
)
TEXT_TO_IMAGE = tuple(part for part in CLASS_WISE if part != "fid")


def missing_protocol(
    protocol: Mapping[str, Any], parts: Sequence[str] = CLASS_WISE
) -> dict[str, str]:
    """Return what a protocol leaves out: "part.key" -> what must be stated there.

    None and empty values count as left out. If something was not used, write "none"; if a part was
    not measured, leave it out of `parts`. More entries than required are welcome.
    """
    unknown = [part for part in parts if part not in PROTOCOL]
    if unknown:
        raise ValueError(f"parts must be of {', '.join(PROTOCOL)}; got {', '.join(unknown)}")
    unsaid = {}
    for part in parts:
        said = protocol.get(part)
        for key, meaning in PROTOCOL[part].items():
            value = said.get(key) if isinstance(said, Mapping) else None
            empty = isinstance(value, (str, Sequence, Mapping)) and not len(value)
            if value is None or empty:
                unsaid[f"{part}.{key}"] = meaning
    return unsaid


def check_protocol(protocol: Mapping[str, Any], parts: Sequence[str] = CLASS_WISE) -> None:
    """Raise a ValueError that names everything that :func:`missing_protocol` finds."""
    unsaid = missing_protocol(protocol, parts)
    if unsaid:
        lines = "\n".join(f"  {key}: {meaning}" for key, meaning in unsaid.items())
        raise ValueError(
            f"the protocol leaves {len(unsaid)} things unsaid (if one was not used, write "
            f"'none'):\n{lines}"
        )


def versions() -> dict[str, str]:
    """Return the versions of Python, this package and the installed packages that it works with."""
    found = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "ebu_optim": __version__,
    }
    for package in (
        "numpy",
        "diffusers",
        "transformers",
        "peft",
        "accelerate",
        "torchvision",
        "torch-fidelity",
        "open-clip-torch",
        "lpips",
        "nudenet",
        "onnxruntime",
    ):
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found
