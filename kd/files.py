"""Files that are either whole or not there."""

import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from kd.errors import UserError


def sync_folder(folder: Path) -> None:
    """Make names that were created or replaced in `folder` survive a power cut."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sync_file(path: Path) -> None:
    with open(path, "rb+") as file:
        os.fsync(file.fileno())


def write_atomically(path: Path, write) -> None:
    """Let `write(temporary path)` make the file, then put it in place; a failure leaves the old one."""
    partial = path.with_name(f".{path.name}.partial")
    try:
        write(partial)
        sync_file(partial)
        os.replace(partial, path)
        sync_folder(path.parent)
    finally:
        partial.unlink(missing_ok=True)


def write_json(path: Path, content) -> None:
    text = json.dumps(content, indent=2) + "\n"
    write_atomically(path, lambda partial: partial.write_text(text, encoding="utf-8"))


def read_json(path: Path) -> dict:
    """The object in a JSON file. Raises UserError naming the file if there is none."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read ({error})") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} holds no JSON object")
    return content


def write_weights(path: Path, weights: Mapping[str, Tensor]) -> None:
    # Copies, because safetensors refuses tensors that share memory (tied weights) or are not contiguous.
    copies = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in weights.items()}

    def save(partial: Path) -> None:
        try:
            save_file(copies, partial)
        except SafetensorError as error:  # a full disk, by its own name
            raise OSError(str(error)) from error

    write_atomically(path, save)


def read_weights(path: Path) -> dict[str, Tensor]:
    """Tensors of a safetensors file, without the prefixes that DDP and torch.compile leave."""
    try:
        weights = load_file(path)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path} cannot be read ({error})") from error
    weights = {name.replace("_orig_mod.", ""): tensor for name, tensor in weights.items()}
    wrapped = all(name.startswith("module.") for name in weights)  # else a network's own part may be called module
    return {name.removeprefix("module.") if wrapped else name: tensor for name, tensor in weights.items()}


def load_weights(network: torch.nn.Module, path: Path) -> None:
    """Strictly: every weight must be there and fit. Raises UserError with the first misfits."""
    try:
        network.load_state_dict(read_weights(path))
    except RuntimeError as error:
        lines = [line.strip() for line in str(error).splitlines()[1:3]]
        raise UserError(f"{path} does not fit the network: {' '.join(lines)[:300]}") from error


def sha256_file(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def remove_tree(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
