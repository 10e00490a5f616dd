"""The rows of the tables: methods, their settings, and the strengths that tuning tries."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ..baselines import closed_forms, methods
from ..errors import InputError
from .settings import LOSSES

#: The choices for the published results; those of a new tune.py are in the output folder.
TUNED = Path(__file__).with_name("tuned.json")
EBU = ("ebu_added", "ebu_replaced", "ebu_routed")
#: Methods that are compared with several seeds; the others have one.
RIVALS = ("joint", "selective_amnesia", "salun", "pcgrad", "random_masks", "embedding_only")
OTHERS = ("fine_tune", "gradient_ascent", "erasediff", "retrain")
ALL = (*EBU, *RIVALS, *OTHERS)
ABLATIONS = tuple(m for m in methods if m.startswith("ebu_") and m not in EBU)

RATES = (1e-4, 3e-4)
#: The paper contradicts itself and has both.
PAPER_RATES = (1e-4, 1e-5)
#: The methods of the paper's tables, by the names of their rows.
PAPER = {
    "fine_tune": "FT",
    "gradient_ascent": "GA",
    "selective_amnesia": "SA",
    "salun": "SalUn",
    "ebu_added": "EBU",
}
#: lambda = 10 of SA's paper, for a Fisher that is a mean over timesteps instead of a sum.
SA_PUBLISHED = {"lam": 1e7}
#: Method -> (its option, values). Each value is tried with both learning rates, or the values are
#: six learning rates, so that every method has six trials, on a seed that is not reported.
Grids = Mapping[str, tuple[str, tuple[float, ...]]]
GRIDS: Grids = {
    **dict.fromkeys((*EBU, "random_masks"), ("gamma", (100.0, 1000.0, 10000.0))),
    **dict.fromkeys(
        ("joint", "pcgrad", "gu", "upgrad", "mgda", "imtl_g", "aligned_mtl", "fairgrad"),
        ("forget_weight", (0.5, 1.0, 2.0)),
    ),
    "selective_amnesia": ("lam", (10.0, 100.0, 1000.0)),
    **dict.fromkeys(
        ("salun", "sago", "gru", "restricted_gradient"), ("remember_weight", (0.5, 1.0, 2.0))
    ),
    "erasediff": ("lam", (0.03, 0.1, 0.3)),
    "embedding_only": ("learning_rate", (1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1)),
    "munba": ("learning_rate", (3e-5, 1e-4, 2e-4, 3e-4, 6e-4, 1e-3)),
    "gradient_ascent": ("learning_rate", (1e-6, 3e-6, 1e-5, 3e-5, 1e-4, 3e-4)),
}


class Choice(NamedTuple):
    """A learning rate and options of the method; without a learning rate for a closed form."""

    learning_rate: float | None
    options: dict[str, Any]

    @property
    def name(self) -> str:
        if self.learning_rate is None:
            return "untuned"
        return "-".join(
            [f"lr{self.learning_rate:g}"] + [f"{k}{v}" for k, v in self.options.items()]
        )

    @property
    def given(self) -> dict[str, Any]:
        """The choice as options of unlearning."""
        options = {"method_options": self.options} if self.options else {}
        rate = {} if self.learning_rate is None else {"learning_rate": self.learning_rate}
        return {**rate, **options}


def trials(method: str, rates: Sequence[float] = RATES, grids: Grids = GRIDS) -> list[Choice]:
    name, values = grids[method]
    if name == "learning_rate":
        return [Choice(v, {}) for v in values]
    # with this scale of F the same strengths suit every loss and every Fisher
    scale = {"fisher_scale": "unit"} if method == "selective_amnesia" else {}
    return [Choice(lr, {name: v, **scale}) for v in values for lr in rates]


def tuned(setting: Any, method: str) -> Choice:
    """tune.py's choice for a method, with this world and these losses.

    It was made under partial replay, where methods differ. A world without tuning uses the choice
    for digits, and an ablation that of EBU. A method without a choice for these losses uses its
    choice for other losses, or else 1e-4 and its defaults. A closed form has its defaults."""
    if method in closed_forms:
        return Choice(None, {})
    _, found = _trials_of(setting, method)
    return Choice(found["learning_rate"], found["options"]) if found else Choice(1e-4, {})


def tuning(setting: Any, method: str) -> str:
    """The source of that choice, for the protocol."""
    where, found = _trials_of(setting, method)
    if not found:
        return "none: 1e-4 and the method's defaults"
    whose = f"{title('ebu_added')}'s " if method in ABLATIONS else ""
    return f"{whose}{len(found['trials'])} trials ({where})"


def own_trials(setting: Any) -> Path:
    """The file in the output folder with tune.py's choices."""
    return setting.root.parent / "tuned.json"


def tuned_table(setting: Any) -> dict[str, dict[str, Any]]:
    """World and losses -> method -> choice. The output folder overrides published choices."""
    found: dict[str, dict[str, Any]] = {}
    for file in (TUNED, own_trials(setting)):
        for where, chosen in json.loads(file.read_text()).items() if file.exists() else ():
            found[where] = {**found.get(where, {}), **chosen}
    return found


def _trials_of(setting: Any, method: str) -> tuple[str, dict[str, Any] | None]:
    table = tuned_table(setting)
    of = "ebu_added" if method in ABLATIONS else method
    for world in setting.tuned_as:
        for loss in (setting.loss, *LOSSES):
            if found := table.get(key(world, loss), {}).get(of):
                return key(world, loss), found
    return "", None


def of_paper(method: str, learning_rate: float) -> Choice:
    """A method's choice at paper scale: its defaults, and for SA its published strength."""
    return Choice(learning_rate, SA_PUBLISHED if method == "selective_amnesia" else {})


def key(world: str, loss: str) -> str:
    return f"{world}, remembered by {loss}"


def score(values: dict[str, Any]) -> float:
    """(1 - P_f) + accuracy on what was never replayed + (1 - P_f after 100 steps of inversion)."""
    kept = values["ra_never_replayed"]
    return 3 - values["p_f_reject"]["value"] - (1 - kept) - values["inversion_100"]


def results(folder: Path) -> list[dict[str, Any]]:
    """The rows of a report: base model, noise, method."""
    return json.loads((folder / "results.json").read_text())["rows"]


def title(method: str) -> str:
    return methods[method].title


def check_methods(given: Sequence[str]) -> list[str]:
    """The methods without duplicates.

    Raises:
        InputError: there is no such method, or it is SPM, whose adapters need transformer blocks.
    """
    known = [m for m in methods if methods[m].forgets != "adapter"]
    for m in given:
        if m not in known:
            raise InputError(f"--methods {m}: no such method; give one of {', '.join(known)}")
    return list(dict.fromkeys(given))


def check_seeds(given: Sequence[int], flag: str = "--seeds") -> list[int]:
    """Check that no seed counts twice, and that seed 0 is not used, as strengths were chosen on it.

    Raises:
        InputError: a seed is given twice, or is 0.
    """
    if len(set(given)) < len(given) or 0 in given:
        raise InputError(
            f"{flag} {' '.join(map(str, given))}: give each seed once, and not 0, on which tune.py "
            "chose the strengths"
        )
    return list(given)
