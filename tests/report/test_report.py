"""The report: its numbers are the summaries', nothing is dropped silently, and names cannot break it."""

import html.parser
import itertools
import json
import os
import re
import shutil
import time
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from scipy import stats

from kd import metrics
from kd.errors import UserError, exit_code
from kd.models.cost import describe_machine
from kd.report import build, plots
from kd.report.__main__ import main as report
from kd.report.document import plain
from kd.report.groups import NOT_READ
from kd.report.tables import CALIBRATION, SCORES
from kd.runs.comparison import Difference, format_p, holm, variances_by_image
from kd.runs.results import collect_runs
from kd.runs.table import COLUMNS
from kd.training.summary import UNTESTED
from kd.utils.files import write_json, write_weights
from tests import networks
from tests.run_scripts import distil

CLASSES = ["plain", "a|b", "<script>alert(1)</script>", "$\\frac$", "../up"]
RECIPE = {"epochs": 2, "lr": 0.05, "data": "f" * 64, "classes": None}


def fake_run(folder: str, role: str, seed: int, model: str = "tests.networks:plain", **method) -> Path:
    """A finished run as the scripts leave it, with made-up answers of 200 test images."""
    path = Path(folder)
    path.mkdir(parents=True)
    generator = torch.Generator().manual_seed(zlib.crc32(f"{role} {seed} {method}".encode()))
    labels = torch.arange(200) % len(CLASSES)
    logits = torch.randn(200, len(CLASSES), generator=generator)
    logits[torch.arange(200), labels] += 2
    network = networks.plain(len(CLASSES))
    summary = {
        "status": "finished",
        "script": "distill_student.py",
        "method": role,
        "model": model,
        "seed": seed,
        "params": sum(p.numel() for p in network.parameters()),
        "epochs": 2,
        "test_images": 200,
        "val_top1_last": 80.0 + seed,
        "val_top1_best": 81.5 + seed,
        "best_epoch": 1,
        "test_top1_best": 70 + 10 * torch.rand((), generator=generator).item(),
        "test_top1": metrics.top_k(logits, labels, 1),
        "test_top5": metrics.top_k(logits, labels, 5),
        "test_nll": metrics.nll(logits, labels),
        "test_ece": metrics.ece(logits, labels),
        "agreement": None,
    }
    summary["agreement"] = 91.0625 if role not in ("teacher", "none") else None
    identity = {**RECIPE, "seed": seed, "role": role, "model": model, "teacher": None, **method}
    flags = {"method": method, "data": {"source": "pictures"}}
    lines = [
        {"epoch": e, "train/loss": 1 / e, "train/top1": 40.0 * e, "val/loss": 1 / e, "val/top1": 41.0 * e}
        for e in (1, 2)
    ]
    (path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    info = {"model": model, "num_classes": len(CLASSES), "image_size": [8, 8], "mean": [0.5] * 3, "std": [0.2] * 3}
    write_weights(path / "model.safetensors", network.state_dict())
    write_weights(path / "test_logits.safetensors", {"logits": logits, "labels": labels})
    for name, content in (("model", info | {"classes": CLASSES}), ("config", {"identity": identity, "flags": flags})):
        write_json(path / f"{name}.json", content)
    write_json(path / "summary.json", summary)
    return path


def edit(path: Path, **changes) -> None:
    write_json(path, json.loads(path.read_text()) | changes)


def edit_identity(run: Path, **changes) -> None:
    record = json.loads((run / "config.json").read_text())
    edit(run / "config.json", identity=record["identity"] | changes)


def study(seeds=(0, 1, 2)) -> None:
    fake_run("runs/teacher", "teacher", 0, label_smoothing=0.0)
    for seed in seeds:
        fake_run(f"runs/alone{seed}", "none", seed, label_smoothing=0.0)
        fake_run(f"runs/smooth{seed}", "none", seed, label_smoothing=0.1)
        fake_run(f"runs/kd{seed}", "kd", seed, temperature=4.0, alpha=0.9)


@pytest.fixture
def no_figures(monkeypatch):
    """For tests that look at the tables: drawing is what takes the time."""
    monkeypatch.setattr(plots, "render", lambda *_: b"png")


class Tables(html.parser.HTMLParser):
    """The cells of every table, and the text outside."""

    def __init__(self, text: str):
        super().__init__()
        self.tables, self.tags, self.text, self._cell = [], [], "", None
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self.tables[-1][-1].append("")
            self._cell = True

    def handle_endtag(self, tag):
        if tag in ("td", "th"):
            self._cell = None

    def handle_data(self, data):
        self.text += data
        if self._cell:
            self.tables[-1][-1][-1] += data


def markdown_tables(text: str) -> list[list[list[str]]]:
    tables = []
    for block in re.findall(r"(?:^\|.*\|\n)+", text, re.MULTILINE):
        rows = [re.split(r"(?<!\\)\|", line)[1:-1] for line in block.splitlines()]
        tables.append([[cell.strip() for cell in row] for number, row in enumerate(rows) if number != 1])
    return tables


def test_every_number_is_the_summaries(no_figures):
    study()
    edit(Path("runs/kd2/summary.json"), test_top1_best=None)
    report(["runs/*"])
    page, text = Tables(Path("report/report.html").read_text()), Path("report/report.md").read_text()
    unescaped = [[[re.sub(r"\\(.)", r"\1", cell) for cell in row] for row in rows] for rows in markdown_tables(text)]
    assert unescaped == page.tables
    accuracy, gains, costs, each = page.tables
    assert len(each) == 1 + 10
    for row in each[1:]:
        summary = json.loads((Path(row[0]) / "summary.json").read_text())
        shown = ["" if summary[key] is None else f"{summary[key]:{style}}" for key, style, *_ in COLUMNS]
        assert row[4:] == shown
    for row, cost, name in zip(accuracy[1:], costs[1:], ("teacher", "alone", "smooth", "kd"), strict=True):
        runs = [json.loads(path.read_text()) for path in sorted(Path("runs").glob(f"{name}*/summary.json"))]
        assert row[2] == str(len(runs))
        assert row[3:] == [mean_cell([run[key] for run in runs], style) for key, style, *_ in SCORES]
        assert cost[2] == f"{runs[0]['params']:,}"
        assert cost[6:] == [mean_cell([run[key] for run in runs], style) for key, style, *_ in CALIBRATION]
    summary_of = lambda name: json.loads(Path(f"runs/{name}/summary.json").read_text())  # noqa: E731
    last = lambda name: [summary_of(f"{name}{seed}")["test_top1"] for seed in range(3)]  # noqa: E731
    p_values, name_of = [], {"alone": "student alone", "smooth": "student alone, label smoothing 0.1"}
    for row, control in zip(gains[1:], ("alone", "smooth"), strict=True):
        each = np.subtract(last("kd"), last(control))
        right = [torch.stack([answers(f"runs/{name}{seed}") for seed in range(3)]) for name in ("kd", control)]
        found = Difference([0, 1, 2], each.mean(), *variances_by_image(right[0] - right[1]))
        low, high = stats.ttest_1samp(each, 0).confidence_interval(0.95)
        assert found.half() > (high - low) / 2, "wider than the interval of the seeds alone"
        assert row[2:6] == ["0 1 2", f"{each.mean():+.2f}", found.interval, format_p(found.p)]
        best = [[summary_of(f"{name}{seed}")["test_top1_best"] for seed in (0, 1)] for name in ("kd", control)]
        assert row[7] == f"{np.mean(np.subtract(*best)):+.2f}", "without seed 2, of which one run has no best epoch"
        assert row[8] == "smaller than the noise of seeds and test images"
        p_values.append(found.p)
        assert (
            f"against {name_of[control]}: {each.mean():+.2f} points ({found.interval}; p = {row[5]}, {row[6]}" in text
        )
    assert [row[6] for row in gains[1:]] == [format_p(p) for p in holm(p_values)]


def answers(folder: str) -> torch.Tensor:
    """Which test images the run got right, from its saved logits."""
    kept = load_file(f"{folder}/test_logits.safetensors")
    return (kept["logits"].argmax(dim=1) == kept["labels"]).double()


def mean_cell(values: list, style: str) -> str:
    """As the tables should show it, by numpy."""
    there = [value for value in values if value is not None]
    if not there:
        return ""
    shown = f"{np.mean(there):{style}}" + (f" ± {np.std(there, ddof=1):{style}}" if len(there) > 1 else "")
    return shown if len(there) == len(values) else f"{shown} ({len(there)})"


def test_runs_of_one_seed_count_once(no_figures, monkeypatch):
    """Students of two teachers that differ in their seed alone: one group, two runs of each seed."""
    drawn = []
    monkeypatch.setattr(plots, "draw_class_gain", lambda names, gains: drawn.append(gains) or len)
    for number in (0, 1):
        fake_run(f"runs/teacher{number}", "teacher", number, label_smoothing=0.0)
        fake_run(f"runs/alone{number}", "none", number, label_smoothing=0.0)
    for number, seed in itertools.product((0, 1), (0, 1)):
        path = fake_run(f"runs/kd{number}{seed}", "kd", seed, temperature=4.0, teacher=str(number) * 64)
        other = fake_run(f"made/kd{number}{seed}", "other", 10 * number + seed)  # answers of its own
        shutil.copy(other / "test_logits.safetensors", path / "test_logits.safetensors")
        scores = json.loads((other / "summary.json").read_text())
        scores = {key: value for key, value in scores.items() if key.startswith("test")}
        edit(path / "summary.json", teacher=f"runs/teacher{number}", teacher_model="tests.networks:plain", **scores)
    edit(Path("runs/kd11/summary.json"), val_top1_last=95.0)
    report(["runs"])
    accuracy, gains, *_ = Tables(Path("report/report.html").read_text()).tables
    top1 = lambda name: json.loads(Path(f"runs/{name}/summary.json").read_text())["test_top1"]  # noqa: E731
    ours = [np.mean([top1(f"kd{number}{seed}") for number in (0, 1)]) for seed in (0, 1)]
    assert accuracy[-1][2:4] == ["2 (4 runs)", mean_cell([80.0, (81.0 + 95.0) / 2], ".2f")]
    assert accuracy[-1][5] == mean_cell(ours, ".2f")
    assert gains[1][2:4] == ["0 1", f"{np.mean(ours) - np.mean([top1('alone0'), top1('alone1')]):+.2f}"]
    # Classes are of one size here, so that their gains' mean is the gain.
    assert f"{drawn[0].mean().item():+.2f}" == gains[1][3]


def test_a_cell_of_fewer_seeds_says_so(no_figures):
    study()
    for path in (*Path("runs").glob("alone*/summary.json"), *Path("runs").glob("kd*/summary.json")):
        edit(path, test_balanced_top1=50.0, teacher="gone")
    edit(Path("runs/kd1/summary.json"), **UNTESTED, agreement=None, test_balanced_top1=None)
    for seed in range(3):
        edit(Path(f"runs/smooth{seed}/summary.json"), **UNTESTED)
    report(["runs"])
    accuracy, rare, _, costs, each = Tables(Path("report/report.html").read_text()).tables
    kd = [json.loads(Path(f"runs/kd{seed}/summary.json").read_text()) for seed in range(3)]
    assert accuracy[-1][2:4] == ["3", mean_cell([80.0, 81.0, 82.0], ".2f")]
    assert accuracy[-1][5] == mean_cell([run["test_top1"] for run in kd], ".2f")
    assert accuracy[-1][5].endswith(" (2)")
    assert rare[-1][4] == "50.00 ± 0.00 (2)"
    assert costs[-1][6:] == [mean_cell([run[key] for run in kd], style) for key, style, *_ in CALIBRATION]
    smooth = next(row for row in costs if "smoothing" in row[0])
    assert smooth[6:] == [NOT_READ, NOT_READ, ""], "it has no teacher to agree with"
    untested = next(row for row in each if row[0] == "runs/kd1")
    assert untested[-3:] == [NOT_READ] * 3


def test_common_and_rare_classes_have_all_their_numbers(no_figures):
    names = ("test_balanced_top1", "test_top1_many", "test_top1_medium", "test_top1_few")
    extent = lambda *numbers: dict(zip(("classes", "smallest", "largest"), numbers, strict=True))  # noqa: E731
    shots = {"many": extent(2, 120, 450), "medium": extent(1, 60, 60), "few": extent(2, 5, 20)}
    study()
    for number, path in enumerate(sorted(Path("runs").glob("[ak]*/summary.json"))):
        edit(path, shots=shots, **{name: 60.0 - 9 * place + number**2 for place, name in enumerate(names)})
    edit(Path("runs/kd1/summary.json"), test_top1_few=None)
    report(["runs"])
    page = Tables(Path("report/report.html").read_text())
    title = ["network", "model", "seeds", "test", "balanced", "many-shot", "medium-shot", "few-shot"]
    rows = [["student alone", "alone"], ["student (kd)", "kd"]]
    expected = [title]
    for label, name in rows:
        runs = [json.loads(Path(f"runs/{name}{seed}/summary.json").read_text()) for seed in range(3)]
        cells = [mean_cell([run[key] for run in runs], ".2f") for key in ("test_top1", *names)]
        expected.append([label, "tests.networks:plain", "3", *cells])
    assert page.tables[1] == expected
    assert "training images: many 2 of 120 to 450, medium 1 of 60 to 60, few 2 of 5 to 20." in page.text


def test_accuracies_by_the_share_of_the_labels(no_figures):
    for share, seed in itertools.product((0.1, 0.25, 1.0), (0, 1)):
        for role in ("none", "kd", "dkd"):
            if (role, share) == ("dkd", 0.25) or (role, seed, share) == ("none", 1, 1.0):
                continue
            edit_identity(fake_run(f"runs/{role}{share:g}-{seed}", role, seed, part=share), label_share=share)
    report(["runs"])
    tables = Tables(Path("report/report.html").read_text()).tables
    top1 = lambda folder: json.loads((folder / "summary.json").read_text())["test_top1"]  # noqa: E731
    cells = {
        (role, share): mean_cell([top1(path) for path in sorted(Path("runs").glob(f"{role}{share:g}-*"))], ".2f")
        for role, share in itertools.product(("none", "kd", "dkd"), (0.1, 0.25, 1.0))
    }
    (table,) = [rows for rows in tables if rows[0][-1] == "100% of the labels"]
    assert table[0] == ["network", "model", "10% of the labels", "25% of the labels", "100% of the labels"]
    names = {"none": "student alone", "dkd": "student (dkd)", "kd": "student (kd)"}
    assert table[1:] == [
        [name, "tests.networks:plain", *(cells[role, share] for share in (0.1, 0.25, 1.0))]
        for role, name in names.items()
    ]
    assert cells["dkd", 0.25] == ""
    assert "±" not in cells["none", 1.0]


def test_a_teacher_from_elsewhere_has_its_row_and_name(no_figures):
    study()
    for seed in range(3):
        edit_identity(Path(f"runs/kd{seed}"), teacher="c691" * 16)
        named = {"teacher": "weights/big.safetensors", "teacher_model": "resnet20", "teacher_test_top1": 61.25}
        edit(Path(f"runs/kd{seed}/summary.json"), **named)
    path = fake_run("runs/two", "kd", 0, temperature=4.0, alpha=0.9, teacher="d" * 64)
    edit(path / "summary.json", teacher=["a/x", "b/y"], teacher_model=["resnet8", "timm/z"], teacher_test_top1=None)
    report(["runs"])
    page = Tables(Path("report/report.html").read_text())
    outside = [row for row in page.tables[0] if row[0] == "teacher, not among these runs"]
    assert [re.sub(" [0-9a-f]{4}$", "", row[1]) for row in outside] == [
        "resnet20 from big.safetensors",
        "resnet8 from x and timm/z from y",
    ]
    assert [row[2:] for row in outside] == [["", "", "", "61.25", "", ""], ["", "", "", "", "", ""]]
    assert "student (kd), teacher resnet20 from big.safetensors" in page.text
    assert "c691c691" not in page.text
    assert "curves of the teacher: resnet20 from big.safetensors" in page.text


def make_better(name: str, seeds: int, wrong: int) -> None:
    """Give the runs of `name` answers of which `wrong` are wrong, others for each seed."""
    for seed in range(seeds):
        path = Path(f"runs/{name}{seed}")
        kept = load_file(path / "test_logits.safetensors")
        logits = torch.eye(len(CLASSES))[kept["labels"]]
        logits[10 * seed : 10 * seed + wrong + seed] = logits[10 * seed : 10 * seed + wrong + seed].roll(1, dims=1)
        write_weights(path / "test_logits.safetensors", kept | {"logits": logits})
        edit(path / "summary.json", test_top1=metrics.top_k(logits, kept["labels"], 1))


def test_many_methods_are_counted_as_many(no_figures):
    """A p that a single method may have is no verdict among twenty; a single one is unchanged."""
    for seed in range(4):
        fake_run(f"runs/alone{seed}", "none", seed, label_smoothing=0.0)
        fake_run(f"runs/kd{seed}", "kd", seed, temperature=4.0)
    make_better("kd", 4, 40)
    make_better("alone", 4, 52)
    report(["runs"])
    (row,) = Tables(Path("report/report.html").read_text()).tables[1][1:]
    assert 0.001 < float(row[5]) < 0.05
    assert row[5] == row[6]
    assert row[-1] == "helped, beyond the noise of seeds and test images"
    assert "corrected for" not in Tables(Path("report/report.html").read_text()).text
    for number, seed in itertools.product(range(49), range(4)):
        fake_run(f"runs/odd{number}-{seed}", f"odd{number}", seed)
    report(["runs"])
    text, page = Path("report/report.md").read_text(), Tables(Path("report/report.html").read_text())
    again = next(row for row in page.tables[1] if row[0] == "student (kd)")
    assert again[:6] == row[:6], "the interval and the plain p are as before"
    assert again[-1] == f"no verdict: p = {row[5]} alone is {again[6]} among 50 comparisons"
    assert f"p = {row[5]}, {again[6]} corrected for 50 comparisons): no verdict:" in text
    assert "the number of comparisons in this table (50)" in page.text


def test_missing_test_logits_are_said_where_they_count(no_figures):
    study()
    Path("runs/alone1/test_logits.safetensors").unlink()
    report(["runs"])
    text = Path("report/report.md").read_text()
    assert "In 1 of them the images' noise is only bounded" in text
    assert plain("runs/alone1/test_logits.safetensors") in text[text.index("What could not be shown") :]


def test_seeds_that_share_one_teacher_say_so(no_figures):
    says = "All seeds of {} share one teacher: this says nothing about other teachers."
    study()
    for seed in range(3):
        edit(Path(f"runs/kd{seed}/summary.json"), teacher="runs/teacher", teacher_model="tests.networks:plain")
        edit_identity(Path(f"runs/kd{seed}"), teacher="0" * 64)
        path = fake_run(f"runs/dkd{seed}", "dkd", seed, teacher="0" * 64)
        edit(path / "summary.json", teacher="runs/teacher", teacher_model="tests.networks:plain")
        fake_run(f"runs/tfkd{seed}", "tfkd", seed)
    report(["runs"])
    assert says.format("student (dkd) and of student (kd)") in Tables(Path("report/report.html").read_text()).text
    shutil.rmtree("runs/tfkd0"), shutil.rmtree("runs/tfkd1"), shutil.rmtree("runs/tfkd2")
    report(["runs"])
    assert plain(says.format("each method")) in Path("report/report.md").read_text()
    edit_identity(Path("runs/kd1"), teacher="1" * 64)
    report(["runs"])
    assert plain(says.format("student (dkd)")) in Path("report/report.md").read_text()


def test_every_teacher_is_drawn_or_named(no_figures, monkeypatch):
    drawn = []
    monkeypatch.setattr(plots, "draw_curves", lambda curves: drawn.append(list(curves)) or len)
    for number in range(4):
        fake_run(f"runs/{number}", "teacher", 0, model=f"tests.networks:plain{number}")
    report(["runs"])
    assert drawn == [[f"teacher, tests.networks:plain{number}" for number in range(3)]]
    assert "curves of the teacher: the first 3 of 4 teachers are drawn" in Path("report/report.md").read_text()


def test_a_class_without_test_images_is_no_gain_of_nothing(monkeypatch):
    study(seeds=(0,))
    for path in Path("runs").glob("*/test_logits.safetensors"):
        kept = load_file(path)
        here = kept["labels"] != 2
        write_weights(path, {name: tensor[here] for name, tensor in kept.items()})
        top1 = metrics.top_k(kept["logits"][here], kept["labels"][here], 1)
        edit(path.parent / "summary.json", test_top1=top1)
    bars = []
    monkeypatch.setattr("matplotlib.axes.Axes.barh", lambda axes, places, *args, **kw: bars.append(len(places)))
    report(["runs"])
    assert bars == [4, 4], "on a light and on a dark page"
    assert "gain of each class: 1 of 5 classes have no test images" in Path("report/report.md").read_text()


def test_an_earlier_reports_figures_are_gone(no_figures):
    study(seeds=(0,))
    Path("report").mkdir()
    for name in ("data2_pareto.png", "grid3.png", "fig1_student.png", "mine.png"):
        Path("report", name).write_bytes(b"old")
    Path("report/report.html").touch()
    report(["runs"])
    left = {path.name for path in Path("report").glob("*.png")}
    assert left >= {"mine.png", "pareto.png", "student_curves.png"}
    assert not left & {"data2_pareto.png", "grid3.png", "fig1_student.png"}


def test_figures_are_there_and_embedded(monkeypatch):
    study()
    for t in (2.0, 10.0):
        for a in (0.5, 0.9):
            fake_run(f"runs/grid {t} {a}", "kd", 0, temperature=t, alpha=a)
    report(["runs", "--trust-code"])
    names = ["class_gain", "confusion", "gain", "grid1", "pareto", "reliability", "student_curves", "teacher_curves"]
    assert sorted(path.stem for path in Path("report").glob("*.png")) == names
    page = Path("report/report.html").read_text()
    assert page.count("data:image/png;base64,") == 2 * len(names), "each for light and for dark pages"
    assert not re.search(r"(?:src|href|srcset)=\"(?!data:)", page), "nothing is fetched from elsewhere"
    assert "What could not be shown" not in page
    costs = json.loads(Path("report/costs.json").read_text())["networks"]
    assert [cost[0] for cost in costs.values()] == [8 * 27 * 64 + 128 * len(CLASSES)]  # by hand: 3x3 conv, linear
    monkeypatch.setattr(plots, "render", lambda *_: b"png")
    report(["runs"])
    assert json.loads(Path("report/costs.json").read_text())["networks"] == costs, "measured once"
    edit(Path("report/costs.json"), counted=1, networks={key: [1, 1, 1.0] for key in costs})
    report(["runs", "--trust-code"])
    again = json.loads(Path("report/costs.json").read_text())["networks"]
    assert [cost[0] for cost in again.values()] == [cost[0] for cost in costs.values()], "counted as it is now"


def place(text: str, *parts: str) -> list[int]:
    return [text.index(part) for part in parts]


def test_the_report_opens_with_what_was_compared_and_the_verdict(monkeypatch):
    drawn = []
    monkeypatch.setattr(plots, "render", lambda *_: b"png")
    monkeypatch.setattr(plots, "draw_gains", lambda gains: drawn.append(gains) or len)
    study()
    for path in Path("runs").glob("kd*/summary.json"):
        edit(path, teacher="runs/teacher", teacher_model="tests.networks:Plain")
    report(["runs"])
    page, text = Tables(Path("report/report.html").read_text()), Path("report/report.md").read_text()
    compared = "Compared: student (kd) against student alone; student alone, label smoothing 0.1. "
    compared += "Students: tests.networks:plain; teacher: tests.networks:Plain; seeds: 0 1 2; test images: 200."
    gains = page.tables[1]
    verdict = f"Points of test accuracy against student alone. {gains[1][-1].capitalize()}: student (kd) {gains[1][3]}."
    order = (compared, verdict, "Figure 1: gain of each method.", "Accuracy", "Every run", "How this report was made")
    assert place(page.text, *order) == sorted(place(page.text, *order))
    unescaped = re.sub(r"\\(.)", r"\1", text)
    assert place(unescaped, *order) == sorted(place(unescaped, *order))
    (shown,) = drawn
    assert [(method, control, f"{mean:+.2f}") for method, control, mean, _ in shown] == [
        (row[0], row[1], row[3]) for row in gains[1:]
    ]
    intervals = [f"{mean - half:+.2f} to {mean + half:+.2f}" for *_, mean, half in shown]
    assert intervals == [row[4] for row in gains[1:]]


def test_without_a_distilled_student_the_report_says_what_there_is(no_figures):
    fake_run("runs/teacher", "teacher", 0)
    report(["runs"])
    assert "No distilled student among these runs, but teacher." in Path("report/report.md").read_text()
    assert not Path("report/gain.png").exists()


def test_figures_are_numbered_throughout(no_figures):
    study(seeds=(0,))
    edit_identity(fake_run("runs/other", "kd", 5), data="0" * 64)
    report(["runs"])
    for name in ("report.md", "report.html"):
        text = Path("report", name).read_text()
        text = re.sub(r'alt="[^"]*"|!\[[^]]*\]', "", text)
        numbers = [int(number) for number in re.findall(r"Figure (\d+):", text)]
        assert numbers == list(range(1, len(numbers) + 1))
        assert len(numbers) > 8, "of two sets of images"


def test_the_report_says_what_made_it(no_figures):
    study(seeds=(0, 1))
    machine = {"device": "cuda:0", "processes": 2, "threads": 4, "git_commit": "c0ffee"}
    for seed, version in ((0, "2.13"), (1, "2.14")):
        edit(Path(f"runs/kd{seed}/config.json"), versions={"python": "3.11", "torch": version}, **machine)
    report(["runs", "--out", "a folder"])
    page = Tables(Path("a folder/report.html").read_text()).text
    made = page[page.index("How this report was made") :]
    assert "python -m kd.report runs --out 'a folder'" in made
    assert time.strftime("%Y-%m-%d") in made
    assert describe_machine() in made
    assert "cuda:0, 2 processes, 4 threads each (2 runs)" in made
    assert "not recorded (5 runs)" in made
    assert "python 3.11, torch 2.13 (1 run)" in made
    assert "commit c0ffee (2 runs)" in made


def test_whatever_is_no_finished_run_is_listed(no_figures, capsys):
    study(seeds=(0,))
    shutil.copytree("runs/kd0", "runs/copy")
    unfinished = Path("runs/unfinished/checkpoint/step-70")
    unfinished.mkdir(parents=True)
    Path("runs/unfinished/config.json").write_text("{}")
    Path("runs/notes.txt").write_text("mine")
    Path("runs/thesis/chapter").mkdir(parents=True)
    Path("runs/empty").mkdir()
    broken = {"garbled": "{", "list": "[]", "lacking": '{"status": "finished"}', "binary": "\x00\xff"}
    for name, content in broken.items():
        shutil.copytree("runs/alone0", f"runs/{name}")
        Path(f"runs/{name}/summary.json").write_text(content)
    for name, changes in {"nan": {"test_top1": float("nan")}, "text": {"test_ece": "low"}}.items():
        edit(shutil.copytree("runs/alone0", Path(f"runs/{name}")) / "summary.json", **changes)
    edit(shutil.copytree("runs/alone0", Path("runs/nobody")) / "config.json", identity=None)
    edit(shutil.copytree("runs/alone0", Path("runs/flagless")) / "config.json", flags=[])
    report(["runs/*", "runs/gone*"])
    listed = {row[0]: row[1] for row in Tables(Path("report/report.html").read_text()).tables[-1][1:]}
    kept = ("garbled", "list", "lacking", "binary", "nan", "text", "nobody", "flagless")
    expected = dict.fromkeys([f"runs/{name}" for name in kept], "broken")
    expected |= {"runs/unfinished": "unfinished", "runs/notes.txt": "no run", "runs/thesis": "no run"}
    expected |= {"runs/empty": "no run", "runs/gone*": "missing", "runs/kd0": "a copy"}
    assert listed == expected
    said = capsys.readouterr().out
    assert "4 finished runs; 14 more" in said
    assert "step 70 is saved" in said


@pytest.mark.parametrize("name", ["metrics.jsonl", "test_logits.safetensors", "model.safetensors", "model.json"])
def test_a_damaged_file_costs_its_figures_only(no_figures, name):
    study(seeds=(0, 1))
    first, *others = sorted(Path("runs").glob(f"*/{name}"))
    first.unlink()
    for path in others:
        path.write_bytes(b"\x00{")
    report(["runs", "--trust-code"])
    page = Path("report/report.html").read_text()
    assert "7 finished runs" in page
    assert "What could not be shown" in page
    assert name in page[page.index("What could not be shown") :]


ODD = (None, [], {"x": 1}, "x", -1, 0, True, 1e400, ["a"])
GONE = object()


def test_odd_values_end_in_no_traceback():
    """Every value of every JSON file of a run, one run each, replaced by what should not be there, or missing."""
    study(seeds=(0,))
    source, count = Path("runs/kd0"), 100
    records = {name: json.loads((source / f"{name}.json").read_text()) for name in ("summary", "config", "model")}
    places = [(name, (key,)) for name, record in records.items() for key in record]
    places += [("config", ("identity", key)) for key in records["config"]["identity"]]
    places += [("config", ("flags", "method")), ("config", ("flags", "data"))]
    for name, keys in places:
        for odd in (*ODD, GONE):
            folder = Path(f"runs/odd{count}")
            folder.mkdir()
            changed = json.loads(json.dumps(records))
            changed["summary"]["seed"] = changed["config"]["identity"]["seed"] = count  # no copies of one another
            part = changed[name] if len(keys) == 1 else changed[name][keys[0]]
            part[keys[-1]] = odd
            if odd is GONE:
                del part[keys[-1]]
            for part, content in changed.items():
                (folder / f"{part}.json").write_text(json.dumps(content))
            count += 1
    line = {"epoch": 1, "train/loss": 1.0, "train/top1": 1.0, "val/loss": 1.0, "val/top1": 1.0}
    for number, (key, odd) in enumerate(itertools.product(line, ODD)):
        Path(f"runs/odd{100 + number}/metrics.jsonl").write_text(json.dumps(line | {key: odd}))
    report(["runs"])
    page = Tables(Path("report/report.html").read_text())
    everything = [row[0] for table in page.tables for row in table]
    assert all(f"runs/odd{number}" in everything for number in range(100, count))


def test_answers_of_another_run_are_refused(no_figures):
    study(seeds=(0,))
    shutil.copy("runs/teacher/test_logits.safetensors", "runs/kd0/test_logits.safetensors")
    report(["runs"])
    assert "does not give the accuracy in the summary" in Path("report/report.md").read_text()
    assert not Path("report/confusion.png").exists()


def test_row_50_names_cannot_break_the_page():
    evil = "runs/<img src=x onerror=alert(1)> & [bold] `|$x$"
    study(seeds=(0,))
    os.rename("runs/kd0", evil)
    Path("runs/</td><script>").mkdir(parents=True)
    report(["runs"])
    page = Tables(Path("report/report.html").read_text())
    assert set(page.tags) & {"script", "svg"} == set()
    assert page.tags.count("img") == 7, "the figures alone"
    assert evil in [row[0] for row in page.tables[-2]]
    text = Path("report/report.md").read_text()
    assert plain(evil) in text
    assert {len(row) for row in markdown_tables(text)[-2]} == {len(page.tables[-2][0])}
    assert "<script" not in text


def test_a_folders_name_that_is_no_text_is_shown_as_its_bytes(no_figures, capsys):
    os.makedirs(b"runs/\xff\xfe")
    Path(os.fsdecode(b"runs/\xff\xfe"), "summary.json").write_text("{}")
    assert exit_code(lambda: report(["runs"]), "") == 0
    assert "\\udcff\\udcfe" in Path("report/report.md").read_text()


def test_without_a_test_result_there_is_no_gain(no_figures):
    study(seeds=(0, 1))
    for path in Path("runs").glob("kd*/summary.json"):
        edit(path, **UNTESTED, agreement=None)
    report(["runs"])
    page = Tables(Path("report/report.html").read_text())
    assert page.tables[0][-1][5:] == [NOT_READ] * 3
    assert "No distilled student with a test result" in page.text


def test_controls_share_the_recipe(no_figures):
    study(seeds=(0, 1))
    for path in Path("runs").glob("alone*"):
        edit_identity(path, epochs=200)
    report(["runs"])
    text = Path("report/report.md").read_text()
    assert "no student alone by the same recipe among these runs" in text
    assert "student (kd) against student alone, label smoothing 0.1:" in text


def test_other_images_stand_apart(no_figures):
    study(seeds=(0,))
    edit_identity(Path("runs/alone0"), data="0" * 64)
    report(["runs"])
    assert Path("report/report.md").read_text().count("\n## On pictures") == 2


@pytest.mark.parametrize(
    ("args", "words"), [(["nothing*"], "no folder matches"), (["x", "--out", "file"], "is a file")]
)
def test_what_the_user_did_wrong(args, words):
    Path("file").write_text("")
    with pytest.raises(UserError, match=words):
        report(args)


def test_pictures_of_somebody_elses_are_not_replaced(no_figures):
    study(seeds=(0,))
    Path("mine").mkdir()
    Path("mine/gain.png").write_bytes(b"a holiday")
    with pytest.raises(UserError, match=r"--out mine: has gain\.png and no earlier report"):
        report(["runs", "--out", "mine"])
    assert [path.name for path in Path("mine").iterdir()] == ["gain.png"]
    assert Path("mine/gain.png").read_bytes() == b"a holiday"


def test_real_runs_are_read_without_the_test_set(no_figures, monkeypatch):
    distil("--out", "runs/report/student", "--control")
    monkeypatch.setattr("kd.data.dataset.find_source", None)  # what every load_data, by whatever name, calls first
    report(["runs", "--trust-code"])
    finished, others = collect_runs(["runs"])
    assert (len(finished), others) == (3, [])
    text = Path("report/report.md").read_text()
    assert "student (kd) against student alone:" in text
    assert "one seed says nothing about the seeds' noise" in text
    assert "What could not be shown" not in text


def test_a_student_of_kept_answers_has_its_control(capsys):
    """As in every grid: how answers are kept is no part of the budget."""
    fake_run("runs/alone", "none", 0, label_smoothing=0.0)
    edit_identity(
        fake_run("runs/kd", "kd", 0, temperature=4.0), cache_teacher=True, cache_dtype="float16", cache_top_k=None
    )
    build.write_report(["runs/*"], Path("report"))
    assert "student (kd) against student alone" in Path("report/report.md").read_text()


def test_a_student_of_two_views_has_its_control():
    """A control sees one view, and no flag of the second one is in its identity."""
    fake_run("runs/alone", "none", 0, label_smoothing=0.0)
    edit_identity(fake_run("runs/crld", "crld", 0, temperature=4.0), strong_ops=3, strong_magnitude=10)
    build.write_report(["runs/*"], Path("report"))
    assert "student (crld) against student alone" in Path("report/report.md").read_text()


@pytest.mark.parametrize("key", ["layers", "reviewkd_layers"])
def test_a_student_that_compares_named_layers_has_its_control(key):
    """The layers that a method compares are in its identity, and no control has any."""
    fake_run("runs/alone", "none", 0, label_smoothing=0.0)
    edit_identity(fake_run("runs/review", "reviewkd", 0, weight=1.0), **{key: [["layer1"], ["layer1.input"]]})
    build.write_report(["runs/*"], Path("report"))
    assert "student (reviewkd) against student alone" in Path("report/report.md").read_text()


def test_a_flag_that_a_method_got_later_is_in_no_grid_of_older_runs():
    for seed in (0, 1):
        fake_run(f"runs/alone{seed}", "none", seed, label_smoothing=0.0)
        fake_run(f"runs/old{seed}", "kd", seed, temperature=4.0)
        fake_run(f"runs/new{seed}", "kd", seed, temperature=4.0, a_margin=0.1)
    report(["runs"])
    assert "6 finished runs" in Path("report/report.html").read_text()
