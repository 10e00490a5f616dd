"""Functions on modules that several parts of the package need."""

from __future__ import annotations

import copy
import hashlib
import io
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .errors import InputError


@contextmanager
def evaluating(*models: Any) -> Iterator[None]:
    """Set eval mode inside the block; afterwards every submodule has its former mode again."""
    modules = [m for model in models if isinstance(model, nn.Module) for m in model.modules()]
    modes = [m.training for m in modules]
    for m in modules:
        m.training = False
    try:
        yield
    finally:
        for m, mode in zip(modules, modes, strict=True):
            m.training = mode


@contextmanager
def without_gradients() -> Iterator[None]:
    """Apply torch.no_grad to passes of a model that may be trained, under autocast too.

    Autocast keeps its 16-bit copies of the weights until its block ends. torch 2.4 also uses a
    copy that was made without a gradient in later passes, in which Conv and Linear layers then get
    no gradient. So the copies are cleared at the end of the block. They are not disabled, because
    the many passes of sampling share one copy.
    """
    try:
        with torch.no_grad():
            yield
    finally:
        torch.clear_autocast_cache()


def whole_model(kind: Any, folder: Any, **options: Any) -> Any:
    """Return the model that ``kind.from_pretrained(folder)`` of diffusers or transformers reads.

    Raises:
        InputError: the weights cannot be read, have other shapes, or lack a tensor. The libraries
            leave a missing tensor uninitialized, and an error would come much later.
    """
    try:
        model, info = kind.from_pretrained(folder, output_loading_info=True, **options)
    except (RuntimeError, ValueError) as error:  # the shapes differ
        first = str(error).strip().splitlines()[0]
        raise InputError(f"{folder}: the weights do not fit its configuration: {first}") from error
    # transformers computes position_ids and does not store them
    missing = sorted(n for n in info["missing_keys"] if not n.endswith("position_ids"))
    if missing:
        raise InputError(
            f"{folder}: the weights lack {missing[0]}"
            f"{f' and {len(missing) - 1} more' if missing[1:] else ''}: the file is incomplete or "
            "belongs to another model; get the files again"
        )
    return model


def tensors_in(tree: Any) -> Iterator[Tensor]:
    """Yield the tensors in nested mappings, lists and tuples."""
    if isinstance(tree, Tensor):
        yield tree
    elif isinstance(tree, Mapping):
        for value in tree.values():
            yield from tensors_in(value)
    elif isinstance(tree, (list, tuple)):
        for value in tree:
            yield from tensors_in(value)


def copied(model: nn.Module) -> nn.Module:
    """Return a deep copy, also of a model that computes some weights from others.

    weight_norm, spectral_norm and pruning leave the weight of the last forward pass on the module
    together with its autograd graph, which torch cannot copy. The copy holds the values of that
    weight until its own forward pass.
    """
    attributes = (vars(module) for module in model.modules())
    computed = {id(t): t.detach().clone() for t in tensors_in(list(attributes)) if not t.is_leaf}
    return copy.deepcopy(model, computed)


def tensor_hash(*tensors: Tensor) -> str:
    """Return the SHA-256 over dtypes, shapes and bytes, 16 hex digits."""
    return _hash({str(i): t for i, t in enumerate(tensors)})


def plain_name(name: str) -> str:
    """Return the name that a parameter has without torch.compile's wrappers around its modules."""
    return ".".join(part for part in name.split(".") if part != "_orig_mod")


def model_hash(model: nn.Module) -> str:
    """Return the SHA-256 over the names, dtypes, shapes and bytes of the weights, 16 hex digits.

    The hash also covers what modules return from ``get_extra_state``. torch.compile does not
    change it.

    Raises:
        TypeError: an extra state holds something other than tensors and plain values.
    """
    return _hash({plain_name(name): entry for name, entry in model.state_dict().items()})


