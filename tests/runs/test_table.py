"""The table that ends a run."""

from kd.runs.table import _rows
from kd.utils.files import write_json

SUMMARY = {"script": "distill_student.py", "method": "kd", "model": "resnet8", "params": 10, "seed": 0, "epochs": 1}
SUMMARY |= {"status": "finished", "agreement": 77.0}


def test_a_teacher_that_was_distilled_itself_does_not_show_its_own_agreement(tmp_path):
    """The column is the student's agreement with that row's teacher; one teacher's is in the student's row."""
    (tmp_path / "middle").mkdir()
    write_json(tmp_path / "middle" / "summary.json", SUMMARY)
    student = SUMMARY | {"teacher": str(tmp_path / "middle"), "teacher_test_top1": 50.0, "agreement": 90.0}
    rows = _rows(student)
    assert [name for name, _ in rows] == ["teacher", "student alone", "student (kd)"]
    assert rows[0][1]["agreement"] is None
    assert rows[2][1]["agreement"] == 90.0


def test_each_of_several_teachers_has_the_students_agreement_with_it(tmp_path):
    names = [str(tmp_path / "one"), str(tmp_path / "other")]
    for name in names:
        (tmp_path / name).mkdir()
        write_json(tmp_path / name / "summary.json", SUMMARY)
    members = [{"folder": name, "agreement": value} for name, value in zip(names, (60.0, 70.0), strict=True)]
    rows = _rows(SUMMARY | {"teacher": names, "teachers": members})
    assert [row["agreement"] for name, row in rows if name == "teacher"] == [60.0, 70.0]


def test_several_pretrained_teachers_show_what_the_run_measured_of_them_and_of_all_together():
    names = ["timm/one", "other.pth"]
    members = [{"folder": name, "agreement": 60.0, "test_top1": 70.0 + i} for i, name in enumerate(names)]
    rows = _rows(SUMMARY | {"teacher": names, "teachers": members, "teacher_test_top1": 75.0})
    assert [(name, row["model"], row["test_top1"]) for name, row in rows if name.startswith("teacher")] == [
        ("teacher", "timm/one", 70.0),
        ("teacher", "other.pth", 71.0),
        ("teachers together", "2 networks", 75.0),
    ]
    assert dict(rows)["teachers together"]["agreement"] == 77.0
