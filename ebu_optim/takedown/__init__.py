"""A takedown request: from the model file that a person has to the file that they can publish.

One call removes the concept and writes the evidence that is handed over with the model."""

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
    """The function and the config class for a command line, chosen by the model that it names."""
    words = list(argv)
    if "--config" in words[:-1]:
        file = Path(words[words.index("--config") + 1])
        try:
            said = yaml.safe_load(file.read_text(encoding="utf-8"))
            words.append(str(said["pretrained_model_name_or_path"]))
        except (OSError, ValueError, KeyError, TypeError, yaml.YAMLError):
            pass  # the parser reports what is wrong with the file
    if any((Path(word) / classes.MARK).is_file() for word in words if not word.startswith("-")):
        return classes.run, ForgetClasses
    return run.run, Forget
