"""Which runs are one group, and which control each method is compared with."""

import dataclasses
import json
from pathlib import Path

import pytest

from kd.config import METHODS
from kd.errors import UserError
from kd.report.__main__ import main as report
from kd.report.groups import ALONE, METHOD, Comparison, Group, by_data, compare_groups, compare_with
from kd.report.opening import headline
from kd.report.tables import gain_table, said_of_smoothing, said_of_teachers
from kd.runs.comparison import Answers, Difference
from kd.runs.folder import DEFAULTS_OF_NEWER_FLAGS
from kd.runs.results import collect_runs
from kd.runs.taught_by import teacher_identity
from kd.training.summary import UNTESTED
from kd.utils.files import read_json, write_json
from tests.report.test_report import edit, edit_identity, fake_run, study

TAUGHT = [name for name in METHODS if name not in ("none", "embed")]  # embed knows no accuracies


def groups() -> list[Group]:
    (found,) = by_data(collect_runs(["runs"])[0]).values()
    return found


def written(folder: str, role: str, **identity) -> Path:
    """A run with its method's flags at their defaults, of which its identity leaves the newer ones out."""
    flags = json.loads(json.dumps(dataclasses.asdict(METHODS[role]())))
    path = fake_run(folder, role, 0, **flags)
    config = read_json(path / "config.json")
    for key, value in flags.items():
        if key in DEFAULTS_OF_NEWER_FLAGS and value == DEFAULTS_OF_NEWER_FLAGS[key]:
            del config["identity"][key]
    config["identity"] |= identity
    write_json(path / "config.json", config)
    return path


@pytest.mark.parametrize("method", TAUGHT)
def test_every_method_has_the_student_alone_as_its_control(method):
    written("runs/none", "none")
    written("runs/taught", method)
    alone, taught = groups()
    assert (alone.kind, taught.kind) == (ALONE, METHOD)
    assert taught.controls == [alone]


def test_what_is_said_of_two_students_names_each():
    for model in ("tests.networks:plain", "tests.networks:deep"):
        fake_run(f"runs/none-{model}", "none", 0, model=model, label_smoothing=0.0)
        fake_run(f"runs/kd-{model}", "kd", 0, model=model, alpha=0.9)
    comparisons = compare_groups(groups(), Answers())
    for model in ("tests.networks:plain", "tests.networks:deep"):
        assert f"student (kd), {model} against student alone, {model}" in [one.name for one in comparisons]
        assert f"student (kd), {model} " in headline(comparisons)
    assert len({row[:2] for row in gain_table(comparisons).rows}) == 2


def test_the_control_of_a_distilled_student_that_is_compressed_is_a_control():
    """Both begin with the distilled one; without its run among these nothing would tell the control from others."""
    start = written("runs/start", "kd")
    edit(start / "summary.json", weights_sha256="its")
    written("runs/sparse-alone", "none", init="its", sparsity=0.8)
    written("runs/sparse-kd", "kd", init="its", sparsity=0.8)
    by_folder = {group.runs[0].path.name: group for group in groups()}
    assert by_folder["sparse-alone"].kind == ALONE
    assert by_folder["sparse-kd"].controls == [by_folder["sparse-alone"]]
    written("runs/tuned", "none", init="its", label_share=0.1)
    tuned = next(group for group in groups() if group.runs[0].path.name == "tuned")
    assert (tuned.kind, tuned.fine_tuned) == (METHOD, True)


def test_a_fine_tuned_student_is_compared_with_those_that_began_where_its_first_training_did():
    """Published weights are no gain of the first training's."""
    written("runs/scratch", "none")
    start = written("runs/start", "mimic", init="published")
    edit(start / "summary.json", weights_sha256="its")
    written("runs/tuned", "none", init="its")
    by_folder = {group.runs[0].path.name: group for group in groups()}
    assert by_folder["tuned"].fine_tuned
    assert by_folder["tuned"].controls == [by_folder["start"]]
    written("runs/from-published", "none", init="published")
    by_folder = {group.runs[0].path.name: group for group in groups()}
    assert by_folder["tuned"].controls == [by_folder["from-published"], by_folder["start"]]


