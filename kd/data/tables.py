"""Load tables of rows (parquet, arrow, tar and what else `datasets` reads) from a folder or the Hub.

`datasets` takes the class names of the first file for those of all: here each file's own names count.
"""

import glob
import logging
import re
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from kd.data.metadata import Loaded
from kd.errors import UserError, require
from kd.utils.console import one_line, root_cause

READERS = 8  # files whose headers are read at a time


class File(NamedTuple):
    """A table file's rows and class names."""

    path: str
    rows: int
    columns: tuple[str, ...]
    names: dict[str, tuple[str, ...]]  # of each column of classes


class TableFolder(NamedTuple):
    """A local folder of tables."""

    path: Path
    described: str  # what it has, for a message
    cache: Path  # of this folder as it is now: `datasets` itself takes folders of one name with a card for the same


def load_folder(folder: TableFolder, streaming: bool = False, **options) -> Loaded:
    """Load the tables in a folder."""
    import datasets

    path = folder.path
    require("::" not in str(path.resolve()), f"--data {path}: '::' in a path has a meaning to `datasets`; rename it")
    datasets.disable_progress_bars()
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # it warns that a plain folder has no dataset card
    try:
        with literal_path(path):
            builder = datasets.load_dataset_builder(str(path), cache_dir=str(folder.cache), **options)
            files = _read_files(builder)
            if not streaming:
                builder.download_and_prepare()
            splits = builder.as_streaming_dataset() if streaming else builder.as_dataset()
    except UserError:
        raise
    except Exception as error:  # each format has errors of its own
        empty = re.search(r'Instruction "(\w+)" corresponds to no data', str(error))
        if empty:
            raise UserError(
                f"--data {path}: the {empty[1]} split is empty; give it rows, or delete its file"
            ) from error
        raise UserError(
            f"--data {path}: no readable image data ({folder.described}; {one_line(root_cause(error))}); give folders"
            " of images named after their classes in train/ and test/, or parquet files"
        ) from error
    return with_common_names(dict(splits), files, str(path), streaming)


def compare_hub_files(splits: dict, open_builder: Callable, source: str, streaming: bool) -> Loaded:
    """The splits of a set on the Hub with their files' own class names, as far as those can be read."""
    try:
        files = _read_files(open_builder())
    except Exception as error:  # the HTTP client's own errors differ between versions of the library
        note = f"class names of the files of {source} could not be compared ({one_line(error, 100)})"
        return Loaded(dict(splits), (note,))
    return with_common_names(dict(splits), files, source, streaming)


@contextmanager
def literal_path(path: Path) -> Iterator[None]:
    """Let `datasets` take brackets, stars and question marks in a folder's path literally, not as a pattern."""
    from datasets import data_files

    original = data_files.resolve_pattern

    def resolve(pattern: str, base_path: str, *args, **options):
        return original(pattern, glob.escape(base_path), *args, **options)

    escaped = glob.escape(str(path.resolve())) != str(path.resolve())
    data_files.resolve_pattern = resolve if escaped else original
    try:
        yield
    finally:
        data_files.resolve_pattern = original


def _read_files(builder) -> dict[str, list[File]]:
    """The parquet and arrow files of each split, in the order of rows."""
    found = {str(split): list(map(str, paths)) for split, paths in (builder.config.data_files or {}).items()}
    with ThreadPoolExecutor(READERS) as readers:
        return {split: [file for file in readers.map(_read_file, paths) if file] for split, paths in found.items()}


def _read_file(path: str) -> File | None:
    import pyarrow as pa
    from datasets import ClassLabel, Features

    if not path.endswith((".parquet", ".arrow")):
        return None
    try:
        schema, rows = _read_header(path)
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"{path}: cannot be read ({one_line(error)}); repair it or fetch it again") from error
    kinds = Features.from_arrow_schema(schema)
    names = {name: tuple(kind.names) for name, kind in kinds.items() if isinstance(kind, ClassLabel)}
    return File(path, rows, tuple(kinds), names)


def _read_header(path: str) -> tuple:
    """Schema and number of rows of a table file."""
    import fsspec
    import pyarrow as pa
    import pyarrow.parquet as pq

    where = path if "://" in path else f"file://{path}"
    with fsspec.core.url_to_fs(where)[0].open(path) as opened:
        if path.endswith(".parquet"):
            table = pq.ParquetFile(opened)
            return table.schema_arrow, table.metadata.num_rows
        try:
            reader = pa.ipc.open_stream(opened)
        except pa.ArrowInvalid:  # the other of Arrow's two formats
            reader = pa.ipc.open_file(opened)
        return reader.schema, len(reader.read_all())


def with_common_names(splits: dict, files: dict[str, list[File]], source: str, streaming: bool) -> Loaded:
    """Number the classes alike in all files, by name. Raises UserError for a stream, which cannot be renumbered."""
    every = [file for split in files.values() for file in split]
    columns = dict.fromkeys(column for file in every for column in file.names)
    notes = []
    for column in columns:
        lists = {file.names[column]: file for file in every if column in file.names}
        bare = [file.path for file in every if column in file.columns and column not in file.names]
        if bare:
            notes.append(
                f"column {column} has no class names in {Path(bare[0]).name}; its numbers count as in other files"
            )
        if len(lists) == 1:
            continue
        one, other = list(lists.values())[:2]
        paths = f"{_short(one.path, other.path)} and {_short(other.path, one.path)}"
        differing = f"{paths} name the classes of {column} differently"
        shown = f"({shown_names(one.names[column])} and {shown_names(other.names[column])})"
        require(
            not streaming and not bare,
            f"--data {source}: {differing} {shown}; leave --stream out, or write them anew with the same names",
        )
        names = list(dict.fromkeys(name for known in lists for name in known))
        splits = {name: _renumber(rows, column, names, files.get(name, []), source) for name, rows in splits.items()}
        notes.append(f"{differing} {shown}: numbered alike, by name")
    return Loaded(splits, tuple(notes))


def _short(path: str, other: str) -> str:
    """A file's name, with its folder's if the other file has the same name."""
    parts = Path(path).parts
    return "/".join(parts[-2:] if parts[-1] == Path(other).name else parts[-1:])


def shown_names(names: tuple[str, ...]) -> str:
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")


def _renumber(rows, column: str, names: list[str], files: list[File], source: str):
    """The rows with their labels as numbers of `names`, by the names of each row's own file."""
    import datasets
    import numpy as np

    require(
        sum(file.rows for file in files) == len(rows),
        f"--data {source}: its files' class names differ, and their rows cannot be told apart; write them anew with"
        " the same names",
    )
    numbers = {name: number for number, name in enumerate(names)}
    starts = np.cumsum([0, *(file.rows for file in files)])

    def renumber(labels: list, indices: list[int]) -> dict:
        owners = np.searchsorted(starts, indices, side="right") - 1
        named = [files[owner].names[column] for owner in owners]
        for index, label, known in zip(indices, labels, named):
            require(
                label is not None and 0 <= label < len(known),
                f"--data {source}: row {index} has label {label!r} of {len(known)} classes; correct or drop the row",
            )
        return {column: [numbers[known[label]] for label, known in zip(labels, named)]}

    features = rows.features.copy()
    features[column] = datasets.ClassLabel(names=names)
    return rows.map(renumber, with_indices=True, batched=True, input_columns=[column], features=features)
