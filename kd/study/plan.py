"""A study's plan: its command line, checked before anything starts, as commands of distill_student.py."""

import argparse
import dataclasses
import itertools
import os
import shlex
from collections.abc import Sequence
from pathlib import Path

from kd.config import DistillConfig, named_method
from kd.config.cli import file_of, parse
from kd.config.defaults import distill_defaults
from kd.config.methods import KDConfig, method_name, methods_without_labels
from kd.config.presets import PRESETS
from kd.errors import UserError, nearest, require
from kd.study.runner import Task, parse_launch_flags
from kd.utils.system import cores, script_path

GRID_VIEWS = 10  # views of each image in a study with a grid, unless --views is given: one cache stores them all

SMOOTHING = "0.1"  # label smoothing of the second control: its paper's share (arXiv:1512.00567, section 7)

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


OF_OWN_TEACHER = ("--teacher-seed", "--teacher-init", "--teacher-model-args")


def _without(rest: Sequence[str], names: Sequence[str]) -> list[str]:
    """The words without these flags, each of which has one value."""
    left, words = [], iter(rest)
    for word in words:
        if word in names:
            next(words, None)
        elif word.partition("=")[0] not in names:
            left.append(word)
    return left


# By a run's own flag, those that would win over it: left out, and None in place of what a file of --config says.
WINNING = {"--epochs": "--steps", "--lr": "--lr-per-256"}
MAY_BE_NONE = (*WINNING.values(), "--teacher-init", "--teacher-model-args")


def _for_run(rest: tuple[str, ...], flags: tuple[str, ...]) -> list[str]:
    """The study's flags for a run with `flags` of its own, without those that would win over them or exclude them."""
    named = {flag.partition("=")[0] for flag in flags}
    winning = [other for flag, other in WINNING.items() if flag in named and other not in named]
    own = OF_OWN_TEACHER if "--teacher" in named else ()
    rest = _without(rest, (*winning, *own))
    if file_of(rest):
        rest += [word for flag in (*winning, *own) if flag in MAY_BE_NONE for word in (flag, "None")]
    return rest


@dataclasses.dataclass(frozen=True)
class Study:
    """A study's command line, parsed and checked."""

    preset: str
    methods: tuple[str, ...]
    seeds: tuple[int, ...]
    jobs: int
    grid: dict[str, tuple[str, ...]]
    launch: tuple[str, ...]  # flags of accelerate launch
    out: Path
    rest: tuple[str, ...]  # common flags, passed on to every run
    shares: tuple[str, ...] = ()  # of the labels; empty: all of them, and nothing is said of it
    pretrain: tuple[str, ...] = ()  # a method and its flags, with which a student is first trained on all images
    fine_tune: tuple[str, ...] = ()  # flags of the run that goes on from there

    def student(self, method: str, seed: int, *flags: str, label: str = "") -> Task:
        """A run of distill_student.py, named `label` or by its flags.

        Parsing its flags here refuses a bad one before anything starts.
        """
        args = [method, "--preset", self.preset, *_for_run(self.rest, flags), "--seed", str(seed)]
        args += ["--auto-resume", "--no-control", *flags]
        config = parse(distill_defaults, "", args).for_method()
        label = label or " ".join([method, *(flag for flag in flags if flag != "--no-test"), f"seed {seed}"])
        needs = named_method(method).needs_teacher
        own = None if config.teachers or config.cache.cache_from else config.teacher_job()
        return Task(label, script_path("distill_student.py"), args, needs_teacher=needs, own_teacher=own)

    def students(self, method: str, flags: tuple[str, ...]) -> list[Task]:
        """A method's runs with these flags, one a seed."""
        return [self.student(method, seed, *flags) for seed in self.seeds]

    def controls(self, share: str | None = None) -> list[Task]:
        """The student alone, without and with label smoothing, with all labels or a share of them.

        None without labels, which both are trained by.
        """
        if _parsed(self, "none").data.no_labels:
            return []
        flags = ("--label-share", share) if share else ()
        return [*self.students("none", flags), *self.students("none", (*flags, "--label-smoothing", SMOOTHING))]

    def with_share(self, method: str, share: str, teacher: Path | None = None) -> list[Task]:
        """A method's runs with this share of the labels, one a seed; `teacher`: the run of one that was trained here.

        The code of that one's network is the user's own, as it would be if the run had trained it itself.
        """
        flags = ("--label-share", share, *(("--teacher", str(teacher), "--trust-code") if teacher else ()))
        label = f"{method} --label-share {share}"
        return [self.student(method, seed, *flags, label=f"{label} seed {seed}") for seed in self.seeds]

    def pretraining(self, seed: int) -> Task:
        """The student's first training, on all images, which fine-tuning starts from."""
        method, *flags = self.pretrain
        return self.student(method, seed, *flags, label=f"{method} to start from, seed {seed}")

    def fine_tuning(self, seed: int, share: str, start: str) -> Task:
        """The training, with this share of the labels, that goes on from the run folder `start`."""
        flags = (*self.fine_tune, "--init", start, "--label-share", share)
        label = f"{self.pretrain[0]}, then fine-tuned --label-share {share} seed {seed}"
        return self.student("none", seed, *flags, label=label)

    def lacks(self, method: str) -> list[str]:
        """The grid's flags that a method does not have. If there is any, the method is not swept."""
        return [name for name in self.grid if name not in _flags_of(method)]

    def settings(self, method: str) -> list[tuple[str, ...]]:
        """The grid's settings for a method, each as flags; one without flags if the method is not swept."""
        if not self.grid or self.lacks(method):
            return [()]
        flags = [[(f"--{name.replace('_', '-')}", value) for value in values] for name, values in self.grid.items()]
        return [tuple(itertools.chain(*setting)) for setting in itertools.product(*flags)]


