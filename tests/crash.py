"""Kill runs at random moments, resume them, and compare each with the same run undisturbed, bit for bit.

    python -m tests.crash --minutes 20 --seed 0
    python -m tests.crash --seed 0 --only 17        one run again, as a difference is reported

Each run is of a random method on random settings, with a teacher trained on the way, given, or kept in a cache; on
one process or two. A kill is SIGKILL from outside, aimed at a phase (a step, a save, a validation, ...) and counted
under the phase that it really met. After every kill the same command goes on, until it ends by itself; then the one
oracle (tests/run_scripts.py) compares weights, optimizer, metrics and summary, and the kept answers byte by byte.
Exit code 1 where anything differs, fails or hangs; its folders are kept then.
"""

import argparse
import collections
import os
import random
import shlex
import shutil
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch: its threads would not outlive a fork

from rich.console import Console
from rich.live import Live
from rich.table import Table

from kd.config import METHODS
from kd.runs.checkpoint import steps
from tests.forks import PHASES, Command, Started, warm_up
from tests.run_scripts import differences

SMALL = ["--classes", "4", "--epochs", "2", "--lr", "0.005", "--threads", "1", "--wandb", "disabled"]
SMALL += ["--auto-resume", "--out", "run"]
SIZES = {"digits": ("0.8", "20"), "synthetic": ("0.8", "16")}  # validation share, batch: 5 steps an epoch
METHOD_FLAGS = {"crd": ["--negatives", "16"], "dkd": ["--ramp-epochs", "2"], "rld": ["--ramp-epochs", "2"]}
# Methods that --cache-teacher serves.
LOOKED_UP = ("kd", "mimic", "dkd", "dist", "nkd", "wttm", "rld", "pld", "skd", "ctkd", "mlkd", "crld", "deit", "ofa")
MOST = 10  # kills of one run, at most
TWO, CACHED = 0.2, 0.25  # shares of runs on two processes, and with the teacher's answers kept
WEIGHTS = {
    "decoding": 0.2,
    "cache build": 2.0,
    "step": 2.0,
    "save": 2.0,
    "between": 0.5,
}  # of phases to aim at; others 1
CONSOLE = Console(stderr=True)


@dataclass(frozen=True)
class Case:
    """One run to be killed: its teacher, given or none, and itself."""

    number: int
    teacher: Command | None
    run: Command


def draw(number: int, dice: random.Random) -> Case:
    """A random run."""
    processes = 2 if dice.random() < TWO else 1
    data = dice.choice(list(SIZES))
    share, batch = SIZES[data]
    common = ["--data", data, "--val-fraction", share, "--batch-size", batch, *SMALL]
    common += ["--save-every", dice.choice(["0", "1", "2", "3"]), "--seed", str(dice.randrange(1000))]
    common += ["--log-every", dice.choice(["1", "4", "50"])]
    cached = dice.random() < CACHED
    method = dice.choice(LOOKED_UP if cached else list(METHODS))
    if method in ("kd", "none") and dice.random() < 0.4:
        common += dice.choice([["--mixup", "0.4"], ["--cutmix", "1.0"], ["--erase", "0.5"]])
    if dice.random() < 0.1 and not cached:
        return Case(number, None, Command("train_teacher.py", ("--model", "resnet8", *common), processes))
    flags = ["--student", "resnet8", "--teacher-model", "resnet8"]
    if cached:
        flags += ["--cache-teacher", "--views", "2", "--cache-dtype", dice.choice(["float16", "float32"])]
        flags += dice.choice([[], ["--cache-top-k", "2"]])
    teacher = None
    if dice.random() < 0.7:  # else it is trained on the way, and may be killed there
        teacher = Command("train_teacher.py", ("--model", "resnet8", *common, "--out", "teacher"))
        flags += ["--teacher", "teacher"]
    flags += [method, *METHOD_FLAGS.get(method, [])]
    return Case(number, teacher, Command("distill_student.py", (*common, *flags), processes))


class Failed(Exception):
    """Something that must not happen to a run that is killed and resumed."""


def run_whole(command: Command, folder: Path) -> Started:
    started = Started(command, folder)
    code = started.wait()
    if code != 0:
        raise Failed(f"{'hung' if code is None else f'ended with {code}'}: {command.line}\n{_tail(started.log)}")
    return started


def _tail(log: Path) -> str:
    return "\n".join(log.read_text(errors="replace").splitlines()[-12:])


def aim(whole: Started, left: float, dice: random.Random) -> tuple[str, int, float]:
    """A phase of the undisturbed run, which of its times, and the seconds into it at which to kill.

    `left`: the share of the run that has not been saved yet, so that the moment is not behind it already.
    """
    phases = {phase: WEIGHTS.get(phase, 1.0) for phase in PHASES if whole.watch.entered(phase)}
    (phase,) = dice.choices(list(phases), list(phases.values()))
    times = whole.watch.entered(phase)
    if phase == "start-up":  # of which only the end is told by other phases
        return phase, 1, dice.random() * 0.4
    usual = whole.watch.seconds(phase) / times if phase != "between" else 0.01
    soon = dice.random() ** 2  # rather early, so that a run lives to be killed again
    return phase, 1 + int(times * left * soon), dice.random() * usual


