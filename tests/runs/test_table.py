"""The table that ends a run."""

from pathlib import Path

import pytest

from kd.runs.table import _beside_control, _rows
from kd.utils.files import read_json, write_json

SUMMARY = {"script": "distill_student.py", "method": "kd", "model": "resnet8", "params": 10, "seed": 0, "epochs": 1}
SUMMARY |= {"status": "finished", "agreement": 77.0}


def test_a_teacher_that_was_distilled_itself_does_not_show_its_own_agreement(tmp_path):
    """The column is the student's agreement with that row's teacher; one teacher's is in the student's row."""
    (tmp_path / "middle").mkdir()
    write_json(tmp_path / "middle" / "summary.json", SUMMARY)
    student = SUMMARY | {"teacher": str(tmp_path / "middle"), "teacher_test_top1": 50.0, "agreement": 90.0}
    rows = _rows(tmp_path, student)
    assert [name for name, _ in rows] == ["teacher", "student alone", "student (kd)"]
    assert rows[0][1]["agreement"] is None
    assert rows[2][1]["agreement"] == 90.0


def test_each_of_several_teachers_has_the_students_agreement_with_it(tmp_path):
    names = [str(tmp_path / "one"), str(tmp_path / "other")]
    for name in names:
        (tmp_path / name).mkdir()
        write_json(tmp_path / name / "summary.json", SUMMARY)
    members = [{"folder": name, "agreement": value} for name, value in zip(names, (60.0, 70.0), strict=True)]
    rows = _rows(Path("run"), SUMMARY | {"teacher": names, "teachers": members})
    assert [row["agreement"] for name, row in rows if name == "teacher"] == [60.0, 70.0]


def test_several_pretrained_teachers_show_what_the_run_measured_of_them_and_of_all_together():
    names = ["timm/one", "other.pth"]
    members = [{"folder": name, "agreement": 60.0, "test_top1": 70.0 + i} for i, name in enumerate(names)]
    rows = _rows(Path("run"), SUMMARY | {"teacher": names, "teachers": members, "teacher_test_top1": 75.0})
    assert [(name, row["model"], row["test_top1"]) for name, row in rows if name.startswith("teacher")] == [
        ("teacher", "timm/one", 70.0),
        ("teacher", "other.pth", 71.0),
        ("teachers together", "2 networks", 75.0),
    ]
    assert dict(rows)["teachers together"]["agreement"] == 77.0


def of_data(folder: Path, data: str, **summary) -> Path:
    """A run on a data set, as far as the table reads it."""
    folder.mkdir()
    identity = {"role": "teacher", "model": "resnet8", "data": data, "classes": None, "teacher": None}
    write_json(folder / "config.json", {"identity": identity, "flags": {"method": {}, "data": {"source": data}}})
    write_json(folder / "summary.json", SUMMARY | summary)
    return folder


@pytest.mark.parametrize("there", ["ten classes", "all classes"])
def test_a_teacher_of_another_task_has_the_accuracy_that_the_students_run_measured(tmp_path, there):
    scores = {"test_top1": 70.0, "test_top5": 99.0, "test_nll": 1.5, "test_ece": 3.0, "test_images": 100}
    teacher = of_data(tmp_path / "teacher", there, **scores)
    about = SUMMARY | {"teacher": str(teacher), "teacher_test_top1": 90.0}
    student = of_data(tmp_path / "student", "ten classes")
    row = dict(_rows(student, about))["teacher"]
    if there == "ten classes":
        assert (row["test_top1"], row["test_nll"]) == (70.0, 1.5)
    else:
        assert row == {"model": "resnet8", "params": 10, "test_top1": 90.0}


def test_an_extended_student_is_not_compared_with_one_that_was_not(tmp_path):
    student, alone = (of_data(tmp_path / name, "digits", test_top1=50.0) for name in ("student", "alone"))
    config = read_json(student / "config.json")
    write_json(student / "config.json", config | {"identity": config["identity"] | {"extended_from": [10]}})
    read = SUMMARY | {"test_top1": 50.0, "test_images": 100}
    assert "one was extended from a shorter training" in _beside_control(student, read, read, alone)
