"""What a finished run keeps beside its summary, for the report: the epochs' history, its answers, its class names."""

import torch

from kd.errors import UserError
from kd.files import is_number, read_json, read_json_lines, read_weights
from kd.metrics import top_k
from kd.reporting.results import Run

WHOLE = (torch.int64, torch.int32)
FLOATS = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


def history(run: Run) -> list[dict]:
    """The epochs' lines of metrics.jsonl. Raises UserError where they cannot be read."""
    path = run.path / "metrics.jsonl"
    lines = read_json_lines(path)
    needed = [line.get(key) for line in lines for key in ("epoch", "train/loss", "train/top1")]
    optional = [line[key] for line in lines for key in ("val/loss", "val/top1") if line.get(key) is not None]
    if not lines or not all(map(is_number, needed + optional)):
        raise UserError(f"{path} holds no epochs, or numbers that are none")
    return lines


def test_answers(run: Run) -> tuple:
    """Logits (n x k) and labels (n) of the test split as they were scored. Raises UserError where they are not there.

    What does not give the summary's accuracy is another run's, and refused.
    """
    path = run.path / "test_logits.safetensors"
    if not path.exists():
        raise UserError(f"{path} is not there: the run read no test split, or was made before these were kept")
    kept = read_weights(path)
    logits, labels = kept.get("logits"), kept.get("labels")
    if logits is None or labels is None or logits.ndim != 2 or labels.shape != logits.shape[:1] or not len(labels):
        raise UserError(f"{path} holds no logits and labels")
    if labels.dtype not in WHOLE or logits.dtype not in FLOATS:
        raise UserError(f"{path} holds {logits.dtype} and {labels.dtype} for logits and labels")
    if labels.min() < 0 or labels.max() >= logits.shape[1]:
        raise UserError(f"{path} holds labels that are none")
    if abs(top_k(logits, labels, 1) - run.summary["test_top1"]) > 1e-6:
        raise UserError(f"{path} does not give the accuracy in the summary")
    return logits, labels


def class_names(run: Run, count: int) -> list[str]:
    """Of model.json; numbers where it is not readable or does not fit."""
    try:
        names = read_json(run.path / "model.json").get("classes", [])
    except UserError:
        names = []
    return (
        [str(name) for name in names]
        if isinstance(names, list) and len(names) == count
        else [str(number) for number in range(count)]
    )
