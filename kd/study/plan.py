"""What a study is to run: its command line, checked before anything starts, as the scripts' own commands."""

import argparse
import dataclasses
import itertools
import os
from pathlib import Path

from kd.config import METHODS, DistillConfig
from kd.config.cli import parse
from kd.config.presets import PRESETS, distill_defaults, train_defaults
from kd.errors import nearest, require
from kd.study.runner import Task, parse_launch_flags
from kd.utils.system import cores

GRID_VIEWS = 10  # views of each image in a study with a grid, unless --views says otherwise: what one cache holds


SMOOTHING = "0.1"  # of the second control; the share that its paper uses (arXiv:1512.00567, section 7)


STUDY_FLAGS = (
    "--seed",
    "--resume",
    "--auto-resume",
    "--resume-inexact",
    "--control",
    "--no-control",
    "--test",
    "--no-test",
)


@dataclasses.dataclass(frozen=True)
class Study:
    """What was asked for, checked."""

    preset: str
    methods: tuple[str, ...]
    seeds: tuple[int, ...]
    jobs: int
    grid: dict[str, tuple[str, ...]]
    launch: tuple[str, ...]  # flags of accelerate launch
    out: Path
    rest: tuple[str, ...]  # common flags, passed on

    def student(self, method: str, seed: int, *flags: str) -> Task:
        """A run of distill_student.py; tyro and our own checks refuse a bad flag here, before anything starts."""
        args = [method, "--preset", self.preset, *self.rest, "--seed", str(seed)]
        args += ["--auto-resume", "--no-control", *flags]
        parse(distill_defaults, "", args)
        shown = " ".join(flag for flag in flags if flag != "--no-test")
        return Task(" ".join([method, shown, f"seed {seed}"]).replace("  ", " "), _script("distill_student.py"), args)

    def teacher(self) -> list[Task]:
        """The recipe's teacher, in the folder where its students look for it; none if one is named or none is asked."""
        config = parse(distill_defaults, "", ["--preset", self.preset, *self.rest])
        if config.teachers or not any(METHODS[method].needs_teacher for method in self.methods):
            return []
        args = ["--preset", self.preset, *teacher_flags(config), "--auto-resume"]
        return [Task(f"teacher seed {config.teacher_seed}", _script("train_teacher.py"), args)]

    def controls(self) -> list[Task]:
        smoothing = ("--label-smoothing", SMOOTHING)
        return [self.student("none", seed, *flags) for flags in ((), smoothing) for seed in self.seeds]

    def lacks(self, method: str) -> list[str]:
        """The grid's flags that a method does not have: with any of them it is not swept at all."""
        return [name for name in self.grid if not _takes(method, {name: ()})]

    def settings(self, method: str) -> list[tuple[str, ...]]:
        """The grid's flags for a method: one empty setting where it is not swept."""
        if not self.grid or self.lacks(method):
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
    path = Path(__file__).resolve().parents[2] / name
    require(path.exists(), f"{path} is not there: kd.study runs the scripts beside kd/, so work from the checkout")
    return path


