"""The results table that ends a run (the report's Table I), and the verdict on what distillation gained."""

import shlex
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from rich.console import Console
from rich.table import Table
from rich.text import Text

from kd.errors import UserError
from kd.runs.comparison import ERROR, Answers, Result, compare
from kd.runs.results import PROBE_SCORES, checked_summary, identity_of, is_labelled, teachers_of
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
        # Only if the training classes differ in size.
        Metric("test_balanced_top1", ".2f", "balanced"),
        Metric("test_top1_many", ".2f", "many-shot"),
        Metric("test_top1_medium", ".2f", "medium-shot"),
        Metric("test_top1_few", ".2f", "few-shot"),
        # Only without labels; the loss is the method's, agreement is on validation images.
        Metric("val_loss_last", ".4f", "val loss", "val loss, last"),
        Metric("val_loss_best", ".4f", "best val loss", "val loss, best"),
        Metric("val_agreement", ".2f", "val agreement", "val agreement"),
        # Only with --ema.
        Metric("test_top1_ema", ".2f", "test@ema"),
        # Only with --probe.
        Metric("probe_knn", ".2f", "kNN"),
        Metric("probe_linear", ".2f", "linear probe"),
    )
}
WITHOUT_LABELS = tuple(METRICS[key] for key in ("val_loss_last", "val_loss_best", "val_agreement"))
COLUMNS = tuple(metric for metric in METRICS.values() if metric.report and metric not in WITHOUT_LABELS)
AVERAGED = (METRICS["test_top1_ema"],)  # shown if a run has it
PROBED = tuple(METRICS[key] for key in PROBE_SCORES)  # likewise
NO_LABELS = "no labels"  # in place of a score that needs them
NARROW = ("val_top1_best", "test_top1", "test_top1_best", "agreement")  # fits a terminal of 80 columns


def show_results(student: Path, control: Path | None = None) -> None:
    """Print a finished run's table: teacher, student alone and student, as far as they exist.

    `control`: the run of the student alone; needed only if it was trained after this run.
    """
    summary = checked_summary(student / "summary.json")
    alone = summary.get("control") or control
    rows = _rows(student, summary, control)
    beside = dict(rows).get("student alone") if summary["method"] != "none" else None
    wide = console if console.is_terminal else Console(width=120)
    averages = averaged([network for _, network in rows if network])
    columns = [column for column in COLUMNS if wide.width >= 110 or column.key in NARROW]
    if averages and wide.width < 132:  # the average takes the place of another column
        left_out = "test_top5" if wide.width >= 110 else "agreement"
        columns = [column for column in columns if column.key != left_out]
    wide.print(_table(rows, [*columns, *averages]))
    if not is_labelled(summary):
        wide.print(Text(_unlabelled_result(summary)))
    for line in probe_lines(rows):
        wide.print(Text(line), soft_wrap=True)
    if summary.get("test_split") == "validation":
        wide.print(Text("test: the data's validation split, as it has no test split"))
    if line := _beside_control(student, summary, beside, alone and Path(alone)):
        wide.print(Text(line))
    wide.print(Text(f"run folder: {student}"), soft_wrap=True)
    related = [("teacher", folder) for folder in teachers_of(summary)]
    related += [("student alone", str(alone))] if alone and summary["method"] != "none" else []
    for name, folder in related:
        wide.print(Text(f"{name}: {folder}"), soft_wrap=True)
    trust = " --trust-code" if ":" in summary["model"] else ""
    wide.print(Text(f"next: python -m kd.export {shlex.quote(str(student))}{trust}"), soft_wrap=True)


def _beside_control(student: Path, summary: dict, control: dict | None, alone: Path | None) -> str:
    """How a run compares with the student alone, or why that is not known; empty without labels, as neither is tested.

    `control` is the summary of the run in `alone`.
    """
    if not is_labelled(summary):
        return ""
    if any(run["test_top1"] is None for run in (summary, control) if run):
        return "the test split was not read (--no-test)"
    if control is not None:
        extended, other = (identity_of(folder).get("extended_from") for folder in (student, alone))
        if extended != other:
            return "distilled against alone: one was extended from a shorter training, so they are not compared"
        return format_verdict(Result(student, summary), Result(alone, control))
    missing = "student alone: not measured; the same command with --control measures it"
    return "" if summary["method"] == "none" else missing


