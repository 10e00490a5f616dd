"""The GPU memory that a run needs, counted on models without weights (meta tensors)."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from ..baselines import recipes
from ..diffusion.objectives import needs_teacher
from ..training.adversary import attacked
from ..training.method import fisher_source, needs
from . import quantized, sets, warm_start
from .families import Conditions
from .fused import Fused
from .modules import Prompted, choose
from .objectives import ANCHORS
from .pipelines import Looked
from .prompts import Prompts

Rows = dict[str, int]


class Cost(NamedTuple):
    """Bytes by phase and purpose, and the numbers of trained and frozen parameters."""

    phases: dict[str, Rows]
    trained: int
    frozen: int

    @property
    def peak(self) -> int:
        return max(sum(rows.values()) for rows in self.phases.values())

    def report(self) -> dict[str, Any]:
        """The entry in unlearn.json; "peak" can be compared with the measured memory."""
        there = {k: {n: v for n, v in rows.items() if v} for k, rows in self.phases.items()}
        return {"peak": self.peak, **there}

    def table(self) -> str:
        unit, name = (2**30, "GiB") if self.peak >= 2**30 else (2**20, "MiB")
        longest_first = sorted(self.phases.values(), key=len, reverse=True)
        lines = [f"  {name:<26}{''.join(f'{phase:>12}' for phase in self.phases)}"]
        for what in dict.fromkeys(row for rows in longest_first for row in rows):
            sizes = [rows.get(what) for rows in self.phases.values()]
            if any(sizes):
                cells = (f"{size / unit:12.2f}" if size else " " * 12 for size in sizes)
                lines.append(f"  {what:<26}{''.join(cells)}".rstrip())
        totals = (f"{sum(rows.values()) / unit:12.2f}" for rows in self.phases.values())
        lines.append(f"  {'in all':<26}{''.join(totals)}")
        return "\n".join([*lines, f"  {'peak':<26}{self.peak / unit:12.2f}"])


def count(args: Any, looked: Looked, prompts: Prompts) -> Cost:
    """The cost of --method with --train_modules on this pipeline, phase by phase.

    Weights, gradients and optimizer state are exact. Only the weights of the text encoders are
    counted. Activations are what autograd saves in a pass, or what is alive at once in a pass
    without autograd, in float32, with an attention that keeps no score matrix. The CUDA libraries
    take 1 GiB more.

    Raises:
        InputError: see `choose`.
    """
    args = looked.family.guided(args, looked.unet)
    half = args.mixed_precision in ("fp16", "bf16")
    with torch.device("meta"):
        unet = looked.family.kind(looked.family.denoiser).from_config(looked.unet)
        whole = _numel(unet.parameters())
        choose(unet, args, looked.family)
    warm_start.check(args, unet, looked.family)
    trained = _numel(p for p in unet.parameters() if p.requires_grad)
    frozen = _numel(unet.parameters()) - trained
    one = passes(unet, looked)
    source = fisher_source(args, "estimate")
    bits = 2 if half else 4
    small = quantized.saved(unet, args.quantize, looked.family.units, bits)
    copies = {"16-bit copies (autocast)": trained * 2 if half else 0}
    between = {
        "frozen weights": frozen * bits - small,
        "trained weights": trained * 4,
        "prompts": len(prompts.texts) * one.prompt,
        "adversaries": 4 * attacked(args) * one.prompt,  # value, gradient and Adam's two moments
        **_between_steps(args, trained, source),
    }
    encoders = text_encoders(looked)
    read = encoders // 2 if sets.halved(args, looked.family) else encoders
    phases = {"prompts": {"text encoders": read}} if read else {}
    if kinds := sets.kinds(args, prompts):
        phases["sets"] = _sets(args, looked, prompts, len(kinds), one, whole * bits - small)
    if source == "estimate":
        draws = args.fisher_timesteps // 2
        phases["Fisher"] = {
            "frozen weights": frozen * 4,
            "trained weights": trained * 4,
            "gradients": trained * 8,
            "F": trained * 4,
            **_larger({"activations": draws * one.kept}, {"the optimizer's step": trained * 4}),
        }
    if not recipes[args.method].edits:  # an edit in closed form is made on the CPU
        phases["unlearning"] = {
            **between,
            "gradients": trained * 4 * len(needs(args)),
            # the weights as they were, and a gradient beside the phases'
            "relearner": trained * 8 if args.relearner_steps else 0,
            **_larger(
                {**copies, "activations": _kept(args, one)},
                {"the optimizer's step": _step(args, trained)},
            ),
        }
    if args.validation_steps:
        guided = looked.family.passes(looked.unet, args.validation_guidance_scale)
        sampling = {**copies, "activations": guided * one.drawn}
        phases["validation"] = {**between, **_larger(sampling, one.decoded)}
    if getattr(args, "evidence_images", 0):  # an option of `ebu forget`
        width = 2 if sets.halved(args, looked.family) else 4  # see `takedown.pictures`
        phases["report"] = {"frozen weights": whole * width, **_report(args, looked, one, read)}
    return Cost(phases, trained, frozen)


def _between_steps(args: Any, trained: int, source: str | None) -> Rows:
    """Bytes that the optimizer holds from one step to the next."""
    penalty = recipes[args.method].build.keywords.get("penalty") != "none"
    held = source is not None and penalty and args.fisher != "none"
    return {
        "gradients": trained * 4,  # the last step's is held until the next
        "Adam's moments": trained * 8,
        "theta0": trained * 4 if held or needs_teacher(args) else 0,
        "the rule's own": trained * 4 * recipes[args.method].held,
        "F": trained * 4 if held else 0,
        "SalUn's mask": trained if recipes[args.method].masked else 0,
    }


def _sets(args: Any, looked: Looked, prompts: Prompts, kinds: int, one: Passes, unet: int) -> Rows:
    """Bytes while `kinds` sets are made, with a denoiser of `unet` bytes."""
    sampled = sets.sampled(args, looked, prompts)
    images = max((min(c, args.sample_batch_size) * each for c, each in sampled), default=0)
    encoding = one.encoded if len(sampled) < kinds else {}
    return _larger(
        {"frozen weights": unet if sampled else 0, "activations": images * one.drawn}, encoding
    )


def _report(args: Any, looked: Looked, one: Passes, encoders: int) -> Rows:
    """Bytes to generate a batch with the whole pipeline, without the denoiser's weights.

    The VAE's weights and the activations are counted in float32."""
    batch = min(args.sample_batch_size, args.evidence_images * max(args.evidence_prompts, 1))
    drawn = one.drawn * looked.family.passes(looked.unet, args.guidance_scale)
    most = batch * max(drawn, one.decoded["activations"])
    return {"text encoders": encoders, **one.decoded, "activations": most}


