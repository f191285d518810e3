"""Check an image folder's layout, and hash its listing.

`datasets` skips or mislabels misplaced files without warning.
"""

import functools
import hashlib
import os
import re
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path

from kd.errors import UserError, require

COMMON = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff")  # images to every version of `datasets`

TABLES = (".parquet", ".csv", ".json", ".jsonl", ".arrow", ".tar", ".zip")  # of rows, or of each image's label

METADATA = ("metadata.csv", "metadata.jsonl", "metadata.parquet")

# A folder name that `datasets` takes as a split at any depth (SPLIT_KEYWORDS in its data_files.py).
SPLIT = re.compile(
    r"(.*[-._ 0-9])?(train|training|validation|valid|dev|val|test|testing|eval|evaluation)([-._ 0-9].*)?"
)


def scan_folder(folder: Path) -> tuple[str | None, "Layout"]:
    """A sha256 of the names, sizes and times of all files below the folder (None without any), and their layout.

    Raises: UserError for a link to a folder or a broken link.
    """
    digest, empty, layout = hashlib.sha256(), True, Layout()
    for path, status in iter_files(folder):
        empty = False
        digest.update(f"{path}/{status.st_size}/{status.st_mtime_ns}\n".encode())
        layout.add(path)
    return None if empty else digest.hexdigest(), layout


def iter_files(folder: Path) -> Iterator[tuple[str, os.stat_result]]:
    """Each file's path relative to the folder, and its status, always in the same order.

    Raises: UserError for a link to a folder, which `datasets` does not follow, or a broken link.
    """
    for place, folders, files in os.walk(folder):
        folders.sort()
        here = "" if place == str(folder) else os.path.relpath(place, folder)
        for name in folders:
            path = os.path.join(place, name)
            linked = os.path.islink(path) and not _hidden(os.path.join(here, name, "x"))
            require(not linked, f"{path}: is a link to a folder, which is not followed; put the folder itself there")
        for name in sorted(files):
            path, relative = os.path.join(place, name), os.path.join(here, name)
            try:
                yield relative, os.stat(path)
            except FileNotFoundError as error:
                if not _hidden(relative):
                    raise UserError(f"{path}: is a broken link; repair or delete it") from error
                yield relative, os.lstat(path)


class Layout:
    """The layout of an imagefolder, SPLIT/CLASS/FILE, from its files' names, added one at a time."""

    def __init__(self) -> None:
        self.endings: dict[tuple[str, str], Counter] = defaultdict(Counter)  # of the files of each (split, class)
        self.images = self.tables = 0
        self.has_metadata = False  # labels may come from a file instead of the folders' names
        self.fault = ""  # of the first misplaced image

    def add(self, path: str) -> None:
        """Add one file by its path relative to the folder."""
        place, name = os.path.split(path)
        ending = os.path.splitext(name)[1].lower()
        self.has_metadata |= name in METADATA or ending == ".zip"
        self.tables += ending in TABLES
        split, below, splits = _parts(place)
        if _hidden(path) or not splits or ending in TABLES:
            return
        if is_image(ending):
            self.images += 1
            self.fault = self.fault or self._find_fault(path, splits, below)
        self.endings[split, below[0] if below else ""][ending] += 1

    def _find_fault(self, path: str, splits: tuple[str, ...], below: tuple[str, ...]) -> str:
        if len(set(splits)) > 1:  # a class named like a split: its images would change splits, or count twice
            return f"{path} is in several splits by its folders' names ({', '.join(splits)}); rename one of them"
        if not below:
            return f"{path} is in no class folder, so `datasets` drops every label; move or delete it"
        deep = f"{path} is deeper than SPLIT/CLASS/FILE, so its class would be {below[-1]}; move it up"
        return deep if len(below) > 1 else ""

    def check(self, source: str) -> str:
        """How many files are skipped, in words; "" if none, or if the names do not give the labels.

        Raises: UserError for a file that would get another class than its folder's, or a class without images.
        """
        if self.has_metadata or self.tables >= self.images:
            return ""
        require(not self.fault, f"--data {source}: {self.fault}")
        for (split, label), endings in self.endings.items():
            has_images = not label or any(map(is_image, endings))
            listed = ", ".join(endings)
            require(
                has_images, f"--data {source}: {split}/{label} has no images ({listed}); convert its files or delete it"
            )
        labels = {label for _, label in self.endings if label}
        require(
            len(labels) > 1, f"--data {source}: only one class folder ({', '.join(labels)}); two or more are needed"
        )
        total: Counter = sum(self.endings.values(), Counter())
        skipped = Counter({ending: count for ending, count in total.items() if not is_image(ending)})
        listed = ", ".join(ending or "no ending" for ending, _ in skipped.most_common(3))
        return f"skipped {skipped.total()} of {total.total()} files, not images ({listed})" if skipped else ""


@functools.cache
def is_image(ending: str) -> bool:
    """Whether `datasets` takes a file with this ending (in lower case, with its dot) as an image."""
    if ending in COMMON:
        return True
    from datasets.packaged_modules.imagefolder.imagefolder import ImageFolder  # 0.7 s that most folders do not need

    return ending in ImageFolder.EXTENSIONS


@functools.lru_cache(1)  # files come folder by folder
def _parts(place: str) -> tuple[str, tuple[str, ...], tuple[str, ...]]:
    """Of a folder's path: the part up to the split, the parts below it, and all parts that are named like a split."""
    folders = Path(place).parts
    places = [number for number, part in enumerate(folders) if SPLIT.fullmatch(part)]
    end = places[0] + 1 if places else 0
    return "/".join(folders[:end]), folders[end:], tuple(folders[number] for number in places)


def _hidden(path: str) -> bool:
    """Whether `datasets` ignores the file for its name or a folder's."""
    place, name = os.path.split(path)
    return name.startswith(".") or any(part.startswith((".", "__")) for part in place.split(os.sep))
