"""Does distillation help here? A teacher, the controls and methods over several seeds, with equal budgets.

    python -m kd.study --preset digits --seeds 0 1 2
    python -m kd.study --methods kd dkd --seeds 0 1 2 --teacher-model resnet20 --student resnet8 --epochs 30
    python -m kd.study --preset digits --grid temperature=2,5,10 alpha=0.5,0.7,0.9

Every run goes through `accelerate launch` and the two scripts, into their own run folders: finished ones are reused,
killed ones resumed, and the same command started again goes on. All flags of distill_student.py that are no method's
may follow. --grid sweeps a method's flags on the first seed, picks on validation, and only the picked setting reads the
test set. It ends with the report (python -m kd.report).
"""

import argparse
import dataclasses
import itertools
import json
import sys
from pathlib import Path

from kd.cli import parse
from kd.config import METHODS, DistillConfig
from kd.cores import cores
from kd.errors import UserError, exit_code, nearest, require
from kd.presets import PRESETS, distill_defaults, train_defaults
from kd.tasks import Runner, Task

GRID_VIEWS = 10  # views of each image in a study with a grid, unless --views says otherwise: what one cache holds
SMOOTHING = "0.1"  # of the second control; the share that its paper uses (arXiv:1512.00567, section 7)
OURS = ("--seed", "--resume", "--auto-resume", "--resume-inexact", "--control", "--no-control", "--test", "--no-test")


@dataclasses.dataclass(frozen=True)
class Study:
    """What was asked for, checked."""

    preset: str
    methods: tuple[str, ...]
    seeds: tuple[int, ...]
    jobs: int
    grid: dict[str, tuple[str, ...]]
    launch: str
    out: Path
    rest: tuple[str, ...]  # common flags, passed on

    def student(self, method: str, seed: int, *flags: str) -> Task:
        """A run of distill_student.py; tyro and our own checks refuse a bad flag here, before anything starts."""
        args = [
            method,
            "--preset",
            self.preset,
            *self.rest,
            "--seed",
            str(seed),
            "--auto-resume",
            "--no-control",
            *flags,
        ]
        parse(distill_defaults, "", args)
        shown = " ".join(flag for flag in flags if flag != "--no-test")
        return Task(" ".join([method, shown, f"seed {seed}"]).replace("  ", " "), _script("distill_student.py"), args)

    def teacher(self) -> list[Task]:
        """The recipe's teacher, in the very folder where the students look for it; none where --teacher names one."""
        config = parse(distill_defaults, "", ["--preset", self.preset, *self.rest])
        if config.teachers:
            return []
        args = ["--preset", self.preset, *teacher_flags(config), "--auto-resume"]
        return [Task(f"teacher seed {config.teacher_seed}", _script("train_teacher.py"), args)]

    def controls(self) -> list[Task]:
        smoothing = ("--label-smoothing", SMOOTHING)
        return [self.student("none", seed, *flags) for flags in ((), smoothing) for seed in self.seeds]

    def settings(self, method: str) -> list[tuple[str, ...]]:
        """The grid's flags for a method: one empty setting where it has no such flags."""
        if not self.grid or not _takes(method, self.grid):
            return [()]
        flags = [[(f"--{name.replace('_', '-')}", value) for value in values] for name, values in self.grid.items()]
        return [tuple(itertools.chain(*setting)) for setting in itertools.product(*flags)]


def teacher_flags(config: DistillConfig) -> list[str]:
    """train_teacher.py's flags for the teacher that distill_student.py would train on the way."""
    job, default = config.teacher_job(), train_defaults(config.preset)
    flags = ["--model", job.model]
    for part in ("data", "views", "fit", "run"):
        ours, usual = getattr(job, part), getattr(default, part)
        for entry in dataclasses.fields(ours):
            value = getattr(ours, entry.name)
            if value != getattr(usual, entry.name) and entry.name != "auto_resume":
                flags += _flag({"source": "data", "count": "views"}.get(entry.name, entry.name), value)
    return flags


def _flag(name: str, value: object) -> list[str]:
    name = name.replace("_", "-")
    if isinstance(value, bool):
        return [f"--{name}" if value else f"--no-{name}"]
    return [f"--{name}", *(map(str, value) if isinstance(value, tuple) else [str(value)])]


def _takes(method: str, grid: dict) -> bool:
    return set(grid) <= {entry.name for entry in dataclasses.fields(METHODS[method])}


def _script(name: str) -> Path:
    path = Path(__file__).resolve().parent.parent / name
    require(path.exists(), f"{path} is not there: kd.study runs the scripts beside kd/, so work from the checkout")
    return path


