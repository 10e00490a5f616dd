"""The prompts for digits in styles, of which one concept shall be forgotten."""

from __future__ import annotations

import random
import re
from collections.abc import Iterable, Sequence
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

#: The choice of prompts to remember: many without the target, or those of a few other concepts.
REGIMES = ("list", "few")
#: What replaces the target: another concept, images of the empty prompt as in the paper, or
#: Gaussian latents.
SURROGATES = ("other", "empty", "gaussian")
FEW = {"content": 3, "style": 2}  # number of kept concepts that regime "few" replays
REMEMBERED = 100  # maximal number of prompts to remember


class PromptFiles:
    """Files of prompts in a folder. A file's name has a hash of its content."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.files: dict[Path, str] = {}  # path -> content

    def path(self, name: str, prompts: Iterable[str]) -> Path:
        """The path of a file that `write_prompts` writes."""
        text = "\n".join(p or '""' for p in prompts) + "\n"
        path = self.folder / f"{name}-{digest(text)[:8]}.txt"
        self.files[path] = text
        return path

    def write_prompts(self) -> None:
        for path, text in self.files.items():
            if not path.exists():
                with replacing(path) as work:
                    work.write_text(text)


class Asked(PromptFiles):
    """The prompts to forget, to generate instead, to remember and to show.

    Args:
        folder: the folder for the files of prompts.
        target: any word of the concept.
        beside: words of further concepts of the same kind that are forgotten, too.

    Raises:
        InputError: `target` names no concept of this world, or names the style that every prompt
            without a style asks for.
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
        super().__init__(folder)
        self.regime, self.surrogate = regime, surrogate
        concepts = CONTENTS if self.kind == "content" else STYLES
        self.gone = [self.target, *more]
        self.others = [name for name in concepts if name not in self.gone]
        self.replayed = self.others[: FEW[self.kind]] if regime == "few" else self.others

    def file(self, part: str) -> Path:
        """The path of the file of a part, such as "remember"."""
        return self.path(f"{part}-{'-'.join(self.gone)}", getattr(self, part)())

    def templates(self) -> list[str]:
        """Templates from trained prompts that name all concepts by their first words.

        "an outline picture" is left out, as "an" does not fit other concepts."""
        first = (*CONTENTS, *STYLES, None)
        an = self.kind == "style" and self.target[0] in "aeiou"
        templates = [t for t in TRAINED if not (an and "{a}" in t)]
        known = [c for c in captions(templates) if self.target in (c.content_word, c.style_word)]
        texts = [c.text for c in known if c.content_word in first and c.style_word in first]
        return list(dict.fromkeys(re.sub(rf"\b{self.target}\b", "{}", t) for t in texts))

    def instead(self) -> dict[str, Any]:
        """The options for what replaces the target, which SalUn's labels use, too."""
        if self.surrogate == "empty":
            return {"surrogate_prompt": [""]}
        if self.kind == "style":  # the plain style
            other = self.others[0]
        else:  # the next digit
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
        """Prompts of the target and its neighbours, in a held-out template."""
        near = [self.target, *self.others[-3:]]
        pairs = (
            [(c, s) for c in near for s in ("plain", "red")]
            if self.kind == "content"
            else [(c, s) for s in near for c in ("three", "eight")]
        )
        return [HELD_OUT[0].format(content=c, style=s) for c, s in pairs]
