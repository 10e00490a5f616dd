"""Open a result of unlearn.py, or any pipeline. A folder of changes is put into its base."""

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

#: Options that distinguish settings of a method, in addition to those of its optimizer.
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
    """The pipeline `model` itself; for a folder of changes, the base that they belong to.

    Args:
        base_model: the base, if it is not the one that ``unlearn.json`` names.

    Raises:
        InputError: the base is not given and ``unlearn.json`` does not name it.
    """
    name = model.pretrained_model_name_or_path
    if part(Path(name)):
        name = base_model or named_base(name)
    # these options may describe the base, a hub model or a file, while the result is a folder
    own = {f.name: getattr(model, f.name) for f in fields(Model)}
    own["pretrained_model_name_or_path"] = name
    if Path(name).is_dir():
        own |= {"revision": None, "variant": None}
    if not Path(name).is_file():
        own |= dict.fromkeys(("architecture", "prediction_type", "vae", "lora"))
    return Model(**own)


def load(model: Model, base_model: str | None = None) -> Any:
    """The pipeline of a hub id, a folder or a file, in float32 on the CPU.

    The changes in a `changed` or `lora` folder of unlearn.py are put into the base.

    Raises:
        InputError: weights are missing, or the changes do not fit the base.
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
    """Hashes of the content of a pipeline: its parts, and the changes that are put into it."""
    base, folder = whole(model, base_model), Path(model.pretrained_model_name_or_path)
    found = parts(fetch(base), base.variant)
    if changes := part(folder):
        found["changes"] = contents([folder / changes])
    return found


def part(folder: Path) -> str | None:
    """The name of the file of changes in a folder; None for a folder with a whole pipeline."""
    return next((f for f in (*CHANGED, LORA) if (folder / f).is_file()), None)


def erases_by_prompt(folder: Path) -> bool:
    """Whether a folder holds an SPM adapter, which is scaled for each prompt (see `transport`)."""
    try:
        said = json.loads((folder / "unlearn.json").read_text())
    except (OSError, ValueError):
        return False
    return part(folder) == LORA and said.get("method") == "spm"


def run_of(name: str) -> dict[str, Any]:
    """The run that made a model: method, a key of the method's settings, and seed.

    Without an ``unlearn.json`` it returns {}."""
    try:
        said = json.loads((_folder(name) / "unlearn.json").read_text())
        options = said["options"]
        settings = [said["settings"], *(options.get(name) for name in _SETTINGS)]
        found = {"method": said["title"], "settings": key(settings)[:6]}
        return {**found, "seed": int(options["seed"])}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}


def named_base(name: str) -> str:
    """The base model of a result, from the ``unlearn.json`` in its folder."""
    folder = _folder(name)
    try:
        return json.loads((folder / "unlearn.json").read_text())["base"]
    except (OSError, ValueError, KeyError) as error:
        raise InputError(
            f"--base_model is not given, and {folder} has no unlearn.json that names it: give the "
            "model before unlearning, a hub id, a folder or a file"
        ) from error


def _folder(name: str) -> Path:
    """The folder of a model: itself, or the one that its file is in."""
    path = Path(name)
    return path.parent if path.is_file() else path


@contextmanager
def held(folder: Path) -> Iterator[None]:
    """Create --output_dir and lock it for this process.

    Raises:
        InputError: another process writes into it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        try:
            stack.enter_context(locked(folder / ".lock", folder))
        except RuntimeError as error:
            raise InputError(f"--output_dir is in use: {error}") from error
        yield