def read_command_line(args: list[str] | None) -> Study:
    """Raises UserError, or exits with 2, for what cannot be run."""
    parser = argparse.ArgumentParser("python -m kd.study", description=__doc__, allow_abbrev=False)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--preset", default="report", choices=PRESETS, help="the recipe (default: report)")
    parser.add_argument("--methods", nargs="+", default=["kd"], metavar="METHOD", help="default: kd")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], help="default: 0 1 2")
    parser.add_argument("--grid", nargs="+", default=[], metavar="FLAG=V,V", help="a method's flags to sweep")
    parser.add_argument("--jobs", type=int, default=1, help="runs at once, which share cores and GPUs (default: 1)")
    parser.add_argument("--launch", default="", help="flags for accelerate launch, in one string")
    parser.add_argument("--out", type=Path, default=Path("report"), help="the report and the logs (default: report)")
    given, rest = parser.parse_known_args(args)
    for method in given.methods:
        require(method != "none", "--methods none: the student alone is always run, as a control")
        require(method in METHODS, f"--methods {method}: no such method; {nearest(method, METHODS)}")
    for flag in (word.split("=")[0] for word in rest):
        require(flag not in OURS, f"{flag}: the study sets it itself; --seeds chooses the seeds")
    require(given.jobs >= 1, f"--jobs {given.jobs}: give 1 or more")
    require(not given.out.exists() or given.out.is_dir(), f"--out {given.out}: is a file; name a folder")
    if given.jobs > 1 and not any(word.startswith("--threads") for word in rest):
        rest += ["--threads", str(max(cores() // given.jobs, 1))]
    methods, seeds = tuple(dict.fromkeys(given.methods)), tuple(dict.fromkeys(given.seeds))
    grid = read_grid(given.grid, methods)
    if not any(word.startswith("--wandb-group") for word in rest):
        rest += ["--wandb-group", group_name(given.preset, rest)]
    if grid:
        rest += cache_flags(given.preset, rest)
    return Study(given.preset, methods, seeds, given.jobs, grid, given.launch, given.out, tuple(rest))


def group_name(preset: str, rest: list[str]) -> str:
    """What W&B groups the study's runs under."""
    config = parse(distill_defaults, "", ["--preset", preset, *rest])
    teacher = "+".join(Path(folder).name for folder in config.teacher) or config.teacher_model
    return f"study-{preset}-{teacher}-{config.student}"[:128]


def cache_flags(preset: str, rest: list[str]) -> list[str]:
    """What makes one teacher's cache serve a whole grid; the controls see the same views, so that they compare."""
    config = parse(distill_defaults, "", ["--preset", preset, *rest])
    views = [] if config.views.count else ["--views", str(min(GRID_VIEWS, config.fit.epochs))]
    return views + ([] if config.cache.cache_teacher else ["--cache-teacher"])


def read_grid(words: list[str], methods: tuple[str, ...]) -> dict[str, tuple[str, ...]]:
    grid = {}
    for word in words:
        name, _, values = word.partition("=")
        grid[name.removeprefix("--").replace("-", "_")] = tuple(value for value in values.split(",") if value)
        require(all(grid.values()), f"--grid {word}: write FLAG=VALUE,VALUE, such as temperature=2,5,10")
    fits = [method for method in methods if _takes(method, grid)]
    there = {entry.name for method in methods for entry in dataclasses.fields(METHODS[method])}
    require(bool(fits), f"--grid {' '.join(words)}: none of {', '.join(methods)} has these; {nearest('', there)}")
    return grid


def pick(tasks: list[Task]) -> int:
    """The setting that was best on validation after its last epoch; of equals the one with the lower loss.

    Raises UserError where none has finished, or there is no validation split.
    """
    from kd.files import read_json  # which imports torch

    scores = {}
    for number, task in enumerate(tasks):
        if task.folder is not None:
            try:
                summary = read_json(task.folder / "summary.json")
                last = json.loads((task.folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()[-1])
                if summary["val_top1_last"] is not None:
                    scores[number] = (-float(summary["val_top1_last"]), float(last["val/loss"]), number)
            except (UserError, OSError, ValueError, KeyError, IndexError, TypeError):
                continue  # somebody has touched it since: no setting to pick
    require(bool(scores), "no setting of the grid has a validation score to pick by")
    return min(scores, key=scores.get)


def carry_out(study: Study) -> list[Task]:
    """Run everything there is to run; each task knows how it ended."""
    first, controls = study.teacher(), study.controls()
    sweeps = {method: study.settings(method) for method in study.methods}
    swept = {method: settings for method, settings in sweeps.items() if len(settings) > 1}
    trials = {
        method: [study.student(method, study.seeds[0], *setting, "--no-test") for setting in settings]
        for method, settings in swept.items()
    }
    grid = [task for tasks in trials.values() for task in tasks]
    total = len(first) + len(controls) + len(grid) + len(study.methods) * len(study.seeds)
    with Runner(study.jobs, study.launch, study.out / "logs", total) as runner:
        runner.run([*first, *controls])
        without = "its teacher failed" if any(task.failure for task in first) else ""
        runner.skip(grid, without) if without else runner.run(grid)
        for method, settings in sweeps.items():
            flags, why = settings[0], without
            if method in swept and not without:
                try:
                    flags = settings[pick(trials[method])]
                    runner.say(f"{method}: picked {' '.join(flags)} on validation")
                except UserError as error:
                    why = str(error)
            # A picked setting's first seed is a trial that has finished: it only reads the test set.
            tasks = [study.student(method, seed, *flags) for seed in study.seeds]
            runner.skip(tasks, why) if why else runner.run(tasks)
        return runner.done


def main(args: list[str] | None = None) -> list[Task]:
    """The study and its report; returns the runs that failed."""
    study = read_command_line(args)
    config = parse(distill_defaults, "", ["--preset", study.preset, *study.rest])
    require(
        config.data.val_fraction > 0 or not any(len(study.settings(method)) > 1 for method in study.methods),
        "--grid: picks on validation, and there is none with --val-fraction 0; give a share",
    )
    from kd.report import show, write_report  # they import torch, which --help need not wait for
    from kd.results import Other
    from kd.tracking import track_report

    tasks = carry_out(study)
    failed = [task for task in tasks if task.failure]
    folders = [str(task.folder) for task in tasks if task.folder]
    folders += [name for name in config.teachers if Path(name).is_dir()]
    failures = tuple(Other(task.label, "failed", task.failure) for task in failed)
    blocks = write_report(folders, study.out, failures, trust_code=True)  # this command has just run that code
    show(blocks, study.out)
    track_report(blocks, study.out, config.run)
    return failed


if __name__ == "__main__":
    failed = []
    code = exit_code(lambda: failed.extend(main()))
    sys.exit(code or int(bool(failed)))
