"""Runs that differ in nothing but their seed, and the controls that each of them is measured against."""

import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path

from kd.reporting.results import Run
from kd.reporting.statistics import Difference, images_noise, mean_and_deviation, paired

TEACHER, ALONE, SMOOTHED, METHOD = KINDS = "teacher", "student alone", "label smoothing", "method"


@dataclass
class Group:
    """One row of the tables."""

    kind: str  # one of KINDS
    name: str
    runs: list[Run]
    budget: str  # what a control must share: data, views, recipe, network
    flags: dict  # what tells it from other groups of its name
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

    def values(self, key: str, seeds: set[int] | None = None) -> list[float]:
        """Of all runs that have it, or of some seeds."""
        runs = [run for run in self.runs if seeds is None or run.seed in seeds]
        return [float(run.summary[key]) for run in runs if run.summary.get(key) is not None]

    def mean(self, key: str, seeds: set[int] | None = None) -> float | None:
        values = self.values(key, seeds)
        return mean_and_deviation(values)[0] if values else None

    def gain(self, control: "Group", key: str) -> Difference | None:
        """This group minus `control`, over the seeds that both have; None where there is none."""
        ours, theirs = ({run.seed: run for run in group.tested} for group in (self, control))
        pairs = [(ours[seed].summary, theirs[seed].summary) for seed in sorted(ours.keys() & theirs.keys())]
        pairs = [(one, other) for one, other in pairs if None not in (one[key], other[key])]
        if not pairs:
            return None
        gains = {one["seed"]: float(one[key] - other[key]) for one, other in pairs}
        tops = [mean_and_deviation([float(summary[key]) for summary in side])[0] for side in zip(*pairs, strict=True)]
        return paired(gains, images_noise(*tops, images=pairs[0][0]["test_images"]))


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
    return Group(kind, kind if kind != METHOD else f"student ({first.role})", runs, budget, recipe)


def _recipe(run: Run, by_path: dict[str, Run]) -> dict:
    """What two seeds of one thing have in common. Teachers that differ in their seed alone count as the same."""
    recipe = {key: value for key, value in run.identity.items() if key != "seed"}
    named = run.summary.get("teacher") or []
    teachers = [by_path.get(_resolved(name)) for name in (named if isinstance(named, list) else [named])]
    if teachers and all(teacher is not None for teacher in teachers):
        recipe["teacher"] = " and ".join(_family(teacher) for teacher in teachers)
    return recipe


def _family(teacher: Run) -> str:
    recipe = {key: value for key, value in teacher.identity.items() if key != "seed"}
    return f"{teacher.identity['model']} {hashlib.sha256(_dump(recipe).encode()).hexdigest()[:4]}"


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
    return text if len(text) <= 24 else text[:8]
