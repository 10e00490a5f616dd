"""Which rows of which tensor in the file are a tensor of diffusers'.

diffusers' own converters say so: they are run once on tensors that hold numbers of rows instead of
weights, and what comes out tells where each row came from. All they do is to rename, to split along
the first dimension, to swap the halves of scale and shift, to drop dimensions of one and to
transpose text_projection.
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

#: Class of a transformer -> diffusers' function from one file's names to its own.
CONVERTERS = {
    "SD3Transformer2DModel": "convert_sd3_transformer_checkpoint_to_diffusers",
    "FluxTransformer2DModel": "convert_flux_transformer_checkpoint_to_diffusers",
    "Flux2Transformer2DModel": "convert_flux2_transformer_checkpoint_to_diffusers",
    "ZImageTransformer2DModel": "convert_z_image_transformer_checkpoint_to_diffusers",
    "SanaTransformer2DModel": "convert_sana_transformer_to_diffusers",
}
#: Whose names in one file are diffusers' own.
UNCHANGED = ("QwenImageTransformer2DModel",)
#: Ends of names in a part that no model of diffusers has, and that decide nothing of a picture.
UNUSED = (".position_ids", ".logit_scale", "text_projection")

#: Of a transformer: Z-Image's, and Sana's places and empty prompt.
NEVER_READ = ("norm_final.weight", "pos_embed", "y_embedder.y_embedding")


class Rows(NamedTuple):
    """A tensor of diffusers', as rows ``first:last`` of the tensor `key` in the file, which are
    columns there, or whose halves have changed places."""

    key: str
    first: int
    last: int
    transposed: bool
    swapped: bool = False

    def turned(self, t: Tensor) -> Tensor:
        """From the file's to diffusers', and back."""
        if self.swapped:
            return torch.cat(t.chunk(2)[::-1])
        return t.T if self.transposed else t


def table(checkpoint: Checkpoint, part: str, made: Architecture) -> dict[str, Rows]:
    """diffusers' names of a part -> where its tensors are in the file.

    Raises:
        InputError: the file lacks the part or tensors of it, has others, or other shapes.
    """
    path = checkpoint.path
    if part not in checkpoint.parts:
        raise InputError(f"{path} holds no {part}: give a file of the whole model{_remedy(part)}")
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
                f"{path}: its {part} {what} {some(names)} (taken for "
                f"{checkpoint.title}): give config=, a diffusers folder of the same model, or "
                "another file"
            )
    for name, at in found.items():
        if (dtype := entries[keys[at.key]].dtype)[0] not in "FB" or dtype == "BOOL":
            raise InputError(
                f"{path}: {keys[at.key]} is {dtype}, which is no weight: give the model in "
                "float32, float16, bfloat16 or float8"
            )
        if not fits(shapes[at.key], at, targets[name]):
            raise InputError(
                f"{path}: {keys[at.key]} is {list(shapes[at.key])}, which is no {name} of "
                f"{list(targets[name])}: give config=, a diffusers folder of the same model"
            )
    return {name: at._replace(key=keys[at.key]) for name, at in found.items()}


def some(names: Sequence[str]) -> str:
    """The first two, and how many more."""
    return ", ".join(names[:2]) + (f" and {len(names) - 2} more" if names[2:] else "")


def rows(
    part: str, shapes: Mapping[str, Shape], config: Mapping[str, Any], targets: Iterable[str]
) -> dict[str, Rows]:
    """Args:
    shapes: of the part's tensors, by their names in a file, as `canonical` has them.
    config: of the part.
    targets: diffusers' names; what the converter makes beside them is left out.
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
        # transformers has flattened CLIPTextModel, the converters have not
        name = name if name in wanted else name.removeprefix("text_model.")
        if name not in wanted or ids is None or not ids.numel():
            continue
        flat = ids.flatten()
        swapped = len(flat) > 1 and bool(flat[0] > flat[-1])
        flat = torch.cat(flat.chunk(2)[::-1]) if swapped else flat
        at = bisect_right(starts, int(flat[0])) - 1
        first = int(flat[0]) - starts[at]
        if not torch.equal(flat, torch.arange(len(flat)) + flat[0]):
            raise RuntimeError(f"diffusers made {name} of rows that do not follow each other")
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
                f"diffusers cannot read this {kind} from one file ({error}): it knows the sizes of "
                "the releases; give the model as a diffusers folder"
            ) from error
    if part == "unet":
        return theirs.convert_ldm_unet_checkpoint(state, config)
    if part == "vae":
        if any(".down_blocks." in name for name in state):  # a VAE's file may be diffusers' own
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
    """A tensor's name as diffusers' converters know it."""
    bare = key.removeprefix(checkpoint.parts[part])
    prefix = PREFIXES[checkpoint.family][part][0]
    if prefix.endswith(".transformer.") and bare.startswith(("embed", "encoder.", "final_layer")):
        bare = f"text_model.{bare}"  # as early merges were saved
    return prefix + bare


def stored_shape(target: Shape, at: Rows) -> Shape:
    """Of these rows in the file, without dimensions of one at the end."""
    return target[::-1] if at.transposed else target


def fits(shape: Shape, at: Rows, target: Shape) -> bool:
    """Whether the rows `at` of a tensor of this shape are one of the shape `target`."""
    taken = (at.last - at.first, *shape[1:]) if shape else ()
    want = stored_shape(target, at)
    return taken[: len(want)] == want and all(n == 1 for n in taken[len(want) :])


def _unused(part: str, key: str, made: Architecture) -> bool:
    if part in ("unet", "transformer"):
        return key in NEVER_READ
    if part == "vae":  # what its training left
        return key.startswith(("first_stage_model.loss.", "first_stage_model.model_ema."))
    # SD 2.x takes the layer before the last, which is not built
    last = f"resblocks.{made.configs[part]['num_hidden_layers']}."
    return key.endswith(UNUSED) or last in key


def _remedy(part: str) -> str:
    return ", or vae=, the file of one" if part == "vae" else ""
