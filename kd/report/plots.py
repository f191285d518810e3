"""The report's figures. Each `draw_*` returns a function that fills a matplotlib figure; `render` makes its PNG.

All have the width of the page's text, so that letters are equally large in all of them, also on a phone. A drawing
takes its colours from the theme: "C0", "C1" and so on, and matplotlib's settings for text and axes.
"""

import io
import math
import textwrap
import warnings
from collections import Counter
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from kd.metrics import BINS, by_confidence, class_recall, predicted
from kd.report.groups import Group


class Theme(NamedTuple):
    """Colours of a light or a dark page.

    Lines and dots contrast with the paper by at least 4.5, and are at least 35 apart in CIELAB, also as protanopes and
    deuteranopes see them (simulated as in Machado et al., 2009).
    """

    paper: str  # as in document.STYLE
    ink: str
    grid: str
    colours: tuple[str, ...]


LIGHT = Theme("#ffffff", "#1c2128", "#d0d7de", ("#0f58ca", "#cc4311", "#298468", "#3a14f7", "#71070b", "#047ea3"))
DARK = Theme("#0d1117", "#e6edf3", "#3d444d", ("#43e6e8", "#f85b01", "#98e986", "#6c6afd", "#bf626f", "#6a7abb"))
COLOURS = tuple(f"C{number}" for number in range(len(LIGHT.colours)))
BETTER, WORSE = COLOURS[2], COLOURS[4]
MARKERS = "os^Dv<>P"

WIDTH = 5.4  # inches of every figure: in 10 points, which a phone still shows legibly
DOTS = 200  # per inch: sharper than the page's 118, for screens of many pixels
CURVES = (WIDTH, 5.4)  # two panels, with their legend below
ROW = 0.2  # inches of a legend's row
LINE = 2.0  # points

SHOWN = 30  # classes that a bar chart has room for
WORST = 10  # classes in the confusion matrix
POINTS = 40  # networks that the Pareto picture's legend has room for
COMPARED = 40  # rows of the picture of gains
LETTERS = 40  # of ticks beside one another, which the width has room for

Draw = Callable[[object], None]


def render(size: tuple[float, float], draw: Draw, theme: Theme = LIGHT) -> bytes:
    """The PNG of a figure of this size in inches."""
    from matplotlib import rc_context
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with rc_context(settings(theme)), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing")  # a class name in a script the font lacks
        figure = Figure(figsize=size, dpi=DOTS, layout="constrained")
        draw(figure)
        stream = io.BytesIO()
        FigureCanvasAgg(figure).print_png(stream)
    return stream.getvalue()


def settings(theme: Theme) -> dict:
    """The theme as matplotlib's settings."""
    from matplotlib import cycler

    inked = ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color", "legend.labelcolor")
    chosen = dict.fromkeys(inked, theme.ink)
    chosen |= dict.fromkeys(("figure.facecolor", "axes.facecolor", "legend.facecolor"), theme.paper)
    chosen |= dict.fromkeys(("grid.color", "legend.edgecolor"), theme.grid)
    chosen |= {"axes.prop_cycle": cycler(color=theme.colours), "axes.axisbelow": True, "axes.grid": True}
    chosen |= {"axes.spines.top": False, "axes.spines.right": False, "axes.linewidth": 1.0}
    return chosen | {"lines.linewidth": LINE, "lines.markersize": 7, "legend.fontsize": 9, "font.size": 10}


def columns_of(labels: list[str]) -> int:
    """The number of columns that a legend of these labels has room for."""
    return 2 if max(map(len, labels), default=0) <= 26 else 1


def legend_height(labels: list[str]) -> float:
    """Inches that a legend of these labels takes."""
    return ROW * (1 + math.ceil(len(labels) / columns_of(labels)))


def _legend(figure, handles: list, labels: list[str]) -> None:
    """Below the axes."""
    if labels:
        figure.legend(handles, labels, loc="outside lower center", ncols=columns_of(labels))


def label(text: str, longest: int = 40) -> str:
    """Shorten and escape a text, so that matplotlib sets no mathematics between dollars."""
    text = text if len(text) <= longest else f"{text[: longest - 1]}…"
    return text.replace("$", r"\$")


def gains_height(gains: list[tuple[str, str, float, float | None]]) -> float:
    """Inches that `draw_gains` takes."""
    methods, controls = ({gain[place] for gain in gains} for place in (0, 1))
    row = max(0.3 * len(controls), 0.55)
    return 0.8 + row * len(methods) + legend_height([f"against {control}" for control in controls])


