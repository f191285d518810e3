"""The parts of a training that kd.bench times, and what they add up to.

A window of the training loop holds no more than steps. What happens every N steps (the comparison of gradients, reading
the log's numbers) or once an epoch (drawing the views, the checkpoint) is timed by itself and counted as often as it
happens, so that no figure depends on how long a window is.
"""

import dataclasses
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import median, quantiles
from time import perf_counter, process_time
from typing import NamedTuple

import numpy as np
import torch
from accelerate import Accelerator

from kd.config import Job
from kd.data import Data, Split
from kd.data.loader import Batches
from kd.data.rows import iter_centre_crops
from kd.losses.base import Distiller
from kd.models import build_model
from kd.models.cost import time_rounds, unfused_attention
from kd.runs.folder import RunFolder
from kd.teachers.cache import LogitStore
from kd.teachers.live import TeacherLogits, live_logits
from kd.training.evaluate import predict_logits
from kd.training.optimizers import make_optimizer
from kd.training.setup import build_distiller
from kd.training.trainer import Trainer, memory_format
from kd.types import Batch, Outputs
from kd.utils.compiling import uses_graphs
from kd.utils.rng import seed_everything

RUN_IN = 3  # steps before each window that are not timed: what ran before has filled the caches with its own data
SCORED = 20  # batches of an evaluation, whatever the window


class Workload(NamedTuple):
    """Work that can be repeated, after preparation that is not timed."""

    work: Callable[[], object]
    prepare: Callable[[], object] = lambda: None

    def run(self) -> None:
        self.prepare()
        self.work()


def repeated(step: Callable[[], object], times: int) -> Workload:
    """A window of equal steps, run in."""
    return Workload(lambda: [step() for _ in range(times)], lambda: [step() for _ in range(RUN_IN)])


class Loop:
    """A training loop, taken apart: each part is a workload."""

    def __init__(self, trainer: Trainer):
        self.trainer, self.run = trainer, trainer.job.run
        # In a window nothing is due but the step itself.
        quiet = dataclasses.replace(self.run, diagnose_every=0, log_every=sys.maxsize, save_every=0)
        self._often, self._never = trainer.job, dataclasses.replace(trainer.job, run=quiet)
        trainer.job = self._never
        self._batches: Iterator[Batch] = iter(())

    def begin(self) -> Batch:
        """Start an epoch; returns its first batch."""
        self.trainer.state.step = 0
        self._batches = self.trainer.batches(0)
        return next(self._batches)

    def steps(self, count: int) -> Workload:
        """Steps within an epoch, each with its batch."""

        def prepare() -> None:
            self.trainer.step(self.begin())
            self._step(RUN_IN - 1)

        return Workload(lambda: self._step(count), prepare)

    def _step(self, count: int) -> None:
        for _ in range(count):
            self.trainer.step(next(self._batches))

    def views(self, count: int) -> Workload:
        """Batches within an epoch, without training on them."""
        return Workload(lambda: [next(self._batches) for _ in range(count)], self.begin)

    def comparison(self) -> Workload:
        """Comparing the gradients of distillation and cross-entropy, as every --diagnose-every steps."""
        trainer, step = self.trainer, {}

        def prepare() -> None:
            batch = self.begin()
            outputs = trainer.teacher(batch)
            step["due"] = trainer.model(batch, outputs), batch, outputs
            trainer.state.step = 1

        def work() -> None:
            trainer.job = self._often
            trainer.compare_gradients(*step["due"])
            trainer.job = self._never

        return Workload(work, prepare)

    def log(self) -> Workload:
        """Reading the sums of --log-every steps from the device."""
        trainer = self.trainer

        def prepare() -> None:
            trainer.read_means()
            batch = self.begin()
            result = trainer.model(batch, trainer.teacher(batch))
            for _ in range(self.run.log_every):
                trainer.meter.update(result, batch.label, batch.step)

        return Workload(trainer.read_means, prepare)

    def end(self) -> Workload:
        """What ends an epoch, without the validation: reading the numbers, the checkpoint, asking for stops.

        With all of the checkpoint's writing, which a run does in a thread beside the next steps.
        """

        def prepare() -> None:
            self.trainer.state.step = 0  # where saving waits for the file
            self.trainer.read_means()

        def work() -> None:
            self.trainer.read_means()
            self.trainer.save()
            self.trainer.read_means()

        return Workload(work, prepare)


