"""The file of `full_size.py`: made here, and beside what a run made of it."""

from __future__ import annotations

import importlib.util
import shutil
import time
from pathlib import Path
from typing import Any, BinaryIO

import torch
from measure import resident

EMA = 8  # tensors of model_ema


def make(work: Path, tiny: bool) -> dict[str, Any]:
    """`work`/model.safetensors; of a tiny one also the folder that says how it is built."""
    from ebu_optim.formats import write_folder

    folder, plain, file = (work / n for n in ("folder", "plain.safetensors", "model.safetensors"))
    configurations(folder, tiny)
    torch.manual_seed(0)
    for part in ("text_encoder", "vae", "unet"):
        random_part(folder, part)
    start = time.perf_counter()
    write_folder(folder, {}, plain)
    seconds = time.perf_counter() - start
    with_ema(plain, file)
    plain.unlink()
    if not tiny:
        shutil.rmtree(folder)
    size = file.stat().st_size
    return {"bytes": size, "seconds of write_folder": seconds, "peak": resident("VmHWM")}


def configurations(folder: Path, tiny: bool) -> None:
    if not tiny:
        from ebu_optim.formats import shipped_folder

        shutil.copytree(shipped_folder("sd1"), folder)
        return
    place = Path(__file__).parents[1] / "text_to_image.py"
    spec: Any = importlib.util.spec_from_file_location("small", place)
    small = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(small)
    small.pipeline(folder)


def random_part(folder: Path, part: str) -> None:
    """Weights in float16 beside the part's configuration; the model ends with this call."""
    from ebu_optim.formats.architecture import Architecture, from_folder

    made = Architecture(from_folder(folder), folder, "", "")
    kind, config = made.kind(part), made.configs[part]
    if part == "text_encoder":
        model = kind(kind.config_class(**config))
    else:
        model = kind.from_config(config)
    torch.nn.Module.to(model, torch.float16).save_pretrained(folder / part)


def with_ema(plain: Path, file: Path) -> None:
    """The same with some of the UNet's tensors once more, under the names of its average."""
    from ebu_optim.formats import read_header
    from ebu_optim.formats.writing import header_bytes

    header = read_header(plain)
    unet = [n for n in header.tensors if n.startswith("model.diffusion_model.")][:EMA]
    names = {n: n for n in header.tensors}
    names |= {f"model_ema.{n.removeprefix('model.').replace('.', '')}": n for n in unet}
    kinds = {n: (header.tensors[of].dtype, header.tensors[of].shape) for n, of in names.items()}
    with plain.open("rb") as source, file.open("wb") as target:
        target.write(header_bytes(kinds, header.metadata))
        for of in names.values():
            target.write(stored(source, header.tensors[of]))


def stored(file: BinaryIO, entry: Any) -> bytes:
    file.seek(entry.first)
    return file.read(entry.last - entry.first)


def compare(args: Any) -> dict[str, Any]:
    """The result of the run with these options beside the file that it was given, and beside the
    weights that its last checkpoint holds.

    Raises:
        AssertionError: it is not what it must be.
    """
    from ebu_optim.formats import Single
    from ebu_optim.formats.header import read
    from ebu_optim.takedown import evidence

    made = next((args.output_dir / "single").glob("*.safetensors"))
    given = (args.pretrained_model_name_or_path, made)
    one, two = (Single(f, config=args.architecture) for f in given)
    before, after = one.checkpoint.header, two.checkpoint.header
    ema = {n for n in before.tensors if n.startswith("model_ema.")}
    assert len(ema) == EMA
    assert before.tensors.keys() - after.tensors.keys() == ema
    assert after.tensors.keys() <= before.tensors.keys()
    assert {e.dtype for e in after.tensors.values()} == {"F16"}
    assert before.metadata.items() <= after.metadata.items()
    with before.path.open("rb") as old, after.path.open("rb") as new:
        differ = {
            n for n, e in after.tensors.items() if stored(old, before.tensors[n]) != stored(new, e)
        }
    checkpoint = next((args.output_dir / "checkpoints").glob("*/trained.pt"))
    trained = torch.load(checkpoint, weights_only=True, mmap=True)
    places = two.table("unet")
    assert differ
    assert differ <= {places[n].key for n in trained}
    with after.path.open("rb") as file:
        for name, t in trained.items():
            at = places[name]
            there = read(file, after.tensors[at.key], (at.first, at.last))
            assert there.reshape(t.shape).equal(t.half()), name
    assert evidence.verify(args.output_dir) == []
    return {
        "bytes": made.stat().st_size,
        "tensors": len(after.tensors),
        "changed": len(differ),
        "trained": len(trained),
        "dropped": len(ema),
    }
