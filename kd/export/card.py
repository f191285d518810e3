"""The model card: where an exported network comes from, how good it is, and how it is used."""

from pathlib import Path
from typing import NamedTuple

from kd.export.source import PARTS
from kd.report.document import Block, Heading, Lines, Table, markdown, plain
from kd.runs.table import METRICS
from kd.utils.files import write_atomically

SCORES = tuple(metric for metric in METRICS.values() if metric.card)

USE_TORCH = """```python
import kd  # the project that trained this network
network = kd.load("{name}")  # eval mode; takes normalised images b x 3 x h x w
```

    python -m kd.predict {name} photo.jpg"""


USE_ONNX = """Nothing but onnxruntime is needed for {files}, which take pixels as they are:

```python
import json, numpy, onnxruntime
session = onnxruntime.InferenceSession("{file}")
expects = json.loads(session.get_modelmeta().custom_metadata_map["preprocessing"])
images = numpy.zeros((1, *expects["shape"][1:]), numpy.uint8)          # RGB, 0 to 255
(logits,) = session.run(["logits"], {{"images": images}})
print(expects["classes"][logits[0].argmax()])
```"""


class Subject(NamedTuple):
    """What a card is about."""

    summary: dict  # the run's
    record: dict  # its config.json
    alone: dict | None  # the summary of the same network trained alone
    expects: dict  # preprocessing.json
    onnx: list[str]  # the .onnx files
    costs: list[Block]  # the exported files' table; empty where it was not made


def write_card(path: Path, subject: Subject, licence: str, name: str | None) -> None:
    """A README.md in the Hub's form; `name` is its id there, if it is to have one."""
    summary, record = subject.summary, subject.record
    place = name or "path/to/this/folder"
    parts = [
        f"# {plain(summary['model'])}, {_method(summary)}",
        _origin(summary, record),
        _scores(summary, subject.alone).markdown(),
        markdown([Heading(2, "The files"), *subject.costs]) if subject.costs else "",
        "## How it is used",
        USE_TORCH.format(name=place),
        USE_ONNX.format(file=subject.onnx[-1], files=" and ".join(subject.onnx)) if subject.onnx else "",
        _expectations(subject.expects).markdown(),
        markdown([Heading(2, "How it was trained"), _protocol(record), Lines(_limits(summary, record))]),
    ]
    head = _metadata(summary, record, licence, name, bool(subject.onnx))
    text = f"---\n{head}\n---\n\n" + "\n\n".join(part.strip() for part in parts if part) + "\n"
    write_atomically(path, lambda partial: partial.write_text(text, encoding="utf-8"))


def _method(summary: dict) -> str:
    method = summary["method"]
    return "trained alone" if method == "none" else f"distilled ({method})"


def _metadata(summary: dict, record: dict, licence: str, name: str | None, onnx: bool) -> str:
    """The card's head, for the Hub's search and tables."""
    from huggingface_hub import EvalResult, ModelCardData

    source, _, revision = record["flags"]["data"]["source"].partition("@")
    results = []
    if summary["test_top1"] is not None:
        kind = {"task_type": "image-classification", "dataset_type": source, "dataset_name": source}
        kind |= {"dataset_revision": revision or None}
        percent = {"metric_type": "accuracy", "metric_value": summary["test_top1"] / 100}
        results = [EvalResult(**kind, **percent, dataset_split="test", metric_name="top-1 accuracy")]
    return ModelCardData(
        license=licence,
        library_name="kd",
        pipeline_tag="image-classification",
        tags=["knowledge-distillation", "image-classification", *(["onnx"] if onnx else [])],
        datasets=[source] if "/" in source else None,
        metrics=["accuracy"],
        model_name=name or summary["model"],
        eval_results=results or None,
    ).to_yaml()


def _origin(summary: dict, record: dict) -> str:
    """One sentence."""
    source = plain(str(record["flags"]["data"]["source"]))
    teacher = summary.get("teacher")
    teachers = plain(", ".join(teacher if isinstance(teacher, list) else [teacher])) if teacher else ""
    words = f"An image classifier of {summary['params']:,} parameters, trained on {source}"
    return f"{words} to follow {teachers} ({plain(summary['method'])})." if teachers else f"{words}."


def _scores(summary: dict, alone: dict | None) -> Table:
    if summary["test_top1"] is None:
        return Table(("network",), [("this network",)], "The test set was not read.")
    rows = [("this network", *_cells(summary))]
    if alone is not None and alone.get("test_top1") is not None:
        rows.append(("the same, trained alone", *_cells(alone | {"agreement": None})))
    if summary.get("teacher_test_top1") is not None:
        rows.append(("its teacher", f"{summary['teacher_test_top1']:.2f}", *[""] * (len(SCORES) - 1)))
    note = f"Percent, NLL in nats; on {summary['test_images']} test images, read at the end of training, which chose"
    note += f" nothing. The last epoch's weights; one seed ({summary['seed']})."
    return Table(("network", *(metric.card for metric in SCORES)), rows, note)


def _cells(summary: dict) -> list[str]:
    return ["" if summary.get(metric.key) is None else f"{summary[metric.key]:{metric.style}}" for metric in SCORES]


def _expectations(expects: dict) -> Table:
    rows = [(key, str(value)) for key, value in expects.items() if key != "classes"]
    rows.append(("classes", ", ".join(map(str, expects["classes"]))))
    return Table(("the files", "expect and give"), rows, words=2)


def _protocol(record: dict) -> Table:
    """Every flag that shaped the result, and what it ran on."""
    flags = record["flags"]
    rows = [
        (part, ", ".join(f"{key} {value}" for key, value in flags[part].items())) for part in PARTS if part in flags
    ]
    rows += [("data's sha256", str(record["identity"]["data"]))]
    rows += [("versions", ", ".join(f"{key} {value}" for key, value in record.get("versions", {}).items()))]
    rows += [("commit", str(record.get("git_commit")))]
    return Table(("what", "how"), rows, words=2)


def _limits(summary: dict, record: dict) -> tuple[str, ...]:
    return (
        f"It knows the classes above and answers one of them whatever it is shown; {summary['test_images'] or 'no'}"
        " test images say how often that is right, on images like those it was trained on.",
        "One seed was trained: how much seeds vary is not in these numbers.",
        f"The data's own terms ({record['flags']['data']['source']}) hold for what is made of it.",
    )
