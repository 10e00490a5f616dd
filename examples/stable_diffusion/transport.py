"""Generate with one or several SPM adapters, scaled for each prompt (facilitated transport).

    python examples/stable_diffusion/transport.py \\
        --pretrained_model_name_or_path CompVis/stable-diffusion-v1-4 \\
        --adapters outputs/without_van_gogh/lora outputs/without_snoopy/lora \\
        --prompt "a painting of a beagle" --output_dir outputs/drawn

The weights are W0 + sum m_i (up_i down_i), set by diffusers' set_adapters. m_i depends on how near
the prompt is to the concept that adapter i erases (ebu_optim.baselines.transport).
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from ebu_optim.text_to_image import pipelines
from ebu_optim.text_to_image.transport import load, scale
from ebu_optim.training import exit_on_input_errors


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--pretrained_model_name_or_path", required=True, help="Hub id or folder.")
    add("--revision", help="Branch, tag or commit on the hub.")
    add("--variant", help="Variant of the files, e.g. fp16.")
    add(
        "--adapters",
        type=Path,
        nargs="+",
        required=True,
        help="The `lora` folders of runs with --method spm.",
    )
    add("--prompt", nargs="+", required=True, help="Prompts to generate images of.")
    add("--num_inference_steps", type=int, default=50, help="Steps of each image.")
    add("--guidance_scale", type=float, default=7.5, help="Guidance scale of each image.")
    add("--seed", type=int, default=0, help="Seed of each image.")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--output_dir", type=Path, required=True, help="Folder for the images.")
    args = parser.parse_args()
    model = pipelines.Model(
        pretrained_model_name_or_path=args.pretrained_model_name_or_path,
        revision=args.revision,
        variant=args.variant,
    )
    pipelines.look(model)  # reports problems in one line
    pipe = pipelines.assembled(pipelines.fetch(model), args.variant).to(args.device)
    erased = load(pipe, args.adapters)
    args.output_dir.mkdir(parents=True, exist_ok=True)
    for i, prompt in enumerate(args.prompt):
        m = scale(pipe, erased, prompt)
        print(f"{prompt!r}: {', '.join(f'{e.name} {s:.2f}' for e, s in zip(erased, m))}")
        image = pipe(
            prompt,
            num_inference_steps=args.num_inference_steps,
            guidance_scale=args.guidance_scale,
            generator=torch.Generator().manual_seed(args.seed),
        ).images[0]
        image.save(args.output_dir / f"{i:04d}.png")


if __name__ == "__main__":
    exit_on_input_errors(main, "the same command")
