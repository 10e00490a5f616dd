"""Every method of the comparison by its name, as data for examples and reports."""

from __future__ import annotations

from functools import partial
from typing import Any

from ..closed_form import CROSS_ATTENTION, rece, speed, uce
from ..optim import EBUOptimizer
from . import (
    advunlearn,
    aegis,
    embedding_only,
    erasediff,
    esd,
    fine_tune,
    gradient_ascent,
    gru,
    gu,
    jacobian_descent,
    joint,
    munba,
    pcgrad,
    random_masks,
    restricted_gradient,
    retrain,
    sago,
    salun,
    selective_amnesia,
    spm,
)
from ._recipe import Recipe


def _ebu(title: str, **options: Any) -> Recipe:
    return Recipe(title, partial(EBUOptimizer, **options), "gamma", fisher="online")


def _edit(title: str, matrix: Any, edits: tuple[str, ...] = CROSS_ATTENTION) -> Recipe:
    return Recipe(title, partial(matrix), forgets="edit", remembers=None, edits=edits)


#: For each ablation of Table 4, the terms of the update that remain.
_REMAINING = {
    "forget": ("remember", "modulated"),
    "remember": ("forget", "modulated"),
    "mitigation": ("forget", "remember"),
}

methods: dict[str, Recipe] = {
    "fine_tune": fine_tune.RECIPE,
    "gradient_ascent": gradient_ascent.RECIPE,
    "retrain": retrain.RECIPE,
    "joint": joint.RECIPE,
    "selective_amnesia": selective_amnesia.RECIPE,
    "salun": salun.RECIPE,
    "esd": esd.RECIPE,
    "spm": spm.RECIPE,
    "erasediff": erasediff.RECIPE,
    "pcgrad": pcgrad.RECIPE,
    "restricted_gradient": restricted_gradient.RECIPE,
    "munba": munba.RECIPE,
    "gu": gu.RECIPE,
    "gru": gru.RECIPE,
    "sago": sago.RECIPE,
    "aegis": aegis.RECIPE,
    "advunlearn": advunlearn.RECIPE,
    **jacobian_descent.RECIPES,
    "random_masks": random_masks.RECIPE,
    "embedding_only": embedding_only.RECIPE,
    "ebu_added": _ebu("EBU added", update="added"),
    "ebu_replaced": _ebu("EBU replaced", update="replaced"),
    "ebu_routed": _ebu("EBU routed", update="routed"),
    # Table 4: one term is left out of the sum of eq. 13
    "ebu_without_alignment": _ebu("EBU w/o PA", penalty="none"),
    "ebu_without_forget": _ebu("EBU w/o L_f", terms=_REMAINING["forget"]),
    "ebu_without_remember": _ebu("EBU w/o L_r^c", terms=_REMAINING["remember"]),
    "ebu_without_mitigation": _ebu("EBU w/o Mitigation", terms=_REMAINING["mitigation"]),
    # Table 4 in its other reading: full instead of partial alignment; one gradient left out of the
    # blend; a blend that prefers neither gradient
    "ebu_full_alignment": _ebu("EBU w/o PA (full alignment)", penalty="full"),
    "ebu_blend_remember": _ebu("EBU w/o L_f (in the blend)", alpha=0.0),
    "ebu_blend_forget": _ebu("EBU w/o L_r^c (in the blend)", alpha=1.0),
    "ebu_blend_equal": _ebu("EBU w/o Mitigation (equal blend)", alpha=0.5),
}

#: Edits in closed form, for text-to-image models: they have no optimizer and take no step.
closed_forms: dict[str, Recipe] = {
    "uce": _edit("UCE", uce),
    "rece": _edit("RECE", rece),
    "speed": _edit("SPEED", speed, ("attn2.to_v",)),
}
#: Both, for what reads the method of a run that may be either.
recipes: dict[str, Recipe] = {**methods, **closed_forms}
