"""Groups of runs that differ only in their seed, and the controls that each group is compared with."""

import hashlib
import json
import re
from dataclasses import dataclass, field, fields
from pathlib import Path
from statistics import fmean, stdev

from kd.config import METHODS, FitConfig, ViewConfig
from kd.runs.comparison import Answers, Difference, Result, compare, holm
from kd.runs.folder import DEFAULTS_OF_NEWER_FLAGS
from kd.runs.results import Run, find_run, is_labelled, teachers_of
from kd.runs.table import COLUMNS, NO_LABELS, Metric
from kd.runs.taught_by import taught_by

NOT_READ = "not read"  # in place of a test score, after --no-test

SCORED = tuple(metric.key for metric in COLUMNS)  # what images without labels cannot give

LONGEST = 60  # letters of a setting in a label


def mean_and_deviation(values: list[float]) -> tuple[float, float | None]:
    """The mean and the sample standard deviation (n - 1), which is None for a single value."""
    return fmean(values), stdev(values) if len(values) > 1 else None


def cell(values: list[float], style: str, seeds: int, empty: str = "") -> str:
    """Mean ± sample standard deviation, followed by the number of values if it is not `seeds`, the row's number."""
    if not values:
        return empty
    mean, deviation = mean_and_deviation(values)
    shown = f"{mean:{style}}" if deviation is None else f"{mean:{style}} ± {deviation:{style}}"
    return shown if len(values) == seeds else f"{shown} ({len(values)})"


SHA256 = re.compile("[0-9a-f]{64}")

FLAG_NAMES = {"source": "data", "count": "views"}  # of flags that are called otherwise in the code

RECIPE = {entry.name for kind in (FitConfig, ViewConfig) for entry in fields(kind)}  # flags of a training's recipe

# A run of one method knows nothing of another's flags, but _recipe adds the newer ones at their defaults.
OF_METHODS = {entry.name for kind in METHODS.values() for entry in fields(kind)}

STRONG_VIEW = tuple(ViewConfig().strong)  # flags that a control without a second view need not share

TEACHER, ALONE, SMOOTHED, METHOD = KINDS = "teacher", "student alone", "label smoothing", "method"


@dataclass
class Group:
    """One row of the tables."""

    kind: str  # one of KINDS
    name: str
    runs: list[Run]
    budget: str  # what a control must share: data, views, recipe, network
    flags: dict  # what distinguishes it from other groups of its name
    external_teacher: str = ""  # its teacher's name, if that is not among these runs
    setting: str = ""  # the flags that differ, in words
    namesake: bool = False  # whether a group of another network has the same label
    task: str = ""  # what a control must share at least: data, network, share of the labels
    fine_tuned: bool = False  # from a distilled run
    controls: list["Group"] = field(default_factory=list)

    @property
    def model(self) -> str:
        return self.runs[0].summary["model"]

    @property
    def distilled(self) -> bool:
        return self.kind == METHOD

    @property
    def tested(self) -> list[Run]:
        return [run for run in self.runs if run.tested]

    @property
    def labelled(self) -> bool:
        return any(is_labelled(run.summary) for run in self.runs)

    @property
    def label(self) -> str:
        return f"{self.name}, {self.setting}" if self.setting else self.name

    @property
    def title(self) -> str:
        """The label, with the network's name where that tells it from another group; for where no column has it."""
        return f"{self.label}, {self.model}" if self.namesake else self.label

    @property
    def seeds(self) -> set[int]:
        return {run.seed for run in self.runs}

    @property
    def count(self) -> str:
        """The number of seeds, and of runs if there are more."""
        several = len(self.runs) > len(self.seeds)
        return f"{len(self.seeds)} ({len(self.runs)} runs)" if several else str(len(self.seeds))

    def by_seed(self, key: str) -> dict[int, float]:
        """The score of each seed that has one: the mean over its runs, whose teachers may differ in their seed."""
        by_seed: dict[int, list[float]] = {}
        for run in self.runs:
            if run.summary.get(key) is not None:
                by_seed.setdefault(run.seed, []).append(float(run.summary[key]))
        return {seed: mean_and_deviation(values)[0] for seed, values in by_seed.items()}

    def values(self, key: str, seeds: set[int] | None = None) -> list[float]:
        """One value per seed, of all seeds that have it or of those in `seeds`."""
        return [value for seed, value in self.by_seed(key).items() if seeds is None or seed in seeds]

    def cell(self, metric: Metric) -> str:
        """A table's cell: mean ± deviation over seeds, and of how many if not all have it; NOT_READ after --no-test."""
        return cell(self.values(metric.key), metric.style, len(self.seeds), missing_cell(metric.key, self.runs))

    def mean(self, key: str, seeds: set[int] | None = None) -> float | None:
        values = self.values(key, seeds)
        return mean_and_deviation(values)[0] if values else None

    @property
    def results(self) -> list[Result]:
        return [Result(run.path, run.summary) for run in self.runs]

    @property
    def shared_teachers(self) -> int:
        """How many teachers taught, if one of them taught several seeds; else 0: then their noise is in the seeds'."""
        taught: dict[str, set[int]] = {}
        for run in self.runs:
            if teachers_of(run.summary):
                taught.setdefault(_dump(run.identity.get("teacher")), set()).add(run.seed)
        return len(taught) if any(len(seeds) > 1 for seeds in taught.values()) else 0

    @property
    def label_smoothing(self) -> float:
        return self.runs[0].method_flags.get("label_smoothing") or 0.0


