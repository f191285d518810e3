"""Run scripts one after another or side by side, with progress bars and logs, and record how each of them ended."""

import argparse
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TextIO

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from kd.errors import ENDINGS, Preempted, UserError, require
from kd.runs.handover import FOLDERS_FILE, announced
from kd.utils.console import console
from kd.utils.system import StopRequests

LAUNCHER = (sys.executable, "-m", "accelerate.commands.launch")

ALONE = ("--num_processes", "1")  # else the launcher takes all GPUs, and BatchNorm sees an eighth of the batch

POLL = 0.2  # seconds
PATIENCE = 30  # seconds for all jobs together to save, once they are asked to stop

EPOCH = re.compile(r" epoch (\d+)/(\d+) ")  # for the bars: the last one in a log is how far its script is


def parse_launch_flags(words: str, jobs: int) -> tuple[str, ...]:
    """Split --launch into flags.

    Raises UserError if a shell could not split it, or if it wants several processes while `jobs` run side by side.
    """
    try:
        launch = tuple(shlex.split(words))
    except ValueError as error:
        raise UserError(f"--launch {words}: {error}; quote it as for a shell") from error
    parser = argparse.ArgumentParser("accelerate launch", add_help=False, allow_abbrev=False)
    parser.add_argument("--num_processes", "--num-processes", type=int)
    parser.add_argument("--config_file", "--config-file", type=Path)
    flags = parser.parse_known_args(launch)[0]
    processes = flags.num_processes
    if flags.config_file is not None:
        require(flags.config_file.is_file(), f"--launch {words}: {flags.config_file}: no such file")
        match = re.search(r"^num_processes:\s*(\d+)", flags.config_file.read_text(errors="replace"), re.MULTILINE)
        processes = processes or (int(match[1]) if match else None)
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
    failure: str = ""  # why it has failed, once it has
    needs_teacher: bool = False
    own_teacher: object = None  # the job of the teacher that it trains first, or finds trained; None: another is named
    teachers: list[Path] = field(default_factory=list)  # finished runs of teachers that it trained, or found trained


@dataclass
class Running:
    """A task's process."""

    task: Task
    process: subprocess.Popen
    log: Path
    folders: Path  # the file that it announces its run folders in
    slot: int
    output: TextIO
    bar: int
    started: float = field(default_factory=time.monotonic)


