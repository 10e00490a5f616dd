"""The model card (README.md) of a result, with the code that loads the result."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import ModelCardData, metadata_load

from .families import named

LOAD = {
    "pipeline": """from diffusers import {pipeline}

pipe = {pipeline}.from_pretrained("{result}"{absent})
""",
    "changed": """from diffusers import {pipeline}
from safetensors.torch import load_file

pipe = {pipeline}.from_pretrained("{base}"{absent})
pipe.{denoiser}.load_state_dict(load_file("{result}/{denoiser}_changed.safetensors"), strict=False)
""",
    "changed on the hub": """from diffusers import {pipeline}
from huggingface_hub import hf_hub_download
from safetensors.torch import load_file

file = hf_hub_download("{result}", "{denoiser}_changed.safetensors")
pipe = {pipeline}.from_pretrained("{base}"{absent})
pipe.{denoiser}.load_state_dict(load_file(file), strict=False)
""",
    "lora": """from diffusers import {pipeline}

pipe = {pipeline}.from_pretrained("{base}"{absent})
pipe.load_lora_weights("{result}", weight_name="pytorch_lora_weights.safetensors")
""",
    "single": """from diffusers import {pipeline}

pipe = {pipeline}.from_single_file("{result}/{file}")  # or in ComfyUI, A1111, kohya's scripts
""",
    "single transformer": """from diffusers import {pipeline}, {kind}

base = "{base}"
transformer = {kind}.from_single_file("{result}/{file}", config=base, subfolder="transformer")
pipe = {pipeline}.from_pretrained(base, transformer=transformer{absent})  # ComfyUI: the file alone
""",
    "kohya": """from diffusers import {pipeline}

pipe = {pipeline}.from_pretrained("{base}"{absent})  # or in ComfyUI and A1111, as any LoRA
pipe.load_lora_weights("{result}", weight_name="{file}")
""",
}
INDEX, PLACE, BASE = "model_index.json", "<this repository or folder>", "<the base model>"


def write(args: Any, base: Path, report: Mapping[str, Any], hub: str | None) -> str:
    """The text of README.md.

    Args:
        base: the folder of the pretrained pipeline, whose own card names its licence.
        report: ``unlearn.json``.
        hub: the hub repository that the result is uploaded to; None without an upload.
    """
    name = str(args.pretrained_model_name_or_path)
    on_hub = not Path(name).exists()
    family, index = named(report.get("pipeline", "StableDiffusionPipeline")), base / INDEX
    if index.is_file():
        family = family.of(json.loads(index.read_text()))
    gone = ", ".join(f"`{t}`" for t in report["forget"])
    given = licence(base)
    relation = "adapter" if args.save_as in ("lora", "kohya") else "finetune"
    header = ModelCardData(
        library_name="diffusers",
        pipeline_tag="text-to-image",
        base_model=name if on_hub else None,
        base_model_relation=relation if on_hub else None,
        tags=[
            *family.tags,
            "text-to-image",
            "machine-unlearning",
            *["lora"] * (args.save_as in ("lora", "kohya")),
        ],
        **given,
    )
    spm = (
        "\nSeveral SPM adapters, each scaled for each prompt: `examples/stable_diffusion/"
        "transport.py`.\n"
    )
    kind = "changed on the hub" if hub and args.save_as == "changed" else args.save_as
    of = name
    if kind == "single" and family.denoiser == "transformer":
        kind, of = "single transformer", str(args.architecture)
    # a folder on this machine means nothing to a reader on the hub
    of = of if on_hub or not hub else BASE
    code = LOAD[kind].format(
        base=of,
        result=hub or PLACE,
        pipeline=family.pipeline.__name__,
        denoiser=family.denoiser,
        kind=family.kind(family.denoiser).__name__,
        absent="".join(f", {part}=None" for part in family.absent),
        file=f"{args.output_dir.resolve().name}.safetensors",
    )
    steps = f"{args.max_train_steps} steps" if args.max_train_steps else "closed form"
    terms = f" (`{given['license']}`)" if "license" in given else ""
    return f"""---
{header.to_yaml()}
---

# {name if on_hub else Path(name).name} without {gone}

Made by {report["title"]} in {steps} ({report["seconds"]:.0f} s) with
ebu_optim; trained: {report["train_modules"]}, {report["trained"]:,} parameters. `unlearn.json`
lists every option.

```python
{code}```
{spm * (args.method == "spm")}
For a prompt with {gone} the model should generate {report["instead"]}. This card does not say how
well that works, what it costs elsewhere, or how easily the concept comes back: read a report, and
attack the model. Weights that hide a concept do not prove that it is gone. The base
model's licence{terms} holds for this model too.
"""


def licence(base: Path) -> dict[str, str]:
    """`license`, `license_name` and `license_link` from the base's own card, if it has them."""
    try:
        found = metadata_load(base / "README.md") or {}
    except (OSError, ValueError, yaml.YAMLError):  # no card, or its header is not YAML
        return {}
    names = ("license", "license_name", "license_link")
    return {n: str(found[n]) for n in names if isinstance(found.get(n), str)}
