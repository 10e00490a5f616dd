"""Attack a text-to-image model that was made to forget: is the concept gone, or only its word?

    ebu attack --pretrained_model_name_or_path without/single/without.safetensors \\
        --forget "cassette player" --judge clip --clip_against radio --output_dir attacked

There are three attacks by default: paraphrases of the prompt; a new word that is learned on
images of the target with the frozen model (textual inversion); and fine-tuning of the denoiser on
these images (relearning). --attacks can name four more: cce, a word learned as in "Circumventing
Concept Erasure"; unlearndiffatk, tokens before the prompt; tina, inversion without text;
lora_relearn, a LoRA from ten images. All images of a run start from the same noise.
`attacks.json` in the output folder is written last. Each finished attack is kept in `parts`, and
the same command continues an interrupted run.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

from ..errors import InputError
from ..files import load_tensors, replacing, save_tensors
from ..manifest import changed, contents, key
from ..metrics import versions
from ..text_to_image.pipelines import look
from ..text_to_image.results import held, load, whole
from ..training.fields import as_dict
from . import attacks, judges, prompts
from .model import Attacked, by_encoder
from .options import AttackOptions

OURS = {"attacks.json", "pictures.png", "learned_word.safetensors", "parts", "target", ".lock"}
SHOWN = 8  # images in a row
#: Options that do not affect the figures.
FREE = {
    "output_dir",
    "target_dir",
    "overwrite",
    "attacks",
    "device",
    "pretrained_model_name_or_path",
    "base_model",
    "judges",
    "imagenette_weights",
}


def attack(config: AttackOptions) -> None:
    """Attack the model, and write the results to ``config.output_dir``.

    Raises:
        InputError: the options, models or folders do not fit.
    """
    args = config.resolved()
    look_at_folder(args)
    names = args.pretrained_model_name_or_path, str(args.base_model)
    # Each may be a folder of changes; its base is --base_model, or named by unlearn.json.
    own, base_own = (replace(args, pretrained_model_name_or_path=name) for name in names)
    looked, base_looked = (look(whole(one, args.base_model)) for one in (own, base_own))
    sizes = [(one.resolution, one.latents) for one in (looked, base_looked)]
    if sizes[0] != sizes[1]:
        raise InputError(
            f"--base_model {names[1]} generates images of {sizes[1][0]} pixels from latents "
            f"{sizes[1][1]}, {names[0]} images of {sizes[0][0]} pixels from {sizes[0][1]}: give "
            "the base of this model"
        )
    args = looked.family.guided(args, looked.unet)
    looked.family.check_steps(args, looked.scheduler, "num_inference_steps")
    questions = prompts.collect(args, looked.tokenizer)
    files = attacks.target_files(args.instance_data_dir)
    device = torch.device(args.device)
    judge = judges.load(args, looked, device)
    model = Attacked(load(own, args.base_model), looked, args, device)
    base = Attacked(load(base_own, args.base_model), base_looked, args, device)
    run = attacks.Attack(args, model, base, questions, judge, files)
    options = {k: str(v) for k, v in as_dict(args).items() if k not in FREE}
    same = {
        "options": options,
        "judge": judge.said,
        "model": model.made_of(),
        "base": base.made_of(),
        "prompts": key(questions),
        "images": contents(files),
    }
    with held(args.output_dir):
        if args.overwrite:
            for name in OURS - {".lock", "target"}:
                remove(args.output_dir / name)
        found = {
            name: part(args, name, same, run)
            for name in ("target", "p_f", *attacks.ATTACKS)
            if name in ("target", "p_f", *args.attacks)
        }
        write(args, found, same, judge.said, model)


def look_at_folder(args: AttackOptions) -> None:
    folder = args.output_dir
    if folder.exists() and not folder.is_dir():
        raise InputError(f"--output_dir {folder} is a file: give a folder")
    there = {p.name for p in folder.iterdir()} if folder.exists() else set()
    # hidden files are temporary files of an interrupted run
    if other := {n for n in there if not n.startswith(".")} - OURS:
        raise InputError(
            f"--output_dir {folder} is in use by something else ({min(other)}): give another folder"
        )
    if "attacks.json" in there and not args.overwrite:
        raise InputError(
            f"--output_dir {folder} holds finished attacks: replace them with --overwrite, or give "
            "another folder"
        )


def remove(path: Path) -> None:
    shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


def part(
    args: AttackOptions, name: str, same: dict[str, Any], run: attacks.Attack
) -> attacks.Found:
    """The result of one attack, made now or read from the interrupted run.

    The target depends only on the base and is kept in --target_dir.

    Raises:
        InputError: the file belongs to another model or other options, or cannot be read; the
            result has NaN.
    """
    path = args.output_dir / "parts" / f"{name}.safetensors"
    if name == "target":
        of = run.target_protocol()
        path = Path(args.target_dir or "") / f"target-{key(of)}.safetensors"
    else:
        of = same
    of = json.loads(json.dumps(of))  # as it is read back from the file
    if path.exists():
        try:
            tensors, meta = load_tensors(path)
        except ValueError as error:
            raise InputError(str(error)) from error
        if meta["of"] != of:
            raise InputError(
                f"{path} belongs to another model or other options "
                f"({', '.join(changed(meta['of'], of))} changed): give --overwrite to start again, "
                "or another --output_dir"
            )
        found = attacks.Found(meta["values"], meta["said"], tensors)
    else:
        found = run.make(name)
        meta = {"of": of, "values": found.values, "said": found.said}
        try:
            save_tensors(path, found.tensors, meta)
        except ValueError as error:  # NaN
            raise InputError(str(error)) from error
    run.known(name, found)
    return found


def write(
    args: AttackOptions,
    found: dict[str, attacks.Found],
    same: dict[str, Any],
    judged: dict[str, Any],
    model: Attacked,
) -> None:
    """Write learned_word.safetensors, pictures.png and, last, attacks.json."""
    rows = {k: t for f in found.values() for k, t in f.tensors.items() if k.startswith("pictures")}
    names = [k.removeprefix("pictures ") for k in rows]
    with replacing(args.output_dir / "pictures.png") as temporary:
        grid([t[:SHOWN] for t in rows.values()]).save(temporary, format="PNG")
    if "inversion" in found:
        with replacing(args.output_dir / "learned_word.safetensors") as temporary:
            word = found["inversion"].tensors["word"]
            save_file(by_encoder(model, word, attacks.WORD), temporary)
    values = {k: v for name, f in found.items() if name != "target" for k, v in f.values.items()}
    result = {
        "values": values,
        "base": found["target"].values,
        "details": {name: f.said for name, f in found.items()},
        "rows": names,
        "protocol": {
            **same["options"],
            "judged_by": judged,
            "model": args.pretrained_model_name_or_path,
            "model_hash": same["model"],
            "base_model": args.base_model,
            "base_hash": same["base"],
            "device": args.device,
        },
        "versions": versions(),
    }
    with replacing(args.output_dir / "attacks.json") as temporary:
        temporary.write_text(json.dumps(result, indent=1))
    print(f"P_f of the base: {found['target'].values['p_f']['value']:.3f}; of the unlearned model:")
    for name, value in values.items():
        if name.endswith("relearn_steps"):
            n = f"{value['steps']:.1f}" if value["reached"] else f"more than {value['within']}"
            print(f"  {name}, until half of the base's P_f: {n}")
        else:
            print(f"  {name}: {value['value']:.3f} [{value['low']:.3f}, {value['high']:.3f}]")
    print(f"see {args.output_dir / 'attacks.json'} and pictures.png (rows: {', '.join(names)})")


def grid(rows: list[Tensor]) -> Image.Image:
    """An image with rows of images (n, 3, H, W) uint8; short rows are filled with black."""
    wide = max(map(len, rows))
    full = [torch.cat([r, r.new_zeros(wide - len(r), *r.shape[1:])]) for r in rows]
    pixels = torch.stack(full).permute(0, 3, 1, 4, 2).flatten(0, 1).flatten(1, 2)
    return Image.fromarray(pixels.contiguous().numpy())
