"""The text-to-image experiments at the paper's scale, on Stable Diffusion 1.4 from the hub.

The models are judged by ResNet-50, NudeNet, CLIP, LPIPS and FID, and attacked. None of this has
been run, as it needs a GPU."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from ..errors import InputError
from ..files import replacing
from . import rows, text_results
from .runs import Options, Run, Task, task
from .text_tasks import Target
from .text_worlds import ATTACK, EVALUATE, UNLEARN


class PaperWorld(NamedTuple):
    """A model at the paper's scale.

    Attributes:
        seconds: guesses for a step of unlearning or of an attack, and for an image.
    """

    name: str
    title: str
    pipeline: str | Path  # hub id or folder
    unlearn: Options
    drawn: Options
    attack: Options
    seconds: Mapping[str, float]
    basis: str
    smoke: str | None = None


DRAWN = {"num_inference_steps": 50, "guidance_scale": 7.5, "sample_batch_size": 8}
SD14 = PaperWorld(
    "sd14",
    "Stable Diffusion 1.4",
    "CompVis/stable-diffusion-v1-4",
    # sections 5.3 and B.4: images of the empty prompt are remembered and are the surrogate
    {
        "remember_prompts": [""],
        "surrogate_prompt": [""],
        "train_modules": "xattn",
        "train_batch_size": 1,
        "mixed_precision": "bf16",
        "logging_steps": 50,
    },
    DRAWN,
    {
        **DRAWN,
        "attack_images": 32,
        "target_images": 64,
        "inversion_steps": 200,
        "relearn_max_steps": 50,
    },
    {"unlearn": 0.5, "picture": 0.7},
    "a guess for one H100, never measured; each model takes 4 GB of disk",
)


#: Metric of an evaluation -> the option for the file of its weights; without a file they are
#: downloaded. ResNet-50 also judges attacks.
WEIGHTS = {
    "imagenette": "resnet_weights",
    "clip_score": "clip_weights",
    "lpips": "alexnet_weights",
    "fid": "inception_weights",
}


class PaperSetting:
    """A task on the paper's model in a folder, with the interface of `TextSetting`.

    Args:
        real_images: a folder of real images of the kept classes, for FID.
        weights: option in `WEIGHTS` -> file.
    """

    regime, loss, surrogate, modules = "empty", "replay", "empty", "xattn"

    def __init__(
        self,
        world: PaperWorld,
        root: Path,
        target: Target,
        real_images: Path | None = None,
        weights: Mapping[str, Path | None] | None = None,
    ) -> None:
        self.weights = {name: file.resolve() for name, file in (weights or {}).items() if file}
        for name, file in self.weights.items():
            if not file.is_file():
                raise InputError(f"--{name} {file}: there is no such file")
        if real_images is not None and not real_images.is_dir():
            raise InputError(f"--real_images {real_images}: there is no such folder")
        self.world, self.root, self.task = world, root / world.name, target
        self.target, self.tuned_as = target.name, [world.name]
        self.real_images = real_images and real_images.resolve()

    @property
    def ground(self) -> list[Run]:
        """The run that generates the images of the base and measures them."""
        of: list[str] = []
        where = str(self.world.pipeline), of, f"{self.task.name}-base"
        # the base is not relearned, as it never forgot
        attacked = self._attacked(*where, {"attacks": ["paraphrase", "inversion"]})
        return [
            Run(
                self._name(f"base, {self.task.name}"),
                (*self._evaluated(*where), *attacked),
                self._looking(base=True),
                0,
            )
        ]

    def _looking(self, *, base: bool = False) -> float:
        """Seconds for the images and for the steps of the attacks."""
        pictures, steps = sum(e.pictures for e in self.task.evaluations), 0
        if self.task.judge:
            drawn, steps = attack_cost(self.task, self.world.attack, base=base)
            pictures += drawn
        return self.world.seconds["picture"] * pictures + self.world.seconds["unlearn"] * steps

    #: No runs: the model comes from the hub.
    trained: tuple[Run, ...] = ()

    @property
    def base_key(self) -> str:
        """The name of the base; its place on the disk does not matter."""
        pipeline = self.world.pipeline
        return pipeline.name if isinstance(pipeline, Path) else pipeline

    def unlearned(
        self, name: str, method: str, *, seed: int, steps: int, options: Options | None = None
    ) -> Run:
        """The run of a method without evaluation."""
        w, label = self.world, f"{self.task.name}-{name}-s{seed}"
        given = {**w.unlearn, **({"train_modules": None} if method == "spm" else {})}  # its own
        made = task(
            UNLEARN,
            {
                "pretrained_model_name_or_path": w.pipeline,
                "method": method,
                **self.task.forget,
                "seed": seed,
                "max_train_steps": steps,
                **given,
                **(options or {}),
                "save_as": "pipeline",
                "validation_steps": 0,
            },
            self.root,
            f"models/{label}",
            {"sets_dir": self.root / "sets"},
        )
        seconds = w.seconds["unlearn"] * steps
        return Run(self._name(f"{label}, not judged"), (made,), seconds, steps)

    def run(
        self, name: str, method: str, *, seed: int, steps: int, options: Options | None = None
    ) -> Run:
        """The run of a method with evaluation and attacks."""
        alone = self.unlearned(name, method, seed=seed, steps=steps, options=options)
        (made,) = alone.tasks
        (base,) = self.ground
        label = made.folder.name.rpartition("-")[0]
        where = str(made.folder / "pipeline"), [made.folder.name], label
        judged = (*self._evaluated(*where, base), *self._attacked(*where))
        return Run(
            self._name(label), (made, *judged), alone.seconds + self._looking(), steps, (base.name,)
        )

    def _evaluated(
        self, pipeline: str, of: list[str], label: str, base: Run | None = None
    ) -> tuple[Task, ...]:
        found = []
        for i, e in enumerate(self.task.evaluations):
            options, metrics = dict(e.options), list(e.options["metrics"])
            if "lpips" in metrics:
                if base is None:  # lpips compares the other models with the base
                    metrics.remove("lpips")
                else:
                    options["reference_dir"] = base.tasks[i].folder
            if "imagenette" in metrics and self.real_images:
                metrics.append("fid")
                options["real_images"] = self.real_images
            for metric, name in WEIGHTS.items():
                # part of the folder's hash, as the metric may be missing without the file
                if metric in metrics and name in self.weights:
                    options[name] = self.weights[name]
            found.append(
                task(
                    EVALUATE,
                    {**options, "metrics": metrics, **self.world.drawn},
                    self.root,
                    f"evaluations/{label}-{e.name}",
                    {"pretrained_model_name_or_path": pipeline},
                    [*of, self.base_key],
                )
            )
        return tuple(found)

    def _attacked(
        self, pipeline: str, of: list[str], label: str, attacks: Options | None = None
    ) -> tuple[Task, ...]:
        target, own = self.task, dict(attacks or {})
        if not target.judge:
            return ()
        if target.judge["judge"] == "imagenette" and "resnet_weights" in self.weights:
            own["imagenette_weights"] = self.weights["resnet_weights"]
        made = task(
            ATTACK,
            {
                **target.forget,
                **target.judge,
                "paraphrases": list(target.paraphrases),
                **self.world.attack,
                **own,
            },
            self.root,
            f"attacks/{label}",
            {
                "pretrained_model_name_or_path": pipeline,
                "base_model": self.world.pipeline,
                "target_dir": self.root / "targets",
            },
            [*of, self.base_key],
        )
        return (made,)

    def write_results(self, runs: Iterable[Run]) -> None:
        """Write results.json for tables.py into the folder of each run."""
        (base,) = self.ground
        for run in runs:
            seconds = text_results.read(run, UNLEARN)["seconds"]
            lines = [
                {"name": "base model", "values": _values(base)},
                {"name": run.name, "values": {**_values(run), "seconds": seconds}},
            ]
            with replacing(run.folder / "results.json") as work:
                work.write_text(json.dumps({"rows": lines}, indent=1))

    def protocol(self, run: Run) -> dict[str, Any]:
        """The protocol of the evaluations."""
        found = [e for t in run.tasks if (e := evaluation(t))]
        options = found[0]["protocol"]["options"]
        return {
            "sampling": {
                "weights": "trained",
                "sampler": f"DDIM, {options['num_inference_steps']} steps, eta 0",
                "guidance": f"{options['guidance_scale']}: eps_null + w (eps_c - eps_null)",
                "images_per_class": {e.name: e.pictures for e in self.task.evaluations},
                "starting_noise": "the same before and after",
            },
            "metrics": {name: said for e in found for name, said in e["metrics"].items()},
            **({"attacks": text_results.attacking(run)} if self.task.judge else {}),
        }

    def about(self) -> dict[str, Any]:
        """Facts about the setting for the protocol."""
        return {
            "sampler": "DDIM",
            "data": "images of the model itself",
            "model": self.base_key,
            "replayed": "images of the empty prompt",
            "prediction": "epsilon, scaled linear beta 0.00085 to 0.012, 1000 steps",
        }

    def write_prompts(self) -> None:
        """Writes nothing, as the prompts of the paper's tasks are options."""

    def _name(self, what: str) -> str:
        return f"{self.world.name}: {what}"


