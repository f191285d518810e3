"""How close to this machine's limit does the loop train?

    python -m kd.bench --data ../shared/cifar100 --model resnet8x4 --teacher-model resnet32x4

Measures, interleaved and as medians over rounds: the bare arithmetic of the student's step on fixed tensors (the
limit), our training epoch with a live and with a cached teacher, evaluation and the teacher alone; then the time to the
first step from a cold and from a warm start, and the peak memory. Networks have fresh weights: speed does not depend on
them.
"""

import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro

from kd.config import CacheConfig, DataConfig, FitConfig, Job, RunConfig, ViewConfig
from kd.errors import exit_code, require
from kd.methods import KDConfig


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


def main(config: BenchConfig) -> None:
    require(config.steps >= 1 and config.rounds >= 1, "--steps and --rounds: give 1 or more")
    from kd.data import load_data
    from kd.launch import start

    job = config.job()
    accelerator = start(job.fit, job.run)
    require(accelerator.num_processes == 1, "kd.bench measures one process; start it with plain python")
    data = load_data(job.data)
    steps = len(data.train.labels) // config.batch_size
    require(config.steps <= steps, f"--steps {config.steps}: an epoch has {steps}; give fewer, or a smaller batch")
    with tempfile.TemporaryDirectory() as folder:
        times = measure(config, job, data, accelerator, Path(folder))
        numbers = summarise(config, times, data) | describe(config, data, accelerator)
        if accelerator.device.type == "cuda":
            numbers |= matrix_share(config, numbers["bare_images_per_second"], data, accelerator.device)
        if config.starts:
            numbers |= starts(config, Path(folder))
    show(numbers)
    if config.json is not None:
        config.json.write_text(json.dumps(numbers, indent=2) + "\n")


def measure(config: BenchConfig, job: Job, data, accelerator, folder: Path) -> dict[str, list[float]]:
    """Seconds of each piece in each round, the pieces taking turns: what disturbs the machine disturbs all alike."""
    pieces = {
        "bare": bare(job, data, accelerator, config.steps),
        "live": epoch(job, data, accelerator, folder / "live", config, cached=False),
        "cached": epoch(job, data, accelerator, folder / "cached", config, cached=True),
        "teacher": forward_only(config, data, accelerator),
        "evaluation": evaluation(job, data, accelerator, config),
    }
    times = {name: [] for name in pieces}
    for round_ in range(config.rounds + 1):
        for name, piece in pieces.items():
            seconds = timed(piece, accelerator.device)
            if round_ > 0:  # the first warms caches up and compiles
                times[name].append(seconds)
    return times


def timed(piece: Callable[[], None], device) -> float:
    import torch

    before = time.perf_counter()
    piece()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - before


def _distiller(job: Job, data, device):
    """A student with its loss, as train_teacher.train builds it, on the device."""
    from kd.fit import layout
    from kd.losses import LOSSES, Distiller
    from kd.models import build_model
    from kd.probe import probe_pair
    from kd.views import seed_everything

    seed_everything(0, "network")
    network = build_model(job.model, len(data.classes), data.size)
    distiller = Distiller(network, LOSSES["kd"](job.method, probe_pair(job, network, None, data)))
    return distiller.to(device, memory_format=layout(job.fit))


def _batch(job: Job, data, accelerator):
    from kd.batches import Batches

    return next(Batches(data, job, accelerator).epoch(0))


def bare(job: Job, data, accelerator, steps: int) -> Callable[[], None]:
    """Forward, loss, backward and update of the student on one batch and one answer that never change."""
    import torch

    from kd.fit import make_optimizer
    from kd.outputs import Outputs

    distiller = _distiller(job, data, accelerator.device)
    model, optimizer = accelerator.prepare(distiller, make_optimizer(distiller, job.fit, accelerator))
    batch = _batch(job, data, accelerator)
    answer = Outputs(torch.randn(len(batch.label), len(data.classes), device=accelerator.device))

    def piece() -> None:
        distiller.train()
        for _ in range(steps):
            accelerator.backward(sum(model(batch, answer).terms.values()))
            optimizer.step()
            optimizer.zero_grad()

    return piece


def epoch(job: Job, data, accelerator, folder: Path, config: BenchConfig, cached: bool) -> Callable[[], None]:
    """The project's own loop over the next steps of an epoch: everything that kd.fit does between two saves."""
    from kd.batches import Batches
    from kd.fit import make_optimizer, train_epoch
    from kd.ledger import Ledger
    from kd.run_folder import RunFolder

    distiller = _distiller(job, data, accelerator.device)
    sgd = make_optimizer(distiller, job.fit, accelerator)
    ledger = Ledger(distiller, sgd, job, RunFolder(folder, {}), accelerator)
    model, optimizer = accelerator.prepare(distiller, sgd)
    teacher = _kept(job, data, accelerator, folder) if cached else _live(config, data, accelerator)
    batches = Batches(data, job, accelerator)

    def piece() -> None:
        distiller.train()
        ledger.state.step = 0  # always the first steps, so that no epoch ends within a measurement
        loop = train_epoch(0, model, optimizer, batches, teacher, ledger, accelerator, job.fit)
        for step, _ in zip(range(1, config.steps + 1), loop):
            if step % job.run.log_every == 0:
                ledger.look()

    return piece


def _live(config: BenchConfig, data, accelerator):
    from kd.teacher import live

    return live(_teacher(config, data, accelerator.device), accelerator, channels_last=config.channels_last)


def _teacher(config: BenchConfig, data, device):
    from kd.models import build_model

    return build_model(config.teacher_model, len(data.classes), data.size).eval().requires_grad_(False).to(device)