def _hash(entries: Mapping[str, Any]) -> str:
    digest = hashlib.sha256()
    for name, entry in sorted(entries.items()):
        for text, data in _contents(name, entry):
            digest.update(text.encode())
            digest.update(data)
    return digest.hexdigest()[:16]


#: Types with a `repr` that identifies the value.
PLAIN = (type(None), bool, int, float, complex, str, torch.dtype, torch.device)


def _contents(name: str, entry: Any) -> Iterator[tuple[str, Any]]:
    """Yield what identifies an entry of a state dict, piece by piece: a heading and bytes.

    The bytes of a tensor on the CPU are its own memory, not a copy.
    """
    if type(entry).__module__.startswith("torchao."):  # quantized: a tensor of tensors
        yield f"{name} {type(entry).__name__} {entry.dtype} {tuple(entry.shape)}", b""
        for inner in entry.__tensor_flatten__()[0]:
            yield from _contents(f"{name}.{inner}", getattr(entry, inner))
    elif isinstance(entry, Tensor):
        flat = entry.detach().cpu().contiguous().flatten()
        yield f"{name} {entry.dtype} {tuple(entry.shape)}", flat.view(torch.uint8).numpy().data
    elif isinstance(entry, PLAIN):
        yield f"{name} {type(entry).__name__}", repr(entry).encode()
    elif isinstance(entry, (bytes, bytearray)):
        yield f"{name} bytes {len(entry)}", entry
    elif isinstance(entry, io.BytesIO):
        yield from _contents(name, entry.getvalue())
    elif isinstance(entry, (np.ndarray, np.generic)) and not entry.dtype.hasobject:
        yield f"{name} {entry.dtype.str} {entry.shape}", entry.tobytes()
    elif isinstance(entry, (Mapping, list, tuple)):
        pairs = entry.items() if isinstance(entry, Mapping) else enumerate(entry)
        kind = "mapping" if isinstance(entry, Mapping) else "list"
        yield f"{name} {kind} {len(entry)}", b""
        for key, inner in sorted(pairs, key=lambda pair: repr(pair[0])):
            yield from _contents(f"{name}[{key!r}]", inner)
    else:
        raise TypeError(
            f"the extra state {name} holds a {type(entry).__name__}, which cannot be hashed by its "
            "contents; give tensors, numbers, text, bytes, or lists or dicts of these"
        )


def stream(seed: int, i: int) -> torch.Generator:
    """Return the i-th generator of a seed, on the CPU.

    `seed` and `i` are mixed into 32 bits, because a CPU generator keeps 32 bits of its seed.
    """
    mixed = seed * 0x9E3779B1 + (seed >> 32) * 0x85EBCA6B + i
    return torch.Generator().manual_seed(mixed % 2**32)


def parameter_bytes(model: nn.Module) -> int:
    """Return the bytes of the weights and buffers."""
    held = (t for t in model.state_dict().values() if isinstance(t, Tensor))
    return sum(t.numel() * t.element_size() for t in held)


#: The name of a diffusers hook -> the method that adds it, and what it does.
HOOKS = {
    "group_offloading": ("enable_group_offload", "moves weights away between the passes"),
    "layerwise_casting": ("enable_layerwise_casting", "rounds the weights between the passes"),
}


def refuse_hooks(model: nn.Module, what: str, kinds: Iterable[str] = tuple(HOOKS)) -> None:
    """Raise ValueError if diffusers' hooks move or round the weights of a model.

    Args:
        what: the name of the model, in the message.
        kinds: the hooks to look for, keys of `HOOKS`.
    """
    for module in model.modules():
        there = getattr(getattr(module, "_diffusers_hook", None), "hooks", {})
        if kind := next((kind for kind in kinds if kind in there), None):
            call, does = HOOKS[kind]
            raise ValueError(
                f"{what}: diffusers' {call}() {does}, so that gradients or results are wrong; "
                "give the model without this hook"
            )
