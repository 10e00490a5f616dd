"""Everything that unlearning needs beforehand: replay set, forget set, surrogate set, Fisher.

    python examples/ddpm/prepare.py --pretrained_model_name_or_path outputs/digits --forget 0 \\
        --digits --output_dir outputs/digits_forget_0

replay.safetensors    images of the kept classes, sampled from the model
forget.safetensors    the real images of the forgotten classes, if a data set is named; GA,
                      SalUn and EraseDiff need them
surrogate.safetensors images of the null class, with --surrogate_images
fisher.safetensors    the Fisher at the model's weights over the replay set

Each file holds the hash of the model's weights and is made only once. The same command continues
where an interrupted one stopped. It uses one process; sampling 5000 images takes the most time.
"""

from __future__ import annotations

import json
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from diffusers import DDIMScheduler
from torch import Tensor

from ..diffusion import FisherBatches, fisher_loss, model_hash, sample_set
from ..errors import InputError
from ..files import load_tensors, locked, need_disk, save_tensors
from ..fisher import DiagonalFisher
from ..modules import parameter_bytes, tensor_hash
from ..training import data
from ..training.fields import at_least, option
from ..training.options import ddim_takes
from ..training.sources import DataOptions
from .models import Weights, load_unet


@dataclass(frozen=True, kw_only=True)
class Prepare(DataOptions):
    """Which sets are made, and how.

    Raises:
        InputError: a number is out of range.
    """

    pretrained_model_name_or_path: str = option(help="Folder that train.py made.")
    weights: Weights = option("trained", help="The weights that will be unlearned.")
    sample_weights: Weights | None = option(
        None, help="The weights that sample the sets. Default: those of --weights."
    )
    forget: list[str] = option(help="Classes to forget, by number or name.")
    replay_classes: list[str] | None = option(
        None, help="Classes to replay. Default: all that are kept."
    )
    replay_per_class: int = option(500, help="Images that are sampled of each replayed class.")
    surrogate_images: int = option(
        0, help="Images that are sampled of the null class, for --surrogate null_class."
    )
    num_inference_steps: int = option(50, help="DDIM steps of each image.")
    guidance_scale: float = option(
        3.0,
        help="Guidance: w of eps_null + w (eps_c - eps_null). 3 is what the DDPM code base "
        "calls 2.0.",
    )
    sample_batch_size: int = option(128, help="Images that are sampled at once.")
    no_fisher: bool = option(False, help="Do not estimate F.")
    fisher_images: int = option(500, help="Images of the replay set that F is estimated on.")
    fisher_timesteps: int = option(8, help="Timesteps of each image for F; an even number.")
    fisher_reduction: Literal["sum", "mean"] = option(
        "sum", help="Reduction of the loss for F, over C, H, W."
    )
    seed: int = option(0, help="Seed of everything that is random.")
    device: str = option(
        "cuda" if torch.cuda.is_available() else "cpu",
        help="Where the sets are made: cpu, cuda, cuda:1, ...",
    )
    output_dir: Path = option(help="Folder for the sets.")

    def __post_init__(self) -> None:
        at_least(
            self, 1, "replay_per_class", "num_inference_steps", "sample_batch_size", "fisher_images"
        )


def prepare(args: Prepare) -> None:
    """Make the sets and the Fisher that are missing in ``args.output_dir``.

    Raises:
        InputError: options, model or data do not fit, or files belong to another model or protocol.
    """
    out = args.output_dir
    model, scheduler, info = load_unet(args.pretrained_model_name_or_path, args.weights)
    ddim_takes(args, scheduler, "num_inference_steps")
    model, classes = model.to(args.device).eval(), info["classes"]
    sampler = model
    if args.sample_weights not in (None, args.weights):
        sampler, _, _ = load_unet(args.pretrained_model_name_or_path, args.sample_weights)
        sampler = sampler.to(args.device).eval()
    forget, replayed = split_classes(args.forget, args.replay_classes, classes)
    sampled = len(replayed) * args.replay_per_class + args.surrogate_images
    pixels = 4 * torch.Size(info["shape"]).numel()
    need_disk(out, 2 * sampled * pixels + 3 * parameter_bytes(model), "the sets and the Fisher")
    real = data.load_for(args, info) if args.given else None
    identity = {
        "model": model_hash(model),
        "sampled": model_hash(sampler),
        "forget": forget,
        "replayed": replayed,
    }
    claim(out, identity)
    with ExitStack() as held:
        try:
            held.enter_context(locked(out / ".lock", out))
        except RuntimeError as error:
            raise InputError(str(error)) from error
        ddim = DDIMScheduler.from_config(scheduler.config)
        options: dict[str, Any] = {
            "num_inference_steps": args.num_inference_steps,
            "guidance_scale": args.guidance_scale,
            "null_condition": info["null_class"] if args.guidance_scale != 1 else None,
            "batch_size": args.sample_batch_size,
            "seed": args.seed,
            "device": args.device,
        }
        labels = torch.tensor(replayed).repeat_interleave(args.replay_per_class)
        shape = tuple(info["shape"])
        try:
            images, labels = sample_set(
                out / "replay.safetensors", sampler, ddim, labels, shape, **options
            )
            if args.surrogate_images:
                null = torch.full((args.surrogate_images,), info["null_class"])
                options |= {"guidance_scale": 1.0, "null_condition": None, "seed": args.seed + 1}
                sample_set(out / "surrogate.safetensors", sampler, ddim, null, shape, **options)
            if real is not None:
                save_forget_set(out / "forget.safetensors", real.only(forget), identity)
            if not args.no_fisher:
                rows = torch.randperm(
                    len(labels), generator=torch.Generator().manual_seed(args.seed)
                )
                rows = rows[: args.fisher_images]
                batches = FisherBatches(
                    images[rows],
                    labels[rows],
                    scheduler,
                    timesteps=args.fisher_timesteps,
                    seed=args.seed,
                    device=args.device,
                )
                fisher = DiagonalFisher.estimate(
                    model,
                    fisher_loss(scheduler, reduction=args.fisher_reduction),
                    batches,
                    path=out / "fisher.safetensors",
                )
                spread = fisher.protocol["convergence"]
                print(f"Fisher over {len(rows)} images; relative standard error {spread}")
        except ValueError as error:  # a file belongs to another protocol
            raise InputError(str(error)) from error
    print(f"{len(labels)} replay images of {len(replayed)} classes in {out}")


