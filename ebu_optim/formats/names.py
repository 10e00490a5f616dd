"""Find the rows of a tensor in the file that are a given tensor of diffusers.

diffusers' own converters run once on tensors that hold row numbers instead of weights. Their output
shows where each row comes from. The converters only rename, split along the first dimension, swap
the halves of scale and shift, drop dimensions of size one, and transpose text_projection.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Mapping, Sequence
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..errors import InputError
from .architecture import Architecture
from .looking import PREFIXES, Checkpoint

Shape = tuple[int, ...]

#: Class of a transformer -> diffusers' function that converts the names in one file to its own.
CONVERTERS = {
    "SD3Transformer2DModel": "convert_sd3_transformer_checkpoint_to_diffusers",
    "FluxTransformer2DModel": "convert_flux_transformer_checkpoint_to_diffusers",
    "Flux2Transformer2DModel": "convert_flux2_transformer_checkpoint_to_diffusers",
    "ZImageTransformer2DModel": "convert_z_image_transformer_checkpoint_to_diffusers",
    "SanaTransformer2DModel": "convert_sana_transformer_to_diffusers",
}
#: Classes whose names in one file are diffusers' own.
UNCHANGED = ("QwenImageTransformer2DModel",)
#: Ends of names of tensors that no diffusers model has, and that do not affect images.
UNUSED = (".position_ids", ".logit_scale", "text_projection")

#: Such names in a transformer: one of Z-Image, and Sana's positions and empty prompt.
NEVER_READ = ("norm_final.weight", "pos_embed", "y_embedder.y_embedding")


class Rows(NamedTuple):
    """A tensor of diffusers as the rows ``first:last`` of the tensor `key` in the file.

    Attributes:
        transposed: the tensor is transposed in the file.
        swapped: its two halves are swapped in the file.
    """

    key: str
    first: int
    last: int
    transposed: bool
    swapped: bool = False

    def turned(self, t: Tensor) -> Tensor:
        """Convert the tensor from the file to diffusers, or back."""
        if self.swapped:
            return torch.cat(t.chunk(2)[::-1])
        return t.T if self.transposed else t


def table(checkpoint: Checkpoint, part: str, made: Architecture) -> dict[str, Rows]:
    """diffusers' names of a part's tensors -> their places in the file.

    Raises:
        InputError: the file lacks the part or some of its tensors, or has further tensors, other
            shapes or dtypes.
    """
    path = checkpoint.path
    if part not in checkpoint.parts:
        raise InputError(f"{path} has no {part}: give a file of the whole model{_remedy(part)}")
    entries = checkpoint.header.tensors
    keys = {canonical(checkpoint, part, k): k for k in checkpoint.keys(part)}
    targets = made.shapes(part)
    shapes = {ours: entries[k].shape for ours, k in keys.items()}
    found = rows(part, shapes, made.configs[part], targets)
    missing = sorted(targets.keys() - found.keys())
    used = {at.key for at in found.values()}
    extra = sorted(keys[k] for k in keys.keys() - used if not _unused(part, k, made))
    for what, names in (("lacks", missing), ("also holds", extra)):
        if names:
            raise InputError(
                f"{path}: its {part} {what} {some(names)} (identified as "
                f"{checkpoint.title}): give config= (--architecture), a diffusers folder of the "
                "same model, or another file"
            )
    for name, at in found.items():
        if (dtype := entries[keys[at.key]].dtype)[0] not in "FB" or dtype == "BOOL":
            raise InputError(
                f"{path}: {keys[at.key]} is {dtype}, which is not a dtype of weights: give the "
                "model in float32, float16, bfloat16 or float8"
            )
        if not fits(shapes[at.key], at, targets[name]):
            raise InputError(
                f"{path}: {keys[at.key]} has the shape {list(shapes[at.key])}, and {name} needs "
                f"{list(targets[name])}: give config= (--architecture), a diffusers folder of the "
                "same model"
            )
    return {name: at._replace(key=keys[at.key]) for name, at in found.items()}


def some(names: Sequence[str]) -> str:
    """The first two names, and the number of the others."""
    return ", ".join(names[:2]) + (f" and {len(names) - 2} more" if names[2:] else "")


def rows(
    part: str, shapes: Mapping[str, Shape], config: Mapping[str, Any], targets: Iterable[str]
) -> dict[str, Rows]:
    """diffusers' names -> rows of tensors in the file.

    Args:
        shapes: the shapes of the part's tensors by their names in a file, see `canonical`.
        config: the part's configuration.
        targets: diffusers' names; other tensors that the converter makes are ignored.
    """
    marked, starts, names, count = {}, [], [], 0
    for key, shape in shapes.items():
        n = shape[0] if shape else 1
        marked[key] = torch.arange(count, count + n).reshape(shape[:1] + (1,) * len(shape[1:]))
        starts.append(count)
        names.append(key)
        count += n
    wanted, found = set(targets), {}
    for name, ids in _converted(part, marked, config).items():
        # newer versions of transformers omit CLIP's `text_model.`, the converters do not
        name = name if name in wanted else name.removeprefix("text_model.")
        if name not in wanted or ids is None or not ids.numel():
            continue
        flat = ids.flatten()
        swapped = len(flat) > 1 and bool(flat[0] > flat[-1])
        flat = torch.cat(flat.chunk(2)[::-1]) if swapped else flat
        at = bisect_right(starts, int(flat[0])) - 1
        first = int(flat[0]) - starts[at]
        if not torch.equal(flat, torch.arange(len(flat)) + flat[0]):
            raise RuntimeError(f"diffusers made {name} of rows that are not consecutive")
        transposed = ids.dim() == 2 and len(ids) == 1 and len(flat) > 1
        found[name] = Rows(names[at], first, first + len(flat), transposed, swapped)
    return found


def _converted(part: str, state: dict[str, Tensor], config: Mapping[str, Any]) -> dict[str, Tensor]:
    from diffusers.loaders import single_file_utils as theirs

    if part == "transformer":
        kind = str(config.get("_class_name"))
        if kind in UNCHANGED:
            return state
        try:
            return getattr(theirs, CONVERTERS[kind])(state)
        except (KeyError, IndexError, RuntimeError) as error:
            raise InputError(
                f"diffusers cannot read this {kind} from one file ({error}): it supports only the "
                "sizes of the releases; give the model as a diffusers folder"
            ) from error
    if part == "unet":
        return theirs.convert_ldm_unet_checkpoint(state, config)
    if part == "vae":
        if any(".down_blocks." in name for name in state):  # a VAE's file with diffusers' names
            return {name.removeprefix(PREFIXES["sd1"]["vae"][0]): t for name, t in state.items()}
        return theirs.convert_ldm_vae_checkpoint(state, config)
    prefix = openclip_prefix(state)
    if prefix is None:
        return theirs.convert_ldm_clip_checkpoint(state)
    asked = SimpleNamespace(config=SimpleNamespace(hidden_size=config["hidden_size"]))
    return theirs.convert_open_clip_checkpoint(asked, state, prefix=prefix)


def openclip_prefix(names: Iterable[str]) -> str | None:
    for name in names:
        before, found, _ = name.partition("transformer.resblocks.")
        if found:
            return before
    return None


def canonical(checkpoint: Checkpoint, part: str, key: str) -> str:
    """The name of a tensor that diffusers' converters expect."""
    bare = key.removeprefix(checkpoint.parts[part])
    prefix = PREFIXES[checkpoint.family][part][0]
    if prefix.endswith(".transformer.") and bare.startswith(("embed", "encoder.", "final_layer")):
        bare = f"text_model.{bare}"  # early merges were saved without it
    return prefix + bare


def stored_shape(target: Shape, at: Rows) -> Shape:
    """The shape of these rows in the file, without trailing dimensions of size one."""
    return target[::-1] if at.transposed else target


def fits(shape: Shape, at: Rows, target: Shape) -> bool:
    """Whether the rows `at` of a tensor of shape `shape` have the shape `target`."""
    taken = (at.last - at.first, *shape[1:]) if shape else ()
    want = stored_shape(target, at)
    return taken[: len(want)] == want and all(n == 1 for n in taken[len(want) :])


def _unused(part: str, key: str, made: Architecture) -> bool:
    if part in ("unet", "transformer"):
        return key in NEVER_READ
    if part == "vae":  # remains of its training
        return key.startswith(("first_stage_model.loss.", "first_stage_model.model_ema."))
    # SD 2.x uses the output of the last layer but one, so diffusers does not build the last one
    last = f"resblocks.{made.configs[part]['num_hidden_layers']}."
    return key.endswith(UNUSED) or last in key


def _remedy(part: str) -> str:
    return ", or vae=, the file of a VAE" if part == "vae" else ""
