"""Download run folders and data sets of logits from the Hub, and upload exports and such sets to it.

Only safetensors and JSON are ever downloaded.
"""

import re
import shlex
from collections.abc import Sequence
from pathlib import Path

from kd.errors import UserError, require
from kd.utils.console import one_line
from kd.utils.system import expand_user

DATASET = "dataset"  # a kind of repository

OWN = (
    "model.*",
    "export.*",
    "best.safetensors",
    "ema.safetensors",
    "preprocessing.json",
    "summary.json",
    "metrics.jsonl",
)
"""What pushes of exports, runs and epochs write. A new push removes an earlier one's: it describes other weights."""

NEEDED = ("model.json", "model.safetensors", "summary.json", "config.json")
"""What kd.load reads. Nothing else of someone's repository is downloaded."""


def local_folder(name: str | Path) -> Path:
    """The folder `name`; if there is none and `name` looks like a Hub id, a downloaded copy of that repository.

    Raises: UserError if the Hub does not have it or cannot be reached.
    """
    path = expand_user(name)
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


def fetch(name: str, patterns: Sequence[str], revision: str = "") -> Path:
    """The files of the data set `name` that match `patterns`, in a folder of its cache named by the commit.

    Without a network, what an earlier call fetched. Raises UserError if that is missing or has a part of the files.
    """
    from huggingface_hub import snapshot_download

    try:
        options = {"repo_type": DATASET, "revision": revision or None, "allow_patterns": list(patterns)}
        return Path(snapshot_download(name, **options))
    except Exception as error:  # the HTTP client's own errors differ between versions of the library
        where = f"{name}@{revision}" if revision else name
        raise UserError(
            f"hub:{where}: cannot be downloaded from the Hub ({one_line(error)}); check the name, the network and, for"
            " a private repository, HF_TOKEN"
        ) from error


def check_id(name: str, flag: str = "--push") -> None:
    """Raises UserError if `name` cannot be the id of a repository; needs no network."""
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    try:
        validate_repo_id(name)
        valid = name.count("/") == 1
    except HFValidationError:
        valid = False
    require(valid, f"{flag} {name}: is no Hub id; give USER/NAME, of letters, digits, '-', '_' and '.'")


def push(folder: Path, name: str, private: bool) -> str:
    """Upload every file of an exported folder to the model repository `name` in one commit; returns its URL.

    Raises: UserError, with the command to try again, if the upload fails. The folder stays as it is.
    """
    try:
        return upload(folder, name, "Export of a run of kd", private)
    except UserError:
        raise
    except Exception as error:  # the HTTP client's own errors differ between versions of the library
        command = shlex.join(["hf", "upload", name, str(folder), *(["--private"] if private else [])])
        raise UserError(
            f"--push {name}: upload failed ({one_line(error)}); the export is complete in {folder}: run `{command}`"
            " once there is a network and a token (`hf auth login`, or HF_TOKEN)"
        ) from error


def push_dataset(folder: Path, name: str, private: bool, old: Sequence[str]) -> str:
    """Upload every file of `folder` to the data set `name` in one commit, in place of those that match `old`.

    Returns its URL. Raises UserError if the upload fails; the repository is then as it was.
    """
    try:
        return upload(folder, name, "Logits of a teacher, by kd", private, DATASET, old)
    except UserError:
        raise
    except Exception as error:  # the HTTP client's own errors differ between versions of the library
        raise UserError(
            f"push {name}: upload failed ({one_line(error)}); the same command tries again once there is a network and"
            " a token that may write (`hf auth login`, or HF_TOKEN)"
        ) from error


def upload(
    folder: Path,
    name: str,
    message: str,
    private: bool | None = None,
    kind: str = "model",
    old: Sequence[str] = OWN,
) -> str:
    """Upload every file of `folder` to the repository `name` of a `kind` in one commit; returns its URL.

    Removes those of an earlier upload that match `old` and are not in the folder. A new repository is private if
    `private` says so, and by the account's own default if None. Raises UserError if the repository is there and public,
    and should be private; and whatever the library raises.
    """
    from huggingface_hub import HfApi

    hub = HfApi()
    hub.create_repo(name, private=private, exist_ok=True, repo_type=kind)
    require(
        not private or bool(hub.repo_info(name, repo_type=kind).private),
        f"{name}: is public on the Hub, which --private does not change; nothing was uploaded: make it private in its"
        " settings there, or give another name",
    )
    options = {"commit_message": message, "delete_patterns": list(old), "repo_type": kind}
    hub.upload_folder(repo_id=name, folder_path=folder, **options)
    return f"{hub.endpoint}/{'datasets/' * (kind == DATASET)}{name}"
