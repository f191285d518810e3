"""Which runs are one group, and which control each method is compared with."""

import dataclasses
import json
from pathlib import Path

import pytest

from kd.config import METHODS
from kd.report.groups import ALONE, METHOD, Group, by_data, compare_groups
from kd.report.opening import headline
from kd.report.tables import gain_table
from kd.runs.comparison import Answers
from kd.runs.folder import DEFAULTS_OF_NEWER_FLAGS
from kd.runs.results import collect_runs
from kd.utils.files import read_json, write_json
from tests.report.test_report import edit, fake_run

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
