"""Draw a group of offline runs as W&B's workspace would show them: `python -m tests.wandb_picture RUNS PICTURE`.

One panel per metric, one line per run, read from the offline files. Makes the picture in docs/training.md.
"""

import sys
from pathlib import Path

import matplotlib
from matplotlib.figure import Figure

from tests.wandb_offline import read_offline

PANELS = (
    "val/top1",
    "val/loss",
    "train/top1",
    "train/loss",
    "train/agreement",
    "train/kl",
    "train/soft_entropy",
    "train/gradient_ratio",
)


def draw(folders: list[Path]) -> Figure:
    """Plot each run's history, in every one of PANELS that it logged."""
    runs = [read_offline(folder) for folder in folders]
    kinds = sorted({run.run.job_type for run in runs})
    colours = dict(zip(kinds, matplotlib.colormaps["tab10"].colors))
    figure = Figure(figsize=(14, 6), layout="constrained")
    for axes, name in zip(figure.subplots(2, 4).flat, PANELS):
        for run in runs:
            points = [(line["epoch"], line[name]) for line in run.history if name in line]
            if points:
                label = f"{run.run.job_type} {run.run.tags[1]}"
                axes.plot(*zip(*points), color=colours[run.run.job_type], label=label, linewidth=1.2, marker=".")
        axes.set_title(name, fontsize=10)
        axes.set_xlabel("epoch", fontsize=8)
        axes.tick_params(labelsize=8)
        axes.spines[["top", "right"]].set_visible(False)
    entries = dict(zip(*reversed(figure.axes[0].get_legend_handles_labels())))
    figure.legend(entries.values(), entries.keys(), loc="outside lower center", ncols=len(entries), frameon=False)
    figure.suptitle(f"{runs[0].run.project} / {runs[0].run.run_group}: {len(runs)} runs", fontsize=11)
    return figure


if __name__ == "__main__":
    source, picture = map(Path, sys.argv[1:])
    draw(sorted(source.glob("*/wandb/offline-run-*"))).savefig(picture, dpi=80)
