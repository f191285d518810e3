"""The report's figures on one data set: which of them its groups allow, and what each of them shows."""

import re

import torch
from torch import Tensor

from kd.errors import UserError
from kd.metrics import BINS, class_recall
from kd.report import plots
from kd.report.costs import Costs
from kd.report.document import Block, Figure
from kd.report.groups import ALONE, TEACHER, Comparison, Group, mean_and_deviation
from kd.runs.results import Run, class_names, read_history, read_test_logits

TEACHERS = 3  # teachers that their figure has room for

# File names of any report's figures; those of further data sets have a prefix.
FILES = re.compile(
    r"(data\d+_)?(gain|student_curves|teacher_curves|pareto|class_gain|confusion|reliability|grid\d+"
    r"|fig1_student|fig2_teacher)\.png"  # the last two of older reports
)


def grids(groups: list[Group]) -> list[tuple[list[Group], list[str]]]:
    """Sets of groups that differ only in their method's flags, with the flags that vary."""
    similar: dict[tuple, list[Group]] = {}
    for group in groups:
        if group.distilled and group.values("val_top1_last"):
            similar.setdefault((group.name, group.budget, str(group.flags["teacher"])), []).append(group)
    swept = []
    for members in similar.values():
        common = [key for key in members[0].runs[0].method_flags if all(key in member.flags for member in members)]
        flags = [key for key in common if len({str(member.flags[key]) for member in members}) > 1]
        if flags:
            swept.append((members, flags))
    return swept


def shown_method(groups: list[Group]) -> Group | None:
    """The method that the figures show: the best on validation, or the first if there is no validation."""
    methods = [group for group in groups if group.distilled and group.tested]
    return max(methods, key=lambda group: group.mean("val_top1_last") or 0.0, default=None)


def _class_accuracy_by_seed(answers: list[tuple]) -> dict[int, Tensor]:
    """Percent of each class's test images; the mean over a seed's runs, as in Group.by_seed."""
    by_seed: dict[int, list[Tensor]] = {}
    for seed, logits, labels in answers:
        by_seed.setdefault(seed, []).append(class_recall(logits, labels))
    return {seed: torch.stack(values).mean(dim=0) for seed, values in by_seed.items()}


