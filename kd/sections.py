"""What the report says: tables, verdicts and figures, each from the groups of one set of images."""

import torch

from kd import figures
from kd.costs import Costs
from kd.document import Block, Figure, Heading, Lines, Table
from kd.errors import UserError
from kd.groups import ALONE, TEACHER, Group
from kd.rare import rare_table
from kd.results import Run, class_names, history, test_answers
from kd.statistics import cell, mean_and_deviation

NOT_READ = "not read"
SCORES = (
    ("val_top1_last", "val, last", ".2f"),
    ("val_top1_best", "val, best", ".2f"),
    ("test_top1", "test, last", ".2f"),
    ("test_top1_best", "test, best", ".2f"),
    ("test_top5", "test top-5", ".2f"),
)
CALIBRATION = (("test_nll", "NLL", ".4f"), ("test_ece", "ECE", ".2f"), ("agreement", "agreement", ".2f"))
EACH = (*SCORES, *CALIBRATION)


def accuracy_table(groups: list[Group]) -> Table:
    rows = []
    for group in groups:
        unread = "" if group.tested else NOT_READ
        cells = [cell(group.values(key), style, unread * key.startswith("test")) for key, _, style in SCORES]
        rows.append((group.label, group.model, str(len(group.runs)), *cells))
    note = (
        "Percent; mean ± standard deviation over seeds. last: the last epoch's weights; best: those of the epoch that "
    )
    note += "was best on validation. The test set was read once, at each run's end; it chose nothing."
    return Table(("network", "model", "seeds", *(title for _, title, _ in SCORES)), rows, note, words=2)


def cost_table(groups: list[Group], costs: Costs) -> Table:
    rows = []
    for group in groups:
        cost = costs.of(group.runs[0])
        numbers = ("not measured",) * 3
        if cost:
            numbers = (f"{cost.macs / 1e6:.2f}M", f"{cost.bytes / 1e6:.2f} MB", f"{cost.milliseconds:.2f} ms")
        scores = [cell(group.values(key), style) for key, _, style in CALIBRATION]
        rows.append((group.label, group.model, f"{group.runs[0].summary['params']:,}", *numbers, *scores))
    note = "MACs: multiply-accumulates of convolutions and matrix products for one image. size: model.safetensors. "
    note += f"latency: one image, median of repeated passes ({costs.where}). NLL in nats and ECE (percent, 15 bins) on "
    note += "the test set; agreement: percent of test images on which the network and its teacher say the same."
    titles = ("parameters", "MACs", "size", "latency", *(title for _, title, _ in CALIBRATION))
    return Table(("network", "model", *titles), rows, note, words=2)


def gain_table(groups: list[Group]) -> Table | None:
    """Every method against every control, on the same seeds."""
    rows = []
    for group in groups:
        for control in group.controls:
            last, best = (group.gain(control, key) for key in ("test_top1", "test_top1_best"))
            if last:
                seeds = " ".join(map(str, last.seeds))
                numbers = (f"{last.mean:+.2f}", last.interval, f"{best.mean:+.2f}" if best else "")
                rows.append((group.label, control.label, seeds, *numbers, last.words))
    if not rows:
        return None
    note = (
        "Points of test accuracy, paired by seed; the interval is Student's t over seeds, 95%. It holds the noise of "
    )
    note += "training, not that of the choice of test images."
    if len(rows) > 1:
        note += f" Of {len(rows)} such intervals {0.05 * len(rows):.1f} are expected to miss 0 by luck alone."
    head = ("method", "control", "seeds", "gain, last", "95% interval", "gain, best", "verdict")
    return Table(head, rows, note, words=3, remark=True)


def verdicts(groups: list[Group]) -> Lines:
    """The answer in words, one line a method."""
    lines = []
    for group in groups:
        if not group.distilled or not group.tested:
            continue
        for control in group.controls:
            gain = group.gain(control, "test_top1")
            if gain is None:
                lines.append(f"{group.label} against {control.label}: no seed in common with a test result.")
            else:
                lines.append(f"{group.label} against {control.label}: {gain.mean:+.2f} points: {gain.words}.")
        if not any(control.kind == ALONE for control in group.controls):
            lines.append(f"{group.label}: no student alone by the same recipe among these runs, so no gain is known.")
    return Lines(tuple(lines) or ("No distilled student with a test result among these runs.",))


def run_table(groups: list[Group]) -> Table:
    """Every run by itself, as its summary.json has it."""
    rows = []
    for group in groups:
        for run in group.runs:
            shown = [
                (run.summary.get(key), style, NOT_READ * (not run.tested and "test" in key)) for key, _, style in EACH
            ]
            cells = [empty if value is None else f"{value:{style}}" for value, style, empty in shown]
            best = run.summary["best_epoch"]
            rows.append((str(run.path), group.label, str(run.seed), "" if best is None else str(best), *cells))
    head = ("run folder", "network", "seed", "best epoch", *(title for _, title, _ in EACH))
    return Table(head, rows, words=2, quiet=True)


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


def section(name: str, groups: list[Group], costs: Costs, prefix: str) -> tuple[list[Block], list[str]]:
    """All blocks on one set of images, and what could not be shown."""
    gallery = Gallery(groups, costs, prefix)
    blocks: list[Block] = [Heading(2, f"On {name}"), verdicts(groups), Heading(3, "Accuracy"), accuracy_table(groups)]
    rare = rare_table(groups)
    if rare:
        blocks += [Heading(3, "Common and rare classes"), rare]
    gains = gain_table(groups)
    if gains:
        blocks += [Heading(3, "Gain over the controls"), gains]
    blocks += [Heading(3, "Cost and calibration"), cost_table(groups, costs)]
    blocks += gallery.draw()
    blocks += [Heading(3, "Every run", quiet=True), run_table(groups)]
    return blocks, gallery.notes
