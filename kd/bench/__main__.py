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
from pathlib import Path

import tyro

from kd.bench.measure import BenchConfig
from kd.errors import exit_code, require


def main(config: BenchConfig) -> None:
    require(config.steps >= 1 and config.rounds >= 1, "--steps and --rounds: give 1 or more")
    from kd.bench.measure import Workloads
    from kd.data import load_data
    from kd.training.launch import start

    job = config.job()
    accelerator = start(job.fit, job.run)
    require(accelerator.num_processes == 1, "kd.bench measures one process; start it with plain python")
    data = load_data(job.data)
    steps = len(data.train.labels) // config.batch_size
    require(config.steps <= steps, f"--steps {config.steps}: an epoch has {steps}; give fewer, or a smaller batch")
    pieces = Workloads(job, config.teacher_model, config.steps, data, accelerator)
    with tempfile.TemporaryDirectory() as folder:
        times = take_turns(pieces.all(Path(folder)), config.rounds, accelerator.device)
        images = dict.fromkeys(times, config.steps * config.batch_size) | {"evaluation": pieces.scored}
        numbers = summarise(times, images) | describe(config, data.size, accelerator)
        if accelerator.device.type == "cuda":
            numbers |= matrix_share(pieces, numbers["bare_images_per_second"])
        if config.starts:
            numbers |= starts(config, Path(folder))
    show(numbers)
    if config.json is not None:
        config.json.write_text(json.dumps(numbers, indent=2) + "\n")


def take_turns(pieces: dict[str, Callable[[], None]], rounds: int, device) -> dict[str, list[float]]:
    """Seconds of each piece in each round, the pieces taking turns: what disturbs the machine disturbs all alike."""
    times = {name: [] for name in pieces}
    for round_ in range(rounds + 1):
        for name, piece in pieces.items():
            seconds = timed(piece, device)
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


def summarise(times: dict[str, list[float]], images: dict[str, int]) -> dict:
    """Images per second of each piece, and the two ratios that the loop is judged by."""
    middle = {name: statistics.median(seconds) for name, seconds in times.items()}
    numbers = {f"{name}_images_per_second": images[name] / seconds for name, seconds in middle.items()}
    ideal = (middle["bare"] + middle["teacher"]) / middle["bare"]
    return numbers | {
        "epoch_over_bare": statistics.median(b / c for b, c in zip(times["bare"], times["cached"])),
        "cached_over_live": statistics.median(a / c for a, c in zip(times["live"], times["cached"])),
        "cached_over_ideal": statistics.median(a / c for a, c in zip(times["live"], times["cached"])) / ideal,
        "ideal_cached_over_live": ideal,
    }


def describe(config: BenchConfig, size: tuple[int, int], accelerator) -> dict:
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


def matrix_share(pieces, images_per_second: float) -> dict:
    """The bare step's share of the bf16 matrix-product rate measured here and now."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    size, device = 8192, pieces.accelerator.device
    one, other = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    seconds = statistics.median(timed(lambda: one @ other, device) for _ in range(20))
    rate = 2 * size**3 / seconds
    with FlopCounterMode(display=False) as counter:
        pieces.network()(torch.randn(8, 3, *pieces.data.size)).sum().backward()
    return {
        "matrix_tflops": rate / 1e12,
        "share_of_matrix_rate": counter.get_total_flops() / 8 * images_per_second / rate,
    }


def starts(config: BenchConfig, folder: Path) -> dict:
    """Seconds from the imports to the end of the first step, with and without decoded data, and the peak memory."""
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
