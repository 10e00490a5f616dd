"""Measure whether a pipeline of this world generates the requested digit in the requested style.

    python examples/stable_diffusion/world/measure.py \\
        --pretrained_model_name_or_path outputs/world/pipeline --judges outputs/judges \\
        --output outputs/measured.json

The prompts and the starting noise are the same for every pipeline, trained or unlearned. The
figures are grouped by concept, by word (does a synonym bring the concept back?), by template
(trained and held out) and by pair. `content` and `style` are the shares of images that the judges
recognise as requested, `p_content` and `p_style` the mean probabilities of the request, and `none`
is the share of images without a digit.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ... import training
from ...errors import InputError
from ...files import replacing
from ...metrics import classify
from ...metrics.intervals import wilson
from ...text_to_image import drawing, pipelines
from ...text_to_image.pipelines import Model
from ...training.fields import as_dict, option
from .captions import CONTENTS, HELD_OUT, STYLES, TRAINED, Caption, captions, tokenizer
from .images import SIZE
from .judges import CLASSES, NONE, Judges, load_judges


class Answer(NamedTuple):
    """The judges' answer for one image. The fields of the content are None if the prompt asks
    for none."""

    caption: Caption
    content: bool | None
    style: bool
    p_content: float | None
    p_style: float
    none: bool


def choose(per_pair: int, seed: int = 0) -> list[Caption]:
    """Choose prompts, half of them from held-out templates.

    There are `per_pair` for every digit in every style, and as many for every style alone. They
    are sampled without replacement if there are enough."""
    g = torch.Generator().manual_seed(seed)
    trained, held_out = captions(TRAINED), captions(HELD_OUT)
    found = []
    for content in (*CONTENTS, None):
        for style in STYLES:
            halves = []
            for known in (trained, held_out):
                fitting = [c for c in known if (c.content, c.style) == (content, style)]
                order = torch.randperm(len(fitting), generator=g).tolist()
                halves.append([fitting[i] for i in order])
            longest = max(map(len, halves))
            halves = [(half * (longest // len(half) + 1))[:longest] for half in halves]
            both = [c for pair in zip(*halves) for c in pair]
            found += (both * (per_pair // len(both) + 1))[:per_pair]
    return found


def judge(pictures: Tensor, asked: Sequence[Caption], judges: Judges) -> list[Answer]:
    """The judges' answers for images (n, 3, 32, 32) in [-1, 1] of the prompts `asked`."""
    p = {n: classify(getattr(judges, n), pictures).softmax(1) for n in ("content", "style")}
    told = {n: p[n].argmax(1).tolist() for n in p}
    none = CLASSES["content"].index(NONE)
    found = []
    for i, c in enumerate(asked):
        style = CLASSES["style"].index(c.style)
        content = None if c.content is None else CLASSES["content"].index(c.content)
        found.append(
            Answer(
                c,
                None if content is None else told["content"][i] == content,
                told["style"][i] == style,
                None if content is None else p["content"][i, content].item(),
                p["style"][i, style].item(),
                told["content"][i] == none,
            )
        )
    return found


def summary(answers: Sequence[Answer]) -> dict[str, Any]:
    """n, shares with 95 % intervals, and mean probabilities; without the content if no prompt asks
    for one."""
    digits = [a for a in answers if a.content is not None]
    found: dict[str, Any] = {"n": len(answers)}
    for name, rows in (("content", digits), ("style", answers)):
        if rows:
            hits = sum(bool(getattr(a, name)) for a in rows)
            found[name] = hits / len(rows)
            found[f"{name}_interval"] = wilson(hits, len(rows))
            found[f"p_{name}"] = sum(getattr(a, f"p_{name}") for a in rows) / len(rows)
    found["none"] = sum(a.none for a in answers) / len(answers)
    return found


