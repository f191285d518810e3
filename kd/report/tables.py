"""The report on one data set: verdicts, tables of its groups, and the figures between them."""

from kd.metrics import BINS, SHOT_NAMES
from kd.report.costs import Costs
from kd.report.document import Block, Heading, Lines, Paragraph, Table
from kd.report.figures import Gallery
from kd.report.groups import ALONE, SMOOTHED, TEACHER, Comparison, Group, compare_groups, missing_cell
from kd.report.opening import headline, what_was_compared
from kd.runs.comparison import Answers, format_p
from kd.runs.results import Run
from kd.runs.table import COLUMNS, METRICS, WITHOUT_LABELS, Metric, averaged, probed

SCORES = [METRICS[key] for key in ("val_top1_last", "val_top1_best", "test_top1", "test_top1_best", "test_top5")]
CALIBRATION = [METRICS[key] for key in ("test_nll", "test_ece", "agreement")]
SHOTS = [METRICS[key] for key in ("test_top1", "test_balanced_top1", *(f"test_top1_{name}" for name in SHOT_NAMES))]


def accuracy_table(groups: list[Group]) -> Table:
    summaries = [run.summary for group in groups for run in group.runs]
    rows, averages, probes = external_teachers(groups), averaged(summaries), probed(summaries)
    for group in groups:
        cells = [group.cell(metric) for metric in SCORES]
        cells += [group.cell(metric) if group.values(metric.key) else "" for metric in (*averages, *probes)]
        rows.append((group.label, group.model, group.count, *cells))
    note = "Percent; mean ± standard deviation over seeds (in brackets: how many seeds, if not all have it). If a seed "
    note += "has several runs, whose teachers have several seeds, their mean counts. last: the last epoch's weights; "
    note += "best: those of the epoch that was best on validation. "
    note += "@ema: the average of the weights (--ema). " * bool(averages)
    note += "The test set was read at each run's end; it chose nothing."
    if probes:
        note += _probe_note(summaries)
    if any(run.summary.get("test_split") == "validation" for group in groups for run in group.runs):
        note += " The data has no test split: test is its validation split, held out of all training."
    if any(group.external_teacher for group in groups):
        note += " A teacher that is not among these runs: as its students' runs measured it."
    titles = [metric.report for metric in SCORES] + [metric.title for metric in (*averages, *probes)]
    rows = [(*row, *[""] * (3 + len(titles) - len(row))) for row in rows]  # an external teacher has no average
    return Table(("network", "model", "seeds", *titles), rows, note, words=2)


def _probe_note(summaries: list[dict]) -> str:
    names = dict.fromkeys(str(summary["probe_data"]) for summary in summaries if summary.get("probe_data"))
    note = " kNN, linear probe: of the embedding, by the labels of another training set, on the test split of "
    return f"{note}{' or '.join(names)} (--probe)."


def loss_table(groups: list[Group]) -> Table:
    """What runs on images without labels have in place of accuracies."""
    summaries = [run.summary for group in groups for run in group.runs]
    probes, rows = probed(summaries), []
    for group in groups:
        scores = [group.cell(metric) if group.values(metric.key) else "" for metric in probes]
        rows.append((group.label, group.model, group.count, *map(group.cell, WITHOUT_LABELS), *scores))
    note = (
        "No labels: loss is each method's own, so that those of other methods, temperatures or weights do not compare; "
    )
    note += "agreement: percent of the validation images on which network and teacher predict the same class. Mean ± "
    note += "standard deviation over seeds."
    if probes:
        note += _probe_note(summaries)
    titles = [metric.report for metric in WITHOUT_LABELS] + [metric.title for metric in probes]
    return Table(("network", "model", "seeds", *titles), rows, note, words=2)


