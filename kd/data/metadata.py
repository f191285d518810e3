"""Read the rows of an image folder: labels by folder, or from metadata.csv, .jsonl or .parquet, as written there."""

import csv
import json
import os
import re
from pathlib import Path
from typing import NamedTuple

from kd.data.folder import SHOWN, ImageFolder, check_names, ending_of
from kd.errors import UserError, require
from kd.utils.console import one_line

FILE_COLUMN = re.compile(r"(?:(.+)_)?file_name")  # x_file_name holds the files of the column x

NUMBER = re.compile(r"0|-?[1-9][0-9]{0,17}")  # text that is a number; 001 is a name


class Loaded(NamedTuple):
    """The splits of a data set as `datasets` objects, and what there is to say about them."""

    splits: dict
    notes: tuple[str, ...] = ()


def read_folder(folder: ImageFolder, streaming: bool = False) -> Loaded:
    """The rows of every split. Raises UserError for a metadata file that cannot be read or names missing files."""
    paths = [path for paths in folder.splits.values() for path in paths]
    check_names(folder.root, paths, folder.source)
    if not folder.labelled:
        splits = {
            split: _dataset({"image": _absolute(folder, files)}, ("image",)) for split, files in folder.splits.items()
        }
        notes = ()
    elif folder.metadata:
        splits, notes = _read_described(folder)
    else:
        names = sorted({folder.label_of(path) for path in paths})
        numbers = {name: number for number, name in enumerate(names)}
        splits, notes = {}, ()
        for split, files in folder.splits.items():
            labels = [numbers[folder.label_of(path)] for path in files]
            splits[split] = _dataset({"image": _absolute(folder, files), "label": labels}, ("image",), names)
    return Loaded({name: rows.to_iterable_dataset() if streaming else rows for name, rows in splits.items()}, notes)


def _absolute(folder: ImageFolder, paths: list[str]) -> list[str]:
    root = str(folder.root.resolve())
    return [os.path.join(root, path) for path in paths]


def _dataset(columns: dict[str, list], images: tuple[str, ...], names: list[str] | None = None, kinds=None):
    """A `datasets` split of these columns; those in `images` are paths."""
    import datasets
    import pyarrow as pa

    arrays, features = {}, {}
    for name, values in columns.items():
        if name in images:
            paths = pa.array(values, pa.string())
            arrays[name] = pa.StructArray.from_arrays([pa.nulls(len(paths), pa.binary()), paths], ["bytes", "path"])
            features[name] = datasets.Image()
        else:
            arrays[name] = values if isinstance(values, pa.ChunkedArray) else pa.array(values)
            plain = datasets.Features.from_arrow_schema(pa.schema({name: arrays[name].type}))[name]
            features[name] = (kinds or {}).get(name, plain)
    if names is not None:
        features["label"] = datasets.ClassLabel(names=names)
    features = datasets.Features(features)
    return datasets.Dataset(pa.table(arrays).cast(features.arrow_schema), datasets.DatasetInfo(features=features))


def _read_described(folder: ImageFolder) -> tuple[dict, tuple[str, ...]]:
    splits, notes, columns = {}, [], None
    for split, files in folder.metadata.items():
        table: dict[str, list] = {}
        kinds: dict = {}
        for file in files:
            read, kinds = _read_metadata(folder, file)
            require(
                columns in (None, list(read)),
                f"--data {folder.source}: {file} has the columns {', '.join(read)}, others {', '.join(columns or ())}",
            )
            columns = list(read)
            for name, values in read.items():
                table.setdefault(name, []).extend(values)
        images = tuple(name for name in table if FILE_COLUMN.fullmatch(name))
        notes += _count_named(folder, split, files, table[images[0]])
        renamed = {_image_column(name): _absolute(folder, table[name]) for name in images}
        rest = {name: values for name, values in table.items() if name not in images}
        if ending_of(files[0]) == ".csv":
            rest = {name: _numbers_or_names(values) for name, values in rest.items()}
        try:
            splits[split] = _dataset(renamed | rest, tuple(renamed), kinds=kinds)
        except (TypeError, ValueError) as error:  # of Arrow: values of several kinds in a column
            raise UserError(f"--data {folder.source}: {files[0]} cannot be read ({one_line(error)})") from error
    return _alike(splits), tuple(notes)


def _alike(splits: dict) -> dict:
    """A column that is numbers in one split and names in another is names in all."""
    import datasets

    for name in next(iter(splits.values())).column_names:
        kinds = {str(rows.features[name]) for rows in splits.values() if name in rows.column_names}
        if kinds == {str(datasets.Value("int64")), str(datasets.Value("string"))}:
            splits = {split: rows.cast_column(name, datasets.Value("string")) for split, rows in splits.items()}
    return splits


