"""Measure how close training comes to this machine's limit, and which precision pays.

    python -m kd.bench --data FOLDER --model resnet8x4 --teacher-model resnet32x4

Measures in turns, in fp32 and in bf16: the student's step alone on fixed tensors (the limit), the training loop with a
live and with a cached teacher, evaluation, and the teacher alone. What a run does every N steps or once an epoch is
counted as often as it does it. Then measures the time to the first step from a cold and from a warm start, and the peak
memory. Weights are random: speed does not depend on them.
"""

import dataclasses
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro

from kd.config import CacheConfig, DataConfig, FitConfig, Job, KDConfig, RunConfig, ViewConfig
from kd.errors import exit_code, require

NAMES = {"no": "fp32", "bf16": "bf16", "fp16": "fp16"}
PAYS = 1.05  # times as fast from which a precision is said to pay


@dataclass(frozen=True)
class BenchConfig:
    data: str = "cifar100"
    """Data set, as for the scripts."""
    model: str = "resnet20"
    """The student."""
    teacher_model: str = "resnet32x4"
    """The teacher."""
    image_size: int | None = None
    """Side of the square images; needed if sizes differ."""
    label: str | None = None
    """Column of the class, if there are several."""
    batch_size: int = 64
    """Images per step."""
    steps: int = 20
    """Steps of each window; more of them make the figures steadier, and change none."""
    rounds: int = 5
    """How often to repeat each window; the table shows medians."""
    compile: bool = True
    """Compile the student's step on CUDA."""
    compile_mode: Literal["default", "reduce-overhead", "max-autotune"] = "default"
    """How, as for the scripts."""
    channels_last: bool = True
    """Keep images channels-last in memory."""
    mixed_precision: Literal["no", "bf16", "fp16"] | None = None
    """Measure this one alone; default: fp32 and bf16, in turns."""
    threads: int | None = None
    """CPU threads; default: all available cores."""
    cpu_time: bool = False
    """Count processor time, which other jobs hardly change; waiting for the disk is not in it. Needs --threads 1."""
    starts: bool = True
    """Also measure the first step from a cold and a warm start, in new processes (decodes the data again)."""
    json: Path | None = None
    """Also write the numbers to this file."""

    def job(self, precision: str = "no") -> Job:
        """The smallest learning rate keeps random weights finite; speed does not depend on it."""
        same = {name: getattr(self, name) for name in ("batch_size", "compile", "compile_mode", "channels_last")}
        fit = FitConfig(lr=1e-6, mixed_precision=precision, **same)
        cache = CacheConfig(cache_teacher=True)
        run = RunConfig(threads=self.threads, wandb="disabled")
        return Job("kd", "report", self.model, KDConfig(), self.images, ViewConfig(count=1), fit, run, cache)

    @property
    def images(self) -> DataConfig:
        return DataConfig(self.data, image_size=self.image_size, label=self.label)

    @property
    def precisions(self) -> tuple[str, ...]:
        return ("no", "bf16") if self.mixed_precision is None else (self.mixed_precision,)


def main(config: BenchConfig) -> None:
    for name in ("steps", "rounds"):
        require(getattr(config, name) >= 1, f"--{name} {getattr(config, name)}: give 1 or more")
    require(
        not config.cpu_time or config.threads == 1, "--cpu-time: adds up all threads' time; give --threads 1 with it"
    )
    job = config.job(config.precisions[0])
    job.data.check()
    job.fit.check()
    job.run.check()
    require(
        config.json is None or config.json.absolute().parent.is_dir(),
        f"--json {config.json}: its folder does not exist; make it, or name another",
    )
    from kd.data import load_data
    from kd.utils.files import write_json

    with tempfile.TemporaryDirectory() as folder:
        numbers = measure(config, load_data(config.images), Path(folder))
        if config.starts:
            numbers |= measure_starts(config, Path(folder))
    show(numbers)
    if config.json is not None:
        write_json(config.json, numbers)


def measure(config: BenchConfig, data, folder: Path) -> dict:
    """What the numbers depend on, the numbers of each precision, and how the precisions compare."""
    from kd.bench.measure import RUN_IN, Workloads, shape_of, summarise, time_in_turns

    steps = len(data.train.labels) // config.batch_size
    require(
        config.steps <= steps - RUN_IN,
        f"--steps {config.steps}: an epoch has {steps}, {RUN_IN} of which run in; give fewer, or a smaller batch",
    )
    sides = {}
    for precision in config.precisions:
        accelerator = start_in(precision, config)
        data = dataclasses.replace(data, train=data.train.on(accelerator.device))  # one copy for all trainings
        workloads = Workloads(config.job(precision), config.teacher_model, config.steps, data, accelerator)
        sides[precision] = accelerator, workloads.all(folder / precision)
    on_cpu = accelerator.device.type == "cpu"
    require(on_cpu or not config.cpu_time, "--cpu-time: a GPU works while the processor does not; leave it out")
    times = time_in_turns(sides, config.rounds, config.cpu_time)
    shape = shape_of(workloads)
    measured = {NAMES[precision]: summarise(times[precision], shape) for precision in sides}
    numbers = describe(config, data.size, accelerator) | {"precisions": measured}
    if accelerator.device.type == "cuda":
        numbers |= share_of_matrix_rate(workloads, measured)
    return numbers | compare(measured)


def start_in(precision: str, config: BenchConfig):
    """An Accelerator of this precision beside those that the process has already."""
    from accelerate.state import AcceleratorState

    from kd.training.launch import make_accelerator

    AcceleratorState._reset_state()
    job = config.job(precision)
    accelerator = make_accelerator(job.fit, job.run)
    require(accelerator.num_processes == 1, "kd.bench measures one process: start it with plain python")
    return accelerator


