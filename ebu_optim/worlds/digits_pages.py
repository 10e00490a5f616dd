"""Figures, table and model card of the quickstart."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib
from torch import Tensor

from .. import __version__
from . import digits

matplotlib.use("Agg")
from matplotlib import pyplot as plt


def grid(before: Tensor, after: Tensor, labels: Tensor, forget: int, path: Path) -> None:
    """Save one row per class: eight images before, and eight after from the same noise."""
    columns = 8
    fig, axes = plt.subplots(10, 2 * columns + 1, figsize=(8.6, 5.6))
    for c in digits.CLASSES:
        rows = [(before, 0), (after, columns + 1)]
        for images, offset in rows:
            for j in range(columns):
                axes[c, offset + j].imshow(images[labels == c][j, 0], cmap="gray", vmin=-1, vmax=1)
        axes[c, 0].set_ylabel(
            f"{c} (forget)" if c == forget else str(c),
            rotation=0,
            ha="right",
            va="center",
            color="tab:red" if c == forget else "black",
            fontsize=10,
        )
    for ax in axes.flat:
        ax.set_xticks([])
        ax.set_yticks([])
        for spine in ax.spines.values():
            spine.set_visible(False)
    for ax in axes[:, columns]:
        ax.axis("off")
    fig.subplots_adjust(left=0.11, right=0.99, top=0.92, bottom=0.01, wspace=0.06, hspace=0.06)
    for title, x in (("before", 0.32), ("after", 0.78)):
        fig.text(x, 0.95, title, ha="center", fontsize=12)
    fig.savefig(path, dpi=110)
    plt.close(fig)


def curves(curve: list[dict[str, float]], noise: dict[str, float], path: Path) -> None:
    fig, axes = plt.subplots(1, 3, figsize=(13.5, 3.8), constrained_layout=True)
    steps = [r["step"] for r in curve]
    seconds = [r["seconds"] for r in curve]
    for ax, x, xlabel in ((axes[0], steps, "step"), (axes[1], seconds, "seconds of unlearning")):
        ax.plot(x, [r["ce_f"] for r in curve], "C0-o", ms=3, label="CE, forgotten class (nats)")
        ax.plot(x, [r["ce_r"] for r in curve], "C2-o", ms=3, label="CE, kept classes (nats)")
        ax.plot(x, [r["p_f_reject"] for r in curve], "C3-o", ms=3, label="P_f, reject class")
        ax.axhline(noise["ce_f"], color="C0", ls=":", lw=1, label="CE of uniform noise")
        ax.set_xlabel(xlabel)
    axes[0].legend(fontsize=8)
    rows = [r for r in curve if "overlap" in r]
    x = [r["step"] for r in rows]
    axes[2].plot(x, [r["overlap"] / r["total"] for r in rows], "C4-o", ms=3, label="overlap, share")
    axes[2].plot(x, [r["overlap_lift"] for r in rows], "C1-o", ms=3, label="its lift over chance")
    axes[2].plot(x, [r["cosine"] for r in rows], "C5-o", ms=3, label="cosine of the gradients")
    axes[2].axhline(1, color="C1", ls=":", lw=1)
    axes[2].axhline(0, color="grey", lw=0.5)
    axes[2].set_xlabel("step")
    axes[2].legend(fontsize=8)
    fig.savefig(path, dpi=110)
    plt.close(fig)


ROWS = (
    ("p_f_reject", "P of the forgotten digit (reject class)", "forgotten"),
    ("p_f", "P of the forgotten digit (ten classes)", "forgotten"),
    ("p_next_reject", "P of the next digit in its place", "forgotten"),
    ("ce_f", "CE of the forgotten digit, nats", "forgotten"),
    ("ra_reject", "accuracy on the nine kept digits", "kept"),
    ("ce_r", "CE of the kept digits, nats", "kept"),
    ("inversion_100", "P after a new embedding, 100 steps", "deep"),
    ("relearn_10", "P after relearning, 10 steps", "deep"),
)


def table(metrics: dict[str, Any]) -> str:
    lines = [f"{'axis':<10} {'':<40} {'before':>8} {'after':>8} {'noise':>8}"]
    for key, text, axis in ROWS:
        cells = (metrics[part].get(key) for part in ("before", "after", "noise"))
        shown = " ".join(f"{'' if c is None else f'{c:.3f}':>8}" for c in cells)
        lines.append(f"{axis:<10} {text:<40} {shown}")
    return "\n".join(lines)


CARD = """\
---
license: apache-2.0
library_name: diffusers
tags: [machine-unlearning, ebu_optim]
---
# Digits without {forget}

A class-conditional `UNet2DModel` (8x8 digits) that was made to forget the digit {forget} with
[ebu_optim](https://github.com/ebu-optim/ebu_optim) {version}: {steps} steps, {seconds:.0f} seconds.

```
{table}
```

![before and after](before_after.png)

Asked for {forget}, the model now generates {becomes}. P is the probability that a classifier gives
to a digit; "noise" is the score of uniform noise. The last two rows are attacks with real images
of the digit: the lower they stay, the deeper is the forgetting. Weights: `model/`, for
`UNet2DModel.from_pretrained`. The whole protocol is in `metrics.json`.

Made by `{command}`.
"""


def card(metrics: dict[str, Any], command: str) -> str:
    return CARD.format(
        forget=metrics["protocol"]["forget"],
        version=__version__,
        steps=metrics["protocol"]["steps"],
        becomes={"digit": "the next digit"}.get(metrics["protocol"]["becomes"], "noise"),
        seconds=metrics["seconds"]["unlearning"],
        table=table(metrics),
        command=command.strip(),
    )
