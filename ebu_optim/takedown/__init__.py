"""A request has come: how do I get my model back without the concept, and what do I hand over?
One call from the file a person has to the file they can publish, with its evidence."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from . import classes, run
from .classes import ForgetClasses
from .evidence import verify
from .options import Forget
from .run import Forgotten, forget

__all__ = ["Forget", "ForgetClasses", "Forgotten", "chosen", "forget", "verify"]


def chosen(argv: Sequence[str]) -> tuple[Any, type]:
    """What a command line asks for: the function and its config, by the model that it names."""
    words = list(argv)
    if "--config" in words[:-1]:
        file = Path(words[words.index("--config") + 1])
        try:
            said = yaml.safe_load(file.read_text(encoding="utf-8"))
            words.append(str(said["pretrained_model_name_or_path"]))
        except (OSError, ValueError, KeyError, TypeError, yaml.YAMLError):
            pass  # the parser says what is wrong with the file
    if any((Path(word) / classes.MARK).is_file() for word in words if not word.startswith("-")):
        return classes.run, ForgetClasses
    return run.run, Forget
