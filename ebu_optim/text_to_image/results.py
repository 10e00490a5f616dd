"""Open what unlearn.py left, or any pipeline: a folder of changes is put into its base."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import fields
from pathlib import Path
from typing import Any

from safetensors.torch import load_file

from ..errors import InputError
from ..files import locked
from ..manifest import contents, key
from .families import FAMILIES, of_folder
from .pipelines import Model, assembled, fetch, parts
from .save import changed_name

#: Options that make another setting of a method, beside its optimizer's own.
_SETTINGS = (
    "learning_rate",
    "max_train_steps",
    "train_batch_size",
    "train_modules",
    "method_options",
    "forget_loss",
    "remember",
)
LORA = "pytorch_lora_weights.safetensors"
CHANGED = tuple(dict.fromkeys(map(changed_name, FAMILIES.values())))


def whole(model: Model, base_model: str | None = None) -> Model:
    """The pipeline `model` itself; where that is a folder of changes, the one they belong to.

    Args:
        base_model: its name, if not what ``unlearn.json`` says.

    Raises:
        InputError: nothing says which.
    """
    name = model.pretrained_model_name_or_path
    if part(Path(name)):
        name = base_model or named_base(name)
    # the base may be a variant of the hub's or a file, and the result a folder
    own = {f.name: getattr(model, f.name) for f in fields(Model)}
    own["pretrained_model_name_or_path"] = name
    if Path(name).is_dir():
        own |= {"revision": None, "variant": None}
    if not Path(name).is_file():
        own |= dict.fromkeys(("architecture", "prediction_type", "vae", "lora"))
    return Model(**own)


def load(model: Model, base_model: str | None = None) -> Any:
    """The pipeline of a hub id or a folder; or what unlearn.py changed, its
    `changed` or `lora` folder, put into the base.

    Raises:
        InputError: weights that are not whole; the changes do not fit the base.
    """
    folder, base = Path(model.pretrained_model_name_or_path), whole(model, base_model)
    where = fetch(base)
    family = of_folder(where)
    pipe = assembled(where, base.variant, **family.opened)
    denoiser = getattr(pipe, family.denoiser)
    kind = part(folder)
    if kind in CHANGED:
        state, ours = load_file(folder / kind), denoiser.state_dict()
        other = [n for n, t in state.items() if n not in ours or ours[n].shape != t.shape]
        if other:
            raise InputError(
                f"{folder} does not fit --base_model {base_model}, which has no such {other[0]}"
            )
        denoiser.load_state_dict(state, strict=False)
    elif kind == LORA:
        try:
            pipe.load_lora_weights(folder, weight_name=LORA)
        except (RuntimeError, ValueError) as error:
            raise InputError(f"{folder} does not fit --base_model {base_model}: {error}") from error
        pipe.fuse_lora()
        pipe.unload_lora_weights()
    return pipe


def made_of(model: Model, base_model: str | None = None) -> dict[str, str]:
    """What a pipeline is, by content: its parts, and the changes that are put into it."""
    base, folder = whole(model, base_model), Path(model.pretrained_model_name_or_path)
    found = parts(fetch(base), base.variant)
    if changes := part(folder):
        found["changes"] = contents([folder / changes])
    return found


def part(folder: Path) -> str | None:
    """The file of changes in a folder, where it holds no whole pipeline."""
    return next((f for f in (*CHANGED, LORA) if (folder / f).is_file()), None)


def erases_by_prompt(folder: Path) -> bool:
    """Whether a folder holds an SPM adapter, which is scaled for each prompt (see `transport`)."""
    try:
        said = json.loads((folder / "unlearn.json").read_text())
    except (OSError, ValueError):
        return False
    return part(folder) == LORA and said.get("method") == "spm"


def run_of(name: str) -> dict[str, Any]:
    """What run left a model: its method, a key of the method's settings and the seed; of one that
    no ``unlearn.json`` speaks of, {}."""
    path = Path(name)
    folder = path if path.is_dir() else path.parent
    try:
        said = json.loads((folder / "unlearn.json").read_text())
        options = said["options"]
        settings = [said["settings"], *(options.get(name) for name in _SETTINGS)]
        found = {"method": said["title"], "settings": key(settings)[:6]}
        return {**found, "seed": int(options["seed"])}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}


def named_base(name: str) -> str:
    """Of which model the folder `name` holds the changes, as its ``unlearn.json`` says."""
    try:
        return json.loads((Path(name) / "unlearn.json").read_text())["base"]
    except (OSError, ValueError, KeyError) as error:
        raise InputError(
            f"--base_model is not given, and {name} has no unlearn.json that names it: give the "
            "model before unlearning, a hub id or a folder"
        ) from error


@contextmanager
def held(folder: Path) -> Iterator[None]:
    """--output_dir, made, for this process alone.

    Raises:
        InputError: another process writes there.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        try:
            stack.enter_context(locked(folder / ".lock", folder))
        except RuntimeError as error:
            raise InputError(f"--output_dir is in use: {error}") from error
        yield