def draw_gains(gains: list[tuple[str, str, float, float | None]]) -> Draw:
    """Gain of each method over each control with its interval; gains: method, control, points, half the interval.

    A gain without an interval is hollow.
    """
    controls = list(dict.fromkeys(control for _, control, _, _ in gains))
    methods = list(dict.fromkeys(method for method, _, _, _ in gains))

    def draw(figure) -> None:
        from matplotlib.lines import Line2D

        axes = figure.add_subplot(xlabel="gain (points of test accuracy)")
        axes.axvline(0, linewidth=1.2, color=_setting("axes.edgecolor"))
        for method, control, mean, half in gains:
            number = controls.index(control)
            height = methods.index(method) + 0.7 * ((number + 0.5) / len(controls) - 0.5)
            style = {"color": COLOURS[number % len(COLOURS)], "marker": MARKERS[number % len(MARKERS)]}
            style |= {"markerfacecolor": _setting("axes.facecolor")} if half is None else {}
            axes.errorbar(mean, height, xerr=half, capsize=4, elinewidth=LINE, **style)
            axes.text(1.01, height, f"{mean:+.2f}", transform=axes.get_yaxis_transform(), va="center", fontsize="small")
        axes.set_yticks(range(len(methods)), [wrapped(method) for method in methods])
        axes.set_ylim(len(methods) - 0.4, -0.6)
        axes.margins(x=0.08)
        axes.grid(visible=False, axis="y")
        marks = [
            Line2D([], [], color=COLOURS[n % len(COLOURS)], marker=MARKERS[n % len(MARKERS)])
            for n in range(len(controls))
        ]
        _legend(figure, marks, [f"against {label(control)}" for control in controls])

    return draw


def draw_curves(curves: dict[str, list[list[dict]]]) -> Draw:
    """Loss and accuracy in training and validation, mean over seeds; `curves`: name -> one history for each seed.

    If no run has an accuracy, for want of labels, the agreement with the teacher is in its place.
    """
    keys = {key for histories in curves.values() for history in histories for line in history for key in line}
    second = ("top1", "top-1 accuracy (%)")
    if "train/top1" not in keys and "train/agreement" in keys:
        second = ("agreement", "agreement with the teacher (%)")

    def draw(figure) -> None:
        from matplotlib.ticker import MaxNLocator

        lines = {}
        for place, (key, name) in enumerate((("loss", "loss"), second), start=1):
            axes = figure.add_subplot(2, 1, place, xlabel="epoch" if place == 2 else "", ylabel=name)
            for colour, (title, histories) in zip(COLOURS, curves.items()):
                for part, words, style in (("train", "training", ":"), ("val", "validation", "-")):
                    points = _mean_curve(histories, f"{part}/{key}")
                    if points:
                        marker = "o" if len(points) == 1 else None
                        (line,) = axes.plot(*zip(*points), style, color=colour, marker=marker)
                        lines.setdefault(label(f"{title}, {words}", 60), line)
            axes.xaxis.set_major_locator(MaxNLocator(nbins=9, integer=True, min_n_ticks=1))
        _legend(figure, list(lines.values()), list(lines))

    return draw


def _mean_curve(histories: list[list[dict]], key: str) -> list[tuple[int, float]]:
    by_epoch: dict[int, list[float]] = {}
    for line in (line for history in histories for line in history if line.get(key) is not None):
        by_epoch.setdefault(line["epoch"], []).append(line[key])
    return [(epoch, sum(values) / len(values)) for epoch, values in sorted(by_epoch.items())]


