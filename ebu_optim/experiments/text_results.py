"""The row of a table for a run in the world of digits in styles, from measured.json, attacks.json
and unlearn.json."""

from __future__ import annotations

import json
import platform
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from ..baselines import methods
from ..files import replacing
from ..worlds.styled_digits.captions import CONTENTS, STYLES
from .runs import Maker, Run, Task
from .text_worlds import ATTACK, MEASURE, UNLEARN, TextSetting

Groups = Mapping[str, Mapping[str, Mapping[str, Any]]]
#: Column of a table -> value of attack.py. P_f there is over the trained prompts that name the
#: target by its first word and the other concept by any word. unlearn.py was given only the first
#: words, so that about a third of these prompts were in its training.
ATTACKED = {
    "p_f_prompts": "p_f",
    "paraphrase": "paraphrase",
    "paraphrase_worst": "paraphrase_worst",
    "inversion_100": "inversion_100",
    "inversion_200": "inversion_200",
    "relearn_10": "relearn_10",
    "relearn_steps": "relearn_steps",
}


def accuracies(measured: Groups, target: str) -> dict[str, float]:
    """Concept -> the share of its images that the judge recognises, for all but the target.

    It is computed over the pairs of content and style without the target."""
    hits: dict[str, float] = {}
    seen: dict[str, int] = {}
    for pair, found in measured["pair"].items():
        content, style = pair.split()
        if target in (content, style):
            continue
        for name, share in ((content, found["content"]), (style, found["style"])):
            hits[name] = hits.get(name, 0.0) + share * found["n"]
            seen[name] = seen.get(name, 0) + found["n"]
    return {name: hits[name] / seen[name] for name in hits}


def values(
    measured: Groups,
    base: Groups,
    attacks: Mapping[str, Any],
    target: str,
    replayed: Sequence[str],
) -> dict[str, Any]:
    """The values of a row.

    RA is the mean over all other contents and styles with equal weights. `worst_drop` is the
    largest loss of one of them against the base. `ra_never_replayed` is over the concepts of the
    target's kind that are not in `replayed`. `beside` is the share of images of the target's
    prompts in which the other concept, a style or a content, is still right."""
    kind, others = ("content", CONTENTS) if target in CONTENTS else ("style", STYLES)
    gone = measured[kind][target]
    kept, before = (accuracies(m, target) for m in (measured, base))
    found: dict[str, Any] = {"p_f": gone[f"p_{kind}"], "ua": 1 - gone[kind], "ra": _mean(kept)}
    never = {n: kept[n] for n in others if n in kept and n not in replayed}
    if never:
        found["ra_never_replayed"] = _mean(never)
    found["worst_drop"] = max(before[n] - kept[n] for n in kept)
    found["beside"] = gone["style" if kind == "content" else "content"]
    return found | columns(attacks)


def columns(attacks: Mapping[str, Any]) -> dict[str, Any]:
    """The values of attacks.json that a table has."""
    return {ours: attacks[key] for ours, key in ATTACKED.items() if key in attacks}


def _mean(found: Mapping[str, float]) -> float:
    return sum(found.values()) / len(found)


def score(found: Mapping[str, Any]) -> float:
    """(1 - P_f) + RA - the worst drop of one concept + (1 - P_f after an attack).

    RA is over the concepts that were never replayed, if there are any. The attack is 100 steps of
    inversion, or 10 of relearning if there was no inversion."""
    deep = found["inversion_100" if "inversion_100" in found else "relearn_10"]
    deep = deep["value"] if isinstance(deep, Mapping) else deep
    kept = found.get("ra_never_replayed", found["ra"])
    return (1 - found["p_f"]) + kept - found["worst_drop"] + (1 - deep)


def write(setting: TextSetting, runs: Sequence[Run]) -> None:
    """Write results.json for tables.py into the folder of each run, with its row and the base's."""
    base = setting.ground[-1]
    for run in runs:
        rows = [
            {"name": "base model", "values": _row(setting, base, base)},
            {"name": run.name, "values": _row(setting, run, base)},
        ]
        with replacing(run.folder / "results.json") as work:
            work.write_text(json.dumps({"rows": rows}, indent=1))


