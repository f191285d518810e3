"""A finished run's files on every machine of a launch, whether its disk has them or not."""

import hashlib
import json
import os
from pathlib import Path

from kd.data.cache import cache_root
from kd.errors import UserError
from kd.utils.files import sha256_file, write_folder
from kd.utils.hub import NEEDED, local_folder
from kd.utils.processes import all_do, anyone, from_main, is_alone, is_first_on_node


def is_elsewhere(path: Path) -> bool:
    """Whether `path` may be on the main process's disk alone. Known before the processes have found each other."""
    return os.environ.get("RANK", "0") != "0" and not path.exists()


def share_run(name: str | Path) -> tuple[Path, Path]:
    """The run folder or Hub id `name` as the main process finds it, and where this machine has the same files.

    A machine without them gets a copy in KD_CACHE. All processes call this together. Raises UserError as local_folder.
    """
    if is_alone():
        return (local_folder(name),) * 2
    folder, hashes = from_main(lambda: _find(name))
    copy = cache_root() / "runs" / hashlib.sha256(json.dumps(hashes).encode()).hexdigest()[:16]
    here = _hashes(folder) == hashes
    missing = not here and _hashes(copy) != hashes
    if anyone(missing):
        content = from_main(lambda: {file: (folder / file).read_bytes() for file in hashes})
        all_do(lambda: _write(copy, content) if missing and is_first_on_node() else None)
    return folder, folder if here else copy


def _find(name: str | Path) -> tuple[Path, dict[str, str]]:
    folder = local_folder(name)
    return folder, _hashes(folder)


def _hashes(folder: Path) -> dict[str, str]:
    """The sha256 of each file that `kd.load` reads and that is there."""
    return {file: sha256_file(folder / file) for file in NEEDED if (folder / file).is_file()}


def _write(folder: Path, content: dict[str, bytes]) -> None:
    def write(partial: Path) -> None:
        for file, data in content.items():
            (partial / file).write_bytes(data)

    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        write_folder(folder, write)
    except OSError as error:
        raise UserError(f"{folder}: cannot be written ({error}); set KD_CACHE to another folder") from error
