"""Which weights of a UNet are trained for each value of --train_modules."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from torch import nn

#: (name of a parameter, its module) -> whether the parameter is trained.
Choice = Callable[[str, nn.Module], bool]


def layers(inside: Callable[[str], bool]) -> Choice:
    """Only Linear and Conv2d layers, as in ESD's newer code, which never trains norms."""
    return lambda name, module: isinstance(module, (nn.Linear, nn.Conv2d)) and inside(name)


def _cross(name: str) -> bool:
    return "attn2." in name


def _notime(name: str) -> bool:
    """All but the output layers and the time embedding: Selective Amnesia and ESD's first code."""
    return not (name.startswith(("conv_norm_out.", "conv_out.")) or "time_embedding" in name)


#: Layers of ESD's first code: LDM's output_blocks 6 and 8, input_blocks 4 and 7, by diffusers'
#: names.
XLAYER = ("up_blocks.2.attentions.0.", "up_blocks.2.attentions.2.")
SELFLAYER = ("down_blocks.1.attentions.0.", "down_blocks.2.attentions.0.")

MODULES: Mapping[str, Choice] = {
    "xattn": lambda name, _: _cross(name),
    "noxattn": lambda name, _: _notime(name) and not _cross(name),
    "selfattn": lambda name, _: "attn1." in name,
    "attention": lambda name, _: "attn1." in name or _cross(name),
    "full": lambda name, _: True,
    "notime": lambda name, _: _notime(name),
    "xlayer": lambda name, _: _cross(name) and name.startswith(XLAYER),
    "selflayer": lambda name, _: "attn1." in name and name.startswith(SELFLAYER),
    "esd-x": layers(_cross),
    "esd-x-strict": layers(lambda name: _cross(name) and (".to_k." in name or ".to_v." in name)),
    "esd-u": layers(lambda name: not _cross(name)),
    "esd-all": layers(lambda name: True),
}
