"""The table that goes with an export, and what it says in words."""

from kd.reporting.document import Table
from kd.shipping.shipped import STUDENT

COLUMNS = {
    "file": lambda row: row["name"],
    "test top-1": lambda row: _or_blank(row["top1"], "{:.2f}"),
    "agrees": lambda row: _or_blank(row["agreement"], "{:.2f}"),
    "largest difference": lambda row: "" if row["name"] == STUDENT else _or_blank(row["largest_difference"], "{:.2g}"),
    "size": lambda row: _megabytes(row["bytes"]),
    "packed": lambda row: _megabytes(row["packed_bytes"]),
    "parameters": lambda row: f"{row['params']:,}",
    "MACs": lambda row: f"{row['macs'] / 1e6:.2f}M",
    "one image": lambda row: f"{row['latency_ms']:.2f} ms",
    "64 at once": lambda row: f"{row['images_per_second']:.0f}/s",
}
"""Title -> its cell in a row of kd.shipping.shipped.measure."""
PACKED = (
    " packed: what its weights would take in a format that gives each its bits and every channel one scale; no file"
    " here is one, they hold rounded weights in full."
)


def table(rows: list[dict], where: str, images: int) -> Table:
    packed = any(row["packed_bytes"] for row in rows)
    titles = [title for title in COLUMNS if title != "packed" or packed]
    runtimes = "; ".join(dict.fromkeys(f"{row['name']}: {row['runtime']}" for row in rows))
    note = (
        f"Each as its own runtime runs it ({runtimes}). top-1: percent of the {images} test images. agrees: percent of"
        f" them on which it says what {STUDENT} says, for the teacher as the run measured it; largest difference: of"
        f" any logit from {STUDENT}'s. size: of the file, for the teacher of its tensors. MACs: for one image, as the"
        f" network is written. Times: medians, the rows taking turns ({where})."
    )
    cells = [tuple(COLUMNS[title](row) for title in titles) for row in rows]
    return Table(tuple(titles), cells, note + PACKED * packed)


def _or_blank(value: float | None, style: str) -> str:
    return "" if value is None else style.format(value)


def _megabytes(count: int | None) -> str:
    return _or_blank(count and count / 1e6, "{:.2f} MB")


def verdicts(rows: list[dict], summary: dict) -> tuple[str, ...]:
    """What a file gains or loses against what it was made from, in words: also where it gains nothing."""
    by_name, lines = {row["name"]: row for row in rows}, []
    if abs(rows[0]["top1"] - summary["test_top1"]) > 1e-6:
        lines.append(f"The run itself measured {summary['test_top1']:.2f} for its network, in its own precision.")
    for name, base in (("model.onnx", STUDENT), ("model.pt2", STUDENT), ("model.int8.onnx", "model.onnx")):
        ours, theirs = by_name.get(name), by_name.get(base) or by_name[STUDENT]
        if ours is not None:
            points = ours["top1"] - theirs["top1"]
            size = ours["bytes"] / theirs["bytes"]
            speeds = theirs["latency_ms"] / ours["latency_ms"], ours["images_per_second"] / theirs["images_per_second"]
            fast = " and ".join(f"{_speed(speed)} {what}" for speed, what in zip(speeds, ("for one image", "for 64")))
            lines.append(f"{name} against {theirs['name']}: {points:+.2f} points, {size:.3f} of its size, {fast}.")
    return tuple(lines)


def _speed(ratio: float) -> str:
    """Within a twentieth, a difference in time is the machine's."""
    if ratio > 1.05:
        return f"{ratio:.2f} times as fast"
    return f"no faster ({ratio:.2f} times)" if ratio > 0.95 else f"slower ({ratio:.2f} times as fast)"