def share_of_matrix_rate(workloads, measured: dict[str, dict]) -> dict:
    """The card's rate of bf16 matrix products. Adds to the numbers of half precision which share of it a step uses."""
    from kd.bench.measure import matrix_rate

    rate, flops = matrix_rate(workloads.accelerator.device), workloads.flops_per_image()
    for name in measured.keys() - {"fp32"}:
        for kind in ("bare", "cached"):
            used = flops * measured[name][f"{kind}_images_per_second"]
            measured[name][f"{kind}_share_of_matrix_rate"] = used / rate
    return {"matrix_tflops": rate / 1e12}


def compare(measured: dict[str, dict]) -> dict:
    """How many times as fast as fp32 bf16 trains, with the range of the middle half of the rounds."""
    from statistics import median

    from kd.bench.measure import middle_half

    if not {"fp32", "bf16"} <= measured.keys():
        return {}
    numbers = {}
    for kind in ("cached", "live"):
        seconds = [measured[name][f"{kind}_seconds"] for name in ("fp32", "bf16")]
        ratios = [full / half for full, half in zip(*seconds)]
        numbers |= {f"bf16_over_fp32_{kind}": median(ratios), f"bf16_over_fp32_{kind}_range": middle_half(ratios)}
    return numbers


def verdict(numbers: dict) -> str:
    """Which precision pays, in one line; undecided if the rounds do not agree."""
    ratio, (low, high) = numbers["bf16_over_fp32_cached"], numbers["bf16_over_fp32_cached_range"]
    live = numbers["bf16_over_fp32_live"]
    text = (
        f"{ratio:.2f} times as fast as fp32 ({low:.2f} to {high:.2f}) with a cached teacher, {live:.2f} with a live one"
    )
    if low < 1 < high:
        return f"bf16: undecided, {text}. Measure again with more --rounds, beside no other work."
    if min(ratio, live) >= PAYS:
        return f"bf16 pays: {text}. Add --mixed-precision bf16."
    return f"bf16 {'does not pay' if max(ratio, live) < PAYS else 'pays in part'}: {text}."


def describe(config: BenchConfig, size: tuple[int, int], accelerator) -> dict:
    """What the numbers depend on."""
    import torch

    from kd.models.cost import describe_machine

    on_gpu, threads = accelerator.device.type == "cuda", torch.get_num_threads()
    return {
        "model": config.model,
        "teacher_model": config.teacher_model,
        "batch_size": config.batch_size,
        "steps": config.steps,
        "rounds": config.rounds,
        "cpu_time": config.cpu_time,
        "image_size": list(size),
        "device": f"{torch.cuda.get_device_name()}, torch {torch.__version__}" if on_gpu else describe_machine(threads),
        "threads": threads,
        "torch": torch.__version__,
    }


def measure_starts(config: BenchConfig, folder: Path) -> dict:
    """Import time, first-step time and peak memory of new processes, without and with decoded data on disk."""
    flags = json.dumps(dataclasses.asdict(config) | {"json": None})
    caches = ("KD_CACHE", "HF_DATASETS_CACHE", "TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR")  # none is warm
    env = {**os.environ, **{name: str(folder / name.lower()) for name in caches}}
    numbers = {}
    for name in ("cold", "warm"):
        command = [sys.executable, "-m", "kd.bench.startup", flags]
        done = subprocess.run(command, env=env, capture_output=True, text=True)
        require(done.returncode == 0, f"the {name} start failed: {done.stderr[-300:]}; mend that, or add --no-starts")
        numbers |= {f"{name}_{key}": value for key, value in json.loads(done.stdout.splitlines()[-1]).items()}
    return numbers


RATES = ("bare", "live", "cached", "teacher", "evaluation")
RATIOS = {
    "epoch_over_bare": "cached epoch over bare",
    "live_over_ideal": "live epoch over ideal",
    "cached_over_ideal": "cached/live over ideal",
}
PARTS = {
    "bare": "bare arithmetic",
    "loop": "the loop, every step",
    "views": "  of which views",
    "log": "log, every --log-every",
    "comparison": "--diagnose-every",
    "begin": "an epoch's beginning",
    "end": "its end: checkpoint",
}


def show(numbers: dict) -> None:
    from rich.table import Table

    from kd.utils.console import console

    measured = numbers["precisions"]
    title = "{model} taught by {teacher_model}, batch {batch_size}, {device}".format(**numbers)
    title += ", processor time" * numbers["cpu_time"]
    rates = Table("images per second", *measured, title=title, title_justify="left")
    for name in RATES:
        rates.add_row(name, *(f"{side[f'{name}_images_per_second']:,.0f}" for side in measured.values()))
    for name, text in RATIOS.items():
        rates.add_row(text, *(_with_range(side[name], side[f"{name}_range"]) for side in measured.values()))
    parts = Table("ms of a step, cached", *measured)
    for name, text in PARTS.items():
        parts.add_row(text, *(f"{side['step_ms'][name]:.3f}" for side in measured.values()))
    shares = [f"{100 * side['validation_share']:.1f}%" for side in measured.values()]
    parts.add_row("validation, of an epoch", *shares)
    console.print(rates, parts)
    if "bf16_over_fp32_cached" in numbers:
        console.print(verdict(numbers), highlight=False)
    for key, value in numbers.items():
        if isinstance(value, float) and not key.startswith("bf16_over"):
            console.print(f"{key.replace('_', ' ')}: {value:,.3g}", highlight=False)


def _with_range(value: float, bounds: list[float]) -> str:
    return "{:.3f} ({:.3f} to {:.3f})".format(value, *bounds)


if __name__ == "__main__":
    remedy = "nothing was written; the same command starts over"
    sys.exit(exit_code(lambda: main(tyro.cli(BenchConfig, description=__doc__)), remedy))
