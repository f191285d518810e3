"""Write the model card: where an exported network comes from, how good it is, and how to use it."""

from pathlib import Path
from typing import NamedTuple

from kd.report.document import Block, Heading, Lines, Table, markdown, plain
from kd.runs.results import FLAG_PARTS, is_labelled, teachers_of
from kd.runs.table import METRICS, PROBED
from kd.utils.files import write_text

SCORES = tuple(metric for metric in METRICS.values() if metric.card)

USE_TORCH = """```python
import kd  # the project that trained this network
network = kd.load("{name}"{trust})  # eval mode; takes normalised images b x 3 x h x w
```

    python -m kd.predict {name} photo.jpg{trusting}"""

USE_EMBEDDER = """```python
import kd  # the project that trained this network
network = kd.load("{name}"{trust})
embeddings = network.embedding(["photo.jpg"])  # one row each, of {width} numbers, not normalised
```

    python train_teacher.py --model {model} --init {name} --data LABELLED    a classifier from it"""

USE_ONNX = """With onnxruntime alone; {files} take unnormalised pixels:

```python
import json, numpy, onnxruntime
session = onnxruntime.InferenceSession("{file}")
expects = json.loads(session.get_modelmeta().custom_metadata_map["preprocessing"])
images = numpy.zeros((1, *expects["shape"][1:]), numpy.uint8)          # RGB, 0 to 255
{last}
```"""
LOGITS = """(logits,) = session.run(["logits"], {"images": images})
print(expects["classes"][logits[0].argmax()])"""
EMBEDDINGS = """(embeddings,) = session.run(["embedding"], {"images": images})"""


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
        _scores(summary, content.control).markdown() if content.expects["classes"] else "",
        markdown([Heading(2, "The files"), *content.table]) if content.table else "",
        "## How to use it",
        *_use(content, place),
        _expectations(content.expects).markdown(),
        markdown([Heading(2, "How it was trained"), _protocol(config), Lines(_limits(summary, config))]),
    ]
    head = _metadata(summary, config, licence, hub_id, bool(onnx_files))
    text = f"---\n{head}\n---\n\n" + "\n\n".join(part.strip() for part in parts if part) + "\n"
    write_text(path, text)


def _use(content: CardContent, place: str) -> tuple[str, str]:
    """How the network is used: with kd, and its ONNX files with onnxruntime."""
    files, width = content.onnx_files, content.expects.get("embedding")
    torch_part, last = (USE_TORCH, LOGITS) if width is None else (USE_EMBEDDER, EMBEDDINGS)
    model = content.summary["model"]
    trust, trusting = (", trust_code=True", " --trust-code") if ":" in model else ("", "")
    ours = torch_part.format(name=place, trust=trust, trusting=trusting, width=width, model=model)
    return ours, USE_ONNX.format(file=files[-1], files=" and ".join(files), last=last) if files else ""


def _method(summary: dict) -> str:
    method = summary["method"]
    return "trained alone" if method == "none" else f"distilled ({method})"


def _metadata(summary: dict, config: dict, licence: str, hub_id: str | None, onnx: bool) -> str:
    """The YAML head that the Hub's search and leaderboards read."""
    from huggingface_hub import EvalResult, ModelCardData

    source, _, revision = config["flags"]["data"]["source"].partition("@")
    results, task = [], "image-feature-extraction" if "embedding" in summary else "image-classification"
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
        pipeline_tag=task,
        tags=["knowledge-distillation", task, *(["onnx"] if onnx else [])],
        datasets=[source] if "/" in source else None,
        metrics=None if "embedding" in summary else ["accuracy"],
        model_name=hub_id or summary["model"],
        eval_results=results or None,
    ).to_yaml()


def _origin(summary: dict, config: dict) -> str:
    """One sentence on size, data and teachers."""
    source = plain(str(config["flags"]["data"]["source"]))
    teachers = plain(", ".join(teachers_of(summary)))
    kind = "embedder" if "embedding" in summary else "classifier"
    words = f"An image {kind} of {summary['params']:,} parameters, trained on {source}"
    return f"{words} to follow {teachers} ({plain(summary['method'])})." if teachers else f"{words}."


def _scores(summary: dict, control: dict | None) -> Table:
    if summary["test_top1"] is None:
        why = "The test set was not read." if is_labelled(summary) else _without_labels(summary)
        return Table(("network",), [("this network",)], why + _probed(summary))
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


def _without_labels(summary: dict) -> str:
    words = "It was distilled on images without labels, so no accuracy is known; its classes are its teacher's."
    agreement = summary.get("val_agreement")
    agrees = f" It predicts as its teacher does on {agreement or 0:.2f}% of held-out images."
    return words + agrees * (agreement is not None)


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
    what = f"It predicts one of the classes above for every image, whatever the image shows. {tested}"
    if "embedding" in summary:
        told = _probed(summary) or " How well its embeddings tell images apart was not scored here."
        what = f"It knows no classes.{told}"
    return (
        what,
        "One seed was trained; these numbers do not show how much results vary between seeds.",
        f"The terms of its data ({config['flags']['data']['source']}) apply to this network as well.",
    )