def _kept(job: Job, data, accelerator, folder: Path):
    """A cache of made-up answers: looking them up costs what it costs with true ones."""
    import dataclasses

    import numpy as np

    from kd.teacher_cache import Store

    spec = {"rows": len(data.train.labels), "classes": len(data.classes), "views": dataclasses.asdict(job.views)}
    folder.mkdir()
    store = Store(folder, spec | {"dtype": job.cache.cache_dtype, "top_k": None})
    shape = store.shapes["logits"]
    np.save(store.path("logits"), np.random.default_rng(0).standard_normal(shape, np.float32).astype(np.float16))
    return store.teacher(accelerator.device)


def forward_only(config: BenchConfig, data, accelerator) -> Callable[[], None]:
    answer, batch = _live(config, data, accelerator), _batch(config.job(), data, accelerator)

    def piece() -> None:
        for _ in range(config.steps):
            answer(batch)

    return piece


def evaluation(job: Job, data, accelerator, config: BenchConfig) -> Callable[[], None]:
    import torch

    from kd.fit import predict
    from kd.rows import Split, centred

    network = _distiller(job, data, accelerator.device).deployed
    rows = _scored(config, data)
    images = torch.cat(list(centred(data.test, data.size, torch.arange(rows), config.batch_size)))
    split = Split(images, data.test.labels[:rows])
    return lambda: predict(network, split, data, accelerator, job.fit.batch_size)


def _scored(config: BenchConfig, data) -> int:
    return min(config.steps * config.batch_size, len(data.test.labels))


def summarise(config: BenchConfig, times: dict[str, list[float]], data) -> dict:
    """Images per second of each piece, and the two ratios that the loop is judged by."""
    images = dict.fromkeys(times, config.steps * config.batch_size) | {"evaluation": _scored(config, data)}
    middle = {name: statistics.median(seconds) for name, seconds in times.items()}
    numbers = {f"{name}_images_per_second": images[name] / seconds for name, seconds in middle.items()}
    ideal = (middle["bare"] + middle["teacher"]) / middle["bare"]
    return numbers | {
        "epoch_over_bare": statistics.median(b / c for b, c in zip(times["bare"], times["cached"])),
        "cached_over_live": statistics.median(a / c for a, c in zip(times["live"], times["cached"])),
        "cached_over_ideal": statistics.median(a / c for a, c in zip(times["live"], times["cached"])) / ideal,
        "ideal_cached_over_live": ideal,
    }


def describe(config: BenchConfig, data, accelerator) -> dict:
    import torch

    on_gpu = accelerator.device.type == "cuda"
    return {
        "model": config.model,
        "teacher_model": config.teacher_model,
        "batch_size": config.batch_size,
        "image_size": list(data.size),
        "device": torch.cuda.get_device_name() if on_gpu else platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
        "precision": accelerator.mixed_precision,
        "torch": torch.__version__,
        "gpu_peak_gib": torch.cuda.max_memory_allocated() / 2**30 if on_gpu else None,
    }


def matrix_share(config: BenchConfig, images_per_second: float, data, device) -> dict:
    """The bare step's share of the bf16 matrix-product rate measured here and now."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    size = 8192
    one, other = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    seconds = statistics.median(timed(lambda: one @ other, device) for _ in range(20))
    rate = 2 * size**3 / seconds
    network = _distiller(config.job(), data, device).student
    images = torch.randn(8, 3, *data.size, device=device)
    with FlopCounterMode(display=False) as counter:
        network(images).sum().backward()
    return {
        "matrix_tflops": rate / 1e12,
        "share_of_matrix_rate": counter.get_total_flops() / 8 * images_per_second / rate,
    }


FIRST_STEP = """
import json, resource, sys, time
begin = time.perf_counter()
import torch, accelerate
from kd import bench, data, fit, launch
config = bench.BenchConfig(**json.loads(sys.argv[1]))
imported = time.perf_counter()
job = config.job()
accelerator = launch.start(job.fit, job.run)
loaded = data.load_data(job.data)
bench.bare(job, loaded, accelerator, 1)()
first = time.perf_counter()
bench.bare(job, loaded, accelerator, 30)()
bench.evaluation(job, loaded, accelerator, config)()
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
print(json.dumps({"import_seconds": imported - begin, "first_step_seconds": first - imported, "peak_gib": peak}))
"""


def starts(config: BenchConfig, folder: Path) -> dict:
    """Seconds from the imports to the end of the first step, with and without decoded data, and the peak memory."""
    fields = ("data", "model", "teacher_model", "batch_size", "compile", "channels_last", "mixed_precision", "threads")
    flags = json.dumps({name: getattr(config, name) for name in fields})
    env = {**os.environ, "KD_CACHE": str(folder / "decoded"), "HF_DATASETS_CACHE": str(folder / "datasets")}
    numbers = {}
    for name in ("cold", "warm"):
        command = [sys.executable, "-c", FIRST_STEP, flags]
        done = subprocess.run(command, env=env, capture_output=True, text=True)
        require(done.returncode == 0, f"the {name} start failed: {done.stderr[-300:]}")
        numbers |= {f"{name}_{key}": value for key, value in json.loads(done.stdout.splitlines()[-1]).items()}
    return numbers


def show(numbers: dict) -> None:
    from rich.table import Table

    from kd.display import console

    title = "{model} taught by {teacher_model}, batch {batch_size}, {device}, {threads} threads, {precision}"
    table = Table("measured", "value", title=title.format(**numbers))
    for key, value in numbers.items():
        if isinstance(value, float):
            table.add_row(key.replace("_", " "), f"{value:,.0f}" if value >= 100 else f"{value:.3f}")
    console.print(table)


if __name__ == "__main__":
    sys.exit(exit_code(lambda: main(tyro.cli(BenchConfig, description=__doc__))))