class Gallery:
    """The figures on one data set. A figure that cannot be drawn leaves its reason in `notes`."""

    def __init__(self, groups: list[Group], costs: Costs, prefix: str):
        self.groups, self.costs, self.prefix = groups, costs, prefix
        self.notes: list[str] = []
        self.figures: list[Block] = []
        method = shown_method(groups)
        self.method = method
        self.alone = next((c for c in method.controls if c.kind == ALONE), None) if method else None
        self.teachers = [group for group in groups if group.kind == TEACHER]

    def draw_gains(self, comparisons: list[Comparison]) -> list[Block]:
        """The figure that opens the report: each method's gain; [] if there is none."""
        gains = []
        for one in comparisons:
            if found := one.difference:
                half = found.half() if found.interval else None
                gains.append((one.group.title, one.control.title, found.mean, half))
        if not gains:
            return []
        if len(gains) > plots.COMPARED:
            self.notes.append(f"gain of each method: the first {plots.COMPARED} of {len(gains)} gains are drawn")
            gains = gains[: plots.COMPARED]
        halves = [half for *_, half in gains]
        caption = "Points of test accuracy, last epoch, same seeds; right of the line is better."
        if any(half is not None for half in halves):
            caption += " Bars: 95% intervals, each by itself; a verdict counts all comparisons."
        caption += " Hollow: no interval, for the seeds' noise is unknown." if None in halves else ""
        height = plots.gains_height(gains)
        return [self._figure("gain", "gain of each method.", caption, height, plots.draw_gains(gains))]

    def draw(self) -> list[Block]:
        students = [group for group in (self.method, self.alone) if group]
        if not students:
            students = [group for group in self.groups if group.kind != TEACHER][:2]
        self._curves("student_curves", "loss and accuracy of the student.", students)
        self._curves("teacher_curves", "loss and accuracy of the teacher.", self.teachers[:TEACHERS])
        if len(self.teachers) > TEACHERS:
            self.notes.append(f"curves of the teacher: the first {TEACHERS} of {len(self.teachers)} teachers are drawn")
        for name in dict.fromkeys(group.external_teacher for group in self.groups if group.external_teacher):
            self.notes.append(f"curves of the teacher: {name} is not among these runs; how it was trained is not known")
        self._pareto()
        if self.method:
            self._predictions()
        for number, (members, flags) in enumerate(grids(self.groups), start=1):
            self._grid(members, flags, number)
        return self.figures

    def _figure(self, name: str, title: str, caption: str, height: float, draw: plots.Draw) -> Figure:
        size = (plots.WIDTH, height)
        light, dark = plots.render(size, draw), plots.render(size, draw, plots.DARK)
        return Figure(f"{self.prefix}{name}.png", title, caption, light, dark)

    def _add(self, name: str, title: str, caption: str, height: float, draw: plots.Draw) -> None:
        self.figures.append(self._figure(name, title, caption, height, draw))

    def _read(self, runs: list[Run], read) -> list:
        """`read(run)` of every run; an unreadable one leaves a note."""
        contents = []
        for run in runs:
            try:
                contents.append(read(run))
            except UserError as error:
                self.notes.append(str(error))
        return contents

    def _curves(self, name: str, title: str, groups: list[Group]) -> None:
        curves = {group.title: self._read(group.runs, read_history) for group in groups}
        curves = {label: histories for label, histories in curves.items() if histories}
        if curves:
            caption = "Mean over seeds. The training loss is the method's own sum of terms, on augmented images."
            if not any(group.labelled for group in groups):
                title = title.replace("accuracy", "agreement")
                caption += " Without labels so is the validation loss, on centre crops."
            self._add(name, title, caption, plots.CURVES[1], plots.draw_curves(curves))

    def _pareto(self) -> None:
        points = []
        for group in (group for group in self.groups if group.tested):
            mean, deviation = mean_and_deviation(group.values("test_top1"))
            cost = self.costs.of(group.runs[0])
            params = group.runs[0].summary["params"]
            points.append((group.title, params, cost and cost.milliseconds, mean, deviation or 0.0))
        if len(points) > plots.POINTS:
            self.notes.append(f"accuracy against cost: the first {plots.POINTS} of {len(points)} networks are drawn")
            points = points[: plots.POINTS]
        if points:
            height = 4.6 + plots.legend_height([title for title, *_ in points])
            caption = "Test accuracy of the last epoch, with the standard deviation over seeds. Up and left is better. "
            caption += "Networks of the same cost stand side by side."
            self._add("pareto", "accuracy against cost.", caption, height, plots.draw_pareto(points))

    def _predictions(self) -> None:
        """The figures drawn from the runs' stored test logits; the test set itself is not read."""
        method, alone = self.method, self.alone
        groups = [group for group in (*self.teachers[:1], alone, method) if group]
        read = {
            group.label: self._read(group.tested, lambda r: (r.seed, *read_test_logits(r.path, r.summary)))
            for group in groups
        }
        if not read[method.label]:
            return
        shape = read[method.label][0][1].shape
        read = {label: [one for one in runs if one[1].shape == shape] for label, runs in read.items()}
        names = class_names(method.tested[0], shape[1])
        if alone:
            self._class_gain(names, read[method.label], read[alone.label])
        pool = lambda runs: tuple(map(torch.cat, zip(*(one[1:] for one in runs))))  # noqa: E731
        pooled = {label: pool(runs) for label, runs in read.items() if runs}
        caption = f"{method.label}, all seeds: percent of each true class's test images."
        draw = plots.draw_confusion(names, *pooled[method.label])
        self._add("confusion", "what the worst classes are mistaken for.", caption, 4.6, draw)
        caption = f"Accuracy against confidence on the test set, {BINS} bins, all seeds. A marker's area is its bin's "
        caption += "number of images; empty bins have none. Below the diagonal: overconfident."
        self._add("reliability", "reliability.", caption, 5.6, plots.draw_reliability(pooled))

    def _class_gain(self, names: list[str], method: list[tuple], alone: list[tuple]) -> None:
        """`method` and `alone`: seed, logits and labels of each run; paired by seed, as in the table of gains."""
        distilled, control = _class_accuracy_by_seed(method), _class_accuracy_by_seed(alone)
        seeds = sorted(distilled.keys() & control.keys())
        if not seeds:
            return
        gains = torch.stack([distilled[seed] - control[seed] for seed in seeds]).mean(dim=0)
        if empty := int(gains.isnan().sum()):
            self.notes.append(f"gain of each class: {empty} of {len(names)} classes have no test images")
        caption = f"Test accuracy of each class, {self.method.label} minus student alone, mean over seeds."
        height = 1.5 + 0.22 * min(len(names), plots.SHOWN)
        self._add("class_gain", "gain of each class.", caption, height, plots.draw_class_gain(names, gains))

    def _grid(self, members: list[Group], flags: list[str], number: int) -> None:
        numeric = all(isinstance(member.flags[flag], int | float) for member in members for flag in flags)
        if len(flags) > 2 or not numeric:
            self.notes.append(f"{members[0].name}: no heat map of {', '.join(flags)}; it takes one or two numbers")
            return
        # The picked setting has more seeds than the others: compare on those that all have.
        seeds = set.intersection(*(member.seeds for member in members))
        if not seeds:
            self.notes.append(f"{members[0].name}: no heat map of {', '.join(flags)}; its settings share no seed")
            return
        rows, columns = flags[0], flags[1] if len(flags) == 2 else None
        shown = ", ".join(map(str, sorted(seeds)))
        caption = f"{members[0].name}: validation accuracy (seeds {shown}). Framed: settings that read the test set."
        draw = plots.draw_grid(members, seeds, rows, columns)
        self._add(f"grid{number}", "the grid.", caption, 3.8, draw)