def averaged(summaries: list[dict]) -> list[Metric]:
    """The scores of averaged weights that any of these runs has."""
    return _measured(AVERAGED, summaries)


def probed(summaries: list[dict]) -> list[Metric]:
    """The scores of embeddings that any of these runs has."""
    return _measured(PROBED, summaries)


def _measured(metrics: Iterable[Metric], summaries: list[dict]) -> list[Metric]:
    return [metric for metric in metrics if any(summary.get(metric.key) is not None for summary in summaries)]


def probe_lines(rows: list[tuple[str, dict | None]]) -> list[str]:
    """A line for each set of --probe: what each network's embedding scored on its test split."""
    found: dict[str, list[str]] = {}
    unread: dict[str, list[str]] = {}
    for name, summary in rows:
        if summary and all(summary.get(key) is not None for key in PROBE_SCORES):
            scores = ", ".join(f"{metric.title} {summary[metric.key]:{metric.style}}" for metric in PROBED)
            found.setdefault(str(summary.get("probe_data")), []).append(f"{name}: {scores}")
        elif summary and summary.get("probe_data"):
            unread.setdefault(str(summary["probe_data"]), []).append(name)
    lines = [f"embedding on {data}, percent of its test images: {'; '.join(parts)}" for data, parts in found.items()]
    not_read = "the probe's test split was not read (--no-test)"
    return lines + [f"embedding on {data}, {', '.join(names)}: {not_read}" for data, names in unread.items()]


def unlabelled(summary: dict) -> tuple[Metric, ...]:
    """What a run on images without labels has in place of accuracies."""
    return () if is_labelled(summary) else WITHOUT_LABELS


def _rows(student: Path, summary: dict, control: Path | None = None) -> list[tuple[str, dict | None]]:
    """Each network of the result of the run in `student`: its name in the table, and its summary or None if it was not
    measured."""
    members = {member["folder"]: member for member in summary.get("teachers", [])}
    teachers = []
    for folder in teachers_of(summary):
        teacher, member = _read(folder), members.get(folder)
        if teacher and is_labelled(summary) and not _same_images(student, Path(folder)):
            measured = member or {"test_top1": summary.get("teacher_test_top1")}
            kept = ("model", "params", "probe_data", *PROBE_SCORES)  # the probe's set is another
            teacher = {key: teacher[key] for key in kept if key in teacher} | measured
        elif teacher:  # not its own agreement with a teacher that it was distilled from
            teacher["agreement"] = member and member["agreement"]
        elif member:  # a pretrained network: what this run measured of it
            teacher = {"model": folder, "params": None, **member}
        teachers.append(teacher)
    if teachers and not members and not any(teachers):
        teachers = [_external_teacher(summary)]
    rows = [("teacher", teacher) for teacher in teachers]
    if len(members) > 1 and summary.get("teacher_test_top1") is not None:
        together = {"model": f"{len(members)} networks", "params": None, "test_top1": summary["teacher_test_top1"]}
        rows.append(("teachers together", together | {"agreement": summary.get("agreement")}))
    alone = summary.get("control") or control
    if summary["method"] != "none" and is_labelled(summary):
        rows.append(("student alone", _read(str(alone)) if alone else None))
    return [*rows, (_name(student, summary), summary)]


def _same_images(student: Path, teacher: Path) -> bool:
    """Whether both were scored on the same test images and classes, so that both summaries' numbers compare."""
    one, other = identity_of(student), identity_of(teacher)
    keys = ("data", "classes", "image", "test_fraction")
    return not (one and other) or all(one.get(key) == other.get(key) for key in keys)


