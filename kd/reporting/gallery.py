"""The figures of a report: which of them the groups of one set of images allow, and what is drawn in each."""

import torch

from kd.costs import Costs
from kd.errors import UserError
from kd.reporting import figures
from kd.reporting.document import Block, Figure
from kd.reporting.groups import ALONE, TEACHER, Group
from kd.reporting.results import Run
from kd.reporting.run_files import class_names, history, test_answers
from kd.reporting.statistics import mean_and_deviation


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


def chosen(groups: list[Group]) -> Group | None:
    """The method that the figures show: the best on validation, or the first where there is no validation."""
    methods = [group for group in groups if group.distilled and group.tested]
    return max(methods, key=lambda group: group.mean("val_top1_last") or 0.0, default=None)


class Gallery:
    """Figures of one set of images; what one of them lacks is said in `notes`, and the others are drawn."""

    def __init__(self, groups: list[Group], costs: Costs, prefix: str):
        self.groups, self.costs, self.prefix = groups, costs, prefix
        self.notes: list[str] = []
        self.figures: list[Block] = []
        method = chosen(groups)
        self.method = method
        self.alone = next((c for c in method.controls if c.kind == ALONE), None) if method else None
        self.teachers = [group for group in groups if group.kind == TEACHER]

    def draw(self) -> list[Block]:
        students = [group for group in (self.method, self.alone) if group]
        if not students:
            students = [group for group in self.groups if group.kind != TEACHER][:2]
        self._curves("fig1_student", "Fig. 1: loss and accuracy of the student.", students)
        self._curves("fig2_teacher", "Fig. 2: loss and accuracy of the teacher.", self.teachers[:3])
        self._pareto()
        if self.method:
            self._predictions()
        for number, (members, flags) in enumerate(grids(self.groups), start=1):
            self._grid(members, flags, number)
        return self.figures

    def _add(self, name: str, title: str, caption: str, size: tuple[float, float], draw: figures.Draw) -> None:
        light, dark = figures.render(size, draw)
        self.figures.append(Figure(f"{self.prefix}{name}.png", title, caption, light, dark, wide=size[0] >= 10))

    def _read(self, runs: list[Run], read) -> list:
        found = []
        for run in runs:
            try:
                found.append(read(run))
            except UserError as error:
                self.notes.append(str(error))
        return found

    def _curves(self, name: str, title: str, groups: list[Group]) -> None:
        curves = {group.label: self._read(group.runs, history) for group in groups}
        curves = {label: histories for label, histories in curves.items() if histories}
        if curves:
            caption = "Mean over seeds. The training loss is the method's own sum of terms, on augmented images."
            self._add(name, title, caption, (10.0, 4.0), figures.draw_curves(curves))

    def _pareto(self) -> None:
        points = []
        for group in (group for group in self.groups if group.tested):
            mean, deviation = mean_and_deviation(group.values("test_top1"))
            cost = self.costs.of(group.runs[0])
            params = group.runs[0].summary["params"]
            points.append((group.label, params, cost and cost.milliseconds, mean, deviation or 0.0))
        if len(points) > figures.POINTS:
            self.notes.append(f"accuracy against cost: the first {figures.POINTS} of {len(points)} networks are drawn")
            points = points[: figures.POINTS]
        if points:
            size = (10.0, 4.3 + 0.12 * len(points))  # the legend below has two columns
            caption = "Test accuracy of the last epoch, with the standard deviation over seeds. Up and left is better."
            self._add("pareto", "Accuracy against cost.", caption, size, figures.draw_pareto(points))

    def _predictions(self) -> None:
        """The figures that need the logits which runs keep; the test set itself is not read."""
        method, alone = self.method, self.alone
        groups = [group for group in (*self.teachers[:1], alone, method) if group]
        answers = {group.label: dict(self._read(group.tested, lambda r: (r.seed, test_answers(r)))) for group in groups}
        answers = {label: by_seed for label, by_seed in answers.items() if by_seed}
        ours = answers.get(method.label)
        if not ours:
            return
        shape = next(iter(ours.values()))[0].shape
        same = lambda found: {seed: pair for seed, pair in found.items() if pair[0].shape == shape}  # noqa: E731
        answers = {label: same(found) for label, found in answers.items() if same(found)}
        ours, count = answers[method.label], shape[1]
        names = class_names(method.tested[0], count)
        theirs = answers.get(alone.label, {}) if alone else {}
        accuracy = lambda pair: figures.class_accuracy(*pair, count)  # noqa: E731
        gains = [accuracy(ours[seed]) - accuracy(theirs[seed]) for seed in sorted(ours.keys() & theirs.keys())]
        if gains:
            caption = f"Test accuracy of each class, {method.label} minus student alone, mean over seeds."
            draw = figures.draw_class_gain(names, torch.stack(gains).mean(dim=0).nan_to_num(0.0))
            self._add("class_gain", "Gain of each class.", caption, (8.0, 2 + 0.22 * min(count, figures.SHOWN)), draw)
        pooled = {label: tuple(map(torch.cat, zip(*found.values()))) for label, found in answers.items()}
        caption = f"Of {method.label}, all seeds: percent of each true class's test images."
        draw = figures.draw_confusion(names, *pooled[method.label])
        self._add("confusion", "What the worst classes are taken for.", caption, (8.0, 6.0), draw)
        caption = (
            "Accuracy against confidence on the test set, 15 bins, all seeds; a larger dot holds more images. Below "
        )
        caption += "the diagonal: too sure."
        self._add("reliability", "Reliability.", caption, (5.5, 5.5), figures.draw_reliability(pooled))

    def _grid(self, members: list[Group], flags: list[str], number: int) -> None:
        numeric = all(isinstance(member.flags[flag], int | float) for member in members for flag in flags)
        if len(flags) > 2 or not numeric:
            self.notes.append(f"{members[0].name}: no heat map of {', '.join(flags)}; it takes one or two numbers")
            return
        # A picked setting has more seeds than the others: the picture compares what was compared.
        seeds = set.intersection(*({run.seed for run in member.runs} for member in members))
        if not seeds:
            self.notes.append(f"{members[0].name}: no heat map of {', '.join(flags)}; its settings share no seed")
            return
        rows, columns = flags[0], flags[1] if len(flags) == 2 else None
        shown = ", ".join(map(str, sorted(seeds)))
        caption = f"{members[0].name}: validation accuracy (seeds {shown}). Framed: settings that read the test set."
        draw = figures.draw_grid(members, seeds, rows, columns)
        self._add(f"grid{number}", "The grid.", caption, (6.5, 4.5), draw)
