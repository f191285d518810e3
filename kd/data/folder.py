"""What the names in a data folder say that `datasets` would not, which passes over and relabels in silence."""

import functools
import hashlib
import os
import re
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path

from kd.errors import UserError, require

COMMON = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff")  # images to every version of `datasets`


TABLES = (".parquet", ".csv", ".json", ".jsonl", ".arrow", ".tar", ".zip")  # hold rows, or name each image's label


METADATA = ("metadata.csv", "metadata.jsonl", "metadata.parquet")


# A folder's name that `datasets` takes as a split (SPLIT_KEYWORDS in its data_files.py), at any depth.
SPLIT = re.compile(
    r"(.*[-._ 0-9])?(train|training|validation|valid|dev|val|test|testing|eval|evaluation)([-._ 0-9].*)?"
)


def files_below(folder: Path) -> Iterator[tuple[str, os.stat_result]]:
    """Every file's path from the folder, and its size and time, in an order that never changes.

    Raises: UserError for a link to a folder, which `datasets` does not follow, or a link to nothing.
    """
    for place, folders, files in os.walk(folder):
        folders.sort()
        here = "" if place == str(folder) else os.path.relpath(place, folder)
        for name in folders:
            path = os.path.join(place, name)
            linked = os.path.islink(path) and not _hidden(os.path.join(here, name, "x"))
            require(not linked, f"{path} is a link to a folder, which is not followed: put the folder itself there")
        for name in sorted(files):
            path, relative = os.path.join(place, name), os.path.join(here, name)
            try:
                yield relative, os.stat(path)
            except FileNotFoundError as error:
                if not _hidden(relative):
                    raise UserError(f"{path} is a link to nothing: mend or delete it") from error
                yield relative, os.lstat(path)


class Layout:
    """The layout of an imagefolder, SPLIT/CLASS/FILE, told from one file's name at a time."""

    def __init__(self) -> None:
        self.kinds: dict[tuple[str, str], Counter] = defaultdict(Counter)  # (split, class) -> how many of each ending
        self.images = self.tables = 0
        self.described = False  # by files that say what is in each image
        self.wrong = ""

    def add(self, path: str) -> None:
        """One more file, by its path from the folder."""
        place, name = os.path.split(path)
        ending = os.path.splitext(name)[1].lower()
        self.described |= name in METADATA or ending == ".zip"
        self.tables += ending in TABLES
        split, below, splits = _parts(place)
        if _hidden(path) or not splits or ending in TABLES:
            return
        if is_image(ending):
            self.images += 1
            self.wrong = self.wrong or self._fault(path, splits, below)
        self.kinds[split, below[0] if below else ""][ending] += 1

    def _fault(self, path: str, splits: tuple[str, ...], below: tuple[str, ...]) -> str:
        if len(set(splits)) > 1:  # a class named like a split: its images would change sides, or count twice
            return f"{path} would be taken for each of {' and '.join(splits)}: rename one of these folders"
        if not below:
            return f"{path} lies outside a class folder, which leaves every image without a label: move or delete it"
        deep = f"{path} lies deeper than SPLIT/CLASS/FILE, and {below[-1]} would be its class: move it up"
        return deep if len(below) > 1 else ""

    def check(self, source: str) -> str:
        """What is left out, in words; nothing where all is well, or where this is no imagefolder that names tell of.

        Raises: UserError for a file whose class is not what its folders say, or a class without any image.
        """
        if self.described or self.tables >= self.images:
            return ""
        require(not self.wrong, f"--data {source}: {self.wrong}")
        for (split, label), kinds in self.kinds.items():
            some = not label or any(map(is_image, kinds))
            endings = ", ".join(kinds)
            require(
                some,
                f"--data {source}: {split}/{label} holds no image that is read ({endings}): convert or delete them",
            )
        labels = {label for _, label in self.kinds if label}
        require(
            len(labels) > 1, f"--data {source}: one class folder alone ({', '.join(labels)}); two or more are needed"
        )
        every: Counter = sum(self.kinds.values(), Counter())
        left = Counter({ending: count for ending, count in every.items() if not is_image(ending)})
        endings = ", ".join(ending or "no ending" for ending, _ in left.most_common(3))
        return f"{left.total()} of {every.total()} files left out ({endings})" if left else ""


@functools.cache
def is_image(ending: str) -> bool:
    """Whether `datasets` takes a file with this ending (in small letters, with its dot) as an image."""
    if ending in COMMON:
        return True
    from datasets.packaged_modules.imagefolder.imagefolder import ImageFolder  # 0.7 s that most folders do not need

    return ending in ImageFolder.EXTENSIONS


@functools.lru_cache(1)  # files come folder by folder
def _parts(place: str) -> tuple[str, tuple[str, ...], tuple[str, ...]]:
    """The folder of the split that a folder belongs to, the folders below that one, and all that are named like one."""
    folders = Path(place).parts
    places = [number for number, part in enumerate(folders) if SPLIT.fullmatch(part)]
    end = places[0] + 1 if places else 0
    return "/".join(folders[:end]), folders[end:], tuple(folders[number] for number in places)


def _hidden(path: str) -> bool:
    """As `datasets` has it, which leaves these alone unasked."""
    place, name = os.path.split(path)
    return name.startswith(".") or any(part.startswith((".", "__")) for part in place.split(os.sep))


#: (kd.images.listing) Opening data of very many files without holding them all.
#:
#: `datasets` takes minutes, and kilobytes of memory for each file, to list a hundred thousand, at every start. So a
#: process of its own does that once; afterwards the tables that it wrote are mapped into memory.


def state_of(folder: Path) -> tuple[str | None, Layout]:
    """A sha256 of the names, sizes and times of all files below the folder (None where there are none), and what their
    names say. Raises: UserError for a link that is not followed, or leads nowhere."""
    digest, found, layout = hashlib.sha256(), False, Layout()
    for path, about in files_below(folder):
        found = True
        digest.update(f"{path}/{about.st_size}/{about.st_mtime_ns}\n".encode())
        layout.add(path)
    return digest.hexdigest() if found else None, layout
