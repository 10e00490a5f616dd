"""Every method of the comparison by its name: data for examples and reports."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

from ..optimizer import EBUOptimizer
from .embedding_only import EmbeddingOnly
from .erasediff import EraseDiff
from .esd import ESD
from .fine_tune import FineTune
from .gradient_ascent import GradientAscent
from .joint import Joint
from .pcgrad import PCGrad
from .random_masks import RandomMasks
from .retrain import Retrain
from .salun import SalUn
from .selective_amnesia import SelectiveAmnesia
from .spm import SPM


class Method(NamedTuple):
    """How a method is built, and what it learns from."""

    #: For tables.
    title: str
    #: ``build(base, **options)`` makes the optimizer; ``build.keywords`` are the options that make
    #: the method what it is, ``build.func.needs`` the phases that it needs.
    build: partial[EBUOptimizer]
    #: The option that is tuned, as far as there is one.
    strength: str | None = None
    #: What the forget loss is: "surrogate" (denoising of the mandatory distribution under the
    #: condition to forget), "own" (denoising of the class's own images), "relabel"
    #: (:func:`relabel_loss` on them), "guidance" (:func:`esd_loss`), "adapter" (the same at points
    #: sampled with the adapter, and :func:`anchor_loss` as the remember loss) or None.
    forgets: str | None = "surrogate"


def _ebu(title: str, **options: Any) -> Method:
    return Method(title, partial(EBUOptimizer, **options), "gamma")


def _of(
    title: str,
    cls: Callable[..., EBUOptimizer],
    strength: str | None,
    forgets: str | None = "surrogate",
) -> Method:
    return Method(title, partial(cls), strength, forgets)


#: The terms of the update that an ablation of Table 4 leaves.
_LEFT = {
    "forget": ("remember", "modulated"),
    "remember": ("forget", "modulated"),
    "mitigation": ("forget", "remember"),
}

methods: dict[str, Method] = {
    "fine_tune": _of("FT", FineTune, None, None),
    "gradient_ascent": _of("GA", GradientAscent, None, "own"),
    "retrain": _of("Retrain", Retrain, None, None),
    "joint": _of("plain sum", Joint, "forget_weight"),
    "selective_amnesia": _of("SA", SelectiveAmnesia, "lam"),
    "salun": _of("SalUn", SalUn, "remember_weight", "relabel"),
    "esd": _of("ESD", ESD, None, "guidance"),
    "spm": _of("SPM", SPM, "anchor_weight", "adapter"),
    "erasediff": _of("EraseDiff", EraseDiff, "lam", "own"),
    "pcgrad": _of("PCGrad", PCGrad, "forget_weight"),
    "random_masks": _of("random masks", RandomMasks, "gamma"),
    "embedding_only": _of("class embedding alone", EmbeddingOnly, "forget_weight"),
    "ebu_added": _ebu("EBU added", update="added"),
    "ebu_replaced": _ebu("EBU replaced", update="replaced"),
    "ebu_routed": _ebu("EBU routed", update="routed"),
    # Table 4, the term left out of the sum of eq. 13
    "ebu_without_alignment": _ebu("EBU w/o PA", penalty="none"),
    "ebu_without_forget": _ebu("EBU w/o L_f", terms=_LEFT["forget"]),
    "ebu_without_remember": _ebu("EBU w/o L_r^c", terms=_LEFT["remember"]),
    "ebu_without_mitigation": _ebu("EBU w/o Mitigation", terms=_LEFT["mitigation"]),
    # Table 4, the other reading: full instead of partial alignment; one gradient left out of the
    # blend; a blend that prefers neither
    "ebu_full_alignment": _ebu("EBU w/o PA (full alignment)", penalty="full"),
    "ebu_blend_remember": _ebu("EBU w/o L_f (in the blend)", alpha=0.0),
    "ebu_blend_forget": _ebu("EBU w/o L_r^c (in the blend)", alpha=1.0),
    "ebu_blend_equal": _ebu("EBU w/o Mitigation (equal blend)", alpha=0.5),
}