def test_settings_that_are_long_and_begin_alike_have_labels_of_their_own():
    for last in ("blocks.5", "blocks.7"):
        written(f"runs/{last}", "kd", freeze=["patch_embed", *(f"blocks.{i}" for i in range(5)), last])
    labels = {group.label for group in groups()}
    assert len(labels) == 2
    assert all("freeze" in label and len(label) < 120 for label in labels)


def test_the_teacher_is_found_from_any_folder(monkeypatch):
    """Runs that were copied from another machine name it from where they were trained."""
    for seed in (0, 1):
        fake_run(f"project/runs/big{seed}", "teacher", seed)
        taught = written(f"project/runs/taught{seed}", "kd", teacher=f"its weights {seed}")
        edit(taught / "summary.json", teacher=f"runs/big{seed}")
    for here, pattern in ((".", "project/runs"), ("project/runs", ".")):
        monkeypatch.chdir(here)
        (found,) = by_data(collect_runs([pattern])[0]).values()
        (group,) = [group for group in found if group.kind == METHOD]
        assert len(group.runs) == 2, "teachers that differ only in their seed are the same"
        assert group.external_teacher == ""


def test_streams_of_two_columns_are_two_data_sets():
    for column in ("rgb", "depth"):
        written(f"runs/{column}", "none", stream=True, image=column)
    found = by_data(collect_runs(["runs"])[0])
    assert [name.rpartition(", ")[2] for name in found] == ["depth", "rgb"]


def taught_by(folder: str, teacher: str, seed: int, **identity) -> Path:
    """A student of the run in `teacher`, as that is now."""
    path = fake_run(folder, "kd", seed, alpha=0.9)
    edit(path / "summary.json", teacher=teacher, teacher_model="tests.networks:plain")
    sha256 = read_json(Path(teacher) / "summary.json")["weights_sha256"]
    edit_identity(path, teacher=teacher_identity(sha256, read_json(Path(teacher) / "model.json")), **identity)
    return path


def test_students_of_a_teacher_that_was_trained_anew_in_its_folder_are_another_group():
    teacher = fake_run("runs/teacher", "teacher", 0)
    edit(teacher / "summary.json", weights_sha256="before")
    taught_by("runs/kd0", "runs/teacher", 0)
    edit(teacher / "summary.json", weights_sha256="after")
    edit_identity(teacher, epochs=2, lr=0.1)
    for seed in (1, 2):
        taught_by(f"runs/kd{seed}", "runs/teacher", seed)
    methods = [group for group in groups() if group.distilled]
    assert sorted(group.count for group in methods) == ["1", "2"]
    outside = next(group for group in methods if group.count == "1")
    assert outside.external_teacher.startswith("tests.networks:plain from teacher ")
    (Path("runs/teacher") / "model.json").unlink()  # as in docs/measurements
    assert [group.count for group in groups() if group.distilled] == ["3"]


@pytest.mark.parametrize(
    ("pairs", "count"),
    [
        ([(0, "a"), (1, "b"), (2, "c")], 0),
        ([(0, "a"), (1, "a"), (2, "a")], 1),
        ([(0, "a"), (1, "a"), (2, "b")], 2),
        ([(seed, teacher) for seed in (0, 1, 2) for teacher in "ab"], 2),
    ],
)
def test_teachers_that_taught_several_seeds_are_said(pairs, count):
    for teacher in "abc":
        path = fake_run(f"runs/{teacher}", "teacher", "abc".index(teacher))
        edit(path / "summary.json", weights_sha256=teacher)
    for seed, teacher in pairs:
        taught_by(f"runs/kd-{seed}-{teacher}", f"runs/{teacher}", seed)
    (method,) = (group for group in groups() if group.distilled)
    assert method.shared_teachers == count
    said = {1: "All seeds of student (kd) share one teacher:", 2: "The seeds of student (kd) share 2 teachers:"}
    assert bool(count) == any(line.startswith(said.get(count, "")) for line in said_of_teachers([method]))


