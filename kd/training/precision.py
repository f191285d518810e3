"""Whether bf16 pays on this CPU: said once at the start, if the run's own precision is the slower one.

Some CPUs multiply bf16 in hardware (Intel's AMX and AVX-512 BF16, AMD's since Zen 4, ARM's BF16); others emulate it.
"""

import time
from functools import cache
from pathlib import Path

import torch
from torch import nn

from kd.utils.console import print_once

HARDWARE = ("amx_bf16", "avx512_bf16", "svebf16", "bf16")  # flags in /proc/cpuinfo; the last two are ARM's
CPUINFO = Path("/proc/cpuinfo")
PAYS = 1.2  # times as fast from which it is worth a line: a step in miniature is measured to about a tenth
ROUNDS = 4
CHANNELS = 64  # as in the first stage of ResNet18 and the last of resnet20


def bf16_instructions(cpuinfo: Path | None = None) -> str | None:
    """The flag by which this CPU says that it multiplies bf16; None if it has none, or the system does not tell."""
    try:
        text = (cpuinfo or CPUINFO).read_text()
    except OSError:
        return None
    lines = (line.partition(":") for line in text.splitlines())
    flags = {
        flag for name, _, value in lines if name.strip().lower() in ("flags", "features") for flag in value.split()
    }
    return next((flag for flag in HARDWARE if flag in flags), None)


@cache
def bf16_speed() -> float:
    """How many times as fast as in fp32 a training step in miniature runs in bf16; takes a tenth of a second.

    By the processor time of one thread: other jobs disturb it little, and threads that wait for work would count as
    working. Draws no random numbers that a training could miss.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return _ratio_in_miniature()
    finally:
        torch.set_num_threads(threads)


def _ratio_in_miniature() -> float:
    """Seconds in fp32 over seconds in bf16."""
    seconds = {False: [], True: []}
    with torch.random.fork_rng(devices=[]):
        layers = [_layer() for _ in range(2)]
    network = nn.Sequential(*(part for layer in layers for part in layer)).to(memory_format=torch.channels_last)
    images = torch.ones(16, CHANNELS, 16, 16).to(memory_format=torch.channels_last)
    for _ in range(ROUNDS + 1):
        for half, times in seconds.items():
            start = time.process_time()
            with torch.autocast("cpu", torch.bfloat16, enabled=half):
                output = network(images)
            output.float().sum().backward()
            times.append(time.process_time() - start)
    full, half = (min(times[1:]) for times in seconds.values())  # the first round chooses kernels
    return full / half


def _layer() -> tuple[nn.Module, ...]:
    return nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1, bias=False), nn.BatchNorm2d(CHANNELS), nn.ReLU()


def advise_precision(precision: str) -> None:
    """Print which precision a CPU is faster in, if that is not `precision`: no, or bf16."""
    flag = bf16_instructions()
    if precision == "no" and flag is not None and bf16_speed() >= PAYS:
        print_once(
            f"this CPU multiplies bf16 in hardware ({flag}): --mixed-precision bf16 is about {bf16_speed():.1f} times"
            f" as fast at {CHANNELS} channels, less in narrow networks; python -m kd.bench measures yours"
        )
    if precision == "bf16" and bf16_speed() <= 1 / PAYS:
        why = "multiplies no bf16 in hardware" if flag is None else f"has {flag}, and is slower in bf16 all the same"
        print_once(
            f"warning: this CPU {why}: --mixed-precision bf16 takes about {1 / bf16_speed():.1f} times as long as fp32;"
            " leave it out, or give --mixed-precision no"
        )
