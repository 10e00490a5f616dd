"""Families x methods x formats of `ebu forget`, each run on a small model of random weights.

    python -m tests.benchmarks.takedown_table --json docs/evidence/takedown_table.json

One row is one request: a file or a folder in, two steps of training, the result out. "yes" means:
the result, opened as whoever gets it would, draws in float32 what the trained weights of the run's
last checkpoint draw in the model that came in, bit for bit (LoRA and SPM, whose factors are added
or not: to 1e-4 what the first form of the same training draws); these are not the pictures of the
model that came in; and `ebu verify` finds every file as the evidence says. What is refused is there
with the reason.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import itertools
import json
import os
import tempfile
import time
import traceback
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from ebu_optim import __version__, forget
from ebu_optim.baselines import methods
from ebu_optim.errors import InputError
from ebu_optim.files import replacing
from ebu_optim.formats import open_single, write_folder
from ebu_optim.takedown import evidence
from tests.single_files import FAMILIES, draw, folder, inpainting

SMALL: dict[str, Any] = {
    "surrogate_images": 2,
    "replay_images": 2,
    "forget_images": 2,
    "num_inference_steps": 2,
    "max_train_steps": 2,
    "evidence_images": 1,
    "evidence_prompts": 1,
    "clip_weights": "none",
    "cpu": True,
    "learning_rate": 1e-3,
    "validation_steps": 0,
}
REQUEST: dict[str, Any] = {"surrogate_concept": ["car"], "remember_prompts": ["a red car", "a dog"]}
LORA = {"train_modules": "lora", "rank": 2, "lora_alpha": 6}
#: model as -> what is asked for
FORMS = {
    **{
        f"{came} in, {made} out": (came, {"save_as": made})
        for came, made in itertools.product(("file", "folder"), ("single", "pipeline", "changed"))
    },
    **{
        f"{came} in, {made} of a LoRA out": (came, {**LORA, "save_as": made})
        for came, made in itertools.product(("file", "folder"), ("lora", "kohya", "single"))
    },
}


def model(family: str, to: Path) -> dict[str, Path]:
    """As a file and as a folder."""
    base = to / family
    if family == "sdxl_inpainting":
        folder("sdxl", base)
        inpainting(base, "StableDiffusionXLInpaintPipeline")
    else:
        folder(family, base)
    return {"folder": base, "file": write_folder(base, {}, to / f"{family}.safetensors")}


def trained(out: Path, there: dict[str, Path]) -> torch.Tensor:
    """What the last checkpoint's weights draw."""
    pipe = open_single(there["file"], config=there["folder"])
    weights = torch.load(next((out / "checkpoints").glob("*/trained.pt")), weights_only=True)
    unexpected = pipe.unet.load_state_dict(weights, strict=False).unexpected_keys
    assert not unexpected, unexpected
    return draw(pipe)


def tried(
    came: str, options: dict[str, Any], there: dict[str, Path], drawn: dict[str, torch.Tensor]
) -> str:
    """ "yes", or what is wrong."""
    with tempfile.TemporaryDirectory() as work:
        given: dict[str, Any] = {"output_dir": Path(work) / "out", **REQUEST, **SMALL, **options}
        if came == "file":
            given["architecture"] = there["folder"]
        done = forget(str(there[came]), "cat", **_asked(given))
        assert done is not None
        now = draw(done.pipeline)
        if torch.equal(now, drawn["before"]):
            return "draws what the model drew before"
        if options.get("train_modules") == "lora":
            same = torch.allclose(now, drawn.setdefault("LoRA", now), rtol=0, atol=1e-4)
        elif options.get("method") == "spm":
            same = True  # one form alone
        else:
            same = torch.equal(now, trained(done.folder, there))
        if not same:
            return "does not draw what was trained"
        return "; ".join(evidence.verify(done.folder)) or "yes"


def _asked(given: dict[str, Any]) -> dict[str, Any]:
    names = {"surrogate_concept": "instead", "remember_prompts": "keep"}
    return {names.get(k, k): v for k, v in given.items()}


def row(*what: Any) -> dict[str, Any]:
    """What `tried` says of it, or why it is refused."""
    began = time.perf_counter()
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        try:
            said = tried(*what)
        except InputError as error:
            said = f"refused: {error}"
        except Exception:  # a row of the table, not its end
            said = f"failed: {traceback.format_exc()}"
    return {"said": said, "seconds": round(time.perf_counter() - began, 1)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--families", nargs="+", default=[*FAMILIES, "sdxl_inpainting"])
    # these two start from nothing, or are of class-conditional models
    known = [n for n in methods if n not in ("retrain", "embedding_only")]
    parser.add_argument("--methods", nargs="+", choices=known, default=known)
    parser.add_argument("--json", type=Path, required=True, help="is gone on with, where it exists")
    args = parser.parse_args()
    found: dict[str, Any] = {"rows": {}}
    if args.json.exists():
        found = json.loads(args.json.read_text())
    found["versions"] = {"ebu_optim": __version__, "torch": torch.__version__}
    cases = [("file", {"method": n}, f"method {n}") for n in args.methods]
    cases += [(came, options, name) for name, (came, options) in FORMS.items()]
    with tempfile.TemporaryDirectory() as work:
        os.environ["EBU_OPTIM_CACHE"] = f"{work}/cache"
        for family in args.families:
            there = model(family, Path(work))
            drawn = {"before": draw(open_single(there["file"], config=there["folder"]))}
            rows = found["rows"].setdefault(family, {})
            for came, options, name in tqdm(cases, desc=family):
                if name not in rows:
                    rows[name] = row(came, options, there, drawn)
                    with replacing(args.json) as file:
                        file.write_text(json.dumps(found, indent=1) + "\n")
    wrong = [
        f"{family}, {name}: {r['said'].strip().splitlines()[-1]}"
        for family, rows in found["rows"].items()
        for name, r in rows.items()
        if r["said"] != "yes"
    ]
    print("\n".join(wrong))


if __name__ == "__main__":
    main()
