"""A teacher's logits as somebody else stored them: a cache that is taken without its teacher.

`python -m kd.teachers push` packs a finished cache into a folder and uploads it: the logits in safetensors of at most
1 GB, and a manifest with all that they depend on. Who has the same images trains against it (--cache-teacher
hub:USER/NAME). Rows, views and classes must match, each by its hash or value; teacher, precision and device are the
publisher's, and are only reported. A data set reinforced so: Faghri et al., arXiv:2303.08983.
"""

import hashlib
import json
import math
import re
import shlex
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from functools import cached_property, partial
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from rich.progress import track
from safetensors import SafetensorError, safe_open
from torch import Tensor

from kd.config import DataConfig, Job, ViewConfig
from kd.config.flags import HUB
from kd.config.presets import PRESETS
from kd.data import Data
from kd.data.augment import VERSION
from kd.data.rows import fits
from kd.errors import UserError, require
from kd.runs.folder import DEFAULTS_OF_NEWER_FLAGS
from kd.teachers.cache import ABOUT, FLAGS_OF_ROWS, LogitStore, Pieces
from kd.teachers.live import TeacherLogits
from kd.teachers.load import SharedLogits, TeacherNetwork
from kd.utils.console import console, print_once
from kd.utils.files import is_number, read_json, write_json, write_weights
from kd.utils.hub import fetch
from kd.utils.processes import all_do, from_main, is_alone, node_first
from kd.utils.system import expand_user

FORMAT = 1  # of the packed folder; kd reads this one and earlier ones
MANIFEST = "answers.json"
FILE = re.compile(r"answers-\d{5}-of-\d{5}\.safetensors")
FILES = "answers-*.safetensors"
SHARD_BYTES = 10**9
CHUNK = 2**14  # rows that are hashed at a time
PLAIN = ViewConfig()  # without a preset
LOGITS = "logits"  # the kind of answers, unless the identity names another

# What must be in an identity, and its type.
IDENTITY = {"rows": int, "classes": int, "rows_sha256": str, "teacher_sha256": str, "views": dict, "dtype": str}
IDENTITY |= {"normalisation": list, "class_names": list}
DTYPES = ("float16", "float32")


