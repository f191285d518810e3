"""Runs of both scripts in forked children of one warm process, each killed from outside at a moment that can be chosen.

An import of torch costs seconds, a fork milliseconds. What a child is doing it writes into memory that it shares with
its parent, so that the parent knows in which phase a kill met it. Nothing in kd/ knows of this.
"""

import functools
import mmap
import os
import signal
import socket
import struct
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch

import distill_student
import kd.data.sources
import kd.runs.checkpoint
import kd.teachers.cache
import kd.training.summary
import kd.training.trainer
import train_teacher
from kd.config.cli import parse
from kd.config.defaults import distill_defaults, train_defaults
from kd.errors import exit_code

PHASES = ("start-up", "decoding", "cache build", "step", "save", "validation", "finish", "between")
WATCHED = {  # the function in whose time a process is in the phase
    "decoding": (kd.data.sources, "cached"),
    "cache build": (kd.teachers.cache, "_build"),
    "step": (kd.training.trainer.Trainer, "update"),
    "save": (kd.runs.checkpoint, "save"),
    "validation": (kd.training.trainer, "validate"),
    "finish": (kd.training.summary, "write_results"),
}
POLL = 0.0005  # seconds
PATIENCE = 120.0  # seconds that a run may take before it counts as hung


class Watch:
    """Where a process is: its phase, how often it has entered each, and the seconds spent in them."""

    def __init__(self):
        self._memory = mmap.mmap(-1, 8 * (1 + 2 * len(PHASES)))  # shared with forked children

    def _at(self, slot: int, kind: str) -> float:
        return struct.unpack_from(kind, self._memory, 8 * slot)[0]

    @property
    def phase(self) -> str:
        return PHASES[self._at(0, "q")]

    def entered(self, phase: str) -> int:
        return self._at(1 + PHASES.index(phase), "q")

    def seconds(self, phase: str) -> float:
        return self._at(1 + len(PHASES) + PHASES.index(phase), "d")

    def enter(self, phase: str) -> None:
        number = PHASES.index(phase)
        struct.pack_into("q", self._memory, 8 * (1 + number), self.entered(phase) + 1)
        struct.pack_into("q", self._memory, 0, number)

    def leave(self, phase: str, back: str, seconds: float) -> None:
        slot = 1 + len(PHASES) + PHASES.index(phase)
        struct.pack_into("d", self._memory, 8 * slot, self._at(slot, "d") + seconds)
        if back == "between":
            self.enter(back)
        struct.pack_into("q", self._memory, 0, PHASES.index(back))

    def install(self) -> None:
        """Follow this process from here on."""
        self.enter("start-up")
        for phase, (module, name) in WATCHED.items():
            setattr(module, name, self._followed(phase, getattr(module, name)))

    def _followed(self, phase: str, real):
        @functools.wraps(real)
        def followed(*args, **kwargs):
            before, started = self.phase, time.monotonic()
            self.enter(phase)
            try:
                return real(*args, **kwargs)
            finally:
                self.leave(phase, "between" if phase == "step" else before, time.monotonic() - started)

        return followed


@dataclass(frozen=True)
class Command:
    """A script and its flags, on one process or several."""

    script: str
    flags: tuple[str, ...]
    processes: int = 1

    @property
    def line(self) -> str:
        launcher = f"ACCELERATE_USE_CPU=true torchrun --nproc_per_node {self.processes} " if self.processes > 1 else ""
        return f"{launcher}{self.script} {' '.join(self.flags)}"


def warm_up(folder: Path) -> None:
    """Import here what each child would import anew, torchvision's and matplotlib's parts on first use included."""
    import sklearn.datasets

    import kd.report.costs
    import kd.runs.table
    import kd.training.setup
    import kd.training.summary

    kd.training.summary.draw_curves(
        [{"epoch": 1, "train/loss": 1.0, "train/top1": 1.0}], "warm-up", folder / "warm-up.png"
    )
    sklearn.datasets.load_digits()
    for defaults in (distill_defaults, train_defaults):
        parse(defaults, "", [])


class Started:
    """The forked processes of one command, in a folder; their output goes to `folder`/log."""

    def __init__(self, command: Command, folder: Path):
        self.watch = Watch()  # of the first process
        self.started = time.monotonic()
        self.log = folder / "log"
        meeting = _free_port() if command.processes > 1 else 0
        self.running = [self._fork(command, folder, rank, meeting) for rank in range(command.processes)]
        self.codes: list[int] = []

    def _fork(self, command: Command, folder: Path, rank: int, meeting: int) -> int:
        sys.stdout.flush()
        process = os.fork()
        if process:
            return process
        code = 70
        try:
            os.chdir(folder)
            output = os.open(self.log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.dup2(output, 1)
            os.dup2(output, 2)
            os.environ["KD_CACHE"] = str(folder / "data")
            if command.processes > 1:
                os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "ACCELERATE_USE_CPU": "true"}
                os.environ |= dict.fromkeys(("WORLD_SIZE", "LOCAL_WORLD_SIZE"), str(command.processes))
                os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(meeting)}
            if rank == 0:
                self.watch.install()
            code = exit_code(lambda: _run(command), "")
        except BaseException:
            import traceback

            traceback.print_exc()
        finally:
            os._exit(code)

    def step(self) -> bool:
        """Whether any process still runs; sees to those that have ended."""
        for process in list(self.running):
            ended, status = os.waitpid(process, os.WNOHANG)
            if ended:
                self.running.remove(process)
                self.codes.append(os.waitstatus_to_exitcode(status))
        return bool(self.running)

    def until(self, ready) -> bool:
        """Wait for `ready()`; False where a process ended first, or none has for too long."""
        everybody = len(self.running)
        while time.monotonic() - self.started < PATIENCE:
            if ready():
                return True
            if not self.step() or len(self.running) < everybody:
                return False
            time.sleep(POLL)
        return False

    def kill(self, alone: float) -> None:
        """SIGKILL one process, and after `alone` seconds the others, as a launcher would."""
        for process in list(reversed(self.running)):
            os.kill(process, signal.SIGKILL)
            time.sleep(alone if len(self.running) > 1 else 0)
        while self.step():
            time.sleep(POLL)

    def wait(self) -> int | None:
        """The exit code (the first that is not 0); None for a run that hangs, which is ended."""
        while self.step():
            if time.monotonic() - self.started > PATIENCE:
                self.kill(0)
                return None
            if any(self.codes):  # a launcher ends the others then
                self.kill(0)
            time.sleep(POLL)
        return next(filter(None, self.codes), 0)


def _run(command: Command) -> None:
    torch.set_num_threads(1)
    scripts = {
        "distill_student.py": (distill_student, distill_defaults),
        "train_teacher.py": (train_teacher, train_defaults),
    }
    module, defaults = scripts[command.script]
    module.main(parse(defaults, "", list(command.flags)))


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]
