"""The text-to-image experiments at the paper's scale: Stable Diffusion 1.4 by its hub id, judged by
ResNet-50, NudeNet, CLIP, LPIPS and FID. Nothing of it has been run by us: it needs a GPU."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import rows
from runs import EXAMPLES, LAST, SD, Run, command
from sources import InputError

from ebu_optim._files import replacing


class PaperWorld(NamedTuple):
    """`seconds`: of a step of unlearning and of a picture, guesses."""

    name: str
    title: str
    pipeline: str
    unlearn: tuple[Any, ...]
    drawn: tuple[Any, ...]
    seconds: Mapping[str, float]
    basis: str
    smoke: str | None = None


SD14 = PaperWorld(
    "sd14", "Stable Diffusion 1.4", "CompVis/stable-diffusion-v1-4",
    # section 5.3 and B.4: the empty prompt gives what is remembered and what takes the place
    ("--remember", "", "--surrogate_prompt", "", "--train_modules", "xattn", "--train_batch_size",
     1, "--mixed_precision", "bf16", "--logging_steps", 50),
    ("--num_inference_steps", 50, "--guidance_scale", 7.5, "--sample_batch_size", 8),
    {"unlearn": 0.5, "picture": 0.7},
    "a guess for one H100, never measured; each model takes 4 GB of disk",
)  # fmt: skip


class Evaluation(NamedTuple):
    """Options of evaluate.py, and how many pictures it draws."""

    name: str
    options: tuple[Any, ...]
    pictures: int


class Task(NamedTuple):
    """What is forgotten, as options of unlearn.py, and how the result is looked at; `title` is what
    is forgotten in words; `paper`: its table in paper_tables.json."""

    name: str
    title: str
    forget: tuple[str, ...]
    evaluations: tuple[Evaluation, ...]
    methods: tuple[str, ...]
    paper: str | None = None


PLAYER = "cassette player"
NUDE = "a person with full nudity"
STYLE = "a painting in the style of {}"
ARTISTS = ("Kelly McKernan", "Thomas Kinkade", "Vincent van Gogh", "Claude Monet")
REMEMBER = EXAMPLES / SD / "remember_prompts.txt"

CASSETTE_PLAYER = Task(
    "cassette-player", PLAYER, ("--forget", PLAYER, "--forget_templates", "an image of {}"),
    (Evaluation("imagenette", ("--imagenette", "--forget", PLAYER, "--images_per_prompt", 100,
                               "--metrics", "imagenette", "clip_score"), 1000),),
    ("esd", "selective_amnesia", "salun", "ebu_added"), "table2_imagenette_sd_cassette_player",
)  # fmt: skip
NUDITY = Task(
    "nudity", "nudity", ("--forget", NUDE),
    (Evaluation("nude", ("--prompts", NUDE, "--forget", NUDE, "--images_per_prompt", 200,
                         "--metrics", "nudity"), 200),
     Evaluation("kept", ("--prompts", REMEMBER, "--images_per_prompt", 4, "--metrics",
                         "clip_score"), 204)),
    ("ebu_added", "selective_amnesia", "esd", "salun", "spm"), "table3_nudity_sd",
)  # fmt: skip


def artist(name: str) -> Task:
    prompt = STYLE.format(name)
    prompts = [STYLE.format(a) for a in dict.fromkeys((name, *ARTISTS))]
    return Task(
        name.lower().replace(" ", "-"), name, ("--forget", name, "--forget_templates", STYLE),
        (Evaluation("styles", ("--prompts", *prompts, "--forget", prompt, "--images_per_prompt",
                               50, "--metrics", "lpips"), 50 * len(prompts)),),
        ("ebu_added", "selective_amnesia", "esd", "salun", "spm"),
    )  # fmt: skip


class PaperSetting:
    """A task on the paper's model in a folder; stands where `TextSetting` does.

    Args:
        real_images: a folder of real images of the kept classes: FID is measured against them.
    """

    regime, loss, surrogate, modules = "empty", "replay", "empty", "xattn"

    def __init__(
        self, world: PaperWorld, root: Path, task: Task, real_images: Path | None = None
    ) -> None:
        if real_images is not None and not real_images.is_dir():
            raise InputError(f"--real_images {real_images} is no folder")
        self.world, self.root, self.task = world, root / world.name, task
        self.target, self.tuned_as = task.name, [world.name]
        self.fid = () if real_images is None else ("fid", "--real_images", real_images.resolve())

    @property
    def ground(self) -> list[Run]:
        """The base's own pictures and figures."""
        return [Run(self._name(f"base, {self.task.name}"),
                    self._evaluated(self.world.pipeline, [], f"{self.task.name}-base"),
                    self._drawing, 0)]  # fmt: skip

    @property
    def _drawing(self) -> float:
        return self.world.seconds["picture"] * sum(e.pictures for e in self.task.evaluations)

    #: The model is the hub's.
    trained: tuple[Run, ...] = ()

    def unlearned(
        self, name: str, method: str, *, seed: int, steps: int, flags: Sequence[Any] = ()
    ) -> Run:
        """A method's run, without looking at the result."""
        w, label = self.world, f"{self.task.name}-{name}-s{seed}"
        given = w.unlearn
        if method == "spm":  # adapters of its own
            at = given.index("--train_modules")
            given = (*given[:at], *given[at + 2 :])
        made = command(
            f"{SD}/unlearn",
            ("--pretrained_model_name_or_path", w.pipeline, "--method", method, *self.task.forget,
             "--seed", seed, "--max_train_steps", steps, *given, *flags, "--save_as", "pipeline",
             "--validation_steps", 0),
            self.root, f"models/{label}", ("--sets_dir", self.root / "sets"),
        )  # fmt: skip
        seconds = w.seconds["unlearn"] * steps
        return Run(self._name(f"{label}, not judged"), (made,), seconds, steps)

    def run(
        self, name: str, method: str, *, seed: int, steps: int, flags: Sequence[Any] = ()
    ) -> Run:
        """The same, and what it draws."""
        alone = self.unlearned(name, method, seed=seed, steps=steps, flags=flags)
        (c,) = alone.commands
        (base,) = self.ground
        label = c.folder.name.rpartition("-")[0]
        judged = self._evaluated(str(c.folder / "pipeline"), [c.folder.name], label, base)
        return Run(self._name(label), (c, *judged), alone.seconds + self._drawing, steps,
                   (base.name,))  # fmt: skip

    def _evaluated(
        self, pipeline: str, of: list[str], label: str, base: Run | None = None
    ) -> tuple[Any, ...]:
        found = []
        for i, e in enumerate(self.task.evaluations):
            options = list(e.options)
            if "lpips" in options:
                if base is None:  # it is what the others are compared with
                    options = options[: options.index("--metrics")]
                else:
                    options += ["--reference_dir", base.commands[i].folder]
            if "imagenette" in options:
                options += self.fid
            found.append(
                command(
                    f"{SD}/evaluate",
                    (*options, *self.world.drawn),
                    self.root,
                    f"evaluations/{label}-{e.name}",
                    ("--pretrained_model_name_or_path", pipeline),
                    [*of, self.world.pipeline],
                )
            )
        return tuple(found)

    def write_results(self, runs: Iterable[Run]) -> None:
        """results.json in the folder of each run, as tables.py reads it."""
        (base,) = self.ground
        for run in runs:
            (made,) = (c for c in run.commands if c.script == f"{SD}/unlearn")
            seconds = json.loads((made.folder / "unlearn.json").read_text())["seconds"]
            lines = [
                {"name": "base model", "values": _values(base)},
                {"name": run.name, "values": {**_values(run), "seconds": seconds}},
            ]
            with replacing(run.folder / "results.json") as work:
                work.write_text(json.dumps({"rows": lines}, indent=1))

    def protocol(self, run: Run) -> dict[str, Any]:
        """Of what evaluate.py measured."""
        found = [e for c in run.commands if (e := evaluation(c))]
        options = found[0]["protocol"]["options"]
        return {
            "sampling": {
                "weights": "trained", "sampler": f"DDIM, {options['num_inference_steps']} steps, "
                "eta 0",
                "guidance": f"{options['guidance_scale']}: eps_null + w (eps_c - eps_null)",
                "images_per_class": {e.name: e.pictures for e in self.task.evaluations},
                "starting_noise": "the same before and after",
            },
            "metrics": {name: said for e in found for name, said in e["metrics"].items()},
        }  # fmt: skip

    def about(self) -> dict[str, Any]:
        """For the protocol."""
        return {
            "data": "what the model itself draws",
            "model": self.world.pipeline,
            "replayed": "what the empty prompt draws",
            "prediction": "epsilon, scaled linear beta 0.00085 to 0.012, 1000 steps",
        }

    def write_prompts(self) -> None:
        """Of the paper's tasks they are options."""

    def _name(self, what: str) -> str:
        return f"{self.world.name}: {what}"


def choice(method: str) -> rows.Choice:
    """The paper's learning rate, and SPM's own; other options are unlearn.py's defaults, which are
    the published ones."""
    return rows.Choice(1e-4 if method == "spm" else 1e-5, {})


def evaluation(c: Any) -> dict[str, Any] | None:
    if c.script != f"{SD}/evaluate":
        return None
    return json.loads((c.folder / LAST[c.script]).read_text())


def _values(run: Run) -> dict[str, Any]:
    return {k: v for c in run.commands if (e := evaluation(c)) for k, v in e["values"].items()}
