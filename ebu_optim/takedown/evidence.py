"""The evidence of a run: hashes of the base model, of the training sets and of the result.

Anybody can compute the hashes again. The file is signed on request."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .. import __version__
from .._extras import require
from ..class_conditional.models import load_unet
from ..errors import InputError
from ..files import replacing
from ..metrics import versions
from ..modules import model_hash
from ..text_to_image import pipelines
from ..text_to_image.pipelines import Model

FILE, SIGNATURE, CONFIG = "evidence.json", "evidence.sig", "run.yaml"
#: Not hashed: what a run needs to resume, and the evidence itself.
LEFT_OUT = ("checkpoints", "logs", FILE, SIGNATURE, ".lock")
PROVES = (
    "That these files came from this base by this configuration is the maker's statement. The "
    "hashes show that nothing was changed since. They do not show that the concept is gone: see "
    "report/, and attack the result."
)


def write(args: Any) -> Path:
    """Hash everything in the output folder and write `evidence.json`; sign it on request.

    Returns:
        The path of `evidence.json`.
    """
    folder = Path(args.output_dir)
    spoken = json.loads((folder / "unlearn.json").read_text(encoding="utf-8"))
    found = {
        "kind": "ebu_optim evidence",
        "version": __version__,
        "forget": args.forget,
        "base": {
            "name": args.pretrained_model_name_or_path,
            "revision": getattr(args, "revision", None),
            "variant": getattr(args, "variant", None),
            "files": _given(args),
            "denoiser_hash": spoken["base_hash"],
            "made_of": spoken.get("made_of", {}),
        },
        "files": files(folder),
        "versions": versions(),
        "what_it_proves": PROVES,
    }
    path = folder / FILE
    with replacing(path) as work:
        work.write_text(json.dumps(found, indent=1, ensure_ascii=False), encoding="utf-8")
    (folder / SIGNATURE).unlink(missing_ok=True)
    if args.sign_key is not None:
        sign(folder, args.sign_key, getattr(args, "sign_certificate", []))
    return path


def files(folder: Path) -> dict[str, str]:
    """Path relative to the folder -> SHA-256, without `LEFT_OUT` and hidden files."""
    there = sorted(p for p in folder.rglob("*") if p.is_file())
    return {
        name: _sha256(p)
        for p in there
        if (name := p.relative_to(folder).as_posix()).split("/")[0] not in LEFT_OUT
        and not p.name.startswith(".")
    }


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        digest = hashlib.sha256()
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def sign(folder: Path, key: Path, certificates: Sequence[Path] = ()) -> None:
    """Sign `evidence.json`, which names every file by its hash, with OpenSSF's model-signing.

    Raises:
        InputError: see `signer`.
    """
    signer(key, certificates).sign(folder / FILE, folder / SIGNATURE)


def signer(key: Path, certificates: Sequence[Path] = ()) -> Any:
    """The signing config, with the keys already read.

    Args:
        certificates: the key's certificate, then the chain up to the root; empty signs with the
            key alone.

    Raises:
        InputError: `key` is not an elliptic-curve private key, or `certificates` do not belong
            to it.
    """
    config = require("model_signing.signing", "sign").Config()
    try:
        config.use_elliptic_key_signer(private_key=key)
    except Exception as error:  # the library raises many types
        raise InputError(
            f"--sign_key {key} must be an elliptic-curve private key in PEM without a password "
            f"({error}): make one with `openssl ecparam -name prime256v1 -genkey -noout -out "
            "key.pem`"
        ) from error
    if certificates:
        try:
            config.use_certificate_signer(
                private_key=key,
                signing_certificate=certificates[0],
                certificate_chain=list(certificates[1:]),
            )
        except Exception as error:
            raise InputError(
                f"--sign_certificate {' '.join(map(str, certificates))}: must be PEM certificates "
                f"that belong to --sign_key {key} ({error})"
            ) from error
    return config


def verify(
    folder: str | Path,
    *,
    public_key: Path | None = None,
    certificates: Sequence[Path] = (),
    base: str | None = None,
) -> list[str]:
    """Compute every hash again and compare it with the evidence.

    Args:
        public_key: the key to check the signature with; None does not check it.
        certificates: trusted root certificates, for a signature that was made with a certificate.
        base: the model before unlearning, if it has moved. Its parts are hashed too if it is on
            this machine.

    Returns:
        One line for each difference from `evidence.json`; empty if there is none.

    Raises:
        InputError: the folder has no complete `evidence.json`.
    """
    folder = Path(folder)
    try:
        said = json.loads((folder / FILE).read_text(encoding="utf-8"))
        before, model = said["files"], said["base"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"{folder} has no complete {FILE}; give the output folder of `ebu forget`"
        ) from error
    now = files(folder)
    wrong = [f"{name}: is missing" for name in before if name not in now]
    wrong += [f"{n}: was changed" for n in before if n in now and now[n] != before[n]]
    wrong += [f"{name}: was added" for name in now if name not in before]
    if public_key is not None or certificates:
        wrong += _signature(folder, public_key, certificates)
    return wrong + _base(model, base)


def _signature(folder: Path, key: Path | None, certificates: Sequence[Path]) -> list[str]:
    if not (folder / SIGNATURE).is_file():
        return [f"{SIGNATURE}: is missing, the evidence was not signed"]
    verifying = require("model_signing.verifying", "sign")
    config = verifying.Config()
    try:
        if key is not None:
            config.use_elliptic_key_verifier(public_key=key)
        else:
            config.use_certificate_verifier(certificate_chain=list(certificates))
        config.verify(folder / FILE, folder / SIGNATURE)
    except Exception as error:  # the library raises many types
        whose = key or certificates[0]
        return [f"{SIGNATURE}: {FILE} is not what the owner of {whose} signed ({error})"]
    return []


def _given(args: Any) -> dict[str, str]:
    """Path -> SHA-256 of the files that the base model consists of; empty for a folder."""
    paths = [args.pretrained_model_name_or_path, *(getattr(args, n, None) for n in ("vae", "lora"))]
    return {str(p): _sha256(Path(p)) for p in paths if p is not None and Path(p).is_file()}


def _base(model: dict[str, Any], given: str | None) -> list[str]:
    """Differences of the base if it is on this machine: files by bytes, a folder by its parts."""
    name = given or model["name"]
    if not Path(name).exists():
        return [] if given is None else [f"base: {given} does not exist"]
    if Path(name).is_file():
        known = {**model["files"], name: model["files"].get(model["name"])}
        now = {p: _sha256(Path(p)) for p in known if Path(p).is_file() and p != model["name"]}
        now |= {name: _sha256(Path(name))}
        return [f"base: {p} is a different file" for p, of in now.items() if known[p] != of]
    if (Path(name) / "classes.json").is_file():
        same = model_hash(load_unet(name)[0]) == model["denoiser_hash"]
        return [] if same else [f"base: the unet of {name} is a different one"]
    where = Model(pretrained_model_name_or_path=name, variant=model["variant"])
    now = pipelines.parts(pipelines.fetch(where), model["variant"])
    return [
        f"base: the {part} of {name} is a different one"
        for part, of in now.items()
        if model["made_of"].get(part, of) != of
    ]
