"""Opening data of very many files without holding them all.

`datasets` takes minutes, and kilobytes of memory for each file, to list a hundred thousand, at every start. So a
process of its own does that once; afterwards the tables that it wrote are mapped into memory.
"""

import hashlib
import multiprocessing
import os
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path

from kd.errors import UserError
from kd.files import read_json, write_json
from kd.images.decode import locked
from kd.images.folder import Layout, files_below


def state_of(folder: Path) -> tuple[str | None, Layout]:
    """A sha256 of the names, sizes and times of all files below the folder (None where there are none), and what their
    names say. Raises: UserError for a link that is not followed, or leads nowhere."""
    digest, found, layout = hashlib.sha256(), False, Layout()
    for path, about in files_below(folder):
        found = True
        digest.update(f"{path}/{about.st_size}/{about.st_mtime_ns}\n".encode())
        layout.add(path)
    return digest.hexdigest() if found else None, layout


def opened(key: str, load: Callable) -> dict:
    """What `load()` gives (`datasets` sets by split), from its tables on the disk. Raises UserError as it does."""
    with locked(f"{key}.tables") as folder:
        folder.mkdir(exist_ok=True)
        path = folder / "tables.json"
        tables = read_json(path) if path.exists() else {}
        if not (tables and all(os.path.exists(file) for files in tables.values() for file in files)):
            tables = _listed(load)
            write_json(path, tables)
    return {name: _mapped(files) for name, files in tables.items()} if tables else load()


def _mapped(files: list[str]):
    import datasets

    return datasets.concatenate_datasets([datasets.Dataset.from_file(file) for file in files])


def _listed(load: Callable) -> dict[str, list[str]]:
    """The arrow files of each split that `load()` writes; empty where some split has none."""
    context = multiprocessing.get_context("fork")  # `load` is a closure
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_list, args=(load, sender))
    process.start()
    sender.close()
    try:
        answer = receiver.recv()
    except EOFError:  # it died without a word: whatever it was will show itself here
        answer = {}
    process.join()
    if isinstance(answer, str):
        raise UserError(answer)
    return answer


def _list(load: Callable, answer: Connection) -> None:
    try:
        tables = {name: [file["filename"] for file in rows.cache_files] for name, rows in load().items()}
    except UserError as error:
        answer.send(str(error))
    else:
        answer.send(tables if all(tables.values()) else {})