@dataclass(frozen=True)
class Comparison:
    """A method against a control; `difference` is None if they share no seed with a test result."""

    group: Group
    control: Group
    difference: Difference | None
    corrected: float = 1.0  # its p-value, corrected for all comparisons on this data set
    number: int = 1  # of these comparisons

    @property
    def name(self) -> str:
        return f"{self.group.title} against {self.control.title}"

    @property
    def of_methods(self) -> bool:
        """Whether both are methods (--against), of which one is better or worse, rather than a method and a control."""
        return self.control.kind == METHOD and not self.group.fine_tuned

    @property
    def verdict(self) -> str:
        said = self.difference.verdict(self.corrected, self.number)
        if self.of_methods:
            said = said.replace("helped,", "better,").replace("hurt,", "worse,")
        return said

    def mean_gain(self, key: str) -> float | None:
        """The mean difference in another score, over the seeds that both have."""
        ours, theirs = self.group.by_seed(key), self.control.by_seed(key)
        gains = [ours[seed] - theirs[seed] for seed in sorted(ours.keys() & theirs.keys())]
        return mean_and_deviation(gains)[0] if gains else None


def compare_groups(groups: list[Group], answers: Answers) -> list[Comparison]:
    """Every tested method against each of its controls, counted as many as they are."""
    pairs = [(group, control) for group in groups if group.tested for control in group.controls]
    differences = [compare(group.results, control.results, answers) for group, control in pairs]
    corrected = iter(holm([found.p for found in differences if found]))
    number = len(differences) - differences.count(None)
    return [
        Comparison(*pair, found, next(corrected), number) if found else Comparison(*pair, None)
        for pair, found in zip(pairs, differences, strict=True)
    ]


def missing_cell(key: str, runs: list[Run]) -> str:
    """What a table shows in place of a score that none of these runs has."""
    if key in SCORED and runs and not any(is_labelled(run.summary) for run in runs):
        return NO_LABELS
    needs_test = key.startswith("test") or (key == "agreement" and any(teachers_of(run.summary) for run in runs))
    return NOT_READ if needs_test and not any(run.tested for run in runs) else ""


def by_data(runs: list[Run]) -> dict[str, list[Group]]:
    """Groups by data set: accuracies on different images are never put side by side."""
    by_path = {_resolved(run.path): run for run in runs}
    by_path |= {f"start of others: {run.path}": run for run in _starts_elsewhere(runs)}  # by no path: no teacher of any
    tasks: dict[tuple, list[Run]] = {}
    for run in runs:
        # The fingerprint of a stream does not have the images.
        column = run.identity.get("image") if run.identity.get("stream") else None
        task = run.identity["data"], run.identity.get("classes"), column
        tasks.setdefault((*task, _held_out(run, runs)), []).append(run)
    named = {}
    for (fingerprint, classes, column, held_out), members in tasks.items():
        name = f"{members[0].source}, {classes} classes" if classes else members[0].source
        name += f", {column}" if column else ""
        name += f", --test-fraction {held_out}" if held_out else ""
        name += "" if is_labelled(members[0].summary) else f", {NO_LABELS}"
        named[name if name not in named else f"{name} ({str(fingerprint)[:6]})"] = group_runs(members, by_path)
    return named


def _held_out(run: Run, runs: list[Run]) -> float | None:
    """--test-fraction, if runs on the same data differ in it: the fingerprint is of all images."""
    usual = DEFAULTS_OF_NEWER_FLAGS["test_fraction"]
    alike = [other.identity for other in runs if other.identity["data"] == run.identity["data"]]
    several = len({identity.get("test_fraction", usual) for identity in alike}) > 1
    return run.identity.get("test_fraction", usual) if several else None