def external_teachers(groups: list[Group]) -> list[tuple[str, ...]]:
    """Rows of the teachers that are not among these runs, with the one number known of them."""
    rows = {}
    for group in groups:
        if group.external_teacher:
            name = group.external_teacher
            # As each student saw it: at another size or precision it may answer otherwise.
            for measured in sorted({f"{value:.2f}" for value in group.values("teacher_test_top1")}) or [""]:
                cells = {"test_top1": measured or missing_cell("test_top1", group.runs)}
                scores = (cells.get(metric.key, "") for metric in SCORES)
                rows[name, measured] = ("teacher, not among these runs", name, "", *scores)
    known = {name for name, measured in rows if measured}
    return [row for (name, measured), row in rows.items() if measured or name not in known]


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


def gain_table(comparisons: list[Comparison]) -> Table | None:
    """Every method minus every control, on the same seeds; None if there is no such pair."""
    rows, bounded, alone = [], 0, False
    for comparison in comparisons:
        if not (found := comparison.difference):
            continue
        best = comparison.mean_gain("test_top1_best")
        numbers = (f"{found.mean:+.2f}", found.interval, format_p(found.p), format_p(comparison.corrected))
        seeds, best_gain = " ".join(map(str, found.seeds)), "" if best is None else f"{best:+.2f}"
        rows.append((comparison.group.title, comparison.control.title, seeds, *numbers, best_gain, comparison.verdict))
        bounded += not found.by_image
        alone = alone or found.of_seeds is None
    if not rows:
        return None
    note = "Points of test accuracy, paired by seed. The 95% interval and p hold the noise of the seeds' training and "
    note += "of the choice of test images. p, corrected: by Holm's method, for the number of comparisons in this table "
    note += f"({len(rows)}); the verdict follows it, so a false one is expected in at most 5 of 100 such tables."
    if alone:
        note += " Where the seeds' noise is unknown there is no interval, and p holds that of the images alone."
    if bounded:
        note += f" In {bounded} of them the images' noise is only bounded, by the accuracies: test logits are missing."
    head = ("method", "control", "seeds", "gain, last", "95% interval", "p", "p, corrected", "gain, best", "verdict")
    return Table(head, rows, note, words=3, remark=True)


def format_verdicts(groups: list[Group], comparisons: list[Comparison]) -> Lines:
    """One line for each method and control: what was gained, and whether that exceeds the noise."""
    lines, methods = [], [group for group in groups if group.distilled and group.tested]
    if not any(group.labelled for group in groups):
        return Lines(("No labels: no accuracy, and no gain over a student alone, which would need them.",))
    for group in methods:
        lines += [_verdict_line(comparison) for comparison in comparisons if comparison.group is group]
        if not any(control.kind == ALONE for control in group.controls):
            lines.append(
                f"{group.title}: no student alone by the same recipe among these runs, so its gain is unknown."
            )
    lines += said_of_smoothing(comparisons) + said_of_teachers(methods)
    return Lines(tuple(lines) or ("No distilled student with a test result among these runs.",))


def said_of_teachers(methods: list[Group]) -> list[str]:
    """Sentences on methods whose seeds share teachers: intervals then hold no noise of these."""
    lines = []
    for count in sorted({group.shared_teachers for group in methods} - {0}):
        sharing = [group.title for group in methods if group.shared_teachers == count]
        whose = "each method" if 1 < len(sharing) == len(methods) else " and of ".join(sharing)
        which = "one teacher" if count == 1 else f"{count} teachers"
        all_ = "All seeds" if count == 1 else "The seeds"
        lines.append(f"{all_} of {whose} share {which}: this says nothing about other teachers.")
    return lines


def said_of_smoothing(comparisons: list[Comparison]) -> list[str]:
    """Sentences on methods that smooth labels otherwise than their controls, unless those are about it."""
    pairs = [(one.group, one.control) for one in comparisons if one.difference]
    return [
        f"{group.title} smooths labels by {group.label_smoothing:g}, {control.title} by"
        f" {control.label_smoothing:g}: the smoothing is a part of the difference."
        for group, control in pairs
        if group.label_smoothing != control.label_smoothing and control.kind != SMOOTHED
    ]


