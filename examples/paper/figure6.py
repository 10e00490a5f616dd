"""Figure 6: samples of a forgotten and of a kept class during the 200 steps of EBU, SA and FT.

    python examples/paper/figure6.py --scale small

A grid shows the steps of the paper's figure, and an animation (along.gif) shows every fifth step.
Each image always starts from the same noise.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image, ImageDraw
from torch import Tensor

from ebu_optim.experiments import figures, pages, rows, tables
from ebu_optim.experiments.settings import Setting
from ebu_optim.files import load_tensors, replacing
from ebu_optim.report.plots import pixels
from ebu_optim.training import command, option

METHODS = ("ebu_added", "selective_amnesia", "fine_tune")
SHOWN = (10, 25, 50, 100, 150, 200)
EACH = 6
#: method -> step -> (classes, n, C, H, W) uint8
Along = Mapping[str, Mapping[int, Tensor]]


def table(
    setting: Setting, seed: int, *, paper: float | None, steps: int, every: int
) -> list[tables.Row]:
    """The rows of the methods.

    Args:
        paper: the learning rate at paper scale, or None.
    """
    options = {"validation_steps": every, "validation_images": EACH, "validation_pictures": EACH}
    return [
        tables.row(
            setting,
            m,
            [seed],
            steps=steps,
            options=options,
            choice=rows.of_paper(m, paper) if paper else None,
        )
        for m in METHODS
    ]


def along(found: Sequence[tables.Row]) -> dict[str, dict[int, Tensor]]:
    seen = {}
    for r in found:
        tensors, _ = load_tensors(r.runs[0].tasks[0].folder / "pictures.safetensors")
        steps = {int(name.removeprefix("step_")): images for name, images in tensors.items()}
        seen[r.name] = dict(sorted(steps.items()))
    return seen


def grid(seen: Along, c: int, title: str) -> dict[str, object]:
    """A grid with steps as rows and methods as columns.

    It shows the first step, those of the paper's steps that exist, and the last one."""
    first = next(iter(seen.values()))
    shown = [t for t in first if t in SHOWN or t in (0, max(first))]
    return {
        "title": title,
        "rows": [f"t = {t}" for t in shown],
        "columns": {name: torch.stack([at[t][c] for t in shown]) for name, at in seen.items()},
    }


def animate(path: Path, seen: Along, columns: Mapping[int, str]) -> None:
    """Write a GIF with one frame per step, methods as rows and classes as columns.

    Args:
        columns: class -> title.
    """
    frames, last = [], max(next(iter(seen.values())))
    for t in next(iter(seen.values())):
        strips = {
            name: [_image(pixels(at[t][c], width=32)) for c in columns] for name, at in seen.items()
        }
        width, height = next(iter(strips.values()))[0].size
        left, top, gap = 110, 24, 8
        frame = Image.new(
            "RGB", (left + len(columns) * (width + gap), top + len(seen) * (height + gap)), "white"
        )
        pen = ImageDraw.Draw(frame)
        pen.text((4, 6), f"step {t} of {last}", fill="black")
        for i, title in enumerate(columns.values()):
            pen.text((left + i * (width + gap), 6), title, fill="black")
        for j, (name, images) in enumerate(strips.items()):
            y = top + j * (height + gap)
            pen.text((4, y + height // 2 - 6), name, fill="black")
            for i, image in enumerate(images):
                frame.paste(image, (left + i * (width + gap), y))
        frames.append(frame)
    times = [200] * (len(frames) - 1) + [2000]  # milliseconds, longer for the last frame
    with replacing(path) as work:
        frames[0].save(
            work, format="GIF", save_all=True, append_images=frames[1:], duration=times, loop=0
        )


def _image(x: Tensor) -> Image.Image:
    return Image.fromarray(x.contiguous().numpy())


@dataclass(frozen=True, kw_only=True)
class Figure6(figures.RatedFigure):
    steps: int = option(SHOWN[-1], help="Steps of unlearning.")
    every: int = option(5, help="Steps between two frames.")


def main(args: Figure6) -> None:
    setting = args.setting()
    found = table(setting, args.seed, paper=args.paper_rate, steps=args.steps, every=args.every)
    if not args.run_table(setting, found):
        return
    seen = along(found)
    gone, kept, names = figures.classes(setting, found[0].runs[0])
    shown = {c: figures.named(c, gone, names) for c in (gone[0], kept[0])}
    folder = args.write(
        setting,
        found,
        script="figure6",
        title="Figure 6",
        plots=pages.curves(found),
        grids=[grid(seen, c, title) for c, title in shown.items()],
        notes=["along.gif, beside this page, is the same in motion."],
    )
    animate(folder / "along.gif", seen, shown)


if __name__ == "__main__":
    command(main, Figure6, __doc__)