def draw_pareto(points: list[tuple[str, int, float | None, float, float]]) -> Draw:
    """Accuracy against parameters and latency; points: name, parameters, milliseconds, mean accuracy, deviation.

    Points of the same cost stand side by side.
    """

    def draw(figure) -> None:
        marks = {}
        for place, (column, name) in enumerate(((1, "parameters"), (2, "CPU latency, one image (ms)")), start=1):
            axes = figure.add_subplot(2, 1, place, xlabel=name, ylabel="test top-1 (%)")
            values = [point[column] for point in points if point[column] is not None]
            if not values:
                axes.set_xticks([])
                continue
            step = _logarithmic(axes, min(values) / 1.5, max(values) * 1.5)
            same, drawn = Counter(values), Counter()
            for number, (title, *numbers) in enumerate(points):
                value, mean, deviation = numbers[column - 1], *numbers[2:]
                if value is not None:
                    aside = step ** ((drawn[value] - (same[value] - 1) / 2) * min(1, 4 / same[value]))
                    drawn[value] += 1
                    marker = MARKERS[(number // len(COLOURS) + number) % len(MARKERS)]
                    style = {"color": COLOURS[number % len(COLOURS)], "fmt": marker, "capsize": 3}
                    marks[number] = axes.errorbar(value * aside, mean, yerr=deviation, **style), label(title, 50)
        _legend(figure, *map(list, zip(*(marks[number] for number in sorted(marks)))) if marks else ([], []))

    return draw


def _logarithmic(axes, low: float, high: float) -> float:
    """Make the x-axis logarithmic, with few and plain ticks; returns the factor of one fiftieth of its width."""
    from matplotlib.ticker import FuncFormatter, NullLocator

    axes.set_xscale("log")
    axes.set_xlim(low, high)
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xticks(round_numbers(low, high))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: short_number(value)))
    return (high / low) ** (1 / 50)


