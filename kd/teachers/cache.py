"""The teacher's logits, or its embeddings, computed once for K views of every image and reused by every student.

One memory-mapped file of logits [K, N, C] (or of the top k of each row), a second one of the strong views if the method
has two, and a manifest with everything they depend on (teacher, rows, views, precision) and the sha256 of each view's
block. A cache that does not match is refused, never overwritten. Stored targets for repeated views: FKD (Shen and Xing,
arXiv:2112.01528); the same views for teacher and student: Beyer et al., arXiv:2106.05237.
"""

import hashlib
import json
import math
import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from accelerate import Accelerator
from jaxtyping import Int
from rich.progress import track
from torch import Tensor

from kd.config import Job, ViewConfig
from kd.data import Data
from kd.data.augment import VERSION
from kd.data.loader import TrainingImages, compiles_views
from kd.data.rows import place_on
from kd.errors import Preempted, UserError, require
from kd.metrics import ranked
from kd.models import stages
from kd.runs.folder import without_newer_defaults
from kd.teachers.live import TeacherLogits, live_logits
from kd.teachers.load import TeacherNetwork
from kd.types import Batch, Outputs
from kd.utils.console import console, print_once
from kd.utils.files import create_map, read_array, read_json, sync_file, write_json
from kd.utils.processes import all_do, anyone, from_main, is_alone, is_first_on_node, is_main, node, nothing, wait_for
from kd.utils.system import Lock, StopRequests

ROOT = Path("runs/cache")
ABOUT = "about.json"  # beside the manifest: teacher and data in words, for `python -m kd.teachers`

# Flags of the data that change which images are trained on, in which order and with which labels.
FLAGS_OF_ROWS = (
    *("source", "label", "image", "classes", "image_size", "stored_size", "val_fraction", "split_seed", "imbalance"),
    *("test_fraction", "skip_broken", "stream", "no_labels", "label_share"),
)
MIN_BATCH = 16  # fewest rows of a batch: with 12 or more a CPU gives the same bits whatever the batch
TOKEN = ".main-"  # before the name of a file by which processes see that they share the main one's disk
STRONG = "strong_"  # before the names of the strong views' files
PART_BYTES = 2**26  # that are sent to another machine at once
TOLERANCE = {"float32": 1e-5, "float16": 1e-3}  # relative to the largest logit; float16 has 11 bits


class Pieces:
    """One array in memory in several parts, one after another, of which the first axis is indexed."""

    def __init__(self, parts: Sequence[Tensor]):
        self.parts, self.device = parts, parts[0].device
        self._ends = torch.tensor([len(part) for part in parts]).cumsum(0)

    def __getitem__(self, rows: Int[Tensor, "b"]) -> Tensor:
        first = self.parts[0]
        found = torch.empty(len(rows), *first.shape[1:], dtype=first.dtype)
        owner = torch.searchsorted(self._ends, rows, right=True)
        for number in owner.unique().tolist():
            part, mine = self.parts[number], owner == number
            found[mine] = part[rows[mine] - (self._ends[number] - len(part))]
        return found


