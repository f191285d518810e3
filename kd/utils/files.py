"""Files that are either whole or not there."""

import errno
import hashlib
import json
import math
import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path

import numpy as np
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
    """Let `write(temporary path)` make the file, then put it in place; a failure leaves the old one.

    Raises OSError, which names the file.
    """
    partial = path.with_name(f".{path.name}.partial")
    try:
        write(partial)
        sync_file(partial)
        os.replace(partial, path)
        sync_folder(path.parent)
    except OSError as error:
        error.filename = error.filename or str(path)  # a full disk names none
        raise
    finally:
        partial.unlink(missing_ok=True)


def write_folder(folder: Path, write) -> None:
    """Let `write(temporary folder)` fill it, then put it in the place of `folder`; a failure leaves the old one."""
    partial, old = (folder.with_name(f".{folder.name}.{state}") for state in ("partial", "old"))
    if old.exists() and not folder.exists():  # killed between the two renames below
        os.replace(old, folder)
    for left in (partial, old):  # by a process that was killed
        remove_tree(left)
    partial.mkdir()
    try:
        write(partial)
        for path in partial.iterdir():
            sync_file(path)
        sync_folder(partial)
        if folder.exists():
            os.replace(folder, old)
        os.replace(partial, folder)
        sync_folder(folder.parent)
    finally:
        if old.exists() and not folder.exists():
            os.replace(old, folder)
        remove_tree(partial)
        remove_tree(old)


def write_json(path: Path, content) -> None:
    text = json.dumps(content, indent=2) + "\n"
    write_atomically(path, lambda partial: partial.write_text(text, encoding="utf-8"))


def read_json(path: Path) -> dict:
    """The object in a JSON file. Raises UserError naming the file if there is none."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} cannot be read ({error})") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} holds no JSON object")
    return content


def read_json_lines(path: Path) -> list[dict]:
    """The objects in a file of one on each line. Raises UserError naming the file if it holds anything else."""
    try:
        lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} cannot be read ({error})") from error
    if not all(isinstance(line, dict) for line in lines):
        raise UserError(f"{path} holds lines that are no JSON objects")
    return lines


def is_number(value: object) -> bool:
    """Whether what JSON held is a number that a float can hold: neither NaN nor infinite, nor true or false."""
    try:
        return type(value) in (int, float) and math.isfinite(value)
    except OverflowError:  # JSON knows whole numbers of any length
        return False


def write_weights(path: Path, weights: Mapping[str, Tensor]) -> None:
    # Copies, because safetensors refuses tensors that share memory (tied weights) or are not contiguous.
    copies = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in weights.items()}

    def save(partial: Path) -> None:
        try:
            save_file(copies, partial)
        except SafetensorError as error:  # a full disk, by its own name
            number = re.search(r"os error (\d+)", str(error))
            raise OSError(int(number[1]) if number else errno.EIO, str(error)) from error

    write_atomically(path, save)


def read_weights(path: Path) -> dict[str, Tensor]:
    """Tensors of a safetensors file, without the prefixes that DDP and torch.compile leave."""
    try:
        weights = load_file(path)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path} cannot be read ({error})") from error
    return without_prefixes(weights, path)


def without_prefixes(weights: dict[str, Tensor], path: Path) -> dict[str, Tensor]:
    """Without what data parallelism and torch.compile put before the names. Raises UserError for one held twice."""
    names = {name: name.replace("_orig_mod.", "") for name in weights}
    if all(name.startswith("module.") for name in names.values()):  # else a network's own part may be called module
        names = {name: short.removeprefix("module.") for name, short in names.items()}
    if len(set(names.values())) < len(names):
        raise UserError(f"{path} holds a weight twice, with a wrapper's prefix and without")
    return {names[name]: tensor for name, tensor in weights.items()}


def load_weights(network: torch.nn.Module, path: Path) -> None:
    """Strictly: every weight must be there, fit and be finite. Raises UserError with the first misfits."""
    weights = read_weights(path)
    if bad := not_finite(weights):
        raise UserError(f"{path}: {bad} holds NaN or infinity; no network was ever scored with that")
    try:
        network.load_state_dict(weights)
    except RuntimeError as error:
        lines = [line.strip() for line in str(error).splitlines()[1:3]]
        raise UserError(f"{path} does not fit the network: {' '.join(lines)[:300]}") from error


def not_finite(weights: Mapping[str, Tensor]) -> str | None:
    """The name of the first tensor, parameter or buffer, that holds NaN or infinity. The host waits for the device."""
    floats = {name: tensor for name, tensor in weights.items() if tensor.is_floating_point()}
    if not floats:
        return None
    wide = lambda tensor: tensor if tensor.itemsize > 1 else tensor.float()  # noqa: E731  eight bits cannot be asked
    fine = torch.stack([wide(tensor).isfinite().all() for tensor in floats.values()]).tolist()
    return next((name for name, one in zip(floats, fine) if not one), None)


def sha256_file(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def remove_tree(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)


#: (kd.arrays) Arrays in .npy files, most of them as memory maps.


def create_map(path: Path, dtype: np.dtype | type, shape: tuple[int, ...]) -> np.ndarray:
    """A new .npy file as a memory map, its room on the disk taken already.

    Without that a disk that fills up later ends the process with SIGBUS, and no word. Raises OSError naming the file.
    """
    array = np.lib.format.open_memmap(path, "w+", dtype, shape)
    if hasattr(os, "posix_fallocate"):
        with open(path, "rb+") as file:
            try:
                os.posix_fallocate(file.fileno(), 0, os.fstat(file.fileno()).st_size)
            except OSError as error:
                if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL):  # a file system that cannot promise room
                    del array
                    path.unlink()
                    raise OSError(error.errno, error.strerror, str(path)) from error
    return array


def read_array(path: Path, mode: str | None = None) -> np.ndarray:
    """An .npy file, with `mode` as a memory map. Raises UserError naming the file if it holds no array."""
    try:
        array = np.load(path, mmap_mode=mode)
    except Exception as error:  # numpy parses the header as Python, which fails in as many ways as there are bytes
        raise UserError(f"{path} cannot be read ({type(error).__name__}: {str(error)[:200]})") from error
    if not isinstance(array, np.ndarray):
        raise UserError(f"{path} holds no array")
    return array


def write_array(path: Path, array: np.ndarray) -> None:
    """As np.save, whose error for a full disk says neither that nor which file."""
    kept = create_map(path, array.dtype, array.shape)
    kept[...] = array
    kept.flush()