@dataclass(frozen=True)
class Workloads:
    """The workloads of one precision, with windows of `steps` steps, all with the same data, networks and recipe."""

    job: Job
    teacher_model: str
    steps: int
    data: Data
    accelerator: Accelerator

    def all(self, folder: Path) -> dict[str, Workload]:
        """Every workload by name; `folder` is for what they write."""
        folder.mkdir(parents=True, exist_ok=True)
        live, cached = self.live(folder), self.cached(folder)
        return {
            "bare": self.bare(),
            "live": live.steps(self.steps),
            "cached": cached.steps(self.steps),
            "teacher": self.teacher(),
            "views": cached.views(self.steps),
            "begin": Workload(cached.begin),
            "comparison": cached.comparison(),
            "log": cached.log(),
            "end": cached.end(),
            "evaluation": self.evaluation(),
        }

    def bare(self) -> Workload:
        """Forward, loss, backward and update of the student on one fixed batch with fixed teacher logits."""
        distiller = self._distiller()
        distiller.train()
        model = self.accelerator.prepare(distiller)
        optimizer = make_optimizer(distiller, self.job.fit, self.job.model, self.accelerator)
        batch = self.batch()
        logits = torch.randn(len(batch.label), len(self.data.classes), device=self.accelerator.device)
        teacher_outputs, graphs = Outputs(logits), uses_graphs(self.accelerator)

        def step() -> None:
            if graphs:
                torch.compiler.cudagraph_mark_step_begin()
            sum(model(batch, teacher_outputs).terms.values()).backward()
            optimizer.step()
            optimizer.zero_grad()

        return repeated(step, self.steps)

    def live(self, folder: Path) -> Loop:
        """The training loop with the teacher's network in it."""
        return self._loop(folder / "live", self._live_teacher())

    def cached(self, folder: Path) -> Loop:
        """The training loop with the teacher's logits looked up."""
        return self._loop(folder / "cached", self._cached_teacher(folder / "cache"))

    def _loop(self, folder: Path, teacher: TeacherLogits) -> Loop:
        folder.mkdir()
        return Loop(Trainer(self.job, self.data, self.accelerator, RunFolder(folder, {}), self._distiller(), teacher))

    def teacher(self) -> Workload:
        teacher_logits, batch = self._live_teacher(), self.batch()
        return repeated(lambda: teacher_logits(batch), self.steps)

    def evaluation(self) -> Workload:
        network, size = self._distiller().deployed, self.job.fit.batch_size
        images = torch.cat(list(iter_centre_crops(self.data.test, self.data.size, torch.arange(self.scored), size)))
        split = Split(images, self.data.test.labels[: self.scored]).on(self.accelerator.device)  # once, as in a run
        score = lambda: predict_logits(network, split, self.data, self.accelerator, size)  # noqa: E731
        return Workload(score, score)

    @property
    def scored(self) -> int:
        """How many images the evaluation scores."""
        return min(SCORED * self.job.fit.batch_size, len(self.data.test.labels))

    def batch(self) -> Batch:
        return next(Batches(self.data, self.job, self.accelerator).epoch(0))

    def flops_per_image(self) -> float:
        """Floating-point operations of one training step per image; count_macs has the forward pass only."""
        from torch.utils.flop_counter import FlopCounterMode

        seed_everything(0, "network")
        network = build_model(self.job.model, len(self.data.classes), self.data.size)
        with unfused_attention(), FlopCounterMode(display=False) as counter:
            network(torch.randn(8, 3, *self.data.size)).sum().backward()
        return counter.get_total_flops() / 8

    def _distiller(self) -> Distiller:
        """The student with its loss on the device, built as by the scripts."""
        return build_distiller(self.job, self.data).to(
            self.accelerator.device, memory_format=memory_format(self.job.fit)
        )

    def _live_teacher(self) -> TeacherLogits:
        network = build_model(self.teacher_model, len(self.data.classes), self.data.size).eval().requires_grad_(False)
        network.to(self.accelerator.device)
        return live_logits(network, self.accelerator, channels_last=self.job.fit.channels_last)

    def _cached_teacher(self, folder: Path) -> TeacherLogits:
        """A cache of random logits, which take as long to look up as real ones."""
        classes, views = len(self.data.classes), dataclasses.asdict(self.job.views)
        spec = {"rows": len(self.data.train.labels), "classes": classes, "views": views}
        folder.mkdir()
        store = LogitStore(folder, spec | {"dtype": self.job.cache.cache_dtype, "top_k": None})
        logits = np.random.default_rng(0).standard_normal(store.shapes["logits"], np.float32)
        np.save(store.path("logits"), logits.astype(np.float16))
        return store.teacher(self.accelerator.device)


Times = dict[str, list[float]]  # seconds of each workload, one a round


def time_in_turns(
    sides: Mapping[str, tuple[Accelerator, Mapping[str, Workload]]], rounds: int, cpu_time: bool = False
) -> dict[str, Times]:
    """The times of each precision's workloads, all of which take turns; the first round warms up and is not counted.

    Every other round has the order reversed: a machine that grows steadily slower or faster then favours none.
    `cpu_time`: the processor time of this process, not the time that passed.
    """
    now = process_time if cpu_time else perf_counter
    turns = [(side, name) for side, (_, workloads) in sides.items() for name in workloads]
    times = {side: {name: [] for name in workloads} for side, (_, workloads) in sides.items()}
    for round_ in range(rounds + 1):
        for side, name in turns if round_ % 2 else reversed(turns):
            accelerator, workloads = sides[side]
            accelerator.state._mixed_precision = side  # all Accelerators of a process share their state
            workloads[name].prepare()
            wait(accelerator.device)
            before = now()
            workloads[name].work()
            wait(accelerator.device)
            if round_ > 0:
                times[side][name].append(now() - before)
    return times