def split_classes(
    forget: list[str], replay: list[str] | None, classes: list[str]
) -> tuple[list[int], list[int]]:
    """Return the numbers of the classes to forget and of those to replay.

    Raises:
        InputError: a class is unknown, all are forgotten, or one is in both lists.
    """
    gone = data.class_ids(forget, classes, "--forget")
    kept = [c for c in range(len(classes)) if c not in gone]
    if not kept:
        raise InputError("--forget names all classes; leave at least one to remember")
    replayed = data.class_ids(replay, classes, "--replay_classes") if replay else kept
    both = [classes[c] for c in replayed if c in gone]
    if both:
        raise InputError(
            f"--forget and --replay_classes overlap: {', '.join(both)} in both; remove them from "
            "one"
        )
    return gone, replayed


def claim(out: Path, identity: dict[str, Any]) -> None:
    """Make the folder, or check that it belongs to the same model and classes."""
    mark = out / "prepared.json"
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        try:
            before = json.loads(mark.read_text())
        except (OSError, ValueError) as error:
            raise InputError(
                f"--output_dir {out} is in use by something else; give another folder"
            ) from error
        other = [k for k in identity if before.get(k) != identity[k]]
        if other:
            k = other[0]
            raise InputError(
                f"--output_dir {out} was prepared with another {k} ({before.get(k)}; now "
                f"{identity[k]}); give another folder"
            )
    out.mkdir(parents=True, exist_ok=True)
    mark.write_text(json.dumps(identity, indent=1))


def save_forget_set(path: Path, real: data.Data, identity: dict[str, Any]) -> None:
    meta = {
        "kind": "forget set",
        "model": identity["model"],
        "source": real.source,
        "images": len(real.labels),
    }
    if path.exists():
        found = load_tensors(path)[1]
        if found != meta:
            raise ValueError(f"{path} is another forget set ({found}; now {meta}); delete it")
    else:
        save_tensors(path, {"images": real.images, "labels": real.labels}, meta)


class Prepared(NamedTuple):
    """What prepare.py made: pairs of images (n, C, H, W) in [-1, 1] and labels (n,)."""

    forget: list[int]
    replayed: list[int]
    replay: tuple[Tensor, Tensor]
    own: tuple[Tensor, Tensor] | None
    surrogate: tuple[Tensor, Tensor] | None
    fisher: DiagonalFisher | None

    def made_of(self) -> dict[str, str]:
        """Return hashes of the contents, for a run's manifest."""
        sets = {n: getattr(self, n) for n in ("replay", "own", "surrogate")}
        found = {n: tensor_hash(*pair) for n, pair in sets.items() if pair}
        return found | ({"fisher": tensor_hash(*self.fisher.values())} if self.fisher else {})


def read(folder: Path, model: str, args: Any, classes: list[str]) -> Prepared:
    """Read a folder that was prepared for the model with this hash.

    Raises:
        InputError: files are missing, or belong to another model; classes were not replayed.
    """
    try:
        made = json.loads((folder / "prepared.json").read_text())
    except (OSError, ValueError) as error:
        raise InputError(f"{folder} was not made by prepare.py: {error}") from error
    names = dict(enumerate(classes))
    given = args.forget or [names.get(c, str(c)) for c in made["forget"]]
    replay = args.replay_classes or [names.get(c, str(c)) for c in made["replayed"]]
    forget, replayed = split_classes(given, replay, classes)
    missing = sorted(set(replayed) - set(made["replayed"]))
    if missing:
        raise InputError(
            f"--replay_classes: {folder} has no images of {', '.join(classes[c] for c in missing)}"
        )
    found: dict[str, Any] = {}
    for name in ("replay", "forget", "surrogate", "fisher"):
        path = folder / f"{name}.safetensors"
        if not path.exists():
            if name == "replay":
                raise InputError(f"{path} is missing; run prepare.py to its end")
            continue
        try:
            tensors, meta = load_tensors(path)
        except ValueError as error:
            raise InputError(f"{error}; delete it and run prepare.py again") from error
        # replay images may be sampled with the average of the weights that are unlearned
        expected = made["sampled"] if name in ("replay", "surrogate") else model
        if made["model"] != model or meta.get("model") != expected:
            raise InputError(
                f"{path} belongs to another model ({folder} was prepared for {made['model']}, the "
                f"file is of {meta.get('model')}, this model is {model}); run prepare.py with this "
                "model and the weights that --start_from names"
            )
        found[name] = DiagonalFisher.load(path) if name == "fisher" else tensors
    own = found.get("forget")
    if own is not None:
        rows = torch.isin(own["labels"], torch.tensor(forget))
        own = data.to_float(own["images"][rows]), own["labels"][rows]
        own = own if set(own[1].tolist()) == set(forget) else None
    rows = torch.isin(found["replay"]["labels"], torch.tensor(replayed))
    pair = found["replay"]["images"][rows], found["replay"]["labels"][rows]
    null = found.get("surrogate")
    surrogate = (null["images"], null["labels"]) if null is not None else None
    return Prepared(forget, replayed, pair, own, surrogate, found.get("fisher"))
