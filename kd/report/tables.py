"""The report on one data set: verdicts, tables of its groups, and the figures between them."""

from kd.metrics import BINS, SHOT_NAMES
from kd.report.costs import Costs
from kd.report.document import Block, Heading, Lines, Table
from kd.report.figures import Gallery
from kd.report.groups import ALONE, Group, missing_cell
from kd.report.statistics import cell
from kd.runs.results import Run
from kd.runs.table import COLUMNS, METRICS, Metric

SCORES = [METRICS[key] for key in ("val_top1_last", "val_top1_best", "test_top1", "test_top1_best", "test_top5")]
CALIBRATION = [METRICS[key] for key in ("test_nll", "test_ece", "agreement")]
SHOTS = [METRICS[key] for key in ("test_top1", "test_balanced_top1", *(f"test_top1_{name}" for name in SHOT_NAMES))]


def accuracy_table(groups: list[Group]) -> Table:
    rows = external_teachers(groups)
    for group in groups:
        cells = [group.cell(metric) for metric in SCORES]
        rows.append((group.label, group.model, group.count, *cells))
    note = "Percent; mean ± standard deviation over seeds (in brackets: how many seeds, if not all have it). If a seed "
    note += "has several runs, whose teachers have several seeds, their mean counts. last: the last epoch's weights; "
    note += "best: those of the epoch that was best on validation. The test set was read once, at each run's end; it "
    note += "chose nothing."
    if any(run.summary.get("test_split") == "validation" for group in groups for run in group.runs):
        note += " The data has no test split: test is its validation split, held out of all training."
    if any(group.external_teacher for group in groups):
        note += " A teacher that is not among these runs: as its students' runs measured it."
    return Table(("network", "model", "seeds", *(metric.report for metric in SCORES)), rows, note, words=2)


def external_teachers(groups: list[Group]) -> list[tuple[str, ...]]:
    """Rows of the teachers that are not among these runs, with the one number known of them."""
    rows = {}
    for group in groups:
        if group.external_teacher:
            measured = group.values("teacher_test_top1")[:1]  # the same for every student: the teacher does not change
            cells = {"test_top1": cell(measured, ".2f", 1, missing_cell("test_top1", group.runs))}
            scores = (cells.get(metric.key, "") for metric in SCORES)
            name = group.external_teacher
            row = ("teacher, not among these runs", name, "", *scores)
            rows[name] = row if measured else rows.get(name, row)
    return list(rows.values())


def cost_table(groups: list[Group], costs: Costs) -> Table:
    rows = []
    for group in groups:
        cost = costs.of(group.runs[0])
        numbers = ("not measured",) * 3
        if cost:
            numbers = (f"{cost.macs / 1e6:.2f}M", f"{cost.bytes / 1e6:.2f} MB", f"{cost.milliseconds:.2f} ms")
        scores = [group.cell(metric) for metric in CALIBRATION]
        rows.append((group.label, group.model, f"{group.runs[0].summary['params']:,}", *numbers, *scores))
    note = "MACs: multiply-accumulates of convolutions and matrix products for one image. size: model.safetensors. "
    note += f"latency: one image, median of repeated passes ({costs.machine}). NLL in nats and ECE (percent, {BINS} "
    note += (
        "bins) on the test set; agreement: percent of its images on which network and teacher predict the same class."
    )
    titles = ("parameters", "MACs", "size", "latency", *(metric.report for metric in CALIBRATION))
    return Table(("network", "model", *titles), rows, note, words=2)


def gain_table(groups: list[Group]) -> Table | None:
    """Every method minus every control, on the same seeds; None if there is no such pair."""
    rows, intervals = [], 0
    for group in groups:
        for control in group.controls:
            last, best = (group.gain(control, key) for key in ("test_top1", "test_top1_best"))
            if last:
                seeds = " ".join(map(str, last.seeds))
                numbers = (f"{last.mean:+.2f}", last.interval, f"{best.mean:+.2f}" if best else "")
                rows.append((group.label, control.label, seeds, *numbers, last.words))
                intervals += last.half is not None
    if not rows:
        return None
    note = "Points of test accuracy, paired by seed; the interval is Student's t over seeds, 95%. It covers the noise "
    note += "of training, not that of the choice of test images."
    if intervals > 1:
        note += f" Of {intervals} such intervals {0.05 * intervals:.1f} are expected to miss 0 by luck alone."
    head = ("method", "control", "seeds", "gain, last", "95% interval", "gain, best", "verdict")
    return Table(head, rows, note, words=3, remark=True)


def format_verdicts(groups: list[Group]) -> Lines:
    """One line for each method and control: what was gained, and whether that exceeds the noise."""
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
            lines.append(
                f"{group.label}: no student alone by the same recipe among these runs, so its gain is unknown."
            )
    return Lines(tuple(lines) or ("No distilled student with a test result among these runs.",))


def run_table(groups: list[Group]) -> Table:
    """Every run by itself, with the numbers of its summary.json."""
    rows = []
    for group in groups:
        for run in group.runs:
            cells = [_run_cell(run, metric) for metric in COLUMNS]
            best = run.summary["best_epoch"]
            rows.append((str(run.path), group.label, str(run.seed), "" if best is None else str(best), *cells))
    head = ("run folder", "network", "seed", "best epoch", *(metric.report for metric in COLUMNS))
    return Table(head, rows, words=2, quiet=True)


def _run_cell(run: Run, metric: Metric) -> str:
    value = run.summary.get(metric.key)
    return missing_cell(metric.key, [run]) if value is None else f"{value:{metric.style}}"


def section(name: str, groups: list[Group], costs: Costs, prefix: str) -> tuple[list[Block], list[str]]:
    """All blocks on one data set, and notes on what could not be shown."""
    gallery = Gallery(groups, costs, prefix)
    blocks: list[Block] = [
        Heading(2, f"On {name}"),
        format_verdicts(groups),
        Heading(3, "Accuracy"),
        accuracy_table(groups),
    ]
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


def rare_table(groups: list[Group]) -> Table | None:
    """Accuracy on common and rare classes; None if no run's training classes differ in size."""
    groups = [group for group in groups if group.values("test_balanced_top1")]
    if not groups:
        return None
    rows = []
    for group in groups:
        rows.append((group.label, group.model, group.count, *(group.cell(metric) for metric in SHOTS)))
    sizes = dict.fromkeys(_class_sizes(run.summary.get("shots")) for group in groups for run in group.tested)
    note = "Percent of test images, last epoch's weights; balanced: the mean over classes. Classes by their number of "
    note += f"training images: {'; or '.join(filter(None, sizes))}."
    return Table(("network", "model", "seeds", *(metric.title for metric in SHOTS)), rows, note, words=2)


def _class_sizes(shots: object) -> str:
    """'many 3 of 120 to 450, ...'; "" if missing or malformed."""
    try:
        parts = [(name, part["classes"], part["smallest"], part["largest"]) for name, part in shots.items()]
        return ", ".join(f"{name} {int(n)} of {int(least)} to {int(most)}" for name, n, least, most in parts)
    except (AttributeError, KeyError, TypeError, ValueError):
        return ""
