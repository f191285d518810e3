"""Which split and class each file of an image folder belongs to, by its folders' names.

The rows come in the order in which `datasets` lists them, on which fingerprints depend; `datasets` itself skips or
mislabels misplaced files without warning. What is left out is counted in `notes`.
"""

import functools
import hashlib
import itertools
import os
import re
import zipfile
from collections import Counter, defaultdict
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from kd.errors import NoLabels, UserError, require

COMMON = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff")  # images to every version of `datasets`

TABLES = (".parquet", ".arrow", ".tar")  # of rows with their images

LISTS = (".csv", ".json", ".jsonl", ".tsv", ".txt", ".xlsx")  # may hold labels, in no form that is read

METADATA = ("metadata.csv", "metadata.jsonl", "metadata.parquet")

CARDS = ("README.md", ".huggingface.yaml")  # may say which files are which split, as on the Hub

JUNK = ("__MACOSX", "__pycache__")  # folders that a program left behind

# What `datasets` takes for a split in a folder's or a file's name, in its own order (SPLIT_KEYWORDS in data_files.py).
KEYWORDS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "dev", "val"),
    "test": ("test", "testing", "eval", "evaluation"),
}
BETWEEN = "[-._ 0-9]"
FOLDER_FORMS = ("{}", f"{{}}{BETWEEN}.*", f".*{BETWEEN}{{}}", f".*{BETWEEN}{{}}{BETWEEN}.*")
EXACT_FORMS = FOLDER_FORMS[:1]
FILE_FORMS = (FOLDER_FORMS[1], FOLDER_FORMS[3])

SHOWN = 3  # examples in a line


class Listing(NamedTuple):
    """All files of a folder."""

    sha256: str | None  # of their names, sizes and times; None without any
    alike: str  # of names and sizes of those that are not hidden, which a copy elsewhere has too
    files: list[str]  # paths relative to the folder
    empty: list[str]  # folders without a file


def scan_folder(folder: Path) -> Listing:
    """List the folder. Raises UserError for a link to a folder or a broken link."""
    digest, alike, files = hashlib.sha256(), hashlib.sha256(), []
    for path, status in iter_files(folder):
        files.append(path)
        if not is_hidden(path):
            alike.update(f"{path}/{status.st_size}\n".encode(errors="surrogateescape"))
        digest.update(f"{path}/{status.st_size}/{status.st_mtime_ns}\n".encode(errors="surrogateescape"))
    return Listing(digest.hexdigest() if files else None, alike.hexdigest(), files, _empty_folders(folder))


def iter_files(folder: Path) -> Iterator[tuple[str, os.stat_result]]:
    """Each file's path relative to the folder, and its status, always in the same order.

    Raises: UserError for a link to a folder, which is not followed, or a broken link.
    """
    for place, folders, files in os.walk(folder):
        folders.sort()
        here = "" if place == str(folder) else os.path.relpath(place, folder)
        for name in folders:
            path = os.path.join(place, name)
            linked = os.path.islink(path) and not is_hidden(os.path.join(here, name))
            require(not linked, f"{path}: is a link to a folder, which is not followed; put the folder itself there")
        for name in sorted(files):
            path, relative = os.path.join(place, name), os.path.join(here, name)
            try:
                yield relative, os.stat(path)
            except FileNotFoundError as error:
                if not is_hidden(relative):
                    raise UserError(f"{path}: is a broken link; repair or delete it") from error
                yield relative, os.lstat(path)


def _empty_folders(folder: Path) -> list[str]:
    places = (os.path.relpath(place, folder) for place, *content in os.walk(folder) if not any(content))
    return sorted(place for place in places if not is_hidden(place))


def is_hidden(path: str) -> bool:
    """Whether the file is left out for its name or a folder's, as programs hide theirs."""
    return any(part.startswith(".") or part in JUNK for part in path.split(os.sep))


@functools.cache
def is_image(ending: str) -> bool:
    """Whether `datasets` takes a file with this ending (in lower case, with its dot) as an image."""
    if ending in COMMON:
        return True
    from datasets.packaged_modules.imagefolder.imagefolder import ImageFolder  # 0.7 s that most folders do not need

    return ending in ImageFolder.EXTENSIONS


