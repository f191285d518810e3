"""The figures of a report: which of them the groups of one set of images allow, and what is drawn in each."""

import re

import torch
from torch import Tensor

from kd.errors import UserError
from kd.metrics import BINS, class_recall
from kd.report import plots
from kd.report.costs import Costs
from kd.report.document import Block, Figure
from kd.report.groups import ALONE, TEACHER, Group
from kd.report.statistics import mean_and_deviation
from kd.runs.results import Run, class_names, read_history, read_test_logits

TEACHERS = 3  # that Fig. 2 has room for


# What any report may call its figures, a prefix for further sets of images included.
FILES = re.compile(r"(data\d+_)?(fig1_student|fig2_teacher|pareto|class_gain|confusion|reliability|grid\d+)\.png")


def grids(groups: list[Group]) -> list[tuple[list[Group], list[str]]]:
    """Sets of groups that differ in their method's flags alone, with the flags that vary."""
    alike: dict[tuple, list[Group]] = {}
    for group in groups:
        if group.distilled and group.values("val_top1_last"):
            alike.setdefault((group.name, group.budget, str(group.flags["teacher"])), []).append(group)
    found = []
    for members in alike.values():
        flags = [key for key in members[0].runs[0].method_flags if len({str(m.flags[key]) for m in members}) > 1]
        if flags:
            found.append((members, flags))
    return found


def chosen_runs(groups: list[Group]) -> Group | None:
    """The method that the figures show: the best on validation, or the first where there is no validation."""
    methods = [group for group in groups if group.distilled and group.tested]
    return max(methods, key=lambda group: group.mean("val_top1_last") or 0.0, default=None)


def _class_accuracy_by_seed(found: list[tuple]) -> dict[int, Tensor]:
    """Percent of each class's test images; of a seed's several runs the mean, as Group.by_seed has it."""
    by_seed: dict[int, list[Tensor]] = {}
    for seed, logits, labels in found:
        by_seed.setdefault(seed, []).append(class_recall(logits, labels))
    return {seed: torch.stack(values).mean(dim=0) for seed, values in by_seed.items()}


