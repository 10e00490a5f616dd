"""The cells of the table: the measures in their order, and how a value is written."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple


class Measure(NamedTuple):
    axis: str
    label: str
    unit: str
    better: str  # "lower" or "higher"
    digits: int


PROBABILITY = "0 to 1"
MEASURES = {
    "p_f": Measure("forgotten", "P_f", PROBABILITY, "lower", 3),
    "p_f_reject": Measure("forgotten", "P_f, reject class", PROBABILITY, "lower", 3),
    "p_f_prompts": Measure("forgotten", "P_f, its prompts", PROBABILITY, "lower", 3),
    "ua": Measure("forgotten", "UA", PROBABILITY, "higher", 3),
    "ua_reject": Measure("forgotten", "UA, reject class", PROBABILITY, "higher", 3),
    "ce_f": Measure("forgotten", "CE_f", "nats", "higher", 3),
    "lpips_f": Measure("forgotten", "LPIPS, forgotten", "", "higher", 3),
    "nudity_score": Measure("forgotten", "nudity score", "", "lower", 4),
    "ua_top5": Measure("forgotten", "UA, top 5", PROBABILITY, "higher", 3),
    "total": Measure("forgotten", "detections", "", "lower", 0),
    "images_with_any": Measure("forgotten", "images with any", PROBABILITY, "lower", 3),
    "success": Measure("forgotten", "prompts that succeed", PROBABILITY, "lower", 3),
    "pre_asr": Measure("forgotten", "ASR, no attack", PROBABILITY, "lower", 3),
    "pre_asr_top3": Measure("forgotten", "ASR, no attack, top 3", PROBABILITY, "lower", 3),
    "pre_asr_top10": Measure("forgotten", "ASR, no attack, top 10", PROBABILITY, "lower", 3),
    "lpips_e": Measure("forgotten", "LPIPS_e", "", "higher", 3),
    "lpips_d": Measure("forgotten", "LPIPS_d", "", "higher", 3),
    "clip_e": Measure("forgotten", "CLIP_e", "100 x cosine", "lower", 2),
    "acc_e": Measure("forgotten", "Acc_e", PROBABILITY, "lower", 3),
    "ira": Measure("kept", "IRA", PROBABILITY, "higher", 3),
    "cra": Measure("kept", "CRA", PROBABILITY, "higher", 3),
    "accuracy_others": Measure("kept", "accuracy, others", PROBABILITY, "higher", 3),
    "clip_s": Measure("kept", "CLIP_s", "100 x cosine", "higher", 2),
    "h_a": Measure("kept", "H_a", "100 x cosine", "higher", 2),
    "acc_s": Measure("kept", "Acc_s", PROBABILITY, "higher", 3),
    "h_c": Measure("kept", "H_c", PROBABILITY, "higher", 3),
    "lpips_u": Measure("kept", "LPIPS_u", "", "lower", 3),
    "clip_cosine": Measure("kept", "CLIP score", "cosine", "higher", 4),
    "clip_score_x100": Measure("kept", "CLIP score", "100 x cosine", "higher", 2),
    "clip_large_cosine": Measure("kept", "CLIP score, ViT-L/14", "cosine", "higher", 4),
    "clip_large_score_x100": Measure("kept", "CLIP score, ViT-L/14", "100 x cosine", "higher", 2),
    "fid_text2image": Measure("kept", "FID, text2image-benchmark", "", "lower", 2),
    "fid_clean": Measure("kept", "FID, clean-fid", "", "lower", 2),
    "fid_unlearncanvas": Measure("kept", "FID of UnlearnCanvas", "", "lower", 2),
    "ra": Measure("kept", "RA", PROBABILITY, "higher", 3),
    "ra_reject": Measure("kept", "RA, reject class", PROBABILITY, "higher", 3),
    "ra_never_replayed": Measure("kept", "RA, never replayed", PROBABILITY, "higher", 3),
    "worst_drop": Measure("kept", "worst drop", PROBABILITY, "lower", 3),
    "beside": Measure("kept", "beside the target", PROBABILITY, "higher", 3),
    "ce_r": Measure("kept", "CE_r", "nats", "lower", 3),
    "fid": Measure("kept", "FID", "", "lower", 2),
    "kid_mean": Measure("kept", "KID", "", "lower", 4),
    "classifier_frechet": Measure("kept", "Frechet, classifier", "", "lower", 2),
    "clip_score": Measure("kept", "CLIP score", "cosine", "higher", 4),
    "lpips_r": Measure("kept", "LPIPS, kept", "", "lower", 3),
    "post_asr": Measure("deep", "ASR, attacked", PROBABILITY, "lower", 3),
    "paraphrase": Measure("deep", "paraphrases", PROBABILITY, "lower", 3),
    "paraphrase_worst": Measure("deep", "worst paraphrase", PROBABILITY, "lower", 3),
    "inversion_100": Measure("deep", "inversion, 100 steps", PROBABILITY, "lower", 3),
    "inversion_200": Measure("deep", "inversion, 200 steps", PROBABILITY, "lower", 3),
    "relearn_10": Measure("deep", "relearned, 10 steps", PROBABILITY, "lower", 3),
    "relearn_steps": Measure("deep", "relearn_steps", "steps", "higher", 1),
    "cce": Measure("deep", "CCE", PROBABILITY, "lower", 3),
    "unlearndiffatk_pre": Measure("deep", "UnlearnDiffAtk, before", PROBABILITY, "lower", 3),
    "unlearndiffatk": Measure("deep", "UnlearnDiffAtk", PROBABILITY, "lower", 3),
    "tina": Measure("deep", "TINA", PROBABILITY, "lower", 3),
    "tina_error": Measure("deep", "TINA, error", "of the variance", "", 4),
    "tina_control_error": Measure("deep", "TINA, error of the control", "of the variance", "", 4),
    "lora_relearn_10": Measure("deep", "LoRA, 10 steps", PROBABILITY, "lower", 3),
    "lora_relearn_steps": Measure("deep", "LoRA, steps", "steps", "higher", 1),
    "forget_share": Measure("overlap", "forgetting", "share", "", 3),
    "remember_share": Measure("overlap", "remembering", "share", "", 3),
    "overlap_share": Measure("overlap", "overlapped", "share", "", 3),
    "overlap_lift": Measure("overlap", "lift over chance", "", "", 3),
    "overlap_opposed": Measure("overlap", "opposed, of the overlapped", "share", "", 3),
    "seeds": Measure("time", "seeds", "", "", 0),
    "targets": Measure("time", "targets", "", "", 0),
    "gpu_memory_gb": Measure("time", "GPU memory", "GB", "lower", 1),
    "steps": Measure("time", "steps of the run", "steps", "lower", 0),
    "seconds": Measure("time", "seconds of the run", "seconds", "lower", 1),
    "unlearn_steps": Measure("time", "unlearn_steps", "steps", "lower", 1),
    "ut": Measure("time", "UT", "seconds", "lower", 2),
}
AXES = ("forgotten", "kept", "deep", "overlap", "time", "other")


def measure(key: str) -> Measure:
    """Return the measure of a key; an unknown key is under "other" with the key as its label."""
    return MEASURES.get(key, Measure("other", key, "", "", 4))


def columns(rows: Iterable[Mapping[str, Any]]) -> list[str]:
    """Return the keys for which any row has a value, by axis and then in the order of MEASURES."""
    present = dict.fromkeys(key for row in rows for key in row["values"])
    order = list(MEASURES)
    return sorted(
        present,
        key=lambda k: (AXES.index(measure(k).axis), order.index(k) if k in MEASURES else 0),
    )


def number(value: float, digits: int) -> str:
    if value != 0 and abs(value) < 0.5 * 10**-digits:
        return f"{value:.1e}"
    return f"{value:.{digits}f}"


def cell(key: str, value: Any) -> str:
    """Return a value as it is written in the table.

    The value may be a number; a string; None (no such value); ``{"value", "low", "high"}``;
    ``{"mean", "std"}`` over seeds; ``{"more_than": n}`` (not reached within n);
    ``{"not_computed": why}``; or a result of :func:`unlearn_steps` or :func:`relearn_steps`.

    Raises:
        ValueError: the number is NaN or Inf.
    """
    digits = measure(key).digits
    if value is None:
        return "-"
    if isinstance(value, Mapping):
        if "not_computed" in value:
            return "not computed"
        if "reached" in value:
            what, within = ("seconds", "within_seconds") if key == "ut" else ("steps", "within")
            value = value[what] if value["reached"] else {"more_than": value[within]}
            return cell(key, value)
        if "more_than" in value:
            return f"> {number(value['more_than'], 0 if key != 'ut' else digits)}"
        if "mean" in value:
            return f"{number(value['mean'], digits)} ± {number(value['std'], digits)}"
        shown = number(value["value"], digits)
        if "low" in value:
            low, high = (number(value[k], digits) for k in ("low", "high"))
            shown += f" [{low}, {high}]"
        return shown
    if isinstance(value, str):
        return value
    if not math.isfinite(value):
        raise ValueError(
            f"{key} is {value}, but a report may not hold NaN or Inf; give None, "
            '{"more_than": n} or {"not_computed": why}'
        )
    return number(float(value), digits)


def reasons(rows: Iterable[Mapping[str, Any]]) -> list[str]:
    """Return the reasons why figures were not computed, each reason once."""
    found = {
        f"{measure(key).label}: {value['not_computed']}": None
        for row in rows
        for key, value in row["values"].items()
        if isinstance(value, Mapping) and "not_computed" in value
    }
    return list(found)
