"""Upload the result to the hub. Everything that can fail is checked first, and nothing is lost."""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import huggingface_hub
from accelerate.utils import broadcast_object_list
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from ..errors import InputError
from ..training.fields import option


@dataclass(frozen=True, kw_only=True)
class HubOptions:
    """Whether and where the result is uploaded."""

    group: ClassVar[str] = "hub"

    push_to_hub: bool = option(False, help="Upload the result to the hub once it is saved.")
    hub_model_id: str | None = option(
        None,
        help="Repository on the hub: name or owner/name. Default: the name of the output folder.",
    )
    hub_private_repo: bool = option(False, help="Make the repository private.")

    @property
    def hub(self) -> str | None:
        """The repository that the result is uploaded to; None without an upload."""
        return self.hub_model_id if self.push_to_hub else None

    def check_hub(self) -> None:
        """Check what can be checked without a network.

        Raises:
            InputError: an invalid repository name, no token, or hub options without --push_to_hub.
        """
        if not self.push_to_hub:
            for name in ("hub_model_id", "hub_private_repo"):
                if getattr(self, name):
                    raise InputError(
                        f"--{name} needs --push_to_hub: give that too, or leave --{name} out"
                    )
            return
        try:
            validate_repo_id(self.hub_model_id)
        except HFValidationError as error:
            raise InputError(f"--hub_model_id {self.hub_model_id}: {error}") from error
        if huggingface_hub.get_token() is None:
            raise InputError(
                "--push_to_hub: this machine has no token: log in with `hf auth login`, with a "
                "token that can write"
            )


def create(args: Any, accelerator: Any) -> str | None:
    """Create the repository if it does not exist.

    Returns:
        Its full name; None without --push_to_hub.

    Raises:
        InputError: on all processes: no network, a token that cannot write there, or a public
            repository with --hub_private_repo.
    """
    if not args.push_to_hub:
        return None
    said: list[Any] = [None, None]
    if accelerator.is_main_process:
        try:
            said[0] = _create(args.hub_model_id, args.hub_private_repo)
        except InputError as error:
            said[1] = str(error)
    broadcast_object_list(said)
    if said[1]:
        raise InputError(said[1])
    return str(said[0])


def _create(name: str, private: bool) -> str:
    # the hub keeps the visibility of an existing repository, whatever `private` says
    try:
        visible = {"private": True} if private else {}
        name = huggingface_hub.create_repo(name, exist_ok=True, **visible).repo_id
        public = private and not huggingface_hub.model_info(name).private
    except Exception as error:  # the client's own types, and those of the libraries under it
        raise InputError(
            f"--hub_model_id {name} cannot be created on the hub ({_short(error)}). Check the "
            "network, that you or your organization own the name, and that your token can write "
            "(`hf auth login`). Without --push_to_hub the result can be uploaded later"
        ) from error
    if public:
        raise InputError(
            f"--hub_private_repo: {name} already exists on the hub and is public: give another "
            "--hub_model_id, or make it private in its settings"
        )
    return name


def upload(args: Any, folder: Path, message: str) -> str:
    """Upload the folder in one commit and return its address.

    Raises:
        InputError: the upload failed. The message has the command that continues it.
    """
    name = args.hub_model_id
    try:
        huggingface_hub.upload_folder(repo_id=name, folder_path=folder, commit_message=message)
    except Exception as error:
        raise InputError(
            f"the upload to {name} failed ({_short(error)}). Nothing is lost: the result is in "
            f"{folder}, and this command continues:\n  hf upload {name} {shlex.quote(str(folder))}"
        ) from error
    return f"https://huggingface.co/{name}"


def _short(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"
