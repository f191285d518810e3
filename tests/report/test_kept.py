"""Measurements kept in the repository: their page is made from their files, and so are the numbers of other pages."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch

from kd.errors import UserError
from kd.report.__main__ import main as report
from kd.report.groups import by_data, compare_groups
from kd.report.kept import _beside, keep, page
from kd.runs.comparison import Answers
from kd.runs.results import collect_runs, read_correct
from kd.utils.files import read_json
from tests.conftest import ROOT
from tests.report.test_report import edit, study

KEPT = ROOT / "docs" / "measurements"
PAGES = ("README.md", "docs/measurements.md", "docs/training.md", "docs/foundation.md")
ACCURACY = re.compile(r"\b\d\d\.\d\d(?: ± \d+\.\d\d)?")


@pytest.fixture
def kept(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    study()
    for run in Path("runs").glob("kd*"):
        edit(run / "summary.json", teacher="runs/teacher", control=f"runs/alone{run.name[-1]}", seconds=61.0)
    keep(["runs"], Path("kept/a-study"), ["python -m kd.study"])
    return Path("kept")


def test_the_page_of_the_repository_is_made_from_its_files():
    assert (KEPT / "README.md").read_text() == page(KEPT)


def test_no_kept_file_is_large_or_names_a_place_of_a_machine():
    for path in KEPT.rglob("*"):
        if path.is_file() and path != KEPT / "README.md":
            assert path.stat().st_size < 20_000, path
            assert not re.search(r'"(/|[A-Z]:\\)', path.read_text()), path


@pytest.mark.parametrize("name", [name for name in PAGES if (ROOT / name).exists()])
def test_a_table_row_that_links_to_a_measurement_has_its_numbers(name):
    sections = re.split(r'(?=<a id=")', (KEPT / "README.md").read_text())
    by_name = {match[1]: text for text in sections if (match := re.match(r'<a id="([^"]+)"', text))}
    for line in (ROOT / name).read_text().splitlines():
        link = re.search(r"measurements/README\.md#([a-z0-9-]+)", line)
        if line.startswith("|") and link:
            for number in ACCURACY.findall(line):
                assert number in by_name[link[1]], (line, number)


def test_kept_runs_give_the_same_intervals_as_the_runs_themselves(kept):
    def gains(folder: str) -> list[tuple]:
        (groups,) = by_data(collect_runs([folder])[0]).values()
        answers = Answers()
        found = [one.difference for one in compare_groups(groups, answers)]
        assert not answers.notes
        assert all(difference.by_image for difference in found)
        return sorted((difference.mean, difference.interval, difference.p) for difference in found)

    assert gains("kept") == gains("runs")
    ours, theirs = (collect_runs([folder])[0] for folder in ("kept", "runs"))
    for one, other in zip(ours, theirs, strict=True):
        assert one.path.name == other.path.name
        correct, labels = read_correct(one.path, one.summary)
        assert torch.equal(correct, read_correct(other.path, other.summary)[0])
        assert labels == read_correct(other.path, other.summary)[1]


def test_the_page_has_a_row_for_each_group_with_its_gain_and_time(kept):
    text = page(kept)
    rows = [line for line in text.splitlines() if line.startswith("| ")]
    assert [row.split(" | ")[0][2:] for row in rows[2:]] == [
        "teacher",
        "student alone",
        "student alone, label smoothing 0.1",
        "student (kd)",
    ]
    gain = re.search(r"61 s \| ([+-]\d+\.\d\d) \(([+-]\d+\.\d\d) to ", rows[-1])
    (groups,) = by_data(collect_runs(["runs"])[0]).values()
    first = next(one for one in compare_groups(groups, Answers()) if one.control.kind == "student alone")
    assert gain[1] == f"{first.difference.mean:+.2f}"
    assert "    python -m kd.study\n" in text
    assert "All seeds of a student share one teacher" in text


def test_a_student_alone_that_smooths_labels_is_the_control_where_there_is_no_other(kept):
    for run in Path("kept/a-study").glob("alone?"):
        shutil.rmtree(run)
    (groups,) = by_data(collect_runs(["kept"])[0]).values()
    (one,) = compare_groups(groups, Answers())
    assert one.control.title == "student alone, label smoothing 0.1"
    assert f"61 s | {one.difference.mean:+.2f} (" in page(kept)


def test_the_machine_of_runs_on_a_gpu_is_the_gpu(kept):
    edit(Path("runs/kd0/config.json"), cpu="Xeon", gpu="NVIDIA H200")
    keep(["runs/kd0"], Path("kept/gpu"), ["a"])
    assert read_json(Path("kept/gpu/measurement.json"))["machine"] == "NVIDIA H200"


def test_paths_are_cut_and_teachers_found_beside_the_run(kept):
    summary = read_json(kept / "a-study" / "kd0" / "summary.json")
    assert (summary["teacher"], summary["control"]) == ("teacher", "alone0")
    runs, _ = collect_runs([str(kept / "a-study")])
    (groups,) = by_data([_beside(run) for run in runs]).values()
    assert {group.external_teacher for group in groups} == {""}, "found among the runs that are kept"


def test_runs_of_one_name_are_told_apart_by_their_parents_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    study(seeds=(0,))
    for parent, run in (("a", "kd0"), ("b", "alone0")):
        Path(parent).mkdir()
        shutil.move(f"runs/{run}", f"{parent}/s0")
    assert sorted(path.name for path in keep(["a", "b"], Path("kept/x"), ["c"])) == ["a-s0", "b-s0"]


def test_what_is_no_run_is_named_and_another_run_is_not_overwritten(kept, capsys):
    Path("unfinished").mkdir()
    Path("unfinished/config.json").write_text("{}")
    capsys.readouterr()
    keep(["runs/kd0", "unfinished"], kept / "a-study", [])
    assert "left out: unfinished, " in capsys.readouterr().out
    shutil.copytree("runs/kd1", "other/kd0")
    edit(Path("other/kd0/config.json"), identity=read_json(Path("other/kd0/config.json"))["identity"] | {"lr": 0.7})
    before = (kept / "a-study/kd0/summary.json").read_bytes()
    with pytest.raises(UserError, match=r"a-study/kd0 is kept of another run; rename the folder of other/kd0"):
        keep(["other/kd0"], kept / "a-study", [])
    assert (kept / "a-study/kd0/summary.json").read_bytes() == before


@pytest.mark.parametrize(
    ("file", "words"), [("metrics.jsonl", "has no metrics"), ("test_logits.safetensors", "logits")]
)
def test_a_run_that_lacks_a_file_leaves_nothing_half_kept(kept, file, words):
    Path("runs/kd1", file).unlink()
    with pytest.raises(UserError, match=words):
        keep(["runs/kd0", "runs/kd1"], Path("kept/new"), ["a"])
    assert not Path("kept/new").exists()


def test_more_runs_add_their_command(kept):
    keep(["runs/kd0"], kept / "a-study", ["python -m kd.study", "another"])
    assert read_json(kept / "a-study/measurement.json")["commands"] == ["python -m kd.study", "another"]
    Path("kept/file").touch()
    with pytest.raises(UserError, match="--keep kept/file: cannot be written"):
        keep(["runs/kd0"], Path("kept/file"), ["a"])


def test_answers_that_do_not_fit_the_summary_are_refused(kept):
    path = kept / "a-study" / "kd0" / "test_correct.json"
    bits = json.loads(path.read_text())["correct"]
    for wrong in ("ff" * (len(bits) // 2), bits[:-2], "xy", None):
        edit(path, correct=wrong)
        with pytest.raises(UserError, match="kd0"):
            page(kept)


def test_what_is_missing_is_named(kept, capsys):
    for flags, message in (
        (["--keep", "kept/New One", "runs"], "small letters"),
        (["--keep", "kept/new", "runs"], "--command"),
        (["--keep", "kept/new", "--command", "c", "nowhere"], "no finished run"),
        (["--keep", "kept/new", "--command", "c"], "name the runs"),
        (["--from", "runs"], "no measurements"),
        (["--from", "kept", "runs"], "takes no runs"),
        ([], "name run folders"),
    ):
        with pytest.raises(UserError, match=message):
            report(flags)
    edit(kept / "a-study" / "measurement.json", commands=[])
    with pytest.raises(UserError, match="list of commands"):
        page(kept)


def test_the_command_writes_the_page(kept, capsys):
    report(["--from", "kept"])
    assert (kept / "README.md").read_text() == page(kept)
    assert "wrote kept/README.md" in capsys.readouterr().out
    report(["--keep", "kept/a-study", "runs"])  # again, with the title and commands that are there
    assert read_json(kept / "a-study" / "measurement.json")["commands"] == ["python -m kd.study"]


def test_a_run_that_is_kept_already_keeps_its_name_there(kept):
    shutil.copytree("runs", "others")
    for path in Path("others").glob("*/config.json"):
        content = read_json(path)
        edit(path, identity=content["identity"] | {"lr": 0.7})
    keep(["runs", "others"], Path("kept/a-study"), [])
    names = {path.parent.name for path in Path("kept/a-study").glob("*/summary.json")}
    assert names == {path.name for path in Path("runs").iterdir()} | {
        f"others-{path.name}" for path in Path("runs").iterdir()
    }
    assert "# Measurements" in page(kept)


def test_two_copies_of_a_run_in_a_measurement_are_named(kept):
    shutil.copytree("kept/a-study/kd0", "kept/a-study/twice")
    with pytest.raises(UserError, match=r"a-study/twice: the same run as .*kd0; counted once; remove that folder"):
        page(kept)
