"""The report's Table I with true numbers, and what may be concluded from it."""

from pathlib import Path
from typing import NamedTuple

from rich.console import Console
from rich.table import Table
from rich.text import Text

from kd.errors import UserError
from kd.metrics import images_noise
from kd.runs.results import checked_summary
from kd.utils.console import console


class Metric(NamedTuple):
    """A number of summary.json, and how tables show it."""

    key: str
    style: str  # its format
    title: str  # in a run's own table, and in the report's table of rare classes
    report: str = ""  # the report's title; "" if it has no column there
    card: str = ""  # the model card's


METRICS = {
    metric.key: metric
    for metric in (
        Metric("val_top1_last", ".2f", "val", "val, last"),
        Metric("val_top1_best", ".2f", "best val", "val, best"),
        Metric("test_top1", ".2f", "test", "test, last", "top-1"),
        Metric("test_top1_best", ".2f", "test@best", "test, best"),
        Metric("test_top5", ".2f", "test top-5", "test top-5", "top-5"),
        Metric("test_nll", ".4f", "NLL", "NLL", "NLL"),
        Metric("test_ece", ".2f", "ECE", "ECE", "ECE"),
        Metric("agreement", ".2f", "agreement", "agreement", "agreement with the teacher"),
        # Only of a run whose training classes differ in size.
        Metric("test_balanced_top1", ".2f", "balanced"),
        Metric("test_top1_many", ".2f", "many-shot"),
        Metric("test_top1_medium", ".2f", "medium-shot"),
        Metric("test_top1_few", ".2f", "few-shot"),
    )
}
COLUMNS = tuple(metric for metric in METRICS.values() if metric.report)
NARROW = ("val_top1_best", "test_top1", "test_top1_best", "agreement")  # what a terminal of 80 columns has room for


def show_results(student: Path, control: Path | None = None) -> None:
    """Print a finished run's table: its teacher, the student alone and the student itself, as far as there are.

    `control`: the student alone, for a run that was finished before there was one.
    """
    summary = checked_summary(student / "summary.json")
    rows = _rows(summary, control)
    control = dict(rows).get("student alone") if summary["method"] != "none" else None
    wide = console if console.is_terminal else Console(width=120)
    wide.print(_table(rows, [column for column in COLUMNS if wide.width >= 110 or column.key in NARROW]))
    if any(run["test_top1"] is None for run in (summary, control) if run):
        wide.print(Text("the test split was not read (--no-test)"))
    elif control is None and summary["method"] != "none":
        wide.print(Text("student alone: not measured; the same command with --control measures it"))
    elif control is not None:
        wide.print(Text(format_verdict(summary, control)))
    wide.print(Text(f"run folder: {student}"), soft_wrap=True)


def _rows(summary: dict, control: Path | None = None) -> list[tuple[str, dict | None]]:
    """Every network that belongs to the result, by what it is called; None for one that was not measured."""
    rows = []
    for one in summary.get("teachers", []):
        read = _read(one["folder"])
        rows.append(("teacher", read and read | {"agreement": one["agreement"]}))
    if summary.get("teacher") and "teachers" not in summary:
        named = summary["teacher"]
        read = [_read(folder) for folder in (named if isinstance(named, list) else [named])]
        rows += [("teacher", one) for one in (read if any(read) else [_elsewhere(summary)])]
    alone = summary.get("control") or control
    if summary["method"] != "none":
        rows.append(("student alone", _read(str(alone)) if alone else None))
    return [*rows, (_name(summary), summary)]


def plain_table(summary: dict) -> tuple[list[str], list[list]]:
    """The same table as titles and rows of unrounded values, for programs."""
    keys = ("model", "params", *(column.key for column in COLUMNS))
    rows = [[name, *(network.get(key) for key in keys)] for name, network in _rows(summary) if network is not None]
    return ["network", *keys], rows


def _name(summary: dict) -> str:
    if summary["script"] == "train_teacher.py":
        return "teacher"
    return "student alone" if summary["method"] == "none" else f"student ({summary['method']})"


def _elsewhere(summary: dict) -> dict | None:
    """A teacher that is no run here: its name, and what the student's own run measured of it."""
    known = summary.get("teacher_test_top1")
    return {"model": str(summary["teacher"]), "params": None, "test_top1": known} if known is not None else None


def _read(folder: str) -> dict | None:
    """A run's summary; None where there is none, or what is there is none that a run writes."""
    path = Path(folder) / "summary.json"
    try:
        return checked_summary(path) if path.exists() else None
    except (UserError, OSError):
        return None


def _table(rows: list[tuple[str, dict | None]], columns: list[Metric]) -> Table:
    table = Table(title="percent, NLL aside; of the last epoch's weights, but for best val and test@best")
    table.add_column("network", no_wrap=True)
    table.add_column("model", overflow="fold")
    table.add_column("params", justify="right")
    for column in columns:
        table.add_column(column.title, justify="right")
    for name, summary in rows:
        if summary is None:
            table.add_row(name, "not measured", *[""] * (len(columns) + 1))
            continue
        cells = [_cell(summary.get(column.key), column.style) for column in columns]
        table.add_row(Text(name), Text(summary["model"]), _count(summary["params"]), *cells)
    return table


def _cell(value: float | int | None, style: str) -> str:
    return "" if value is None else f"{value:{style}}"


def _count(params: int | None) -> str:
    if params is None:
        return ""
    return f"{params / 1e6:.2f}M" if params >= 1e6 else f"{params / 1e3:.1f}k"


def format_verdict(student: dict, control: dict) -> str:
    """What one seed's difference in test accuracy says, beside the noise of a test set of that size."""
    gain, images = student["test_top1"] - control["test_top1"], student["test_images"]
    noise = images_noise(student["test_top1"], control["test_top1"], images)
    counted = f"{gain:+.2f} points ({round(gain * images / 100):+d} of {images} test images)"
    words = f"distilled against alone: {counted}, one seed; the test set's own noise is ±{noise:.2f}."
    if abs(gain) <= noise:
        return f"{words} Smaller than that noise: no gain or loss was shown."
    return f"{words} Distillation {'helped' if gain > 0 else 'hurt'} here; how much seeds vary is not in this number."