def _kept(args: Any, one: Passes) -> int:
    """Bytes that a batch keeps for its backward pass."""
    anchors = ANCHORS if recipes[args.method].adapter else 0
    # the forget losses of all adversaries are one sum
    kept = max(args.train_batch_size * (1 + attacked(args)), anchors)
    return kept * (one.kept_checkpointed if args.gradient_checkpointing else one.kept)


def _step(args: Any, trained: int) -> int:
    """Bytes that a step takes for a moment.

    On a GPU torch's Adam computes the square roots of all second moments at once. A method that
    freezes some weights also keeps a copy of the trained tensors, to put these back."""
    frozen = recipes[args.method].masked or args.method_options.get("unrelated") == "freeze"
    return trained * 4 * (2 if frozen else 1)


def _numel(tensors: Iterable[Tensor]) -> int:
    return sum(t.numel() for t in tensors)


def _larger(*rows: Rows) -> Rows:
    """The largest of rows that exist at different times."""
    return max(rows, key=lambda found: sum(found.values()))


class Passes(NamedTuple):
    """Bytes for one image and one prompt, see `passes`."""

    kept: int
    kept_checkpointed: int
    drawn: int
    decoded: Rows
    encoded: Rows
    prompt: int


def passes(unet: Any, looked: Looked) -> Passes:
    """Bytes that a forward pass keeps for its backward pass, and the peak without a backward pass.

    With gradient checkpointing a pass keeps the inputs of the units, the largest unit, and what is
    outside of all units."""
    family = looked.family
    shapes = family.shapes(unet.config, looked.tokenizer.model_max_length)
    with torch.device("meta"):
        each = {name: torch.empty(1, *shape) for name, shape in shapes.items()}
        shared = family.shared(looked.resolution, lambda _: torch.empty(1, *looked.latents))
        shared |= family.told(looked.unet, 1.0)
        model = Prompted(unet, Conditions(each, shared), family)
        vae = family.kind("vae").from_config(looked.vae)
        x, number = torch.empty(1, *looked.latents), torch.zeros(1, dtype=torch.long)
        frames = [1] * family.framed
        picture = torch.empty(1, 3, *frames, looked.resolution, looked.resolution)
    weights = _numel(vae.parameters()) * 4
    with Fused():
        with saved(unet, family.units) as (units, inputs):
            model(x, number, number)
        drawn = alive(model, lambda: model(x, number, number))
        decoded = {"VAE": weights, "activations": alive(vae, lambda: family.to_pixels(vae, x))}
        encoded = {"VAE": weights, "activations": alive(vae, lambda: vae.encode(picture))}
    recomputed = max((v for k, v in units.items() if k is not None), default=0)
    checkpointed = units.get(None, 0) + sum(inputs.values()) + recomputed
    prompt = _numel(each.values()) * 4
    return Passes(sum(units.values()), checkpointed, drawn, decoded, encoded, prompt)


