"""What is asked of digits in styles where one concept of them is to be forgotten."""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..errors import InputError
from ..files import replacing
from ..manifest import digest
from ..worlds.styled_digits.captions import (
    CONTENTS,
    HELD_OUT,
    STYLES,
    TRAINED,
    captions,
    concept,
)

#: How the remembered prompts are chosen: many that do not name the target, or those of few others.
REGIMES = ("list", "few")
#: What is drawn in place of the target: another concept, what the empty prompt draws as in the
#: paper, or Gaussian latents.
SURROGATES = ("other", "empty", "gaussian")
FEW = {"content": 3, "style": 2}  # kept concepts that regime "few" replays
REMEMBERED = 100  # prompts


class Asked:
    """The prompts that are forgotten, remembered and shown, and what takes a place.

    Args:
        folder: of the files of prompts.
        target: any word of the concept; `beside`: of more of the same kind.

    Raises:
        InputError: `target` names nothing of this world, or what every prompt asks for that names
            no style.
    """

    def __init__(
        self, folder: Path, target: str, beside: Sequence[str], regime: str, surrogate: str
    ) -> None:
        try:
            self.target, *more = map(concept, (target, *beside))
        except ValueError as error:
            raise InputError(f"--target {target}: {error}") from error
        self.kind = "content" if self.target in CONTENTS else "style"
        if self.target == next(iter(STYLES)):
            raise InputError(
                f"--target {target}: every prompt without a style asks for it; choose another"
            )
        self.folder, self.regime, self.surrogate = folder, regime, surrogate
        self.files: dict[Path, str] = {}  # of prompts
        concepts = CONTENTS if self.kind == "content" else STYLES
        self.gone = [self.target, *more]
        self.others = [name for name in concepts if name not in self.gone]
        self.replayed = self.others[: FEW[self.kind]] if regime == "few" else self.others

    def file(self, part: str) -> Path:
        """A file of prompts, written here; its name has a hash of what is in it."""
        text = "\n".join(p or '""' for p in getattr(self, part)()) + "\n"
        key = digest(text)[:8]
        path = self.folder / f"{part}-{'-'.join(self.gone)}-{key}.txt"
        self.files[path] = text
        return path

    def templates(self) -> list[str]:
        """Trained prompts that name the target by its first word, which is its name, and the other
        concept, where there is one, by its own. "an outline picture" is none: in it nothing else
        could be named."""
        first = (*CONTENTS, *STYLES, None)
        an = self.kind == "style" and self.target[0] in "aeiou"
        templates = [t for t in TRAINED if not (an and "{a}" in t)]
        known = [c for c in captions(templates) if self.target in (c.content_word, c.style_word)]
        texts = [c.text for c in known if c.content_word in first and c.style_word in first]
        return list(dict.fromkeys(re.sub(rf"\b{self.target}\b", "{}", t) for t in texts))

    def instead(self) -> dict[str, Any]:
        """What takes the target's place; SalUn's labels, too."""
        if self.surrogate == "empty":
            return {"surrogate_prompt": [""]}
        if self.kind == "style":  # the plain one
            other = self.others[0]
        else:  # the next one
            at = list(CONTENTS).index(self.target)
            after = (*list(CONTENTS)[at:], *CONTENTS)
            other = next(n for n in after if n in self.others)
        noise = {"surrogate": "gaussian"} if self.surrogate == "gaussian" else {}
        return {"surrogate_concept": [other], **noise}

    def remember(self) -> list[str]:
        kept = [c for c in captions(TRAINED) if not {c.content, c.style} & set(self.gone)]
        if self.regime == "few":
            kept = [c for c in kept if getattr(c, self.kind) in self.replayed]
        texts = [c.text for c in kept]
        return random.Random(0).sample(texts, min(REMEMBERED, len(texts)))  # noqa: S311

    def shown(self) -> list[str]:
        """Of the target and its neighbours, in a template that nothing was trained on."""
        near = [self.target, *self.others[-3:]]
        pairs = (
            [(c, s) for c in near for s in ("plain", "red")]
            if self.kind == "content"
            else [(c, s) for s in near for c in ("three", "eight")]
        )
        return [HELD_OUT[0].format(content=c, style=s) for c, s in pairs]

    def write_prompts(self) -> None:
        for path, text in self.files.items():
            if not path.exists():
                with replacing(path) as work:
                    work.write_text(text)
