"""The scales of the text-to-image experiments: which world, and how much of everything.

small     digits in styles, the world of ebu_optim.worlds.styled_digits; two CPU cores
flow      the same, drawn by a transformer of flow matching as Stable Diffusion 3's
paper     Stable Diffusion 1.4, see `text_paper`; a GPU
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from .worlds import Options


class TextWorld(NamedTuple):
    """`seconds`: of a step of training, of the judges, of a step of unlearning, of the sets of a
    seed, of measuring and of the attacks: on one core of an x86-64 CPU. `like`: the world whose
    strengths serve where nothing was tuned in this one."""

    name: str
    title: str
    base: Options
    judges: Options
    unlearn: Options
    guided: Options
    measure: Options
    attack: Options
    trial: Options
    pictures: Options
    seconds: Mapping[str, float]
    basis: str
    smoke: str | None = None
    like: str | None = None


DRAWN = {"num_inference_steps": 20, "guidance_scale": 3.0}
STYLED_DIGITS = TextWorld(
    "styled-digits",
    "digits in styles",
    base={"max_train_steps": 3000},
    judges={},
    unlearn={
        "train_batch_size": 16,
        **DRAWN,
        "sample_batch_size": 50,
        "surrogate_images": 100,
        "replay_images": 300,
        "forget_images": 100,
        "logging_steps": 50,
    },
    guided={"guided_steps": 20},
    measure={"num_inference_steps": 10, "guidance_scale": 3.0, "images_per_pair": 8},
    attack={
        "num_inference_steps": 10,
        "attack_images": 32,
        "inversion_steps": 100,
        "relearn_max_steps": 50,
    },
    trial={"attacks": ["inversion"]},
    pictures={**DRAWN, "images_per_prompt": 4},
    seconds={
        "base": 0.4,
        "judges": 40.0,
        "unlearn": 0.25,
        "sets": 15.0,
        "measure": 15.0,
        "attack": 27.0,
        "pictures": 5.0,
    },
    basis="one core of a 2.5 GHz x86-64 CPU a run",
)


#: Textual inversion on SD3 came later, and its tables have none.
FLOW_DIGITS = STYLED_DIGITS._replace(
    name="flow-digits",
    title="digits in styles, drawn by a flow",
    like=STYLED_DIGITS.name,
    base={"max_train_steps": 3000, "denoiser": "transformer", "learning_rate": 1e-3},
    attack={
        "num_inference_steps": 10,
        "attack_images": 32,
        "relearn_max_steps": 50,
        "attacks": ["paraphrase", "relearn"],
    },
    trial={"attacks": ["relearn"]},
)
