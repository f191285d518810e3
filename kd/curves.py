"""The report's Fig. 1 and 2: loss and accuracy over the epochs, training and validation."""

from pathlib import Path

from kd.files import write_atomically

TRAINING, VALIDATION = "#1f6feb", "#d1495b"


def draw_curves(history: list[dict], title: str, path: Path) -> None:
    """One PNG of two panels; the validation lines are left out where there was no validation."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), layout="constrained")
    figure.suptitle(title)
    epochs = [line["epoch"] for line in history]
    for place, (key, name) in enumerate((("loss", "loss"), ("top1", "top-1 accuracy (%)")), start=1):
        axes = figure.add_subplot(1, 2, place, xlabel="epoch", ylabel=name)
        marker = "o" if len(history) == 1 else None
        axes.plot(epochs, [line[f"train/{key}"] for line in history], color=TRAINING, label="training", marker=marker)
        if f"val/{key}" in history[0]:
            values = [line[f"val/{key}"] for line in history]
            axes.plot(epochs, values, color=VALIDATION, label="validation", marker=marker)
        axes.grid(alpha=0.3)
        axes.legend()
    canvas = FigureCanvasAgg(figure)
    write_atomically(path, lambda partial: canvas.print_png(str(partial)))
