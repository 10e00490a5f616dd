"""What is installed, which kernels run, and which runs fit on this card."""

from __future__ import annotations

import platform
from importlib import metadata

import torch

from .. import __version__, kernels
from .fitting import table

EXTRAS = {
    "diffusion": ("diffusers", "safetensors", "jsonargparse"),
    "text-to-image": ("transformers", "peft", "open_clip_torch", "accelerate"),
    "metrics": ("torch-fidelity", "lpips"),
    "nudity": ("nudenet",),
    "quantized": ("torchao", "bitsandbytes"),
    "sign": ("model-signing",),
}


def doctor(fits: bool = True) -> str:
    """A report with one line per package group and device.

    Args:
        fits: also list the counted memory of a run of each family, and whether it fits here.
    """
    lines = [
        f"ebu_optim {__version__}, Python {platform.python_version()}, torch {torch.__version__}"
    ]
    for extra, packages in EXTRAS.items():
        there = [f"{p} {_version(p) or 'missing'}" for p in packages]
        short = [p for p in packages if _version(p) is None]
        remedy = f'  (pip install "ebu_optim[{extra}]")' if short else ""
        lines.append(f"{extra}: {', '.join(there)}{remedy}")
    lines.append(f"kernels for the CPU: {kernels.active('cpu')}, {torch.get_num_threads()} threads")
    if torch.cuda.is_available():
        for i in range(torch.cuda.device_count()):
            free, total = torch.cuda.mem_get_info(i)
            lines.append(
                f"cuda:{i}: {torch.cuda.get_device_name(i)}, {free / 2**30:.1f} of "
                f"{total / 2**30:.1f} GiB free"
            )
        lines.append(f"kernels for CUDA: {kernels.active('cuda')}")
    else:
        lines.append("no CUDA device: small models run on the CPU, large ones take minutes a step")
    if fits:
        lines += ["", "counted memory of a run at the model's native size, batch 1:", *_fits()]
    return "\n".join(lines)


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _fits() -> list[str]:
    room = torch.cuda.mem_get_info()[1] if torch.cuda.is_available() else None
    return table(room)
