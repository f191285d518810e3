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
from kd.costs import count_macs
from kd.data import Data
from kd.display import console
from kd.errors import UserError, require
from kd.foreign import is_foreign
from kd.images.rows import centred
from kd.launch import same_threads
from kd.shipping.deploy import Deployed, open_pt2
from kd.shipping.onnx_runtime import OnnxFile, needed
from kd.shipping.source import Source
from kd.shipping.timing import interleaved
from kd.teacher import load_teachers

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


def candidates(folder: Path, source: Source, data: Data, trust_code: bool) -> tuple[list[Candidate], tuple[str, ...]]:
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


def _teacher(source: Source, data: Data, trust_code: bool) -> Candidate:
    """Its accuracy is what the run itself measured. Raises UserError where that very network is no longer there."""
    named, model = (source.summary.get(key) for key in ("teacher", "teacher_model"))
    names, models = (each if isinstance(each, list) else [each] for each in (named, model))
    of_files = next((str(model) for name, model in zip(names, models) if is_foreign(name)), "")  # --teacher-model
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
    images = centred(data.test, data.size, index, CHUNK)
    bar = track(images, title, total, console=console, disable=not console.is_terminal, transient=True)
    return torch.cat([torch.from_numpy(answer(block.numpy())) for block in bar])


def measure(candidates: list[Candidate], data: Data, threads: int) -> list[dict]:
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
        (images,) = centred(data.test, data.size, few.sort().values, MANY)
        one, many = (_times(answers, images[:count].numpy()) for count in (1, MANY))
    for row in rows:
        row |= {"latency_ms": 1000 * one[row["name"]], "images_per_second": MANY / many[row["name"]]}
    return rows


def _times(answers: dict[str, Answer], batch: UInt8[np.ndarray, "b 3 h w"]) -> dict[str, float]:
    return interleaved({name: lambda answer=answer: answer(batch) for name, answer in answers.items()})
