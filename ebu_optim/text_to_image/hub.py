"""Upload the result to the hub: what can go wrong is asked beforehand, and loses nothing."""

from __future__ import annotations

import argparse
import shlex
from pathlib import Path
from typing import Any

import huggingface_hub
from accelerate.utils import broadcast_object_list
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from ..errors import InputError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("hub").add_argument
    add("--push_to_hub", action="store_true", help="upload the result, once it is saved")
    add("--hub_model_id", help="name or owner/name; default: the name of --output_dir")
    add("--hub_private_repo", action="store_true", help="nobody else sees it")


def check(args: argparse.Namespace) -> None:
    """What can be said without a network."""
    if not args.push_to_hub:
        for name in ("hub_model_id", "hub_private_repo"):
            if getattr(args, name):
                raise InputError(f"--{name} is for --push_to_hub: give that too, or leave it out")
        return
    args.hub_model_id = args.hub_model_id or args.output_dir.resolve().name
    try:
        validate_repo_id(args.hub_model_id)
    except HFValidationError as error:
        raise InputError(f"--hub_model_id {args.hub_model_id}: {error}") from error
    if huggingface_hub.get_token() is None:
        raise InputError(
            "--push_to_hub: there is no token here: log in with `hf auth login`, with a token that "
            "may write"
        )


def create(args: argparse.Namespace, accelerator: Any) -> None:
    """Make the repository, where it is not there yet, and --hub_model_id its whole name.

    Raises:
        InputError: in all processes: no network, a token that may not write there, or the
            repository is public and --hub_private_repo is asked for.
    """
    if not args.push_to_hub:
        return
    said: list[Any] = [None, None]
    if accelerator.is_main_process:
        try:
            said[0] = _create(args.hub_model_id, args.hub_private_repo)
        except InputError as error:
            said[1] = str(error)
    broadcast_object_list(said)
    args.hub_model_id, failed = said
    if failed:
        raise InputError(failed)


def _create(name: str, private: bool) -> str:
    # a repository that is there keeps its visibility, whatever is asked
    try:
        visible = {"private": True} if private else {}
        name = huggingface_hub.create_repo(name, exist_ok=True, **visible).repo_id
        public = private and not huggingface_hub.model_info(name).private
    except Exception as error:  # the client's own kinds, and those of what it is made of
        raise InputError(
            f"--hub_model_id {name} cannot be made on the hub ({_short(error)}). Is there a "
            "network, is the owner you or an organization of yours, may your token write (`hf auth "
            "login`)? Without --push_to_hub the result can be uploaded later"
        ) from error
    if public:
        raise InputError(
            f"--hub_private_repo: {name} is on the hub already, and public: give another "
            "--hub_model_id, or make it private in its settings"
        )
    return name


def upload(args: argparse.Namespace, folder: Path, message: str) -> str:
    """Upload the folder in one commit; the address.

    Raises:
        InputError: with the command that goes on.
    """
    name = args.hub_model_id
    try:
        huggingface_hub.upload_folder(repo_id=name, folder_path=folder, commit_message=message)
    except Exception as error:
        raise InputError(
            f"the upload to {name} failed ({_short(error)}). Nothing is lost: the result is in "
            f"{folder}, and this goes on:\n  hf upload {name} {shlex.quote(str(folder))}"
        ) from error
    return f"https://huggingface.co/{name}"


def _short(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"
