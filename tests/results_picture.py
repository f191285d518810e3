"""Draws a distilled run beside its teacher and its control: `python -m tests.results_picture RUN PICTURE`.

Left the validation accuracy of every epoch, right the test accuracy with the noise of its images. The README's first
picture is made with it.
"""

import sys
from pathlib import Path

from matplotlib.figure import Figure

from kd.utils.files import read_json, read_json_lines

COLOURS = {"teacher": "#6e7781", "student alone": "#bf5b17", "student distilled": "#0969da"}


def wilson_interval(percent: float, images: int) -> tuple[float, float]:
    """The 95% interval of an accuracy that was measured on so many images (Wilson 1927), in percent."""
    z, share = 1.96, percent / 100
    centre = (share + z**2 / (2 * images)) / (1 + z**2 / images)
    half = z / (1 + z**2 / images) * (share * (1 - share) / images + z**2 / (4 * images**2)) ** 0.5
    return 100 * (centre - half), 100 * (centre + half)


def draw(run: Path) -> Figure:
    summary = read_json(run / "summary.json")
    folders = dict(zip(COLOURS, (Path(summary["teacher"]), Path(summary["control"]), run), strict=True))
    figure = Figure(figsize=(8, 2.9), layout="constrained", facecolor="white")
    curves, dots = figure.subplots(1, 2, width_ratios=(1.25, 1))
    for height, (name, folder) in enumerate(folders.items()):
        history, scores = read_json_lines(folder / "metrics.jsonl"), read_json(folder / "summary.json")
        epochs, accuracies = zip(*((line["epoch"], line["val/top1"]) for line in history))
        curves.plot(epochs, accuracies, color=COLOURS[name], linewidth=1.6, label=f"{name} ({scores['model']})")
        top1, (low, high) = scores["test_top1"], wilson_interval(scores["test_top1"], scores["test_images"])
        dots.plot((low, high), (height, height), color=COLOURS[name], linewidth=2.2)
        dots.plot(top1, height, "o", color=COLOURS[name], markersize=7)
        dots.annotate(f"{top1:.2f}", (top1, height), (0, 7), textcoords="offset points", ha="center", fontsize=9)
    curves.set(title="validation accuracy, percent", xlabel="epoch", ylim=(75, 100.5))
    curves.legend(frameon=False, fontsize=9, loc="lower right")
    dots.set(title="test accuracy, percent", xlabel=f"95% interval over {summary['test_images']} test images")
    dots.set(yticks=range(len(folders)), yticklabels=folders, ylim=(len(folders) - 0.5, -0.6))
    for axes in (curves, dots):
        axes.title.set_fontsize(10)
        axes.tick_params(labelsize=9)
        axes.grid(axis="y" if axes is curves else "x", color="#d8dee4", linewidth=0.7)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
    return figure


if __name__ == "__main__":
    source, picture = map(Path, sys.argv[1:])
    draw(source).savefig(picture, dpi=110)
