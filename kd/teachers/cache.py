"""The teacher's answers, computed once for all views and reused by every student of every seed.

One memory-mapped file of logits [K, N, C] (or of the top k of each row), beside a manifest that says whose answers they
are, to which rows seen how, and the sha256 of each view's block. What does not match is refused, never recomputed over.
Keeping targets for repeated views: FKD (Shen and Xing, arXiv:2112.01528); the same views for teacher and student:
Beyer et al., arXiv:2106.05237.
"""

import hashlib
import json
import math
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from rich.progress import track
from torch import Tensor

from kd.config import Job
from kd.data import Data
from kd.data.loader import TrainingImages
from kd.data.rows import place_on
from kd.errors import Preempted, UserError, require
from kd.runs.folder import without_newer_defaults
from kd.teachers.live import TeacherLogits, live_logits
from kd.teachers.load import TeacherNetwork
from kd.types import Batch, Outputs
from kd.utils.console import console
from kd.utils.files import create_map, read_array, read_json, sync_file, write_json
from kd.utils.processes import wait_for
from kd.utils.system import Lock, StopRequests

#: (kd.teacher_store) The files that a teacher's kept answers are in, and looking them up.


class LogitStore:
    """The files of one cache: `logits.npy` [K, N, W], of W = C columns or k and the rest's; `classes.npy` [K, N, k]."""

    def __init__(self, folder: Path, identity: dict):
        self.folder, self.identity = folder, identity
        self.views, self.rows, self.classes = identity["views"]["count"], identity["rows"], identity["classes"]
        self.top_k = identity["top_k"] if (identity["top_k"] or self.classes) < self.classes else None
        width = self.classes if self.top_k is None else self.top_k + 1
        self.shapes = {"logits": (self.views, self.rows, width)}
        if self.top_k is not None:
            self.shapes["classes"] = (self.views, self.rows, self.top_k)

    def dtype(self, name: str) -> np.dtype:
        return np.dtype(np.int32 if name == "classes" else self.identity["dtype"])

    def path(self, name: str) -> Path:
        return self.folder / f"{name}.npy"

    def open(self, name: str, mode: str) -> np.ndarray:
        """One file as a memory map; raises UserError where its size is not what its shape needs."""
        try:
            array = read_array(self.path(name), mode)
        except UserError as error:
            raise UserError(f"{error}; remove {self.folder} to build it anew") from error
        found, wanted = (array.shape, array.dtype), (self.shapes[name], self.dtype(name))
        require(found == wanted, f"{self.path(name)} holds {found}, wanted is {wanted}; remove {self.folder}")
        return array

    def sealed(self) -> list[dict[str, str]]:
        """The sha256s of the views that are done; raises UserError naming what differs if they are another's."""
        if not (self.folder / "manifest.json").exists():
            return []
        manifest = read_json(self.folder / "manifest.json")
        theirs, blocks = manifest.get("identity"), manifest.get("blocks")
        sound = isinstance(theirs, dict) and isinstance(blocks, list) and len(blocks) <= self.views
        sound = sound and all(isinstance(block, dict) for block in blocks)
        require(
            sound, f"{self.folder / 'manifest.json'} is none that a cache has; remove {self.folder} to build it anew"
        )
        differ = [
            f"{key}: {theirs.get(key)} there, {value} here"
            for key, value in self.identity.items()
            if theirs.get(key) != value
        ]
        require(not differ, f"{self.folder} holds other answers ({'; '.join(differ)}); remove it to build it anew")
        return blocks

    def seal(self, blocks: list[dict[str, str]]) -> None:
        write_json(self.folder / "manifest.json", {"identity": self.identity, "blocks": blocks})

    def block(self, view: int) -> dict[str, str]:
        """sha256 of a view's part of each file."""
        return {name: hashlib.sha256(self.open(name, "r")[view]).hexdigest() for name in self.shapes}

    def check(self) -> None:
        """Raises UserError where the cache is not whole, changed since it was built, or not finite."""
        blocks = self.sealed()
        require(len(blocks) == self.views, f"{self.folder} holds {len(blocks)} of {self.views} views; remove it")
        for view, block in enumerate(blocks):
            changed = block != self.block(view)
            require(not changed, f"{self.folder}: view {view} changed since it was built; remove the folder")
            finite = np.isfinite(self.open("logits", "r")[view]).all()
            require(bool(finite), f"{self.folder}: view {view} holds NaN or infinity; remove the folder")

    def write(self, view: int, rows: slice, logits: Tensor) -> None:
        """Keep full logits (b x C) of one view's rows. Raises UserError where they are not finite once kept."""
        kept = {"logits": logits}
        if self.top_k is not None:
            values, classes = logits.topk(self.top_k, dim=1)
            others = logits.scatter(1, classes, -math.inf).logsumexp(dim=1, keepdim=True)
            # FKD's smoothing: the rest's mass, spread evenly over the classes that were not kept.
            rest = others - math.log(self.classes - self.top_k)
            kept = {"logits": torch.cat([values, rest], dim=1), "classes": classes}
        with np.errstate(over="ignore"):  # an overflow is found and named here
            arrays = {name: tensor.cpu().numpy().astype(self.dtype(name)) for name, tensor in kept.items()}
        require(
            bool(np.isfinite(arrays["logits"]).all()),
            f"the teacher's logits of training rows {rows.start} to {rows.stop - 1} are not finite as"
            f" {self.identity['dtype']}: check the teacher, or keep them with --cache-dtype float32",
        )
        for name, array in arrays.items():
            self.open(name, "r+")[view, rows] = array

    def teacher(self, device: torch.device) -> TeacherLogits:
        """Look rows up by (view, index); from the device's memory if they fit there."""
        parts = {name: torch.from_numpy(self.open(name, "c")).flatten(0, 1) for name in self.shapes}
        placed = {name: place_on(part, device) for name, part in parts.items()}

        def answer(batch: Batch) -> Outputs:
            # One flat index: a tensor as first of two indices would make the host wait for its value.
            row = batch.view * self.rows + batch.index
            kept = {name: part[row.to(part.device)].to(device, non_blocking=True) for name, part in placed.items()}
            return Outputs(self.full(kept["logits"].float(), kept.get("classes")))

        return answer

    def full(self, kept: Tensor, classes: Tensor | None) -> Tensor:
        """b x C logits from what was kept."""
        if classes is None:
            return kept
        return kept[:, -1:].repeat(1, self.classes).scatter(1, classes.long(), kept[:, :-1])