def read_command_line(args: list[str] | None, description: str = "") -> Study:
    """Raises UserError, or exits with 2, for what cannot be run."""
    parser = argparse.ArgumentParser("python -m kd.study", description=description, allow_abbrev=False)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--preset", choices=PRESETS, help="the recipe (default: as for distill_student.py)")
    parser.add_argument("--methods", nargs="+", default=["kd"], metavar="METHOD", help="default: kd")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], help="default: 0 1 2")
    parser.add_argument("--grid", nargs="+", default=[], metavar="FLAG=V,V", help="a method's flags to sweep")
    parser.add_argument("--jobs", type=int, default=1, help="runs at once, which share cores and GPUs (default: 1)")
    parser.add_argument("--launch", default="", help="flags for accelerate launch, in one string")
    parser.add_argument("--out", type=Path, default=Path("report"), help="the report and the logs (default: report)")
    given, rest = parser.parse_known_args(args)
    rest = [_as_we_write_it(word) for word in rest]
    _check(given, rest)
    launch = parse_launch_flags(given.launch, given.jobs)
    preset = given.preset or parse(distill_defaults, "", rest).preset  # which follows from --data
    if given.jobs > 1 and not any(word.startswith("--threads") for word in rest):
        rest += ["--threads", str(max(cores() // given.jobs, 1))]
    methods, seeds = tuple(dict.fromkeys(given.methods)), tuple(dict.fromkeys(given.seeds))
    grid = read_grid(given.grid, methods)
    if not any(word.startswith("--wandb-group") for word in rest):
        rest += ["--wandb-group", group_name(preset, rest)]
    if grid:
        rest += cache_flags(preset, rest)
    return Study(preset, methods, seeds, given.jobs, grid, launch, given.out, tuple(rest))


def _as_we_write_it(word: str) -> str:
    """A flag's name with dashes: tyro takes --no_test for --no-test."""
    name, equals, value = word.partition("=")
    return f"{name.replace('_', '-')}{equals}{value}" if name.startswith("--") else word


def _check(given: argparse.Namespace, rest: list[str]) -> None:
    """Raises UserError for what the study's own flags cannot be, and for those that it sets itself."""
    require(
        os.environ.get("WORLD_SIZE", "1") in ("", "0", "1"),
        "a launcher started kd.study in several processes: start it once, it launches processes itself, as many as"
        " --launch '--num_processes N' says",
    )
    for method in given.methods:
        require(method != "none", "--methods none: the student alone is always run, as a control")
        require(method in METHODS, f"--methods {method}: no such method; {nearest(method, METHODS)}")
    for flag in (word.split("=")[0] for word in rest):
        require(flag not in STUDY_FLAGS, f"{flag}: the study sets it itself; --seeds chooses the seeds")
    require(given.jobs >= 1, f"--jobs {given.jobs}: give 1 or more")
    require(not given.out.exists() or given.out.is_dir(), f"--out {given.out}: is a file; name a folder")


def group_name(preset: str, rest: list[str]) -> str:
    """What W&B groups the study's runs under."""
    config = parse(distill_defaults, "", ["--preset", preset, *rest])
    teacher = "+".join(Path(folder).name for folder in config.teacher) or config.teacher_model
    return f"study-{preset}-{teacher}-{config.student}"[:128]


def cache_flags(preset: str, rest: list[str]) -> list[str]:
    """What makes one teacher's cache serve a whole grid; the controls see the same views, so that they compare."""
    config = parse(distill_defaults, "", ["--preset", preset, *rest])
    # --preset own leaves the epochs to the data, and has GRID_VIEWS of them at least.
    views = [] if config.views.count else ["--views", str(min(GRID_VIEWS, config.fit.epochs or GRID_VIEWS))]
    return views + ([] if config.cache.cache_teacher else ["--cache-teacher"])


def _number(value: str) -> float | str:
    """2 and 2.0 are the same setting."""
    try:
        return float(value)
    except ValueError:
        return value


def read_grid(words: list[str], methods: tuple[str, ...]) -> dict[str, tuple[str, ...]]:
    grid = {}
    for word in words:
        name, _, values = word.partition("=")
        name = name.removeprefix("--").replace("-", "_")
        require(name not in grid, f"--grid {word}: {name} stands there twice; write all its values in one list")
        grid[name] = tuple(value for value in values.split(",") if value)
        require(all(grid.values()), f"--grid {word}: write FLAG=VALUE,VALUE, such as temperature=2,5,10")
        different = len(set(map(_number, grid[name]))) == len(grid[name])
        require(different, f"--grid {word}: holds a value twice, which would be two trials of one run")
    fits = [method for method in methods if _takes(method, grid)]
    there = {entry.name for method in methods for entry in dataclasses.fields(METHODS[method])}
    require(bool(fits), f"--grid {' '.join(words)}: none of {', '.join(methods)} has these; {nearest('', there)}")
    return grid
