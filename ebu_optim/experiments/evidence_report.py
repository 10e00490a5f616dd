"""The table, plot and JSON of the runs of `evidence.py`, and the score that chooses strengths."""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Any

import torch

from ..files import replacing

GAMMAS = (1e1, 1e2, 1e3, 1e4, 1e5, 1e6)
REGIMES, LOSSES = ("partial", "full"), ("replay", "distill", "crossed")
TUNED = ("added", "replaced", "routed", "full", "random")
TUNE_SEED, SEEDS = 0, (1, 2, 3)
COLUMNS = (
    "p_f_reject",
    "acc_kept",
    "acc_replayed",
    "acc_never",
    "inversion_100",
    "relearn_10",
    "ce_f",
)
NAMES = {
    "base": "before (no unlearning)",
    "joint": "plain sum",
    "full": "full alignment",
    "random": "random masks",
    "embedding": "class embedding alone",
    "added": "EBU added",
    "replaced": "EBU replaced",
    "routed": "EBU routed",
}


def score(result: dict[str, Any]) -> float:
    """The score for tuning, fixed beforehand: forgotten + kept + deep with equal weights."""
    regime = result["spec"]["regime"] if "spec" in result else result["regime"]
    kept = "acc_never" if regime == "partial" else "acc_kept"
    return (1 - result["p_f_reject"]) + result[kept] + (1 - result["inversion_100"])


def tuned(results: list[dict[str, Any]], regime: str, loss: str, method: str) -> dict[str, Any]:
    """The run of the tuning seed with the best score; of equal ones that with the smaller gamma."""
    found = [
        r
        for r in results
        if (r["spec"]["regime"], r["spec"]["loss"], r["spec"]["method"]) == (regime, loss, method)
        and r["spec"]["seed"] == TUNE_SEED
        and r["spec"]["options"].get("gamma", 0) > 0
    ]
    return max(sorted(found, key=lambda r: r["spec"]["options"]["gamma"]), key=score)


def shared_gamma(results: list[dict[str, Any]], method: str) -> dict[str, float]:
    """gamma -> the mean score on the tuning seed over all regimes and losses."""
    scores: dict[str, list[float]] = {}
    for r in results:
        if r["spec"]["method"] == method and r["spec"]["seed"] == TUNE_SEED:
            scores.setdefault(f"{r['spec']['options']['gamma']:g}", []).append(score(r))
    return {g: statistics.fmean(v) for g, v in sorted(scores.items(), key=lambda x: float(x[0]))}


def summary(results: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row per setting: mean and standard deviation over the reported seeds."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for r in results:
        if r["spec"]["seed"] in SEEDS:
            key = json.dumps({k: v for k, v in r["spec"].items() if k != "seed"}, sort_keys=True)
            groups.setdefault(key, []).append(r)
    rows = []
    for key, members in groups.items():
        row = {**json.loads(key), "seeds": len(members)}
        columns = {c: [m[c] for m in members] for c in (*COLUMNS, "seconds")}
        columns["score"] = [score(m) for m in members]
        for column, values in columns.items():
            row[column] = statistics.fmean(values)
            row[f"{column}_sd"] = statistics.stdev(values) if len(values) > 1 else None
        rows.append(row)
    order = list(NAMES)
    return sorted(
        rows,
        key=lambda r: (
            REGIMES.index(r["regime"]),
            LOSSES.index(r["loss"]),
            len(r["options"]) > 1,
            order.index(r["method"]),
            str(r["options"]),
        ),
    )


def label(row: dict[str, Any]) -> str:
    shown = [f"{k} {v}" if isinstance(v, str) else f"{k} {v:g}" for k, v in row["options"].items()]
    return ", ".join([NAMES[row["method"]], *shown])


def markdown(rows: list[dict[str, Any]]) -> str:
    """One table for each regime and remember loss."""
    columns = {
        "p_f_reject": "P_f, reject class",
        "acc_kept": "kept",
        "acc_never": "never replayed",
        "inversion_100": "inversion",
        "relearn_10": "relearned",
        "score": "score",
    }
    lines: list[str] = []
    section = None
    for r in rows:
        if section != (r["regime"], r["loss"]):
            section = (r["regime"], r["loss"])
            shown = {
                k: v for k, v in columns.items() if section[0] == "partial" or "never" not in k
            }
            lines += ["", f"### {section[0].capitalize()} replay, remember by {section[1]}", ""]
            lines += [
                "| method | " + " | ".join(shown.values()) + " |",
                "|---" * (len(shown) + 1) + "|",
            ]
        cells = [label(r)]
        for c in shown:
            sd = r[f"{c}_sd"]
            cells.append(f"{r[c]:.3f}" + (f" ± {sd:.3f}" if sd is not None else ""))
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines).strip() + "\n"


