"""Upload the result to the hub: what can go wrong is asked beforehand, and loses nothing."""

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
    """Whether and where to the result is uploaded."""

    group: ClassVar[str] = "hub"

    push_to_hub: bool = option(False, help="Upload the result to the hub once it is saved.")
    hub_model_id: str | None = option(
        None,
        help="Repository on the hub: name or owner/name. Default: the name of the output folder.",
    )
    hub_private_repo: bool = option(False, help="Make the repository private.")

    @property
    def hub(self) -> str | None:
        """Where the result is uploaded to, if it is."""
        return self.hub_model_id if self.push_to_hub else None

    def check_hub(self) -> None:
        """What can be said without a network.

        Raises:
            InputError: no name for the hub; no token here; options without --push_to_hub.
        """
        if not self.push_to_hub:
            for name in ("hub_model_id", "hub_private_repo"):
                if getattr(self, name):
                    raise InputError(
                        f"--{name} is for --push_to_hub: give that too, or leave it out"
                    )
            return
        try:
            validate_repo_id(self.hub_model_id)
        except HFValidationError as error:
            raise InputError(f"--hub_model_id {self.hub_model_id}: {error}") from error
        if huggingface_hub.get_token() is None:
            raise InputError(
                "--push_to_hub: there is no token here: log in with `hf auth login`, with a token "
                "that may write"
            )


def create(args: Any, accelerator: Any) -> str | None:
    """Make the repository, where it is not there yet; its whole name, None without --push_to_hub.

    Raises:
        InputError: in all processes: no network, a token that may not write there, or the
            repository is public and --hub_private_repo is asked for.
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


def upload(args: Any, folder: Path, message: str) -> str:
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