def _unlabelled_result(summary: dict) -> str:
    """What is known of a student that was distilled on images without labels, in a sentence."""
    if summary["val_loss_last"] is None:
        return "no labels, and no validation: no loss of distillation was measured"
    best = f"{summary['val_loss_best']:.4f} at epoch {summary['best_epoch']}"
    agreement = summary.get("val_agreement")
    agrees = "" if agreement is None else f"; it agrees with the teacher on {agreement:.2f}% of the validation images"
    return f"no labels: validation loss of distillation {summary['val_loss_last']:.4f}, best {best}{agrees}"


def missing(summary: dict, metric: Metric) -> str:
    """What a table shows in place of a number that a run does not have."""
    return "" if is_labelled(summary) or metric in WITHOUT_LABELS else NO_LABELS


def plain_table(folder: Path, summary: dict) -> tuple[list[str], list[list]]:
    """The same table as titles and rows of unrounded values, for W&B."""
    networks = [(name, network) for name, network in _rows(folder, summary) if network is not None]
    summaries = [network for _, network in networks]
    columns = [*COLUMNS, *unlabelled(summary), *averaged(summaries), *probed(summaries)]
    keys = ("model", "params", *(column.key for column in columns))
    rows = [[name, *(network.get(key) for key in keys)] for name, network in networks]
    return ["network", *keys], rows


def _name(folder: Path, summary: dict) -> str:
    if summary["script"] == "train_teacher.py":
        return "teacher"
    if summary["method"] != "none":
        return f"student ({summary['method']})"
    return "student alone, from --init" if identity_of(folder).get("init") else "student alone"


def _external_teacher(summary: dict) -> dict | None:
    """A pretrained teacher without a run folder: its name and the test accuracy that the student's run measured."""
    top1 = summary.get("teacher_test_top1")
    if top1 is None:
        return None
    return {"model": " + ".join(teachers_of(summary)), "params": None, "test_top1": top1}


def _read(folder: str) -> dict | None:
    """A run's summary; None if it is missing or malformed."""
    path = Path(folder) / "summary.json"
    try:
        return checked_summary(path) if path.exists() else None
    except (UserError, OSError):
        return None


def _table(rows: list[tuple[str, dict | None]], columns: list[Metric]) -> Table:
    title = "percent, except NLL; weights of the last epoch, except for best val and test@best"
    if any(column in AVERAGED for column in columns):
        title += "; @ema: averaged weights"
    table = Table(title=title)
    table.add_column("network", no_wrap=True)
    table.add_column("model", overflow="fold")
    table.add_column("params", justify="right")
    for column in columns:
        table.add_column(column.title, justify="right")
    for name, summary in rows:
        if summary is None:
            table.add_row(name, "not measured", *[""] * (len(columns) + 1))
            continue
        cells = [_cell(summary.get(column.key), column.style) or missing(summary, column) for column in columns]
        table.add_row(Text(name), Text(summary["model"]), _count(summary["params"]), *cells)
    return table


def _cell(value: float | int | None, style: str) -> str:
    return "" if value is None else f"{value:{style}}"


def _count(params: int | None) -> str:
    if params is None:
        return ""
    return f"{params / 1e6:.2f}M" if params >= 1e6 else f"{params / 1e3:.1f}k"


def format_verdict(student: Result, control: Result) -> str:
    """One seed's difference in test accuracy, compared with the noise of these test images."""
    found, images = compare([student], [control], Answers()), student.summary["test_images"]
    if found is None:
        seeds = f"{student.summary['seed']} and {control.summary['seed']}"
        return f"distilled against alone: seeds {seeds} differ, so they are not compared"
    counted = f"{found.mean:+.2f} points ({round(found.mean * images / 100):+d} of {images} test images)"
    noise = f"is ±{found.half():.2f}" if found.by_image else f"is at most ±{found.half():.2f} (no test logits)"
    words = f"distilled against alone: {counted}, one seed; the test images' noise {noise}."
    if found.p >= ERROR:
        return f"{words} Smaller than that noise: no gain or loss was shown."
    return f"{words} Beyond that noise; whether the method or the seed did it takes more seeds: python -m kd.study"
