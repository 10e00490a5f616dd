"""Save the result of unlearn.py: a whole pipeline, one file, only the changed tensors, or a LoRA in
one of two layouts; each with a model card."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from peft.utils import get_peft_model_state_dict
from safetensors.torch import save_file
from torch import Tensor, nn

from ..files import replacing, replacing_folder
from ..formats import Single, write_folder, write_lora, write_single
from ..training.fields import option
from . import card
from .families import Family, of_folder
from .modules import Prompted, is_adapter
from .pipelines import assembled

DTYPES = {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
FOLDERS = ("pipeline", "single", "changed", "lora", "kohya")
ADAPTERS = ("lora", "kohya")


@dataclass(frozen=True, kw_only=True)
class SaveOptions:
    """How the result is saved."""

    group: ClassVar[str] = "result"

    save_as: Literal["pipeline", "single", "changed", "lora", "kohya"] | None = option(
        None,
        help="Form of the result. pipeline: a diffusers folder; single: one file in the "
        "layout of ComfyUI and A1111; changed: only the changed tensors; lora: a LoRA "
        "for diffusers; kohya: a LoRA for ComfyUI and A1111. Default: lora if adapters are "
        "trained, else the form in which the model came.",
    )
    save_precision: Literal["no", "fp16", "bf16"] = option(
        "no", help="Precision of the saved weights; no: float32."
    )


def save(args: Any, model: Prompted, base: Path, report: Mapping[str, Any]) -> Path:
    """Write the result into output_dir/<save_as>, completely or not at all.

    Args:
        model: the trained model.
        base: the folder of the pretrained pipeline, from which all untrained parts come.
        report: the report of the run; it becomes ``unlearn.json``, in output_dir and with the
            result.

    Returns:
        The folder of the result.
    """
    kind, dtype = args.save_as, DTYPES[args.save_precision]
    folder = args.output_dir / kind
    text = json.dumps(dict(report), indent=1, default=str)
    with replacing_folder(folder) as work:
        if kind == "lora":
            layers = {f"{model.family.denoiser}_lora_layers": lora_layers(model.denoiser)}
            model.family.pipeline.save_lora_weights(
                work, **{name: _cast(tensors, dtype) for name, tensors in layers.items()}
            )
        elif kind == "kohya":
            state = get_peft_model_state_dict(model.denoiser)
            layers = {model.family.denoiser: _cast(state, dtype)}
            (config,) = model.denoiser.peft_config.values()
            write_lora(layers, work / file_name(args), config.lora_alpha, "kohya")
        elif kind == "single":
            single(args, model, base, work / file_name(args))
        elif kind == "changed":
            save_file(_cast(changed(args, model, base), dtype), work / changed_name(model.family))
        else:
            pipe = merged(args, model, base)
            for part in pipe.components.values():
                if isinstance(part, nn.Module):
                    nn.Module.to(part, dtype)  # diffusers' own logs a warning for each part
            pipe.save_pretrained(work)
        (work / "README.md").write_text(card.write(args, base, report, args.hub), encoding="utf-8")
        (work / "unlearn.json").write_text(text)
    (args.output_dir / "unlearn.json").write_text(text)
    return folder


def changed_name(family: Family) -> str:
    """The name of the file with the changed tensors."""
    return f"{family.denoiser}_changed.safetensors"


def file_name(args: Any) -> str:
    """The name of a result in one file."""
    return f"{args.output_dir.resolve().name}.safetensors"


def single(args: Any, model: Prompted, base: Path, out: Path) -> None:
    """Write a result in one file: the given file with the changed tensors, or a new file from
    the given folder."""
    source, denoiser = args.pretrained_model_name_or_path, model.family.denoiser
    new: dict[str, Mapping[str, Tensor]] = {denoiser: changed(args, model, base)}
    if not Path(source).is_file():
        write_folder(base, new, out, dtype=DTYPES[args.save_precision], variant=args.variant)
        return
    if args.lora or args.vae:  # then untrained tensors differ from the file, too
        pipe = merged(args, model, base)
        parts = [p for p in model.family.weighty() if args.lora or p in (denoiser, "vae")]
        new = {part: getattr(pipe, part).state_dict() for part in parts}
    of = Single(source, config=args.architecture, prediction_type=args.prediction_type)
    write_single(of, {p: _cast(t, torch.float32) for p, t in new.items()}, out)


def kept(args: Any, base: Path, report: Mapping[str, Any]) -> Path | None:
    """The folder with the result that this run saved before; None if it is missing or incomplete.

    A model card that somebody edited is kept. One that nobody edited is written again, as the
    options of the hub may have changed.
    """
    folder = args.output_dir / args.save_as
    where = folder / of_folder(base).denoiser if args.save_as == "pipeline" else folder
    weights = where.glob("*.safetensors")
    card_file = folder / "README.md"
    try:
        text = card_file.read_text(encoding="utf-8")
        before = json.loads((folder / "unlearn.json").read_text())
        # the seconds come with the checkpoint, so the result of another run has different ones
        if before["seconds"] != report["seconds"] or not any(weights):
            return None
        push, name = (before["options"][n] for n in ("push_to_hub", "hub_model_id"))
        then = name if push == "True" else None
    except (OSError, ValueError, KeyError):
        return None
    if text == card.write(args, base, before, then):
        with replacing(card_file) as work:
            work.write_text(card.write(args, base, report, args.hub), encoding="utf-8")
    return folder


def merged(args: Any, model: Prompted, base: Path) -> Any:
    """The base pipeline in float32 on the CPU with the trained weights in it."""
    family = model.family
    pipe = assembled(base, args.variant)
    denoiser = getattr(pipe, family.denoiser)
    if is_adapter(args):
        found = lora_layers(model.denoiser)
        layers = {f"{family.denoiser}.{n}": t.cpu() for n, t in found.items()}
        pipe.load_lora_weights(layers)
        pipe.fuse_lora()
        pipe.unload_lora_weights()
    else:
        denoiser.load_state_dict({n: p.cpu() for n, p in model.trained().items()}, strict=False)
    return pipe


def changed(args: Any, model: Prompted, base: Path) -> dict[str, Tensor]:
    """The tensors that differ from the base, by the denoiser's names."""
    if not is_adapter(args):
        return model.trained()
    state = getattr(merged(args, model, base), model.family.denoiser).state_dict()
    layers = {n.partition(".lora_")[0] for n in lora_layers(model.denoiser)}
    return {f"{n}.weight": state[f"{n}.weight"] for n in layers}


def lora_layers(unet: Any) -> dict[str, Tensor]:
    """The adapter's tensors by peft's names, which diffusers loads.

    Alpha is multiplied into B, as loaders assume that alpha equals the rank.

    diffusers' convert_state_dict_to_diffusers renames only the layers of attention, and
    load_lora_weights silently drops these from such a mixture.
    """
    (config,) = unet.peft_config.values()
    scale = config.lora_alpha / config.r
    found = get_peft_model_state_dict(unet)
    return {n: t.detach() * scale if ".lora_B." in n else t.detach() for n, t in found.items()}


def _cast(tensors: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    return {n: t.detach().to("cpu", dtype).contiguous() for n, t in tensors.items()}