class Runner:
    """Runs tasks through `accelerate launch`, `jobs` at a time. Within it SIGTERM and Ctrl-C stop them all.

    Each task writes to its own log instead of a pipe, so that it outlives this process. If the study is killed and
    started again, its tasks wait for the runs that still go on, and take over their results.

    Once a task has failed to train its teacher, those not yet started that need one are not started.
    """

    def __init__(self, jobs: int, launch: tuple[str, ...], logs: Path, total: int):
        self.jobs, self.launch, self.logs = jobs, launch, logs
        self.done: list[Task] = []
        self._running: list[Running] = []
        self._lost_teachers: list[tuple[object, str]] = []  # a teacher's job, and why its students are not started
        columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
        self._progress = Progress(*columns, console=console, disable=not console.is_terminal)
        self._total_bar = self._progress.add_task("runs of the study", total=total)
        self._requests = StopRequests()

    def __enter__(self) -> "Runner":
        try:
            self.logs.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"--out {self.logs.parent} cannot be written ({error}); choose another") from error
        self._announcements = TemporaryDirectory(prefix="kd-study-")
        self._requests.__enter__()
        self._progress.start()
        return self

    def __exit__(self, *exception) -> None:
        self._progress.stop()
        self._stop()
        self._requests.__exit__()
        self._announcements.cleanup()

    def _stop(self) -> None:
        """Ask all launchers and scripts to stop; a script saves first, and keeps its folder locked until it has."""
        for running in self._running:
            with suppress(ProcessLookupError):
                os.killpg(running.process.pid, signal.SIGTERM)
        end = time.monotonic() + PATIENCE
        for running in self._running:
            with suppress(subprocess.TimeoutExpired):
                running.process.wait(timeout=max(end - time.monotonic(), 0))
            running.output.close()

    def run(self, tasks: list[Task]) -> None:
        """Return once each task has finished or failed. Raises Preempted if the study was asked to stop."""
        waiting = list(tasks)
        while waiting or self._running:
            if self._requests.number:
                message = f"{len(self.done)} runs are done, the others were asked to save; the same command goes on"
                raise Preempted(self._requests.number, message)
            while waiting and len(self._running) < self.jobs:
                task = waiting.pop(0)
                failures = [why for teacher, why in self._lost_teachers if teacher == task.own_teacher]
                if task.needs_teacher and failures:
                    self.skip([task], failures[0])
                else:
                    self._start(task)
            if self._running:
                time.sleep(POLL)
            for running in list(self._running):
                self._poll(running)

    def skip(self, tasks: list[Task], why: str) -> None:
        """Count tasks that are not started as failed."""
        for task in tasks:
            task.failure = why
            self._report(task, "")

    def _start(self, task: Task) -> None:
        slot = min(set(range(self.jobs)) - {running.slot for running in self._running})
        name = re.sub(r"[^A-Za-z0-9.=-]+", "_", task.label)
        log = self.logs / f"{name}.log"
        folders = Path(self._announcements.name, f"{len(self.done)}-{slot}")  # a new name: its slot was freed by a task
        command = [*LAUNCHER, *_processes(self.launch), *self.launch, str(task.script), *task.args]
        with open(log, "w", encoding="utf-8") as file:
            file.write(f"{shlex.join(command)}\n")
            file.flush()
            # A session of its own, so that launcher and script can be stopped together.
            process = subprocess.Popen(
                command,
                stdout=file,
                stderr=subprocess.STDOUT,
                env={**os.environ, **_gpu_of(slot, self.jobs), FOLDERS_FILE: str(folders)},
                start_new_session=True,
            )
        output = open(log, encoding="utf-8", errors="replace")  # noqa: SIM115  closed when the task has ended
        bar = self._progress.add_task(task.label, total=None)
        self._running.append(Running(task, process, log, folders, slot, output, bar))

    def _poll(self, running: Running) -> None:
        """Move the task's bar; if its process has ended, record how."""
        runs = announced(running.folders)
        on_the_way = bool(runs) and runs[-1][0] == "teacher"
        description = f"{running.task.label}: its teacher" if on_the_way else running.task.label
        self._progress.update(running.bar, description=description)
        for done, epochs in EPOCH.findall(running.output.read()):
            self._progress.update(running.bar, completed=int(done), total=int(epochs))
        code = running.process.poll()
        if code is None:
            return
        self._running.remove(running)
        running.output.close()
        self._progress.remove_task(running.bar)
        self._record(running, code)
        self._report(running.task, f" in {time.monotonic() - running.started:.0f} s")

    def _record(self, running: Running, code: int) -> None:
        """The task's folder, or its failure, and the teachers on the way."""
        task, runs = running.task, announced(running.folders)
        teachers = [folder for role, folder in runs if role == "teacher"]
        task.teachers = [folder for folder in teachers if _is_finished(folder)]
        if code == 0 and runs:
            task.folder = runs[-1][1]
            return
        words = _last_words(running.log.read_text(encoding="utf-8", errors="replace"), code)
        task.failure = f"{words} (log: {running.log})"
        role, folder = runs[-1] if runs else ("", None)
        if task.needs_teacher and role == "teacher" and not _is_finished(folder):
            task.failure = f"its teacher {folder} failed: {task.failure}"
            self._lost_teachers.append((task.own_teacher, f"not started: the teacher of {task.label} failed"))

    def _report(self, task: Task, time_taken: str) -> None:
        self.done.append(task)
        self._progress.update(self._total_bar, completed=len(self.done))
        self.say(f"{task.label}: " + (f"failed: {task.failure}" if task.failure else f"{task.folder}{time_taken}"))

    def say(self, words: str) -> None:
        """Print a line above the bars."""
        console.print(words, markup=False, highlight=False, soft_wrap=True)


def _is_finished(folder: Path) -> bool:
    return (folder / "summary.json").exists()


def _processes(launch: tuple[str, ...]) -> tuple[str, ...]:
    """The launcher's flags for one process, unless --launch says how many, itself or in a file."""
    given = {word.partition("=")[0].replace("-", "_") for word in launch}
    return () if given & {"__num_processes", "__config_file"} else ALONE


def _gpu_of(slot: int, jobs: int) -> dict[str, str]:
    """The environment that gives a job one GPU, in turn, if several jobs run at once and there are GPUs."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if jobs == 1:
        return {}
    if visible is None:
        import torch

        gpus = [str(number) for number in range(torch.cuda.device_count())]
    else:
        gpus = [name for name in visible.split(",") if name]
    return {"CUDA_VISIBLE_DEVICES": gpus[slot % len(gpus)]} if gpus else {}


def _last_words(text: str, code: int) -> str:
    """Why a script failed, from its log: kd's own message, else the last line that is not the launcher's."""
    lines = [line.strip() for line in text.splitlines()[1:] if line.strip()]
    own = [line for line in lines if line.startswith(ENDINGS)]
    others = [line for line in lines if "CalledProcessError" not in line]
    return (own or others or [f"exit code {code}"])[-1][:300]