def choice(method: str) -> rows.Choice:
    """The paper's learning rate, or SPM's own. Other options keep the defaults of unlearn.py, which
    are the published ones."""
    return rows.Choice(1e-4 if method == "spm" else 1e-5, {})


def attack_cost(target: Target, options: Options, *, base: bool) -> tuple[int, int]:
    """The numbers of images and steps of the attacks on a model.

    The base also generates the target, and is not relearned."""
    each, targets, inverted, relearned = (
        options[name]
        for name in ("attack_images", "target_images", "inversion_steps", "relearn_max_steps")
    )
    starts = 2  # starts of inversion: a random embedding and a word
    # the prompts, each paraphrase, and two evaluations per inversion; six of relearning, or the
    # base's P_f
    looks = 1 + len(target.paraphrases) + 2 * starts + (1 if base else 6)
    steps = starts * inverted + (0 if base else relearned)
    return each * looks + (targets if base else 0), steps


def evaluation(made: Task) -> dict[str, Any] | None:
    """The result of an evaluation; None for another task."""
    return text_results.left(made) if made.maker == EVALUATE else None


def _values(run: Run) -> dict[str, Any]:
    found = {k: v for t in run.tasks if (e := evaluation(t)) for k, v in e["values"].items()}
    if any(t.maker == ATTACK for t in run.tasks):
        found |= text_results.columns(text_results.read(run, ATTACK)["values"])
    return found
