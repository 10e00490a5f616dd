"""The runs of a method in the world of digits in styles."""

from __future__ import annotations

import json
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

from ..attacks.options import AttackOptions
from ..attacks.run import attack
from ..baselines import recipes
from ..diffusion.flow import is_flow
from ..errors import InputError
from ..manifest import contents
from ..text_to_image.evaluation import evaluate
from ..text_to_image.evaluation_options import RESULT, Evaluation
from ..text_to_image.options import Unlearn
from ..text_to_image.unlearn import unlearn
from ..worlds.styled_digits.captions import CONTENTS, STYLES
from ..worlds.styled_digits.judges import JudgesOptions, train_judges
from ..worlds.styled_digits.measure import Measure, measure
from ..worlds.styled_digits.train import WorldOptions, train
from .runs import Maker, Options, Run, Task, task
from .settings import losses
from .text_prompts import FEW, REGIMES, SURROGATES, Asked
from .text_scales import TextWorld

TRAIN = Maker(train, WorldOptions, "pipeline/world.json")
JUDGES = Maker(train_judges, JudgesOptions, "style.safetensors")
UNLEARN = Maker(unlearn, Unlearn, "unlearn.json")
MEASURE = Maker(measure, Measure, "measured.json")
ATTACK = Maker(attack, AttackOptions, "attacks.json")
EVALUATE = Maker(evaluate, Evaluation, RESULT)

#: Methods that learn a guided prediction. As published, ESD trains cross attention and SPM its
#: adapters, and both forget the bare word, as their target points away from the whole prompt.
GUIDED = ("guidance", "adapter")
BARE = {"forget_templates": ["{}"]}
#: Seconds of an edit in closed form, with opening and saving the model.
EDIT_TAKES = 10.0


class Given(NamedTuple):
    """A part that the runs build on: made by a task, or given."""

    folder: Path
    key: str
    made: Task | None


