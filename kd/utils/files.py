"""Read and write JSON, weights and arrays; a file is written completely or not at all."""

import errno
import hashlib
import json
import math
import os
import re
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from kd.errors import UserError
from kd.utils.console import clip, one_line

COUNTER = "num_batches_tracked"  # BatchNorm's count of batches, which evaluation does not use


def sync_folder(folder: Path) -> None:
    """Flush a folder's entries to the disk, so that new and replaced names survive a power cut."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sync_file(path: Path) -> None:
    with open(path, "rb+") as file:
        os.fsync(file.fileno())


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Call `write(temporary path)`, then rename the file to `path`; a failure leaves the old file.

    Raises OSError naming the file.
    """
    partial = path.with_name(f".{path.name}.partial")
    try:
        write(partial)
        sync_file(partial)
        os.replace(partial, path)
        sync_folder(path.parent)
    except OSError as error:
        error.filename = error.filename or str(path)  # the error of a full disk has none
        raise
    finally:
        partial.unlink(missing_ok=True)


def write_folder(folder: Path, write: Callable[[Path], object]) -> None:
    """Call `write(temporary folder)`, then rename it to `folder`; a failure leaves the old folder."""
    partial, old = (folder.with_name(f".{folder.name}.{state}") for state in ("partial", "old"))
    if old.exists() and not folder.exists():  # an earlier process was killed between the two renames below
        os.replace(old, folder)
    for leftover in (partial, old):
        remove_tree(leftover)
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


def write_text(path: Path, text: str) -> None:
    """Write a UTF-8 file whole or not at all."""
    write_atomically(path, lambda partial: partial.write_text(text, encoding="utf-8"))


def write_json(path: Path, content) -> None:
    write_text(path, json.dumps(content, indent=2) + "\n")


def read_json(path: Path) -> dict:
    """Read the object in a JSON file. Raises UserError naming the file if there is none."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: cannot be read ({error})") from error
    if not isinstance(content, dict):
        raise UserError(f"{path}: is not a JSON object")
    return content


def read_json_lines(path: Path) -> list[dict]:
    """Read a file with one JSON object on each line. Raises UserError naming the file if it has anything else."""
    try:
        lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: cannot be read ({error})") from error
    if not all(isinstance(line, dict) for line in lines):
        raise UserError(f"{path}: has lines that are not JSON objects")
    return lines


def is_number(value: object) -> bool:
    """Whether a JSON value is a finite number that fits a float; true and false are none."""
    try:
        return type(value) in (int, float) and math.isfinite(value)
    except OverflowError:  # JSON has integers of any length
        return False


def is_list(value: object, valid: Callable[[object], bool], length: int | None = None) -> bool:
    """Whether a JSON value is a list of valid entries, and of this length if one is given."""
    return isinstance(value, list) and length in (None, len(value)) and all(map(valid, value))


class HostCopies(dict[str, Tensor]):
    """Contiguous copies of tensors in the host's memory, as `write_weights` needs them."""


def host_copies(weights: Mapping[str, Tensor]) -> HostCopies:
    copies = {name: tensor.detach().cpu().contiguous() for name, tensor in weights.items()}
    shared = {name for name, copy in copies.items() if copy.data_ptr() == weights[name].data_ptr()}
    return HostCopies({name: copy.clone() if name in shared else copy for name, copy in copies.items()})