def _flags_of(method: str) -> set[str]:
    return {entry.name for entry in dataclasses.fields(named_method(method))}


def read_command_line(args: list[str] | None, description: str = "") -> Study:
    """Parse a study's flags. Raises UserError, or exits with 2, if they are wrong."""
    parser = argparse.ArgumentParser("python -m kd.study", description=description, allow_abbrev=False)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--preset", choices=PRESETS, help="the recipe (default: as for distill_student.py)")
    parser.add_argument("--methods", nargs="+", default=["kd"], metavar="METHOD", help="default: kd")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], help="default: 0 1 2")
    parser.add_argument("--grid", nargs="+", default=[], metavar="FLAG=V,V", help="a method's flags to sweep")
    parser.add_argument("--label-shares", nargs="+", metavar="SHARE", help="every run with each share of the labels")
    parser.add_argument(
        "--pretrain", default="", metavar="'METHOD ...'", help="distil first so, on all images; then fine-tune"
    )
    parser.add_argument("--fine-tune", default="", metavar="'FLAG ...'", help="flags of that fine-tuning alone")
    parser.add_argument("--jobs", type=int, default=1, help="runs at once, on the GPUs in turn (default: 1)")
    parser.add_argument("--launch", default="", help="flags for accelerate launch, in one string")
    parser.add_argument("--out", type=Path, default=Path("report"), help="the report and the logs (default: report)")
    given, rest = parser.parse_known_args(args)
    rest = [_with_dashes(word) for word in rest]
    _check(given, rest)
    launch = parse_launch_flags(given.launch, given.jobs)
    typed = _typed(given, rest)
    preset = typed.preset  # if left out, it follows from --data, and from methods that embed
    if given.jobs > 1 and typed.run.threads is None:
        rest += ["--threads", str(max(cores() // given.jobs, 1))]
    methods, seeds = tuple(dict.fromkeys(given.methods)), tuple(dict.fromkeys(given.seeds))
    grid = read_grid(given.grid, methods)
    if typed.run.wandb_group is None:
        rest += ["--wandb-group", group_name(preset, rest)]
    if any(len(values) > 1 for values in grid.values()):  # one setting alone is no reason to see fewer views
        rest += cache_flags(preset, rest)
    shares = read_shares(given.label_shares or (["1"] if given.pretrain else []))
    pretrain, fine_tune = (split_words(given, name) for name in ("pretrain", "fine_tune"))
    own = (preset, methods, seeds, given.jobs, grid, launch, given.out, tuple(rest))
    study = Study(*own, shares, pretrain, fine_tune)
    check_few_labels(study)
    return study


def _typed(given: argparse.Namespace, rest: list[str]) -> DistillConfig:
    """The study's common flags, parsed with its preset, or with the usual one of its data and methods."""
    method = given.methods[:1] if all(named_method(name).embeds for name in given.methods) else []
    preset = ["--preset", given.preset] if given.preset else []
    return parse(distill_defaults, "", [*method, *preset, *rest])


def _with_dashes(word: str) -> str:
    """Write a flag's name with dashes: tyro takes --no_test for --no-test."""
    name, equals, value = word.partition("=")
    return f"{name.replace('_', '-')}{equals}{value}" if name.startswith("--") else word


def _check(given: argparse.Namespace, rest: list[str]) -> None:
    """Raises UserError for a wrong value of the study's own flags, and for flags that the study sets itself."""
    require(
        os.environ.get("WORLD_SIZE", "1") in ("", "0", "1"),
        "a launcher started kd.study in several processes: start it once; it launches processes itself, as many as"
        " --launch '--num_processes N' says",
    )
    for method in given.methods:
        require(method != "none", "--methods none: the student alone is always run, as a control")
        named_method(method)  # raises if there is none
    for flag in (word.split("=")[0] for word in rest):
        require(flag not in STUDY_FLAGS, f"{flag}: the study sets it itself; --seeds chooses the seeds")
    for word in ("--push-to", "--push-every"):
        require(word not in [flag.split("=")[0] for flag in rest], f"{word}: every run would replace the one before")
    _check_file(given, rest)
    require(given.jobs >= 1, f"--jobs {given.jobs}: give 1 or more")
    require(not given.out.exists() or given.out.is_dir(), f"--out {given.out}: is a file; name a folder")


def _check_file(given: argparse.Namespace, rest: list[str]) -> None:
    """Raises UserError if a file of --config sets what the study sets itself."""
    if not (file := file_of(rest)):
        return
    config = _typed(given, rest)
    run, method = config.run, method_name(config.method)
    alone = run.test and run.out is None and run.push_to is None and not run.resume
    require(
        alone, "--config: has test, out, push-to or resume, which the study sets itself; leave them out of the file"
    )
    usual = method_name(PRESETS[config.preset].get("method", KDConfig()))
    named = method in (*given.methods, usual)
    require(named, f"--config: has the method {method}; a study's methods are those of --methods, with their defaults")
    own = file.keys() & {entry.name.replace("_", "-") for entry in dataclasses.fields(config.method)}
    require(
        "method" in file or not own,
        f"--config: has {', '.join(sorted(own))}, which is of methods, and the study's controls have none; leave it"
        " out, or name the method in the file",
    )


def group_name(preset: str, rest: list[str]) -> str:
    """The study's group on W&B."""
    config = parse(distill_defaults, "", ["--preset", preset, *rest])
    teacher = "+".join(Path(folder).name for folder in config.teacher) or config.teacher_model
    return f"study-{preset}-{teacher}-{config.student}"[:128]


def cache_flags(preset: str, rest: list[str]) -> list[str]:
    """Flags with which all settings of a grid share one cache of the teacher's logits.

    The controls get them too: they are comparable only if they see the same views.
    """
    config = parse(distill_defaults, "", ["--preset", preset, *rest])
    require(
        "--no-cache-teacher" not in rest,
        "--no-cache-teacher: the settings of a grid share one cache of the teacher's logits; leave it out",
    )
    # --preset own leaves the epochs to the data, and has GRID_VIEWS of them at least; so does --steps.
    epochs = GRID_VIEWS if config.fit.steps else config.fit.epochs or GRID_VIEWS
    views = [] if config.views.count else ["--views", str(min(GRID_VIEWS, epochs))]
    return views + ([] if config.cache.cache_teacher else ["--cache-teacher"])


def read_grid(words: list[str], methods: tuple[str, ...]) -> dict[str, tuple[str, ...]]:
    """--grid as flag -> values. Raises UserError if a word is malformed, or no method has all of these flags."""
    grid = {}
    for word in words:
        name, _, values = word.partition("=")
        name = name.removeprefix("--").replace("-", "_")
        require(name not in grid, f"--grid {word}: {name} is given twice; write all its values in one list")
        grid[name] = tuple(value for value in values.split(",") if value)
        require(all(grid.values()), f"--grid {word}: write FLAG=VALUE,VALUE, such as temperature=2,5,10")
        different = len(set(map(_number, grid[name]))) == len(grid[name])
        require(different, f"--grid {word}: has a value twice, which would be two trials of one run; give it once")
    swept = any(grid.keys() <= _flags_of(method) for method in methods)
    flags = set().union(*map(_flags_of, methods))
    require(swept, f"--grid {' '.join(words)}: none of {', '.join(methods)} has these; {nearest('', flags)}")
    return grid


def split_words(given: argparse.Namespace, name: str) -> tuple[str, ...]:
    """The words of a flag that holds others. Raises UserError if a shell could not split it."""
    value = getattr(given, name)
    try:
        return tuple(_with_dashes(word) for word in shlex.split(value))
    except ValueError as error:
        raise UserError(f"--{name.replace('_', '-')} {value}: {error}; quote it as for a shell") from error


def read_shares(words: list[str]) -> tuple[str, ...]:
    """--label-shares, the smallest first. Raises UserError for what is no share."""
    for word in words:
        share = _number(word)
        require(isinstance(share, float) and 0 < share <= 1, f"--label-shares {word}: give shares above 0, up to 1")
    different = len(set(map(_number, words))) == len(words)
    require(different, f"--label-shares {' '.join(words)}: has a share twice; give it once")
    return tuple(sorted(words, key=_number))


def check_few_labels(study: Study) -> None:
    """Raise UserError for flags of --label-shares and --pretrain that exclude each other, or of their runs."""
    require(not study.fine_tune or bool(study.pretrain), "--fine-tune: needs --pretrain 'METHOD ...'")
    if not study.shares:
        return
    require(not study.grid, "--grid: leave --label-shares and --pretrain out; a grid's settings are picked first")
    for flag in (word.split("=")[0] for word in (*study.rest, *study.pretrain, *study.fine_tune)):
        require(flag not in ("--label-share", "--seed"), f"{flag}: the study sets it itself; leave it out")
    for flag in (word.split("=")[0] for word in study.pretrain):
        require(
            flag != "--init", "--pretrain: nothing that it is compared with begins with --init; give it to the study"
        )
    for flag in (word.split("=")[0] for word in study.fine_tune):
        require(flag != "--init", "--fine-tune --init: the study sets it itself; leave it out")
    require(
        not study.pretrain or _parsed(study, "none").compress.prune == 0,
        "--prune: the fine-tuning after --pretrain would prune once more; prune a student first, and name its run with"
        " --init",
    )
    for method in study.methods:
        require(
            not named_method(method).embeds or float(study.shares[0]) == 1,
            f"--methods {method}: reads no labels, of which --label-shares takes shares; name it with --pretrain",
        )
    for share in study.shares:
        for method in ("none", *study.methods):
            study.with_share(method, share)
            if needs_own_teacher(study, method):  # which the study names once it is trained
                study.with_share(method, share, Path("TEACHER"))
    if study.pretrain:
        _check_pretraining(study)
    require(
        float(study.shares[-1]) == 1
        or pretrains_own_teacher(study)
        or not any(needs_own_teacher(study, method) for method in study.methods),
        f"--label-shares {' '.join(study.shares)}: add 1, whose run trains the teacher with all labels, or name a"
        " --teacher",
    )


def _check_pretraining(study: Study) -> None:
    method, *flags = study.pretrain
    given = f"--pretrain {' '.join(study.pretrain)}"
    require(not method.startswith("-"), f"{given}: name the method first")
    named_method(method)  # raises if there is none
    require(method != "none", f"{given}: needs a method with a teacher; the student alone is a control")
    study.pretraining(study.seeds[0])
    study.fine_tuning(study.seeds[0], study.shares[0], "RUN")
    config = _parsed(study, method, flags)
    reads_labels = config.for_method().method.uses_labels and not config.data.no_labels
    same_images = config.data.source == _parsed(study, "none").data.source
    require(
        float(study.shares[0]) == 1 or not (reads_labels and same_images),
        f"{given}: learns from all labels, of which --label-shares takes shares; methods that need none:"
        f" {methods_without_labels()}",
    )


def _parsed(study: Study, method: str, flags: Sequence[str] = ()) -> DistillConfig:
    return parse(distill_defaults, "", [method, "--preset", study.preset, *study.rest, *flags])


def needs_own_teacher(study: Study, method: str, flags: Sequence[str] = ()) -> bool:
    """Whether a run of this method trains the recipe's own teacher first, or finds it trained."""
    config = _parsed(study, method, flags)
    return named_method(method).needs_teacher and not (config.teachers or config.cache.cache_from)


def pretrains_own_teacher(study: Study) -> bool:
    """Whether the first training's own teacher is the very one that the methods' recipe trains.

    With other epochs or data for the first training it is another one, which does not teach the methods.
    """
    if not study.pretrain or not needs_own_teacher(study, study.pretrain[0], study.pretrain[1:]):
        return False
    first, recipe = _parsed(study, *study.pretrain[:1], study.pretrain[1:]), _parsed(study, "none")
    return first.teacher_job() == recipe.teacher_job()


def _number(value: str) -> float | str:
    """2 and 2.0 are the same setting."""
    try:
        return float(value)
    except ValueError:
        return value
