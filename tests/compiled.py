"""Compiled steps of every method on the CPU, in a process of its own: the shape checks of the tests cannot be traced.

    python -m tests.compiled eager kd dist      a graph break or a recompilation ends it with the method's name

The back ends `eager` and `aot_eager` trace what `inductor` would compile, without its time.
"""

import sys
from collections.abc import Iterator
from unittest import mock

import torch
import torch._dynamo.testing
from accelerate import Accelerator

from kd.config import METHODS, FitConfig
from kd.training.launch import _dynamo_plugin
from kd.types import Batch, Mix, Outputs, Step
from tests import pairs

ALL = (*METHODS, "kd+at", "simkd+at", "tests.test_fake_cuda:Toy")  # the last one from outside
STEPS, EPOCHS, SIZE = 6, 3, 12


def batches(method: str, mixed: bool) -> Iterator[Batch]:
    """Steps over epochs; views, epochs and steps are tensors, as the loader makes them."""
    for step in range(STEPS):
        epoch = step * EPOCHS // STEPS
        batch = pairs.batch_of(torch.arange(SIZE) + step, epoch, method)
        batch = batch._replace(view=torch.tensor(epoch), step=torch.tensor(step))
        yield batch._replace(mix=Mix(batch.label.flip(0), torch.linspace(0, 1, SIZE))) if mixed else batch


def train(method: str, backend: str, precision: str = "no", mixed: bool = False) -> None:
    """Train by a compiled step, in one graph and compiled once, and compare each step's terms with an eager one's."""
    torch._dynamo.reset()
    distiller, teacher = pairs.build(method)
    autocast = torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16")
    optimizer = torch.optim.SGD(distiller.train().parameters(), 0.01)
    model = torch.compile(distiller, backend=backend, fullgraph=True, dynamic=False)
    for batch in batches(method, mixed):
        with torch.no_grad(), autocast:
            answers: Outputs = teacher.of_batch(batch)
        buffers = {name: buffer.clone() for name, buffer in distiller.named_buffers()}  # a method's bank
        with autocast:
            wanted = torch.func.functional_call(distiller, buffers, (batch, answers)).terms
            result: Step = model(batch, answers)
        near = {"rtol": 2e-2, "atol": 2e-2} if precision == "bf16" else {"rtol": 1e-4, "atol": 1e-5}
        torch.testing.assert_close(result.terms, wanted, **near)
        sum(result.terms.values()).backward()
        optimizer.step()
        optimizer.zero_grad()


def train_one_after_another(methods: list[str]) -> int:
    """How many graphs a process compiles that trains by each method in turn, with the settings of a launch."""
    with mock.patch("kd.training.launch.compiles", return_value=True):
        _dynamo_plugin(FitConfig(), on_cpu=False)
    counter = torch._dynamo.testing.CompileCounter()
    for method in methods:
        distiller, teacher = pairs.build(method)
        model = torch.compile(distiller.train(), backend=counter, dynamic=False)
        for batch in batches(method, False):
            model(batch, teacher.of_batch(batch))
    return counter.frame_count


def main(backend: str, *methods: str) -> None:
    Accelerator(cpu=True)
    torch.set_num_threads(1)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for method in methods or ALL:
            try:
                train(method, backend)
                if method in ("kd", "none"):
                    train(method, backend, "bf16", mixed=True)
            except Exception as error:
                raise SystemExit(f"{method}: {error}") from error
    print(f"{len(methods or ALL)} methods in one graph each")


if __name__ == "__main__":
    main(*sys.argv[1:])
