"""Measure the accuracy, size and speed of each exported file in its own runtime, and format the table."""

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
from kd.export.onnx_runtime import OnnxFile, import_extra
from kd.export.source import ExportedRun
from kd.models.cost import count_macs, count_params, time_interleaved
from kd.models.pretrained import is_pretrained
from kd.report.document import Table
from kd.runs.public import public_text
from kd.runs.results import teachers_of
from kd.teachers.load import load_teachers
from kd.utils.console import console
from kd.utils.processes import same_threads
from kd.utils.users_own import is_module_function

THROUGHPUT_BATCH = 64

STUDENT = "model.safetensors"  # the network that the other files are made from

Classifier = Callable[[np.ndarray], np.ndarray]  # uint8 pixels b x 3 x h x w -> logits b x k


class Candidate(NamedTuple):
    """What the table compares: the student, an exported file or the teacher."""

    name: str
    runtime: str
    open: Callable[[int], Classifier]  # takes the number of threads; 0: as many as there are cores
    bytes: int  # of the file; for a teacher, of its tensors in memory
    params: int
    macs: int
    known: dict | None = None  # a teacher's accuracy, as the run measured it
    packed_bytes: int | None = None  # of a compressed student, with each weight stored in its own bits


def torch_classifier(network: nn.Module) -> Callable[[int], Classifier]:
    """Wrap a module from pixels to logits for Candidate.open."""

    def open_with(threads: int) -> Classifier:
        @torch.no_grad()
        def classify(images: UInt8[np.ndarray, "b 3 h w"]) -> Float[np.ndarray, "b k"]:
            if threads:  # another candidate may have set its own
                torch.set_num_threads(threads)
            return network(torch.from_numpy(images)).float().numpy()

        return classify

    return open_with


def candidates(
    folder: Path, source: ExportedRun, data: Data, trust_code: bool
) -> tuple[list[Candidate], tuple[str, ...]]:
    """The student, the exported files in `folder` and the teacher; and a note on what cannot be measured."""
    network, torch_runtime = source.network, f"torch {torch.__version__}"
    counts = {"params": source.summary["params"], "macs": count_macs(network.network, network.image_size)}
    packed = source.summary.get("packed_bytes")
    size = (folder / STUDENT).stat().st_size
    files = [Candidate(STUDENT, torch_runtime, torch_classifier(network), size, **counts, packed_bytes=packed)]
    if (pt2 := folder / "model.pt2").exists():
        files.append(Candidate(pt2.name, torch_runtime, torch_classifier(open_pt2(pt2)), pt2.stat().st_size, **counts))
    for path in (folder / "model.onnx", folder / "model.int8.onnx"):
        if path.exists():
            runtime = f"onnxruntime {import_extra('onnxruntime').__version__}"
            files.append(Candidate(path.name, runtime, partial(OnnxFile, path), path.stat().st_size, **counts))
    if not source.summary.get("teacher"):
        return files, ()
    if source.summary.get("shared_cache"):
        return files, ("The teacher's cost is not measured: only its logits were there.",)
    try:
        return [*files, _teacher_candidate(source, data, trust_code)], ()
    except UserError as error:
        reason = public_text(str(error), teachers_of(source.summary))
        return files, (f"The teacher's cost is not measured: {reason}.",)


def _teacher_candidate(source: ExportedRun, data: Data, trust_code: bool) -> Candidate:
    """The teacher, with its accuracy as the run measured it.

    Raises: UserError if that same network is no longer available.
    """
    names, models = teachers_of(source.summary), teachers_of(source.summary, "teacher_model")
    teacher_model = next((model for name, model in zip(names, models) if is_pretrained(name)), "")
    require(
        trust_code or not is_module_function(teacher_model),
        f"building {teacher_model} runs its author's code; --trust-code says that you trust it",
    )
    arguments = source.config.get("teacher_flags", {}).get("teacher_model_args")
    arguments = None if arguments is None else str(arguments)
    teacher = load_teachers(names, data, torch.device("cpu"), trust_code, teacher_model, arguments)
    same = teacher.sha256 == source.config["identity"].get("teacher")
    require(same, f"{teacher.folder}: is no longer the network that taught this student")
    params = count_params(teacher.network)
    known = {"top1": source.summary.get("teacher_test_top1"), "agreement": source.summary.get("agreement")}
    size = sum(tensor.numel() * tensor.element_size() for tensor in teacher.network.state_dict().values())
    # The data's normalisation; a hook on the teacher converts it to the teacher's own.
    info = {"mean": data.mean, "std": data.std, "image_size": data.size}
    classifier, macs = torch_classifier(Deployed(teacher.network, info)), count_macs(teacher.network, data.size)
    return Candidate("teacher", f"torch {torch.__version__}", classifier, size, params, macs, known)