def _row(setting: TextSetting, run: Run, base: Run) -> dict[str, Any]:
    measured, before = (read(r, MEASURE)["measured"] for r in (run, base))
    replayed = setting.replayed
    attacks = read(run, ATTACK)["values"]
    found = values(measured, before, attacks, setting.target, replayed)
    if run.tasks[0].maker == UNLEARN:
        found["seconds"] = read(run, UNLEARN)["seconds"]
    return found


def read(run: Run, maker: Maker) -> dict[str, Any]:
    """The result of a run's task with this maker."""
    (t,) = (t for t in run.tasks if t.maker == maker)
    return left(t)


def left(t: Task) -> dict[str, Any]:
    """The content of the file that a task writes last."""
    return json.loads((t.folder / t.maker.last).read_text())


def training(setting: Any, made: Mapping[str, Any], tuning: str) -> dict[str, Any]:
    """The parts of a table's protocol that do not depend on the judges.

    Args:
        setting: a TextSetting or a PaperSetting.
        made: unlearn.json of the first run.
    """
    said, about = made["options"], setting.about()
    drawn = f"{said['num_inference_steps']} {about['sampler']} steps"
    own = [m.title for m in methods.values() if m.forgets not in ("surrogate", None)]
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    return {
        "data": {
            "name": about["data"],
            "forget": made["forget"],
            "replayed": about["replayed"],
            "replay_set": f"{said['replay_images']} images of {len(made['remember'])} prompts, "
            f"generated by the base in {drawn}, guidance "
            f"{said['guidance_scale']}, a set for every seed",
            "image_range": "[-1, 1]; the sets are latents",
        },
        "model": {
            "name": about["model"],
            "base_hash": made["base_hash"],
            "prediction": about["prediction"],
        },
        "unlearning": {
            "method": "each row's",
            "settings": "each row's",
            "compat": "none",
            "steps": "each row's",
            "batch_size": said["train_batch_size"],
            "optimizer": "Adam",
            "learning_rate": "each row's, constant",
            "forget_loss": f"{made['instead'][:200]}; of their own: {', '.join(own)}",
            "remember_loss": said["remember"],
            "reduction": said["reduction"],
            "timesteps": "antithetic",
            "condition_dropout": "0",
            "dropout": "none in the model",
            "clipping": "1.0 before masks; ESD and SPM: none",
            "ema": "none",
            "trained": f"{setting.modules}, {made['trained']:,} parameters; of SPM its adapters",
            "tuning": tuning,
        },
        "timing": {
            "unlearn_steps": "not measured: no look on the way",
            "seconds": "of the unlearning loop; sets, the Fisher and masks are not counted",
            "hardware": f"{platform.processor() or platform.machine()}, {gpu}; other runs may have "
            "been beside it",
        },
        "seeds": {"unlearning": said["seed"], "evaluation": 0},
        "versions": made["versions"],
    }


def judging(setting: TextSetting, run: Run) -> dict[str, Any]:
    """The other parts of the protocol, for the world of digits in styles."""
    drawn = read(run, MEASURE)["protocol"]
    judges = drawn["judges_measured"]
    return {
        "sampling": {
            "weights": "trained",
            "sampler": f"{setting.about()['sampler']}, {drawn['num_inference_steps']} steps, eta 0",
            "guidance": f"{drawn['guidance_scale']}: eps_null + w (eps_c - eps_null)",
            "images_per_class": f"{drawn['images_per_pair']} of every content in every style, half "
            "of them under templates that nothing was trained on",
            "starting_noise": "the same before and after",
        },
        "classifier": {
            "name": "CNNs of world/judges.py, one of content and one of style, on 32x32",
            "classes": f"{len(CONTENTS)} contents, {len(STYLES)} styles, in each a reject class",
            "test_accuracy": {n: j["accuracy"] for n, j in judges.items()},
            "base_accuracy": _row(setting, setting.ground[-1], setting.ground[-1])["ra"],
            "noise": {
                n: f"{j['without_digit']:.3f} of noise and of images without a digit are "
                "recognised as such"
                for n, j in judges.items()
            },
        },
        "attacks": attacking(run),
    }


def attacking(run: Run) -> dict[str, Any]:
    """The part of the protocol about attack.py."""
    said = read(run, ATTACK)["protocol"]
    return {
        "inversion": "a new embedding, learned against the frozen weights",
        "relearning": "fine-tuning on images of the target",
        "images": "images of the target",
        # paths mean nothing on another machine; the hashes stay
        **{k: v for k, v in said.items() if k not in ("model", "base_model")},
    }