def round_numbers(low: float, high: float, most: int = 6) -> list[float]:
    """Up to `most` round numbers from `low` to `high`, both positive, at distances that suit a logarithmic axis."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for mantissas in ((1, 1.5, 2, 3, 4, 6, 8), (1, 1.5, 2, 3, 5, 7), (1, 2, 3, 5), (1, 2, 5), (1, 3), (1,)):
        numbers = [mantissa * 10.0**power for power in powers for mantissa in mantissas]
        numbers = [number for number in numbers if low <= number <= high]
        if len(numbers) <= most:
            return numbers
    return numbers[:: math.ceil(len(numbers) / most)]


def short_number(value: float) -> str:
    """`value` in thousands, millions or billions: 1500 is 1.5k."""
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:g}{unit}"
    return f"{value:g}"


def draw_class_gain(names: list[str], gains: Tensor) -> Draw:
    """Difference in accuracy of each class in points, sorted; if there are many classes, both ends.

    Classes of NaN, which have no test images, are left out."""
    order = gains.argsort()[: int((~gains.isnan()).sum())].tolist()  # NaN comes last
    if len(order) > SHOWN:
        order = order[: SHOWN // 2] + order[-SHOWN // 2 :]

    def draw(figure) -> None:
        axes = figure.add_subplot(xlabel="gain (points of the class's accuracy)")
        values = [gains[k].item() for k in order]
        colours = [BETTER if value >= 0 else WORSE for value in values]
        axes.barh(range(len(order)), values, color=colours)
        axes.set_yticks(range(len(order)), [label(names[k], 24) for k in order])
        axes.axvline(0, linewidth=1.2, color=_setting("axes.edgecolor"))
        axes.grid(visible=False, axis="y")

    return draw


def draw_confusion(names: list[str], logits: Tensor, labels: Tensor) -> Draw:
    """What the worst classes are predicted as, in percent of their images; columns: these classes and the rest."""
    count = len(names)
    worst = class_recall(logits, labels).nan_to_num(200).argsort()[: min(WORST, count)]
    matrix = torch.zeros(count, count, dtype=torch.double)
    matrix.index_put_((labels, predicted(logits)), torch.ones(len(labels), dtype=torch.double), accumulate=True)
    shares = 100 * matrix[worst] / matrix[worst].sum(dim=1, keepdim=True).clamp(min=1)
    among_worst = shares[:, worst]
    others = shares.sum(dim=1, keepdim=True) - among_worst.sum(dim=1, keepdim=True)
    table = torch.cat([among_worst, others], dim=1)

    def draw(figure) -> None:
        axes = figure.add_subplot(xlabel="predicted", ylabel="true")
        rows = [label(names[k], 20) for k in worst.tolist()]
        _heat(axes, table, rows, [*rows, "others"], "{:.0f}")

    return draw


def draw_reliability(predictions: dict[str, tuple[Tensor, Tensor]]) -> Draw:
    """Accuracy against confidence in equal bins (Guo et al., arXiv:1706.04599, figure 1); the diagonal is ideal.

    A bin's marker has an area in proportion to its images; empty bins have none. `predictions`: name -> logits and
    labels.
    """
    bins = {title: reliability(*scored) for title, scored in predictions.items()}
    most = max((count for points in bins.values() for _, _, count in points), default=1)
    area = lambda count: 18 + 382 * count / most  # noqa: E731  square points

    def draw(figure) -> None:
        from matplotlib.lines import Line2D

        # Markers at the corners are whole.
        axes = figure.add_subplot(xlabel="confidence", ylabel="accuracy", xlim=(-0.05, 1.05), ylim=(-0.05, 1.05))
        axes.set_aspect("equal")
        axes.plot([0, 1], [0, 1], "--", linewidth=1.2, color=_setting("axes.edgecolor"))
        marks = {}
        for number, (title, points) in enumerate(bins.items()):
            colour, marker = COLOURS[number % len(COLOURS)], MARKERS[number % len(MARKERS)]
            confidence, accuracy, counts = zip(*points)
            sizes = [area(count) for count in counts]
            # Rings over pale faces: a large marker hides none below it.
            axes.scatter(confidence, accuracy, sizes, facecolors=[(colour, 0.3)], edgecolors=colour, marker=marker)
            marks[label(title)] = Line2D([], [], linestyle="", color=colour, marker=marker)
        for count in _round_counts(most):
            name = f"{count:,} image{'s' * (count > 1)}"
            style = {"marker": "o", "markersize": area(count) ** 0.5, "color": _setting("legend.labelcolor")}
            marks[name] = Line2D([], [], linestyle="", markerfacecolor="none", **style)
        _legend(figure, list(marks.values()), list(marks))

    return draw


def _round_counts(most: int) -> list[int]:
    """Up to three round numbers of images, the largest at most `most`."""
    power = 10 ** (len(str(most)) - 1)
    largest = most // power * power
    return sorted({max(1, largest // divisor) for divisor in (1, 4, 20)})


def reliability(logits: Tensor, labels: Tensor) -> list[tuple[float, float, int]]:
    """Mean confidence, accuracy and number of images of each bin that has any."""
    confidence, correct, bins = by_confidence(logits, labels)
    masks = [bins == b for b in range(BINS)]
    return [
        (confidence[mask].mean().item(), correct[mask].mean().item(), int(mask.sum())) for mask in masks if mask.any()
    ]


def draw_grid(groups: list[Group], seeds: set[int], rows: str, columns: str | None) -> Draw:
    """Mean validation accuracy of `seeds` over two flags of a method (or one); settings that were tested are framed."""
    across = sorted({group.flags[columns] for group in groups}) if columns else [None]
    down = sorted({group.flags[rows] for group in groups})
    table = torch.full((len(down), len(across)), torch.nan, dtype=torch.double)
    tested = []
    for group in groups:
        place = down.index(group.flags[rows]), across.index(group.flags[columns] if columns else None)
        table[place] = group.mean("val_top1_last", seeds)
        tested += [place] * bool(group.tested)

    def draw(figure) -> None:
        from matplotlib.patches import Rectangle

        axes = figure.add_subplot(ylabel=rows.replace("_", " "), xlabel=(columns or "").replace("_", " "))
        _heat(axes, table, list(map(str, down)), [str(value) if columns else "" for value in across], "{:.2f}")
        for row, column in tested:
            axes.add_patch(
                Rectangle((column - 0.5, row - 0.5), 1, 1, fill=False, edgecolor=COLOURS[1], linewidth=3, clip_on=False)
            )

    return draw


def _heat(axes, table: Tensor, rows: list[str], columns: list[str], style: str) -> None:
    axes.imshow(table.numpy(), cmap="cividis", aspect="auto")
    axes.grid(visible=False)
    axes.set_xticks(range(len(columns)), columns)
    axes.set_yticks(range(len(rows)), rows)
    if len(columns) * max(len(one) + len(other) for one, other in zip(columns, columns[1:] or [""])) > 2 * LETTERS:
        axes.tick_params(axis="x", rotation=45)
        for tick in axes.get_xticklabels():
            tick.set(ha="right", rotation_mode="anchor")  # a label ends at its column
    measured = table[~table.isnan()]
    middle = (measured.max() + measured.min()).item() / 2 if len(measured) else 0
    for row, values in enumerate(table.tolist()):
        for column, value in enumerate(values):
            if value == value:  # not NaN: a setting that was not run
                colour = "black" if value > middle else "white"
                axes.text(column, row, style.format(value), ha="center", va="center", color=colour, fontsize=9)


def wrapped(text: str, width: int = 22, most: int = 3) -> str:
    """`text` on up to `most` lines."""
    lines = textwrap.wrap(label(text, width * most - 4), width)
    return "\n".join(lines[:most])


def _setting(name: str) -> str:
    """A colour of the theme that is being drawn."""
    from matplotlib import rcParams

    return rcParams[name]
