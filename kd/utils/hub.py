"""Download run folders from the Hub and upload exports to it. Only safetensors and JSON are ever downloaded."""

import re
import shlex
from pathlib import Path

from kd.errors import UserError, require
from kd.utils.console import one_line

NEEDED = ("model.json", "model.safetensors", "summary.json", "config.json")
"""What kd.load reads. Nothing else of someone's repository is downloaded."""


def local_folder(name: str | Path) -> Path:
    """The folder `name`; if there is none and `name` looks like a Hub id, a downloaded copy of that repository.

    Raises: UserError if the Hub does not have it or cannot be reached.
    """
    path = Path(name).expanduser()
    looks_like_id = re.fullmatch(r"\w[\w.-]*/\w[\w.-]*(@[\w./-]+)?", str(name)) is not None
    return path if path.exists() or not looks_like_id else _download(str(name))


def _download(name: str) -> Path:
    from huggingface_hub import snapshot_download

    repository, _, revision = name.partition("@")
    try:
        return Path(snapshot_download(repository, revision=revision or None, allow_patterns=list(NEEDED)))
    except Exception as error:  # the HTTP client's own errors differ between versions of the library
        raise UserError(
            f"{name}: no such run folder, and it cannot be downloaded from the Hub ({one_line(error)}); check the"
            " name, the network and, for a private repository, HF_TOKEN"
        ) from error


def check_id(name: str) -> None:
    """Raises UserError if `name` cannot be the id of a repository; needs no network."""
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    try:
        validate_repo_id(name)
        valid = name.count("/") == 1
    except HFValidationError:
        valid = False
    require(valid, f"--push {name}: is no Hub id; give USER/NAME, of letters, digits, '-', '_' and '.'")


def push(folder: Path, name: str, private: bool) -> str:
    """Upload every file of an exported folder to the model repository `name` in one commit; returns its URL.

    Raises: UserError, with the command to try again, if the upload fails. The folder stays as it is.
    """
    try:
        return upload(folder, name, "Export of a run of kd", private)
    except Exception as error:  # the HTTP client's own errors differ between versions of the library
        command = shlex.join(["hf", "upload", name, str(folder), *(["--private"] if private else [])])
        raise UserError(
            f"--push {name}: upload failed ({one_line(error)}); the export is complete in {folder}: run `{command}`"
            " once there is a network and a token (`hf auth login`, or HF_TOKEN)"
        ) from error


def upload(folder: Path, name: str, message: str, private: bool | None = None) -> str:
    """Upload every file of `folder` to the model repository `name` in one commit; returns its URL.

    A new repository is private if `private` says so, and by the account's own default if None. Raises whatever the
    library raises.
    """
    from huggingface_hub import HfApi

    hub = HfApi()
    hub.create_repo(name, private=private, exist_ok=True)
    # Files of an earlier upload would otherwise stay beside a model card that does not describe them.
    old = ["model*", "export.*"]
    hub.upload_folder(repo_id=name, folder_path=folder, commit_message=message, delete_patterns=old)
    return f"{hub.endpoint}/{name}"