def _starts_elsewhere(runs: list[Run]) -> list[Run]:
    """The runs that others started from (--init), and that were not named with them, as far as they are still there."""
    known = {run.summary.get("weights_sha256") for run in runs}
    named = [run for run in runs if run.init and run.identity.get("init") not in known]
    places = [(place, Path(run.init).expanduser()) for run in named for place in (Path(), *run.path.resolve().parents)]
    found = [find_run(place / init) for place, init in places]
    wanted = {run.identity["init"] for run in named}
    return [run for run in found if run and run.summary.get("weights_sha256") in wanted]


def group_runs(runs: list[Run], by_path: dict[str, Run]) -> list[Group]:
    """Teachers, controls, then methods; a method's controls are the same student and recipe without a teacher."""
    by_recipe: dict[str, list[Run]] = {}
    for run in sorted(runs, key=lambda run: (run.seed, str(run.path))):
        by_recipe.setdefault(_dump(_recipe(run, by_path)), []).append(run)
    distilled = {_budget(run, by_path) for run in runs if run.role not in ("none", "teacher")}
    groups = [_group(members, by_path, distilled) for members in by_recipe.values()]
    for group in groups:
        alike = [other.flags for other in groups if (other.name, other.model) == (group.name, group.model)]
        differing = [key for key in sorted(group.flags) if len({_dump(flags.get(key)) for flags in alike}) > 1]
        named = {key: FLAG_NAMES.get(key, key).replace("_", " ") for key in differing}
        group.setting = ", ".join(f"{name} {_short(group.flags[key])}" for key, name in named.items())
        group.controls = [other for other in groups if _is_control(other, group)]
        if group.fine_tuned and not group.controls:  # by a recipe of its own
            group.controls = [other for other in groups if _is_control(other, group, "task")]
    labels = [group.label for group in groups]
    for group in groups:
        group.namesake = labels.count(group.label) > 1
    return sorted(groups, key=lambda group: (KINDS.index(group.kind), group.name, group.model, _numbers(group)))


def compare_with(groups: list[Group], method: str) -> bool:
    """Make the runs of `method` a control of all other methods by the same recipe and teacher (kd.report --against).

    A method without a teacher is compared with it, too. False if there is no such pair."""
    found = False
    for group in groups:
        for other in groups:
            teachers = (None, other.flags.get("teacher"))
            alike = other.budget == group.budget and group.flags.get("teacher") in teachers
            if other.name == taught(method) != group.name and group.distilled and alike and not group.fine_tuned:
                group.controls.append(other)
                found = True
    return found


def taught(method: str) -> str:
    """The name of the groups of a method's students."""
    return f"student ({method})"


def _budget(run: Run, by_path: dict[str, Run], fine_tuned: bool = False, task: bool = False) -> str:
    """What a control must share with a run: all flags but those of the method, its teacher and cache.

    `fine_tuned`: whether it goes on from a distilled run; then what counts is where that one began. `task`: nor need
    it share the recipe of the training.
    """
    recipe = _recipe(run, by_path)
    if fine_tuned:
        began = _recipe(_start(run, by_path), by_path)
        recipe = {key: value for key, value in recipe.items() if key != "init"}
        recipe |= {"init": began["init"]} if "init" in began else {}
    left_out = {"role", "teacher", "cache_teacher", "cache_dtype", "cache_top_k", "cache_from", "shared_cache"}
    left_out |= {*STRONG_VIEW, *OF_METHODS, *run.method_flags}
    left_out |= {key for key in recipe if key.endswith("layers")}  # those compared, as DistillationLoss.identity has it
    left_out |= RECIPE if task else set()
    return _dump({key: value for key, value in recipe.items() if key not in left_out})


def _group(runs: list[Run], by_path: dict[str, Run], distilled: set[str]) -> Group:
    """The group of some runs; `distilled` holds the budgets of all distilled ones."""
    first = runs[0]
    recipe = _recipe(first, by_path)
    start = _start(first, by_path)
    fine_tuned = first.role in ("none", "teacher") and start is not None and start.role not in ("none", "teacher")
    if first.role == "none" and _budget(first, by_path) in distilled:
        fine_tuned = False  # one that is distilled further began as it did (--init): it is that one's control
    budget, task = (_budget(first, by_path, fine_tuned, task) for task in (False, True))
    if fine_tuned:
        name = f"student ({start.role}, then fine-tuned)"
        return Group(METHOD, name, runs, budget, recipe, task=task, fine_tuned=True)
    kind = {"teacher": TEACHER, "none": ALONE}.get(first.role, METHOD)
    smoothing = first.method_flags.get("label_smoothing")
    if kind == ALONE and smoothing:
        return Group(SMOOTHED, f"{ALONE}, {SMOOTHED} {smoothing}", runs, budget, recipe, task=task)
    external = recipe["teacher"] if any(run is None for _, _, run in _teachers(first, by_path)) else ""
    name = kind if kind != METHOD else taught(first.role)
    return Group(kind, name, runs, budget, recipe, external, task=task)