class Gallery:
    """Figures of one set of images; what one of them lacks is said in `notes`, and the others are drawn."""

    def __init__(self, groups: list[Group], costs: Costs, prefix: str):
        self.groups, self.costs, self.prefix = groups, costs, prefix
        self.notes: list[str] = []
        self.figures: list[Block] = []
        method = chosen_runs(groups)
        self.method = method
        self.alone = next((c for c in method.controls if c.kind == ALONE), None) if method else None
        self.teachers = [group for group in groups if group.kind == TEACHER]

    def draw(self) -> list[Block]:
        students = [group for group in (self.method, self.alone) if group]
        if not students:
            students = [group for group in self.groups if group.kind != TEACHER][:2]
        self._curves("fig1_student", "Fig. 1: loss and accuracy of the student.", students)
        self._curves("fig2_teacher", "Fig. 2: loss and accuracy of the teacher.", self.teachers[:TEACHERS])
        if len(self.teachers) > TEACHERS:
            self.notes.append(f"Fig. 2: the first {TEACHERS} of {len(self.teachers)} teachers are drawn")
        for name in dict.fromkeys(group.elsewhere for group in self.groups if group.elsewhere):
            self.notes.append(f"Fig. 2: the teacher {name} is no run here; how it was trained is not known")
        self._pareto()
        if self.method:
            self._predictions()
        for number, (members, flags) in enumerate(grids(self.groups), start=1):
            self._grid(members, flags, number)
        return self.figures

    def _add(self, name: str, title: str, caption: str, size: tuple[float, float], draw: plots.Draw) -> None:
        png = plots.render(size, draw)
        self.figures.append(Figure(f"{self.prefix}{name}.png", title, caption, png, wide=size[0] >= 10))

    def _read(self, runs: list[Run], read) -> list:
        found = []
        for run in runs:
            try:
                found.append(read(run))
            except UserError as error:
                self.notes.append(str(error))
        return found

    def _title(self, group: Group) -> str:
        """Its label, with the model where others of that label have another."""
        alike = [other for other in self.groups if other.label == group.label]
        return group.label if len(alike) == 1 else f"{group.label}, {group.model}"

    def _curves(self, name: str, title: str, groups: list[Group]) -> None:
        curves = {self._title(group): self._read(group.runs, read_history) for group in groups}
        curves = {label: histories for label, histories in curves.items() if histories}
        if curves:
            caption = "Mean over seeds. The training loss is the method's own sum of terms, on augmented images."
            self._add(name, title, caption, plots.CURVES, plots.draw_curves(curves))

    def _pareto(self) -> None:
        points = []
        for group in (group for group in self.groups if group.tested):
            mean, deviation = mean_and_deviation(group.values("test_top1"))
            cost = self.costs.of(group.runs[0])
            params = group.runs[0].summary["params"]
            points.append((self._title(group), params, cost and cost.milliseconds, mean, deviation or 0.0))
        if len(points) > plots.POINTS:
            self.notes.append(f"accuracy against cost: the first {plots.POINTS} of {len(points)} networks are drawn")
            points = points[: plots.POINTS]
        if points:
            size = (10.0, 4.3 + 0.12 * len(points))  # the legend below has two columns
            caption = "Test accuracy of the last epoch, with the standard deviation over seeds. Up and left is better."
            self._add("pareto", "Accuracy against cost.", caption, size, plots.draw_pareto(points))

    def _predictions(self) -> None:
        """The figures that need the logits which runs keep; the test set itself is not read."""
        method, alone = self.method, self.alone
        groups = [group for group in (*self.teachers[:1], alone, method) if group]
        read = {group.label: self._read(group.tested, lambda r: (r.seed, *read_test_logits(r))) for group in groups}
        if not read[method.label]:
            return
        shape = read[method.label][0][1].shape
        read = {label: [one for one in found if one[1].shape == shape] for label, found in read.items()}
        names = class_names(method.tested[0], shape[1])
        if alone:
            self._class_gain(names, read[method.label], read[alone.label])
        pool = lambda found: tuple(map(torch.cat, zip(*(one[1:] for one in found))))  # noqa: E731
        pooled = {label: pool(found) for label, found in read.items() if found}
        caption = f"Of {method.label}, all seeds: percent of each true class's test images."
        draw = plots.draw_confusion(names, *pooled[method.label])
        self._add("confusion", "What the worst classes are taken for.", caption, (8.0, 6.0), draw)
        caption = f"Accuracy against confidence on the test set, {BINS} bins, all seeds; a larger dot holds more "
        caption += "images. Below the diagonal: too sure."
        self._add("reliability", "Reliability.", caption, (5.5, 5.5), plots.draw_reliability(pooled))

    def _class_gain(self, names: list[str], ours: list[tuple], theirs: list[tuple]) -> None:
        """`ours` and `theirs`: seed, logits and labels of each run; paired by seed, as the table of gains is."""
        ours, theirs = (_class_accuracy_by_seed(found) for found in (ours, theirs))
        seeds = sorted(ours.keys() & theirs.keys())
        if not seeds:
            return
        gains = torch.stack([ours[seed] - theirs[seed] for seed in seeds]).mean(dim=0)
        if empty := int(gains.isnan().sum()):
            self.notes.append(f"gain of each class: {empty} of {len(names)} classes have no test images")
        caption = f"Test accuracy of each class, {self.method.label} minus student alone, mean over seeds."
        size = (8.0, 2 + 0.22 * min(len(names), plots.SHOWN))
        self._add("class_gain", "Gain of each class.", caption, size, plots.draw_class_gain(names, gains))

    def _grid(self, members: list[Group], flags: list[str], number: int) -> None:
        numeric = all(isinstance(member.flags[flag], int | float) for member in members for flag in flags)
        if len(flags) > 2 or not numeric:
            self.notes.append(f"{members[0].name}: no heat map of {', '.join(flags)}; it takes one or two numbers")
            return
        # A picked setting has more seeds than the others: the picture compares what was compared.
        seeds = set.intersection(*(member.seeds for member in members))
        if not seeds:
            self.notes.append(f"{members[0].name}: no heat map of {', '.join(flags)}; its settings share no seed")
            return
        rows, columns = flags[0], flags[1] if len(flags) == 2 else None
        shown = ", ".join(map(str, sorted(seeds)))
        caption = f"{members[0].name}: validation accuracy (seeds {shown}). Framed: settings that read the test set."
        draw = plots.draw_grid(members, seeds, rows, columns)
        self._add(f"grid{number}", "The grid.", caption, (6.5, 4.5), draw)
