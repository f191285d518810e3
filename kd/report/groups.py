"""Runs that differ in nothing but their seed, and the controls that each of them is measured against."""

import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path

from kd.metrics import images_noise
from kd.report.statistics import Difference, cell, mean_and_deviation, paired
from kd.runs.results import Run, teachers_of
from kd.runs.table import Metric

NOT_READ = "not read"  # of a test score, where --no-test left the split alone


LONGEST = 60  # letters of a setting in a label


TEACHER, ALONE, SMOOTHED, METHOD = KINDS = "teacher", "student alone", "label smoothing", "method"


@dataclass
class Group:
    """One row of the tables."""

    kind: str  # one of KINDS
    name: str
    runs: list[Run]
    budget: str  # what a control must share: data, views, recipe, network
    flags: dict  # what tells it from other groups of its name
    elsewhere: str = ""  # its teacher, where that is no run among these
    setting: str = ""
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
    def label(self) -> str:
        return f"{self.name}, {self.setting}" if self.setting else self.name

    @property
    def seeds(self) -> set[int]:
        return {run.seed for run in self.runs}

    @property
    def count(self) -> str:
        """Of seeds, and of runs where these are more."""
        several = len(self.runs) > len(self.seeds)
        return f"{len(self.seeds)} ({len(self.runs)} runs)" if several else str(len(self.seeds))

    def by_seed(self, key: str) -> dict[int, float]:
        """Of each seed that has it the mean over its runs: students of one seed may differ in their teacher's."""
        found: dict[int, list[float]] = {}
        for run in self.runs:
            if run.summary.get(key) is not None:
                found.setdefault(run.seed, []).append(float(run.summary[key]))
        return {seed: mean_and_deviation(values)[0] for seed, values in found.items()}

    def values(self, key: str, seeds: set[int] | None = None) -> list[float]:
        """One a seed, of all that have it, or of some."""
        return [value for seed, value in self.by_seed(key).items() if seeds is None or seed in seeds]

    def cell(self, metric: Metric) -> str:
        """As a table shows it: over how many seeds, where not all have it; or that no test split was read."""
        return cell(self.values(metric.key), metric.style, len(self.seeds), unread(metric.key, self.runs))

    def mean(self, key: str, seeds: set[int] | None = None) -> float | None:
        values = self.values(key, seeds)
        return mean_and_deviation(values)[0] if values else None

    def gain(self, control: "Group", key: str) -> Difference | None:
        """This group minus `control`, over the seeds that both have; None where there is none."""
        ours, theirs = self.by_seed(key), control.by_seed(key)
        seeds = sorted(ours.keys() & theirs.keys())
        if not seeds or not self.tested:
            return None
        tops = [mean_and_deviation([side[seed] for seed in seeds])[0] for side in (ours, theirs)]
        noise = images_noise(*tops, images=self.tested[0].summary["test_images"])
        return paired({seed: ours[seed] - theirs[seed] for seed in seeds}, noise)


def unread(key: str, runs: list[Run]) -> str:
    """What stands in place of a score that none of these runs has."""
    of_test = key.startswith("test") or (key == "agreement" and any(teachers_of(run.summary) for run in runs))
    return NOT_READ if of_test and not any(run.tested for run in runs) else ""


def by_data(runs: list[Run]) -> dict[str, list[Group]]:
    """The groups of each set of images, under its name; accuracies on different images are never put side by side."""
    by_path = {_resolved(run.path): run for run in runs}
    tasks: dict[tuple, list[Run]] = {}
    for run in runs:
        tasks.setdefault((run.identity["data"], run.identity.get("classes")), []).append(run)
    named = {}
    for (fingerprint, classes), members in tasks.items():
        name = f"{members[0].source}, {classes} classes" if classes else members[0].source
        named[name if name not in named else f"{name} ({str(fingerprint)[:6]})"] = group_runs(members, by_path)
    return named


