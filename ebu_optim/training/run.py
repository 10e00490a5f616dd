"""A run in its output folder: options, checkpoints and log.

An output folder belongs to one run: `run.json` holds its options, `checkpoints` its checkpoints
(written by ebu_optim.checkpoint, completely or not at all), and `log.jsonl` its figures.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import fields
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, set_seed
from tqdm.auto import tqdm

from ..checkpoint import latest_checkpoint, load_checkpoint, save_checkpoint
from ..errors import InputError
from ..files import locked, need_disk
from .fields import as_dict, default_of

# options that a resumed run may change
FREE = {
    "resume_from_checkpoint",
    "checkpointing_steps",
    "checkpoints_total_limit",
    "report_to",
    "logging_dir",
    "overwrite_output_dir",
    "output_dir",
    "max_train_steps",
    "logging_steps",
    "cpu",
    "validation_pictures",
    "push_to_hub",
    "hub_model_id",
    "hub_private_repo",
    "gradient_checkpointing",  # gives the same numbers with less memory
    "sets_dir",  # the names of its files identify their contents
}

# the files of a run before its first checkpoint
LEFT = {"run.json", ".lock", "logs", "log.jsonl", "sets", "validation"}


def check_folder(args: Any, script: str) -> dict[str, Any] | None:
    """Check that --output_dir can be used.

    Returns:
        The content of ``run.json`` of the run in the folder; None if the folder is free, or its
        run ended before its first checkpoint.

    Raises:
        InputError: the folder cannot be written, holds something else, or holds a run that the
            options neither resume nor replace.
    """
    folder = Path(args.output_dir)
    there = next(p for p in (folder, *folder.absolute().parents) if p.exists())
    if there != folder and not there.is_dir():
        raise InputError(f"--output_dir {folder}: {there} is a file: give another folder")
    if not os.access(there, os.W_OK):
        raise InputError(
            f"--output_dir {folder}: this user cannot write to {there}: give another folder"
        )
    try:
        before = json.loads((folder / "run.json").read_text())
    except (OSError, ValueError):
        before = None
    used = folder.exists() and (not folder.is_dir() or any(folder.iterdir()))
    ours = before is not None and before.get("script") == script
    if ours:
        used = any(p.name not in LEFT for p in folder.iterdir())
    if used and not ours:
        raise InputError(f"--output_dir {folder} is in use by something else: give another folder")
    if used and not args.resume_from_checkpoint and not args.overwrite_output_dir:
        raise InputError(
            f"--output_dir {folder} holds a run: resume it with --resume_from_checkpoint latest, "
            "replace it with --overwrite_output_dir, or give another folder"
        )
    return before if used else None


class Run:
    """A run in its output folder; ``with Run(...) as run`` locks the folder.

    Args:
        args: a config with `TrainingOptions`.
        same: values in addition to the options that identify the run, e.g. a hash of the base.
        size: bytes of the trained weights, for the estimate of the disk space.
        result: bytes of the result; None: those of the model and its EMA.
        parts: folders of the result, which --overwrite_output_dir removes.
    """

    def __init__(
        self,
        args: Any,
        accelerator: Accelerator,
        script: str,
        *,
        size: float,
        same: Mapping[str, Any] | None = None,
        result: float | None = None,
        parts: Sequence[str] = ("unet", "unet_ema"),
    ) -> None:
        self.args, self.accelerator, self.folder = args, accelerator, Path(args.output_dir)
        self.script, self.size, self.main = script, size, accelerator.is_main_process
        self.result, self.parts = 2 * size if result is None else result, parts
        free = FREE if args.lr_scheduler.startswith("constant") else FREE - {"max_train_steps"}
        options = {k: str(v) for k, v in as_dict(args).items() if k not in free}
        same = {**(same or {}), "processes": accelerator.num_processes}
        self.identity: dict[str, Any] = {"script": script, "options": options, "same": same}
        self._held = ExitStack()

    def __enter__(self) -> Run:
        said: list[Any] = [None]
        if self.main:
            try:
                self._open()
            except (InputError, OSError, RuntimeError) as error:
                said = [str(error)]
        broadcast_object_list(said)
        if said[0]:
            self._held.close()
            raise InputError(said[0])
        options = self.identity["options"]
        self.accelerator.init_trackers(f"ebu_optim_{self.script}", config=options)
        set_seed(self.args.seed, device_specific=True)
        return self

    def __exit__(self, kind: Any, *_: Any) -> None:
        if kind is None:  # this waits for the other processes, which may have failed
            self.accelerator.end_training()
        self._held.close()

    def _open(self) -> None:
        """Create the folder, or check that the run in it is this one; then lock the folder.

        Raises:
            InputError: the folder holds another run, or the disk has too little room.
        """
        mark, args = self.folder / "run.json", self.args
        before = check_folder(args, self.script)
        used = before is not None
        if before is not None and args.resume_from_checkpoint:
            theirs = {**before["options"], **before["same"]}
            now = {**self.identity["options"], **self.identity["same"]}
            # These do not count as differences: an unused option that an earlier version lacked,
            # and an input that an earlier version did not record.
            known = {k: v for k, v in now.items() if k in theirs or k not in self.identity["same"]}
            unused = {f.name: str(default_of(f)) for f in fields(args)}
            other = [k for k in known if theirs.get(k, unused.get(k, "None")) != now[k]]
            if other:
                k = other[0]
                raise InputError(
                    f"--resume_from_checkpoint: the run in {self.folder} has {k} "
                    f"{theirs.get(k)}, this one {now[k]}; give the same value, or another "
                    "--output_dir"
                )
        # Each checkpoint has weights, two moments, theta0, F and EMA. One more exists while a
        # checkpoint is written.
        checkpoints = 6 * self.size * (args.checkpoints_total_limit + 1)
        need_disk(self.folder, checkpoints + self.result, "checkpoints and the model")
        self.folder.mkdir(parents=True, exist_ok=True)
        self._held.enter_context(locked(self.folder / ".lock", self.folder))
        if used and not args.resume_from_checkpoint:
            for name in ("checkpoints", *self.parts):  # or old and new parts would mix
                shutil.rmtree(self.folder / name, ignore_errors=True)
            for name in (
                "log.jsonl",
                "classes.json",
                "unlearn.json",
                "classifier.json",
                "pictures.safetensors",
            ):
                (self.folder / name).unlink(missing_ok=True)
        mark.write_text(json.dumps(self.identity, indent=1))

    def resume(self, objects: Mapping[str, Any]) -> int:
        """Load the checkpoint that the options name into `objects`; returns the steps done so far.

        Raises:
            InputError: there is no such checkpoint, it cannot be read, or it is beyond
                --max_train_steps.
        """
        self.objects = dict(objects)
        if self.accelerator.scaler is not None:
            self.objects["scaler"] = self.accelerator.scaler
        given = self.args.resume_from_checkpoint
        if not given:
            return 0
        path = self.folder / "checkpoints" if given == "latest" else Path(given)
        if given != "latest" and not path.is_dir():
            raise InputError(f"--resume_from_checkpoint {given}: there is no such folder")
        if given == "latest" and latest_checkpoint(path) is None:
            self.accelerator.print(f"no checkpoint in {path} yet: starting from the beginning")
            return 0
        try:
            step = load_checkpoint(path, self.objects, fallback=given == "latest")
        except (OSError, ValueError) as error:
            raise InputError(f"--resume_from_checkpoint {given}: {error}") from error
        if step > self.args.max_train_steps:  # its weights would look like those of fewer steps
            raise InputError(
                f"--max_train_steps {self.args.max_train_steps}: the checkpoint is of step {step}; "
                "give as many or more, or an earlier one as --resume_from_checkpoint"
            )
        log = self.folder / "log.jsonl"
        if self.main and log.exists():  # steps after the checkpoint are done and logged again
            rows = log.read_text().splitlines(keepends=True)
            log.write_text("".join(r for r in rows if json.loads(r)["step"] <= step))
        if not step and given != "latest":
            raise InputError(f"--resume_from_checkpoint {given}: there is no checkpoint in it")
        self.accelerator.print(f"resuming after step {step}")
        return step

    def steps(self, begin: int, desc: str) -> Iterator[int]:
        """Yield the numbers of the steps to do, from 1, with a progress bar; save checkpoints."""
        total, every = self.args.max_train_steps, self.args.checkpointing_steps
        self.bar = tqdm(
            range(begin + 1, total + 1), desc, total, initial=begin, disable=not self.main
        )
        for step in self.bar:
            yield step
            if step % every == 0 or step == total:
                save_checkpoint(
                    self.folder / "checkpoints",
                    step,
                    self.objects,
                    keep=self.args.checkpoints_total_limit,
                )

    def log(self, step: int, **figures: float) -> None:
        """Log figures to the progress bar, the trackers and log.jsonl."""
        if not self.main:
            return
        self.bar.set_postfix({k: f"{v:.4g}" for k, v in list(figures.items())[:3]})
        self.accelerator.log(figures, step=step)
        with open(self.folder / "log.jsonl", "a") as f:
            f.write(json.dumps({"step": step, **figures}) + "\n")