def groups(answers: Sequence[Answer]) -> dict[str, dict[str, Any]]:
    """Summaries grouped by concept, word, template and pair."""
    by: dict[str, Callable[[Caption], str | None]] = {
        "templates": lambda c: "held out" if c.held_out else "trained",
        "content": lambda c: c.content,
        "style": lambda c: c.style,
        "content word": lambda c: c.content_word,
        "style word": lambda c: c.style_word or f"({c.style}, unnamed)",
        "template": lambda c: c.template,
        "pair": lambda c: c.content and f"{c.content} {c.style}",
    }
    words = [w for part in (CONTENTS, STYLES) for ws in part.values() for w in ws]
    rank = {k: i for i, k in enumerate((*words, *TRAINED))}
    found: dict[str, dict[str, Any]] = {"all": {"all": summary(answers)}}
    for name, key in by.items():
        parts: dict[str, list[Answer]] = {}
        for a in answers:
            if (k := key(a.caption)) is not None:
                parts.setdefault(k, []).append(a)
        order = sorted(parts, key=lambda k: rank.get(k, len(rank)))
        found[name] = {k: summary(parts[k]) for k in order}
    return found


def table(found: dict[str, dict[str, Any]], names: Sequence[str]) -> str:
    """A Markdown table with one row for each group of the parts `names`."""
    rows = ["| | | n | content | p_content | style | p_style | none |", f"|{'---|' * 8}"]
    for name in names:
        for key, s in found[name].items():
            cells = (s.get(k) for k in ("content", "p_content", "style", "p_style", "none"))
            shown = ("" if v is None else f"{v:.3f}" for v in cells)
            rows.append(f"| {name} | {key} | {s['n']} | {' | '.join(shown)} |")
    return "\n".join(rows)


@dataclass(frozen=True, kw_only=True)
class Measure(Model):
    """What to generate and judge."""

    judges: Path = option(help="Folder that judges.py wrote.")
    output: Path = option(help="JSON file for the figures.")
    images_per_pair: int = option(8, help="Images of each digit in each style.")
    num_inference_steps: int = option(20, help="Steps of each image.")
    guidance_scale: float = option(3.0, help="Guidance scale of each image.")
    sample_batch_size: int = option(64, help="Images that are generated at once.")
    seed: int = option(0, help="Seed of the images.")

    def __post_init__(self) -> None:
        for name in ("images_per_pair", "num_inference_steps", "sample_batch_size"):
            if getattr(self, name) < 1:
                raise InputError(f"--{name} must be >= 1; got {getattr(self, name)}")


def measure(args: Measure) -> None:
    """Measure the pipeline and write the figures to ``args.output``.

    Raises:
        InputError: the judges or the pipeline cannot be used.
    """
    judges = load_judges(args.judges)
    looked, name = pipelines.look(args), args.pretrained_model_name_or_path
    if looked.resolution != SIZE:
        raise InputError(
            f"{name} generates images of {looked.resolution} pixels, and the judges support only "
            f"{SIZE}"
        )
    if looked.tokenizer.get_vocab() != tokenizer().get_vocab():
        raise InputError(
            f"{name} has another vocabulary than captions.py: give a pipeline of this world, and "
            "train it again if the words were changed since"
        )
    pipe = pipelines.assembled(pipelines.fetch(args), args.variant)
    beside = looked.family.drawing(pipe, SIZE)
    pipe = drawing.ready(pipe)
    asked = choose(args.images_per_pair, args.seed)
    seeds = range(args.seed, args.seed + len(asked))
    drawn = drawing.draw(
        pipe,
        [c.text for c in asked],
        seeds,
        batch=args.sample_batch_size,
        num_inference_steps=args.num_inference_steps,
        guidance_scale=args.guidance_scale,
        **beside,
    )
    pictures = torch.stack(list(drawn)) * 2 - 1
    found = groups(judge(pictures, asked, judges))
    protocol = {**{k: str(v) for k, v in as_dict(args).items()}, "judges_measured": judges.found}
    with replacing(args.output) as temporary:
        temporary.write_text(json.dumps({"measured": found, "protocol": protocol}, indent=1))
    print(table(found, ("all", "templates", "content", "style", "content word", "style word")))
    print(f"every template and pair: {args.output}")


if __name__ == "__main__":
    training.command(measure, Measure, __doc__)