def _verdict_line(comparison: Comparison) -> str:
    found = comparison.difference
    if found is None:
        return f"{comparison.name}: no seed in common with a test result."
    numbers = f"{found.mean:+.2f} points"
    if found.interval:
        corrected = f", {format_p(comparison.corrected)} corrected for {comparison.number} comparisons"
        numbers += f" ({found.interval}; p {format_p(found.p, '= ')}{corrected * (comparison.number > 1)})"
    return f"{comparison.name}: {numbers}: {comparison.verdict}."


def run_table(groups: list[Group]) -> Table:
    """Every run by itself, with the numbers of its summary.json."""
    summaries = [run.summary for group in groups for run in group.runs]
    rows, columns = [], [*COLUMNS, *averaged(summaries), *probed(summaries)]
    for group in groups:
        for run in group.runs:
            cells = [_run_cell(run, metric) for metric in columns]
            best = run.summary["best_epoch"]
            rows.append((str(run.path), group.label, str(run.seed), "" if best is None else str(best), *cells))
    head = ("run folder", "network", "seed", "best epoch", *(metric.report or metric.title for metric in columns))
    return Table(head, rows, words=2, quiet=True)


def _run_cell(run: Run, metric: Metric) -> str:
    value = run.summary.get(metric.key)
    return missing_cell(metric.key, [run]) if value is None else f"{value:{metric.style}}"


def section(name: str, groups: list[Group], costs: Costs, prefix: str) -> tuple[list[Block], list[str]]:
    """All blocks on one data set, and notes on what could not be shown."""
    gallery, answers = Gallery(groups, costs, prefix), Answers()
    comparisons = compare_groups(groups, answers)
    blocks: list[Block] = [Heading(2, f"On {name}"), Paragraph(what_was_compared(groups))]
    if verdict := headline(comparisons):
        blocks.append(Paragraph(verdict, lead=True))
    blocks += [*gallery.draw_gains(comparisons), format_verdicts(groups, comparisons)]
    if any(group.labelled for group in groups):
        blocks += [Heading(3, "Accuracy"), accuracy_table(groups)]
    if unlabelled := [group for group in groups if not group.labelled]:
        blocks += [Heading(3, "Validation without labels"), loss_table(unlabelled)]
    rare = rare_table(groups)
    if rare:
        blocks += [Heading(3, "Common and rare classes"), rare]
    by_share = share_table(groups)
    if by_share:
        blocks += [Heading(3, "Accuracy by share of the labels"), by_share]
    gains = gain_table(comparisons)
    if gains:
        blocks += [Heading(3, "Gain over the controls"), gains]
    blocks += [Heading(3, "Cost and calibration"), cost_table(groups, costs)]
    figures = gallery.draw()
    blocks += [Heading(3, "Figures", quiet=True), *figures] if figures else []
    blocks += [Heading(3, "Every run", quiet=True), run_table(groups)]
    return blocks, [*answers.notes, *gallery.notes]


def share_table(groups: list[Group]) -> Table | None:
    """Test accuracy of each network at each --label-share; None if all runs have the same."""
    groups = [group for group in groups if group.kind != TEACHER and group.values("test_top1")]
    shares = sorted({group.flags["label_share"] for group in groups})
    if len(shares) < 2:
        return None
    cells: dict[tuple[str, str], dict[float, list[str]]] = {}
    for group in groups:
        row = cells.setdefault((group.name, group.model), {})
        row.setdefault(group.flags["label_share"], []).append(group.cell(METRICS["test_top1"]))
    rows = [(*name, *("; ".join(row.get(share, [])) for share in shares)) for name, row in cells.items()]
    note = "Test top-1 of the last epoch's weights; mean ± standard deviation over seeds."
    return Table(("network", "model", *(f"{100 * share:g}% of the labels" for share in shares)), rows, note, words=2)


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