class LogitStore:
    """The files of one cache: `logits.npy` [K, N, C], or with top k `logits.npy` [K, N, k + 1] and `classes.npy`
    [K, N, k]; column k is the logit that all other classes share. With two views `strong_logits.npy`, and with top k
    `strong_classes.npy`, have the same of the strong ones."""

    def __init__(self, folder: Path, identity: dict):
        self.folder, self.identity = folder, identity
        self.views = ViewConfig(**identity["views"]).stored
        self.rows, self.classes = identity["rows"], identity["classes"]  # of embeddings, `classes` is their width
        self.kind = "embeddings" if "kind" in identity else "logits"
        self.top_k = identity["top_k"] if (identity["top_k"] or self.classes) < self.classes else None
        width = self.classes if self.top_k is None else self.top_k + 1
        self.shapes = {}
        self.prefixes = ("", STRONG) if "strong" in identity else ("",)
        for prefix in self.prefixes:
            self.shapes[f"{prefix}logits"] = (self.views, self.rows, width)
            if self.top_k is not None:
                self.shapes[f"{prefix}classes"] = (self.views, self.rows, self.top_k)

    @property
    def bytes(self) -> int:
        return sum(math.prod(shape) * self.dtype(name).itemsize for name, shape in self.shapes.items())

    def dtype(self, name: str) -> np.dtype:
        return np.dtype(np.int32 if name.endswith("classes") else self.identity["dtype"])

    def path(self, name: str) -> Path:
        return self.folder / f"{name}.npy"

    def open(self, name: str, mode: str) -> np.ndarray:
        """One file as a memory map. Raises UserError if its shape or type is wrong."""
        try:
            array = read_array(self.path(name), mode)
        except UserError as error:
            raise UserError(f"{error}; remove {self.folder} to build it anew") from error
        actual, expected = (array.shape, array.dtype), (self.shapes[name], self.dtype(name))
        require(actual == expected, f"{self.path(name)} has {actual}, expected is {expected}; remove {self.folder}")
        return array

    def sealed(self) -> list[dict[str, str]]:
        """The sha256s of the finished views. Raises UserError naming what differs if the cache is another one."""
        if not (self.folder / "manifest.json").exists():
            return []
        manifest = read_json(self.folder / "manifest.json")
        identity, blocks = manifest.get("identity"), manifest.get("blocks")
        valid = isinstance(identity, dict) and isinstance(blocks, list) and len(blocks) <= self.views
        valid = valid and all(isinstance(block, dict) for block in blocks)
        require(valid, f"{self.folder / 'manifest.json'} is malformed; remove {self.folder} to build it anew")
        differences = [
            f"{key}: {identity.get(key)} there, {value} here"
            for key, value in {**dict.fromkeys(identity), **self.identity}.items()
            if identity.get(key) != value
        ]
        require(
            not differences,
            f"{self.folder} has other {self.kind} ({'; '.join(differences)}); remove it to build it anew",
        )
        return blocks

    def create(self) -> None:
        """Make the files, with room for all views."""
        for name, shape in self.shapes.items():
            create_map(self.path(name), self.dtype(name), shape).flush()

    def parts(self, name: str) -> Iterator[slice]:
        """The rows of a file, in parts of few bytes."""
        step = max(PART_BYTES // (self.shapes[name][2] * self.dtype(name).itemsize), 1)
        return (slice(start, min(start + step, self.rows)) for start in range(0, self.rows, step))

    def part(self, name: str, view: int, rows: slice) -> np.ndarray:
        return np.array(self.open(name, "r")[view, rows])

    def put(self, name: str, view: int, rows: slice, part: np.ndarray) -> None:
        """Store rows of a file that another machine has."""
        if not self.path(name).exists():
            self.create()
        self.open(name, "r+")[view, rows] = part

    def finish(self, view: int) -> None:
        """Seal a view whose rows are all written."""
        for name in self.shapes:
            sync_file(self.path(name))
        self.seal([*self.sealed(), self.block(view)])

    def seal(self, blocks: list[dict[str, str]]) -> None:
        write_json(self.folder / "manifest.json", {"identity": self.identity, "blocks": blocks})

    def block(self, view: int) -> dict[str, str]:
        """The sha256s of a view's block in each file."""
        return {name: hashlib.sha256(self.open(name, "r")[view]).hexdigest() for name in self.shapes}

    def check(self) -> None:
        """Raises UserError if the cache is incomplete, changed since it was built, or not finite."""
        blocks = self.sealed()
        require(len(blocks) == self.views, f"{self.folder} has {len(blocks)} of {self.views} views; remove it")
        for view, block in enumerate(blocks):
            changed = block != self.block(view)
            require(not changed, f"{self.folder}: view {view} changed since it was built; remove the folder")
            finite = all(np.isfinite(self.open(f"{prefix}logits", "r")[view]).all() for prefix in self.prefixes)
            require(finite, f"{self.folder}: view {view} has NaN or infinity; remove the folder")

    def write(self, view: int, rows: slice, outputs: Outputs) -> None:
        """Store the logits of one view's rows. Raises UserError if they are not finite in the cache's dtype."""
        for prefix in self.prefixes:
            logits = outputs.strong if prefix else outputs.logits
            self._write(prefix, view, rows, logits[: rows.stop - rows.start])

    def _write(self, prefix: str, view: int, rows: slice, logits: Tensor) -> None:
        parts = {"logits": logits}
        if self.top_k is not None:
            classes = ranked(logits)[:, : self.top_k]  # the first of equals is kept, as it is the prediction
            values = logits.gather(1, classes)
            others = logits.scatter(1, classes, -math.inf).logsumexp(dim=1, keepdim=True)
            # FKD's smoothing: the remaining mass, spread evenly over the classes that are not stored.
            rest = others - math.log(self.classes - self.top_k)
            parts = {"logits": torch.cat([values, rest], dim=1), "classes": classes}
        with np.errstate(over="ignore"):  # an overflow is reported below
            arrays = {name: tensor.cpu().numpy().astype(self.dtype(name)) for name, tensor in parts.items()}
        require(
            bool(np.isfinite(arrays["logits"]).all()),
            f"the teacher's {self.kind} of training rows {rows.start} to {rows.stop - 1} are not finite as"
            f" {self.identity['dtype']}: check the teacher, or store them with --cache-dtype float32",
        )
        for name, array in arrays.items():
            self.open(f"{prefix}{name}", "r+")[view, rows] = array

    def gap(self, prefix: str, view: int, index: Tensor, logits: Tensor) -> float:
        """How far the stored logits of some rows are from `logits`, as a share of the largest logit."""
        now = logits.float().cpu()
        stored = torch.from_numpy(np.asarray(self.open(f"{prefix}logits", "r")[view, index.numpy()])).float()
        if self.top_k is not None:
            stored, now = stored[:, :-1], now.topk(self.top_k, dim=1).values
        return ((now - stored).abs().max() / now.abs().max()).item()

    def teacher(self, device: torch.device) -> TeacherLogits:
        """A teacher that looks up rows by (view, index), in the device's memory if the cache fits there."""
        parts = {name: torch.from_numpy(self.open(name, "c")).flatten(0, 1) for name in self.shapes}
        return self.look_up({name: place_on(part, device) for name, part in parts.items()}, device)

    def look_up(self, placed: Mapping[str, "Tensor | Pieces"], device: torch.device) -> TeacherLogits:
        """A teacher that looks up rows by (view, index) in these arrays, each (views x rows) x width."""

        def look_up(batch: Batch) -> Outputs:
            # One flat index: a tensor as first of two indices would make the host wait for its value.
            row = batch.view * self.rows + batch.index
            stored = {name: part[row.to(part.device)].to(device, non_blocking=True) for name, part in placed.items()}
            weak, *strong = (
                self.full(stored[f"{prefix}logits"].float(), stored.get(f"{prefix}classes")) for prefix in self.prefixes
            )
            return Outputs(weak, strong=strong[0] if strong else None)

        return look_up

    def full(self, stored: Tensor, classes: Tensor | None) -> Tensor:
        """b x C logits from the stored columns."""
        if classes is None:
            return stored
        return stored[:, -1:].repeat(1, self.classes).scatter(1, classes.long(), stored[:, :-1])


def teacher_logits(
    teacher: TeacherNetwork, data: Data, job: Job, accelerator: Accelerator, layers: tuple[str, ...] = ()
) -> TeacherLogits:
    """The job's teacher: cached if asked for, else run at every step, also for features of `layers`."""
    if teacher.shared:
        return teacher.shared.open(accelerator)
    if job.cache.cache_teacher and not layers:
        return cached_logits(teacher, data, job, accelerator)
    if job.cache.cache_teacher and accelerator.is_main_process:
        print(f"{job.role} needs features, which --cache-teacher does not store: the teacher runs at every step")
    return live_logits(teacher.network, accelerator, layers, job.fit.channels_last)


def validation_teacher(
    teacher: TeacherNetwork,
    logits: TeacherLogits,
    data: Data,
    job: Job,
    accelerator: Accelerator,
    layers: tuple[str, ...] = (),
) -> TeacherLogits | None:
    """The live teacher of validation images without labels; None with labels, by which they are scored, and if the
    teacher's network is not here.

    `logits`: what `teacher_logits` gave, which is live unless it is cached."""
    if data.labelled or data.val is None:
        return None
    if teacher.network is None:
        print_once("no validation: without labels it asks the teacher, whose network is not here")
        return None
    cached = job.cache.cache_teacher and not layers
    return live_logits(teacher.network, accelerator, layers, job.fit.channels_last) if cached else logits


def cached_logits(
    teacher: TeacherNetwork, data: Data, job: Job, accelerator: Accelerator, root: Path = ROOT
) -> TeacherLogits:
    """A teacher that looks up its logits, after building the missing ones; all processes call this together.

    Raises: UserError if the cache on disk is another one, damaged, not finite, or differs from the teacher's logits.
    """
    identity = from_main(lambda: cache_identity(teacher, data, job, accelerator))  # which reads all training rows
    digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:12]
    store = LogitStore(root / f"{teacher.folder.name}-{digest}", identity)
    images = TrainingImages(
        data,
        job.views,
        job.fit.seed,
        accelerator.device,
        two_views=job.method.two_views,
        compiled=compiles_views(job.fit, accelerator.device),
    )
    query = live_logits(teacher.network, accelerator, channels_last=job.fit.channels_last)
    lock = _claim(store.folder)
    try:
        all_do(lambda: None if lock is None else describe(store.folder, teacher, data, job))
        share = max(job.fit.batch_size // accelerator.num_processes, MIN_BATCH)
        done = _send_views(store, keeps=lock is not None)
        _build(store, images, query, accelerator, Work(share, done, lock is not None))
        _check(store, keeps=lock is not None)
        all_do(lambda: _compare(store, images, query, accelerator, share))
    finally:
        if lock is not None:
            lock.close()
    return store.teacher(accelerator.device)


def describe(folder: Path, teacher: TeacherNetwork, data: Data, job: Job) -> None:
    """Write what the identity does not say, for those who get the cache without the teacher; nothing of it binds.

    A path's last component is all that is kept of it. Raises UserError if the folder cannot be written.
    """
    if (folder / ABOUT).exists():
        return
    members = teacher.members or (teacher,)
    source = Path(job.data.source).expanduser()
    flags = asdict(job.data) | {"source": source.name if source.is_dir() else job.data.source}
    about = {
        "teachers": [
            {
                "name": member.folder.name,
                "model": member.summary["model"],
                "test_top1": member.summary.get("test_top1"),
            }
            for member in members
        ],
        "width": None if job.method.embeds else _classifier_width(teacher),
        "data": {name: value for name, value in flags.items() if name in FLAGS_OF_ROWS},
        "image_size": data.size,
        "stored_size": data.train.size,
        "labels_sha256": data.train.labels_sha256,
        "content_sha256": data.train.content_sha256,
        "versions": {"torch": torch.__version__},
    }
    try:
        write_json(folder / ABOUT, about)
    except OSError as error:
        raise UserError(f"cannot write to {folder} ({error}); free some space, or remove it") from error


def _classifier_width(teacher: TeacherNetwork) -> int | None:
    """The width of what enters the teacher's last linear layer; None if it has none, or is several networks."""
    if teacher.members:
        return None
    classifier = stages(teacher.summary["model"], teacher.network, teacher.classes).classifier
    return getattr(teacher.network.get_submodule(classifier), "in_features", None) if classifier else None


def cache_identity(teacher: TeacherNetwork, data: Data, job: Job, accelerator: Accelerator) -> dict:
    """Everything that the logits depend on."""
    spec = {"rows": len(data.train.labels), "classes": len(data.classes), "rows_sha256": data.train.sha256}
    spec |= {"teacher_sha256": teacher.sha256, "normalisation": [data.mean, data.std]}
    views = {name: value for name, value in asdict(job.views).items() if name not in job.views.strong}
    spec |= {"views": without_newer_defaults(views), "precision": accelerator.mixed_precision}
    spec |= {"device": accelerator.device.type, "deterministic": job.fit.deterministic}
    spec |= {"dtype": job.cache.cache_dtype, "top_k": job.cache.cache_top_k, "class_names": data.classes}
    if job.method.embeds:
        spec |= {"kind": "embedding", "classes": teacher.classes}
    if job.data.stored_size:  # rows_sha256 is of the images as they are stored
        spec |= {"image_size": data.size}
    if job.method.two_views:
        spec |= {"strong": job.views.strong}
    if VERSION != 1:
        spec |= {"views_version": VERSION}
    return json.loads(json.dumps(spec))


def _claim(folder: Path) -> Lock | None:
    """Lock the cache; a second run waits here and then reuses what the first has built.

    Of all processes the main one keeps a cache, and the first one on each machine that has a disk of its own; they get
    the lock and the others None.
    """
    lock = Lock(folder / "lock")

    def begin() -> Path:
        _acquire(folder, lock)
        token = folder / f"{TOKEN}{uuid.uuid4().hex}"  # a new name, which no network file system remembers as missing
        token.touch()
        return token

    token = from_main(begin)
    elsewhere = is_first_on_node() and not token.exists()
    try:
        all_do(lambda: _acquire(folder, lock) if elsewhere else None)
    finally:
        if is_main():
            token.unlink(missing_ok=True)
    return lock if is_main() or elsewhere else None


def _acquire(folder: Path, lock: Lock) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for leftover in folder.glob(f"{TOKEN}*"):  # of a process killed in _claim
            leftover.unlink(missing_ok=True)
        wait_for(lock, f"waiting for another process to finish {folder}")
    except OSError as error:
        raise UserError(f"cannot write to {folder} ({error}); remove it, or work where you may write") from error


def _send_views(store: LogitStore, keeps: bool) -> list[int]:
    """Send the main process's finished views to the machines that keep a cache of their own and lack them.

    Returns how many are finished: on the main process, and here.
    """
    theirs = len(from_main(store.sealed))
    mine = all_do(lambda: len(store.sealed()) if keeps else theirs)
    for view in range(theirs):
        if anyone(view >= mine):
            _send_view(store, view, wanted=view >= mine)
    return [theirs, max(mine, theirs)]


def _send_view(store: LogitStore, view: int, wanted: bool) -> None:
    for name in store.shapes:
        for rows in store.parts(name):
            part = from_main(partial(store.part, name, view, rows))
            all_do(partial(store.put, name, view, rows, part) if wanted else nothing)
    all_do(partial(store.finish, view) if wanted else nothing)


class Work(NamedTuple):
    """What a process does for a cache."""

    share: int  # rows of a batch
    done: list[int]  # views that are finished: on the main process, and here
    keeps: bool  # whether this process keeps the cache, of its machine


def _build(
    store: LogitStore, images: TrainingImages, query: TeacherLogits, accelerator: Accelerator, work: Work
) -> None:
    """Compute the views that are not finished yet, each process its share of the rows; the keepers get all rows."""
    main, processes, (first, mine) = accelerator.is_main_process, accelerator.num_processes, work.done
    if main and not first:
        views = f"{store.views} view{'s' * (store.views > 1)}" + ", weak and strong," * (len(store.prefixes) > 1)
        of_what = f": {store.kind} of {store.classes} numbers" if store.kind == "embeddings" else ""
        print(f"{store.folder}: {store.bytes / 1e6:.3g} MB for {views} of {store.rows} images{of_what}", flush=True)
    all_do(lambda: store.create() if work.keeps and not mine else None)
    rounds = range(0, store.rows, processes * work.share)
    starts = [start + accelerator.process_index * work.share for start in rounds]
    with StopRequests() as requests:
        for view in range(first, store.views):
            title = f"teacher's {store.kind}, view {view + 1} of {store.views}"
            hidden = not (main and console.is_terminal)
            # The last batch is padded: a small one would be summed in another order and differ in its last bits.
            indices = [torch.arange(start, start + work.share).clamp(max=store.rows - 1) for start in starts]
            outputs = _query(query, images, indices, view)
            keeper = Keeper(store, view, work.keeps and view >= mine)
            for start, output in zip(track(rounds, title, console=console, disable=hidden, transient=True), outputs):
                if requests.number and processes == 1:
                    _stop(requests.number, store, view)
                keeper.write(start, _gathered(output, accelerator))
            stop = _stop_requested(requests, accelerator)
            all_do(keeper.finish)
            if main:
                print(f"{store.folder}: view {view + 1} of {store.views} stored", flush=True)
            if stop := stop or _stop_requested(requests, accelerator):
                _stop(stop, store, view + 1)


class Keeper:
    """Writes one view, on the processes that keep a cache."""

    def __init__(self, store: LogitStore, view: int, keeps: bool):
        self.store, self.view, self.keeps = store, view, keeps
        self._error: Exception | None = None

    def write(self, start: int, outputs: Outputs) -> None:
        """Store the rows from `start` on. With several processes, the others are in mid-view: an error waits for
        `finish`."""
        rows = slice(start, min(start + len(outputs.logits), self.store.rows))
        if not self.keeps or self._error is not None:
            return
        try:
            self.store.write(self.view, rows, outputs)
        except (UserError, OSError) as error:
            if is_alone():
                raise
            self._error = error

    def finish(self) -> None:
        if self._error is not None:
            raise self._error
        if self.keeps:
            self.store.finish(self.view)


def _gathered(outputs: Outputs, accelerator: Accelerator) -> Outputs:
    """The rows of all processes, in order."""
    if is_alone():
        return outputs
    strong = None if outputs.strong is None else accelerator.gather(outputs.strong.contiguous())
    return Outputs(accelerator.gather(outputs.logits.contiguous()), strong=strong)


def _check(store: LogitStore, keeps: bool) -> None:
    """Raises UserError if a machine's cache is damaged, or is not the main process's."""
    all_do(lambda: store.check() if keeps else None)
    theirs = from_main(store.sealed)
    same = not keeps or store.sealed() == theirs
    message = f"{node()}: {store.folder} has other logits than the main process's; remove it there to build it anew"
    all_do(lambda: require(same, message))


def _stop_requested(requests: StopRequests, accelerator: Accelerator) -> int:
    """The signal that any process received, the same on all; 0 for none."""
    return int(accelerator.gather(torch.tensor([requests.number], device=accelerator.device)).max())


def _stop(signal_number: int, store: LogitStore, views: int) -> None:
    """Raises Preempted: between two batches, or with several processes between two views, where they agree."""
    done = f"{views} of {store.views} views of the teacher's {store.kind} in {store.folder}"
    raise Preempted(signal_number, f"{done}; the same command continues")


def _query(query: TeacherLogits, images: TrainingImages, indices: list[Tensor], view: int) -> Iterator[Outputs]:
    """The teacher's outputs for each of `indices` (b) in one view."""
    numbers = [torch.full((), number, device=images.device) for number in (view, view, 0)]
    for image, label, mixed, strong, index in images.augmented(indices, view):
        yield query(Batch(image, label, index, *numbers, mixed, strong))


def _compare(
    store: LogitStore, images: TrainingImages, query: TeacherLogits, accelerator: Accelerator, share: int
) -> None:
    """Run the teacher on a few rows again. Raises UserError if the stored logits differ from what it gives today."""
    index = images.split.sample(share)
    tolerance = TOLERANCE[store.identity["dtype"]]
    if accelerator.device.type != "cpu":
        tolerance = max(tolerance, 2**-8)  # TF32, and kernels chosen anew in each process
    if accelerator.mixed_precision != "no":
        tolerance = max(tolerance, 2**-5)  # half-precision arithmetic depends on the batch it runs in
    for view in {0, store.views - 1}:
        output = next(_query(query, images, [index], view))
        for prefix in store.prefixes:
            gap = store.gap(prefix, view, index, output.strong if prefix else output.logits)
            name = f"the strong view {view}" if prefix else f"view {view}"
            require(
                gap <= tolerance,
                f"{store.folder}: the teacher now gives other {store.kind} for {name} (by {gap:.1e} of the largest,"
                f" {tolerance:.1e} is allowed); remove the folder to build it anew",
            )
