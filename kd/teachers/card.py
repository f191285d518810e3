"""What a cache is, in words: for `python -m kd.teachers check`, and the card of one that is pushed."""

import itertools
import math
import shlex
from pathlib import Path

from kd.config import ViewConfig
from kd.config.defaults import default_preset
from kd.config.presets import PRESETS
from kd.teachers.cache import STRONG
from kd.teachers.shared import FORMAT, MANIFEST, SharedCache, flags_to_train
from kd.utils.files import write_text

METHODS = {"embedding": "embed"}  # by kind of answers, the method of the card's command

CARD = """# {title}

{kind} of a teacher network for {views} of every training image{strong}, as the project kd draws them. Whoever has the
images trains a student against these, without the teacher:

    accelerate launch distill_student.py {command}

kd refuses images, order, classes, sizes or views that are not the ones below, and says which flag to change.

{table}

The images themselves are not in here. The terms of the images, and those of the teacher, apply to these {answers} too.

## The files

`{manifest}` has all of the above, and the sha256 of each view. The `answers-*.safetensors` hold, one after another, the
rows of {arrays}; the row of image `i` in view `v` is `v * {rows} + i`. `i` counts the training images in kd's order,
which `rows_sha256` is the hash of.
"""

# What a row holds; with top k.
ALL, FEW = "`logits`", "`logits` (the {} largest of each image, then what every other class has) and `classes` (theirs)"


def facts(cache: SharedCache) -> dict[str, str]:
    """What a cache is, a line a subject."""
    identity, about, store = cache.identity, cache.about, cache.store
    classes = identity["class_names"]
    named = f" ({', '.join(map(str, classes[:3]))}{', ...' if len(classes) > 3 else ''})" if classes else ""
    views = [shlex.join(words) for words in flags_to_train(cache) if words[0] != "--data"]
    size = about.get("image_size")
    pixels = f", {size[1]} x {size[0]} pixels" if size else ""
    source = about.get("data", {}).get("source", "not recorded")
    kept = f"the {store.top_k} largest and the others' mass" if store.top_k else f"all {store.classes}"
    versions = ", ".join(f"{name} {version}" for name, version in about.get("versions", {}).items())
    computed = f"in {_precision(identity)} on {identity.get('device', 'an unknown device')}"
    return {
        "teacher": f"{teacher_in_words(cache)}; sha256 {identity['teacher_sha256'][:12]}",
        "data": f"{source}: {store.rows} training images{pixels}; rows_sha256 {identity['rows_sha256'][:12]}",
        "classes": f"{len(classes)}{named}" if classes else "none: no labels were read",
        "normalisation": " and ".join("/".join(f"{value:.4g}" for value in part) for part in identity["normalisation"]),
        "views": f"{' '.join(views)}; version {cache.views_version} of their draws",
        "stored": f"{store.kind}, {identity['dtype']}, {kept}; {store.bytes / 1e6:.3g} MB",
        "computed": f"{computed}{', ' + versions if versions else ''}",
        "sha256": cache.sha256,
    }


def teacher_in_words(cache: SharedCache) -> str:
    """Each teacher's network, the last part of its folder's name, and its test accuracy where that is known."""
    told = []
    for teacher in cache.about.get("teachers", []):
        model, name, top1 = (teacher.get(key) for key in ("model", "name", "test_top1"))
        known = isinstance(top1, int | float) and math.isfinite(top1)
        inside = [*([str(name)] if name else []), *([f"test top-1 {top1:.2f}%"] if known else [])]
        told.append(f"{model}{' (' + ', '.join(inside) + ')' if inside else ''}")
    return " and ".join(told) or "not recorded"


def _precision(identity: dict) -> str:
    precision = identity.get("precision", "unknown precision")
    return "float32" if precision == "no" else str(precision)


def command(cache: SharedCache, source: str) -> str:
    """The arguments of distill_student.py with which a student is trained against the cache."""
    data = cache.about.get("data", {}).get("source")
    method = METHODS.get(cache.kind, "mlkd" if "strong" in cache.identity else "kd")
    usual = default_preset(data, method)
    preset = [] if usual == default_preset(None, method) else ["--preset", usual]
    flags = itertools.chain.from_iterable(flags_to_train(cache, PRESETS[usual].get("views", ViewConfig())))
    where = [] if data else ["--data", "FOLDER"]
    return shlex.join([*preset, *where, *flags, "--cache-teacher", source, method])


def write_card(cache: SharedCache, path: Path, source: str, licence: str) -> None:
    """Write a README.md in the Hub's format; `source` is what --cache-teacher takes."""
    from huggingface_hub import DatasetCardData

    store, kind = cache.store, cache.store.kind.capitalize()
    head = DatasetCardData(
        license=licence,
        task_categories=["image-classification"],
        tags=["knowledge-distillation", "kd", f"kd-format-{FORMAT}"],
        pretty_name=f"{kind} of {teacher_in_words(cache)}",
    )
    rows = ["| what | |", "|---|---|", *(f"| {key} | {_cell(value)} |" for key, value in facts(cache).items())]
    arrays = FEW.format(store.top_k) if store.top_k else ALL
    both = f"{arrays}, and with the prefix `{STRONG}` of the strong views" if "strong" in cache.identity else arrays
    text = CARD.format(
        title=f"{kind} of {teacher_in_words(cache)}",
        kind=kind,
        answers=store.kind,
        views=f"{store.views} views" if store.views > 1 else "one view",
        strong=", weak and strong," if "strong" in cache.identity else "",
        command=command(cache, source),
        table="\n".join(rows),
        manifest=MANIFEST,
        arrays=both,
        rows=store.rows,
    )
    write_text(path, f"---\n{head.to_yaml()}\n---\n\n{text}")


def _cell(value: str) -> str:
    return value.replace("|", "\\|")
