"""The report's table of common and of rare classes, where training classes differ in size."""

from kd.reporting.document import Table
from kd.reporting.groups import Group

SHOTS = (
    ("test_top1", "test"),
    ("test_balanced_top1", "balanced"),
    ("test_top1_many", "many-shot"),
    ("test_top1_medium", "medium-shot"),
    ("test_top1_few", "few-shot"),
)


def rare_table(groups: list[Group]) -> Table | None:
    groups = [group for group in groups if group.values("test_balanced_top1")]
    if not groups:
        return None
    rows = []
    for group in groups:
        rows.append((group.label, group.model, group.count, *(group.cell(key, ".2f") for key, _ in SHOTS)))
    sizes = dict.fromkeys(_sizes(run.summary.get("shots")) for group in groups for run in group.tested)
    note = "Percent of test images, last epoch's weights; balanced: the mean over classes. Classes by their number of "
    note += f"training images: {'; or '.join(filter(None, sizes))}."
    return Table(("network", "model", "seeds", *(title for _, title in SHOTS)), rows, note, words=2)


def _sizes(shots: object) -> str:
    """'many 3 of 120 to 450, ...', or nothing where a summary does not say it."""
    try:
        parts = [(name, part["classes"], part["smallest"], part["largest"]) for name, part in shots.items()]
        return ", ".join(f"{name} {int(n)} of {int(least)} to {int(most)}" for name, n, least, most in parts)
    except (AttributeError, KeyError, TypeError, ValueError):
        return ""