def saved(folder: Path) -> int:
    """Steps that the newest checkpoints below hold, a teacher's on the way included."""
    return sum(max(steps(path), default=0) for path in folder.glob("**/checkpoint"))


def kill_once(command: Command, folder: Path, target: tuple[str, int, float], dice: random.Random) -> str | None:
    """Start the command and kill it there; the phase that it was in, None where it had ended by itself before."""
    phase, times, delay = target
    started = Started(command, folder)
    if not started.until(lambda: started.watch.entered(phase) >= times):
        code = started.wait()  # what was aimed at lay before the checkpoint that it went on from
        if code != 0:
            raise Failed(f"{'hung' if code is None else f'ended with {code}'}: {command.line}\n{_tail(started.log)}")
        return None
    until = time.monotonic() + delay
    while time.monotonic() < until and started.step():
        time.sleep(min(0.0005, delay))
    if not started.running:
        return None
    started.kill(dice.random() * 0.3)
    return started.watch.phase


def torture(case: Case, base: Path, dice: random.Random, killed) -> None:
    """Run the case undisturbed and killed; raises Failed where the two differ. `killed` is told of every kill."""
    whole_folder, folder = base / "whole", base / "killed"
    whole_folder.mkdir(parents=True)
    if case.teacher is not None:
        run_whole(case.teacher, whole_folder)
    shutil.copytree(whole_folder, folder)
    shutil.rmtree(folder / "data", ignore_errors=True)  # so that decoding is killed too
    whole = run_whole(case.run, whole_folder)
    before, total = saved(folder), saved(whole_folder)
    for _ in range(dice.randint(3, MOST)):
        left = 1 - (saved(folder) - before) / (total - before)
        phase = kill_once(case.run, folder, aim(whole, left, dice), dice)
        if phase is None:
            break
        killed(phase, case.run.processes)
    run_whole(case.run, folder)
    differ = [text for name in _runs(whole_folder) for text in differences(whole_folder / name, folder / name)]
    differ += [str(path) for path in _answers(whole_folder) if not _same(whole_folder / path, folder / path)]
    if leftovers := [str(path.relative_to(folder)) for path in folder.glob("**/*partial*")]:
        differ += [f"left behind: {', '.join(leftovers)}"]
    if differ:
        raise Failed(f"differs in {', '.join(differ[:5])}: {case.run.line}")


def _runs(folder: Path) -> list[Path]:
    return [path.parent.relative_to(folder) for path in folder.glob("**/summary.json")]


def _answers(folder: Path) -> list[Path]:
    """The files of the teacher's kept answers."""
    return [path.relative_to(folder) for path in folder.glob("runs/cache/*/*") if path.name != "lock"]


def _same(one: Path, other: Path) -> bool:
    return other.exists() and one.read_bytes() == other.read_bytes()


class Tally:
    """Counts kills by what they met."""

    def __init__(self):
        self.started = time.monotonic()
        self.kills: collections.Counter = collections.Counter()
        self.runs = 0

    def kill(self, phase: str, processes: int) -> None:
        self.kills[phase, processes] += 1

    def table(self) -> Table:
        table = Table(title=f"{self.kills.total()} kills survived in {self.runs} runs, {self.minutes():.1f} minutes")
        for title in ("killed in", "one process", "two processes"):
            table.add_column(title, justify="left" if title == "killed in" else "right")
        for phase in PHASES:
            table.add_row(phase, *(str(self.kills[phase, processes]) for processes in (1, 2)))
        return table

    def minutes(self) -> float:
        return (time.monotonic() - self.started) / 60

    def __rich__(self) -> Table:
        return self.table()


def main(args: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser("python -m tests.crash", description=__doc__, allow_abbrev=False)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--minutes", type=float, default=20, help="how long to go on (default: 20)")
    parser.add_argument("--seed", type=int, default=0, help="of the runs and the moments (default: 0)")
    parser.add_argument("--only", type=int, help="this run alone")
    given = parser.parse_args(args)
    tally, base = Tally(), Path(tempfile.mkdtemp(prefix="crash-"))
    warm_up(base)
    numbers = iter([given.only]) if given.only is not None else iter(range(10**9))
    with Live(tally, console=CONSOLE, refresh_per_second=2, transient=True):
        for number in numbers:
            if tally.minutes() > given.minutes:
                break
            dice = random.Random(f"{given.seed}/{number}")
            case = draw(number, dice)
            try:
                torture(case, base / str(number), dice, tally.kill)
            except Failed as failure:
                CONSOLE.print(str(failure), markup=False, highlight=False, soft_wrap=True)
                again = shlex.join(["python", "-m", "tests.crash", "--seed", str(given.seed), "--only", str(number)])
                CONSOLE.print(f"folders: {base / str(number)}\nagain: {again}", markup=False, soft_wrap=True)
                return 1
            tally.runs += 1
            shutil.rmtree(base / str(number))
    shutil.rmtree(base)
    Console().print(tally.table())
    return 0


if __name__ == "__main__":
    sys.exit(main())
