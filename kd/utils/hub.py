"""Runs on the Hub: fetched by their id, and sent there. Safetensors and JSON alone are ever fetched."""

import re
import shlex
from pathlib import Path

from kd.errors import UserError, require

# What kd.load reads; nothing else of a stranger's repository comes onto the disk.
NEEDED = ("model.json", "model.safetensors", "summary.json", "config.json")


def local_folder(name: str | Path) -> Path:
    """The folder `name`, or, where there is none and it reads as a Hub id, the copy that is fetched from there.

    Raises: UserError where the Hub does not have it or cannot be asked.
    """
    path = Path(name).expanduser()
    looks_like_id = re.fullmatch(r"\w[\w.-]*/\w[\w.-]*(@[\w./-]+)?", str(name)) is not None
    return path if path.exists() or not looks_like_id else _fetch(str(name))


def _fetch(name: str) -> Path:
    from huggingface_hub import snapshot_download

    repository, _, revision = name.partition("@")
    try:
        return Path(snapshot_download(repository, revision=revision or None, allow_patterns=list(NEEDED)))
    except Exception as error:  # the HTTP client's own errors differ between versions of the library
        raise UserError(
            f"{name}: no such run folder here, and not to be had from the Hub ({_short(error)}); check the name,"
            " the network and, for a private one, HF_TOKEN"
        ) from error


def check_id(name: str) -> None:
    """Raises UserError where nothing can be pushed under `name`; asks nobody."""
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    try:
        validate_repo_id(name)
        sound = name.count("/") == 1
    except HFValidationError:
        sound = False
    require(sound, f"--push {name}: give USER/NAME, of letters, digits, '-', '_' and '.'")


def push(folder: Path, name: str, private: bool) -> str:
    """Send every file of an exported folder to the model repository `name` in one commit; returns its address.

    Raises: UserError, with what can still be done, where it cannot be sent. The folder stays as it is.
    """
    from huggingface_hub import HfApi

    try:
        hub = HfApi()
        hub.create_repo(name, private=private, exist_ok=True)
        # What an earlier export left there and this one lacks would go with a card that does not know it.
        old = ["model*", "export.*"]
        hub.upload_folder(repo_id=name, folder_path=folder, commit_message="Export of a run of kd", delete_patterns=old)
    except Exception as error:  # as above
        command = shlex.join(["hf", "upload", name, str(folder), *(["--private"] if private else [])])
        raise UserError(
            f"--push {name}: not sent ({_short(error)}); all of it is in {folder}, and `{command}`"
            " sends it once there is a network and a token (`hf auth login`, or HF_TOKEN)"
        ) from error
    return f"{hub.endpoint}/{name}"


def _short(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:200]