def test_other_weights_of_the_same_flags_are_no_copy_and_the_tested_run_counts():
    first, second = (fake_run(f"runs/{name}", "kd", 0, alpha=0.9) for name in "ab")
    tested = read_json(first / "summary.json") | {"weights_sha256": "a"}
    write_json(first / "summary.json", tested | dict.fromkeys(UNTESTED))
    edit(second / "summary.json", weights_sha256="b")
    (run,), (other,) = collect_runs(["runs"])
    assert run.path == second
    assert (Path(other.path), other.state) == (first, "trained again")
    write_json(first / "summary.json", tested)
    (run,), (other,) = collect_runs(["runs"])
    assert run.path == first
    assert "and other weights (test " in other.why
    edit(second / "summary.json", weights_sha256="a")
    assert collect_runs(["runs"])[1][0].state == "a copy"


def test_an_export_of_averaged_weights_does_not_take_its_runs_place():
    run, export = (fake_run(f"runs/{name}", "kd", 0, alpha=0.9) for name in ("b", "a"))
    edit(export / "summary.json", weights="ema")
    (counted,), (other,) = collect_runs(["runs"])
    assert counted.path == run
    assert (Path(other.path), other.state) == (export, "an export")


def test_accuracies_on_other_test_images_are_in_other_tables():
    for fraction, images in ((0.2, 200), (0.3, 300)):
        path = fake_run(f"runs/{fraction}", "none", 0)
        edit(path / "summary.json", test_images=images)
        if fraction != 0.2:
            edit_identity(path, test_fraction=fraction)
    assert list(by_data(collect_runs(["runs"])[0])) == [
        "pictures, --test-fraction 0.2",
        "pictures, --test-fraction 0.3",
    ]
    edit_identity(Path("runs/0.3"), classes=10)
    assert len(by_data(collect_runs(["runs"])[0])) == 2
    edit_identity(Path("runs/0.3"), test_fraction=0.2)
    assert not any("--test-fraction" in name for name in by_data(collect_runs(["runs"])[0]))
    edit_identity(Path("runs/0.3"), classes=None)
    edit(Path("runs/0.3/summary.json"), test_images=200)
    assert list(by_data(collect_runs(["runs"])[0])) == ["pictures"]


def test_a_method_that_smooths_labels_is_measured_by_a_control_that_does():
    for seed in (0, 1):
        fake_run(f"runs/none{seed}", "none", seed, label_smoothing=0.0)
        fake_run(f"runs/kd{seed}", "kd", seed, alpha=0.9, label_smoothing=0.1)
        fake_run(f"runs/dkd{seed}", "dkd", seed, beta=8.0, label_smoothing=0.0)
    comparisons = compare_groups(groups(), Answers())
    assert "against student alone." in headline(comparisons)
    (said,) = said_of_smoothing(comparisons)
    assert said.startswith("student (kd) smooths labels by 0.1, student alone by 0:")
    for seed in (0, 1):
        fake_run(f"runs/smooth{seed}", "none", seed, label_smoothing=0.1)
    text = headline(compare_groups(groups(), Answers()))
    smoothed = text.index("against student alone, label smoothing 0.1.")
    assert text.index("student (kd)") > smoothed
    assert (text.index("student (dkd)") > smoothed) == (text.rindex("against student alone.") > smoothed)


