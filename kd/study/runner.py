"""Running scripts one after another or side by side: their progress, their logs, and how each of them ended."""

import argparse
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TextIO

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from kd.errors import ENDINGS, Preempted, UserError, require
from kd.utils.console import console
from kd.utils.system import StopRequests

LAUNCHER = (sys.executable, "-m", "accelerate.commands.launch")


POLL = 0.2  # seconds


FOLDER = re.compile(r"^run folder: (.+)$", re.MULTILINE)  # what a script prints last


EPOCH = re.compile(r" epoch (\d+)/(\d+) ")


def parse_launch_flags(words: str, jobs: int) -> tuple[str, ...]:
    """--launch as single words. Raises UserError where they are none, or want several processes for each of `jobs`."""
    try:
        launch = tuple(shlex.split(words))
    except ValueError as error:
        raise UserError(f"--launch {words}: {error}; quote it as for a shell") from error
    parser = argparse.ArgumentParser("accelerate launch", add_help=False, allow_abbrev=False)
    parser.add_argument("--num_processes", "--num-processes", type=int)
    parser.add_argument("--config_file", "--config-file", type=Path)
    told = parser.parse_known_args(launch)[0]
    processes = told.num_processes
    if told.config_file is not None:
        require(told.config_file.is_file(), f"--launch {words}: {told.config_file}: no such file")
        found = re.search(r"^num_processes:\s*(\d+)", told.config_file.read_text(errors="replace"), re.MULTILINE)
        processes = processes or (int(found[1]) if found else None)
    require(
        jobs == 1 or (processes or 1) == 1,
        f"--jobs {jobs}: each job gets one GPU, and --launch wants {processes} processes in it; leave --jobs out",
    )
    return launch


@dataclass
class Task:
    """One run of one script."""

    label: str
    script: Path
    args: list[str]
    folder: Path | None = None  # once it has finished
    failure: str = ""  # in words, once it has failed


@dataclass
class Running:
    task: Task
    process: subprocess.Popen
    log: Path
    slot: int
    output: TextIO
    bar: int
    started: float = field(default_factory=time.monotonic)


class Runner:
    """Runs tasks through `accelerate launch`, `jobs` at a time; within it SIGTERM and Ctrl-C stop them all.

    Each writes to a log of its own instead of a pipe, so that it outlives this process: killed and started again, the
    study waits for what still runs, and takes it over.
    """

    def __init__(self, jobs: int, launch: tuple[str, ...], logs: Path, total: int):
        self.jobs, self.launch, self.logs = jobs, launch, logs
        self.done: list[Task] = []
        self._running: list[Running] = []
        columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
        self._progress = Progress(*columns, console=console, disable=not console.is_terminal)
        self._whole = self._progress.add_task("runs of the study", total=total)
        self._requests = StopRequests()

    def __enter__(self) -> "Runner":
        try:
            self.logs.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"--out {self.logs.parent} cannot be written ({error}); choose another") from error
        self._requests.__enter__()
        self._progress.start()
        return self

    def __exit__(self, *exception) -> None:
        self._progress.stop()
        for running in self._running:
            _stop(running.process)
            running.output.close()
        self._requests.__exit__()

    def run(self, tasks: list[Task]) -> None:
        """Until each has finished or failed. Raises Preempted where the study was asked to stop."""
        waiting = list(tasks)
        while waiting or self._running:
            if self._requests.number:
                message = f"{len(self.done)} runs are done, the others were asked to save; the same command goes on"
                raise Preempted(self._requests.number, message)
            while waiting and len(self._running) < self.jobs:
                self._start(waiting.pop(0))
            time.sleep(POLL)
            for running in list(self._running):
                self._look(running)

    def skip(self, tasks: list[Task], why: str) -> None:
        for task in tasks:
            task.failure = why
            self._report(task, "")

    def _start(self, task: Task) -> None:
        slot = min(set(range(self.jobs)) - {running.slot for running in self._running})
        log = self.logs / f"{re.sub(r'[^A-Za-z0-9.=-]+', '_', task.label)}.log"
        command = [*LAUNCHER, *self.launch, str(task.script), *task.args]
        with open(log, "w", encoding="utf-8") as file:
            file.write(f"{shlex.join(command)}\n")
            file.flush()
            # A session of its own, so that launcher and script can be stopped together.
            process = subprocess.Popen(
                command,
                stdout=file,
                stderr=subprocess.STDOUT,
                env=_environment(slot, self.jobs),
                start_new_session=True,
            )
        output = open(log, encoding="utf-8", errors="replace")  # noqa: SIM115  closed when the task has ended
        bar = self._progress.add_task(task.label, total=None)
        self._running.append(Running(task, process, log, slot, output, bar))

    def _look(self, running: Running) -> None:
        for done, epochs in EPOCH.findall(running.output.read()):
            self._progress.update(running.bar, completed=int(done), total=int(epochs))
        code = running.process.poll()
        if code is None:
            return
        self._running.remove(running)
        running.output.close()
        self._progress.remove_task(running.bar)
        text = running.log.read_text(encoding="utf-8", errors="replace")
        folders = FOLDER.findall(text)
        if code == 0 and folders:
            running.task.folder = Path(folders[-1])
        else:
            running.task.failure = f"{_last_words(text, code)} (log: {running.log})"
        self._report(running.task, f" in {time.monotonic() - running.started:.0f} s")

    def _report(self, task: Task, time_taken: str) -> None:
        self.done.append(task)
        self._progress.update(self._whole, completed=len(self.done))
        what = f"{task.label}: " + (f"failed: {task.failure}" if task.failure else f"{task.folder}{time_taken}")
        self.say(what)

    def say(self, words: str) -> None:
        """A line above the bars."""
        console.print(words, markup=False, highlight=False, soft_wrap=True)


def _environment(slot: int, jobs: int) -> dict[str, str]:
    """Of several jobs at once each gets one GPU in turn, where there are several."""
    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    if jobs == 1:
        return dict(os.environ)
    if given is None:
        import torch

        gpus = [str(number) for number in range(torch.cuda.device_count())]
    else:
        gpus = [name for name in given.split(",") if name]
    return {**os.environ, "CUDA_VISIBLE_DEVICES": gpus[slot % len(gpus)]} if gpus else dict(os.environ)


def _stop(process: subprocess.Popen) -> None:
    """Ask launcher and script to stop; the script saves first, and holds its folder's lock until it has."""
    try:
        os.killpg(process.pid, signal.SIGTERM)
        process.wait(timeout=30)
    except (ProcessLookupError, subprocess.TimeoutExpired):
        pass


def _last_words(text: str, code: int) -> str:
    """Why it failed, from its log: our own message, else the last line that is not the launcher's."""
    lines = [line.strip() for line in text.splitlines()[1:] if line.strip()]
    ours = [line for line in lines if line.startswith(ENDINGS)]
    others = [line for line in lines if "CalledProcessError" not in line]
    return (ours or others or [f"exit code {code}"])[-1][:300]
