"""The report of a request: images from the same noise before and after unlearning.

The prompts are of three kinds: the target, its neighbours and others. The report also gives the
figures that are measured on the images."""

from __future__ import annotations

import json
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..baselines import recipes
from ..errors import InputError
from ..files import not_finite
from ..formats import fuse
from ..metrics import clip_score, versions
from ..metrics.intervals import estimate
from ..report import write_report
from ..text_to_image import drawing, pipelines, prompt_files, prompts, results, sets
from ..text_to_image.pipelines import Looked, Model
from ..text_to_image.prompts import REMEMBER
from ..text_to_image.save import file_name
from . import depth

FOLDER = "report"
#: The options that only a model in one file has, reset for a model that is a folder.
NOT_A_FILE = dict.fromkeys(("architecture", "prediction_type", "vae", "lora"))
KINDS = ("target", "neighbours", "others")
NOTES = (
    "Each image after unlearning starts from the same noise as the image before. A small value "
    "under 'change' means that the image stayed the same; a large value means that it changed. "
    "Look at the image to see what it has become.",
    "These figures do not prove that the concept is gone: a prompt that nobody tried, a new "
    "word, or some steps of training may bring it back. `ebu attack` measures that.",
)


def report(args: Any) -> dict[str, Any]:
    """Generate the images, measure them and write the page.

    Returns:
        The figures of the row "after".
    """
    looked = pipelines.look(before(args))
    args = looked.family.guided(args, looked.unet)
    asked = questions(args, looked.tokenizer)
    then, now = {}, {}
    if args.evidence_images:  # one pipeline after the other, as memory may hold only one
        then = draw(args, results.load(before(args)), looked, asked)
        now = draw(args, after(args), looked, asked)
    rows = measure(args, asked, then, now)
    for row, values in zip(rows, depth.attacked(args, before(args), result(args)), strict=True):
        row["values"] |= values
    spoken = json.loads((args.output_dir / "unlearn.json").read_text(encoding="utf-8"))
    write_report(
        args.output_dir / FOLDER,
        title=f"Without {', '.join(args.forget)}",
        rows=rows,
        protocol=_protocol(args, looked, asked, spoken),
        parts=(),
        grids=_grids(asked, then, now),
        notes=NOTES,
        command=f"ebu forget --config {args.output_dir}/run.yaml",
        overwrite=True,
    )
    return dict(rows[-1]["values"])


def questions(args: Any, tokenizer: Any) -> dict[str, list[str]]:
    """Kind -> prompts, at most `evidence_prompts` each: the target in every template, the prompts
    that the request keeps, and shipped prompts that are short enough for the tokenizer."""
    target = [
        prompts.fill(t, c)
        for c in prompt_files.read(args.forget, "CONCEPT")
        for t in prompt_files.read(args.forget_templates, "--forget_templates")
    ]
    kept = [t for t in prompt_files.read(args.remember_prompts, "--keep") if t]
    shipped = [t for t in prompt_files.read([str(REMEMBER)], "--keep") if t]
    own = [] if args.remember_prompts == [str(REMEMBER)] else kept
    longest = tokenizer.model_max_length
    others = [t for t in shipped if t not in own and len(tokenizer(t).input_ids) <= longest]
    n = args.evidence_prompts
    return dict(zip(KINDS, (target[:n], own[:n], others[:n]), strict=True))


def before(args: Any) -> Model:
    """The model before unlearning."""
    return Model(**{f.name: getattr(args, f.name) for f in fields(Model)})


def result(args: Any) -> Model:
    """The model after unlearning; for kohya's layout the base, to which `after` adds the LoRA."""
    base, folder = before(args), args.output_dir / args.save_as
    if args.save_as == "kohya":
        return base
    if args.save_as == "single":
        given = Path(base.pretrained_model_name_or_path)
        # a model of no released size takes its architecture from the folder that was given
        built = given if given.is_dir() else args.architecture
        own: dict[str, Any] = {**NOT_A_FILE, "architecture": built}
        return replace(base, pretrained_model_name_or_path=str(folder / file_name(args)), **own)
    more = NOT_A_FILE if args.save_as == "pipeline" else {}
    return replace(base, pretrained_model_name_or_path=str(folder), **more)


def after(args: Any) -> Any:
    """The pipeline after unlearning, opened as a recipient would open it."""
    pipe = results.load(result(args), args.pretrained_model_name_or_path)
    if args.save_as == "kohya":
        fuse(pipe, args.output_dir / "kohya" / file_name(args))
    return pipe


