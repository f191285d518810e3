"""What kd.bench times: the student's bare arithmetic, our own epoch, the teacher alone, and scoring."""

import dataclasses
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
from kd.data.rows import centred
from kd.losses import LOSSES
from kd.losses.base import Distiller
from kd.models import build_model
from kd.runs.folder import RunFolder
from kd.teachers.cache import Store
from kd.teachers.live import Teacher, live
from kd.training.evaluate import predict
from kd.training.setup import probe_pair
from kd.training.trainer import Ledger, layout, make_optimizer, train_epoch
from kd.types import Outputs
from kd.utils.rng import seed_everything

Piece = Callable[[], None]  # does the same work each time


@dataclass(frozen=True)
class Pieces:
    """Pieces of `steps` steps each, all on the same data, networks and recipe."""

    job: Job
    teacher_model: str
    steps: int
    data: Data
    accelerator: Accelerator

    def all(self, folder: Path) -> dict[str, Piece]:
        """Every one by name; `folder` is for what they write."""
        kept = self._kept(folder / "cached")
        return {
            "bare": self.bare(),
            "live": self.epoch(folder / "live", self._live()),
            "cached": self.epoch(folder / "cached", kept),
            "teacher": self.teacher(),
            "evaluation": self.evaluation(),
        }

    def bare(self) -> Piece:
        """Forward, loss, backward and update of the student on one batch and one answer that never change."""
        distiller = self._distiller()
        model, optimizer = self.accelerator.prepare(
            distiller, make_optimizer(distiller, self.job.fit, self.accelerator)
        )
        batch = next(Batches(self.data, self.job, self.accelerator).epoch(0))
        answer = Outputs(torch.randn(len(batch.label), len(self.data.classes), device=self.accelerator.device))

        def piece() -> None:
            distiller.train()
            for _ in range(self.steps):
                self.accelerator.backward(sum(model(batch, answer).terms.values()))
                optimizer.step()
                optimizer.zero_grad()

        return piece

    def epoch(self, folder: Path, teacher: Teacher) -> Piece:
        """The project's own loop over the first steps of an epoch: everything that kd.fit does between two saves."""
        distiller = self._distiller()
        sgd = make_optimizer(distiller, self.job.fit, self.accelerator)
        ledger = Ledger(distiller, sgd, self.job, RunFolder(folder, {}), self.accelerator)
        model, optimizer = self.accelerator.prepare(distiller, sgd)
        batches = Batches(self.data, self.job, self.accelerator)

        def piece() -> None:
            distiller.train()
            ledger.state.step = 0  # always the first steps, so that no epoch ends within a measurement
            loop = train_epoch(0, model, optimizer, batches, teacher, ledger, self.accelerator, self.job.fit)
            for step, _ in zip(range(1, self.steps + 1), loop):
                if step % self.job.run.log_every == 0:
                    ledger.look()

        return piece

    def teacher(self) -> Piece:
        answer, batch = self._live(), next(Batches(self.data, self.job, self.accelerator).epoch(0))

        def piece() -> None:
            for _ in range(self.steps):
                answer(batch)

        return piece

    def evaluation(self) -> Piece:
        network, size = self._distiller().deployed, self.job.fit.batch_size
        images = torch.cat(list(centred(self.data.test, self.data.size, torch.arange(self.scored), size)))
        split = Split(images, self.data.test.labels[: self.scored])
        return lambda: predict(network, split, self.data, self.accelerator, size)

    @property
    def scored(self) -> int:
        """Images that the evaluation scores."""
        return min(self.steps * self.job.fit.batch_size, len(self.data.test.labels))

    def network(self) -> nn.Module:
        """A student with fresh weights, on the CPU."""
        seed_everything(0, "network")
        return build_model(self.job.model, len(self.data.classes), self.data.size)

    def _distiller(self) -> Distiller:
        """The student with its loss, as train_teacher.train builds it, on the device."""
        network = self.network()
        loss = LOSSES[self.job.method_name](self.job.method, probe_pair(self.job, network, None, self.data))
        return Distiller(network, loss).to(self.accelerator.device, memory_format=layout(self.job.fit))

    def _live(self) -> Teacher:
        network = build_model(self.teacher_model, len(self.data.classes), self.data.size).eval().requires_grad_(False)
        network.to(self.accelerator.device)
        return live(network, self.accelerator, channels_last=self.job.fit.channels_last)

    def _kept(self, folder: Path) -> Teacher:
        """A cache of made-up answers: looking them up costs what it costs with true ones."""
        classes, views = len(self.data.classes), dataclasses.asdict(self.job.views)
        spec = {"rows": len(self.data.train.labels), "classes": classes, "views": views}
        folder.mkdir()
        store = Store(folder, spec | {"dtype": self.job.cache.cache_dtype, "top_k": None})
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
