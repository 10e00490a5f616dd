"""Which weights of the denoiser are trained, and a denoiser whose conditions are prompt numbers."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from ..baselines import recipes
from ..errors import InputError
from ..training.fields import option
from . import edits
from .families import STABLE_DIFFUSION, Conditions, Family, join, split
from .families.unets import Choice
from .quantized import Quantize

Modules = Literal[
    "xattn",
    "noxattn",
    "selfattn",
    "attention",
    "single",
    "context",
    "full",
    "notime",
    "xlayer",
    "selflayer",
    "esd-x",
    "esd-x-strict",
    "esd-u",
    "esd-all",
    "lora",
]


@dataclass(frozen=True, kw_only=True)
class ModuleOptions:
    """Which weights are trained."""

    group: ClassVar[str] = "what is trained"

    train_modules: Modules | None = option(
        None,
        help="Parts of the denoiser that are trained. Default: xattn; for `ebu forget` the "
        "preset's. SPM trains its own adapters; uce, rece and speed edit their own layers.",
    )
    rank: int = option(4, help="Rank of a LoRA.")
    lora_alpha: float | None = option(None, help="Alpha of a LoRA. Default: its rank.")
    lora_target_modules: list[str] | None = option(
        None,
        help="Layers that get a LoRA: names or ends of names. Default: the cross attention of a "
        "UNet, all attention of a transformer.",
    )
    quantize: Quantize | None = option(
        None,
        help="Keep the frozen weights under a LoRA in 8 bits (int8, by torchao) or in 4 "
        "(nf4, by bitsandbytes).",
    )
    gradient_checkpointing: bool = option(
        False,
        help="Recompute activations in the backward pass: less memory, about a third more time.",
    )

    def check_modules(self) -> None:
        """Check the values.

        Raises:
            InputError: a value is out of range, or --quantize without a LoRA.
        """
        if self.rank < 1:
            raise InputError(f"--rank must be >= 1; got {self.rank}")
        if self.lora_alpha is not None and not 0 < self.lora_alpha < math.inf:
            raise InputError(f"--lora_alpha must be finite, > 0; got {self.lora_alpha}")
        if self.quantize is not None and self.train_modules != "lora":
            raise InputError(
                f"--quantize {self.quantize}: --train_modules {self.train_modules} trains the "
                "weights themselves, and only frozen weights can be quantized: give "
                "--train_modules lora"
            )


def is_adapter(args: Any) -> bool:
    return recipes[args.method].adapter or args.train_modules == "lora"


def choose(unet: Any, args: Any, family: Family = STABLE_DIFFUSION) -> None:
    """Set requires_grad of the denoiser's parameters; add the adapter if one is trained.

    Raises:
        InputError: nothing is selected, or a LoRA target does not exist. Nothing was changed then.
    """
    unread = family.unread(unet.config)
    if not is_adapter(args):
        if recipes[args.method].edits:
            edited = edits.layers(unet, args.method)
            wanted: Choice = lambda name, _: name in edited  # noqa: E731
        else:
            wanted = family.modules[args.train_modules]
        owner = {
            f"{name}.{n}" if name else n: module
            for name, module in unet.named_modules()
            for n, _ in module.named_parameters(recurse=False)
        }
        chosen = [
            n
            for n, _ in unet.named_parameters()
            if wanted(n, owner[n]) and not n.startswith(unread)
        ]
        if not chosen:
            raise InputError(
                f"--train_modules {args.train_modules} selects no parameter of this UNet: choose "
                f"another of {', '.join((*family.modules, 'lora'))}"
            )
        unet.requires_grad_(False)
        for n in chosen:
            unet.get_parameter(n).requires_grad_(True)
        return
    from peft import LoraConfig

    spm = recipes[args.method].adapter
    rank = 1 if spm else args.rank
    alpha = 1 if spm else rank if args.lora_alpha is None else args.lora_alpha
    if spm:
        targets = spm_layers(unet)
    else:
        targets = lora_layers(unet, args.lora_target_modules or family.lora_targets)
        targets = [n for n in targets if not n.startswith(unread)]
    unet.requires_grad_(False)
    with torch.random.fork_rng():  # the same adapter whatever was sampled before
        torch.manual_seed(args.seed)
        unet.add_adapter(LoraConfig(r=rank, lora_alpha=alpha, target_modules=targets))
    for p in unet.parameters():
        if p.requires_grad:
            p.data = p.data.float()


def lora_layers(unet: nn.Module, ends: Sequence[str]) -> list[str]:
    """Full names of the layers whose names are, or end in, one of `ends`."""
    layers = [n for n, m in unet.named_modules() if isinstance(m, (nn.Linear, nn.Conv2d))]
    found: list[str] = []
    for end in ends:
        ours = [n for n in layers if n == end or n.endswith(f".{end}")]
        if not ours:
            there = sorted(
                {
                    n.rpartition(".")[2] if not n[-1].isdigit() else ".".join(n.split(".")[-2:])
                    for n in layers
                }
            )
            raise InputError(
                f"--lora_target_modules {end}: the denoiser has no such Linear or Conv2d layer; "
                f"their names end in {', '.join(there)}"
            )
        found += ours
    return sorted(set(found))


def spm_layers(unet: nn.Module) -> list[str]:
    """The layers that SPM adapts: every Linear and Conv2d under a Transformer2DModel."""
    inside = [n for n, m in unet.named_modules() if type(m).__name__ == "Transformer2DModel"]
    found = [
        n
        for n, m in unet.named_modules()
        if isinstance(m, (nn.Linear, nn.Conv2d)) and n.startswith(tuple(f"{t}." for t in inside))
    ]
    if not found:
        raise InputError("--method spm: the UNet has no Transformer2DModel to put adapters into")
    return found


def halve_frozen(unet: nn.Module, dtype: torch.dtype) -> None:
    """Cast the frozen weights of Linear and Conv2d layers, which are almost all, to 16 bits.

    Autocast computes these layers in 16 bits anyway."""
    for module in unet.modules():
        if isinstance(module, (nn.Linear, nn.Conv2d)):
            for p in module.parameters(recurse=False):
                if not p.requires_grad:
                    p.data = p.data.to(dtype)


class Prompted(nn.Module):
    """A denoiser whose condition is the number of a prompt, passed as ``class_labels``.

    The losses, sets and Fisher of class-conditional models therefore work unchanged. Conditions can
    also be given by name, such as ``encoder_hidden_states``, instead of numbers or to override
    single conditions of these.

    Args:
        conditions: the conditions of all prompts; a tensor means text embeddings (n, L, D).
        family: the denoiser's family.
    """

    def __init__(
        self, denoiser: Any, conditions: Tensor | Conditions, family: Family = STABLE_DIFFUSION
    ) -> None:
        super().__init__()
        self.family, (each, shared) = family, Conditions.of(conditions)
        self.add_module(family.denoiser, denoiser)
        self.shapes = {name: t.shape[1:] for name, t in each.items()}
        self.masks = tuple(name for name in each if name in family.masks)
        said = {name: t for name, t in each.items() if name not in self.masks}
        self.class_embedding = nn.Embedding.from_pretrained(join(said).flatten(1), freeze=True)
        self.config = SimpleNamespace(num_class_embeds=len(self.class_embedding.weight))
        self.shared = tuple(shared)
        for name, t in {**shared, **{name: each[name] for name in self.masks}}.items():
            self.register_buffer(name, t)

    @property
    def denoiser(self) -> Any:
        return self.get_submodule(self.family.denoiser)

    def condition(self, class_labels: Tensor) -> dict[str, Tensor]:
        """The conditions of numbered prompts (n,), by name, each with n rows."""
        of = {name: shape for name, shape in self.shapes.items() if name not in self.masks}
        masks = {name: self.get_buffer(name)[class_labels] for name in self.masks}
        return split(self.class_embedding(class_labels), of) | masks

    def forward(
        self, x_t: Tensor, t: Tensor, class_labels: Tensor | None = None, **given: Tensor
    ) -> Tensor:
        told = {} if class_labels is None else self.condition(class_labels)
        told |= given
        if missing := self.shapes.keys() - told.keys():
            raise ValueError(
                f"{self.family.name} needs the conditions {', '.join(self.shapes)}; "
                f"{sorted(missing)[0]} is missing: give class_labels, or all of them"
            )
        told |= {name: self.get_buffer(name) for name in self.shared}
        return self.family.predict(self.denoiser, x_t, t, told)

    def guide(self, null: Tensor, text: Tensor, scale: float) -> Tensor:
        return self.family.guide(null, text, scale)

    def trained(self) -> dict[str, Tensor]:
        return {n: p for n, p in self.denoiser.named_parameters() if p.requires_grad}


class Trained:
    """The part of the model that a checkpoint holds: the trained tensors."""

    def __init__(self, model: Prompted) -> None:
        self.model = model

    def state_dict(self) -> dict[str, Tensor]:
        return {n: p.detach() for n, p in self.model.trained().items()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        ours = self.model.trained()
        if ours.keys() != state.keys():
            raise ValueError(
                f"checkpoint with other trained tensors: {sorted(ours.keys() ^ state.keys())[:3]}"
            )
        with torch.no_grad():
            for n, p in ours.items():
                p.copy_(state[n])


class Theta0:
    """The pretrained weights for `ebu_optim.diffusion.anchored`, if the optimizer keeps none."""

    def __init__(self, model: Prompted) -> None:
        self.held = {p: p.detach().clone() for p in model.trained().values()}

    def anchors(self) -> dict[Tensor, Tensor]:
        return self.held
