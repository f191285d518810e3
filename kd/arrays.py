"""Arrays in .npy files, most of them as memory maps."""

import errno
import os
from pathlib import Path

import numpy as np

from kd.errors import UserError


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