def group_runs(runs: list[Run], by_path: dict[str, Run]) -> list[Group]:
    """Teachers, controls, then methods, each with its controls: the same student and recipe without a teacher."""
    gathered: dict[str, list[Run]] = {}
    for run in sorted(runs, key=lambda run: (run.seed, str(run.path))):
        gathered.setdefault(_dump(_recipe(run, by_path)), []).append(run)
    groups = [_group(members, by_path) for members in gathered.values()]
    for group in groups:
        alike = [other.flags for other in groups if (other.name, other.model) == (group.name, group.model)]
        differing = [key for key in sorted(group.flags) if len({_dump(flags.get(key)) for flags in alike}) > 1]
        group.setting = ", ".join(f"{key.replace('_', ' ')} {_short(group.flags[key])}" for key in differing)
        group.controls = [other for other in groups if _controls(other, group)]
    return sorted(groups, key=lambda group: (KINDS.index(group.kind), group.name, group.model, _numbers(group)))


def _group(runs: list[Run], by_path: dict[str, Run]) -> Group:
    first = runs[0]
    recipe = _recipe(first, by_path)
    beside = {"role", "teacher", "cache_teacher", "cache_dtype", "cache_top_k", *first.method_flags}
    budget = _dump({key: value for key, value in recipe.items() if key not in beside})
    kind = {"teacher": TEACHER, "none": ALONE}.get(first.role, METHOD)
    smoothing = first.method_flags.get("label_smoothing")
    if kind == ALONE and smoothing:
        return Group(SMOOTHED, f"{ALONE}, {SMOOTHED} {smoothing}", runs, budget, recipe)
    elsewhere = recipe["teacher"] if any(run is None for _, _, run in _teachers(first, by_path)) else ""
    return Group(kind, kind if kind != METHOD else f"student ({first.role})", runs, budget, recipe, elsewhere)


def _recipe(run: Run, by_path: dict[str, Run]) -> dict:
    """What two seeds of one thing have in common. Teachers that differ in their seed alone count as the same."""
    recipe = {key: value for key, value in run.identity.items() if key != "seed"}
    if teachers := _teachers(run, by_path):
        names = " and ".join(_family(teacher) if teacher else _from(name, model) for name, model, teacher in teachers)
        known = all(teacher is not None for _, _, teacher in teachers)
        names = names if known else f"{names} {_hash(recipe['teacher'])}"  # names alone do not tell their weights
        recipe["teacher"] = names if len(names) <= LONGEST else f"{len(teachers)} networks {_hash(names)}"
    return recipe


def _teachers(run: Run, by_path: dict[str, Run]) -> list[tuple[str, str, Run | None]]:
    """Name, network ("" where the summary does not say it) and run of each teacher; None for one that is none here."""
    named, models = teachers_of(run.summary), teachers_of(run.summary, "teacher_model")
    models += [""] * (len(named) - len(models))
    return [(name, model, by_path.get(_resolved(name))) for name, model in zip(named, models, strict=False)]


def _family(teacher: Run) -> str:
    recipe = {key: value for key, value in teacher.identity.items() if key != "seed"}
    return f"{teacher.identity['model']} {_hash(recipe)}"


def _from(name: str, model: str) -> str:
    """A teacher that is no run here: its network, and the file or folder that it came from."""
    return model if name == model else f"{model} from {Path(name).name[:24]}".strip()


def _hash(value: object) -> str:
    return hashlib.sha256(_dump(value).encode()).hexdigest()[:4]


def _resolved(name: object) -> str:
    return str(Path(str(name)).resolve())


def _controls(control: Group, group: Group) -> bool:
    return group.distilled and control.kind in (ALONE, SMOOTHED) and control.budget == group.budget


def _numbers(group: Group) -> list[tuple]:
    """Settings in the order of their numbers, so that temperature 10 comes after 5."""
    return [
        (key, value if isinstance(value, int | float) else 0, str(value)) for key, value in sorted(group.flags.items())
    ]


def _dump(value: object) -> str:
    return json.dumps(value, sort_keys=True)


def _short(value: object) -> str:
    text = str(value) if isinstance(value, str | int | float | bool | None) else _dump(value)
    return text if len(text) <= LONGEST else text[:8]