def write_weights(path: Path, weights: Mapping[str, Tensor]) -> None:
    # Copies, because safetensors refuses tensors that share memory (tied weights) or are not contiguous.
    copies = weights if isinstance(weights, HostCopies) else host_copies(weights)

    def save(partial: Path) -> None:
        try:
            save_file(copies, partial)
        except SafetensorError as error:  # of the library's own kind for a full disk
            number = re.search(r"os error (\d+)", str(error))
            raise OSError(int(number[1]) if number else errno.EIO, str(error)) from error

    write_atomically(path, save)


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Read a safetensors file, under the names that it has. Raises UserError naming the file if it cannot be read."""
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path}: cannot be read ({error})") from error


def read_weights(path: Path) -> dict[str, Tensor]:
    """As read_tensors, without the prefixes of DDP and torch.compile in the names, for files that others wrote."""
    return without_prefixes(read_tensors(path), path)


def without_prefixes(weights: dict[str, Tensor], path: Path) -> dict[str, Tensor]:
    """Remove the prefixes that DDP and torch.compile put before the names. Raises UserError if two names become one."""
    names = {name: name.replace("_orig_mod.", "") for name in weights}
    if all(name.startswith("module.") for name in names.values()):  # else a part of the network may be called module
        names = {name: short.removeprefix("module.") for name, short in names.items()}
    if len(set(names.values())) < len(names):
        raise UserError(f"{path}: has a weight twice, with a wrapper's prefix and without")
    return {names[name]: tensor for name, tensor in weights.items()}


def load_weights(network: torch.nn.Module, path: Path) -> None:
    """Load weights strictly: all must be there, fit and be finite. Raises UserError naming the first that do not."""
    weights = read_tensors(path)
    if weights.keys() != network.state_dict().keys():  # a network may have parts that are called as the wrappers are
        weights = without_prefixes(weights, path)
    if bad := not_finite(weights):
        raise UserError(f"{path}: {bad} holds NaN or infinity; no trained network has such weights")
    try:
        network.load_state_dict(weights)
    except RuntimeError as error:
        given, wanted = ({name: tuple(t.shape) for name, t in held.items()} for held in (weights, network.state_dict()))
        raise UserError(f"{path}: does not fit the network: {differences(given, wanted)}") from error


def differences(given: Mapping[str, tuple[int, ...]], wanted: Mapping[str, tuple[int, ...]]) -> str:
    """How the names and shapes of a file differ from a network's, in numbers with two examples each."""
    missing = [name for name in wanted if name not in given and not name.endswith(COUNTER)]
    unexpected = [name for name in given if name not in wanted and not name.endswith(COUNTER)]
    both = [(name, given[name], wanted[name]) for name in wanted if name in given]
    differ = [f"{name} is {one} and not {other}" for name, one, other in both if not same_shape(one, other)]
    found = ((missing, "missing"), (unexpected, "unexpected"), (differ, "of another shape"))
    counts = [
        f"{len(names)} {what} ({', '.join(clip(name, 120) for name in names[:2])}{', ...' if len(names) > 2 else ''})"
        for names, what in found
        if names
    ]
    total = sum(not name.endswith(COUNTER) for name in wanted)
    return f"of its {total} tensors, {', '.join(counts)}" if counts else "nothing is missing, but torch refuses it"


def same_shape(given: tuple[int, ...], wanted: tuple[int, ...]) -> bool:
    """Whether the shapes agree; -1 in `wanted` is any size."""
    return len(given) == len(wanted) and all(two in (one, -1) for one, two in zip(given, wanted, strict=True))


def not_finite(weights: Mapping[str, Tensor]) -> str | None:
    """The name of the first tensor that holds NaN or infinity, if any. Synchronises the host with the device."""
    floats = {name: tensor for name, tensor in weights.items() if tensor.is_floating_point()}
    if not floats:
        return None
    wide = lambda tensor: tensor if tensor.itemsize > 1 else tensor.float()  # noqa: E731  float8 has no isfinite
    finite = torch.stack([wide(tensor).isfinite().all() for tensor in floats.values()]).tolist()
    return next((name for name, is_finite in zip(floats, finite) if not is_finite), None)


def sha256_file(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def remove_tree(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)


def create_map(path: Path, dtype: np.dtype | type, shape: tuple[int, ...]) -> np.ndarray:
    """Create an .npy file as a memory map, with its space on the disk allocated.

    Without that, a disk that fills up later ends the process with SIGBUS and no message. Raises OSError naming the
    file.
    """
    array = np.lib.format.open_memmap(path, "w+", dtype, shape)
    if hasattr(os, "posix_fallocate"):
        with open(path, "rb+") as file:
            try:
                os.posix_fallocate(file.fileno(), 0, os.fstat(file.fileno()).st_size)
            except OSError as error:
                if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL):  # the file system cannot allocate
                    del array
                    path.unlink()
                    raise OSError(error.errno, error.strerror, str(path)) from error
    return array


def read_array(path: Path, mode: str | None = None) -> np.ndarray:
    """Read an .npy file; with `mode`, as a memory map. Raises UserError naming the file if it is not an array."""
    try:
        array = np.load(path, mmap_mode=mode)
    except Exception as error:  # NumPy parses the header as Python, which can raise anything
        raise UserError(f"{path}: cannot be read ({one_line(error)})") from error
    if not isinstance(array, np.ndarray):
        raise UserError(f"{path}: is not an array")
    return array


def write_array(path: Path, array: np.ndarray) -> None:
    """Write an .npy file. np.save's own error for a full disk names neither the cause nor the file."""
    stored = create_map(path, array.dtype, array.shape)
    stored[...] = array
    stored.flush()
