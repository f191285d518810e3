"""The report's figures. Each `draw_*` returns a function that fills a matplotlib figure; `render` makes its PNG.

One picture serves light and dark pages: the background is transparent, and every colour contrasts with both.
"""

import io
import warnings
from collections.abc import Callable

import torch
from torch import Tensor

from kd.metrics import BINS, by_confidence, class_recall, predicted
from kd.report.groups import Group

# Of lines and dots: contrast of at least 3 with white and with #0d1117 (WCAG 2.2, 1.4.11), and at least 33 apart in
# CIELAB, also as protanopes and deuteranopes see them (simulated as in Machado et al., 2009).
COLOURS = ("#006699", "#ff5500", "#29a38f", "#8000ff", "#b82e2e", "#8080ff")
INK = "#747b84"  # of text and axes: contrast 4.3 with white, 4.4 with #0d1117; more with one is less with the other

CURVES = (10.0, 4.4)  # inches: two panels, with their legend below
SHOWN = 30  # classes that a bar chart has room for
WORST = 10  # classes in the confusion matrix
POINTS = 40  # networks that the Pareto picture's legend has room for

Draw = Callable[[object], None]


def render(size: tuple[float, float], draw: Draw) -> bytes:
    """The PNG of a figure of this size in inches."""
    from matplotlib import rc_context
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    inked = ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color", "grid.color")
    settings = dict.fromkeys((*inked, "legend.labelcolor", "legend.edgecolor"), INK)
    settings |= dict.fromkeys(("figure.facecolor", "axes.facecolor", "legend.facecolor"), "none")
    settings |= {"legend.fontsize": "small"}
    with rc_context(settings), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing")  # a class name in a script the font lacks
        figure = Figure(figsize=size, dpi=110, layout="constrained")
        draw(figure)
        stream = io.BytesIO()
        FigureCanvasAgg(figure).print_png(stream)
    return stream.getvalue()


def label(text: str, longest: int = 40) -> str:
    """Shorten and escape a text, so that matplotlib sets no mathematics between dollars."""
    text = text if len(text) <= longest else f"{text[: longest - 1]}…"
    return text.replace("$", r"\$")


def draw_curves(curves: dict[str, list[list[dict]]]) -> Draw:
    """Loss and accuracy in training and validation, mean over seeds; `curves`: name -> one history for each seed."""

    def draw(figure) -> None:
        for place, (key, name) in enumerate((("loss", "loss"), ("top1", "top-1 accuracy (%)")), start=1):
            axes = figure.add_subplot(1, 2, place, xlabel="epoch", ylabel=name)
            for colour, (title, histories) in zip(COLOURS, curves.items()):
                for part, words, style in (("train", "training", ":"), ("val", "validation", "-")):
                    points = _mean_curve(histories, f"{part}/{key}")
                    if points:
                        marker = "o" if len(points) == 1 else None
                        text = label(f"{title}, {words}", 60)
                        axes.plot(*zip(*points), style, color=colour, label=text, marker=marker)
            axes.grid(alpha=0.3)
        figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=2)

    return draw


def _mean_curve(histories: list[list[dict]], key: str) -> list[tuple[int, float]]:
    by_epoch: dict[int, list[float]] = {}
    for line in (line for history in histories for line in history if line.get(key) is not None):
        by_epoch.setdefault(line["epoch"], []).append(line[key])
    return [(epoch, sum(values) / len(values)) for epoch, values in sorted(by_epoch.items())]


def draw_pareto(points: list[tuple[str, int, float | None, float, float]]) -> Draw:
    """Accuracy against parameters and latency; points: name, parameters, milliseconds, mean accuracy, deviation."""

    def draw(figure) -> None:
        for place, (column, name) in enumerate(((1, "parameters"), (2, "CPU latency, one image (ms)")), start=1):
            axes = figure.add_subplot(1, 2, place, xlabel=name, ylabel="test top-1 (%)", xscale="log")
            values = [point[column] for point in points if point[column] is not None]
            if values:  # by default a logarithmic axis of a single value has no width
                axes.set_xlim(min(values) / 1.5, max(values) * 1.5)
            for number, point in enumerate(points):
                if point[column] is not None:
                    style = {"color": COLOURS[number % len(COLOURS)], "fmt": "os^Dv<>P"[number // len(COLOURS) % 8]}
                    axes.errorbar(point[column], point[3], yerr=point[4], capsize=3, label=label(point[0], 50), **style)
            axes.grid(alpha=0.3, which="both")
            if place == 1:
                figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=2)

    return draw


def draw_class_gain(names: list[str], gains: Tensor) -> Draw:
    """Difference in accuracy of each class in points, sorted; if there are many classes, both ends.

    Classes of NaN, which have no test images, are left out."""
    order = gains.argsort()[: int((~gains.isnan()).sum())].tolist()  # NaN comes last
    if len(order) > SHOWN:
        order = order[: SHOWN // 2] + order[-SHOWN // 2 :]

    def draw(figure) -> None:
        axes = figure.add_subplot(xlabel="gain (points of the class's accuracy)")
        values = [gains[k].item() for k in order]
        colours = [COLOURS[2] if value >= 0 else COLOURS[4] for value in values]
        axes.barh(range(len(order)), values, color=colours)
        axes.set_yticks(range(len(order)), [label(names[k], 24) for k in order])
        axes.axvline(0, color=INK, linewidth=0.8)
        axes.grid(alpha=0.3, axis="x")

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
        axes.tick_params(axis="x", rotation=45)

    return draw


def draw_reliability(predictions: dict[str, tuple[Tensor, Tensor]]) -> Draw:
    """Accuracy against confidence in equal bins (Guo et al., arXiv:1706.04599, figure 1); the diagonal is ideal.

    `predictions`: name -> logits and labels."""

    def draw(figure) -> None:
        axes = figure.add_subplot(xlabel="confidence", ylabel="accuracy", xlim=(0, 1), ylim=(0, 1), aspect="equal")
        axes.plot([0, 1], [0, 1], "--", color=INK, linewidth=1)
        for colour, (title, (logits, labels)) in zip(COLOURS, predictions.items()):
            points = reliability(logits, labels)
            confidence, accuracy, counts = zip(*points)
            axes.plot(confidence, accuracy, color=colour, linewidth=0.8)
            sizes = [8 + 120 * count / sum(counts) for count in counts]
            axes.scatter(confidence, accuracy, sizes, color=colour, label=label(title))
        axes.grid(alpha=0.3)
        axes.legend(loc="upper left")

    return draw


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
                Rectangle((column - 0.5, row - 0.5), 1, 1, fill=False, edgecolor=COLOURS[4], linewidth=3, clip_on=False)
            )

    return draw


def _heat(axes, table: Tensor, rows: list[str], columns: list[str], style: str) -> None:
    axes.imshow(table.numpy(), cmap="cividis", aspect="auto")
    axes.set_xticks(range(len(columns)), columns)
    axes.set_yticks(range(len(rows)), rows)
    measured = table[~table.isnan()]
    middle = (measured.max() + measured.min()).item() / 2 if len(measured) else 0
    for row, values in enumerate(table.tolist()):
        for column, value in enumerate(values):
            if value == value:  # not NaN: a setting that was not run
                colour = "black" if value > middle else "white"
                axes.text(column, row, style.format(value), ha="center", va="center", color=colour, fontsize=9)
