"""The attack of a protocol, prompt by prompt.

Each result is kept, so that an interrupted run continues with the next prompt."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from tqdm.auto import tqdm

from ..attacks.model import Attacked
from ..attacks.unlearndiffatk import Settings, search
from ..files import replacing
from ..manifest import key
from ..text_to_image.pipelines import Looked
from .judges import Judge
from .pictures import Pictures, made_of, read
from .protocol import Asked, Protocol, Sampling

#: The sampling of the image that the search learns from. That of a flow matching model is by its
#: own sampler.
TARGET = Sampling(sampler="lms", steps=25, guidance=7.5)


def attacked(
    protocol: Protocol,
    asked: Sequence[Asked],
    observed: Sequence[Any],
    judge: Judge,
    pictures: Pictures,
    base: Pictures,
    opened: Callable[[], Any],
    base_opened: Callable[[], Any],
    looked: Looked,
    whole: Callable[[], Any],
    folder: Path,
) -> list[bool]:
    """Whether each prompt generates the forgotten concept, without or with the attack.

    Args:
        observed: the judge's observations of the images without an attack.
        opened, base_opened: open the pipelines in float32 that generate the images.
        whole: opens the pipeline on which tokens are searched; an SPM adapter has full strength
            in it.
        folder: the folder of the results.

    Raises:
        ValueError: the protocol has no attack.
    """
    attack = protocol.attack
    if attack is None:
        raise ValueError(f"{protocol.name} has no attack")
    sampling = protocol.sampling
    own = ("size", "noise", *(["sampler"] if sampling.sampler == "flow" else []))
    target = replace(TARGET, **{name: getattr(sampling, name) for name in own})
    settings = Settings(attack.tokens, attack.timesteps, attack.iterations)
    left = [i for i, o in enumerate(observed) if not attack.success(o, asked[i])]
    said = [made_of(sampling, asked[i]) for i in left]
    files = {
        i: folder / pictures.folder.name / f"{key(one, settings, judge.identity, base.model)}.json"
        for i, one in zip(left, said, strict=True)
    }
    todo = [i for i, file in files.items() if not file.is_file()]
    base.draw(target, [asked[i] for i in todo], base_opened, 1)
    model = _model(whole(), looked, sampling.guidance) if todo else None
    for i in tqdm(todo, "UnlearnDiffAtk"):
        one = asked[i]
        picture = read(base.file(target, one), "png").float() / 127.5 - 1
        latents = model.family.to_latents(model.vae, picture[None])  # type: ignore[union-attr]

        def shows(text: str, one: Asked = one) -> bool:
            changed = one._replace(prompt=text)
            pictures.draw(sampling, [changed], opened, 1)
            seen = read(pictures.file(sampling, changed), protocol.saved)
            return attack.success(judge.look([seen], [changed], [])[0], changed)

        found = search(model, one.prompt, latents, shows, settings, one.seed)
        with replacing(files[i]) as work:
            work.write_text(json.dumps({"prompt": one.prompt, **found._asdict()}))
    reached = dict.fromkeys(range(len(asked)), True)
    for i, file in files.items():
        reached[i] = json.loads(file.read_text())["success"]
    return list(reached.values())


def _model(pipe: Any, looked: Looked, guidance: float | None) -> Attacked:
    """The model on which tokens are searched: without classifier-free guidance; with the
    protocol's guidance scale (None: the family's default) where it is an input of the denoiser."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    family, scale = looked.family, 1.0
    if family.guides(looked.unet) == "told":
        scale = family.usual if guidance is None else guidance
    drawn = SimpleNamespace(sample_batch_size=1, num_inference_steps=1, guidance_scale=scale)
    return Attacked(pipe, looked, drawn, torch.device(device))