def _recipe(run: Run, by_path: dict[str, Run]) -> dict:
    """What the seeds of one group share. Teachers that differ only in their seed count as the same."""
    # An identity leaves out newer flags at their defaults; a grid over one of them compares it with other values.
    recipe = {key: value for key, value in (DEFAULTS_OF_NEWER_FLAGS | run.identity).items() if key != "seed"}
    if teachers := _teachers(run, by_path):
        names = " and ".join(_family(run) if run else _external_name(name, model) for name, model, run in teachers)
        known = all(teacher is not None for _, _, teacher in teachers)
        names = names if known else f"{names} {_hash(recipe['teacher'])}"  # a name does not identify the weights
        recipe["teacher"] = names if len(names) <= LONGEST else f"{len(teachers)} networks {_hash(names)}"
    if (start := _start(run, by_path)) is not None:
        recipe["init"] = f"{start.role} {start.identity['model']} {_hash(_recipe(start, by_path))}"
    return recipe


def _start(run: Run, by_path: dict[str, Run]) -> Run | None:
    """The run that this one started from (--init), if it is among these."""
    sha256 = run.identity.get("init")
    known = (other for other in by_path.values() if sha256 and other is not run)
    return next((other for other in known if other.summary.get("weights_sha256") == sha256), None)


def _teachers(run: Run, by_path: dict[str, Run]) -> list[tuple[str, str, Run | None]]:
    """Each teacher's name, its model ("" if not recorded), and its run (None if it is not among these runs)."""
    names, models = teachers_of(run.summary), teachers_of(run.summary, "teacher_model")
    models += [""] * (len(names) - len(models))
    found = [(name, model, _named(run, name, model, by_path)) for name, model in zip(names, models, strict=False)]
    known = [teacher for _, _, teacher in found if teacher]
    if len(known) < len(found) or taught_by(run, known):
        return found
    return [(name, model, None) for name, model, _ in found]


def _named(run: Run, name: str, model: str, by_path: dict[str, Run]) -> Run | None:
    """The run of the folder that this one calls `name`: from here, or from where it was trained, if elsewhere."""
    places = (*run.path.resolve().parents, Path())
    found = (by_path.get(_resolved(place / name)) for place in places)
    return next((teacher for teacher in found if teacher and model in ("", teacher.identity["model"])), None)


def _family(teacher: Run) -> str:
    recipe = {key: value for key, value in teacher.identity.items() if key != "seed"}
    return f"{teacher.identity['model']} {_hash(recipe)}"


def _external_name(name: str, model: str) -> str:
    """A teacher that is not among these runs: its model, and the file or folder that it came from."""
    return model if name == model else f"{model} from {Path(name).name[:24]}".strip()


def _hash(value: object) -> str:
    return hashlib.sha256(_dump(value).encode()).hexdigest()[:4]


def _resolved(name: object) -> str:
    return str(Path(str(name)).resolve())


def _is_control(control: Group, group: Group, shared: str = "budget") -> bool:
    """Whether it is the same student without a teacher; or, for one that was fine-tuned, taught with the labels.

    `shared`: the attribute that both must have alike.
    """
    kinds = (ALONE, SMOOTHED, METHOD) if group.fine_tuned else (ALONE, SMOOTHED)
    alike = getattr(control, shared) == getattr(group, shared)
    return group.distilled and control.kind in kinds and not control.fine_tuned and alike


def _numbers(group: Group) -> list[tuple]:
    """Sorts settings by their numbers, so that temperature 10 comes after 5."""
    return [
        (key, value if isinstance(value, int | float) else 0, str(value)) for key, value in sorted(group.flags.items())
    ]


def _dump(value: object) -> str:
    return json.dumps(value, sort_keys=True)


def _short(value: object) -> str:
    text = str(value) if isinstance(value, str | int | float | bool | None) else _dump(value)
    if len(text) <= LONGEST:
        return text
    return text[:8] if SHA256.fullmatch(text) else f"{text[:40]}… {_hash(value)}"
