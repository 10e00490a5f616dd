"""What `ebu evaluate` takes beside sampling and judging.

    python -m tests.benchmarks.bench_evaluate                      # a pipeline with random weights
    python -m tests.benchmarks.bench_evaluate --pipeline outputs/world/pipeline

Prints the seconds of a whole evaluation by ``unlearncanvas-digits`` and the share of them that is
neither in the pipeline's calls nor in the judges': opening the model, hashes, pictures to disk and
back, counting. Beside it the same for an evaluation that draws nothing, since all is there.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from ebu_optim.files import save_tensors
from ebu_optim.protocols import Evaluate, evaluate, judges
from ebu_optim.text_to_image import drawing
from ebu_optim.worlds.styled_digits.judges import CLASSES, Judge

from ..text_to_image import pipeline


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pipeline", type=Path)
    parser.add_argument("--steps", type=int, default=20)
    args = parser.parse_args()
    os.environ["TQDM_DISABLE"] = "1"
    with tempfile.TemporaryDirectory() as folder:
        print(json.dumps(measured(args.pipeline, args.steps, Path(folder)), indent=1))


def measured(model: Path | None, steps: int, folder: Path) -> dict[str, Any]:
    spent = {"sampling": 0.0, "judging": 0.0}

    def timed(name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def called(*args: Any, **options: Any) -> Any:
            begin = time.perf_counter()
            found = call(*args, **options)
            spent[name] += time.perf_counter() - begin
            return found

        return called

    for name, classes in CLASSES.items():
        state = Judge(len(classes)).state_dict()
        meta = {"classes": list(classes), "found": {}}
        save_tensors(folder / "judges" / f"{name}.safetensors", state, meta)
    drawing.together = timed("sampling", drawing.together)
    opened = dict(judges.JUDGES)
    for name, opens in opened.items():
        judges.JUDGES[name] = lambda *given, opens=opens: _timed(opens(*given), timed)  # type: ignore[misc]
    given = Evaluate(
        pretrained_model_name_or_path=[str(model or pipeline(folder / "tiny"))],
        protocol=["unlearncanvas-digits"],
        forget=["seven"],
        change=[f"steps={steps}"],
        files=[f"digits-judges={folder / 'judges'}"],
        sample_batch_size=60,
        output_dir=folder / "evaluated",
    )
    found = {}
    for name in ("drawn", "again"):
        spent.update(sampling=0.0, judging=0.0)
        begin = time.perf_counter()
        evaluate(given)
        whole = time.perf_counter() - begin
        rest = whole - sum(spent.values())
        found[name] = {"seconds": whole, **spent, "rest": rest, "share": rest / whole}
    return {**found, "torch": torch.__version__, "threads": torch.get_num_threads()}


def _timed(judge: Any, timed: Any) -> Any:
    return judge if isinstance(judge, str) else judge._replace(look=timed("judging", judge.look))


if __name__ == "__main__":
    main()
