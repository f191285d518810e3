"""What kd.bench times: the student's bare arithmetic, our own epoch, the teacher alone, and scoring."""

import dataclasses
import itertools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from accelerate import Accelerator
from torch import nn

from kd.config import CacheConfig, DataConfig, FitConfig, Job, KDConfig, RunConfig, ViewConfig
from kd.data import Data, Split
from kd.data.loader import Batches
from kd.data.rows import iter_centre_crops
from kd.losses.base import Distiller
from kd.models import build_model
from kd.runs.folder import RunFolder
from kd.teachers.cache import LogitStore
from kd.teachers.live import TeacherLogits, live_logits
from kd.training.evaluate import predict_logits
from kd.training.setup import build_distiller
from kd.training.trainer import Trainer, make_optimizer, memory_format
from kd.types import Outputs
from kd.utils.rng import seed_everything

Workload = Callable[[], None]  # does the same work each time


@dataclass(frozen=True)
class Workloads:
    """Pieces of `steps` steps each, all on the same data, networks and recipe."""

    job: Job
    teacher_model: str
    steps: int
    data: Data
    accelerator: Accelerator

    def all(self, folder: Path) -> dict[str, Workload]:
        """Every one by name; `folder` is for what they write."""
        kept = self._kept(folder / "cached")
        return {
            "bare": self.bare(),
            "live": self.epoch(folder / "live", self._live()),
            "cached": self.epoch(folder / "cached", kept),
            "teacher": self.teacher(),
            "evaluation": self.evaluation(),
        }

    def bare(self) -> Workload:
        """Forward, loss, backward and update of the student on one batch and one answer that never change."""
        distiller = self._distiller()
        model, optimizer = self.accelerator.prepare(
            distiller, make_optimizer(distiller, self.job.fit, self.accelerator)
        )
        batch = next(Batches(self.data, self.job, self.accelerator).epoch(0))
        answer = Outputs(torch.randn(len(batch.label), len(self.data.classes), device=self.accelerator.device))

        def work() -> None:
            distiller.train()
            for _ in range(self.steps):
                self.accelerator.backward(sum(model(batch, answer).terms.values()))
                optimizer.step()
                optimizer.zero_grad()

        return work

    def epoch(self, folder: Path, teacher: TeacherLogits) -> Workload:
        """The project's own loop over the first steps of an epoch: everything between two saves."""
        trainer = Trainer(self.job, self.data, self.accelerator, RunFolder(folder, {}), self._distiller(), teacher)

        def work() -> None:
            trainer.state.step = 0  # always the first steps, so that no epoch ends within a measurement
            for batch in itertools.islice(trainer.batches(0), self.steps):
                trainer.step(batch)

        return work

    def teacher(self) -> Workload:
        answer, batch = self._live(), next(Batches(self.data, self.job, self.accelerator).epoch(0))

        def work() -> None:
            for _ in range(self.steps):
                answer(batch)

        return work

    def evaluation(self) -> Workload:
        network, size = self._distiller().deployed, self.job.fit.batch_size
        images = torch.cat(list(iter_centre_crops(self.data.test, self.data.size, torch.arange(self.scored), size)))
        split = Split(images, self.data.test.labels[: self.scored])
        return lambda: predict_logits(network, split, self.data, self.accelerator, size)

    @property
    def scored(self) -> int:
        """Images that the evaluation scores."""
        return min(self.steps * self.job.fit.batch_size, len(self.data.test.labels))

    def network(self) -> nn.Module:
        """A student with fresh weights, on the CPU."""
        seed_everything(0, "network")
        return build_model(self.job.model, len(self.data.classes), self.data.size)

    def _distiller(self) -> Distiller:
        """The student with its loss, as the scripts build it, on the device."""
        return build_distiller(self.job, self.data).to(
            self.accelerator.device, memory_format=memory_format(self.job.fit)
        )

    def _live(self) -> TeacherLogits:
        network = build_model(self.teacher_model, len(self.data.classes), self.data.size).eval().requires_grad_(False)
        network.to(self.accelerator.device)
        return live_logits(network, self.accelerator, channels_last=self.job.fit.channels_last)

    def _kept(self, folder: Path) -> TeacherLogits:
        """A cache of made-up answers: looking them up costs what it costs with true ones."""
        classes, views = len(self.data.classes), dataclasses.asdict(self.job.views)
        spec = {"rows": len(self.data.train.labels), "classes": classes, "views": views}
        folder.mkdir()
        store = LogitStore(folder, spec | {"dtype": self.job.cache.cache_dtype, "top_k": None})
        answers = np.random.default_rng(0).standard_normal(store.shapes["logits"], np.float32)
        np.save(store.path("logits"), answers.astype(np.float16))
        return store.teacher(self.accelerator.device)


@dataclass(frozen=True)
class BenchConfig:
    data: str = "cifar100"
    """As for the scripts."""
    model: str = "resnet20"
    """The student."""
    teacher_model: str = "resnet32x4"
    """The teacher."""
    batch_size: int = 64
    """Images per step."""
    steps: int = 20
    """Steps of each measurement."""
    rounds: int = 5
    """How often each measurement is made; the table shows medians."""
    compile: bool = True
    """Compile the student's step on CUDA."""
    channels_last: bool = True
    """Keep images channels-last in memory."""
    mixed_precision: Literal["no", "bf16", "fp16"] | None = None
    """no, bf16 or fp16; left out: as launched."""
    threads: int | None = None
    """CPU threads; left out: all the cores it may use."""
    starts: bool = True
    """Also measure the first step from a cold and a warm start, in processes of their own (decodes the data anew)."""
    json: Path | None = None
    """Write the numbers here as well."""

    def job(self) -> Job:
        same = ("batch_size", "compile", "channels_last", "mixed_precision")
        fit = FitConfig(lr=0.05, **{name: getattr(self, name) for name in same})
        cache = CacheConfig(cache_teacher=True)
        parts = (DataConfig(source=self.data), ViewConfig(count=1), fit, RunConfig(threads=self.threads), cache)
        return Job("kd", "report", self.model, KDConfig(), *parts)