class TextSetting(Asked):
    """A world in a folder, with a concept to forget, a regime, losses and a surrogate.

    Args:
        target: any word of the concept.
        modules: the value of --train_modules of unlearning.
        base, judges: folders of a trained pipeline and of judges, instead of training them.
        beside: further concepts of the same kind that are forgotten with it; they are not judged.

    Raises:
        InputError: `target` names no concept of this world, or names the style that every prompt
            without a style asks for; a folder lacks files.
    """

    def __init__(
        self,
        world: TextWorld,
        root: Path,
        *,
        target: str,
        regime: str = "list",
        loss: str = "crossed",
        surrogate: str = "other",
        modules: str = "xattn",
        base: Path | None = None,
        judges: Path | None = None,
        beside: Sequence[str] = (),
    ) -> None:
        super().__init__(root / world.name / "prompts", target, beside, regime, surrogate)
        self.world, self.root, self.loss, self.modules = world, root / world.name, loss, modules
        self.base = self._given("base", TRAIN, world.base, base, "pipeline")
        self.judges = self._given("judges", JUDGES, world.judges, judges, "")
        self.sets: dict[tuple[str, int], str] = {}  # (set, seed) -> the run that makes it

    def _given(
        self, name: str, maker: Maker, options: Options, folder: Path | None, part: str
    ) -> Given:
        if folder is None:
            made = task(maker, options, self.root, name)
            return Given(made.folder / part, made.folder.name, made)
        needed = ("world.json",) if part else ("content.safetensors", "style.safetensors")
        for file in needed:
            if not (folder / file).is_file():
                by = "world/train.py" if part else "world/judges.py"
                raise InputError(f"--{name} {folder} has no {file}: run {by}, which writes it")
        key = contents(folder.glob("**/*.safetensors" if part else "*.safetensors"))[:8]
        return Given(folder.resolve(), key, None)

    @property
    def base_key(self) -> str:
        return self.base.key

    @property
    def tuned_as(self) -> list[str]:
        """The names under which sd_tune.py may have saved strengths, the best match first."""
        kinds = dict.fromkeys((self.kind, *FEW))
        places = dict.fromkeys((self.surrogate, *SURROGATES))
        modules = dict.fromkeys((self.modules, "xattn", "full"))
        regimes = dict.fromkeys((self.regime, *REGIMES))
        worlds = [n for n in (self.world.name, self.world.like) if n]
        return [
            f"{world}, {kind}, {m}, {regime}, instead {instead}"
            for world, m, instead, kind, regime in product(worlds, modules, places, kinds, regimes)
        ]

    def trains(self, method: str) -> str:
        """The modules that a method trains here."""
        return {"guidance": "xattn", "adapter": "adapters", "edit": "xattn"}.get(
            recipes[method].forgets or "", self.modules
        )

    @property
    def trained(self) -> list[Run]:
        """The runs that train the base and the judges, unless these are given."""
        w, s = self.world, self.world.seconds
        steps = w.base["max_train_steps"]
        parts = [
            (self.base.made, "base", s["base"] * steps, steps),
            (self.judges.made, "judges", s["judges"], 0),
        ]
        return [Run(self._name(n), (c,), t, k) for c, n, t, k in parts if c]

    @property
    def ground(self) -> list[Run]:
        """The runs that every run of a method builds on; the last one measures the base."""
        s, made = self.world.seconds, self.trained
        # the base is not relearned, as it never forgot
        known = self.world.attack.get("attacks", ("paraphrase", "inversion"))
        attacks = {"attacks": [name for name in known if name != "relearn"]}
        judged = self._judged(self.base.folder, [self.base.key], "base", attacks=attacks)
        name = self._name(f"base, {self.target}")
        return [
            *made,
            Run(name, judged, s["measure"] + s["attack"], 0, tuple(r.name for r in made)),
        ]

    def run(
        self,
        name: str,
        method: str,
        *,
        seed: int,
        steps: int = 100,
        options: Options | None = None,
        trial: bool = False,
    ) -> Run:
        """The run that unlearns with a method, measures the result and attacks it.

        Args:
            options: further options of unlearning.
            trial: a trial of tuning, which is only attacked by 100 steps of inversion.
        """
        w = self.world
        if method == "retrain":
            alone = self.retrained()
        else:
            alone = self.unlearned(name, method, seed=seed, steps=steps, options=options)
        (made,) = alone.tasks
        label = made.folder.name.rpartition("-")[0]
        judged = self._judged(
            made.folder / "pipeline", [made.folder.name], label, attacks=w.trial if trial else {}
        )
        full = self._name(f"{label}, trial" if trial else label)
        after = (*(r.name for r in self.ground), *self.makers(full, method, seed))
        seconds = alone.seconds + w.seconds["measure"] + w.seconds["attack"]
        return Run(full, (made, *judged), seconds, steps, after)

    def unlearned(
        self,
        name: str,
        method: str,
        *,
        seed: int,
        steps: int,
        options: Options | None = None,
        save_as: str = "pipeline",
    ) -> Run:
        """Like `run`, without measuring and attacking the result."""
        if recipes[method].edits:
            return self._edited(name, method, seed, options or {}, save_as)
        w, forgets = self.world, recipes[method].forgets
        own = dict(w.guided) if forgets in GUIDED else {}
        if forgets != "adapter":
            own["train_modules"] = self.trains(method)
        told = {"forget_templates": [self.file("templates")], **self.instead()}
        given = {
            "method": method,
            **losses(self.loss, method),
            "seed": seed,
            "forget": self.gone,
            **(BARE if forgets in GUIDED else told),
            "remember_prompts": [self.file("remember")],
            "max_train_steps": steps,
            **w.unlearn,
            **own,
            **(options or {}),
            "save_as": save_as,
            "validation_steps": 0,
        }
        return self._alone(f"{name}-s{seed}", given, w.seconds["unlearn"] * steps, steps)

    def _edited(self, name: str, method: str, seed: int, options: Options, save_as: str) -> Run:
        """By an edit in closed form, which reads the bare word and takes no step."""
        given = {
            "method": method,
            "seed": seed,
            "forget": self.gone,
            **BARE,
            **self.instead(),
            "remember_prompts": [self.file("remember")],
            **options,
            "save_as": save_as,
        }
        return self._alone(f"{name}-s{seed}", given, EDIT_TAKES, 0)

    def _alone(self, name: str, options: Options, seconds: float, steps: int) -> Run:
        label = f"{'-'.join(self.gone)}-{name}"
        made = task(
            UNLEARN,
            options,
            self.root,
            f"models/{label}",
            {"pretrained_model_name_or_path": self.base.folder, "sets_dir": self.root / "sets"},
            [self.base.key],
        )
        after = tuple(r.name for r in self.trained if self.base.made in r.tasks)
        return Run(self._name(f"{label}, not judged"), (made,), seconds, steps, after)

    def retrained(self) -> Run:
        """The run that trains the world with the base's seed, but without the target.

        The autoencoder and the text encoder, which knows the word, are the same."""
        steps = self.world.base["max_train_steps"]
        made = task(
            TRAIN,
            {**self.world.base, "without": self.gone, "seed": 0},
            self.root,
            f"models/{'-'.join(self.gone)}-retrain-s0",
        )
        return Run(self._name(made.folder.name), (made,), self.world.seconds["base"] * steps, steps)

    def pictures(self, row: str, run: Run) -> Run:
        """The run that generates the target and its neighbours with the model of a run."""
        folder = run.tasks[0].folder
        return self._draw(row, folder / "pipeline", folder.name, (run.name,))

    def base_pictures(self) -> Run:
        after = tuple(r.name for r in self.trained if self.base.made in r.tasks)
        return self._draw("base", self.base.folder, self.base.key, after)

    def _draw(self, row: str, pipeline: Path, key: str, after: tuple[str, ...]) -> Run:
        drawn = task(
            EVALUATE,
            {"prompts": [self.file("shown")], **self.world.pictures},
            self.root,
            f"pictures/{self.target}-{row}",
            {"pretrained_model_name_or_path": pipeline},
            [key],
        )
        return Run(
            self._name(f"pictures, {self.target}-{row}"),
            (drawn,),
            self.world.seconds["pictures"],
            0,
            after,
        )

    def _judged(
        self, pipeline: Path, of: list[str], label: str, *, attacks: Options
    ) -> tuple[Task, Task]:
        where = {"pretrained_model_name_or_path": pipeline, "judges": self.judges.folder}
        made_of = [*of, self.judges.key]
        measured = task(MEASURE, self.world.measure, self.root, f"measured/{label}", where, made_of)
        return measured, self.attacked(pipeline, of, label, attacks)

    def attacked(self, pipeline: Path, of: list[str], label: str, attacks: Options) -> Task:
        """The attacks on the pipeline of a run, by the world's options and then by `attacks`."""
        attacks = {**self.world.attack, **attacks}
        if "inversion" in attacks.get("attacks", ["inversion"]):
            attacks["initializer_token"] = [{**CONTENTS, **STYLES}[self.target][1]]
        return task(
            ATTACK,
            {"forget": [self.target], "judge": "world", **attacks},
            self.root,
            f"attacks/{label}",
            {
                "pretrained_model_name_or_path": pipeline,
                "judges": self.judges.folder,
                "base_model": self.base.folder,
                "target_dir": self.root / "targets",
            },
            [*of, self.judges.key, self.base.key],
        )

    def makers(self, name: str, method: str, seed: int) -> list[str]:
        """The runs that make the sets that this run reads, as two runs must not make a set at
        once."""
        recipe = recipes[method]
        if self.loss == "relabel" and recipe.forgets == "surrogate":
            recipe = recipe.with_losses(forget="relabel")
        needs = {
            "replay": recipe.replayed and "remember" in recipe.needs() and not recipe.fresh,
            "surrogate": recipe.forgets == "surrogate",
            "own": recipe.own_images,
        }
        makers = [self.sets.setdefault((s, seed), name) for s, needed in needs.items() if needed]
        return [m for m in dict.fromkeys(makers) if m != name]

    def about(self) -> dict[str, Any]:
        """Facts about the setting for the protocol."""
        folder = self.base.folder
        noise = json.loads((folder / "scheduler" / "scheduler_config.json").read_text())
        parameters = json.loads((folder / "world.json").read_text())["parameters"]
        kind = json.loads((folder / "model_index.json").read_text())["_class_name"]
        flows = is_flow(noise)
        return {
            "data": f"{self.world.title}: scikit-learn's digits, rendered by "
            "ebu_optim/worlds/styled_digits/images.py",
            "model": f"{kind} of world/train.py, {sum(parameters.values()):,} parameters",
            "replayed": self.replayed,
            "prediction": "velocity, flow matching, logit-normal timesteps"
            if flows
            else f"{noise['prediction_type']}, {noise['beta_schedule']}, "
            f"{noise['num_train_timesteps']} steps",
            "sampler": "Euler" if flows else "DDIM",
        }

    def _name(self, what: str) -> str:
        return f"{self.world.name}: {what}"