def ending_of(path: str) -> str:
    return os.path.splitext(path)[1].lower()


@functools.lru_cache(4096)
def find_splits(name: str, forms: tuple[str, ...] = FOLDER_FORMS) -> dict[str, int]:
    """The splits that a folder (or with FILE_FORMS a file) is named like, and the rank of each pattern in its split."""
    found = {}
    for split, keywords in KEYWORDS.items():
        patterns = (form.format(keyword) for keyword in keywords for form in forms)
        rank = next((rank for rank, pattern in enumerate(patterns) if re.fullmatch(pattern, name, re.DOTALL)), None)
        if rank is not None:
            found[split] = rank
    return found


class Place(NamedTuple):
    """A folder by its path."""

    split: str  # its split's name; "" if it is in none
    rank: int
    top: str  # the path down to the folder that names the split
    below: tuple[str, ...]  # the folders below that
    named: tuple[str, ...]  # all its folders that are named like a split


@functools.lru_cache(1)  # files come folder by folder
def find_place(folder: str, forms: tuple[str, ...] = FOLDER_FORMS) -> Place:
    parts = Path(folder).parts
    numbers = [number for number, part in enumerate(parts) if find_splits(part, forms)]
    if not numbers:
        return Place("", 0, "", parts, ())
    named = tuple(parts[number] for number in numbers)
    split, rank = next(iter(find_splits(named[0]).items()))
    end = numbers[0] + 1
    return Place(split, rank, "/".join(parts[:end]), parts[end:], named)


class Group(NamedTuple):
    """The files of one folder."""

    place: Place
    images: list[str]  # paths
    others: list[str]
    hidden: list[str]  # images that are left out


def group_files(files: list[str], forms: tuple[str, ...] = FOLDER_FORMS) -> list[Group]:
    """The files by folder: a set has a million files, and a thousand folders. `forms` name the splits' folders."""
    groups = []
    for folder, paths in itertools.groupby(files, os.path.dirname):
        group = Group(find_place(folder, forms), [], [], [])
        hidden = is_hidden(folder)
        for path in paths:
            image = is_image(ending_of(path))
            if not hidden and not os.path.basename(path).startswith("."):
                (group.images if image else group.others).append(path)
            elif image:
                group.hidden.append(path)
        groups.append(group)
    return groups


def _group_unlabelled(files: list[str]) -> list[Group]:
    """The files by folder, of which only those exactly called as splits are splits, and only beside one for training.

    Without classes nothing else tells a split from a folder of anybody's photographs.
    """
    groups = group_files(files, EXACT_FORMS)
    if any(group.images and group.place.split == "train" for group in groups):
        return groups
    return group_files(files, ())