def predict_test_logits(candidate: Candidate, data: Data, batch: int) -> Float[Tensor, "n k"]:
    classify, index = candidate.open(0), torch.arange(len(data.test.labels))
    title, total = f"scoring {candidate.name}", -(-len(index) // batch)
    images = iter_centre_crops(data.test, data.size, index, batch)
    bar = track(images, title, total, console=console, disable=not console.is_terminal, transient=True)
    return torch.cat([torch.from_numpy(classify(pixels.numpy())) for pixels in bar])


def measure_files(candidates: list[Candidate], data: Data, threads: int, batch: int) -> list[dict]:
    """One row per candidate; the first is the student, and the others are compared with it.

    The images are read `batch` at a time. Accuracy and agreement in percent of the test images; differences in logits;
    latency in milliseconds for one image; throughput in images per second at a batch of 64.
    """
    student, rows, labels = None, [], data.test.labels
    for candidate in candidates:
        if candidate.known is None:
            logits = predict_test_logits(candidate, data, batch)
            student = logits if student is None else student
            quality = {
                "top1": metrics.top_k(logits, labels, 1),
                "agreement": metrics.agreement(logits, student),
                "largest_difference": (logits - student).abs().max().item(),
            }
        else:
            quality = candidate.known | {"largest_difference": None}
        costs = {key: getattr(candidate, key) for key in ("runtime", "bytes", "packed_bytes", "params", "macs")}
        rows.append({"name": candidate.name, **quality, **costs})
    with same_threads():
        torch.set_num_threads(threads)
        classifiers = {candidate.name: candidate.open(threads) for candidate in candidates}
        index = torch.arange(THROUGHPUT_BATCH) % len(labels)
        images = torch.cat(list(iter_centre_crops(data.test, data.size, index.sort().values, batch)))
        one, many = (_median_seconds(classifiers, images[:count].numpy()) for count in (1, THROUGHPUT_BATCH))
    for row in rows:
        row |= {"latency_ms": 1000 * one[row["name"]], "images_per_second": THROUGHPUT_BATCH / many[row["name"]]}
    return rows


def _median_seconds(classifiers: dict[str, Classifier], batch: UInt8[np.ndarray, "b 3 h w"]) -> dict[str, float]:
    return time_interleaved({name: partial(classify, batch) for name, classify in classifiers.items()})


def _or_blank(value: float | None, style: str) -> str:
    return "" if value is None else style.format(value)


def _megabytes(count: int | None) -> str:
    return _or_blank(count and count / 1e6, "{:.2f} MB")


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
"""Title -> its cell for a row of measure_files."""

PACKED_NOTE = (
    " packed: size if each weight took only its own bits, plus one scale per channel; no file here is packed, they"
    " store the rounded weights in full."
)


def format_table(rows: list[dict], machine: str, images: int) -> Table:
    packed = any(row["packed_bytes"] for row in rows)
    titles = [title for title in COLUMNS if title != "packed" or packed]
    runtimes = "; ".join(dict.fromkeys(f"{row['name']}: {row['runtime']}" for row in rows))
    note = (
        f"Each file in its own runtime ({runtimes}). top-1: percent of the {images} test images. agrees: percent of"
        f" them with the same prediction as {STUDENT}; for the teacher, as the run measured it. largest difference: of"
        f" any logit from {STUDENT}. size: of the file; for the teacher, of its tensors. MACs: for one image, counted"
        f" on the torch network. Times: medians, the rows taking turns ({machine})."
    )
    cells = [tuple(COLUMNS[title](row) for title in titles) for row in rows]
    return Table(tuple(titles), cells, note + PACKED_NOTE * packed)


def format_verdicts(rows: list[dict], summary: dict) -> tuple[str, ...]:
    """One sentence per file: what it gains or loses against the file it was made from."""
    by_name, lines = {row["name"]: row for row in rows}, []
    if abs(rows[0]["top1"] - summary["test_top1"]) > 1e-6:
        lines.append(f"The run itself measured {summary['test_top1']:.2f} for its network, in its own precision.")
    for name, base_name in (("model.onnx", STUDENT), ("model.pt2", STUDENT), ("model.int8.onnx", "model.onnx")):
        file, base = by_name.get(name), by_name.get(base_name) or by_name[STUDENT]
        if file is not None:
            points = file["top1"] - base["top1"]
            size = file["bytes"] / base["bytes"]
            one = _compare_speed(base["latency_ms"] / file["latency_ms"])
            many = _compare_speed(file["images_per_second"] / base["images_per_second"])
            speeds = f"{one} for one image and {many} for 64"
            lines.append(f"{name} against {base['name']}: {points:+.2f} points, {size:.3f} of its size, {speeds}.")
    return tuple(lines)


def _compare_speed(ratio: float) -> str:
    """Differences below 5% are within the machine's noise."""
    if ratio > 1.05:
        return f"{ratio:.2f} times as fast"
    return f"no faster ({ratio:.2f} times)" if ratio > 0.95 else f"slower ({ratio:.2f} times as fast)"