def wait(device: torch.device) -> None:
    """Wait for the device: CUDA kernels run asynchronously."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@dataclass(frozen=True)
class Shape:
    """How much work the workloads are, and how often a run does each."""

    batch: int  # images
    steps: int  # of a window
    scored: int  # images of the evaluation
    steps_an_epoch: int
    validated: int  # images of a validation
    diagnose_every: int
    log_every: int


def shape_of(workloads: Workloads) -> Shape:
    job, data = workloads.job, workloads.data
    return Shape(
        job.fit.batch_size,
        workloads.steps,
        workloads.scored,
        job.fit.steps_an_epoch(len(data.train.labels)),
        0 if data.val is None else len(data.val.labels),
        job.run.diagnose_every,
        job.run.log_every,
    )


def step_parts(times: Times, shape: Shape) -> Times:
    """Seconds of a step with a cached teacher by part, one a round, whatever happens rarely spread over all steps.

    `bare` is the arithmetic, `loop` what the loop adds in every step, of which `views` are a part. `live` and `teacher`
    are the same step with a live teacher, and that teacher alone.
    """
    a_step = {name: [s / shape.steps for s in times[name]] for name in ("bare", "live", "cached", "teacher", "views")}
    spread = lambda name, every: [seconds / every for seconds in times[name]]  # noqa: E731
    first = [begin - view for begin, view in zip(times["begin"], a_step["views"])]  # the first batch is a step's
    return {
        **{name: a_step[name] for name in ("bare", "live", "teacher", "views")},
        "loop": [cached - bare for cached, bare in zip(a_step["cached"], a_step["bare"])],
        "comparison": spread("comparison", shape.diagnose_every),
        "log": spread("log", shape.log_every),
        "begin": [seconds / shape.steps_an_epoch for seconds in first],
        "end": spread("end", shape.steps_an_epoch),
    }


RARE = ("comparison", "log", "begin", "end")


def summarise(times: Times, shape: Shape) -> dict:
    """Images per second, and ratios with the range of the middle half of the rounds."""
    parts = step_parts(times, shape)
    bare, teacher = parts["bare"], parts["teacher"]
    rare = [sum(median(parts[name]) for name in RARE)] * len(bare)  # small; paired by round they would add their noise
    cached, live = _sums(bare, parts["loop"], rare), _sums(parts["live"], rare)
    ideal, faster = _sums(bare, teacher), _ratios(live, cached)
    evaluation = median(times["evaluation"]) / shape.scored
    rates = {"bare": bare, "live": live, "cached": cached, "teacher": teacher}
    numbers = {f"{name}_images_per_second": shape.batch / median(seconds) for name, seconds in rates.items()}
    numbers["evaluation_images_per_second"] = 1 / evaluation
    ratios = {
        "epoch_over_bare": _ratios(bare, cached),
        "live_over_ideal": _ratios(ideal, live),
        "cached_over_live": faster,
        "ideal_cached_over_live": _ratios(ideal, bare),
        "cached_over_ideal": _ratios(faster, _ratios(ideal, bare)),
    }
    for name, values in ratios.items():
        numbers |= {name: median(values), f"{name}_range": middle_half(values)}
    validation = shape.validated * evaluation
    return numbers | {
        "validation_share": validation / (shape.steps_an_epoch * median(cached) + validation),
        "step_ms": {name: 1000 * median(seconds) for name, seconds in parts.items()},
        "cached_seconds": cached,
        "live_seconds": live,
    }


def _sums(*columns: list[float]) -> list[float]:
    return [sum(row) for row in zip(*columns, strict=True)]


def _ratios(above: list[float], below: list[float]) -> list[float]:
    return [one / other for one, other in zip(above, below, strict=True)]


def middle_half(values: list[float]) -> list[float]:
    """The range of the middle half of the values; the value itself if there is only one."""
    if len(values) == 1:
        return [values[0], values[0]]
    low, _, high = quantiles(values, n=4, method="inclusive")
    return [low, high]


def matrix_rate(device: torch.device) -> float:
    """Floating-point operations per second of a large bf16 matrix product, measured on `device` now."""
    size, rounds = 8192, 20
    left, right = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))

    def product() -> None:
        torch.matmul(left, right)
        wait(device)

    (seconds,) = time_rounds({"product": product}, (rounds, rounds)).values()
    return 2 * size**3 / median(seconds)
