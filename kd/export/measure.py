"""What each exported file costs and how good it is, as its own runtime runs it: measured."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, UInt8
from rich.progress import track
from torch import Tensor, nn

from kd import metrics
from kd.data import Data
from kd.data.rows import iter_centre_crops
from kd.errors import UserError, require
from kd.export.deployed import Deployed, open_pt2
from kd.export.onnx_runtime import OnnxFile, needed
from kd.export.source import ExportedRun
from kd.models.cost import count_macs, time_interleaved
from kd.models.pretrained import is_pretrained
from kd.report.document import Table
from kd.teachers.load import load_teachers
from kd.utils.console import console
from kd.utils.processes import same_threads

CHUNK = 256  # images scored at once


MANY = 64  # images at once for throughput


STUDENT = "model.safetensors"  # the network that the others are made from


Answer = Callable[[np.ndarray], np.ndarray]  # uint8 pixels b x 3 x h x w -> logits b x k


class Candidate(NamedTuple):
    """Something that answers for images: an exported file, the student or its teacher."""

    name: str
    runtime: str
    open: Callable[[int], Answer]  # with so many threads; 0 for as many as there are cores
    bytes: int  # of the file; of a teacher's tensors in memory
    params: int
    macs: int
    known: dict | None = None  # a teacher's accuracy, as the run itself measured it
    packed_bytes: int | None = None  # of a compressed student: with each weight in its bits


def of_torch(network: nn.Module) -> Callable[[int], Answer]:
    """A module from pixels to logits, as a Candidate opens it."""

    def opened(threads: int) -> Answer:
        @torch.no_grad()
        def answer(images: UInt8[np.ndarray, "b 3 h w"]) -> Float[np.ndarray, "b k"]:
            if threads:  # another candidate may have set its own
                torch.set_num_threads(threads)
            return network(torch.from_numpy(images)).float().numpy()

        return answer

    return opened


def candidates(
    folder: Path, source: ExportedRun, data: Data, trust_code: bool
) -> tuple[list[Candidate], tuple[str, ...]]:
    """The student, the exported files in `folder` and the teacher; and what could not be measured, in words."""
    network, torch_runtime = source.network, f"torch {torch.__version__}"
    counted = {"params": source.summary["params"], "macs": count_macs(network.network, network.image_size)}
    packed = source.summary.get("packed_bytes")
    weights = folder / STUDENT
    size = weights.stat().st_size
    found = [Candidate(STUDENT, torch_runtime, of_torch(network), size, **counted, packed_bytes=packed)]
    if (pt2 := folder / "model.pt2").exists():
        found.append(Candidate(pt2.name, torch_runtime, of_torch(open_pt2(pt2)), pt2.stat().st_size, **counted))
    for path in (folder / "model.onnx", folder / "model.int8.onnx"):
        if path.exists():
            runtime = f"onnxruntime {needed('onnxruntime').__version__}"
            found.append(Candidate(path.name, runtime, partial(OnnxFile, path), path.stat().st_size, **counted))
    if not source.summary.get("teacher"):
        return found, ()
    try:
        return [*found, _teacher(source, data, trust_code)], ()
    except UserError as error:
        return found, (f"The teacher's cost is not measured: {error}.",)


def _teacher(source: ExportedRun, data: Data, trust_code: bool) -> Candidate:
    """Its accuracy is what the run itself measured. Raises UserError where that very network is no longer there."""
    named, model = (source.summary.get(key) for key in ("teacher", "teacher_model"))
    names, models = (each if isinstance(each, list) else [each] for each in (named, model))
    of_files = next((str(model) for name, model in zip(names, models) if is_pretrained(name)), "")  # --teacher-model
    teacher = load_teachers(names, data, torch.device("cpu"), trust_code, of_files)
    same = teacher.sha256 == source.record["identity"].get("teacher")
    require(same, f"what lies at {teacher.folder} now is not the network that taught")
    params = sum(parameter.numel() for parameter in teacher.network.parameters())
    known = {"top1": source.summary.get("teacher_test_top1"), "agreement": source.summary.get("agreement")}
    size = sum(tensor.numel() * tensor.element_size() for tensor in teacher.network.state_dict().values())
    ours = {"mean": data.mean, "std": data.std, "image_size": data.size}  # a hook renormalises to the teacher's own
    opened, macs = of_torch(Deployed(teacher.network, ours)), count_macs(teacher.network, data.size)
    return Candidate("teacher", f"torch {torch.__version__}", opened, size, params, macs, known)


def score(candidate: Candidate, data: Data) -> Float[Tensor, "n k"]:
    """Its logits for every test image."""
    answer, index = candidate.open(0), torch.arange(len(data.test.labels))
    title, total = f"scoring {candidate.name}", -(-len(index) // CHUNK)
    images = iter_centre_crops(data.test, data.size, index, CHUNK)
    bar = track(images, title, total, console=console, disable=not console.is_terminal, transient=True)
    return torch.cat([torch.from_numpy(answer(block.numpy())) for block in bar])


def measure_files(candidates: list[Candidate], data: Data, threads: int) -> list[dict]:
    """A row for each candidate; the student is the first of them, and the others are compared with it.

    Accuracy and agreement in percent of the test images; differences in logits; latency in milliseconds for
    one image; throughput in images per second, 64 at a time.
    """
    student, rows, labels = None, [], data.test.labels
    for candidate in candidates:
        if candidate.known is None:
            logits = score(candidate, data)
            student = logits if student is None else student
            known = {
                "top1": metrics.top_k(logits, labels, 1),
                "agreement": metrics.agreement(logits, student),
                "largest_difference": (logits - student).abs().max().item(),
            }
        else:
            known = candidate.known | {"largest_difference": None}
        counted = {key: getattr(candidate, key) for key in ("runtime", "bytes", "packed_bytes", "params", "macs")}
        rows.append({"name": candidate.name, **known, **counted})
    with same_threads():
        torch.set_num_threads(threads)
        answers = {candidate.name: candidate.open(threads) for candidate in candidates}
        few = torch.arange(MANY) % len(labels)
        (images,) = iter_centre_crops(data.test, data.size, few.sort().values, MANY)
        one, many = (_times(answers, images[:count].numpy()) for count in (1, MANY))
    for row in rows:
        row |= {"latency_ms": 1000 * one[row["name"]], "images_per_second": MANY / many[row["name"]]}
    return rows


def _times(answers: dict[str, Answer], batch: UInt8[np.ndarray, "b 3 h w"]) -> dict[str, float]:
    return time_interleaved({name: lambda answer=answer: answer(batch) for name, answer in answers.items()})


#: (kd.shipping.cost_table) The table that goes with an export, and what it says in words.


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


def format_table(rows: list[dict], where: str, images: int) -> Table:
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


def format_verdicts(rows: list[dict], summary: dict) -> tuple[str, ...]:
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
