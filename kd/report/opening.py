"""How a report opens, what was compared and the verdict in a sentence, and how it ends: what made it."""

from collections import Counter
from collections.abc import Iterable
from datetime import datetime

from kd.errors import UserError
from kd.report.document import Facts
from kd.report.groups import ALONE, TEACHER, Comparison, Group
from kd.runs.results import Run, read_config, teachers_of

NAMED = 6  # methods, teachers and seeds that a sentence names; the others are counted
VERDICTS = 4  # different verdicts that a sentence has room for


def what_was_compared(groups: list[Group]) -> str:
    """The methods, controls, networks, seeds and test images, in a sentence or two."""
    methods = [group for group in groups if group.distilled]
    if not methods:
        return f"No distilled student among these runs, but {_named([group.label for group in groups])}."
    controls = list({id(control): control for group in methods for control in group.controls}.values())
    students, seeds = {group.model for group in methods}, {seed for group in methods for seed in group.seeds}
    against = f" against {_named([control.label for control in controls])}" if controls else ", with no control"
    images = {run.summary["test_images"] for group in methods for run in group.tested}
    if not any(group.labelled for group in methods):
        tested = "no labels, so no test images"
    else:
        tested = f"test images: {', '.join(f'{count:,}' for count in sorted(images)) or 'not read'}"
    facts = [
        f"Students: {_named(sorted(students))}",
        f"teacher: {_named(_teachers(groups))}",
        f"seeds: {_named([str(seed) for seed in sorted(seeds)], ' ')}",
        tested,
    ]
    return f"Compared: {_named([group.label for group in methods])}{against}. {'; '.join(facts)}."


def _teachers(groups: list[Group]) -> list[str]:
    """The models of the students' teachers, or of the teachers among these runs."""
    taught = [teachers_of(run.summary, "teacher_model") for group in groups for run in group.runs if group.distilled]
    models = [" and ".join(models) for models in taught if models]
    return list(dict.fromkeys(models or [group.model for group in groups if group.kind == TEACHER])) or ["none"]


def headline(comparisons: list[Comparison]) -> str:
    """The verdict on every method in one sentence, against the student alone if that is there; "" without a gain.

    A method that smooths labels is named beside a control that does so too, if there is one."""
    found = [one for one in comparisons if one.difference]
    found = [one for one in found if one.of_methods or one.control is _chosen(one.group, found)]
    if not found:
        return ""
    controls = list(dict.fromkeys(one.control.title for one in found))
    return " ".join(_against(title, [one for one in found if one.control.title == title]) for title in controls)


def _chosen(group: Group, comparisons: list[Comparison]) -> Group:
    """The control that a sentence names: one that smooths labels as the method does, else the student alone."""
    controls = [one.control for one in comparisons if one.group is group and not one.of_methods]
    alike = [control for control in controls if control.label_smoothing == group.label_smoothing]
    return next(iter(sorted(alike or controls, key=lambda control: control.kind != ALONE)), group)


def _against(control: str, found: list[Comparison]) -> str:
    """The verdicts on these methods, in a sentence each."""
    by_verdict: dict[str, list[str]] = {}
    for one in found:
        by_verdict.setdefault(one.verdict, []).append(f"{one.group.title} {one.difference.mean:+.2f}")
    parts = [f"{verdict[0].upper()}{verdict[1:]}: {_named(names)}." for verdict, names in by_verdict.items()]
    more = len(parts) - VERDICTS
    rest = f" {more} more below." if more > 0 else ""
    return f"Points of test accuracy against {control}. {' '.join(parts[:VERDICTS])}{rest}"


def _named(names: list[str], between: str = "; ") -> str:
    """'a; b; c', and how many more there are."""
    more = len(names) - NAMED
    return between.join(names[:NAMED]) + (f" and {more} more" if more > 0 else "")


def how_it_was_made(runs: list[Run], command: str, machine: str) -> Facts:
    """The command, the date, the machines and the versions."""
    facts = {"command": command, "written": datetime.now().astimezone().strftime("%Y-%m-%d %H:%M %Z")}
    facts |= {"report and latencies on": machine}
    configs = []
    for run in runs:
        try:
            configs.append(read_config(run.path))
        except UserError:
            configs.append({})  # changed since it was collected
    facts["trained on"] = _counted(map(trained_on, configs))
    facts["versions of the runs"] = _counted(map(_versions, configs))
    facts["code of the runs"] = _counted(f"commit {config.get('git_commit') or 'not recorded'}" for config in configs)
    return Facts({name: value for name, value in facts.items() if value})


def trained_on(config: dict) -> str:
    device = config.get("gpu") or config.get("device")
    processes, threads = config.get("processes"), config.get("threads")
    if device is None:
        return "not recorded"
    several = "" if processes == 1 else "es"
    return f"{device}, {processes} process{several}, {threads} thread{'' if threads == 1 else 's'} each"


def _versions(config: dict) -> str:
    versions = config.get("versions") or {}
    return ", ".join(f"{name} {version}" for name, version in versions.items()) or "not recorded"


def _counted(values: Iterable[str]) -> str:
    """The values, each with the number of its runs if they differ."""
    counts = Counter(values)
    if len(counts) <= 1:
        return next(iter(counts), "")
    return "; ".join(f"{value} ({count} run{'s' * (count > 1)})" for value, count in counts.most_common())