class ImageFolder:
    """The images of a folder by split, with their classes by folder, or with the metadata files that label them.

    Not `labelled`: the images alone, in any nesting. They are one split unless a folder called train, and maybe others
    called validation and test (or as KEYWORDS has it), name splits; "train trip" or "test" alone names none.
    Raises UserError for a file that would get another class or split than its folder's name says, of which NoLabels for
    one in no class folder.
    """

    def __init__(self, root: Path, listing: Listing, source: str, labelled: bool = True):
        self.root, self.source, self.labelled, self.notes = root, source, labelled, []
        self.splits: dict[str, list[str]] = {}  # paths of each split's images, in the order of rows
        self.metadata: dict[str, list[str]] = {}  # metadata files of each split; empty: folders' names are the labels
        self._groups = group_files(listing.files) if labelled else _group_unlabelled(listing.files)
        self._others = [path for group in self._groups for path in group.others]
        self._in_splits = any(group.images for group in self._groups if group.place.split)
        self._used = [group for group in self._groups if bool(group.place.split) == self._in_splits]
        self._prefix = 0  # folders above the classes' own, in a folder without splits
        tables = sum(ending_of(path) in TABLES and not _is_metadata(path) for path in self._others)
        images = sum(len(group.images) for group in self._used)
        has_card = any(path in CARDS and _names_files(root / path) for path in listing.files)
        enough = images > tables if self._in_splits else images > 0 and not tables
        self.is_one = enough and not has_card
        if not self.is_one:
            return
        self._find_splits()
        self._find_metadata()
        if not labelled:
            self._leave_labels_out()
        elif self.metadata:
            self._check_metadata()
        else:
            self._check_classes(listing.empty)
        self._note_left_out()

    def label_of(self, path: str) -> str:
        """The class of an image: the name of its folder."""
        return os.path.basename(os.path.dirname(path))

    def _find_splits(self) -> None:
        if self._in_splits:
            self._split_by_folders()
        elif self._all_named_by_split():
            self._split_by_names()
        else:
            self._take_as_one()

    def _find_metadata(self) -> None:
        for path in sorted(filter(_is_metadata, self._others)):
            split = find_place(os.path.dirname(path)).split if self._in_splits else next(iter(self.splits))
            if split:
                self.metadata.setdefault(split, []).append(path)
            else:
                self.notes.append(f"{path} is not read: it is outside of the splits' folders")

    def _split_by_folders(self) -> None:
        ordered, tops = defaultdict(list), defaultdict(dict)
        for place, images, *_ in self._used:
            if not images:
                continue
            names = [split for name in dict.fromkeys(place.named) for split in find_splits(name)]
            self._require(
                len(names) == 1 or len(set(place.named)) > 1,
                f"{images[0]}: the folder {place.named[0]} is named like several splits ({', '.join(names)});"
                " rename it",
            )
            ordered[place.split] += [(place.rank, path) for path in images]
            tops[place.split][place.top] = None
        for split in (split for split in KEYWORDS if split in ordered):
            self.splits[split] = [path for _, path in sorted(ordered[split])]
            if len(tops[split]) > 1:
                folders = ", ".join(tops[split])
                self.notes.append(f"the {split} split is made of {len(tops[split])} folders: {folders}")

    def _all_images(self) -> list[str]:
        return [path for group in self._used for path in group.images]

    def _all_named_by_split(self) -> bool:
        found = [find_splits(os.path.basename(path), FILE_FORMS) for path in self._all_images()]
        return all(len(splits) == 1 for splits in found) and len(set().union(*found)) > 1

    def _split_by_names(self) -> None:
        ordered = defaultdict(list)
        for path in self._all_images():
            ((split, rank),) = find_splits(os.path.basename(path), FILE_FORMS).items()
            ordered[split].append((rank, path))
        self.splits = {split: [path for _, path in sorted(ordered[split])] for split in KEYWORDS if split in ordered}
        self.notes.append("splits are told by the files' names, as no folder is named like a split")
        self._skip_common_folders()

    def _take_as_one(self) -> None:
        tops = dict.fromkeys(group.place.below[0] for group in self._used if group.images and group.place.below)
        like = [name for name in tops if self.labelled and name != name.lower() and find_splits(name.lower())]
        self._require(
            not like, f"the folder {', '.join(like)} is no split's: write {', '.join(like).lower()} in lower case"
        )
        self.splits = {"train": sorted(self._all_images())}
        self._skip_common_folders()

    def _skip_common_folders(self) -> None:
        """Class folders may lie in one folder, as archives have it."""
        places = [group.place.below for group in self._used if group.images]
        while all(len(parts) > self._prefix + 1 for parts in places) and len({p[self._prefix] for p in places}) == 1:
            self._prefix += 1

    def _below(self, place: Place) -> tuple[str, ...]:
        """The folders below a split's, or below the folder of all classes."""
        return place.below if place.split else place.below[self._prefix :]

    def _named_like_splits(self) -> list[str]:
        """The folders that would be splits of labelled images, if there are any for training and for scoring."""
        folders = dict.fromkeys(os.path.dirname(path) for path in self._all_images())
        places = [place for folder in folders if (place := find_place(folder)).split]
        return sorted({place.top for place in places}) if len({place.split for place in places}) > 1 else []

    def _leave_labels_out(self) -> None:
        """Say which files with labels are not read."""
        if self.metadata:
            listed = _some([path for paths in self.metadata.values() for path in paths])
            self.notes.append(f"labels are not read ({listed})")
            self.metadata = {}
        like = [] if self._in_splits else self._named_like_splits()
        if like:
            self.notes.append(
                f"{_some(like)}: read as one set; only folders called exactly train, val and test are splits of images"
                " without labels"
            )
        found = Counter(ending_of(path) for group in self._used for path in (*group.images, *group.others))
        self._note_skipped({("", ""): found})

    def _check_classes(self, empty: list[str]) -> None:
        endings: dict[tuple[str, str], Counter] = defaultdict(Counter)  # of the files of each (split, class)
        for group in self._used:
            below = self._below(group.place)
            if group.images:
                self._check_depth(group.images[0], group.place, below)
            found = endings[group.place.top, below[0] if below else ""]
            found.update(map(ending_of, itertools.chain(group.images, group.others)))
        for (split, label), found in endings.items():
            has_images = not label or not found or any(map(is_image, found))
            where = f"{split}/{label}".lstrip("/")
            self._require(has_images, f"{where} has no images ({', '.join(found)}); convert its files or delete it")
        labels = {label for (_, label), found in endings.items() if label and found}
        if len(labels) < 2:
            first = next(group for group in self._used if group.images)
            hint = self._labels_elsewhere(first.images[0], first.place)
            self._refuse(f"only one class folder ({', '.join(labels)}); two or more are needed{hint}")
        self._note_skipped(endings)
        places = {path: find_place(path) for path in empty}
        hollow = [path for path, place in places.items() if len(self._below(place)) == 1]
        hollow = [path for path in hollow if bool(places[path].split) == self._in_splits]
        if hollow:
            self.notes.append(f"left out {_count(hollow, 'empty class folder')} ({_some(hollow)})")

    def _check_depth(self, path: str, place: Place, below: tuple[str, ...]) -> None:
        # A class named like a split: `datasets` would move its images to that split, or count them twice.
        self._require(
            len(set(place.named)) < 2,
            f"{path} is in several splits by its folders' names ({', '.join(place.named)}); rename one of them",
        )
        if not below:
            self._refuse(f"{path} is in no class folder{self._labels_elsewhere(path, place)}{self._beside(place)}")
        form = "SPLIT/CLASS/FILE" if place.split else "CLASS/FILE"
        if len(below) > 1:
            self._refuse(f"{path} is deeper than {form}, so its class would be {below[-1]}; move it up")

    def _beside(self, place: Place) -> str:
        """What to do if a split's folder is a class in truth, as folders with images beside it suggest."""
        others = [group.place.below for group in self._groups if group.images and not group.place.split]
        beside = list(dict.fromkeys(parts[0] for parts in others if parts)) if place.split else []
        name = re.sub(BETWEEN, "", os.path.basename(place.top)) + "s"  # no split's name
        return f"; if {place.top} is a class, as {_some(beside)} may be, call it {name}, say" if beside else ""

    def _labels_elsewhere(self, path: str, place: Place) -> str:
        """What to do with an image in no class folder: a list of labels may lie beside it, as Kaggle gives it."""
        folder = place.top + "/" if place.split else ""
        lists = sorted((name for name in self._others if ending_of(name) in LISTS), key=ending_of)
        unread = f", and {lists[0]}{_header(self.root / lists[0])} is not read" if lists else ""
        example = os.path.relpath(path, place.top or ".")
        return (
            f"{unread}; move images into {folder}CLASS/, or label them in {folder}metadata.csv, columns file_name"
            f" ({example}) and label"
        )

    def _check_metadata(self) -> None:
        for split, paths in self.splits.items():
            self._require(
                split in self.metadata,
                f"the {split} split has {_count(paths, 'image')} and no metadata file like"
                f" {next(iter(self.metadata.values()))[0]}; add one, or move the split's folder away",
            )

    def _note_skipped(self, endings: dict[tuple[str, str], Counter]) -> None:
        total: Counter = sum(endings.values(), Counter())
        skipped = Counter({ending: count for ending, count in total.items() if not is_image(ending)})
        if not skipped:
            return
        listed = ", ".join(ending or "no ending" for ending, _ in skipped.most_common(SHOWN))
        self.notes.append(f"skipped {skipped.total()} of {total.total()} files, not images ({listed})")
        for path in (path for path in self._others if ending_of(path) == ".zip"):
            if held := archived_images(self.root / path):
                self.notes.append(f"left out {path} with {_count(held, 'image')}; unpack it if they belong here")

    def _note_left_out(self) -> None:
        outside = [path for group in self._groups for path in group.images if not group.place.split]
        if outside and self._in_splits:
            self.notes.append(f"left out {_count(outside, 'image')} outside of the splits' folders ({_some(outside)})")
        hidden = [path for group in self._groups for path in group.hidden]
        if hidden:
            self.notes.append(
                f"left out {_count(hidden, 'image')} whose own or folder's name marks them as hidden ({_some(hidden)})"
            )

    def _refuse(self, message: str) -> None:
        raise NoLabels(f"--data {self.source}: {message}")

    def _require(self, condition: bool, message: str) -> None:
        require(condition, f"--data {self.source}: {message}")