def _image_column(name: str) -> str:
    return FILE_COLUMN.fullmatch(name)[1] or "image"


def _numbers_or_names(values: list[str | None]) -> list:
    """Values of a CSV column as numbers if all are written as numbers are, else as they are written."""
    numbers = all(value is not None and NUMBER.fullmatch(value) for value in values)
    return [int(value) for value in values] if numbers else values


def _read_metadata(folder: ImageFolder, file: str) -> tuple[dict[str, list], dict]:
    """Columns by name, and the kinds that a parquet file gives them; file names are relative to the folder."""
    path, kinds = folder.root / file, {}
    try:
        if ending_of(file) == ".csv":
            table = _read_csv(path)
        elif ending_of(file) == ".jsonl":
            table = _read_json_lines(path)
        else:
            table, kinds = _read_parquet(path)
    except (OSError, ValueError, csv.Error) as error:
        raise UserError(f"--data {folder.source}: {file} cannot be read ({one_line(error)})") from error
    images = [name for name in table if FILE_COLUMN.fullmatch(name)]
    require(
        bool(images), f"--data {folder.source}: {file} has no column file_name; it has {', '.join(table) or 'none'}"
    )
    place, missing = os.path.dirname(file), []
    for name in images:
        for row, value in enumerate(table[name], 1):
            relative = os.path.normpath(os.path.join(place, value)) if value and not os.path.isabs(value) else ""
            inside = relative.startswith(os.path.join(place, "")) and not relative.startswith("..")
            if relative and inside and (folder.root / relative).is_file():
                table[name][row - 1] = relative
            else:
                missing.append(f"row {row}: {value or 'no name'}")
    require(
        not missing,
        f"--data {folder.source}: {file} names {len(missing)} images that are not below its folder"
        f" ({'; '.join(missing[:SHOWN])}{'; ...' if len(missing) > SHOWN else ''}); correct or drop these rows",
    )
    return table, kinds


def _read_csv(path: Path) -> dict[str, list]:
    with open(path, encoding="utf-8-sig", newline="") as file:  # with or without the byte order mark of spreadsheets
        rows = [row for row in csv.reader(file, strict=True) if row]
    if not rows:
        raise ValueError("no header")
    header = rows[0]
    for number, row in enumerate(rows[1:], 1):
        if len(row) != len(header):
            raise ValueError(f"row {number} has {len(row)} values, the header {len(header)}")
    if len(set(header)) < len(header):
        raise ValueError(f"two columns have one name: {', '.join(header)}")
    return {name: [row[place] or None for row in rows[1:]] for place, name in enumerate(header)}


def _read_json_lines(path: Path) -> dict[str, list]:
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8-sig").splitlines() if line.strip()]
    if not all(isinstance(row, dict) for row in rows):
        raise ValueError("a line is no JSON object")
    names = dict.fromkeys(name for row in rows for name in row)
    return {name: [row.get(name) for row in rows] for name in names}


def _read_parquet(path: Path) -> tuple[dict[str, list], dict]:
    """Classes as the file's own names: another file may number them otherwise."""
    import datasets
    import pyarrow.parquet as pq

    table = pq.read_table(path)
    columns, kinds = table.to_pydict(), dict(datasets.Features.from_arrow_schema(table.schema))
    for name, kind in kinds.items():
        if isinstance(kind, datasets.ClassLabel):
            columns[name] = _class_names(columns[name], kind.names, name)
            kinds[name] = datasets.Value("string")
    return columns, kinds


def _class_names(numbers: list[int | None], names: list[str], column: str) -> list[str | None]:
    """The names that the numbers stand for; -1 is `datasets`' mark of a missing one."""
    for number in numbers:
        if number is not None and not -1 <= number < len(names):
            raise ValueError(f"column {column} has the label {number}, and {len(names)} class names")
    return [None if number in (None, -1) else names[number] for number in numbers]


def _count_named(folder: ImageFolder, split: str, files: list[str], named: list[str]) -> list[str]:
    """Sentences on images that no metadata file names, and on those named twice."""
    known, there = set(named), folder.splits.get(split, [])
    unnamed, notes = [path for path in there if path not in known], []
    where = files[0] if len(files) == 1 else f"{len(files)} metadata files"
    if unnamed:
        notes.append(
            f"{split}: {where} names {len(there) - len(unnamed)} of {len(there)} images; left out {len(unnamed)}"
            f" ({', '.join(unnamed[:SHOWN])}{', ...' if len(unnamed) > SHOWN else ''})"
        )
    if repeated := len(named) - len(known):
        notes.append(f"{split}: {where} has {repeated} rows of images that it names more than once")
    return notes