def test_what_fine_tuned_students_started_from_is_found_where_it_was_not_named():
    for seed in (0, 1):
        start = fake_run(f"first/mimic{seed}", "mimic", seed, weight=0.1)
        edit(start / "summary.json", weights_sha256=f"its{seed}")
        tuned = fake_run(f"runs/tuned{seed}", "none", seed, init=f"its{seed}")
        config = read_json(tuned / "config.json")
        config["flags"]["compress"] = {"init": f"first/mimic{seed}"}
        write_json(tuned / "config.json", config)
    (group,) = groups()
    assert (group.name, group.count) == ("student (mimic, then fine-tuned)", "2")


def test_methods_are_compared_with_another_one_by_the_same_recipe_and_teacher():
    for number, name in enumerate("ab"):
        path = fake_run(f"runs/{name}", "teacher", 0, label_smoothing=number)
        edit(path / "summary.json", weights_sha256=name)
    for seed in (0, 1):
        fake_run(f"runs/none{seed}", "none", seed)
        fake_run(f"runs/tfkd{seed}", "tfkd", seed)
        for role, teacher in (("kd", "a"), ("dkd", "a"), ("at", "b")):
            path = fake_run(f"runs/{role}{seed}", role, seed)
            edit(path / "summary.json", teacher=f"runs/{teacher}", teacher_model="tests.networks:plain")
            info = read_json(Path(f"runs/{teacher}/model.json"))
            edit_identity(path, teacher=teacher_identity(teacher, info))
    before = {group.name: len(group.controls) for group in groups()}
    found = groups()
    assert compare_with(found, "dkd")
    added = {group.name for group in found if len(group.controls) > before[group.name]}
    assert added == {"student (kd)", "student (tfkd)"}
    comparisons = compare_groups(found, Answers())
    one = next(one for one in comparisons if one.name == "student (kd) against student (dkd)")
    alone = {its.group.name: its.difference for its in comparisons if its.control.kind == ALONE}
    assert one.difference.mean == pytest.approx(alone["student (kd)"].mean - alone["student (dkd)"].mean)
    assert one.number == 6
    assert "against student (dkd). " in headline(comparisons)
    assert "against student alone. " in headline(comparisons)
    assert not compare_with(groups(), "nkd")


def test_a_report_against_a_method_that_is_not_there_is_refused():
    study(seeds=(0,))
    with pytest.raises(UserError, match="--against dkd: no run of it by the recipe and teacher of another method's"):
        report(["runs", "--against", "dkd"])


@pytest.mark.parametrize(("control", "said"), [("none", "helped, beyond"), ("dkd", "better, beyond")])
def test_of_two_methods_one_is_better(control, said):
    fake_run("runs/kd", "kd", 0)
    fake_run("runs/other", control, 0)
    method, other = sorted(groups(), key=lambda group: group.name != "student (kd)")
    difference = Difference([0, 1], 90.0, 0.01, 0.01)
    assert Comparison(method, other, difference, difference.p).verdict.startswith(said)


def test_of_three_runs_of_one_identity_the_tested_one_counts_and_the_others_are_told_from_it():
    for name, sha256 in (("a", "x"), ("b", "x"), ("c", "y")):
        path = fake_run(f"runs/{name}", "kd", 0)
        summary = read_json(path / "summary.json") | {"weights_sha256": sha256}
        write_json(path / "summary.json", summary | (dict.fromkeys(UNTESTED) if name != "c" else {}))
    (run,), others = collect_runs(["runs"])
    assert run.path.name == "c"
    assert [(Path(other.path).name, other.state) for other in others] == [
        ("a", "trained again"),
        ("b", "trained again"),
    ]
    assert all("runs/c" in other.why for other in others)


def test_a_fine_tuned_student_is_compared_with_a_method_once():
    start = written("runs/start", "mimic")
    edit(start / "summary.json", weights_sha256="its")
    written("runs/tuned", "none", init="its")
    written("runs/kd", "kd")
    before = {group.name: len(group.controls) for group in groups()}
    found = groups()
    compare_with(found, "kd")
    tuned = next(group for group in found if group.fine_tuned)
    assert len(tuned.controls) == before[tuned.name]