def text_encoders(looked: Looked) -> int:
    """Bytes of the text encoders' weights in float32."""
    with torch.device("meta"):
        kinds = ((looked.family.kind(p), looked.configs.get(p)) for p in looked.family.encoders)
        found = [kind(kind.config_class.from_dict(dict(c))) for kind, c in kinds if c]
    return 4 * sum(_numel(encoder.parameters()) for encoder in found)


@torch.no_grad()
def alive(module: nn.Module, run: Callable[[], Any]) -> int:
    """The most bytes of tensors that exist at once in a pass without gradients."""
    with _Alive(module) as found:
        run()
    return found.peak


class _Alive(TorchDispatchMode):
    """Follows each storage that an operation creates until it is freed."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.now = self.peak = 0
        tensors = (*module.parameters(), *module.buffers())
        self.known = {t.untyped_storage()._cdata for t in tensors}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        for t in out if isinstance(out, (tuple, list)) else (out,):
            storage = t.untyped_storage() if isinstance(t, Tensor) else None
            if storage is not None and storage._cdata not in self.known:
                self.known.add(storage._cdata)
                self.now += storage.nbytes()
                weakref.finalize(storage, self.gone, storage._cdata, storage.nbytes())
        self.peak = max(self.peak, self.now)
        return out

    def gone(self, key: int, size: int) -> None:
        self.known.discard(key)
        self.now -= size


@contextmanager
def saved(
    unet: nn.Module, kinds: Collection[str]
) -> Iterator[tuple[dict[Any, int], dict[Any, int]]]:
    """Counts the bytes that autograd saves inside the block, and those of the units' inputs.

    Both are by the name of a unit of gradient checkpointing, a module whose class is in `kinds`;
    the key None is what is outside of all units. Each storage counts once, parameters not at all.
    """
    units: dict[Any, int] = {}
    inputs: dict[Any, int] = {}
    inside: list[str] = []
    alive: dict[int, Tensor] = {}  # holds the storages: a new one could reuse a freed address
    weights = {p.untyped_storage()._cdata for p in unet.parameters()}

    def pack(t: Tensor) -> Tensor:
        storage = t.untyped_storage()
        if storage._cdata not in weights and storage._cdata not in alive:
            alive[storage._cdata] = t
            key = inside[-1] if inside else None
            units[key] = units.get(key, 0) + storage.nbytes()
        return t

    def enter(name: str, args: tuple[Any, ...], named: dict[str, Any]) -> None:
        inside.append(name)
        given = args or named.values()  # transformers call their blocks with keyword arguments
        inputs[name] = sum(a.numel() * a.element_size() for a in given if isinstance(a, Tensor))

    handles = []
    for name, module in unet.named_modules():
        if type(module).__name__ in kinds:
            begin = module.register_forward_pre_hook(
                lambda _, args, named, name=name: enter(name, args, named), with_kwargs=True
            )
            handles += [begin, module.register_forward_hook(lambda *_: inside.pop() and None)]
    try:
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            yield units, inputs
    finally:
        for handle in handles:
            handle.remove()
