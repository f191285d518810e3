"""The workloads that kd.bench times: the student's step alone, the training loop, the teacher, and evaluation."""

import dataclasses
import itertools
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator

from kd.config import Job
from kd.data import Data, Split
from kd.data.loader import Batches
from kd.data.rows import iter_centre_crops
from kd.losses.base import Distiller
from kd.models import build_model
from kd.models.cost import time_rounds
from kd.runs.folder import RunFolder
from kd.teachers.cache import LogitStore
from kd.teachers.live import TeacherLogits, live_logits
from kd.training.evaluate import predict_logits
from kd.training.optimizers import make_optimizer
from kd.training.setup import build_distiller
from kd.training.trainer import Trainer, memory_format
from kd.types import Outputs
from kd.utils.rng import seed_everything

Workload = Callable[[], None]  # repeatable: the same work at each call


@dataclass(frozen=True)
class Workloads:
    """Workloads of `steps` steps each, all with the same data, networks and recipe."""

    job: Job
    teacher_model: str
    steps: int
    data: Data
    accelerator: Accelerator

    def all(self, folder: Path) -> dict[str, Workload]:
        """Every workload by name, each of which waits for the device; `folder` is for what they write."""
        cached_logits = self._cached_teacher(folder / "cached")
        workloads = {
            "bare": self.bare(),
            "live": self.epoch(folder / "live", self._live_teacher()),
            "cached": self.epoch(folder / "cached", cached_logits),
            "teacher": self.teacher(),
            "evaluation": self.evaluation(),
        }
        return {name: synchronised(work, self.accelerator.device) for name, work in workloads.items()}

    def bare(self) -> Workload:
        """Forward, loss, backward and update of the student on one fixed batch with fixed teacher logits."""
        distiller = self._distiller()
        model, optimizer = self.accelerator.prepare(
            distiller, make_optimizer(distiller, self.job.fit, self.job.model, self.accelerator)
        )
        batch = next(Batches(self.data, self.job, self.accelerator).epoch(0))
        logits = torch.randn(len(batch.label), len(self.data.classes), device=self.accelerator.device)
        teacher_outputs = Outputs(logits)

        def work() -> None:
            distiller.train()
            for _ in range(self.steps):
                self.accelerator.backward(sum(model(batch, teacher_outputs).terms.values()))
                optimizer.step()
                optimizer.zero_grad()

        return work

    def epoch(self, folder: Path, teacher: TeacherLogits) -> Workload:
        """The training loop over the first steps of an epoch, without saving."""
        trainer = Trainer(self.job, self.data, self.accelerator, RunFolder(folder, {}), self._distiller(), teacher)

        def work() -> None:
            trainer.state.step = 0  # always the first steps, so that no epoch ends within a measurement
            for batch in itertools.islice(trainer.batches(0), self.steps):
                trainer.step(batch)

        return work

    def teacher(self) -> Workload:
        teacher_logits, batch = self._live_teacher(), next(Batches(self.data, self.job, self.accelerator).epoch(0))

        def work() -> None:
            for _ in range(self.steps):
                teacher_logits(batch)

        return work

    def evaluation(self) -> Workload:
        network, size = self._distiller().deployed, self.job.fit.batch_size
        images = torch.cat(list(iter_centre_crops(self.data.test, self.data.size, torch.arange(self.scored), size)))
        split = Split(images, self.data.test.labels[: self.scored])
        return lambda: predict_logits(network, split, self.data, self.accelerator, size)

    @property
    def scored(self) -> int:
        """How many images the evaluation scores."""
        return min(self.steps * self.job.fit.batch_size, len(self.data.test.labels))

    def flops_per_image(self) -> float:
        """Floating-point operations of one training step per image; count_macs has the forward pass only."""
        from torch.utils.flop_counter import FlopCounterMode

        seed_everything(0, "network")
        network = build_model(self.job.model, len(self.data.classes), self.data.size)
        with FlopCounterMode(display=False) as counter:
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


def synchronised(work: Workload, device: torch.device) -> Workload:
    """`work`, then waiting for the device: CUDA kernels run asynchronously."""
    if device.type != "cuda":
        return work

    def work_and_wait() -> None:
        work()
        torch.cuda.synchronize(device)

    return work_and_wait


def matrix_rate(device: torch.device) -> float:
    """Floating-point operations per second of a large bf16 matrix product, measured on `device` now."""
    size, rounds = 8192, 20
    left, right = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    product = synchronised(lambda: left @ right, device)
    (seconds,) = time_rounds({"product": product}, (rounds, rounds)).values()
    return 2 * size**3 / statistics.median(seconds)