ROOT = Path("runs/cache")


PROBES = 16  # the fewest rows asked at once: 12 or more in a batch give a CPU's bits whatever the batch


TOLERANCE = {"float32": 1e-5, "float16": 1e-3}  # relative to the largest logit; halves keep 11 bits


def teacher_logits(
    teacher: TeacherNetwork, data: Data, job: Job, accelerator: Accelerator, layers: tuple[str, ...] = ()
) -> TeacherLogits:
    """The teacher as the job asks for it: looked up, or asked at every step, as where features of `layers` are due."""
    if job.cache.cache_teacher and not layers:
        return cached_logits(teacher, data, job, accelerator)
    if job.cache.cache_teacher and accelerator.is_main_process:
        print(f"{job.role} follows features, which --cache-teacher does not keep: the teacher is asked at every step")
    return live_logits(teacher.network, accelerator, layers, job.fit.channels_last)


def cached_logits(
    teacher: TeacherNetwork, data: Data, job: Job, accelerator: Accelerator, root: Path = ROOT
) -> TeacherLogits:
    """A teacher that looks its answers up, after building what is missing; all processes call this together.

    Raises: UserError where the cache on disk is another's, is damaged, holds NaN, or is not what the teacher says now.
    """
    identity = cache_identity(teacher, data, job, accelerator)
    digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:12]
    store = LogitStore(root / f"{teacher.folder.name}-{digest}", identity)
    images = TrainingImages(data, job.views, job.fit.seed, accelerator.device)
    ask = live_logits(teacher.network, accelerator, channels_last=job.fit.channels_last)
    lock = _claim(store.folder, accelerator)
    try:
        share = max(job.fit.batch_size // accelerator.num_processes, PROBES)
        _build(store, images, ask, accelerator, share)
        store.check()
        _compare(store, images, ask, accelerator, share)
    finally:
        if lock is not None:
            lock.close()
    accelerator.wait_for_everyone()
    return store.teacher(accelerator.device)


def cache_identity(teacher: TeacherNetwork, data: Data, job: Job, accelerator: Accelerator) -> dict:
    """Everything that the answers depend on."""
    spec = {"rows": len(data.train.labels), "classes": len(data.classes), "rows_sha256": data.train.sha256}
    spec |= {"teacher_sha256": teacher.sha256, "normalisation": [data.mean, data.std]}
    spec |= {"views": without_newer_defaults(asdict(job.views)), "precision": accelerator.mixed_precision}
    spec |= {"device": accelerator.device.type, "deterministic": job.fit.deterministic}
    spec |= {"dtype": job.cache.cache_dtype, "top_k": job.cache.cache_top_k, "class_names": data.classes}
    if job.data.stored_size:  # rows_sha256 is of the images as they are stored
        spec |= {"image_size": data.size}
    return json.loads(json.dumps(spec))


def _claim(folder: Path, accelerator: Accelerator) -> Lock | None:
    """The lock of a cache, held by the main process; whoever comes second waits and then finds it built."""
    lock = None
    if accelerator.is_main_process:
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"cannot write to {folder} ({error})") from error
        lock = Lock(folder / "lock")
    try:
        wait_for(lock, f"waiting for another process to finish {folder}", accelerator)
    except OSError as error:
        raise UserError(f"cannot write to {folder} ({error}); remove it, or work where you may write") from error
    return lock


