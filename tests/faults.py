"""Run a script with a fault injected from outside: `python -m tests.faults FAULT SCRIPT ARGS...`.

kill:K       kill -9 when step K of this process has been counted
signal:K:R:S send signal S to process R at step K
raise:K:R    raise in process R at step K
nan:K:R      make the loss NaN in process R at step K
Nothing in kd/ knows of this.
"""

import os
import runpy
import signal
import sys

import torch

from kd.training.trainer import Trainer


def main() -> None:
    fault, script, *args = sys.argv[1:]
    kind, at, *rest = fault.split(":")
    count, real = 0, Trainer.record
    mine = not rest or os.environ.get("RANK", "0") == rest[0]

    def step(self, result, batch):
        nonlocal count
        count += 1
        if count == int(at):
            if kind == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            if kind == "signal" and mine:
                os.kill(os.getpid(), int(rest[1]))
            if kind == "raise" and mine:
                raise RuntimeError("the injected fault")
            if kind == "nan" and mine:
                result = result._replace(terms={name: term * torch.nan for name, term in result.terms.items()})
        real(self, result, batch)

    Trainer.record = step
    sys.argv = [script, *args]
    runpy.run_path(script, run_name="__main__")


if __name__ == "__main__":
    main()
