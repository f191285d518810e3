"""Measure how close training comes to this machine's limit.

    python -m kd.bench --data ../shared/cifar100 --model resnet8x4 --teacher-model resnet32x4

Interleaves the measurements and takes medians over rounds: the student's step alone on fixed tensors (the limit), the
training loop with a live and with a cached teacher, evaluation, and the teacher alone. Then measures the time to the
first step from a cold and from a warm start, and the peak memory. Weights are random: speed does not depend on them.
"""

import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro

from kd.config import CacheConfig, DataConfig, FitConfig, Job, KDConfig, RunConfig, ViewConfig
from kd.errors import exit_code, require


@dataclass(frozen=True)
class BenchConfig:
    data: str = "cifar100"
    """Data set, as for the scripts."""
    model: str = "resnet20"
    """The student."""
    teacher_model: str = "resnet32x4"
    """The teacher."""
    batch_size: int = 64
    """Images per step."""
    steps: int = 20
    """Steps of each measurement."""
    rounds: int = 5
    """How often to repeat each measurement; the table shows medians."""
    compile: bool = True
    """Compile the student's step on CUDA."""
    channels_last: bool = True
    """Keep images channels-last in memory."""
    mixed_precision: Literal["no", "bf16", "fp16"] | None = None
    """no, bf16 or fp16; default: as launched."""
    threads: int | None = None
    """CPU threads; default: all available cores."""
    starts: bool = True
    """Also measure the first step from a cold and a warm start, in new processes (decodes the data again)."""
    json: Path | None = None
    """Also write the numbers to this file."""

    def job(self) -> Job:
        same = ("batch_size", "compile", "channels_last", "mixed_precision")
        fit = FitConfig(lr=0.05, **{name: getattr(self, name) for name in same})
        cache = CacheConfig(cache_teacher=True)
        parts = (DataConfig(source=self.data), ViewConfig(count=1), fit, RunConfig(threads=self.threads), cache)
        return Job("kd", "report", self.model, KDConfig(), *parts)


def main(config: BenchConfig) -> None:
    for name in ("steps", "rounds"):
        require(getattr(config, name) >= 1, f"--{name} {getattr(config, name)}: give 1 or more")
    from kd.bench.measure import Workloads, matrix_rate
    from kd.data import load_data
    from kd.models.cost import time_rounds
    from kd.training.launch import start

    job = config.job()
    accelerator = start(job.fit, job.run)
    require(accelerator.num_processes == 1, "kd.bench measures one process: start it with plain python")
    data = load_data(job.data)
    steps = len(data.train.labels) // config.batch_size
    require(config.steps <= steps, f"--steps {config.steps}: an epoch has {steps}; give fewer, or a smaller batch")
    workloads = Workloads(job, config.teacher_model, config.steps, data, accelerator)
    with tempfile.TemporaryDirectory() as folder:
        times = time_rounds(workloads.all(Path(folder)), (config.rounds, config.rounds))
        images = dict.fromkeys(times, config.steps * config.batch_size) | {"evaluation": workloads.scored}
        numbers = summarise(times, images) | describe(config, data.size, accelerator)
        if accelerator.device.type == "cuda":
            rate = matrix_rate(accelerator.device)
            used = workloads.flops_per_image() * numbers["bare_images_per_second"]
            numbers |= {"matrix_tflops": rate / 1e12, "share_of_matrix_rate": used / rate}
        if config.starts:
            numbers |= measure_starts(config, Path(folder))
    show(numbers)
    if config.json is not None:
        config.json.write_text(json.dumps(numbers, indent=2) + "\n")


def summarise(times: dict[str, list[float]], images: dict[str, int]) -> dict:
    """Images per second of each workload, and the ratios of bare to cached and of live to cached training."""
    medians = {name: statistics.median(seconds) for name, seconds in times.items()}
    numbers = {f"{name}_images_per_second": images[name] / seconds for name, seconds in medians.items()}
    cached_over_live = statistics.median(live / cached for live, cached in zip(times["live"], times["cached"]))
    ideal = (medians["bare"] + medians["teacher"]) / medians["bare"]
    return numbers | {
        "epoch_over_bare": statistics.median(bare / cached for bare, cached in zip(times["bare"], times["cached"])),
        "cached_over_live": cached_over_live,
        "cached_over_ideal": cached_over_live / ideal,
        "ideal_cached_over_live": ideal,
    }


def describe(config: BenchConfig, size: tuple[int, int], accelerator) -> dict:
    """What the numbers depend on, and the GPU's peak memory."""
    import torch

    on_gpu = accelerator.device.type == "cuda"
    return {
        "model": config.model,
        "teacher_model": config.teacher_model,
        "batch_size": config.batch_size,
        "image_size": list(size),
        "device": torch.cuda.get_device_name() if on_gpu else platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
        "precision": accelerator.mixed_precision,
        "torch": torch.__version__,
        "gpu_peak_gib": torch.cuda.max_memory_allocated() / 2**30 if on_gpu else None,
    }


def measure_starts(config: BenchConfig, folder: Path) -> dict:
    """Import time, first-step time and peak memory of new processes, without and with decoded data on disk."""
    fields = ("data", "model", "teacher_model", "batch_size", "compile", "channels_last", "mixed_precision", "threads")
    flags = json.dumps({name: getattr(config, name) for name in fields})
    env = {**os.environ, "KD_CACHE": str(folder / "decoded"), "HF_DATASETS_CACHE": str(folder / "datasets")}
    numbers = {}
    for name in ("cold", "warm"):
        command = [sys.executable, "-m", "kd.bench.startup", flags]
        done = subprocess.run(command, env=env, capture_output=True, text=True)
        require(done.returncode == 0, f"the {name} start failed: {done.stderr[-300:]}")
        numbers |= {f"{name}_{key}": value for key, value in json.loads(done.stdout.splitlines()[-1]).items()}
    return numbers


def show(numbers: dict) -> None:
    from rich.table import Table

    from kd.utils.console import console

    title = "{model} taught by {teacher_model}, batch {batch_size}, {device}, {threads} threads, {precision}"
    table = Table("measured", "value", title=title.format(**numbers))
    for key, value in numbers.items():
        if isinstance(value, float):
            table.add_row(key.replace("_", " "), f"{value:,.0f}" if value >= 100 else f"{value:.3f}")
    console.print(table)


if __name__ == "__main__":
    sys.exit(exit_code(lambda: main(tyro.cli(BenchConfig, description=__doc__))))