def plot(results: list[dict[str, Any]], rows: list[dict[str, Any]], path: Path) -> None:
    """Plot the strengths on the tuning seed (top) and kept against deep on the reported seeds."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    fig, axes = plt.subplots(2, 3, figsize=(14, 8.4), constrained_layout=True)
    colours = {m: f"C{i}" for i, m in enumerate(TUNED)} | {"joint": "k", "embedding": "C7"}
    marks = dict(zip((*TUNED, "joint", "embedding"), "ovD^xs*", strict=True))
    for ax, column, text in zip(
        axes[0],
        ("p_f_reject", "acc_never", "inversion_100"),
        (
            "forgotten: P_f, reject class",
            "kept: accuracy, never replayed",
            "deep: P_f after inversion",
        ),
        strict=True,
    ):
        for method in TUNED:
            points = sorted(
                (r["spec"]["options"]["gamma"], r[column])
                for r in results
                if r["spec"]["seed"] == TUNE_SEED
                and r["spec"]["regime"] == "partial"
                and r["spec"]["loss"] == "replay"
                and r["spec"]["method"] == method
                and r["spec"]["options"].get("gamma", 0) > 0
            )
            ax.plot(
                *zip(*points, strict=True),
                "-",
                marker=marks[method],
                ms=4,
                color=colours[method],
                label=NAMES[method],
            )
        for r in results:
            s = r["spec"]
            if (s["seed"], s["regime"], s["loss"]) == (TUNE_SEED, "partial", "replay"):
                if s["method"] == "joint":
                    ax.axhline(r[column], color="k", ls=":", label=NAMES["joint"])
                elif s["options"].get("gamma") == 0:
                    ax.axhline(r[column], color="C0", ls=":", label="EBU added, gamma 0")
        ax.set(xscale="log", xlabel="gamma (unit Fisher scale)", ylabel=text)
    axes[0, 1].set_title("Tuning seed, partial replay, remember by replay", fontsize=10)
    axes[0, 0].legend(fontsize=7)
    for ax, loss in zip(axes[1], LOSSES, strict=True):
        for r in rows:
            if r["regime"] != "partial" or r["loss"] != loss or len(r["options"]) > 1:
                continue
            if r["method"] == "base":
                ax.axvline(r["acc_never"], color="grey", ls=":", lw=1, label="before")
                continue
            hollow = r["method"] == "added" and r["options"]["gamma"] == 0
            ax.errorbar(
                r["acc_never"],
                r["inversion_100"],
                xerr=r["acc_never_sd"],
                yerr=r["inversion_100_sd"],
                fmt=marks[r["method"]],
                color=colours[r["method"]],
                mfc="none" if hollow else None,
                lw=0.7,
                ms=7,
                label="EBU added, gamma 0" if hollow else label({**r, "options": {}}),
            )
        ax.set(
            xlabel="accuracy, never replayed (right is better)",
            ylabel="P_f after inversion (low is better)",
        )
        ax.set_title(f"Seeds 1 to 3, partial replay, remember by {loss}", fontsize=10)
    axes[1, 0].legend(fontsize=7)
    with replacing(path) as temporary:
        fig.savefig(temporary, dpi=100, format="png")
    plt.close(fig)


def write(results: list[dict[str, Any]], folder: Path, protocol: dict[str, Any]) -> None:
    """Write evidence.json, evidence.md and evidence.png into `folder`."""
    rows = summary(results)
    document = {
        "protocol": {
            **protocol,
            "tuning_seed": TUNE_SEED,
            "seeds": SEEDS,
            "gammas": GAMMAS,
            "score": "(1 - P_f) + accuracy (never replayed; under full replay: all kept) + "
            "(1 - P_f after inversion)",
            "torch": torch.__version__,
        },
        "tuned": {
            f"{regime}/{loss}/{method}": tuned(results, regime, loss, method)["spec"]["options"]
            for regime in REGIMES
            for loss in LOSSES
            for method in TUNED
        },
        "mean_tuning_score_by_gamma": {m: shared_gamma(results, m) for m in TUNED},
        "rows": rows,
        "runs": [{k: v for k, v in r.items() if k != "curve"} for r in results],
    }
    with replacing(folder / "evidence.json") as path:
        path.write_text(json.dumps(document))
    with replacing(folder / "evidence.md") as path:
        path.write_text(markdown(rows))
    plot(results, rows, folder / "evidence.png")
    print(markdown(rows))
    print(json.dumps(document["mean_tuning_score_by_gamma"], indent=1))
