"""What bf16 gains and costs around the network on a CPU, choice by choice.

    python -m tests.precision_costs --model resnet20 --teacher-model resnet56

Each ratio is the time of a training step, or of the teacher's forward pass, in one way over that in another: above 1,
the second pays. The ways take turns on one thread; processor time, which other jobs disturb little. Not a test.
"""

import argparse
from collections.abc import Callable

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import Tensor, nn

from kd.bench.measure import Workload, median, middle_half, repeated, time_in_turns
from kd.models import build_model
from kd.models.cost import describe_machine
from kd.teachers.live import fold_batchnorm

CLASSES, SIZE = 100, (32, 32)
FORMATS = {True: torch.channels_last, False: torch.contiguous_format}

RATIOS = {  # what is asked: (first way, second way)
    "training step: bf16 instead of fp32": ("fp32", "bf16"),
    "channels-last, fp32": ("fp32 contiguous", "fp32"),
    "channels-last, bf16": ("bf16 contiguous", "bf16"),
    "fused SGD, fp32": ("fp32", "fp32 fused"),
    "fused SGD, bf16": ("bf16", "bf16 fused"),
    "autocast's cache of weights": ("bf16 uncached", "bf16"),
    "loss in bf16 too (loses digits)": ("bf16", "bf16 loss"),
    "all weights in bf16 (loses updates)": ("bf16", "bf16 weights"),
    "teacher: bf16 instead of fp32, folded": ("teacher fp32", "teacher autocast"),
    "BatchNorm folded, fp32": ("teacher fp32 unfolded", "teacher fp32"),
    "BatchNorm folded, autocast": ("teacher autocast unfolded", "teacher autocast"),
    "converted once instead of autocast": ("teacher autocast", "teacher converted"),
    "BatchNorm folded, converted": ("teacher converted unfolded", "teacher converted"),
    "channels-last, converted": ("teacher converted contiguous", "teacher converted"),
}


def batch(size: int, last: bool) -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    return torch.randn(size, 3, *SIZE).contiguous(memory_format=FORMATS[last]), torch.randint(CLASSES, (size,))


def network(model: str, last: bool) -> nn.Module:
    torch.manual_seed(0)
    return build_model(model, CLASSES, SIZE).to(memory_format=FORMATS[last])


def student(asked: argparse.Namespace, way: str) -> Callable[[], None]:
    last, half, weights = "contiguous" not in way, way.startswith("bf16"), "weights" in way
    (images, labels), net = batch(asked.batch_size, last), network(asked.model, last)
    if weights:
        net, images = net.bfloat16(), images.bfloat16()
    fused = {"fused": True} if "fused" in way else {}
    optimizer = torch.optim.SGD(net.parameters(), lr=1e-6, momentum=0.9, weight_decay=5e-4, **fused)

    def step() -> None:
        cache = "uncached" not in way
        with torch.autocast("cpu", torch.bfloat16, enabled=half and not weights, cache_enabled=cache):
            logits = net(images)
        F.cross_entropy(logits if "loss" in way else logits.float(), labels).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def teacher(asked: argparse.Namespace, way: str) -> Callable[[], None]:
    last = "contiguous" not in way
    images, _ = batch(asked.batch_size, last)
    net = network(asked.teacher_model, last).eval().requires_grad_(False)
    if "unfolded" not in way:
        net = fold_batchnorm(net)
    net = net.to(memory_format=FORMATS[last])
    if "converted" in way:
        net, images = net.bfloat16(), images.bfloat16()

    @torch.no_grad()
    def forward() -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled="autocast" in way):
            net(images).float()

    return forward


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="resnet20")
    parser.add_argument("--teacher-model", default="resnet56")
    for name, default in {"batch-size": 64, "steps": 4, "rounds": 7}.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    ways: dict[str, Workload] = {}
    for way in dict.fromkeys(way for pair in RATIOS.values() for way in pair):
        build = teacher if way.startswith("teacher") else student
        ways[way] = repeated(build(asked, way), asked.steps)
    times = time_in_turns({"no": (Accelerator(cpu=True), ways)}, asked.rounds, cpu_time=True)["no"]
    print(f"{asked.model}, teacher {asked.teacher_model}, batch {asked.batch_size}, {describe_machine()}")
    for name, (one, other) in RATIOS.items():
        values = [first / second for first, second in zip(times[one], times[other], strict=True)]
        low, high = middle_half(values)
        print(f"{name:<40} {median(values):.2f} ({low:.2f} to {high:.2f})")


if __name__ == "__main__":
    main()