def check_names(root: Path, paths: list[str], source: str) -> None:
    """Raises UserError for names that are not UTF-8, which neither a table nor a class name can hold."""
    bad = [path for path in paths if not path.isprintable() and not _is_utf8(path)]
    require(_is_utf8(str(root)), f"--data {source}: the folder's name is not UTF-8; rename it")
    require(not bad, f"--data {source}: {_count(bad, 'file')} with a name that is not UTF-8 ({_some(bad)}); rename it")


def describe_files(listing: Listing) -> str:
    """How many files there are of which ending."""
    endings = Counter(ending_of(path) or "no ending" for path in listing.files if not is_hidden(path))
    listed = ", ".join(f"{count} {ending}" for ending, count in endings.most_common(5))
    return f"{_count(endings.elements(), 'file')}: {listed}" if endings else "hidden files only"


def check_archives(root: Path, listing: Listing, source: str) -> None:
    """Raises UserError for zip files of images, whose labels `datasets` cannot tell unless they hold metadata."""
    for path in (path for path in listing.files if ending_of(path) == ".zip" and not is_hidden(path)):
        images = archived_images(root / path)
        described = any(_is_metadata(name) for name in archived_names(root / path))
        require(
            not images or described,
            f"--data {source}: {path} holds {_count(images, 'image')} ({_some(images)}), which are not read from an"
            f" archive; unpack it: unzip {path} -d {os.path.splitext(path)[0]}",
        )


def archived_images(path: Path) -> list[str]:
    return [name for name in archived_names(path) if is_image(ending_of(name)) and not is_hidden(name)]


def archived_names(path: Path) -> list[str]:
    with suppress(zipfile.BadZipFile, OSError), zipfile.ZipFile(path) as archive:
        return archive.namelist()
    return []


def _is_metadata(path: str) -> bool:
    return os.path.basename(path) in METADATA


def _names_files(path: Path) -> bool:
    """Whether a dataset card says which files are which split, as on the Hub."""
    with suppress(OSError, UnicodeDecodeError):
        return re.search(r"^\s*(- )?(data_files|data_dir):", path.read_text("utf-8"), re.MULTILINE) is not None
    return False


def _header(path: Path) -> str:
    """The first line of a list, in brackets."""
    with suppress(OSError, UnicodeDecodeError), open(path, encoding="utf-8-sig") as file:
        return f" ({file.readline(80).strip()})"
    return ""


def _is_utf8(name: str) -> bool:
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


def _count(things, noun: str) -> str:
    number = len(list(things))
    return f"{number} {noun}{'s' * (number != 1)}"


def _some(paths: list[str]) -> str:
    return ", ".join(paths[:SHOWN]) + (", ..." if len(paths) > SHOWN else "")