def _build(store: LogitStore, images: TrainingImages, ask: TeacherLogits, accelerator: Accelerator, share: int) -> None:
    """Compute the views that are not sealed yet, each process its share of the rows."""
    blocks = store.sealed()
    main = accelerator.is_main_process
    if main and not blocks:
        for name, shape in store.shapes.items():
            create_map(store.path(name), store.dtype(name), shape).flush()
    accelerator.wait_for_everyone()
    chunks = range(accelerator.process_index * share, store.rows, accelerator.num_processes * share)
    with StopRequests() as requests:
        for view in range(len(blocks), store.views):
            title = f"teacher's answers, view {view + 1} of {store.views}"
            hidden = not (main and console.is_terminal)
            # The last batch is padded: a small one would be computed in another order and differ in its last bits.
            indices = [torch.arange(start, start + share).clamp(max=store.rows - 1) for start in chunks]
            said = _query(ask, images, indices, view)
            for start, answer in zip(track(chunks, title, console=console, disable=hidden, transient=True), said):
                if requests.number and accelerator.num_processes == 1:
                    _stop(requests.number, store, view)
                rows = slice(start, min(start + share, store.rows))
                store.write(view, rows, answer.logits[: rows.stop - start])
            stop = _stop_requested(requests, accelerator)  # also the moment when all have written their rows
            if main:
                for name in store.shapes:
                    sync_file(store.path(name))
                blocks = [*blocks, store.block(view)]
                store.seal(blocks)
                print(f"{store.folder}: view {view + 1} of {store.views} kept", flush=True)
            if stop := stop or _stop_requested(requests, accelerator):
                _stop(stop, store, view + 1)
    accelerator.wait_for_everyone()


def _stop_requested(requests: StopRequests, accelerator: Accelerator) -> int:
    """The signal by which any process was asked to stop, the same on all; 0 for none."""
    return int(accelerator.gather(torch.tensor([requests.number], device=accelerator.device)).max())


def _stop(signal_number: int, store: LogitStore, kept: int) -> None:
    """Raises Preempted between two batches; several processes between two views, where they agree."""
    done = f"{kept} of {store.views} views of the teacher's answers are kept in {store.folder}"
    raise Preempted(signal_number, f"{done}; the same command goes on")


def _query(ask: TeacherLogits, images: TrainingImages, indices: list[Tensor], view: int) -> Iterator[Outputs]:
    numbers = [torch.full((), number, device=images.device) for number in (view, view, 0)]
    for index, (image, label, mixed) in zip(indices, images.augmented(indices, view)):
        yield ask(Batch(image, label, index.to(images.device), *numbers, mixed))


def _compare(
    store: LogitStore, images: TrainingImages, ask: TeacherLogits, accelerator: Accelerator, share: int
) -> None:
    """Ask the teacher about a few rows again: what is kept must be what it says today, of what the student will see."""
    index = images.split.sample(share)
    tolerance = TOLERANCE[store.identity["dtype"]]
    if accelerator.device.type != "cpu":
        tolerance = max(tolerance, 2**-8)  # TF32, and kernels chosen anew in each process
    if accelerator.mixed_precision != "no":
        tolerance = max(tolerance, 2**-5)  # half-precision arithmetic depends on the batch it runs in
    for view in {0, store.views - 1}:
        now = next(_query(ask, images, [index], view)).logits.float().cpu()
        kept = torch.from_numpy(np.asarray(store.open("logits", "r")[view, index.numpy()])).float()
        if store.top_k is not None:
            kept, now = kept[:, :-1], now.topk(store.top_k, dim=1).values
        gap = ((now - kept).abs().max() / now.abs().max()).item()
        require(
            gap <= tolerance,
            f"{store.folder}: the teacher now says something else of view {view} (by {gap:.1e} of its largest logit,"
            f" {tolerance:.1e} is allowed); remove the folder to build it anew",
        )