@dataclass(frozen=True)
class SharedCache:
    """A cache in a folder: packed, or as `--cache-teacher` built it in runs/cache."""

    source: str  # as summaries name it: hub:USER/NAME@COMMIT, or cache:FOLDER
    folder: Path
    identity: dict  # what its logits depend on (kd.teachers.cache.cache_identity)
    blocks: list[dict[str, str]]  # the sha256s of each stored view
    about: dict  # teacher and data in words; {} of a cache from before that was written
    shards: list[dict] | None = None  # of a packed cache: {"file", "rows": [first, last + 1]}

    @cached_property
    def sha256(self) -> str:
        """Hash of the logits and of what they depend on; the same for a packed cache and the one that it is of."""
        content = {"identity": self.identity, "blocks": self.blocks}
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

    @cached_property
    def store(self) -> LogitStore:
        return LogitStore(self.folder, self.identity)

    @property
    def views_version(self) -> int:
        return self.identity.get("views_version", 1)

    @property
    def kind(self) -> str:
        return self.identity.get("kind", LOGITS)

    @property
    def views(self) -> dict:
        """The flags of the views, those of the strong one among them if it has one."""
        known = {name: value for name, value in DEFAULTS_OF_NEWER_FLAGS.items() if name in _names(ViewConfig)}
        strong = self.identity.get("strong", {})
        left_out = () if strong else ViewConfig().strong
        flags = known | self.identity["views"] | strong
        return _as_json({name: value for name, value in flags.items() if name not in left_out})

    @property
    def name(self) -> str:
        """As --cache-teacher takes it."""
        return self.source.removeprefix("cache:")

    def pieces(self, name: str) -> list[Tensor]:
        """One array, (views x rows) x width, in memory-mapped parts. Raises UserError for a file that does not fit."""
        if self.shards is None:
            return [torch.from_numpy(self.store.open(name, "c")).flatten(0, 1)]
        return [self._piece(name, shard) for shard in self.shards]

    def _piece(self, name: str, shard: dict) -> Tensor:
        path, (first, end) = self.folder / shard["file"], shard["rows"]
        try:
            with safe_open(path, framework="pt") as file:
                tensor = file.get_tensor(name)
        except (OSError, SafetensorError) as error:
            raise UserError(f"{path}: cannot be read ({error}); {self.remedy}") from error
        wanted = torch.from_numpy(np.empty(0, self.store.dtype(name))).dtype
        right = tensor.dtype == wanted and tuple(tensor.shape) == (end - first, self.store.shapes[name][2])
        require(right, f"{path}: {name} is {tensor.dtype} of {tuple(tensor.shape)}; {self.remedy}")
        return tensor

    @property
    def remedy(self) -> str:
        what = "to fetch it anew" if self.source.startswith(HUB) else "and copy or build it anew"
        return f"remove {self.folder} {what}"

    def check(self) -> None:
        """Raises UserError if the cache is incomplete, changed since it was built, or not finite."""
        views, rows = self.store.views, self.store.rows
        require(
            len(self.blocks) == views,
            f"{self.name}: has {len(self.blocks)} of {views} views; let the command that builds it finish",
        )
        digests = {(view, name): hashlib.sha256() for view in range(views) for name in self.store.shapes}
        for name in self.store.shapes:
            row = 0
            for piece in self.pieces(name):
                for part in _by_view(piece, row, rows):
                    digests[row // rows, name].update(part.numpy())
                    finite = name.endswith("classes") or bool(part.isfinite().all())
                    require(finite, f"{self.name}: view {row // rows} has NaN or infinity; {self.remedy}")
                    row += len(part)
        for (view, name), digest in digests.items():
            same = self.blocks[view].get(name) == digest.hexdigest()
            require(same, f"{self.name}: view {view} changed since it was built; {self.remedy}")

    def teacher(self, strong: bool, device: torch.device) -> TeacherLogits:
        """A teacher that looks up rows by (view, index); of a cache with two views, both or the weak one alone."""
        identity = self.identity if strong else {key: self.identity[key] for key in self.identity if key != "strong"}
        store = LogitStore(self.folder, identity)
        return store.look_up({name: _placed(self.pieces(name), device) for name in store.shapes}, device)


def open_cache(source: str) -> SharedCache:
    """The cache that --cache-teacher names, without its logits as yet; all processes call this together.

    Raises UserError if there is none, it is malformed, or a newer kd wrote it.
    """
    if not source.startswith(HUB):
        return all_do(lambda: read_cache(expand_user(source, "--cache-teacher"), f"cache:{source}"))
    repository, _, revision = source.removeprefix(HUB).partition("@")
    if not is_alone():  # all take the revision that the main process finds
        revision = from_main(lambda: fetch(repository, (MANIFEST,), revision).name)
    folder = all_do(lambda: fetch(repository, (MANIFEST,), revision))
    return all_do(lambda: read_cache(folder, f"{HUB}{repository}@{folder.name}"))


def read_cache(folder: Path, source: str) -> SharedCache:
    """The cache in a folder, packed or not. Raises UserError if there is none."""
    name = source.removeprefix("cache:")
    hint = f"; write {HUB}{name} for the Hub's" if re.fullmatch(r"[\w.-]+/[\w.-]+", name) else ""
    require(folder.is_dir(), f"--cache-teacher {name}: no such folder{hint}")
    packed, built = folder / MANIFEST, folder / "manifest.json"
    require(packed.exists() or built.exists(), f"{name}: has neither {MANIFEST} nor manifest.json; name a cache")
    manifest = read_json(packed if packed.exists() else built)
    form = manifest.get("format", FORMAT)
    require(form == FORMAT, f"{name}: has format {form}, and this kd reads {FORMAT}; update kd")
    about = manifest.get("about", {})
    if not packed.exists():
        about = read_json(folder / ABOUT) if (folder / ABOUT).exists() else {}
    shards = (manifest.get("shards") or []) if packed.exists() else None
    _check_manifest(manifest, about, shards, f"{name}: its manifest")
    return SharedCache(source, folder, manifest["identity"], manifest["blocks"], about, shards)


def _check_manifest(manifest: dict, about: object, shards: object, what: str) -> None:
    """Raise UserError unless a manifest is one that this kd can read."""
    identity, blocks = manifest.get("identity"), manifest.get("blocks")
    require(isinstance(identity, dict) and _is_about(about), f"{what} is malformed; get the cache anew")
    wrong = [key for key, kind in IDENTITY.items() if not isinstance(identity.get(key), kind)]
    wrong += [key for key in ("rows", "classes") if key not in wrong and identity[key] < 1]
    wrong += [] if identity.get("dtype") in DTYPES else ["dtype"]
    wrong += [] if isinstance(identity.get("top_k"), int | None) else ["top_k"]
    wrong += (
        [] if "class_names" in wrong or all(isinstance(n, str) for n in identity["class_names"]) else ["class_names"]
    )
    wrong += [] if "normalisation" in wrong or _are_mean_and_std(identity["normalisation"]) else ["normalisation"]
    blocks_valid = isinstance(blocks, list) and all(map(_are_hashes, blocks))
    wrong += [] if blocks_valid else ["blocks"]
    require(not wrong, f"{what} has no valid {', '.join(dict.fromkeys(wrong))}; get the cache anew")
    strong = identity.get("strong", {})
    unknown = sorted({*identity["views"], *strong} - _names(ViewConfig))
    require(not unknown, f"{what} has flags of views that this kd does not know ({', '.join(unknown)}); update kd")
    try:
        store = LogitStore(Path(), identity)
        counted = isinstance(store.views, int) and store.views >= 1
    except (TypeError, KeyError):
        counted = False
    require(counted, f"{what} has no valid number of views; get the cache anew")
    require(len(blocks) <= store.views, f"{what} has {len(blocks)} blocks for {store.views} views; get the cache anew")
    if shards is not None:
        require(_are_shards(shards, store.views * store.rows), f"{what} lists no valid files; get the cache anew")


def _are_hashes(block: object) -> bool:
    return isinstance(block, dict) and all(isinstance(value, str) for value in block.values())


def _are_mean_and_std(value: list) -> bool:
    parts = [part if isinstance(part, list) else [] for part in value]
    return [len(part) for part in parts] == [3, 3] and all(is_number(number) for part in parts for number in part)


def _is_about(about: object) -> bool:
    """Whether it is as kd.teachers.cache.describe writes it, or empty."""
    if not isinstance(about, dict) or not all(isinstance(about.get(key, {}), dict) for key in ("data", "versions")):
        return False
    if not isinstance(about.get("data", {}).get("source", ""), str):
        return False
    sizes = [about.get(key, [1, 1]) for key in ("image_size", "stored_size")]
    teachers, width = about.get("teachers", []), about.get("width")
    valid = all(isinstance(size, list) and [type(side) for side in size] == [int, int] for size in sizes)
    valid = valid and isinstance(teachers, list) and all(isinstance(teacher, dict) for teacher in teachers)
    return valid and isinstance(width, int | None)


def _are_shards(shards: object, rows: int) -> bool:
    """Whether they are files of a packed cache that have all its rows, one after another."""
    ends = [0]
    for shard in shards if isinstance(shards, list) else ():
        bounds = shard.get("rows") if isinstance(shard, dict) else None
        named = isinstance(bounds, list) and FILE.fullmatch(str(shard.get("file"))) is not None
        if not named or len(bounds) != 2 or bounds[0] != ends[-1] or not isinstance(bounds[1], int):
            return False
        ends.append(bounds[1])
    return ends == sorted(set(ends)) and ends[-1] == rows


def find_shared(job: Job) -> SharedCache:
    """The cache of the job's --cache-teacher, checked as far as that goes without the data and without its logits."""
    cache = open_cache(job.cache.cache_from)
    check_views(cache, job)
    return cache


def shared_teacher(cache: SharedCache, job: Job, data: Data) -> TeacherNetwork:
    """The cache as a teacher without a network. Raises UserError if it is of other images, classes or views."""
    check_rows(cache, job, data)
    print_once(
        f"{cache.name} has the {cache.store.kind} of {_teachers(cache)} for the training images alone: its test"
        " accuracy, and how far the student agrees with it, are not measured"
    )
    models = [str(teacher.get("model", "?")) for teacher in cache.about.get("teachers", [])]
    shared = SharedLogits(cache.source, cache.sha256, cache.about.get("width"), partial(_open, cache, job))
    summary = {"model": " + ".join(models) or "unknown"}
    folder, sha256 = Path(cache.source), cache.identity["teacher_sha256"]
    return TeacherNetwork(None, folder, sha256, summary, cache.store.classes, shared=shared)


def _open(cache: SharedCache, job: Job, accelerator: Accelerator) -> TeacherLogits:
    """Fetch the logits, check them, and give the teacher that looks them up; all processes call this together.

    One process of each machine fetches and checks.
    """

    def ready(first: bool) -> None:
        if first:
            fetch_logits(cache)
            cache.check()

    node_first(ready)
    return cache.teacher(job.method.two_views, accelerator.device)


def fetch_logits(cache: SharedCache) -> None:
    """Download the files of a cache on the Hub that are not here yet."""
    if cache.source.startswith(HUB):
        repository, _, commit = cache.source.removeprefix(HUB).partition("@")
        fetch(repository, (MANIFEST, FILES), commit)


def check_views(cache: SharedCache, job: Job) -> None:
    """Raise UserError, with the flags to give, if the job's views are not those that the teacher answered for."""
    name = cache.name
    require(
        cache.views_version == VERSION,
        f"{name}: has the {cache.store.kind} of views of version {cache.views_version}, and this kd draws version"
        f" {VERSION}:"
        f" {'update kd' if cache.views_version > VERSION else 'take the kd that built it, or build the cache anew'}",
    )
    require(
        cache.kind == job.method.answers,
        f"{name}: has the teacher's {cache.kind}, and {job.role} needs its {job.method.answers}; take another method",
    )
    require(
        "strong" in cache.identity or not job.method.two_views,
        f"{name}: has the logits of one view of each image, and {job.role} needs those of a strong one too; take"
        " another method, or a cache that was built with mlkd or crld",
    )
    ours, theirs = _as_json(asdict(job.views)), cache.views
    left_out = () if job.method.two_views else job.views.strong
    differ = [key for key in ours if key not in left_out and key in theirs and ours[key] != theirs[key]]
    if differ:
        said = ", ".join(f"{_flag(key)} {theirs[key]} there, {ours[key]} here" for key in differ)
        advice = _advice(differ, theirs, _usual(job, "views", PLAIN))
        raise UserError(f"{name}: is of other views ({said}); {advice}")


def check_rows(cache: SharedCache, job: Job, data: Data) -> None:
    """Raise UserError if the training images are not those that the teacher saw, in the same order."""
    identity, name = cache.identity, cache.name
    if cache.kind == LOGITS and data.classes:
        _check_classes(cache, job, data.classes)
    sizes = _as_json([data.size, data.train.size])
    stored = cache.about.get("stored_size", sizes[1])
    theirs = [identity.get("image_size", stored), stored]  # in the identity if it is not the stored one
    for what, there, here in zip(("images", "stored images"), theirs, sizes, strict=True):
        remedy = f"; {_advice_of_data(cache, job)}"
        require(
            there == here,
            f"{name}: is of {what} of {there[1]} x {there[0]} pixels, and yours have {here[1]} x {here[0]}{remedy}",
        )
    rows = len(data.train.labels)
    require(
        identity["rows"] == rows,
        f"{name}: is of {identity['rows']} training images, and yours are {rows}; {_advice_of_data(cache, job)}",
    )
    if identity["rows_sha256"] != data.train.sha256:
        raise UserError(f"{name}: {_what_differs(cache, data)}; {_advice_of_data(cache, job)}")
    if job.views.erase:  # boxes are filled with the normalised images' mean
        ours, there = [*data.mean, *data.std], [*identity["normalisation"][0], *identity["normalisation"][1]]
        same = all(math.isclose(one, other, rel_tol=1e-5) for one, other in zip(ours, there, strict=True))
        require(same, f"{name}: was erased with another mean than your images have; leave --init out")


def _check_classes(cache: SharedCache, job: Job, ours: tuple[str, ...]) -> None:
    """Raise UserError if the classes are others, or in another order."""
    theirs = cache.identity["class_names"]
    if list(ours) == theirs:
        return
    place = next((at for at, pair in enumerate(zip(theirs, ours)) if pair[0] != pair[1]), min(len(ours), len(theirs)))
    if sorted(ours) == sorted(theirs):
        said = "its classes are in another order than yours"
    elif len(ours) != len(theirs):
        said = f"has {len(theirs)} classes, and your data {len(ours)}"
    else:
        said = f"its class {place} is {theirs[place]!r}, and yours is {ours[place]!r}"
    shown = ", ".join(map(repr, theirs[place : place + 3]))
    advice = f"name and order them as it does: from class {place} on {shown}, ..." if shown else "take those it has"
    raise UserError(f"{cache.name}: {said}; {_flags_that_differ(cache, job) or advice}")


def _what_differs(cache: SharedCache, data: Data) -> str:
    """How rows of equal number differ, as far as the cache says: in images, order or labels."""
    images, labels = cache.about.get("content_sha256"), cache.about.get("labels_sha256")
    mine = data.train.content_sha256 if images else None
    hashes = f"(sha256 {cache.identity['rows_sha256'][:12]} there, {data.train.sha256[:12]} here)"
    if images is None or mine is None:
        return f"is of other training images or labels, or of the same in another order {hashes}"
    if images != mine:
        return f"is of other training images {hashes}"
    if labels == data.train.labels_sha256:
        return f"is of the same training images in another order {hashes}"
    return f"is of the same training images in another order, or with other labels {hashes}"


def _advice_of_data(cache: SharedCache, job: Job) -> str:
    """Which flags of the data to give, or which images."""
    source = cache.about.get("data", {}).get("source")
    made_of = f" ({source})" if source else ""
    images = f"give the images that it was made of{made_of}, unchanged, or take --teacher RUN in its place"
    return _flags_that_differ(cache, job) or images


def _flags_that_differ(cache: SharedCache, job: Job) -> str:
    """The flags of the data to give, --data aside; empty if they are the same."""
    theirs, ours = cache.about.get("data", {}), _as_json(asdict(job.data))
    differ = [key for key in FLAGS_OF_ROWS if key in theirs and key != "source" and ours[key] != theirs[key]]
    return _advice(differ, theirs, _usual(job, "data", DataConfig()))


def _usual(job: Job, part: str, plain: object) -> dict:
    """What the flags of a part of the configuration are if they are left out."""
    return _as_json(asdict(PRESETS[job.preset].get(part, plain)))


def _advice(names: list[str], values: dict, usual: dict) -> str:
    """The flags that set these fields, and those to leave out: `usual` are the values without them."""
    unset = lambda name: values[name] is None or (name.startswith("no_") and not values[name])  # noqa: E731
    out = [name for name in names if unset(name) or values[name] == usual[name]]
    given = [shlex.join(as_flag(name, values[name])) for name in names if name not in out]
    absent = [_flag(name) for name in out]
    parts = [f"give {' '.join(given)}"] if given else []
    return " and ".join([*parts, *([f"leave {' and '.join(absent)} out"] if absent else [])])


def as_flag(name: str, value: object) -> list[str]:
    """A field of views or data as the words of a command line, which give the very same value."""
    flag = _flag(name)
    if isinstance(value, bool):
        return [flag if value else flag.replace("--", "--no-", 1)]
    values = value if isinstance(value, list | tuple) else [value]
    return [flag, *(repr(part).removesuffix(".0") if isinstance(part, float) else str(part) for part in values)]


def _flag(field: str) -> str:
    return f"--{ {'count': 'views', 'source': 'data'}.get(field, field).replace('_', '-') }"


def flags_to_train(cache: SharedCache, usual: ViewConfig = PLAIN) -> list[list[str]]:
    """The flags of data and views, each as words, that a student of this cache needs whose preset has `usual` views."""
    data = {name: value for name, value in cache.about.get("data", {}).items() if name in FLAGS_OF_ROWS}
    default = _as_json(asdict(DataConfig()))
    given = [as_flag("source", data["source"])] if data.get("source") else []
    given += [
        as_flag(name, value)
        for name, value in data.items()
        if name != "source" and value is not None and value != default[name]
    ]
    defaults = [_as_json(asdict(each)) for each in (PLAIN, usual)]
    known = {name: value for name, value in cache.views.items() if value is not None}
    changed = {name: value for name, value in known.items() if any(value != each[name] for each in defaults)}
    return [*given, *(as_flag(name, value) for name, value in changed.items())]


def pack(cache: SharedCache, folder: Path) -> None:
    """Write a packed cache into an empty folder: its logits, all files of at most SHARD_BYTES, then the manifest."""
    store, arrays = cache.store, {name: cache.pieces(name) for name in cache.store.shapes}
    total = store.views * store.rows
    rows = max(1, SHARD_BYTES * total // store.bytes)
    starts = range(0, total, rows)
    shards, hidden = [], not console.is_terminal
    for number, first in enumerate(track(starts, "packing", console=console, disable=hidden, transient=True), 1):
        end = min(first + rows, total)
        file = f"answers-{number:05}-of-{len(starts):05}.safetensors"
        index = torch.arange(first, end)
        write_weights(folder / file, {name: Pieces(parts)[index] for name, parts in arrays.items()})
        shards.append({"file": file, "rows": [first, end]})
    content = {"format": FORMAT, "identity": cache.identity, "blocks": cache.blocks, "about": cache.about}
    write_json(folder / MANIFEST, content | {"shards": shards})


def _by_view(piece: Tensor, row: int, rows: int) -> Iterator[Tensor]:
    """A piece that begins at `row`, cut where a view of so many `rows` ends, and into parts of at most CHUNK rows."""
    first = 0
    while first < len(piece):
        end = min(first + rows - (row + first) % rows, first + CHUNK, len(piece))
        yield piece[first:end]
        first = end


def _placed(pieces: list[Tensor], device: torch.device) -> Tensor | Pieces:
    """The array on the device if it fits there, else mapped from the disk."""
    total = sum(piece.nbytes for piece in pieces)
    if device.type != "cuda" or not fits(total, device):
        return pieces[0] if len(pieces) == 1 else Pieces(pieces)
    first, rows = pieces[0], sum(map(len, pieces))
    placed = torch.empty(rows, *first.shape[1:], dtype=first.dtype, device=device)
    for part, piece in zip(placed.split([len(piece) for piece in pieces]), pieces, strict=True):
        part.copy_(piece)
    return placed


def _teachers(cache: SharedCache) -> str:
    teachers = cache.about.get("teachers", [])
    return " and ".join(str(teacher.get("model")) for teacher in teachers) or "a teacher"


def _names(kind: type) -> set[str]:
    return {field.name for field in fields(kind)}


def _as_json(value):
    """With lists for tuples, as in a file read back."""
    return json.loads(json.dumps(value))