def draw(args: Any, pipe: Any, looked: Looked, asked: dict[str, list[str]]) -> dict[str, Tensor]:
    """Kind -> images (prompts, n, 3, H, W) in [0, 1]; image k of a prompt has seed + k.

    Raises:
        InputError: an image has values that are not finite.
    """
    beside = looked.family.drawing(pipe, looked.resolution)
    pipe = drawing.ready(pipe, _dtype(args, looked))
    n, found = args.evidence_images, {}
    for kind, texts in asked.items():
        if not texts or not n:
            continue
        each = [t for t in texts for _ in range(n)]
        seeds = [args.seed + k for _ in texts for k in range(n)]
        drawn = drawing.draw(
            pipe,
            each,
            seeds,
            batch=args.sample_batch_size,
            height=looked.resolution,
            width=looked.resolution,
            num_inference_steps=args.num_inference_steps,
            **looked.family.guiding(args.guidance_scale),
            **beside,
        )
        found[kind] = torch.stack(list(drawn)).unflatten(0, (len(texts), n))
    if bad := not_finite(found):
        raise InputError(
            f"an image of {pipe.name_or_path or 'the model'}, {bad}: the VAE or the denoiser gave "
            "values that are not finite; give another --vae (SDXL's own overflows in float16), or "
            "--evidence_images 0 for a report without images"
        )
    return found


def _dtype(args: Any, looked: Looked) -> torch.dtype:
    """The dtype of the pipeline: bfloat16 if the text encoders run in it, else float32.

    The families of the first kind are too large for float32 and were published in bfloat16."""
    return torch.bfloat16 if sets.halved(args, looked.family) else torch.float32


def measure(
    args: Any, asked: dict[str, list[str]], then: dict[str, Tensor], now: dict[str, Tensor]
) -> list[dict[str, Any]]:
    """The values of the rows "before" and "after", for every kind of prompt.

    These are the CLIP score of the images with their own prompts, if CLIP's weights are
    available, and the change: the root mean squared difference between two images from the
    same noise, over pixels in [0, 1]."""
    rows: list[dict[str, Any]] = [{"name": n, "values": {}} for n in ("before", "after")]
    scores = _clip(args, asked, then, now)
    for kind in then:
        apart = (now[kind] - then[kind]).square().mean((2, 3, 4)).sqrt().flatten()
        rows[1]["values"][f"change, {kind}"] = estimate(apart.double(), seed=args.seed)
        for row in rows:
            row["values"][f"CLIP score, {kind}"] = scores[row["name"], kind]
    return rows


def _clip(
    args: Any, asked: dict[str, list[str]], then: dict[str, Tensor], now: dict[str, Tensor]
) -> dict[tuple[str, str], Any]:
    """(row, kind) -> the score, or the reason why there is none.

    All scores come from one call, as a call without a network waits for a timeout."""
    sets = {
        (row, kind): t for row, m in (("before", then), ("after", now)) for kind, t in m.items()
    }
    if args.clip_weights == "none" or not sets:
        return {place: {"not_computed": "--clip_weights none"} for place in sets}
    flat = torch.cat([t.flatten(0, 1) for t in sets.values()])
    texts = [
        text for (_, kind), t in sets.items() for text in asked[kind] for _ in range(t.shape[1])
    ]
    found = clip_score(
        flat.mul(255).round().to(torch.uint8),
        texts,
        model=args.clip_model,
        pretrained=args.clip_weights,
    )
    if why := found["not_computed"]:
        return {place: {"not_computed": why} for place in sets}
    scores = torch.tensor(found["per_image"], dtype=torch.float64)
    parts = scores.split([t.shape[0] * t.shape[1] for t in sets.values()])
    return {place: estimate(part, seed=args.seed) for place, part in zip(sets, parts, strict=True)}


def _grids(
    asked: dict[str, list[str]], then: dict[str, Tensor], now: dict[str, Tensor]
) -> list[dict[str, Any]]:
    return [
        {
            "title": kind,
            "rows": asked[kind],
            "forgotten": asked[kind] * (kind == "target"),
            "columns": {"before": then[kind] * 2 - 1, "after": now[kind] * 2 - 1},
        }
        for kind in then
    ]


def _protocol(
    args: Any, looked: Looked, asked: dict[str, list[str]], spoken: dict[str, Any]
) -> dict[str, Any]:
    return {
        "request": {
            "forget": args.forget,
            "instead": spoken["instead"],
            "keep": asked["neighbours"],
        },
        "unlearning": {
            "method": recipes[args.method].title,
            "settings": spoken["settings"],
            "steps": args.max_train_steps,
            "batch_size": args.train_batch_size,
            "learning_rate": args.learning_rate,
            "trained": spoken["train_modules"],
            "seconds": spoken["seconds"],
        },
        "model": {"base": args.pretrained_model_name_or_path, "made_of": spoken["made_of"]},
        "sampling": {
            "sampler": f"DDIM, {args.num_inference_steps} steps",
            "guidance": args.guidance_scale,
            "images": f"{args.evidence_images} of each prompt, from seed {args.seed} on",
            "starting_noise": "the same before and after",
            "dtype": str(_dtype(args, looked)).removeprefix("torch."),
        },
        "versions": versions(),
    }
