"""Write the model card: where an exported network comes from, how good it is, and how to use it."""

from pathlib import Path
from typing import NamedTuple

from kd.report.document import Block, Heading, Lines, Table, markdown, plain
from kd.runs.results import FLAG_PARTS
from kd.runs.table import METRICS, PROBED
from kd.utils.files import write_atomically

SCORES = tuple(metric for metric in METRICS.values() if metric.card)

USE_TORCH = """```python
import kd  # the project that trained this network
network = kd.load("{name}")  # eval mode; takes normalised images b x 3 x h x w
```

    python -m kd.predict {name} photo.jpg"""

USE_ONNX = """With onnxruntime alone; {files} take unnormalised pixels:

```python
import json, numpy, onnxruntime
session = onnxruntime.InferenceSession("{file}")
expects = json.loads(session.get_modelmeta().custom_metadata_map["preprocessing"])
images = numpy.zeros((1, *expects["shape"][1:]), numpy.uint8)          # RGB, 0 to 255
(logits,) = session.run(["logits"], {{"images": images}})
print(expects["classes"][logits[0].argmax()])
```"""


class CardContent(NamedTuple):
    summary: dict  # the run's summary.json, as exported
    config: dict  # the run's config.json, as exported
    control: dict | None  # the summary of the same network trained alone
    expects: dict  # preprocessing.json
    onnx_files: list[str]
    table: list[Block]  # the exported files' table; empty with --no-table


def write_card(path: Path, content: CardContent, licence: str, hub_id: str | None) -> None:
    """Write a README.md in the Hub's format; `hub_id` is where it will be pushed, if anywhere."""
    summary, config, onnx_files = content.summary, content.config, content.onnx_files
    place = hub_id or "path/to/this/folder"
    parts = [
        f"# {plain(summary['model'])}, {_method(summary)}",
        _origin(summary, config),
        _scores(summary, content.control).markdown(),
        markdown([Heading(2, "The files"), *content.table]) if content.table else "",
        "## How to use it",
        USE_TORCH.format(name=place),
        USE_ONNX.format(file=onnx_files[-1], files=" and ".join(onnx_files)) if onnx_files else "",
        _expectations(content.expects).markdown(),
        markdown([Heading(2, "How it was trained"), _protocol(config), Lines(_limits(summary, config))]),
    ]
    head = _metadata(summary, config, licence, hub_id, bool(onnx_files))
    text = f"---\n{head}\n---\n\n" + "\n\n".join(part.strip() for part in parts if part) + "\n"
    write_atomically(path, lambda partial: partial.write_text(text, encoding="utf-8"))


def _method(summary: dict) -> str:
    method = summary["method"]
    return "trained alone" if method == "none" else f"distilled ({method})"


def _metadata(summary: dict, config: dict, licence: str, hub_id: str | None, onnx: bool) -> str:
    """The YAML head that the Hub's search and leaderboards read."""
    from huggingface_hub import EvalResult, ModelCardData

    source, _, revision = config["flags"]["data"]["source"].partition("@")
    results = []
    if summary["test_top1"] is not None:
        data = {"task_type": "image-classification", "dataset_type": source, "dataset_name": source}
        data |= {"dataset_revision": revision or None}
        accuracy = {"metric_type": "accuracy", "metric_value": summary["test_top1"] / 100}
        results = [
            EvalResult(
                **data, **accuracy, dataset_split=summary.get("test_split", "test"), metric_name="top-1 accuracy"
            )
        ]
    return ModelCardData(
        license=licence,
        library_name="kd",
        pipeline_tag="image-classification",
        tags=["knowledge-distillation", "image-classification", *(["onnx"] if onnx else [])],
        datasets=[source] if "/" in source else None,
        metrics=["accuracy"],
        model_name=hub_id or summary["model"],
        eval_results=results or None,
    ).to_yaml()


def _origin(summary: dict, config: dict) -> str:
    """One sentence on size, data and teachers."""
    source = plain(str(config["flags"]["data"]["source"]))
    teacher = summary.get("teacher")
    teachers = plain(", ".join(teacher if isinstance(teacher, list) else [teacher])) if teacher else ""
    words = f"An image classifier of {summary['params']:,} parameters, trained on {source}"
    return f"{words} to follow {teachers} ({plain(summary['method'])})." if teachers else f"{words}."


def _scores(summary: dict, control: dict | None) -> Table:
    if summary["test_top1"] is None:
        return Table(("network",), [("this network",)], f"The test set was not read.{_probed(summary)}")
    rows = [("this network", *_cells(summary))]
    if control is not None and control.get("test_top1") is not None:
        rows.append(("the same, trained alone", *_cells(control | {"agreement": None})))
    if summary.get("teacher_test_top1") is not None:
        rows.append(("its teacher", f"{summary['teacher_test_top1']:.2f}", *[""] * (len(SCORES) - 1)))
    images = "validation images" if summary.get("test_split") == "validation" else "test images"
    note = f"Percent, NLL in nats, on {summary['test_images']} {images}, read at the end of training; no choice"
    weights = "Averaged weights (--ema)" if summary.get("weights") == "ema" else "Weights of the last epoch"
    note += f" depends on them. {weights}, one seed ({summary['seed']}).{_probed(summary)}"
    return Table(("network", *(metric.card for metric in SCORES)), rows, note)


def _probed(summary: dict) -> str:
    """A sentence on what the embedding scored on the set of --probe; "" if that was not measured."""
    if any(summary.get(metric.key) is None for metric in PROBED):
        return ""
    scores = " and ".join(f"{metric.title} {summary[metric.key]:{metric.style}}" for metric in PROBED)
    return f" Its embedding on the test images of {plain(str(summary['probe_data']))}: {scores} percent."


def _cells(summary: dict) -> list[str]:
    return ["" if summary.get(metric.key) is None else f"{summary[metric.key]:{metric.style}}" for metric in SCORES]


def _expectations(expects: dict) -> Table:
    rows = [(key, str(value)) for key, value in expects.items() if key != "classes"]
    rows.append(("classes", ", ".join(map(str, expects["classes"]))))
    return Table(("the files", "expect and return"), rows, words=2)


def _protocol(config: dict) -> Table:
    """Every flag that shaped the result, and the data, versions and commit it was trained with."""
    flags = config["flags"]
    rows = [
        (part, ", ".join(f"{key} {value}" for key, value in flags[part].items()))
        for part in FLAG_PARTS
        if part in flags
    ]
    rows += [("data's sha256", str(config["identity"]["data"]))]
    rows += [("versions", ", ".join(f"{key} {value}" for key, value in config.get("versions", {}).items()))]
    rows += [("commit", str(config.get("git_commit")))]
    return Table(("what", "how"), rows, words=2)


def _limits(summary: dict, config: dict) -> tuple[str, ...]:
    tested = "No test images were scored."
    if summary["test_images"]:
        tested = f"Its accuracy on {summary['test_images']} test images applies to images like those it was trained on."
    return (
        f"It predicts one of the classes above for every image, whatever the image shows. {tested}",
        "One seed was trained; these numbers do not show how much results vary between seeds.",
        f"The terms of its data ({config['flags']['data']['source']}) apply to this network as well.",
    )
